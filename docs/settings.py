"""Write the tables of docs/settings.md while the site is built, from the fields that `raygr STAGE --help` shows."""

from typing import Any

from raygr.cli import COMMANDS
from raygr.flags import facts, settings_of, type_words


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page."""
    return f"{markdown}\n{tables()}" if page.file.src_uri == "settings.md" else markdown


def tables() -> str:
    """A section per stage, with a row per setting."""
    text = ""
    for stage, kind in COMMANDS.items():
        text += f"## {stage}\n\n{kind.__doc__}\n\n| setting | type | range and default | |\n| --- | --- | --- | --- |\n"
        for name, hint, field in settings_of(kind):
            cells = [f"`{name}`", type_words(hint).replace("|", " or "), facts(field), field.description or ""]
            text += "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |\n"
        text += "\n"
    return text
