"""The arithmetic of benchmarks/recommenders.py. No test runs the compared programs."""

import argparse
import importlib.util
import math
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "recommenders.py"
spec = importlib.util.spec_from_file_location("benchmark_of_recommenders", FILE)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

JOB = {"width": 2, "items": 5, "blocks": 1, "history": 3, "mask_rate": 0.5, "negatives": 4, "batch": 3}
JOB |= {"train": [[1, 2, 3], [1, 2, 3, 4, 5, 5]], "target": [4, 1]}  # 2 and 3 train positions


def run(side: str, epochs: list[float], ndcg: list[float]) -> dict:
    run = {"side": benchmark.read_side(side), "epochs": epochs, "evaluations": [0.5] * len(epochs), "ndcg": ndcg}
    return run | {"about": {}, "last": {"peak_bytes": 1, "threads": 1}}


def record(side: str, epochs: list[float], ndcg: list[float]) -> dict:
    return benchmark.side_record(run(side, epochs, ndcg), JOB, peak=1e4)


@pytest.mark.parametrize(
    ("model", "products"),
    [
        # linear layers 6 x 4 a position, attention 2 x 2 for each pair of a position and one not after it, logits 2 x 5
        ("sasrec", (2 + 3) * 24 + (3 + 6) * 4 + 5 * 10),
        # 3 positions each: 12 x 4, attention 2 x 2 for each of 9 pairs; 3 masked with the head and logits
        ("bert4rec", 6 * 48 + 2 * 9 * 4 + 3 * (4 + 10)),
        ("gru4rec", 5 * (24 + 10)),
        ("gru4rec_lanes", 5 * (24 + 2 * (4 + 3))),
    ],
)
def test_work_of_an_epoch(model, products):
    # a product of the list is one multiply-add; forward once, backward twice
    assert benchmark.epoch_flops(model, JOB) == 2 * 3 * products


def test_ndcg_counts_the_first_ten_places():
    assert benchmark.mean_ndcg([1, 3, 10, 10.5]) == pytest.approx((1 + 0.5 + 1 / math.log2(11)) / 4)


def test_a_side_is_rated_without_its_first_round():
    own = record("raygr-sasrec", [9.0, 1.0, 3.0, 2.0], [0.1, 0.2, 0.3, 0.25])
    assert own["seconds_per_epoch"] == 2.0
    assert own["peak_share"] == pytest.approx(benchmark.epoch_flops("sasrec", JOB) / 2.0 / 1e4)
    assert own["users_per_second"] == 4.0
    assert (own["best_ndcg_at_10"], own["batch"]) == (0.3, 3)


def test_a_pair_is_compared_by_round_and_at_the_same_quality():
    own = record("raygr-sasrec", [9.0, 1.0, 2.0, 1.0], [0.0, 0.19, 0.2, 0.3])
    other = record("rectools-sasrec:2", [9.0, 3.0, 4.0], [0.1, 0.1, 0.2])
    found = benchmark.pair(own, other)
    assert found["times_per_epoch"] == 2.5
    assert (found["lowest"], found["highest"]) == (2.0, 3.0)
    assert found["ndcg_at_10"] == pytest.approx(0.19)
    assert (found["seconds_to_it"], found["other_seconds_to_it"]) == (11.0, 17.5)  # two rounds, and three
    assert found["times_to_it"] == pytest.approx(17.5 / 11)


def test_raygr_stands_beside_every_other_program_of_its_model():
    names = ["raygr-sasrec", "raygr-gru4rec", "raygr-gru4rec_lanes", "recbole-sasrec:9", "official-gru4rec"]
    found = benchmark.pairs([record(name, [1.0, 1.0], [0.1, 0.2]) for name in names])
    assert [(one["side"], one["beside"]) for one in found] == [
        ("raygr-sasrec", "recbole-sasrec:9"),
        ("raygr-gru4rec", "official-gru4rec"),
        ("raygr-gru4rec_lanes", "official-gru4rec"),
    ]


def test_a_side_ends_by_epochs_patience_or_budget():
    job = {"epochs": 4, "patience": 2, "budget": 10.0}
    assert not benchmark.is_done(run("raygr-sasrec", [], []), job)
    assert not benchmark.is_done(run("raygr-sasrec", [1.0] * 3, [0.1, 0.3, 0.2]), job)
    assert benchmark.is_done(run("raygr-sasrec", [1.0] * 3, [0.3, 0.2, 0.2]), job)
    assert benchmark.is_done(run("raygr-sasrec", [1.0] * 4, [0.1, 0.2, 0.3, 0.4]), job)
    assert benchmark.is_done(run("raygr-sasrec", [4.0, 6.0], [0.1, 0.2]), job)


@pytest.mark.parametrize("side", ["raygr", "raygr-caser", "rectools-gru4rec", "raygr-sasrec:0", "recbole-sasrec:x"])
def test_a_side_that_is_none_is_refused(side):
    with pytest.raises(argparse.ArgumentTypeError, match=side):
        benchmark.read_side(side)
