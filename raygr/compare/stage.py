"""The compare stage: train runs -> comparison.json, table.md, table.csv, table.tex.

Each arm is compared with its base arm on the test part. Gains have intervals over users and runs (metrics/gains.py) and
are computed from unrounded means. Popularity and chance are added as further arms, and on request item-kNN, EASE, ALS
and the truth of simulated data.
P-values of the primary metric are corrected by Holm's method, over the arms that one table shows: those of one ranking
and of either all or the cold-start targets. An arm and a base that were evaluated under different protocols are
refused. Shape letters: `M` metrics, `Z` runs of an arm, `U` users.
"""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterable

import numpy as np

from raygr import files, runs
from raygr.compare.arms import Arms, ComparedRun, base_of, check_arms, read_train_run
from raygr.compare.comparison import ArmGain, ArmRecord, Comparison, CountGain, Gains, MetricMeans, TargetResults
from raygr.compare.config import CompareConfig
from raygr.compare.gain_words import remarks
from raygr.compare.references import CHANCE, POPULARITY, TRUTH, classic_rankings, reference_rankings, why_not
from raygr.compare.tables import csv_table, latex_table, markdown_table
from raygr.metrics.gains import Gain, WayShare, gains, way_shares
from raygr.metrics.rank_tables import Ranking, count_edges, counted_ranking, user_values
from raygr.metrics.ranking import METRICS
from raygr.schema import COMPARISON
from raygr.simulate.truth import check_truth

logger = logging.getLogger(__name__)

MARKDOWN, CSV, LATEX = "table.md", "table.csv", "table.tex"
SETTINGS = ("model", "fusion", "control", "user_scores", "user_control", "base_width", "loss")
COUNT_BINS = 5  # groups of targets by train interactions, of about equal size


def compare(config: CompareConfig) -> runs.Run:
    """Writes each arm's metrics, and its gains over its base arm with intervals and p-values."""
    arms = {
        name: sorted(map(read_train_run, paths), key=lambda run: run.config["seed"])
        for name, paths in config.arms.items()
    }
    check_arms(config, arms)
    for data in dict.fromkeys(run.config["data"] for arm in arms.values() for run in arm):
        if config.truth and runs.is_finished(data):
            check_truth(config.truth, data)
    run = runs.start_run(config.output, job="compare", config=config)
    comparison = compared_arms(config, arms)
    for text in comparison.remarks:
        logger.warning("%s", text)
    files.write_json(comparison, run.file(COMPARISON))
    files.write_text(markdown_table(comparison), run.file(MARKDOWN))
    files.write_text(csv_table(comparison), run.file(CSV))
    files.write_text(latex_table(comparison), run.file(LATEX))
    paths = [path for arm in config.arms.values() for path in arm]
    users = {name: len(np.unique(r.user_E)) for arm in arms.values() for name, r in arm[0].rankings.items()}
    read = [*paths, *([config.truth] if config.truth else [])]
    runs.finish_run(run, inputs=read, counts={"arms": len(arms), "runs": len(paths), "users": users})
    return run


def compared_arms(config: CompareConfig, arms: Arms) -> Comparison:
    """All arms beside their bases and the references, with corrected p-values and remarks."""
    bases = {name: base_of(name, config) for name in arms}
    records = {
        name: arm_record(arm, base, arms[base] if base else None, config)
        for (name, arm), base in zip(arms.items(), bases.values(), strict=True)
    }
    correct_p_values(records, config.primary_metric)
    references, missing = reference_records(config, arms, records)
    with_base = [name for name, base in bases.items() if base]
    stamps = [record.protocol for record in records.values()]
    comparison = Comparison(
        protocol=stamps[0] if all(stamp == stamps[0] for stamp in stamps) else None,
        base=next((base for base in bases.values() if base), next(iter(records))),
        cold_below=config.cold_below,
        primary_metric=config.primary_metric,
        shown=with_base if config.shown is None else list(config.shown),
        arms=records | references,
        remarks=[],
    )
    comparison.remarks = missing + remarks(comparison)
    return comparison


# --- records ------------------------------------------------------------------------------------


def arm_record(
    arm: list[ComparedRun], base_name: str | None, base: list[ComparedRun] | None, config: CompareConfig
) -> ArmRecord:
    """`base` are the runs of the arm called `base_name`; both None for an arm that has none."""
    first = arm[0]
    found = {name: target_results(arm, base, name) for name in first.rankings}
    record = ArmRecord(
        metrics={name: record.metrics or {} for name, record in found.items()},
        against_base=None if base is None else {name: record.against_base or {} for name, record in found.items()},
        cold={name: target_results(arm, base, name, cold_below=config.cold_below) for name in first.rankings},
        runs=[],
        base=base_name,
        is_reference=not first.config,
        against_references={},
        protocol=first.metrics.protocol,
        settings={},
        lists=None,
        shares=None,
        base_moved=None,
        parameters=0,
    )
    if record.is_reference:
        return record
    lists = [run.metrics.lists for run in arm]
    shares = [run.metrics.shares for run in arm if run.metrics.shares is not None]
    moved = [run.metrics.base_moved for run in arm if run.metrics.base_moved is not None]
    record.runs = [run.path for run in arm]
    record.settings = {name: first.config.get(name) for name in SETTINGS}  # None where an older run lacks one
    if not first.config["item_scores"]:
        record.settings |= {"fusion": None, "user_scores": None}  # a base model has nothing to fuse
    ranked, reranked = means([one.ranked for one in lists]), means([one.reranked for one in lists])
    record.lists = dataclasses.replace(lists[0], ranked=ranked, reranked=reranked)
    record.shares = means(shares) if shares else None
    record.base_moved = sum(moved) / len(moved) if len(moved) == len(arm) else None
    record.parameters = first.metrics.parameters
    if base:
        primary = config.primary_metric
        record.by_train_count = {name: list(count_gains(arm, base, name, primary)) for name in first.rankings}
    return record


def count_gains(arm: list[ComparedRun], base: list[ComparedRun], name: str, primary: str) -> Iterable[CountGain]:
    """The gain of one ranking in the primary metric, by how often the target was bought in training."""
    edges = count_edges(base[0].rankings[name], COUNT_BINS)
    for least, below in itertools.pairwise([*edges, math.inf]):
        found = [
            [counted_ranking(run.rankings[name], least=int(least), below=below) for run in some] for some in (arm, base)
        ]
        arm_MZU, base_MZU = (metric_array(rankings, [primary]) for rankings in found)
        [gain] = gains(arm_MZU, base_MZU, paired=is_paired(arm, base))
        kept = found[1][0]
        users = len(np.unique(kept.user_E))
        yield CountGain(
            int(least), int(kept.train_count_E.max()), len(kept.user_E), users, float(base_MZU.mean()), gain
        )


def means(records: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in records) / len(records) for name in records[0]}


def target_results(
    arm: list[ComparedRun], base: list[ComparedRun] | None, name: str, cold_below: int | None = None
) -> TargetResults:
    """Counts, metrics and gains of one ranking: of all targets, or of those with fewer train interactions."""
    found = [[run.rankings[name] for run in some] for some in (arm, base or [])]
    if cold_below is not None:
        found = [[counted_ranking(ranking, below=cold_below) for ranking in some] for some in found]
    user_E = found[0][0].user_E
    record = TargetResults(len(user_E), len(np.unique(user_E)), None, None)
    if not record.targets:
        return record
    arm_MZU = metric_array(found[0], METRICS)
    record.metrics = {
        metric: MetricMeans(float(values_Z.mean()), values_Z.tolist())
        for metric, values_Z in zip(METRICS, arm_MZU.mean(axis=2), strict=True)
    }
    if base:
        record.against_base = gain_records(arm_MZU, metric_array(found[1], METRICS), paired=is_paired(arm, base))
    return record


def is_paired(arm: list[ComparedRun], base: list[ComparedRun]) -> bool:
    """Whether runs of both arms have the same seeds; references have no seed and are paired with any runs."""
    return not arm[0].config or [run.config["seed"] for run in arm] == [run.config["seed"] for run in base]


def metric_array(rankings: list[Ranking], metrics: Iterable[str]) -> np.ndarray:
    """(M, Z, U): each metric of each run's ranking, by user."""
    return np.stack([np.stack([user_values(ranking, metric) for ranking in rankings]) for metric in metrics])


def gain_records(arm_MZU: np.ndarray, base_MZU: np.ndarray, *, paired: bool) -> Gains:
    """Each metric's gain. Each run's own is over the base's run of the same seed; unpaired, over the base's mean."""
    if paired:
        arm_MZU = np.broadcast_to(arm_MZU, base_MZU.shape)
    arm_MZ, base_MZ = arm_MZU.mean(axis=2), base_MZU.mean(axis=2)
    beside_MZ = base_MZ if paired else np.broadcast_to(base_MZ.mean(axis=1)[:, None], arm_MZ.shape)
    found = gains(arm_MZU, base_MZU, paired=paired)
    return {
        metric: ArmGain(
            **vars(gain),
            p_holm=None,
            per_run=[100 * (one / base - 1) if base else None for one, base in zip(arm_Z, base_Z, strict=True)],
        )
        for metric, gain, arm_Z, base_Z in zip(METRICS, found, arm_MZ.tolist(), beside_MZ.tolist(), strict=True)
    }


def correct_p_values(arms: dict[str, ArmRecord], primary: str) -> None:
    """Sets `p_holm` of the primary metric's gains, corrected over the arms of a table; one run has no p-value."""
    families: dict[tuple[str, bool], list[ArmGain]] = {}
    for arm in arms.values():
        for name, found in (arm.against_base or {}).items():
            families.setdefault((name, False), []).append(found[primary])
        for name, record in arm.cold.items():
            if record.against_base:
                families.setdefault((name, True), []).append(record.against_base[primary])
    for family in families.values():
        tested = [gain for gain in family if gain.p is not None]
        p = np.array([gain.p for gain in tested], np.float64)
        order = np.argsort(p)
        corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)  # Holm's
        for place, value in zip(order.tolist(), corrected.tolist(), strict=True):
            tested[place].p_holm = value


# --- references ----------------------------------------------------------------------


def arms_by_protocol(config: CompareConfig, arms: Arms) -> dict[str, list[str]]:
    """The first base arm under each protocol -> the names of all arms under that protocol."""
    bases = [name for name in arms if base_of(name, config) is None or name in config.bases.values()]
    found: dict[str, list[str]] = {}
    first_of: dict[str, str] = {}
    for name in dict.fromkeys([*bases, *arms]):
        stamp = json.dumps(arms[name][0].metrics.protocol, sort_keys=True)
        found.setdefault(first_of.setdefault(stamp, name), []).append(name)
    return found


def reference_records(
    config: CompareConfig, arms: Arms, records: dict[str, ArmRecord]
) -> tuple[dict[str, ArmRecord], list[str]]:
    """Records of the references under each protocol, and a sentence for each protocol that lacks them.

    Adds to each arm's record its gains over popularity and chance, and its share of the way to the truth.
    """
    by_protocol = arms_by_protocol(config, arms)
    found, missing = {}, []
    for base, members in by_protocol.items():
        first = arms[base][0]
        reason = why_not(first.config["data"], first.metrics.protocol)
        if reason:
            missing.append(f"Popularity and chance are left out beside “{base}”: {reason}.")
            continue
        made = reference_rankings(first.path, first.config["data"], first.rankings, shop=config.truth)
        classic = classic_rankings(first.path, first.config["data"], first.rankings, config.classic)
        missing += [
            f"{name} is left out beside “{base}”: {one}." for name, one in classic.items() if isinstance(one, str)
        ]
        chosen = {name: one for name, one in classic.items() if not isinstance(one, str)}
        made |= {name: one.rankings for name, one in chosen.items()}
        references = {name: ComparedRun("", {}, first.metrics, rankings) for name, rankings in made.items()}
        for name, reference in references.items():
            shown_name = name if len(by_protocol) == 1 else f"{name} ({base})"
            found[shown_name] = arm_record([reference], base, arms[base], config)
            found[shown_name].chosen = chosen[name].settings if name in chosen else {}
            if TRUTH in references:
                found[shown_name].way_to_truth = ways([reference], arms[base], references[TRUTH])
        for member in members:
            for name in (POPULARITY, CHANCE):
                gain = reference_gains(arms[member], references[name], config.primary_metric)
                records[member].against_references[name] = gain
            own = records[member].base
            if own and TRUTH in references:
                records[member].way_to_truth = ways(arms[member], arms[own], references[TRUTH])
    return found, missing


def ways(arm: list[ComparedRun], base: list[ComparedRun], truth: ComparedRun) -> dict[str, dict[str, WayShare | None]]:
    """The share of the way from the base to the truth, by ranking and metric."""
    found = {}
    for name in truth.rankings:
        arm_MZU, base_MZU, truth_MZU = (
            metric_array([run.rankings[name] for run in some], METRICS) for some in (arm, base, [truth])
        )
        if not arm[0].config:
            arm_MZU = np.broadcast_to(arm_MZU, base_MZU.shape)
        shares = way_shares(arm_MZU, base_MZU, truth_MZU, paired=is_paired(arm, base))
        found[name] = dict(zip(METRICS, shares, strict=True))
    return found


def reference_gains(arm: list[ComparedRun], reference: ComparedRun, primary: str) -> dict[str, Gain]:
    """The arm's gain over the reference in the primary metric, by ranking."""
    found = {}
    for name, ranking in reference.rankings.items():
        arm_MZU = metric_array([run.rankings[name] for run in arm], [primary])
        beside_MZU = np.broadcast_to(metric_array([ranking], [primary]), arm_MZU.shape)
        [found[name]] = gains(arm_MZU, beside_MZU, paired=True)
    return found
