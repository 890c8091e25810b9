"""RePlay's SASRec that learns an LLM's user profiles, beside raygr's SASRec with the guided user state.

    python benchmarks/guided_state.py games-982-last --data FOLDER --users FOLDER/user_scores_llm.csv --seeds 0 1 \\
        --arms "guided state" "LLM's users, learned weights"

    git clone --branch feature/llm_profile_distillation https://github.com/sb-ai-lab/RePlay /tmp/replay-code
    python3.11 -m venv /tmp/replay
    /tmp/replay/bin/pip install torch==2.13.0+cpu 'lightning<2.7' 'polars<2' 'pandas<3' 'numpy<2.5' pyarrow \\
        scikit-learn scipy tqdm psutil optuna

    python benchmarks/llm_profiles.py --users FOLDER/user_scores_llm.csv --code /tmp/replay-code \\
        --replay-python /tmp/replay/bin/python

The first command makes raygr's runs and the data; its --help says what FOLDER holds. RePlay's class `SasRecLLM` is in
no release (0.22 lacks it), only on that branch: measured at commit f885280e of 2025-03-26.

Equal on both sides: split, targets, ranking without the user's earlier items, metrics, width, blocks, heads, dropout,
batch size, learning rate, longest history, full softmax cross-entropy, evaluation every fourth epoch, stopping. Each
keeps its own block, initial weights and Adam. RePlay's windows end half a window apart as raygr's do, but a target that
two windows share is learned twice. The settings are those of guided_state.py; nothing was tuned for RePlay.

The profile is the vector that a large LLM gave the user, one score per aspect, standardised over users. RePlay's paper
has the text embedding of a written profile in its place. The distillation has the settings that its authors published
for their Amazon Beauty and Amazon M2 (sb-ai-lab/ECIR26_Pre-trained_LLMs_Meet-Sequential_Recommenders), with the last
block for theirs: weight of its loss, kind of loss, weights of the positions, number of epochs. A control gives each
user the profile of another. Results go to benchmarks/results/llm-profiles.json and a table to the console; RePlay's
runs lie in outputs/llm-profiles, and finished ones are skipped.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raygr import files
from raygr.compare.gain_words import gain_text
from raygr.compare.stage import gain_records
from raygr.compare.tables import markdown_rows
from raygr.data.interactions import Interactions, read_ids, read_interactions
from raygr.data.vector_tables import read_vectors, rows_by_id
from raygr.metrics.rank_tables import read_rankings
from raygr.metrics.ranking import METRICS, metric_values
from raygr.metrics.z_scores import standardise
from raygr.schema import RANKS, TEST, TRAIN, USERS, VALIDATION
from raygr.train.run_metrics import read_metrics

OUTPUTS, RESULT = Path("outputs/llm-profiles"), Path(__file__).parent / "results" / "llm-profiles.json"
MODEL = {"width": 60, "blocks": 2, "heads": 2, "history": 50, "dropout": 0.4}
TRAINING = {"batch": 128, "learning_rate": 1e-3, "epochs": 200, "evaluate_every": 4, "patience": 5}
OURS = {
    "raygr, base": "base",
    "raygr, guided state": "guided-state",
    "raygr, LLM's users": "LLMs-users-learned-weights",
}
# As published for two Amazon data sets, but for the block's number; the epochs are those before `fine_tune_epoch`.
BEAUTY = {"alpha": 0.4, "scale_guide_loss": True, "criterion_reconstruct_name": "MSE", "weighting_scheme": "mean"}
M2 = {"alpha": 0.8, "criterion_reconstruct_name": "RMSE", "weighting_scheme": "exponential", "weight_scale": 0.1}
LAST_BLOCK = {"reconstruction_layer": MODEL["blocks"] - 1}
THEIRS: dict[str, dict[str, Any]] = {
    "RePlay, base": {"profile_epochs": 0, "distillation": {}},
    "RePlay, profiles as for Beauty": {"profile_epochs": 11, "distillation": BEAUTY | LAST_BLOCK},
    "RePlay, the same shuffled": {"profile_epochs": 11, "distillation": BEAUTY | LAST_BLOCK, "is_shuffled": True},
    "RePlay, profiles as for M2": {"profile_epochs": 9, "distillation": M2 | LAST_BLOCK},
}
BESIDE = {  # further comparisons than that with the base
    "raygr, guided state": "RePlay, profiles as for Beauty",
    "RePlay, profiles as for Beauty": "RePlay, the same shuffled",
}
SHOWN = ("ndcg_at_10", "mrr")


class Trained(NamedTuple):
    """What is compared of one training."""

    rank_U: np.ndarray
    """Of each user's test target, by user_index."""
    best_epoch: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="outputs/guided-state/games-982-last", help="folder of raygr's runs and data")
    parser.add_argument("--users", required=True, help="CSV of a large LLM's vectors of users")
    parser.add_argument("--code", required=True, help="checkout of RePlay's branch")
    parser.add_argument("--replay-python", required=True, help="python of the environment with RePlay's dependencies")
    parser.add_argument("--own", nargs="+", choices=OURS, default=list(OURS), help="raygr's arms")
    parser.add_argument("--arms", nargs="+", choices=THEIRS, default=list(THEIRS), help="RePlay's arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args()
    job = make_job(f"{parsed.runs}/prepare", parsed.users) | MODEL | TRAINING | {"threads": parsed.threads}
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    for seed in parsed.seeds:  # seed by seed, so that a run that is cut off has whole rows
        for arm in parsed.arms:
            train(arm, job, seed, parsed)
    found = {arm: [own_run(f"{parsed.runs}/sasrec-{OURS[arm]}-{seed}") for seed in parsed.seeds] for arm in parsed.own}
    found |= {arm: [replay_run(result_file(arm, seed)) for seed in parsed.seeds] for arm in parsed.arms}
    record = {arm: arm_record(arm, found) for arm in found}
    settings = MODEL | TRAINING | {"seeds": parsed.seeds, "arms": {arm: THEIRS[arm] for arm in parsed.arms}}
    files.write_json({"settings": settings, "arms": record}, str(RESULT))
    print(table(record))


def make_job(data: str, users: str) -> dict[str, Any]:
    """The histories, targets and standardised profiles that all of RePlay's trainings read."""
    found = read_interactions(data)
    table = read_vectors(users, subjects="users", column="expected", aspects=None)
    scores_UA, _ = rows_by_id(table, read_ids(data, USERS, "user"))
    if np.isnan(scores_UA).any():
        raise SystemExit(f"{users} lacks scores of some users of {data}")
    profiles = standardise(scores_UA)[0].tolist()
    return {"items": found.items, "profiles": profiles} | histories_and_targets(found)


def histories_and_targets(found: Interactions) -> dict[str, dict[str, list]]:
    """By part and user: the item_index before the target, oldest first, and that of the target."""
    train, validation, test = (by_user(found, part) for part in (TRAIN, VALIDATION, TEST))
    before_test = [first + second for first, second in zip(train, validation, strict=True)]
    return {
        "histories": {TRAIN: train, VALIDATION: train, TEST: before_test},
        "targets": {VALIDATION: [one[0] for one in validation], TEST: [one[0] for one in test]},
    }


def by_user(found: Interactions, part: str) -> list[list[int]]:
    """The item_index of each user's interactions in the part, oldest first; SystemExit where it is no leave-one-out."""
    is_part_N = found.split_N == part
    count_U = np.bincount(found.user_N[is_part_N], minlength=found.users)
    if count_U.min() < 1 or (part != TRAIN and count_U.max() > 1):
        raise SystemExit(f"this comparison needs one {VALIDATION} and one {TEST} interaction of each user, none more")
    return [one.tolist() for one in np.split(found.item_N[is_part_N], np.cumsum(count_U)[:-1])]


def train(arm: str, job: dict[str, Any], seed: int, parsed: argparse.Namespace) -> None:
    """One training by RePlay in a process of its own; does nothing where its result is there."""
    result, here = result_file(arm, seed), Path(__file__).resolve().parent
    if result.exists():
        return
    own = THEIRS[arm]
    profiles = job["profiles"]
    if own.get("is_shuffled"):
        profiles = [profiles[user] for user in np.random.default_rng(seed).permutation(len(profiles))]
    file = result.with_suffix(".job")
    file.write_text(json.dumps(job | own | {"profiles": profiles, "seed": seed}))
    paths = os.pathsep.join([str(here.parent), str(Path(parsed.code).absolute())])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(parsed.threads)}
    command = [str(Path(parsed.replay_python).absolute()), str(here / "recommenders_replay.py"), str(file), str(result)]
    subprocess.run(command, env=environment, check=True)


def result_file(arm: str, seed: int) -> Path:
    return OUTPUTS / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def own_run(run: str) -> Trained:
    ranking = read_rankings(files.read_table(files.join(run, RANKS)), part=TEST, targets=("last",))["full"]
    return Trained(ranking.rank_E, read_metrics(run).best_epoch)


def replay_run(result: Path) -> Trained:
    found = json.loads(result.read_text())
    return Trained(np.array(found["ranks"]), found["best_epoch"])


def arm_record(arm: str, found: dict[str, list[Trained]]) -> dict[str, Any]:
    """Mean metrics of the arm's runs, and its gains over its program's base and over the arm in `BESIDE`."""
    base, values_MZU = f"{program(arm)}, base", metric_array(found[arm])
    record = {
        "mean": dict(zip(METRICS, values_MZU.mean((1, 2)).tolist(), strict=True)),
        "best_epochs": [one.best_epoch for one in found[arm]],
        "against": {},
    }
    for other in (base, BESIDE.get(arm)):
        if other in found and other != arm:
            is_paired = program(other) == program(arm)  # seeds of two programs have nothing in common
            gains = gain_records(values_MZU, metric_array(found[other]), paired=is_paired)
            record["against"][other] = {key: gains[key] for key in SHOWN}
    return record


def program(arm: str) -> str:
    return arm.partition(",")[0]


def metric_array(trained: list[Trained]) -> np.ndarray:
    """(M, Z, U): each metric of each run, by user."""
    return np.array([[metric_values(metric, one.rank_U) for one in trained] for metric in METRICS])


def table(record: dict[str, dict[str, Any]]) -> str:
    rows = [["arm", "NDCG@10", "against its base", "MRR", "against its base", "best epochs"]]
    lines = []
    for arm, one in record.items():
        against = dict(one["against"])
        gains = against.pop(f"{program(arm)}, base", {})
        cells = [[f"{one['mean'][key]:.4f}", gain_text(gains[key]) if gains else ""] for key in SHOWN]
        rows.append([arm, *cells[0], *cells[1], ", ".join(map(str, one["best_epochs"]))])
        lines += [f"{arm} against {other}: {gain_text(found[SHOWN[0]])}\n" for other, found in against.items()]
    return "\n".join([markdown_rows(rows), *lines])


if __name__ == "__main__":
    main()
