"""Configurations: strict, with the field's name in every refusal; every shipped YAML is valid."""

from pathlib import Path

import pytest

from raygr.config import ConfigError, PipelineConfig, PrepareConfig, TrainConfig, load_config
from raygr.config_reproduce import EXPERIMENTS
from raygr.pipeline import STAGES, checked_stage

CONFIGS = Path(__file__).parent.parent / "configs"


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "prepare.yaml"
    file.write_text("output: a\nreviews: [x.jsonl]\nmin_user_interactions: 3\n")
    config = load_config(PrepareConfig, str(file), ["output=b", "max_bad_fraction=5e-2"])
    assert (config.output, config.min_user_interactions, config.max_bad_fraction) == ("b", 3, 0.05)


@pytest.mark.parametrize(
    ("override", "words"),
    [("epoch=3", "epoch: Unexpected"), ("dropout=1.5", "dropout: .*less than 1"), ("fusion=sum", "fusion: .*'concat'")],
)
def test_a_wrong_field_is_refused_by_name(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(TrainConfig, None, ["output=a", "data=b", override])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
        load_config(TrainConfig, str(tmp_path / "none.yaml"), [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(TrainConfig, str(broken), [])


def test_every_shipped_configuration_is_valid():
    files = [
        path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "aspects" and path.name != "runtime_env.yaml"
    ]
    assert len(files) >= 6
    for path in files:
        job = "reproduce" if path.stem in EXPERIMENTS else path.stem.split("-")[0]
        if job == "pipeline":
            for number, entry in enumerate(load_config(PipelineConfig, str(path), []).stages, start=1):
                checked_stage(number, entry)
        else:
            load_config(STAGES[job], str(path), [])


def test_a_pipeline_names_the_stage_that_is_wrong():
    with pytest.raises(ConfigError, match="stage 2: expected one of"):
        checked_stage(2, {"prepair": {}})
    with pytest.raises(ConfigError, match=r"stage 3 \(prepare\)"):
        checked_stage(3, {"prepare": {"output": "a"}})
