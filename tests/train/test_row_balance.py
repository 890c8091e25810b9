"""The console says: rows read = rows kept + rows left out by reason."""

from pathlib import Path

import pyarrow as pa
import pytest
from toy_data import write_prepared, write_score_run

from raygr import files
from raygr.data.row_counts import log_rows
from raygr.report.scored_subjects import read_scores
from raygr.train.config import TrainConfig
from raygr.train.inputs import load_inputs
from raygr.train.stage import log_users, row_counts


def test_a_line_has_the_reasons_and_a_fault_is_a_warning(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    log_rows("reviews", read=10, kept=7, dropped={"no_text": 2, "late": 0, "duplicate": 1})
    log_rows("users", read=3, kept=3, dropped={})
    assert caplog.messages == ["reviews: 7 of 10 kept; left out: 2 no text, 1 duplicate", "users: 3 of 3 kept"]
    log_rows("items", read=10, kept=7, dropped={"late": 1})
    assert caplog.messages[-1] == "items: 2 rows are unaccounted for: this is a fault in raygr"


def test_training_says_who_has_no_target(tmp_path: Path, caplog):
    histories = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 2]]
    data = write_prepared(tmp_path / "p", histories, items=12)
    config = TrainConfig(output="o", data=data, base_width=8)
    caplog.set_level("INFO")
    log_users(row_counts(load_inputs(config)))
    assert (
        "users of the training: 2 of 3 kept; left out: 1 without a training target behind a history" in caplog.messages
    )
    assert "users of the test: 3 of 3 kept" in caplog.messages


def test_the_report_says_which_subjects_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = write_score_run(tmp_path / "s", {"i1": [4.0], "i2": [5.0], "i3": [6.0]}, aspects=["a"])
    part = f"{run}/scores/part-0.parquet"
    table = files.read_table(part)
    reasons = pa.array(["ok", "no_aspect_read", "ok"])
    files.write_table(table.set_column(table.column_names.index("reason"), "reason", reasons), part)
    caplog.set_level("INFO")
    assert read_scores(run).ids == ["i1", "i3"]
    assert caplog.messages == [f"subjects of {run}: 2 of 3 kept; left out: 1 not read in full"]
