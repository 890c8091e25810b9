"""Which subjects a score run asks about, and what the console says about the others."""

import itertools
from pathlib import Path

import pyarrow as pa
import pytest
from toy_data import walks, write_prepared

from raygr import files
from raygr.schema import USER_SCHEMA, USERS
from raygr.score.config import ScoreConfig
from raygr.score.subjects import chosen_subjects, subjects_left_out


def test_users_who_are_not_asked_about_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = write_prepared(tmp_path / "p", walks(5, 20, 6, seed=0), items=20)
    users = files.read_table(f"{data}/{USERS}").to_pydict()
    users["cutoff_position"] = [3, -1, 3, 3, -1]
    files.write_table(pa.table(users, schema=USER_SCHEMA), f"{data}/{USERS}")
    caplog.set_level("INFO")
    config = ScoreConfig(output="o", data=data, subjects="users", aspects="a", max_subjects=4)
    left_out = {"beyond_max_subjects": 1, "not_sampled": 0, "without_train_interaction": 1}
    assert subjects_left_out(config, asked=3) == left_out
    assert caplog.messages == ["users: 3 of 5 kept; left out: 1 beyond max subjects, 1 without train interaction"]
    config = ScoreConfig(output="o", data=data, subjects="users", aspects="a", sample_subjects=2)
    left_out = {"beyond_max_subjects": 0, "not_sampled": 1, "without_train_interaction": 2}
    assert subjects_left_out(config, asked=2) == left_out
    caplog.clear()
    config = ScoreConfig(output="o", data=data, subjects="items", aspects="a")
    subjects_left_out(config, asked=19)
    assert caplog.messages[-1] == "items: 1 rows are unaccounted for: this is a fault in raygr"


def test_a_smaller_sample_is_part_of_a_larger_one(tmp_path: Path):
    data = write_prepared(tmp_path / "p", walks(5, 40, 6, seed=0), items=40)
    settings = {"output": "o", "data": data, "subjects": "items", "aspects": "a"}
    samples = [chosen_subjects(ScoreConfig(**settings, sample_subjects=count)) for count in (5, 12, 40, 100)]
    assert [len(one) for one in samples] == [5, 12, 40, 40]
    for small, large in itertools.pairwise(samples):
        assert set(small) < set(large) or len(small) == 40
    assert samples[0].tolist() == sorted(samples[0]) != list(range(1, 6))
    assert set(chosen_subjects(ScoreConfig(**settings, sample_subjects=5, seed=1))) != set(samples[0])
    with pytest.raises(ValueError, match="max_subjects and sample_subjects are two ways to choose subjects"):
        ScoreConfig(**settings, sample_subjects=5, max_subjects=5)
