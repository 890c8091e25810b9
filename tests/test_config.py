"""Configurations: strict, with the field's name in every refusal; every shipped YAML is valid."""

import dataclasses
import functools
import json
import operator
import typing
from collections import defaultdict
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from pydantic_core import to_jsonable_python
from ray.autoscaler._private.util import prepare_config, validate_config

from raygr.cli import COMMANDS
from raygr.config import ConfigError, PipelineConfig, check_config, input_paths, load_config
from raygr.explain.config import ExplainConfig
from raygr.files import model_place
from raygr.pipeline import checked_stage
from raygr.prepare.config import PrepareConfig
from raygr.recommend.config import RecommendConfig
from raygr.reproduce.config import EXPERIMENTS
from raygr.score.config import RequestConfig, ScoreConfig
from raygr.stages import STAGES
from raygr.train.config import TrainConfig, fitting

CONFIGS = Path(__file__).parent.parent / "configs"


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "prepare.yaml"
    file.write_text("output: a\nreviews: [x.jsonl]\nmin_user_interactions: 3\n")
    config = load_config(PrepareConfig, str(file), ["output=b", "max_bad_fraction=5e-2"])
    assert (config.output, config.min_user_interactions, config.max_bad_fraction) == (
        str(Path("b").absolute()),
        3,
        0.05,
    )


def configurations() -> set[type]:
    """All dataclasses that check settings, including nested ones."""
    found, left = set(), [*COMMANDS.values()]
    while left:
        kind = left.pop()
        if dataclasses.is_dataclass(kind):
            found.add(kind)
            left += [one for one in typing.get_type_hints(kind).values() if one not in found]
        left += typing.get_args(kind)
    return found


def without_null(kind: object) -> object:
    """A field's type without `None`."""
    parts = typing.get_args(kind)
    kept = [one for one in parts if one is not type(None)]
    return functools.reduce(operator.or_, kept) if len(kept) < len(parts) else kind


def test_a_field_name_has_one_type_across_all_configurations():
    assert RequestConfig in configurations() and len(configurations()) >= 15
    types = defaultdict(dict)
    for config in configurations():
        for name, kind in typing.get_type_hints(config, include_extras=True).items():
            if typing.get_origin(kind) is not typing.ClassVar:
                types[name][without_null(kind)] = config.__name__
    assert {name: found for name, found in types.items() if len(found) > 1} == {}


def test_an_unknown_field_is_told_of_the_one_that_was_meant():
    with pytest.raises(ConfigError, match=r"epoch: no such field; did you mean epochs\?"):
        load_config(TrainConfig, None, ["output=a", "data=b", "epoch=3"])
    with pytest.raises(ConfigError, match=r"requests\.service_modl: no such field; did you mean service_model\?"):
        load_config(ScoreConfig, None, ["output=a", "data=b", "subjects=items", "aspects=a", "requests.service_modl=b"])
    with pytest.raises(ConfigError, match=r"xyz: no such field\n"):
        load_config(TrainConfig, None, ["output=a", "data=b", "xyz=3"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epoch=3", "epoch: no such field"),
        ("dropout=1.5", "dropout: .*less than 1"),
        ("fusion=sum", "fusion: .*'concat'"),
    ],
)
def test_a_wrong_field_is_refused_by_name(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(TrainConfig, None, ["output=a", "data=b", override])


# Every path of every job; `subjects` and the like are what the job needs besides.
SCORES = {"data": "~/p", "aspects": "~/a.yaml", "llm": "~/m"}
TRAINED = {"item_scores": "~/s", "user_scores": "llm", "user_score_run": "~/u", "list_scores": "~/l"}
PATHS = {
    "simulate": {},
    "prepare": {"reviews": ["~/r.jsonl", "~/more/*.jsonl"], "metadata": ["~/m.jsonl"]},
    "score": SCORES | {"subjects": "items", "adapter": "~/t", "store": "~/store"},
    "vectors": SCORES,
    "finetune": SCORES | {"item_scores": "~/s", "teacher": "~/t", "warm_start_epochs": 1, "adapter": "~/f"},
    "train": {"data": "~/p"} | TRAINED,
    "sweep": {"train": {}, "space": {}},
    "compare": {"arms": {"base": ["~/t"]}},
    "recommend": {"train_run": "~/t", "histories": "~/h", "mmr_weight": 0.5, "mmr_scores": "~/s"},
    "explain": {"train_run": "~/t"},
    "export": {"train_run": "~/t"},
    "report": {"title": "", "data": "~/p", "comparison": "~/c", "item_score_run": "~/s", "user_score_run": "~/u"}
    | {"reference_scores": "~/r.csv", "finetune": ["~/f"]},
    "reproduce": {"experiment": "table-2", "runs": "~/r", "data": "~/p", "item_scores": "~/s", "user_score_run": "~/u"}
    | {"classification_scores": "~/c", "stage_files": {"prepare": "~/p.yaml"}, "recommenders": {"SASRec": "~/s.yaml"}}
    | {"protocol": {"SASRec": "full"}, "refined": {}, "paper": "~/p.csv"},
}


@pytest.mark.parametrize("job", PATHS)
def test_the_home_folder_is_known_in_every_path_and_relative_ones_are_absolute(job, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/m").mkdir(parents=True)  # a model is a folder where there is one
    written = json.dumps({"output": "~/o"} | PATHS[job])
    for prefix, meant in (("~/", f"{tmp_path}/home/"), ("here/", f"{tmp_path}/here/"), ("s3://b/", "s3://b/")):
        settings = json.loads(written.replace("~/", prefix))
        found = json.dumps(to_jsonable_python(check_config(COMMANDS[job], settings, source="test")))
        assert found.count(f'"{meant}') == written.count('"~/')


def home_paths(value: object) -> list[str]:
    """All texts in a JSON value that begin with ~/."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, str) and value.startswith("~/") else []
    return own + [path for one in inside for path in home_paths(one)]


@pytest.mark.parametrize("job", PATHS)
def test_the_inputs_of_a_configuration_are_all_its_paths_but_those_that_it_writes(job, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = check_config(COMMANDS[job], {"output": "~/o"} | PATHS[job], source="test")
    read = home_paths({name: value for name, value in PATHS[job].items() if name not in ("store", "runs")})
    assert sorted(one.path for one in input_paths(config)) == sorted(path.replace("~", str(tmp_path)) for path in read)
    assert all(one.kind.job in ("", *STAGES) for one in input_paths(config))


def test_inputs_inside_the_settings_of_train_runs_are_found():
    settings = {"output": "/o", "train": {"data": "/p", "list_scores": "/l", "fusion": "wrong", "datta": "/x"}}
    sweep = check_config(STAGES["sweep"], settings | {"space": {"item_scores": ["/s", None]}}, source="test")
    assert [(one.field, one.path, one.kind.job) for one in input_paths(sweep)] == [
        ("train.data", "/p", "prepare"),
        ("train.list_scores", "/l", "score"),
        ("space.item_scores", "/s", "score"),
    ]
    arms = {"extra_arms": {"more": {"item_scores": "/m"}}, "refined": {"user_score_run": "/u"}}
    found = input_paths(
        check_config(COMMANDS["reproduce"], PATHS["reproduce"] | {"output": "/o"} | arms, source="test")
    )
    assert {("extra_arms.more.item_scores", "/m"), ("refined.user_score_run", "/u")} < {one[:2] for one in found}


def test_a_name_of_a_model_and_a_word_are_no_paths():
    settings = {"output": "/o", "data": "/p", "item_scores": "/s", "aspects": "/a", "llm": "org/name"}
    config = check_config(STAGES["finetune"], settings | {"teacher": "profile", "warm_start_epochs": 1}, source="test")
    assert [one.field for one in input_paths(config)] == ["data", "item_scores", "aspects"]


def test_words_in_place_of_paths_stay_words():
    settings = PATHS["finetune"] | {"output": "o", "teacher": "profile"}
    assert check_config(STAGES["finetune"], settings, source="test").teacher == "profile"


def test_paths_inside_a_job_stay_relative(monkeypatch):
    """Each submission of a job has another folder."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    config = load_config(TrainConfig, None, ["output=s3://b/t", "data=configs/p", "item_scores=/s"])
    assert (config.output, config.data, config.item_scores) == ("s3://b/t", "configs/p", "/s")


def test_files_of_the_checkout_are_found_from_other_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = ["output=o", "data=d", "subjects=items", "aspects=configs/aspects/games.yaml"]
    assert load_config(ScoreConfig, None, settings).aspects == f"{CONFIGS}/aspects/games.yaml"
    own = tmp_path / "configs/aspects/games.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert load_config(ScoreConfig, None, settings).aspects == str(own)


def test_a_model_is_a_folder_or_a_name(monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    found = {name: model_place(name) for name in ("mine", "./other", "smollm2", "org/name", "/m")}
    assert found == {
        "mine": f"{tmp_path}/mine",
        "./other": f"{tmp_path}/other",
        "smollm2": "smollm2",
        "org/name": "org/name",
        "/m": "/m",
    }


def test_fields_that_change_no_result_are_fields():
    for kind in STAGES.values():
        names = {name.partition(".")[0] for name in getattr(kind, "SPEED", ())}
        assert names <= {field.name for field in dataclasses.fields(kind)}


def test_whole_numbers_are_ids(tmp_path):
    needed = ["output=o", "train_run=t"]
    given = {"[101,102]": ("101", "102"), "['007',8]": ("007", "8"), "12": ("12",), "A1": ("A1",)}
    for text, ids in given.items():
        assert load_config(RecommendConfig, None, [*needed, f"users={text}"]).users == ids
    file = tmp_path / "recommend.yaml"
    file.write_text("output: o\ntrain_run: t\nusers:\n- 101\n- a b\n")
    assert load_config(RecommendConfig, str(file), []).users == ("101", "a b")
    explained = load_config(ExplainConfig, None, [*needed, "item=12", "users=[1,2]"])
    assert (explained.item, explained.users) == ("12", ("1", "2"))


@pytest.mark.parametrize("text", ["[1.5]", "[true]", "1.5", "[null]"])
def test_what_may_have_been_another_id_is_refused(text):
    for kind in (RecommendConfig, ExplainConfig):
        with pytest.raises(ConfigError, match=r"users.*(is no id: ids are text or whole|valid tuple)"):
            load_config(kind, None, ["output=o", "train_run=t", f"users={text}"])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such"):
        load_config(TrainConfig, str(tmp_path / "none.yaml"), [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(TrainConfig, str(broken), [])


def test_a_file_that_is_a_list_and_a_broken_override_are_named(tmp_path):
    file = tmp_path / "list.yaml"
    file.write_text("- output: a\n- data: b\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: settings are name: value, found a list$"):
        load_config(TrainConfig, str(file), ["output=a"])
    with pytest.raises(ConfigError, match=r"^aspects=\[1: "):
        load_config(TrainConfig, None, ["aspects=[1"])


def test_a_wrong_override_is_not_told_of_the_file(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("output: a\ndata: b\ndropout: 2\n")
    with pytest.raises(ConfigError) as refused:
        load_config(TrainConfig, str(file), ["epochs=0"])
    problems = str(refused.value).splitlines()[1:3]
    assert [line.split(": ")[0].strip() for line in problems] == ["dropout", "epochs (of --set)"]


@pytest.mark.parametrize("written", ["off", "false", "'off'", "Off"])
def test_off_is_a_value_though_yaml_reads_it_as_false(tmp_path, written):
    file = tmp_path / "train.yaml"
    file.write_text(f"output: a\ndata: b\nuser_side: {written}\n")
    assert load_config(TrainConfig, str(file), []).user_side == "off"
    assert load_config(TrainConfig, None, ["output=a", "data=b", f"user_side={written}"]).user_side == "off"
    with pytest.raises(ConfigError, match="user_side"):
        load_config(TrainConfig, None, ["output=a", "data=b", "user_side=on"])


GUIDED = {"item_scores": "s", "user_scores": "profile"}
LLM = {"subjects": "users", "aspects": "a"}


@pytest.mark.parametrize(
    ("job", "settings", "message"),
    [
        *(
            ("train", {name: value}, f"{name}: no effect without item_scores")
            for name, value in {
                "fusion": "concat",
                "add_map": "linear",
                "linear_map": True,
                "user_side": "concat",
                "guided_weight": 2.0,
                "control": "random",
                "aspect_names": ["pace"],
                "user_guided_train": "after_prompt",
                "train_user_guided": True,
                "prompt_fraction": 0.2,
            }.items()
        ),
        ("train", {"user_scores": "profile"}, "user_scores: no effect without item_scores"),
        ("train", {"missing_scores": "refuse"}, "missing_scores: no effect without item_scores or list_scores"),
        ("train", GUIDED | {"user_side": "off"}, "user_scores: profile has no effect on user_side: off"),
        ("train", {"item_scores": "s", "train_user_guided": True}, "train_user_guided: no effect without user_scores"),
        ("train", {"model": "gru4rec", "heads": 1, "blocks": 1}, "blocks, heads: no effect on model: gru4rec"),
        ("train", {"candidate_seed": 3}, "candidate_seed: no effect on candidates: full alone"),
        (
            "train",
            GUIDED | {"prompt_fraction": 0.3},
            "prompt_fraction: no effect on user_scores: profile with user_guided_train: all",
        ),
        ("score", LLM | {"temperature": 0.5}, "temperature: no effect on mode: probe"),
        ("score", LLM | {"structured": False}, "structured: no effect on mode: probe"),
        ("score", LLM | {"force_adapter": True}, "force_adapter: no effect without an adapter"),
        ("score", LLM | {"answered_by": "big"}, "answered_by: another LLM answers in free text"),
        ("score", LLM | {"requests": {"api": "gemini"}}, "requests are those of --export-prompts: set answered_by"),
        ("recommend", {"train_run": "t", "mmr_scores": "s"}, "mmr_scores: no effect without mmr_weight"),
        ("recommend", {"train_run": "t", "users": ["a"], "histories": "h"}, "three ways to say for whom"),
    ],
)
def test_settings_without_effect_and_contradictions_are_refused(job, settings, message):
    needed = {"output": "o"} | ({} if job == "recommend" else {"data": "d"})
    with pytest.raises(ConfigError) as refused:
        check_config(STAGES[job], needed | settings, source="test")
    assert message in str(refused.value).splitlines()[1]


def test_shared_settings_fit_every_run_that_they_are_merged_into():
    shared = {"output": "o", "data": "d", "heads": 1, "fusion": "concat", "user_side": "concat", "item_scores": "s"}
    users = {"user_scores": "profile"}
    for changes in (users, users | {"model": "gru4rec"}, {"user_scores": "none"}, users | {"item_scores": None}):
        check_config(TrainConfig, fitting(shared | changes), source="test")
    assert fitting(shared | users) == shared | users
    assert fitting(shared | users | {"item_scores": None}).keys() == {"output", "data", "heads", "item_scores"}


def literals_of(kind) -> set[str]:
    """Every text that a field of `kind` accepts."""
    found = set()
    for one in typing.get_args(kind):
        found |= {one} if isinstance(one, str) else literals_of(one)
    return found


def test_no_other_value_is_a_word_that_yaml_reads_as_something_else():
    """Words such as no, on and null would make a field refuse its own documented value."""
    for config in [*STAGES.values(), PipelineConfig, RequestConfig]:
        for name, kind in typing.get_type_hints(config, include_extras=True).items():
            unlike = {word for word in literals_of(kind) if yaml.safe_load(word) != word}
            assert unlike <= ({"off"} if name == "user_side" else set()), f"{config.__name__}.{name}"


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
            load_config(COMMANDS[job], str(path), [])


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
