"""Configurations: strict, with the field's name in every refusal; every shipped YAML is valid."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from raygr.config import ConfigError, PipelineConfig, PrepareConfig, TrainConfig, load_config
from raygr.config_reproduce import EXPERIMENTS
from raygr.config_results import ExplainConfig, RecommendConfig
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


def test_whole_numbers_are_ids(tmp_path):
    needed = ["output=o", "train=t"]
    for text, ids in [("[101,102]", ("101", "102")), ("['007',8]", ("007", "8")), ("12", ("12",)), ("u.txt", "u.txt")]:
        assert load_config(RecommendConfig, None, [*needed, f"users={text}"]).users == ids
    file = tmp_path / "recommend.yaml"
    file.write_text("output: o\ntrain: t\nusers:\n- 101\n- a b\n")
    assert load_config(RecommendConfig, str(file), []).users == ("101", "a b")
    explained = load_config(ExplainConfig, None, [*needed, "item=12", "users=[1,2]"])
    assert (explained.item, explained.users) == ("12", ("1", "2"))


@pytest.mark.parametrize("text", ["[1.5]", "[true]", "1.5", "[null]"])
def test_what_may_have_been_another_id_is_refused(text):
    for kind in (RecommendConfig, ExplainConfig):
        with pytest.raises(ConfigError, match=r"users.*(is no id: ids are text or whole|valid tuple)"):
            load_config(kind, None, ["output=o", "train=t", f"users={text}"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
        load_config(TrainConfig, str(tmp_path / "none.yaml"), [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(TrainConfig, str(broken), [])


def test_every_shipped_configuration_is_valid():
    files = [
        path
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.name not in ("aspects", "cluster") and path.name != "runtime_env.yaml"
    ]
    assert len(files) >= 6
    for path in files:
        job = "reproduce" if path.stem in EXPERIMENTS else path.stem.split("-")[0]
        if job == "pipeline":
            for number, entry in enumerate(load_config(PipelineConfig, str(path), []).stages, start=1):
                checked_stage(number, entry)
        else:
            load_config(STAGES[job], str(path), [])


def aws_cluster() -> dict:
    return yaml.safe_load((CONFIGS / "cluster" / "aws.yaml").read_text(encoding="utf-8"))


def test_the_aws_cluster_keeps_rays_schema_and_rules():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    cluster = aws_cluster()
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(cluster))
    with pytest.raises(jsonschema.ValidationError, match="'nodes' was unexpected"):
        jsonschema.validate(cluster | {"nodes": 8}, schema)


def test_the_cluster_files_have_the_ray_that_is_installed_and_ask_for_a_token():
    job = yaml.safe_load((CONFIGS / "cluster" / "kuberay-rayjob.yaml").read_text(encoding="utf-8"))
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert aws_cluster()["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311")
    starts = [*aws_cluster()["head_start_ray_commands"], *aws_cluster()["worker_start_ray_commands"]]
    assert [("RAY_AUTH_MODE=token ray start" in line) for line in starts] == [False, True, False, True]


def test_the_rayjob_asks_for_a_stage_with_fields_that_it_has():
    job = yaml.safe_load((CONFIGS / "cluster" / "kuberay-rayjob.yaml").read_text(encoding="utf-8"))
    python, script, *flags = job["spec"]["entrypoint"].split()
    assert (python, script, set(flags[::2])) == ("python", "jobs/score.py", {"--set"})
    config = load_config(STAGES["score"], None, flags[1::2])
    assert config.actors == job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]


def test_a_pipeline_names_the_stage_that_is_wrong():
    with pytest.raises(ConfigError, match="stage 2: expected one of"):
        checked_stage(2, {"prepair": {}})
    with pytest.raises(ConfigError, match=r"stage 3 \(prepare\)"):
        checked_stage(3, {"prepare": {"output": "a"}})
