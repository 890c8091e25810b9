"""A small sweep: 20 users who walk a cycle of 20 items, item scores of four aspects, a model that trains in seconds."""

from pathlib import Path
from typing import Any

from toy_data import cycles, random_scores, write_csv, write_prepared

from raygr.config import check_config
from raygr.sweep.config import SweepConfig
from raygr.sweep.space import search_points, train_config
from raygr.train.config import TrainConfig

ITEMS, ASPECTS = 20, ["pace", "tension", "humour", "length"]
SMALL = {"base_width": 16, "batch_size": 8, "max_history": 10, "epochs": 4, "dropout": 0.0, "fusion": "concat"}


def write_toy(folder: Path) -> Path:
    write_prepared(folder / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
    scores_IA = random_scores(ITEMS, 4, seed=0)
    write_csv(folder / "scores.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    return folder


def settings(folder: Path, space: dict[str, Any], **changes: Any) -> SweepConfig:
    train = {"data": str(folder / "prepare"), "item_scores": str(folder / "scores.csv")} | SMALL
    train |= changes.pop("train", {})
    shared = {name: value for name, value in train.items() if name not in space}
    given = {"output": str(folder / "sweep"), "train": shared, "space": space}
    return check_config(SweepConfig, given | changes, source="test")


def trained(config: SweepConfig) -> list[TrainConfig]:
    return [train_config(config, point, name=str(n)) for n, point in enumerate(search_points(config))]
