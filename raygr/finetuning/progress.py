"""Where tuning stands, as the loop keeps it and as a checkpoint does."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from raygr.finetuning.rewards import Normalisation


@dataclass
class Progress:
    """Part of every checkpoint."""

    warm_step: int = 0
    step: int = 0
    best_step: int = 0
    """0: right after the warm start, before any reinforcement."""
    best_reward: float = -math.inf
    best_normalisation: Normalisation | None = None
    """That of the evaluation which chose the best adapter."""
    normalisation: Normalisation | None = None
    """That of sampled ratings; moves where the user statistics are running."""
    common_slope: tuple[float, ...] = ()
    """Running user statistics only: what raising a rating has been worth to all users alike, (A,)."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """One per step, for steps.jsonl."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """`stage` (before, warm_start, reinforcement), `step`, `metrics`, and `users`: a list per metric."""


def plain(progress: Progress) -> dict[str, Any]:
    """Without a class of ours, so that a checkpoint is read with torch's safe reader."""
    own = {"best_normalisation": progress.best_normalisation, "normalisation": progress.normalisation}
    return asdict(progress) | {name: value and value._asdict() for name, value in own.items()}


def progress_of(plain: dict[str, Any]) -> Progress:
    own = {name: plain[name] and Normalisation(**plain[name]) for name in ("best_normalisation", "normalisation")}
    return Progress(**plain | own)
