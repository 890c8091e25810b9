"""Flags of the command line: their help, the values that they give, and the JSON schemas of the same fields."""

import json
import re
import runpy
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import jsonschema
import pytest

import raygr
from raygr import cli
from raygr.config import ConfigError, load_config, override, read_yaml
from raygr.flags import json_schema, parse_flags, settings_of
from raygr.recommend.config import RecommendConfig
from raygr.report.config import ReportConfig
from raygr.reproduce.config import EXPERIMENTS, ReproduceConfig
from raygr.score.config import ScoreConfig
from raygr.stages import STAGES

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIGURED = {**STAGES, "reproduce": ReproduceConfig}


def shown_help(stage: str, capsys, monkeypatch) -> str:
    """The help of a stage as one line."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([stage, "--help"])
    return " ".join(capsys.readouterr().out.split())


def loaded(stage: str, *words: str):
    parser = ArgumentParser(allow_abbrev=False)
    cli.add_flags(parser, stage=stage)
    return load_config(cli.COMMANDS[stage], *cli.config_source(stage, parse_flags(parser, words)))


@pytest.mark.parametrize("stage", CONFIGURED)
def test_the_help_has_every_field_with_its_text_and_default(stage, capsys, monkeypatch):
    shown = shown_help(stage, capsys, monkeypatch)
    for name, _, field in settings_of(CONFIGURED[stage]):
        assert field.description, f"{stage}.{name} has no text under it"
        if name == "experiment":
            continue
        found = shown.partition(f" --{name.replace('_', '-')}")[2]
        text = " ".join(field.description.split())
        assert found.partition("[" if "[" not in text else "\0")[0] and text in found, name


def test_the_help_says_type_range_and_default(capsys, monkeypatch):
    shown = shown_help("train", capsys, monkeypatch)
    assert "--model {gru4rec,sasrec,bert4rec} GRU4Rec+ is" in shown
    assert re.search(r"--dropout NUMBER \S[^\[]*\[at least 0; below 1; default: 0.4\]", shown)
    assert re.search(r"--data PREPARE_RUN [^\[]*\[required\]", shown)
    assert "--linear-map, --no-linear-map" in shown and "--candidates {full,uniform-100,popularity-100} [" in shown
    assert "--requests.api {openai,mistral,anthropic,gemini}" in shown_help("score", capsys, monkeypatch)


def test_the_page_of_settings_has_every_field_with_its_text():
    page = runpy.run_path(str(CONFIGS.parent / "docs/settings.py"))["tables"]()
    for stage, config in cli.COMMANDS.items():
        section = page.partition(f"## {stage}\n")[2].partition("\n## ")[0]
        for name, _, field in settings_of(config):
            [row] = [line for line in section.splitlines() if line.startswith(f"| `{name}` | ")]
            assert " ".join(field.description.replace("|", "\\|").split()) in row
            assert row.replace("\\|", "").count("|") == 5


@pytest.mark.parametrize(
    ("stage", "flags", "settings"),
    [
        ("train", ["--epochs", "3", "--learning-rate=1e-2"], ["epochs=3", "learning_rate=1e-2"]),
        ("train", ["--item-scores", "s", "--linear-map", "--fusion", "concat"],
         ["item_scores=s", "linear_map=true", "fusion=concat"]),
        ("train", ["--no-use-gpu"], ["use_gpu=false"]),
        ("train", ["--hidden_width", "null"], []),
        ("train", ["--candidates", "full,uniform-100"], ["candidates=[full,uniform-100]"]),
        ("train", ["--candidates", "full", "uniform-100"], ["candidates=[full,uniform-100]"]),
        ("train", ["--candidates", "[full, uniform-100]"], ["candidates=[full,uniform-100]"]),
        ("train", ["--item-scores", "s", "--user-side", "off", "--user-scores", "none", "--fusion", "add"],
         ["item_scores=s", "user_side=off", "user_scores=none", "fusion=add"]),
        ("train", ["--item-scores", "s", "--aspect-names", "story depth, pace"],
         ["item_scores=s", "aspect_names=[story depth, pace]"]),
        ("train", ["--dropout", "0.3", "--set", "dropout=0.2"], ["dropout=0.3"]),
        ("score", ["--requests.api", "mistral", "--requests.body", "a=1", "--engine-kwargs", "max_num_seqs=4"],
         ["requests.api=mistral", "requests.body={a: 1}", "engine_kwargs.max_num_seqs=4"]),
        ("compare", ["--arms", "base=a,b", "refined=c", "--arms", "refined=d"],
         ["arms={base: [a, b], refined: [c, d]}"]),
        ("prepare", ["--columns", "user_id=customer", "item_id=2", "--rating-range", "0,10"],
         ["columns={user_id: customer, item_id: 2}", "rating_range=[0, 10]"]),
        ("recommend", ["--steer", "a.b=+1", "--steer", "pace=-.5", "--new-items", "n.csv"],
         ['steer={"a.b": 1, pace: -0.5}', "new_item_scores=n.csv"]),
        ("recommend", ["--users", "A1,B2"], ["users=[A1, B2]"]),
        ("sweep", ["--train", "epochs=3", "targets=last,every", "--space", "dropout=0.1,0.2",
                   "guided_dimension=[0, [pace]]"],
         ["train={epochs: 3, targets: [last, every]}", "space={dropout: [0.1, 0.2], guided_dimension: [0, [pace]]}"]),
    ],
)  # fmt: skip
def test_flags_give_the_configuration_that_set_gives(stage, flags, settings):
    needed = {
        "train": ["data=d"],
        "score": ["data=d", "subjects=items", "aspects=a", "answered_by=x", "mode=generate", "structured=false"],
        "prepare": ["reviews=[r]", "format=table"],
        "recommend": ["train_run=t"],
    }
    common = [word for one in ["output=o", *needed.get(stage, [])] for word in ("--set", one)]
    assert loaded(stage, *common, *flags) == loaded(
        stage, *common, *(word for one in settings for word in ("--set", one))
    )


def test_an_id_with_a_leading_zero_stays_as_it_is():
    assert loaded("recommend", "--output", "o", "--train-run", "t", "--users", "007,12").users == ("007", "12")


@pytest.mark.parametrize(
    "title",
    [
        "Coffee gear: refined?", "It's \"good\"", '"A" and "B"', "a # b", "[1", "{x}", "1.50", "null", "a, b = c",
        "${oc.env:HOME} \\${x}", "-", "é: \\n",
    ],
)  # fmt: skip
def test_a_text_may_hold_anything(title):
    needed = ["--output", "o", "--data", "d"]
    assert loaded("report", *needed, "--title", title).title == title
    if "$" not in title:  # --set has the interpolations of YAML files
        assert loaded("report", *needed, "--set", f"title={title}").title == title
    assert load_config(ReportConfig, None, ["output=o", "data=d", override("title", title)]).title == title


def test_a_text_in_quotes_and_null_are_read_as_in_yaml():
    needed = ["output=o", "data=d", "subjects=items", "aspects=a"]
    assert load_config(ReportConfig, None, ["output=o", "data=d", "title='a: b'"]).title == "a: b"
    assert load_config(ScoreConfig, None, [*needed, "store=null"]).store is None
    assert load_config(ScoreConfig, None, [*needed, "answered_by="]).answered_by is None


def test_errors_name_the_flag(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("output: a\ndata: b\ndropout: 2\n")
    with pytest.raises(ConfigError) as refused:
        loaded("train", "--config", str(file), "--epochs", "0", "--set", "heads=0")
    problems = [line.split(": ")[0].strip() for line in str(refused.value).splitlines()[1:4]]
    assert sorted(problems) == ["dropout", "epochs (of --epochs)", "heads (of --set)"]
    with pytest.raises(ConfigError, match=r"^--arms: expected KEY=VALUE, found 'base'$"):
        loaded("compare", "--output", "o", "--arms", "base")
    with pytest.raises(ConfigError, match=r"requests\.api \(of --requests\.api\)"):
        loaded("score", "--requests.api", "bing")
    with pytest.raises(ConfigError, match=r"^--candidates: "):
        loaded("train", "--candidates", "[full")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--epoch", "3"], "raygr train: error: unrecognized arguments: --epoch 3; did you mean --epochs?"),
        (["train", "--sets", "epochs=3"], "did you mean --set?"),
        (["train", "--no-linear-mpa"], "did you mean --no-linear-map?"),
        (["score", "--structured", "false"], "false; a setting of yes or no takes no value: --NAME or --no-NAME"),
        (["trian"], "raygr: error: no stage trian; did you mean train? Stages are simulate, prepare"),
        (["xyz"], "raygr: error: no stage xyz: stages are simulate, prepare"),
        (["schema", "trian"], "invalid choice"),
        ([], "STAGE"),
    ],
)
def test_unknown_words_are_told_what_is_like_them(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"raygr {raygr.__version__}\n"


def test_a_job_has_the_flags_of_its_stage():
    command = [sys.executable, "jobs/train.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=CONFIGS.parent).stdout
    assert "--max-history INT" in shown and "--set NAME=VALUE" in shown


def test_the_schema_of_a_stage_accepts_the_shipped_files_and_refuses_others(capsys):
    checked = 0
    for path in sorted(CONFIGS.rglob("*.yaml")):
        stage = "reproduce" if path.stem in EXPERIMENTS else path.stem.split("-")[0]
        if stage in cli.COMMANDS and path.parent.name not in ("aspects", "cluster"):
            schema = json.loads(json_schema(cli.COMMANDS[stage], STAGES if stage == "pipeline" else None))
            jsonschema.validate(read_yaml(str(path)), schema)
            checked += 1
    assert checked > 20
    assert cli.main(["schema", "train"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert [*schema["properties"]][:3] == ["output", "data", "item_scores"]
    assert schema["properties"]["data"]["description"] == "A prepare run."
    for wrong in ({"output": "o", "data": "d", "epoch": 3}, {"output": "o", "data": "d", "epochs": 0}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    assert cli.main(["schema", "pipeline"]) == 0
    schema = json.loads(capsys.readouterr().out)
    for entry in ({"trian": {}}, {"train": {"output": "o", "data": "d", "epochs": 0}}, {"prepare": {"output": "o"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"stages": [entry]}, schema)
    for ids in ([101, "a b"], 12, "A1"):
        jsonschema.validate({"output": "o", "train_run": "t", "users": ids}, json.loads(json_schema(RecommendConfig)))
