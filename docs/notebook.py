"""The notebook docs/notebook.ipynb: its page on the site, and `python docs/notebook.py`, which writes its outputs anew.

A notebook is JSON, and its cells run by `exec`, so neither needs a library.
"""

import ast
import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).with_suffix(".ipynb")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page; the notebook's page is made of its cells."""
    if page.file.src_uri != "notebook.md":
        return markdown
    return "\n\n".join([markdown, *map(cell_text, json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])])


def cell_text(cell: dict[str, Any]) -> str:
    """Markdown of a cell and its outputs: tables as HTML, anything else as text."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text")})
        text = "```text\n" + "".join(data["text/plain"]) + "\n```"
        parts += ["".join(data["text/html"]) if "text/html" in data else text]
    return "\n\n".join(parts)


def run_cells(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs the code cells in order and sets their outputs; returns the names that they have defined."""
    names: dict[str, Any] = {}
    for number, cell in enumerate((one for one in cells if one["cell_type"] == "code"), start=1):
        statements = ast.parse("".join(cell["source"])).body
        if isinstance(statements[-1], ast.Expr):  # a cell shows the value of its last line
            shown = ast.Assign([ast.Name("_", ast.Store())], statements[-1].value)
            statements[-1] = ast.fix_missing_locations(ast.copy_location(shown, statements[-1]))
        names["_"], printed = None, io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(statements, []), f"cell {number}", "exec"), names)
        cell |= {"execution_count": number, "outputs": []}
        if printed.getvalue():
            cell["outputs"] += [{"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())}]
        if names["_"] is not None:
            data = {"text/plain": lines(repr(names["_"]))}
            if hasattr(names["_"], "_repr_html_"):
                data["text/html"] = lines(names["_"]._repr_html_())
            result = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
            cell["outputs"] += [result]
    return names


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    run_cells(notebook["cells"])
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
