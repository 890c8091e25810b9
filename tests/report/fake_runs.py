"""Finished runs with known numbers for the tests of the report, without any training."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from random_run import random_run
from toy_data import random_scores, walks, write_csv, write_prepared

from raygr import runs
from raygr.compare.tables import LIST_FIGURES
from raygr.files import write_json, write_table, write_text
from raygr.metrics.ranking import METRICS
from raygr.schema import INTERACTION_SCHEMA, ITEM_SCHEMA, ITEMS, USER_SCHEMA, score_schema
from raygr.train.config import TrainConfig

ASPECTS = ["tension level", "pace", "dead | aspect"]
LIVE_ASPECTS = ["pace", "</script><script>alert(1)</script>"]
HOSTILE = "<script>alert('x')</script><!-- <script> | [a](b) & $x$"
HOSTILE_USER = "u0</script><script>alert(2)</script>"


# settings and counts of a prepare run
PREPARED = {"output": "p", "reviews": ["a b.jsonl"], "test_interactions": 1, "max_text_chars": 20_000}
COUNTS = {
    "reviews": {"read": 98_765, "kept": 86_419, "by_reason": {"bad_rating": 12, "too_few_interactions": 12_334},
                "text_cut": 0, "text_repaired": 0},
    "users": {"read": 5, "kept": 5, "by_reason": {}, "no_train": 0, "no_test": 0},
    "items": {"read": 5, "kept": 5, "by_reason": {}, "without_metadata": 2, "without_text": 0, "text_cut": 1,
              "text_repaired": 0},
}  # fmt: skip


def finished(path: Path, job: str, config: dict, *, counts: dict | None = None) -> str:
    """Writes the run.json of a run whose files are there already."""
    runs.finish_run(runs.Run(str(path), job, config, started=0.0), inputs=[], counts=counts or {})
    return str(path)


def make_data(path: Path) -> str:
    items = [
        {"item_index": i, "item_id": f"I{i}", "title": title, "description": "", "categories": "", "details": "",
         "train_rating": 4.0, "train_rating_count": count, "all_rating": 4.0, "all_rating_count": count}
        for i, (title, count) in enumerate(
            [("The Plain Film", 70), (HOSTILE, 50), ("Never Scored", 99), ("", 60), ("Rare Film", 1)], start=1
        )
    ]  # fmt: skip
    users = [
        {"user_index": u, "user_id": f"U{u}", "interactions": 5 + u, "cutoff": 3, "cutoff_position": 2}
        for u in range(5)
    ]
    events = [
        {"user_index": u, "item_index": p + 1, "position": p, "rating": 4.0, "timestamp": p,
         "split": ["train", "train", "train", "validation", "test"][p]}
        for u in range(5) for p in range(5)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(items, schema=ITEM_SCHEMA), str(path / "items" / "part-0.parquet"))
    write_table(pa.Table.from_pylist(users, schema=USER_SCHEMA), str(path / "users.parquet"))
    write_table(pa.Table.from_pylist(events, schema=INTERACTION_SCHEMA), str(path / "interactions.parquet"))
    write_json({"users": 4321, "items": 5, "history": {"median": 7.25}}, str(path / "statistics.json"))
    return finished(path, "prepare", PREPARED | {"output": str(path)}, counts=COUNTS)


def make_scores(path: Path, subjects: str, ids: list[str]) -> str:
    rows = [
        {"subject_id": subject, "ratings": [row + 1, 5, 3], "expected": [row + 1.3, 9.0 - row, 3.0],
         "reason": "ok" if row < 4 else "no rating", "model": "m", "adapter": "", "mode": "probe"}
        for row, subject in enumerate(ids)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(rows, schema=score_schema(ASPECTS)), str(path / "scores" / "part-0.parquet"))
    aspect = {"mean": 5.25, "spread": 1.75, "identical_share": 0.125, "dead": False}
    quality = {
        "subjects": len(ids), "by_reason": {"ok": 4, "no rating": 1}, "valid_share": 0.8, "effective_rank": 1.875,
        "aspects": {**dict.fromkeys(ASPECTS[:2], aspect), ASPECTS[2]: {**aspect, "spread": 0.0, "dead": True}},
        "seconds": 33.5, "subjects_per_second": 0.149, "tokens_computed": 1234567,
    }  # fmt: skip
    write_json(quality, str(path / "quality.json"))
    return finished(path, "score", {"output": str(path), "data": "d", "subjects": subjects, "aspects": "a.yaml"})


def make_comparison(path: Path, train: str) -> str:
    protocol = {"split": "leave_one_out", "ties": "mean rank"}
    lists = {"length": 10, "mmr_weight": 0.5, "scores": None}
    lists |= dict.fromkeys(("ranked", "reranked"), dict.fromkeys(LIST_FIGURES, 0.4321))

    def arm(mean: float, gain: dict | None, shares: dict | None) -> dict:
        metrics = {m: {"mean": mean, "per_run": [mean]} for m in METRICS}
        gains = None if gain is None else dict.fromkeys(METRICS, gain)
        cold = {m: {"mean": mean / 10, "per_run": [mean / 10]} for m in METRICS}
        return {
            "runs": [train, str(path / "gone")], "parameters": 54321, "shares": shares,
            "base_moved": shares and 0.3456,
            "base": None if gain is None else "base", "protocol": protocol, "lists": lists,
            "settings": {"model": "sasrec", "fusion": "add", "control": "none", "user_scores": "llm",
                         "base_width": 60, "loss": "cross_entropy"},
            "metrics": {"full": metrics},
            "against_base": None if gain is None else {"full": gains}, "is_reference": False, "against_references": {},
            "cold": {"full": {"targets": 17, "users": 15, "metrics": cold,
                              "against_base": gains and dict.fromkeys(METRICS, nothing)}},
        }  # fmt: skip

    better = {"difference": 0.01, "low": 0.002, "high": 0.02, "relative": 12.34, "relative_low": 2.1,
              "relative_high": 22.9, "p": 0.001, "p_holm": 0.02, "per_run": [12.0, 13.0],
              "over": "users and runs"}  # fmt: skip
    unsure = {
        **better,
        "difference": -0.0036,
        "low": -0.011,
        "high": 0.0049,
        "relative": -3.21,
        "relative_low": -9.9,
        "relative_high": 4.4,
        "p_holm": 0.06,
    }
    nothing = {**better, "difference": 0.0, "relative": None, "relative_low": None, "relative_high": None}
    arms = {
        "base": arm(0.1111, None, None),
        "refined": arm(0.1248, better, {"base": 0.62, "encoder_guided": 0.345, "user_guided": 0.035}),
        "shuffled": arm(0.1075, unsure, None),
        "chance": arm(0.0123, {**unsure, "over": "users"}, None)
        | {"runs": [], "is_reference": True, "lists": None, "settings": {}, "parameters": 0},
    }
    plain = {name: value for name, value in better.items() if name not in ("p_holm", "per_run")}
    groups = [(0, 0, 0.0219), (1, 14, -0.0037), (15, 321, 0.0456)]
    arms["refined"]["by_train_count"] = {
        "full": [
            {"least": least, "most": most, "targets": 1414, "users": 1313, "base": 0.0765,
             "gain": plain | {"difference": gain, "low": gain - 0.01, "high": gain + 0.01}}
            for least, most, gain in groups
        ]
    }  # fmt: skip
    arms["shuffled"]["settings"] = arms["shuffled"]["settings"] | {"control": "shuffled"}
    for name, one in arms.items():  # two new items, which the base alone cannot rank
        one["metrics"]["new-items, new targets"] = {key: {"mean": 0.0777, "per_run": [0.0777]} for key in METRICS}
        one["cold"]["new-items, new targets"] = {"targets": 0, "users": 0, "metrics": None, "against_base": None}
        if name != "base":
            one["against_base"]["new-items, new targets"] = one["against_base"]["full"]
    way = {"share": 0.43, "low": 0.352, "high": 0.508}
    arms["refined"]["way_to_truth"] = {"full": dict.fromkeys(METRICS, way)}
    record = {"protocol": protocol, "base": "base", "cold_below": 10, "shown": ["refined", "shuffled"], "arms": arms}
    record |= {"primary_metric": "ndcg_at_10", "remarks": ["“shuffled” ranks worse than chance."]}
    write_json(record, str(path / "comparison.json"))
    return finished(path, "compare", {"output": str(path), "arms": {"base": [train]}, "base": "base"})


def make_tuning(path: Path) -> str:
    """Four held-out users whose reward rises by 0.5 each, and whose AUC is known of three."""
    stages = [("before", 0, 0.0), ("warm_start", 0, 0.25), ("reinforcement", 10, 0.75), ("reinforcement", 20, 0.5)]
    users = [
        {"stage": stage, "step": step, "user_index": u, "user_id": f"U{u}", "reward": u / 10 + rise,
         "mrr": u / 10 + rise / 2, "auc": None if u == 0 else 0.5, "common_mrr": 0.25, "common_auc": 0.5,
         "personal_mrr": 0.2, "personal_auc": 0.45,
         "valid": 1.0}
        for stage, step, rise in stages for u in range(4)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(users), str(path / "evaluations.parquet"))
    evaluations = [{"stage": stage, "step": step, "metrics": {}} for stage, step, _ in stages]
    record = {"steps": 20, "warm_steps": 3, "best_step": 10, "held_out": 4, "evaluations": evaluations}
    write_json(record, str(path / "evaluations.json"))
    figures = {"reward_spread": 0.25, "flat_groups": 0.125, "valid": 1.0, "entropy": 2.125, "gradient_norm": 1.5}
    figures["losses"] = {"value": -0.5, "format": 1.5, "format_reward": 0.0, "teacher": 0.0, "kl": 0.0}
    lines = [{"stage": "warm_start", "step": n, "loss": 3.0} for n in range(1, 4)]
    lines += [
        {"stage": "reinforcement", "step": n, "reward": n / 64, "loss": 1.0, "kl": 0.0375 if n % 10 == 0 else None,
         "tokens_per_second": 4567.0, **figures}
        for n in range(1, 21)
    ]  # fmt: skip
    write_text("".join(json.dumps(line) + "\n" for line in lines), str(path / "steps.jsonl"))
    config = {"output": str(path), "data": "d", "item_scores": "s", "aspects": "a.yaml", "task": "base"}
    config["adapter"] = None
    return finished(path, "finetune", config | {"rollouts": "slots"})


def trained(folder: Path, *, users: int = 14, items: int = 30) -> str:
    """A finished train run with a guided user state and random weights."""
    histories = walks(users, items, 9, seed=7)
    ids = [HOSTILE_USER, *(f"u{user}" for user in range(1, users))]
    ratings = [[1.0 + (user + step) % 5 for step in range(9)] for user in range(users)]
    write_prepared(folder / "prepare", histories, items=items, user_ids=ids, ratings=ratings)
    scores_IA = random_scores(items, 2, seed=3)
    path = write_csv(folder / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, LIVE_ASPECTS)
    guided = {"item_scores": path, "user_scores": "history", "user_side": "learned", "fusion": "concat"}
    places = {"output": str(folder / "train"), "data": str(folder / "prepare")}
    return random_run(TrainConfig(**places, **guided, base_width=8, max_history=6))


def with_titles(data: Path, titles: dict[str, str]) -> None:
    (path,) = (data / ITEMS).glob("*.parquet") if (data / ITEMS).is_dir() else [data / ITEMS]
    table = pq.read_table(path)
    rows = [row | {"title": titles.get(row["item_id"], row["title"])} for row in table.to_pylist()]
    write_table(table.from_pylist(rows, schema=table.schema), str(path))


def prepare_record(folder: Path) -> str:
    """Finishes the prepare run that `trained` wrote, so that a report may read it."""
    write_json({"users": 14}, str(folder / "prepare" / "statistics.json"))
    return finished(folder / "prepare", "prepare", PREPARED, counts=COUNTS)
