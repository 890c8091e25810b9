"""Spaces become points and train settings, or are refused; results are chosen by validation; trials run, stop, fail."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from toy_data import cycles, random_scores, write_csv, write_prepared

from raygr import runs, sweep
from raygr.config import ConfigError, check_config
from raygr.config_results import SweepConfig
from raygr.evaluation import METRICS
from raygr.sweep_figure import lines_through_the_best
from raygr.sweep_results import Ended, ranked_configurations, result_row, write_results
from raygr.sweep_space import search_points, train_config, with_absolute_paths

ITEMS, ASPECTS = 20, ["pace", "tension", "humour", "length"]
SMALL = {"base_width": 16, "batch_size": 8, "max_history": 10, "epochs": 4, "dropout": 0.0, "fusion": "concat"}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """20 users who walk a cycle of 20 items, and item scores of four aspects."""
    write_prepared(tmp_path / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
    scores_IA = random_scores(ITEMS, 4, seed=0)
    write_csv(tmp_path / "scores.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(scores_IA)}, ASPECTS)
    return tmp_path


def settings(folder: Path, space: dict[str, Any], **changes: Any) -> SweepConfig:
    train = {"data": str(folder / "prepare"), "item_scores": str(folder / "scores.csv")} | SMALL
    train |= changes.pop("train", {})
    given = {"output": str(folder / "sweep"), "train": {k: v for k, v in train.items() if k not in space}}
    return check_config(SweepConfig, given | {"space": space} | changes, source="test")


def trained(config: SweepConfig) -> list:
    return [train_config(config, point, name=str(n)) for n, point in enumerate(search_points(config))]


# --- the space ---------------------------------------------------------------------------------


def test_guided_dimensions_become_aspects(toy: Path):
    dimensions = [0, 2, ["length", "pace"], {"random": 2, "subsets": 3}]
    base, first, named, *draws = trained(settings(toy, {"guided_dimension": dimensions}, train={"control": "shuffled"}))
    assert (base.item_scores, base.aspects, base.control) == (None, None, "none")
    assert first.aspects == ("pace", "tension") and first.control == "shuffled"
    assert named.aspects == ("length", "pace")
    assert [len(draw.aspects) for draw in draws] == [2, 2, 2]
    places = [[ASPECTS.index(name) for name in draw.aspects] for draw in draws]
    assert all(place == sorted(place) for place in places)
    assert len({draw.aspects for draw in draws}) > 1
    again = trained(settings(toy, {"guided_dimension": dimensions}, train={"control": "shuffled"}))
    assert [draw.aspects for draw in draws] == [draw.aspects for draw in again[3:]]
    others = trained(settings(toy, {"guided_dimension": dimensions}, seed=1))
    assert [draw.aspects for draw in draws] != [draw.aspects for draw in others[3:]]


def test_a_total_width_is_kept_and_none_leaves_the_base_width(toy: Path):
    """Figure 3: learned and guided dimensions together 20, and beside it 16 + k."""
    configs = trained(settings(toy, {"guided_dimension": [0, 2, 4], "total_width": [20, None]}))
    assert [config.base_width for config in configs] == [20, 16, 18, 16, 16, 16]
    added = trained(settings(toy, {"guided_dimension": [4], "total_width": [20]}, train={"fusion": "add"}))
    assert [config.base_width for config in added] == [20]


def test_a_grid_has_every_point_once_and_trials_their_own_folders(toy: Path):
    config = settings(toy, {"model": ["sasrec", "gru4rec"], "guided_weight": [0.5, 2], "seed": [0, 1]})
    points = search_points(config)
    assert [tuple(point.values()) for point in points[:3]] == [
        ("sasrec", 0.5, 0),
        ("sasrec", 0.5, 1),
        ("sasrec", 2, 0),
    ]
    assert len({tuple(point.values()) for point in points}) == 8
    configs = trained(config)
    assert [(one.model, one.guided_weight, one.seed) for one in configs] == [tuple(point.values()) for point in points]
    assert configs[3].output == f"{toy}/sweep/trials/3" and configs[3].threads == 1


def test_trials_in_folders_of_their_own_find_the_data(toy: Path, monkeypatch):
    monkeypatch.chdir(toy)
    train = {"data": "prepare", "item_scores": "scores.csv"}
    config = with_absolute_paths(settings(Path(), {"item_scores": ["scores.csv", None], "seed": [0]}, train=train))
    monkeypatch.chdir("/")
    scored, base = trained(config)
    assert (scored.data, scored.item_scores, base.item_scores) == (f"{toy}/prepare", f"{toy}/scores.csv", None)
    assert scored.output == f"{toy}/sweep/trials/0"


def test_random_points_differ_stay_in_their_ranges_and_repeat_with_the_seed(toy: Path):
    lists = {"guided_weight": [0.5, 1, 2], "seed": [0, 1, 2]}
    points = search_points(settings(toy, lists, search="random", trials=9))
    assert len({tuple(point.values()) for point in points}) == 9
    assert points != search_points(settings(toy, lists))
    ranges = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "base_width": {"low": 8, "high": 12},
        "heads": [1],
    }
    drawn = [search_points(settings(toy, ranges, search="random", trials=50, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    widths = {point["base_width"] for point in drawn[0]}
    rates = [point["learning_rate"] for point in drawn[0]]
    assert widths == {8, 9, 10, 11, 12}
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 10 < sum(rate < 1e-3 for rate in rates) < 40  # a factor of ten on either side


@pytest.mark.parametrize(
    ("space", "changes", "words"),
    [
        ({}, {}, "space is empty"),
        ({"seed": []}, {}, r"no value \(seed\)"),
        ({"lambda": [1]}, {}, r"cannot be searched.*guided_weight.*guided_dimension.*\(lambda\)"),
        ({"workers": [1, 2]}, {}, r"cannot be searched.*\(workers\)"),
        ({"seed": [0, 1, 0]}, {}, r"same value twice \(seed\)"),
        ({"candidates": [["full"], ["uniform-100"]]}, {}, r"lists, which are for guided_dimension \(candidates\)"),
        ({"guided_dimension": [2], "aspects": [None]}, {}, r"set elsewhere, too \(aspects, guided_dimension\)"),
        ({"total_width": [20], "base_width": [16]}, {}, r"set elsewhere, too \(base_width, total_width\)"),
        ({"dropout": {"low": 0.1, "high": 0.5}}, {}, r"a grid needs lists \(dropout\)"),
        ({"dropout": {"low": 0.5, "high": 0.1}}, {"search": "random", "trials": 2}, r"not below its high.*\(dropout\)"),
        ({"seed": [0]}, {"trials": 3}, "a grid has none"),
        ({"seed": [0]}, {"search": "random"}, "they need it"),
        ({"seed": [0, 1]}, {"search": "random", "trials": 3}, "2 points, fewer than 3"),
        ({"seed": [0]}, {"train": {"output": "x"}}, r"train\.output"),
        ({"guided_dimension": [5]}, {}, "guided_dimension: 5, but .* has 4 aspects: pace, tension, humour, length"),
        ({"guided_dimension": [["fear"]]}, {}, "guided_dimension: fear, but .* has 4 aspects"),
        ({"guided_dimension": [{"random": 5, "subsets": 2}]}, {}, "5 at random, draw 0, but .* has 4 aspects"),
        ({"guided_dimension": [2]}, {"train": {"item_scores": None}}, "2, but no item_scores"),
        ({"guided_dimension": ["three"]}, {}, "'three' is no count"),
        ({"dropout": [0.1, 1.5]}, {}, r"(?s)trial dropout = 1.5 is no valid TrainConfig.*less than 1"),
        ({"guided_weight": [1, -1]}, {}, r"(?s)guided_weight = -1 .*greater than or equal to 0"),
        ({"linear_map": [True], "fusion": ["concat", "add"]}, {}, "fusion = add: linear_map is for fusion: concat"),
        ({"base_width": [16, 17]}, {}, "base_width = 17: total width 21"),
        ({"total_width": [4]}, {}, r"(?s)total_width = 4 .*base_width"),
        ({"dropout": [0.1, 2.0]}, {"search": "tpe", "trials": 3}, "dropout = 2.0"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_starts(toy: Path, monkeypatch, space, changes, words):
    monkeypatch.setattr(sweep, "connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=words):
        sweep.sweep(settings(toy, space, **changes))
    assert not (toy / "sweep").exists()


def test_tpe_and_mlflow_say_what_to_install(toy: Path, monkeypatch):
    monkeypatch.setattr(sweep, "connect", lambda: pytest.fail("Ray was started"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'raygr\[optuna\]'"):
        sweep.sweep(settings(toy, {"seed": [0, 1]}, search="tpe", trials=2))
    with pytest.raises(ConfigError, match=r"pip install 'raygr\[mlflow\]'"):
        sweep.sweep(settings(toy, {"seed": [0, 1]}, mlflow="http://127.0.0.1:5000"))


# --- placement ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resources", "workers", "changes", "trials"),
    [
        ({"CPU": 2}, 1, {}, 1),
        ({"CPU": 9}, 1, {}, 4),
        ({"CPU": 9}, 2, {}, 3),
        ({"CPU": 9}, 1, {"max_concurrent_trials": 3}, 3),
        ({"CPU": 2}, 1, {"max_concurrent_trials": 3}, 1),
        ({"CPU": 16, "GPU": 1}, 1, {}, 1),
        ({"CPU": 16, "GPU": 1}, 1, {"gpu_share": 0.25}, 4),
        ({"CPU": 4, "GPU": 1}, 1, {"gpu_share": 0.25}, 2),
        ({"CPU": 16, "GPU": 2}, 1, {"gpu_share": 0.6}, 2),  # 0.6 of a GPU leaves no room on it
        ({"CPU": 16, "GPU": 2}, 2, {"gpu_share": 0.5}, 2),
    ],
)
def test_as_many_trials_run_at_once_as_fit_with_their_workers(toy, monkeypatch, resources, workers, changes, trials):
    monkeypatch.setattr(sweep.ray, "cluster_resources", lambda: resources)
    config = settings(toy, {"seed": [0, 1]}, train={"workers": workers}, **changes)
    assert sweep.trials_at_once(config, trained(config)[0]) == trials


@pytest.mark.parametrize(
    ("resources", "train", "words"),
    [
        ({"CPU": 1}, {}, "a trial needs 2 CPUs.* Ray has 1"),
        ({"CPU": 4}, {"workers": 4}, "a trial needs 5 CPUs.* Ray has 4"),
        ({"CPU": 4, "GPU": 1}, {"workers": 3, "use_gpu": True}, "3 workers need 0.5 of a GPU each, Ray has 1"),
    ],
)
def test_a_trial_that_can_never_be_placed_is_refused(toy, monkeypatch, resources, train, words):
    monkeypatch.setattr(sweep.ray, "cluster_resources", lambda: resources)
    config = settings(toy, {"seed": [0, 1]}, train=train, gpu_share=0.5)
    with pytest.raises(ConfigError, match=words):
        sweep.trials_at_once(config, trained(config)[0])


# --- the results -------------------------------------------------------------------------------


def ended(config: SweepConfig, validations: list[float | None], tests: list[float]) -> list[Ended]:
    """A trial per point; its train run reached that validation NDCG@10, and did not end where that is None."""
    trials = []
    for number, (point, best) in enumerate(zip(search_points(config), validations, strict=True)):
        path = f"{config.output}/trials/{number}"
        run = runs.start_run(path, job="train", config={})
        metrics = dict.fromkeys(METRICS, 0.5)
        lines = [
            {"epoch": n, "seconds": 2.0, "validation": metrics | {"ndcg_at_10": v}}
            for n, v in enumerate([0.1, best or 0.2, 0.1], start=1)
        ]
        runs.write_text("".join(json.dumps(line) + "\n" for line in lines), run.file("epochs.jsonl"))
        if best is not None:
            test = {"full": metrics | {"ndcg_at_10": tests[number]}}
            runs.write_json({"test": test}, run.file("metrics.json"))
            runs.finish_run(run, inputs=[], counts={})
        trials.append(Ended(path, point, None))
    return trials


def test_validation_chooses_and_no_other_test_metric_is_read(toy: Path):
    """Seed means of validation .45 and .5; the first has the better test metrics, and they lie unreadable."""
    config = settings(toy, {"guided_weight": [1, 2], "seed": [0, 1]})
    trials = ended(config, [0.6, 0.3, 0.5, 0.5], tests=[0.9, 0.9, 0.1, 0.3])
    for number in (0, 1):
        Path(trials[number].run, "metrics.json").write_text("no JSON")
    run = runs.start_run(config.output, job="sweep", config=config)
    counts = write_results(config, run, trials)
    assert counts["trials"] == {"all": 4, "finished": 4, "stopped_early": 0, "failed": 0}
    assert counts["chosen"]["values"] == {"guided_weight": 2.0}
    assert counts["chosen"]["runs"] == [trial.run for trial in trials[2:]]
    table = pd.read_parquet(run.file("results.parquet"))
    assert table["validation_ndcg@10"].tolist() == [0.6, 0.3, 0.5, 0.5]
    assert table["guided_weight"].tolist() == [1, 1, 2, 2] and table["seed"].tolist() == [0, 1, 0, 1]
    assert set(table["guided_dimension"]) == {4} and set(table["model"]) == {"sasrec"}
    assert (table["epochs"].tolist(), table["seconds"].tolist()) == ([3] * 4, [6.0] * 4)
    assert table["best_epoch"].tolist() == [2] * 4
    assert not any("test" in column for column in table)
    page = Path(run.file("summary.md")).read_text()
    assert page.startswith("# 4 trials: 4 finished, 0 stopped early, 0 failed")
    assert "| 2 | 2 | 0.5000 |\n| 1 | 2 | 0.4500 |" in page
    assert "| full | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.2000 | 0.5000 |" in page


def test_a_configuration_with_fewer_finished_runs_is_not_chosen_for_its_luck(toy: Path):
    """Of the second only the run that went well was not stopped early."""
    config = settings(toy, {"guided_weight": [1, 2], "seed": [0, 1]})
    trials = ended(config, [0.4, 0.5, 0.8, None], tests=[0.1] * 4)
    rows = [result_row(config, trial) for trial in trials]
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "stopped early"]
    assert rows[3]["validation_ndcg@10"] == 0.2
    [only] = ranked_configurations(config, rows[:3])
    assert (only.values, only.validation) == ({"guided_weight": 1.0}, pytest.approx(0.45))


def test_failed_trials_are_told_with_their_errors_and_a_sweep_of_such_alone_is_no_success(toy: Path):
    config = settings(toy, {"guided_dimension": [0, 2], "total_width": [20, None]})
    trials = ended(config, [0.4, None, 0.5, 0.3], tests=[0.1] * 4)
    trials[1] = trials[1]._replace(error="Traceback ...\n  File x\nValueError: the loss of epoch 1 is nan | inf\n")
    run = runs.start_run(config.output, job="sweep", config=config)
    counts = write_results(config, run, trials)
    assert counts["trials"] == {"all": 4, "finished": 3, "stopped_early": 0, "failed": 1}
    table = pd.read_parquet(run.file("results.parquet"))
    assert table["error"].tolist()[1] == "ValueError: the loss of epoch 1 is nan | inf"
    assert table["total_width"].isna().tolist() == [False, True, False, True]
    assert table["base_width"].tolist() == [20, 16, 18, 16]
    assert table["guided_dimension"].tolist() == [0, 0, 2, 2]
    page = Path(run.file("summary.md")).read_text()
    assert r"ValueError: the loss of epoch 1 is nan \| inf |" in page
    with pytest.raises(runs.RunError, match=r"no trial of .* finished; the first: ValueError"):
        write_results(config, run, [trials[1]])


def test_the_figure_has_a_panel_per_name_and_a_line_per_model(toy: Path):
    space = {"model": ["sasrec", "gru4rec"], "guided_dimension": [2, 4], "guided_weight": [1, 2], "seed": [0, 1]}
    config = settings(toy, space)
    values = [0.1 + n / 100 for n in range(16)]
    run = runs.start_run(config.output, job="sweep", config=config)
    write_results(config, run, ended(config, values, tests=[0.1] * 16))
    drawing = Path(run.file("figure.svg")).read_text()
    for words in ("guided_dimension", "guided_weight", "validation NDCG@10", "model sasrec", "model gru4rec"):
        assert f">{words}<" in drawing, words
    assert Path(run.file("figure.png")).read_bytes().startswith(b"\x89PNG")


def test_a_line_passes_through_its_best_configuration():
    rows = [(k, w, 0.1 * k + (0.05 if w == 2 else 0) * k) for k in (1, 2, 3) for w in (1, 2)]
    table = pd.DataFrame(rows, columns=["guided_dimension", "guided_weight", "validation_ndcg@10"])
    [(label, line)] = lines_through_the_best(table, ["guided_weight"])
    assert label == "" and line["guided_weight"].tolist() == [2, 2, 2]
    assert line["guided_dimension"].tolist() == [1, 2, 3]


# --- on Ray ------------------------------------------------------------------------------------


def test_tpe_suggests_points_of_the_space(toy: Path):
    """A model that is best at 2 and a rate near 1e-3: later suggestions crowd there."""
    pytest.importorskip("optuna")
    space = {"guided_dimension": [1, 2, ["pace", "length"]], "learning_rate": {"low": 1e-5, "high": 1.0, "log": True}}
    config = settings(toy, space, search="tpe", trials=40)
    searcher = sweep.search_algorithm(config, [], 1).searcher
    searcher.set_search_properties(sweep.BEST, "max", sweep.tune_space(config))
    points = []
    for number in range(40):
        point = searcher.suggest(str(number))
        assert point["guided_dimension"] in (1, 2, "pace, length") and 1e-5 <= point["learning_rate"] <= 1
        off = abs(math.log10(point["learning_rate"]) + 3) + (point["guided_dimension"] != 2)
        searcher.on_trial_complete(str(number), result={sweep.BEST: -off, "training_iteration": 1})
        points.append(off)
        train_config(config, point, name="")
    assert sum(points[20:]) < sum(points[:20])


@pytest.mark.slow
def test_trials_finish_stop_early_and_fail_beside_each_other(toy: Path, local_ray: Any):
    """On two CPUs, so that the last trial needs those of the one that was stopped and the one that failed."""
    space = {"learning_rate": [0.01, 1e-12, 1e30, 0.02]}
    early = {"stop_early": True, "grace_epochs": 3, "max_failures": 1}
    config = settings(toy, space, train={"epochs": 30, "patience": 30}, **early)
    run = sweep.sweep(config)
    record = runs.read_run(run.path, job="sweep")
    assert record["counts"]["trials"] == {"all": 4, "finished": 2, "stopped_early": 1, "failed": 1}
    table = pd.read_parquet(run.file("results.parquet")).set_index("learning_rate")
    assert table["status"].to_dict() == {0.01: "finished", 1e-12: "stopped early", 1e30: "failed", 0.02: "finished"}
    assert "the loss of epoch 1 is" in table["error"][1e30]
    assert 3 <= table["epochs"][1e-12] < 30 and table["epochs"][0.02] == 30
    assert not runs.is_finished(table["run"][1e-12])
    # the stage itself made them
    metrics = runs.read_json(runs.join(table["run"][0.02], "metrics.json"))
    assert metrics["validation"]["full"]["ndcg_at_10"] == pytest.approx(table["validation_ndcg@10"][0.02])
    assert runs.read_run(table["run"][0.01], job="train")["config"]["learning_rate"] == 0.01
    [errors] = Path(run.path, "tune").glob("*learning_rate=1e+30/error.txt")
    assert "Failure # 2" in errors.read_text()  # tried again, once
    given_back = time.monotonic() + 30
    while local_ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < given_back:
        time.sleep(0.5)
    assert local_ray.available_resources()["CPU"] == 2
    with pytest.raises(runs.RunError, match="finished run"):
        sweep.sweep(config)


def sweeping(folder: Path, log: Path) -> subprocess.Popen:
    """`raygr sweep` in a Ray of its own, two CPUs as it finds them or more."""
    command = [sys.executable, "-m", "raygr.cli", "sweep", "--config", f"{folder}/sweep.yaml"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment |= {"RAY_TMPDIR": str(folder), "HOME": str(folder), "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_the_trials_that_had_not_ended():
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as name:  # Ray's sockets need it short
        folder = Path(name)
        write_prepared(folder / "prepare", cycles(20, ITEMS, 12), items=ITEMS)
        train = {"data": f"{folder}/prepare", "epochs": 60, "patience": 60} | SMALL | {"epochs": 60}
        written = {"output": f"{folder}/sweep", "train": train, "space": {"seed": [0, 1, 2]}}
        (folder / "sweep.yaml").write_text(json.dumps(written))
        killed = sweeping(folder, folder / "killed.log")
        second = folder / "sweep/trials/0001_seed=1/epochs.jsonl"
        latest = time.monotonic() + 240
        while not (second.exists() and len(second.read_text().splitlines()) >= 5):
            assert killed.poll() is None and time.monotonic() < latest, (folder / "killed.log").read_text()
            time.sleep(0.05)
        killed.kill()
        killed.wait()
        first = folder / "sweep/trials/0000_seed=0/run.json"
        before = first.stat().st_mtime_ns
        resumed = sweeping(folder, folder / "resumed.log")
        assert resumed.wait(timeout=240) == 0, (folder / "resumed.log").read_text()
        log = (folder / "resumed.log").read_text()
        assert first.stat().st_mtime_ns == before
        assert "goes on with the trials" in log
        assert int(re.search(r"resumed after epoch (\d+)", log)[1]) >= 4
        # two trials were trained now, the second from where it was
        assert len(re.findall(r"epoch +60/60", log)) == 2 and len(re.findall(r"epoch +1/60", log)) == 1
        table = pd.read_parquet(folder / "sweep/results.parquet")
        assert table["status"].tolist() == ["finished"] * 3 and table["epochs"].tolist() == [60] * 3


GPU_TRIALS = """
import json, sys, time
import ray, ray.train
from ray import tune
from ray.train.data_parallel_trainer import DataParallelTrainer
from raygr.workers import placement, workers_on_gpus

def loop(settings):
    begun = time.time()
    time.sleep(5)
    print("worker", json.dumps([ray.get_gpu_ids(), begun, time.time()]), flush=True)

def trial(point):
    run = ray.train.RunConfig(name=str(point["n"]), storage_path=sys.argv[1])
    placed = placement(1, use_gpu=True, gpu_share=0.5)
    DataParallelTrainer(loop, train_loop_config={}, run_config=run, scaling_config=placed).fit()

if __name__ == "__main__":
    ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False)
    settings = tune.TuneConfig(max_concurrent_trials=workers_on_gpus(1, 0.5))
    tune.Tuner(trial, param_space={"n": tune.grid_search([0, 1])}, tune_config=settings,
               run_config=tune.RunConfig(storage_path=sys.argv[1], name="gpus")).fit()
"""


@pytest.mark.slow
def test_two_trials_share_a_gpu_at_the_same_time(tmp_path: Path):
    """Placement alone, in a Ray that is told of a GPU: torch would want a real one."""
    (tmp_path / "trials.py").write_text(GPU_TRIALS)
    command = [sys.executable, str(tmp_path / "trials.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    workers = [json.loads(found) for found in re.findall(r"worker (\[.*\])", done.stdout)]
    assert len(workers) == 2, done.stdout
    (first_ids, first_begun, first_ended), (second_ids, second_begun, second_ended) = workers
    assert first_ids == second_ids and len(first_ids) == 1
    assert max(first_begun, second_begun) < min(first_ended, second_ended)
