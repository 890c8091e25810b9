"""Does the guided user state pay? Recommenders with and without it, and with scores or users shuffled.

    python benchmarks/guided_state.py games --data FOLDER            # 3,681 users of Amazon Video Games
    python benchmarks/guided_state.py games-403 --data FOLDER --models gru4rec gru4rec-plus sasrec bert4rec
    python benchmarks/guided_state.py games-982-last --data FOLDER --users FILE --arms "LLM's users, learned weights"
    python benchmarks/guided_state.py ml-1m-1200-new --data FOLDER --arms "add, item dropout" "guided state, text PCA"

FOLDER holds `interactions.csv.gz` (user, item, time or `position`, rating), a file of the items' texts and, but
for office products, `item_scores_llm.csv`. `--users FILE` holds a large LLM's static vectors of users, for the arms
that take them. Every arm has the total width 60. Names that end in `-new` set 15% of the items aside: training does not
know them. Runs lie in outputs/guided-state; finished ones are skipped. Means and gains with their intervals go to
benchmarks/results/guided-state/NAME-MODEL-RANKING.json, a figure of gains by how often the target was bought in
training to docs/results, and a Markdown table to the console.
"""

import argparse
import csv
import gzip
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.figure import Figure

from raygr import files
from raygr.compare.comparison import Comparison, read_comparison
from raygr.compare.config import CompareConfig
from raygr.compare.gain_words import gain_text
from raygr.compare.tables import markdown_rows
from raygr.config import load_config, override
from raygr.pipeline import run_alone, run_stages
from raygr.prepare.config import PrepareConfig
from raygr.report.charts import BLUE, GREY, ORANGE, STYLE, save_figure
from raygr.train.config import TrainConfig
from raygr.vectors.config import VectorsConfig
from raygr.vectors.stage import VECTORS

Config = TypeVar("Config")

FIGURES = "docs/results/guided-state"
DRAWN = {"guided state": BLUE, "guided state, shuffled scores": GREY, "the paper's form": ORANGE}
OUTPUTS, RESULTS = Path("outputs/guided-state"), Path(__file__).parent / "results" / "guided-state"
NEW = 0.15  # share of the items that nobody has bought in training
SHORT, LONG = {"max_history": 50, "dropout": 0.4}, {"max_history": 80, "dropout": 0.3}
GAMES: dict[str, Any] = {
    "texts": "items.jsonl.gz",
    "item_columns": {"description": "genres", "details": "developer"},
    "aspects": "games",
    "train": SHORT,
}
FILMS: dict[str, Any] = {
    "texts": "movies.csv.gz",
    "item_columns": {"categories": "genres", "description": "plot", "details": "director"},
    "aspects": "movies",
    "train": LONG,
}
OFFICE: dict[str, Any] = {
    "texts": "items.jsonl.gz",
    "item_columns": {"details": "brand"},
    "aspects": "gift-cards",
    "train": SHORT,
}
DATA: dict[str, dict[str, Any]] = {
    # users and items with at least so many interactions; `scored`: among the items that have scores; `tests`: targets
    # of each user, the last ones
    "games": GAMES | {"scored": True, "users": 8, "items": 1, "tests": 3},
    "games-403": GAMES | {"users": 20, "items": 8, "tests": 5},
    "games-982": GAMES | {"users": 15, "items": 10, "tests": 5},
    "games-982-last": GAMES | {"users": 15, "items": 10},  # the LLM's users were rated from all but the last two
    "games-982-new": GAMES | {"users": 15, "items": 10, "new": NEW},
    "games-new": GAMES | {"scored": True, "users": 8, "items": 1, "new": NEW},
    "ml-1m": FILMS | {"users": 5, "items": 5, "tests": 3},
    "ml-1m-1200": FILMS | {"users": 5, "items": 3, "sample": 1200, "last": 80, "tests": 5},
    "ml-1m-1200-new": FILMS | {"users": 5, "items": 3, "sample": 1200, "last": 80, "new": NEW},
    "office-new": OFFICE | {"users": 5, "items": 3, "new": NEW},
}
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"model": "sasrec"},
    "gru4rec": {"model": "gru4rec"},
    "gru4rec-plus": {"model": "gru4rec", "loss": "bpr_max", "negatives": 256, "final_activation": "elu-0.5"},
    # learns from few targets a batch, so it needs more epochs and stands still for longer before it rises
    "bert4rec": {"model": "bert4rec", "mask_rate": 0.4, "epochs": 600, "patience": 20},
}
# stand for files: a large LLM's scores of items, components of a small LLM's states of their texts, and `--users`
SCORES, TEXT, USERS = "item scores", "text PCA", "users"
CONCAT = {"fusion": "concat", "base_width": 48, "guided_weight": 2.0}
ARMS: dict[str, dict[str, Any]] = {
    "the paper's form": {**CONCAT, "user_scores": "profile", "user_side": "add"},
    "concat, items alone": {**CONCAT, "user_scores": "none"},
    "add, items alone": {"fusion": "add", "user_scores": "none"},
    "profile, learned weights": {"user_scores": "profile"},
    "guided state": {},
    "guided state, shuffled scores": {"control": "shuffled"},
    "guided state, random scores": {"control": "random"},
    "guided state, text PCA": {"item_scores": TEXT},
    "add and guided state": {"fusion": "add"},
    "concat and guided state": CONCAT,
    "add, item dropout": {"fusion": "add", "user_scores": "none", "item_dropout": 0.2},
    "guided state, item dropout": {"item_dropout": 0.2},
    "add and guided state, item dropout": {"fusion": "add", "item_dropout": 0.2},
    "add and guided state, shuffled scores": {"fusion": "add", "control": "shuffled", "item_dropout": 0.2},
    "add and guided state, random scores": {"fusion": "add", "control": "random", "item_dropout": 0.2},
    "add and guided state, text PCA": {"fusion": "add", "item_scores": TEXT, "item_dropout": 0.2},
    "LLM's users, learned weights": {"user_scores": "table", "user_table": USERS},
    "LLM's users shuffled, learned weights": {"user_scores": "table", "user_table": USERS, "user_control": "shuffled"},
    "guided state with the LLM's users": {"user_table": USERS},
    "guided state with the LLM's users shuffled": {"user_table": USERS, "user_control": "shuffled"},
}
DEFAULT = ["the paper's form", "add, items alone", "guided state", "guided state, shuffled scores"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATA)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--users", type=Path, help="CSV of a large LLM's vectors of users")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sasrec"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=DEFAULT)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=2)
    parsed = parser.parse_args()
    settings, folder = DATA[parsed.name], OUTPUTS / parsed.name
    places = {SCORES: parsed.data / "item_scores_llm.csv", TEXT: folder / "vectors" / VECTORS, USERS: parsed.users}
    arms = {"base": {}} | {arm: {"item_scores": SCORES} | ARMS[arm] for arm in parsed.arms}
    taken = {own.get(key) for own in arms.values() for key in ("item_scores", "user_table")}
    if USERS in taken and parsed.users is None:
        parser.error("these arms need --users FILE")
    run_stages([("prepare", prepare_config(parsed.name, parsed.data, places[SCORES]))])
    if TEXT in taken:
        given = {"data": str(folder / "prepare"), "aspects": f"configs/aspects/{settings['aspects']}.yaml"}
        run_stages([("vectors", configured(VectorsConfig, {"output": str(folder / "vectors")} | given))])
    for model in parsed.models:
        common = MODELS[model] | settings["train"] | {"threads": parsed.threads}
        common |= {"targets": ["last", "every"]} if "tests" in settings else {}
        runs = {
            arm: [train_config(folder, f"{model}-{arm}-{seed}", common | own, places, seed) for seed in parsed.seeds]
            for arm, own in arms.items()
        }
        # seed by seed, so that a run that is cut off has whole rows
        run_stages([("train", one) for together in zip(*runs.values(), strict=True) for one in together])
        compared = CompareConfig(
            output=str(folder / f"comparison-{model}"),
            arms={arm: tuple(one.output for one in found) for arm, found in runs.items()},
        )
        run_alone("compare", compared, force=True)
        show(parsed.name, model, compared.output)


def prepare_config(name: str, data: Path, scores: Path) -> PrepareConfig:
    """Writes the interactions in question as a plain CSV, which the prepare run reads."""
    settings, source = DATA[name], data / "interactions.csv.gz"
    with gzip.open(source, "rt", newline="") as file:
        header, *rows = csv.reader(file)
    item = next(place for place, one in enumerate(header) if one in ("item_id", "movie_id", "asin"))
    time = "position" if "position" in header else "timestamp"
    if "scored" in settings:
        with open(scores, newline="") as file:
            known = {row[0] for row in csv.reader(file)}
        rows = [row for row in rows if row[item] in known]
        most = Counter(row[header.index("user_id")] for row in rows)
        rows = [row for row in rows if most[row[header.index("user_id")]] >= settings["users"]]
    chosen = OUTPUTS / name / "interactions.csv"
    chosen.parent.mkdir(parents=True, exist_ok=True)
    if not chosen.exists():
        with open(chosen, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    given = {
        "output": str(OUTPUTS / name / "prepare"),
        "reviews": [str(chosen)],
        "metadata": [str(data / settings["texts"])],
        "format": "table",
        "timestamps": "position" if time == "position" else "time",
        "columns": {"timestamp": time, "item_id": header[item]},
        "item_columns": settings["item_columns"],
        "min_user_interactions": settings["users"],
        "min_item_interactions": settings["items"],
        "sample_users": settings.get("sample"),
        "last_interactions": settings.get("last"),
        "test_interactions": settings.get("tests", 1),
        "new_items": settings.get("new", 0.0),
    }
    return configured(PrepareConfig, given)


def train_config(folder: Path, run: str, settings: dict[str, Any], places: dict[str, Path], seed: int) -> TrainConfig:
    """`settings` whose item scores and user table are names of `places`, as a run of the folder."""
    given = {"output": str(folder / run.replace(", ", "-").replace(" ", "-").replace("'", "")), "seed": seed}
    given |= {"data": str(folder / "prepare"), "evaluate_every": 4, "ray": "never"}
    given |= {"epochs": 200, "patience": 5} | settings
    given |= {key: str(places[given[key]].absolute()) for key in ("item_scores", "user_table") if key in given}
    return configured(TrainConfig, given)


def configured(config: type[Config], settings: dict[str, Any]) -> Config:
    return load_config(config, None, [override(key, value) for key, value in settings.items()])


def show(name: str, model: str, comparison: str) -> None:
    """Prints a table of each ranking, and stores means and gains of the ranking of new items or of all."""
    found = read_comparison(comparison)
    for ranking in found.arms["base"].metrics:
        rows, record = [["arm", "NDCG@10", "against base", "MRR", "against base"]], {}
        for arm, one in found.arms.items():
            metrics, gains = one.metrics[ranking], (one.against_base or {}).get(ranking, {})
            cells = [[f"{metrics[key].mean:.4f}", gain_text(gains[key]) if key in gains else ""] for key in METRICS]
            rows.append([arm, *cells[0], *cells[1]])
            record[arm] = {key: {"mean": metrics[key].mean, "gain": gains.get(key)} for key in METRICS}
        files.write_json(record, str(RESULTS / f"{name}-{model}-{ranking.replace(', ', '-').replace(' ', '-')}.json"))
        print(f"{name}, {model}, {ranking}\n\n{markdown_rows(rows)}")
    save_figure(by_train_count(found), f"{FIGURES}-{name}-{model}")


def by_train_count(found: Comparison) -> Figure:
    """Gain in NDCG@10 by how often the target was bought in training, in groups of about equally many targets."""
    ranking = "full, every target" if "full, every target" in found.arms["base"].metrics else "full"
    arms = {arm: one.by_train_count[ranking] for arm, one in found.arms.items() if arm in DRAWN}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="black", linewidth=0.8)
        for place, (arm, groups) in enumerate(arms.items()):
            x = [at + 0.2 * (place - (len(arms) - 1) / 2) for at in range(len(groups))]
            y = [one.gain.difference for one in groups]
            spans = [
                [one.gain.difference - one.gain.low for one in groups],
                [one.gain.high - one.gain.difference for one in groups],
            ]
            axes.errorbar(x, y, yerr=spans, fmt="o", markersize=4, capsize=2, color=DRAWN[arm], label=arm)
        groups = next(iter(arms.values()))
        axes.set_xticks(range(len(groups)), [f"{one.least} to {one.most}" for one in groups])
        axes.set_xlabel("train interactions of the target")
        axes.set_ylabel("gain in NDCG@10 over base")
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


METRICS = ("ndcg_at_10", "mrr")

if __name__ == "__main__":
    main()
