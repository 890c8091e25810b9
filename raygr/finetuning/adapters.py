"""Writes a tuned adapter: PEFT's files, and raygr.json, which says what scoring may use it for."""

import tempfile
from pathlib import Path

from peft import PeftModel
from pydantic_core import to_jsonable_python

from raygr import runs
from raygr.aspects.adapters import NOTE, AdapterNote


def save_adapter(model: PeftModel, note: AdapterNote, folder: str) -> None:
    """`folder` is a local path or any fsspec URI; what an earlier attempt left there goes."""
    runs.remove_folder(folder)
    filesystem, inner = runs.filesystem_of(folder)
    with tempfile.TemporaryDirectory() as part:
        model.save_pretrained(part)
        runs.write_json(to_jsonable_python(note), str(Path(part, NOTE)))
        filesystem.makedirs(inner, exist_ok=True)
        for file in sorted(Path(part).iterdir()):
            filesystem.put_file(str(file), f"{inner}/{file.name}")
