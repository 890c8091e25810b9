"""README.md and docs/: commands are valid, named things exist, the tree is complete, a folder has one content."""

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from raygr.cli import COMMANDS, OTHERS, add_flags, config_source
from raygr.compare.comparison import ArmGain
from raygr.compare.gain_words import gain_text
from raygr.config import ConfigError, PipelineConfig, load_config
from raygr.explain.config import ExplainConfig
from raygr.flags import parse_flags
from raygr.pipeline import checked_stage
from raygr.prepare.config import PrepareConfig
from raygr.reproduce.config import EXPERIMENTS, ReproduceConfig
from raygr.score.aspects import load_aspects
from raygr.score.config import ScoreConfig
from raygr.stages import STAGES
from raygr.sweep.config import SweepConfig
from raygr.train.config import TrainConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("configs/**/*.md")),
]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
KINDS: dict[str, Any] = COMMANDS
PRINTS = {"schema": KINDS, "completion": ("bash", "zsh")}
TRAIN_FIELDS = {field.name for field in dataclasses.fields(TrainConfig)}

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?<![\w./-])(?:raygr|python jobs/(?P<job>\w+)\.py)\s+")
SKIP_BUILD = "" if importlib.util.find_spec("material") else "needs mkdocs-material: pip install 'raygr[docs]'"
PATH = re.compile(r"(?<![\w./~-])(?:benchmarks|configs|datasets|docs|jobs|raygr|requirements|tests)/[\w./*<>{}$-]+")
LINK = re.compile(r"\]\(([^)#\s]+)")


class Command(NamedTuple):
    page: str
    stage: str
    words: tuple[str, ...]
    """What follows the stage."""
    whole: bool
    """Stands in a block of its own, to be run as it is; prose may leave out what a stage cannot do without."""

    def __str__(self) -> str:
        return f"{self.page}: raygr {shlex.join([self.stage, *self.words])}"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


# --- reading ------------------------------------------------------------------------------------


def commands_of(path: Path) -> list[Command]:
    page, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":  # a comment's lines that are set off are commands
        return block_commands(page, "".join(re.findall(r"^#(  .*\n)", text, re.MULTILINE)), whole=True)
    blocks = [block for language, block in FENCED.findall(text) if not language]
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    found = [command for block in blocks for command in block_commands(page, block, whole=True)]
    return found + [command for code in inline for command in block_commands(page, code, whole=False)]


def block_commands(page: str, block: str, *, whole: bool) -> list[Command]:
    """Replaces shell variables by the first value that a loop or an `export` gives them."""
    values = dict(re.findall(r"\b(?:for|export) (\w+)(?: in |=)([\w./-]+)", block))
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda name: values.get(name[1], name[0]), line.partition(" #")[0])
        start = COMMAND.search(line)
        if start:
            words = simple_command(line[start.end() :])
            stage, words = (start["job"], words) if start["job"] else (words[0], words[1:])
            if not stage.endswith(":"):  # the head of an error message
                found.append(Command(page, stage, tuple(words), whole))
    return found


def simple_command(line: str) -> list[str]:
    """Words up to a pipe, a redirection or the next command."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
    reader.whitespace_split = True
    words = []
    for word in reader:
        if set(word) <= set(";|&>"):
            break
        words.append(word)
    return [word for word in words if word != "..."]


class Flags(argparse.ArgumentParser):
    """A parser that raises an error in place of ending the process."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parsed_flags(command: Command) -> argparse.Namespace:
    parser = Flags(prog=f"raygr {command.stage}", allow_abbrev=False)
    add_flags(parser, stage=command.stage)
    return parse_flags(parser, command.words)


def has_own_file(command: Command) -> bool:
    """Whether --config names a file of the reader, which the checkout lacks."""
    file = parsed_flags(command).config
    return file is not None and not file.startswith("configs/")


def config_of(command: Command) -> Any:
    """The checked configuration of a command, without the settings of a reader's own file."""
    parsed = parsed_flags(command)
    file, settings, flags = config_source(command.stage, parsed)
    return load_config(KINDS[command.stage], None if has_own_file(command) else file, settings, flags)


def problem(command: Command) -> str:
    """What is wrong with the command; "" where nothing is."""
    if command.stage.startswith("--") or (command.words and command.words[0] in PRINTS.get(command.stage, ())):
        return ""
    if command.stage in OTHERS:
        return ""
    if command.stage not in KINDS:
        return f"{command}\n  no such stage"
    if command.words in ((), ("--help",)):
        return ""
    try:
        config = config_of(command)
    except ValueError as error:
        return f"{command}\n  {error}"
    except ConfigError as error:
        fields = re.findall(r"^  .*$", str(error), re.MULTILINE)
        lacking = bool(fields) and all(line.endswith("Field required") for line in fields)
        return "" if lacking and (has_own_file(command) or not command.whole) else f"{command}\n  {error}"
    if isinstance(config, ReproduceConfig | SweepConfig) and not TRAIN_FIELDS.issuperset(config.train):
        return f"{command}\n  train has no {', '.join(set(config.train) - TRAIN_FIELDS)}"
    return ""


def shipped_stages(path: Path) -> Iterator[Any]:
    """Configurations of the stages that one shipped file describes."""
    job = "reproduce" if path.stem in EXPERIMENTS else path.stem.split("-")[0]
    if job == "pipeline":
        entries = load_config(PipelineConfig, str(path), []).stages
        yield from (checked_stage(number, entry)[1] for number, entry in enumerate(entries, start=1))
    elif job in STAGES:
        yield load_config(STAGES[job], str(path), [])


# --- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_are_valid(path):
    assert not [text for command in commands_of(path) if (text := problem(command))]


def test_commands_are_found_where_they_stand():
    found = [str(command) for command in commands_of(README)]
    assert "README.md: raygr pipeline --config pipeline.yaml" in " ".join(found)
    assert {command.stage for command in commands_of(ROOT / "docs/cluster.md")} >= {"simulate", "prepare", "train"}
    reproduced = [command for command in commands_of(ROOT / "docs/results/ml-1m-sample.md") if command.whole]
    assert ["figure-6" in command.words for command in reproduced][-1]
    assert len(commands_of(ROOT / "configs/ml-1m/reproduce-tables.yaml")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raygr trian --set output=a", "no such stage"),
        ("raygr train --set output=a --set data=b --set epoch=3", "epoch: no such field"),
        ("raygr train --set output=a \\\n  --set data=b --set dropout=2", "dropout: .*less than"),
        ("raygr train --set output=a", "data: Field required"),
        ("raygr train --sets output=a --set data=b", "unrecognized"),
        ("raygr train --config configs/ml-1m/none.yaml", "no such configuration file"),
        ("raygr reproduce table-7", "invalid choice"),
        ("raygr reproduce table-3 --set train.epoch=1", "train has no epoch"),
        ("raygr reproduce table-3 --train epoch=1", "train has no epoch"),
        ("raygr train --output a --data b --epoch 3", "did you mean --epochs"),
        ("raygr schema trian", "no such stage"),
        ("for m in sasrecc gru4rec; do\nraygr train --set output=a --set data=b --set model=$m; done", "model: Input"),
        ("python jobs/score.py --config score.yaml --set actor=8", "actor: no such field"),
    ],
)
def test_a_broken_command_is_told(text, words):
    [command] = block_commands("page", text, whole=True)
    assert re.search(words, problem(command))


def test_yaml_blocks_are_valid(tmp_path):
    """A block's first line says whose configuration it is: `# prepare.yaml: ...`."""
    blocks = [
        block for page in PAGES for language, block in FENCED.findall(page.read_text("utf-8")) if language == "yaml"
    ]
    assert blocks
    for block in blocks:
        file = tmp_path / "block.yaml"
        file.write_text(block, encoding="utf-8")
        stage = re.match(r"# (\w+)\.yaml", block)
        if stage[1] == "aspects":
            load_aspects(str(file))
        else:
            load_config(STAGES[stage[1]], str(file), [])


def test_python_blocks_import_and_call_what_exists():
    """Imports succeed, and each call of an imported function fits its parameters."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    blocks = [block for text in texts for language, block in FENCED.findall(text) if language == "python"]
    assert len(blocks) > 2
    for block in blocks:
        tree, names = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = vars(importlib.import_module(node.module))
                names |= {alias.name: module[alias.name] for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                function = inspect.signature(names[node.func.id])
                function.bind(*node.args, **{keyword.arg: keyword.value for keyword in node.keywords})


def test_a_block_is_a_command_or_says_its_language():
    """Without this, a command in another language's block would escape the checks above."""
    for page in PAGES:
        for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
            assert language in ("", "yaml", "python", "text", "bibtex"), f"{page}: {language}"
            assert language != "text" or not re.search(r"^(raygr|make|pip|python) ", block, re.MULTILINE), block


NEEDS = {"network", "ten minutes", "hours", "own data", "published data", "quick start", "GPU", "cluster", "Docker"}
IMAGES = sorted((ROOT / "docker").glob("*.Dockerfile"))
MARKED = re.compile(r"(?:^<!-- (needs: [^>]+|run by [^>]+) -->\n)?^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_an_image_installs_what_the_page_on_installation_says(path):
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"pip install --no-cache-dir (.+?)(?: && .*)?$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(commands) == 2 and all(f"pip install {command}" in page for command in commands)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_block_of_commands_says_what_runs_it(path):
    """The comment above a block names the test that runs it, or what the tests lack."""
    text = re.sub(r"^```\w+\n.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for mark, block in MARKED.findall(text):
        kind, _, names = mark.partition(": ") if mark.startswith("needs") else mark.rpartition(" ")
        assert mark, f"no `<!-- needs: ... -->` or `<!-- run by tests/... -->` above\n{block}"
        if kind == "needs":
            assert set(names.split(", ")) <= NEEDS
        else:
            assert (ROOT / names).exists()


def test_explained_aspects_are_those_that_the_page_scores():
    pages = [ROOT / "docs/own-data.md", ROOT / "docs/explaining.md"]
    found = [one for page in pages for one in commands_of(page)]
    commands = [one for one in found if one.stage in ("score", "explain") and one.whole]
    configs = [config_of(command) for command in commands if not has_own_file(command)]
    files = [config.aspects for config in configs if isinstance(config, ScoreConfig)]
    scored = {aspect.name for file in files for aspect in load_aspects(file).aspects}
    explained = [config.aspect_names for config in configs if isinstance(config, ExplainConfig) and config.aspect_names]
    assert explained and all(scored.issuperset(aspects) for aspects in explained)


def test_make_targets_exist():
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in PAGES:
        named = re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= set(rules), page


# The command line, with an engine that answers by the prompt's hash, in no time.
WITH_STAND_IN = """
import sys
import numpy as np
from raygr.cli import main
from raygr.score import transformers_engine
from raygr.score.store import StoredScore

class StandIn:
    def __init__(self, settings, store):
        self.store = store

    def __call__(self, batch):
        hashes = list(batch["prompt_sha256"])
        ratings = [[1 + int(digest[a], 16) % 10 for a in range(12)] for digest in hashes]
        self.store.write(hashes, [StoredScore(tuple(r), tuple(map(float, r)), "ok", "") for r in ratings])
        names = ("subjects", "tokens_given", "tokens_computed", "engine_seconds")
        return {name: np.array([len(hashes)]) for name in names}

transformers_engine.TransformersEngine = StandIn
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_page_on_own_data_leads_from_csv_to_lists(tmp_path, tokenizer):
    """The two commands of README and of the page, as they stand, on 150 customers; the page has what init prints."""
    write_shop(tmp_path)
    page = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^<!-- run by tests/test_docs.py -->\n```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert block in README.read_text(encoding="utf-8")
    done = []
    for line in block.splitlines():
        command = [sys.executable, "-c", WITH_STAND_IN, *shlex.split(line)[1:]]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done.append(subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500))
        assert done[-1].returncode == 0, done[-1].stderr
    init, pipeline = done
    assert init.stdout in page
    assert "report: file://" in pipeline.stdout and re.search(r"^guided +0\.\d+ ", pipeline.stdout, re.MULTILINE)
    lists = pq.read_table(tmp_path / "outputs/lists/recommendations").to_pandas()
    products = {f"sku{number}" for number in range(40)}
    assert lists.groupby("subject_id").size().tolist() == [10] * 150 and set(lists["item_id"]) <= products
    own = [line for line in pipeline.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d |  |warnings of", line)]
    assert own == [] and f"what Ray and vLLM print: {tmp_path}/outputs/pipeline.log" in pipeline.stderr


def write_shop(folder: Path) -> None:
    """Orders and products with the column names of README: 150 customers, 8 of 40 products each."""
    orders = [
        f"customer{customer},sku{(3 * customer + order * (1 + customer % 3)) % 40},2026-01-{order + 1:02}\n"
        for customer in range(150)
        for order in range(8)
    ]
    (folder / "orders.csv").write_text("customer,sku,ordered_at\n" + "".join(orders), encoding="utf-8")
    products = [f"sku{number},The Game of Part {number}\n" for number in range(40)]
    (folder / "products.csv").write_text("sku,name\n" + "".join(products), encoding="utf-8")


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_exist(path):
    named = {one.rstrip("./") for one in PATH.findall(path.read_text(encoding="utf-8"))}
    assert not [one for one in named if not re.search(r"[<{$]", one) and not any(ROOT.glob(one))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    links = [one for one in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in one]
    assert not [one for one in links if not (path.parent / one).exists()]


def test_the_list_of_modules_is_made_of_their_docstrings():
    page = ROOT / "docs/architecture.md"
    written = runpy.run_path(str(ROOT / "docs/tree.py"))["with_tree"](page.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == written, "run `make tree`"
    modules = [path for path in (ROOT / "raygr").rglob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert not [path for path in modules if not re.search(rf"^ +{path.name} ", written, re.MULTILINE)]


def test_imports_in_texts_name_what_exists():
    """Tests and benchmarks hold programs as texts, whose imports no linter reads."""
    missing = []
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("jobs/*.py")]:
        lines = re.findall(r"^ *from (raygr[\w.]*) import ([\w, ]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for module, names in lines:
            if not importlib.util.find_spec(module.rpartition(".")[0] or "raygr") or not importlib.util.find_spec(
                module
            ):
                missing.append(f"{path.name}: {module}")
                continue
            for name in [words.split(" as ")[0].strip() for words in names.split(",")]:
                found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
                missing += [] if found else [f"{path.name}: {module}.{name}"]
    assert not missing


def test_every_folder_of_configurations_is_named():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^configs/  .*$", text, re.MULTILINE)
    assert not [path.name for path in (ROOT / "configs").iterdir() if path.is_dir() and f"{path.name}/" not in line]


def test_every_stage_is_in_the_table_of_stages():
    rows = re.findall(r"^\| `raygr (\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(KINDS)


def code_texts() -> str:
    """All texts of the package, one a line; what an f-string fills in is left out."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "raygr").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(" ".join(node.value.split()) for node in nodes if isinstance(node.value, str))


def test_messages_in_the_faq_are_those_of_the_code():
    texts = code_texts()
    messages = FENCED.findall((ROOT / "docs/faq.md").read_text(encoding="utf-8"))
    assert len(messages) > 20
    for _, message in messages:
        parts = [part.strip(" \n") for part in re.split(r"<[^>]+>|run\.json", message)]
        assert not [part for part in parts if part not in texts], message


def test_shape_letters_are_in_the_legend():
    """The letters are suffixes of names such as `scores_IA`. Docstrings define letters of a single module."""
    legend = set(re.findall(r"\| ([A-Z]) \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8")))
    letters: dict[str, str] = {}
    for path in (ROOT / "raygr").rglob("*.py"):
        names = re.findall(r"\b[a-z][a-z0-9_]*_([A-Z]{1,5})\b", path.read_text(encoding="utf-8"))
        letters |= {letter: str(path) for letter in "".join(name for name in names if name != "ID")}
    assert not {letter: path for letter, path in letters.items() if letter not in legend}


# --- the site -----------------------------------------------------------------------------------


@pytest.mark.skipif(bool(SKIP_BUILD), reason=SKIP_BUILD)
def test_the_site_builds_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetched = re.findall(
            r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(https?://[^\"> ]+)", page.read_text("utf-8")
        )
        assert not fetched, page


# --- contents -----------------------------------------------------------------------------------


def test_what_is_written_to_one_folder_is_one_thing():
    """Otherwise a reader who runs both gets a refusal, or a figure of other data than the page says."""
    shipped = [(str(path.relative_to(ROOT)), config) for path in CONFIGS for config in shipped_stages(path)]
    commands = [command for path in PAGES for command in commands_of(path) if command.stage == "prepare"]
    named = [(str(command), config_of(command)) for command in commands if "configs/" in " ".join(command.words)]
    assert named and all(isinstance(config, PrepareConfig) for _, config in named)
    first: dict[str, tuple[str, Any]] = {}
    for where, config in [*shipped, *named]:
        other, same = first.setdefault(config.output, (where, config))
        assert config == same, f"{where} and {other} differ, and both write {config.output}"


def test_the_table_by_users_is_made_of_its_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import users

    rows = [users.GainRow(**row) for row in json.loads(users.RESULTS.read_text())]
    assert users.markdown(rows, [0, 1]) == Path(f"{users.FIGURE}.md").read_text(encoding="utf-8")
    gain = ArmGain(0.01, -0.5, 0.5, None, None, None, p=None, over="users and runs", p_holm=None, per_run=[])
    assert gain_text(gain) == "+0.0100 [-0.5000, +0.5000]"
