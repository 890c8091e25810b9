"""Validation chooses, failures are reported, and the figure shows each searched name."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from toy_data import RUN_METRICS
from toy_sweep import settings, write_toy

from raygr import files, runs
from raygr.metrics.ranking import METRICS
from raygr.sweep.config import SweepConfig
from raygr.sweep.figure import lines_through_the_best
from raygr.sweep.results import Ended, ranked_configurations, trial_result, write_results
from raygr.sweep.space import search_points


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def ended(config: SweepConfig, validations: list[float | None], tests: list[float]) -> list[Ended]:
    """One trial per point, whose train run reached the given validation NDCG@10; None is a run that did not end."""
    runs.start_run(config.output, job="sweep", config=config)
    trials = []
    for number, (point, best) in enumerate(zip(search_points(config), validations, strict=True)):
        path = f"{config.output}/trials/{number}"
        run = runs.start_run(path, job="train", config={})
        metrics = dict.fromkeys(METRICS, 0.5)
        lines = [
            {"epoch": n, "seconds": 2.0, "validation": metrics | {"ndcg_at_10": v}}
            for n, v in enumerate([0.1, best or 0.2, 0.1], start=1)
        ]
        files.write_text("".join(json.dumps(line) + "\n" for line in lines), run.file("epochs.jsonl"))
        if best is not None:
            test = {"full": metrics | {"ndcg_at_10": tests[number]}}
            record = RUN_METRICS | {"best_epoch": 2, "epochs": 3, "test": test}
            files.write_json(record, run.file("metrics.json"))
            runs.finish_run(run, inputs=[], counts={})
        trials.append(Ended(path, point, None))
    return trials


def test_validation_chooses_and_no_other_test_metric_is_read(toy: Path):
    """Validation means are .45 and .5. The first has better test metrics, in files that cannot be read."""
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
    """All runs of the second configuration but one good run were stopped early."""
    config = settings(toy, {"guided_weight": [1, 2], "seed": [0, 1]})
    trials = ended(config, [0.4, 0.5, 0.8, None], tests=[0.1] * 4)
    rows = [trial_result(config, trial) for trial in trials]
    assert [row.status for row in rows] == ["finished", "finished", "finished", "stopped early"]
    assert rows[3].validation["validation_ndcg@10"] == 0.2
    [only] = ranked_configurations(config, rows)
    assert (only.values, only.validation) == ({"guided_weight": 1.0}, pytest.approx(0.45))


def test_a_configuration_is_not_chosen_for_being_tried_more_often(toy: Path):
    """TPE proposed the first configuration twice with one seed. The second, which was tried once, is better."""
    config = settings(toy, {"guided_weight": [1, 2, 3]})
    trials = ended(config, [0.4, 0.5, 0.3], tests=[0.1] * 3)
    rows = [trial_result(config, trial) for trial in trials]
    again = replace(rows[0], run="again")
    found = ranked_configurations(config, [rows[0], again, *rows[1:]])
    assert [one.values["guided_weight"] for one in found] == [2.0, 1.0, 3.0]
    assert [len(one.runs) for one in found] == [1, 1, 1]


def test_where_no_configuration_has_all_its_seeds_those_with_the_most_stand_in(toy: Path):
    config = settings(toy, {"guided_weight": [1, 2], "seed": [0, 1, 2]})
    trials = ended(config, [0.4, 0.5, None, 0.8, None, None], tests=[0.1] * 6)
    [only] = ranked_configurations(config, [trial_result(config, trial) for trial in trials])
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
