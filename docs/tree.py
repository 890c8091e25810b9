"""Writes the list of modules in docs/architecture.md from the modules' own docstrings: `make tree`."""

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raygr"
PAGE = ROOT / "docs/architecture.md"
BLOCK = re.compile(r"(?<=<!-- tree -->\n).*?(?=<!-- end of tree -->)", re.DOTALL)
WIDTH, COLUMN = 118, 26
FOLDERS = {
    "data": "what later stages read: interactions, id -> vector tables, user vectors",
    "execution": "where the work of a stage runs: in the calling process, or in workers of Ray Train",
    "frames": "DataFrames in and out, for notebooks",
    "metrics": "ranks, intervals and diversity: no files, no configuration",
    "models": "the recommenders in plain PyTorch: no files, no configuration",
    "reproduce": "`raygr reproduce`: the paper's experiments",
}


def first_sentence(path: Path) -> str:
    """Of the module's docstring, on one line and without its final stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph)[0].rstrip(".")


def tree() -> str:
    """One line per module below raygr/: the files of the root, then folder by folder."""
    lines = ["raygr/"]
    for folder in [PACKAGE, *sorted(path for path in PACKAGE.iterdir() if path.is_dir())]:
        modules = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
        if not modules:
            continue
        depth = 1 if folder == PACKAGE else 2
        if depth == 2:
            lines.append(line(f"{folder.name}/", FOLDERS.get(folder.name, f"`raygr {folder.name}`"), 1))
        lines += [line(path.name, first_sentence(path), depth) for path in modules]
    return "\n".join(lines)


def line(name: str, text: str, depth: int) -> str:
    start = ("  " * depth + name).ljust(COLUMN - 1) + " "
    return textwrap.fill(text, WIDTH, initial_indent=start, subsequent_indent=" " * COLUMN, break_on_hyphens=False)


def with_tree(page: str) -> str:
    """The page with its block of modules made anew."""
    return BLOCK.sub(lambda _: f"\n```text\n{tree()}\n```\n\n", page)


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
