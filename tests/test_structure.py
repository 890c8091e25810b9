"""The rules of docs/architecture.md, checked on the sources: folders, imports, names."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from raygr.stages import STAGES

PACKAGE = Path(__file__).parents[1] / "raygr"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))
FOLDERS = sorted({path.parent.name for path in FILES} - {PACKAGE.name})
ROOT = sorted(path.stem for path in FILES if path.parent == PACKAGE)
COMPOSERS = ["pipeline", "frames", "reproduce", "cli"]  # each above those before it
SHARED = {"models", "data", "metrics", "execution"}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
LITTLE_WORDS = {"a", "an", "and", "in", "of", "or", "that", "the", "to", "too"}
REPEATED = {"config", "stage", "loop", "losses", "metrics"}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of imported modules; `from package import module` gives `package.module`."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    """The part of the package that a module belongs to: a folder, or a file of the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts() -> dict[str, set[str]]:
    found = defaultdict(set)
    for path in FILES:
        names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("raygr.")}
        found[part_of(path)] |= names - {part_of(path)}
    return found


def files_importing(library: str) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == library for name in imported_modules(path))
    }


def test_a_stage_is_a_folder_of_its_name_with_settings_and_a_function_of_its_name():
    for name, config in STAGES.items():
        assert config.__module__ == f"raygr.{name}.config"
        functions = [node.name for node in TREES[PACKAGE / name / "stage.py"].body if isinstance(node, ast.FunctionDef)]
        assert name in functions, f"raygr/{name}/stage.py has no function {name}"
    assert set(FOLDERS) == {*STAGES, *SHARED, "frames", "reproduce"}


def test_imports_go_down():
    imports = imported_parts()
    list(TopologicalSorter(imports).static_order())  # CycleError names a circle
    stages, base = set(STAGES), set(ROOT) - {*COMPOSERS, "stages"}
    for part, found in imports.items():
        if part in base:
            assert found <= base, f"{part} imports {found - base}"
        elif part in SHARED:
            assert found <= base | SHARED, f"{part} imports {found - base - SHARED}"
        elif part in stages:
            assert found <= base | SHARED | stages, f"{part} imports {found - base - SHARED - stages}"
    for number, part in enumerate(COMPOSERS):
        assert not imports[part] & set(COMPOSERS[number:])


def test_heavy_libraries_have_their_places():
    stages = {f"{name}/stage.py" for name in STAGES}
    assert files_importing("ray") <= stages | {"ray_setup.py", "execution/distributed.py", "score/actors.py"}
    assert files_importing("vllm") == {"score/engine.py"}
    assert all(file.startswith("finetune/") or file == "score/adapters.py" for file in files_importing("peft"))


def test_models_and_metrics_read_no_file_and_no_configuration():
    for path in FILES:
        if part_of(path) in ("models", "metrics"):
            inside = {name.split(".")[1] for name in imported_modules(path) if name.startswith("raygr.")}
            assert inside <= {"models", "metrics", "schema"}, f"{path} imports {inside}"


def test_names_are_used_once():
    modules = Counter(path.stem for path in FILES)
    assert {name for name, count in modules.items() if count > 1} <= REPEATED
    assert not set(modules) & set(FOLDERS) - REPEATED - {"pipeline"}
    classes = Counter(node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in classes.items() if count > 1] == []
    assert len(ROOT) <= 12


def test_a_helper_of_three_lines_has_two_callers():
    """A short function that is called once, and used by no test, job or benchmark, hides a line behind a name."""
    outside = [path for folder in ("tests", "jobs", "benchmarks") for path in (PACKAGE.parent / folder).rglob("*.py")]
    used_outside = {name for path in outside for name in mentioned_names(ast.parse(path.read_text(encoding="utf-8")))}
    uses = Counter(name for tree in TREES.values() for name in mentioned_names(tree))
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    offences = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and node.name != "main"
        if lines_of_body(node) <= 3 and uses[node.name] <= 1 and node.name not in used_outside
        if node.name in called or not uses[node.name]  # a function that is passed as a value does not count
    ]
    assert not offences, "\n".join(offences)


def shape_legend() -> dict[str, str]:
    """Meaning of each shape letter, from the table of docs/architecture.md."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([A-Z]) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a letter has two rows"
    return dict(rows)


def explained_letters(docstring: str) -> list[tuple[str, str]]:
    """Letters with the words that explain them, from the first `Shape letters:` to the end of that sentence."""
    found = re.search(r"Shape(?:s| letters?| suffix(?:es)?)\b:?(.*?)(?:\.(?=\s|$)|$)", docstring, re.DOTALL)
    if not found:
        return []
    parts = re.split(r"(?:^|[\s,:;])`?([A-Z])`?(?: (?:and|or) `?[A-Z]`?)?\s(?=[a-z])", found[1])
    return list(zip(parts[1::2], parts[2::2], strict=True))


def words_of(text: str) -> set[str]:
    return {word for word in re.findall(r"[\w.]+", text.lower()) if word not in LITTLE_WORDS}


@pytest.mark.parametrize("path", [path for path in FILES if ast.get_docstring(TREES[path])], ids=str)
def test_module_docstrings_explain_shape_letters_in_the_words_of_the_legend(path: Path):
    legend = shape_legend()
    for letter, words in explained_letters(ast.get_docstring(TREES[path])):
        assert words_of(words) <= words_of(legend[letter]), f"{path}: {letter} is {words!r}, not {legend[letter]!r}"


def test_shape_suffixes_consist_of_letters_of_the_legend():
    """A suffix may also hold digits: dimensions of that size."""
    legend, used = shape_legend(), set()
    for path in FILES:
        for name in bound_names(TREES[path]):
            found = re.fullmatch(r"[a-z]\w*_([A-Z0-9]*[A-Z][A-Z0-9]*)", name)
            letters = set(found[1]) - set("0123456789") if found else set()
            assert letters <= set(legend), f"{path}: {name}"
            used |= letters
    assert used == set(legend), "the legend explains letters that no suffix has"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Scores. Shape letters: `B` histories,\n`C` candidates: the pool. More.", ["B", "C"]),
        ("Shapes: U shoppers, I films.", ["U", "I"]),
        ("Shape suffixes: `Q` levels 1..10, B or U users. Ratings are 1..10.", ["Q", "B"]),
        ("A sentence on `B` alone.", []),
    ],
)
def test_letters_are_found_in_all_forms(docstring: str, expected: list[str]):
    assert [letter for letter, _ in explained_letters(docstring)] == expected


def bound_names(tree: ast.AST) -> set[str]:
    """Names of variables, parameters and fields."""
    names = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return names | set(mentioned_names(tree))


def mentioned_names(tree: ast.AST) -> list[str]:
    """Names that are read, also after a dot; definitions and imports do not count."""
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return names + [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def lines_of_body(node: ast.FunctionDef) -> int:
    """Lines of code below the signature, without the docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize(
    "imported",
    [
        "import raygr",
        "import raygr.cli, raygr.score.engine, raygr.score.subjects",
        "from raygr import explain_item, load_recommender",
    ],
)
def test_importing_loads_no_heavy_library(imported: str):
    if "score" in imported:
        pytest.importorskip("transformers", reason="needs the extra llm")
    code = f"import sys; {imported}\nprint([name for name in ('vllm', 'peft', 'ray') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
