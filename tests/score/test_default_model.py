"""The default model's folder is complete or missing, and the error message says what to do."""

from pathlib import Path

import pytest

from raygr.score import default_model
from raygr.score.default_model import ModelError, model_folder, unpack


def test_a_model_that_cannot_be_written_leaves_nothing_and_names_the_setting(tmp_path, monkeypatch):
    def full(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default_model, "check_sha256", lambda gguf: None)
    monkeypatch.setattr(default_model, "write_model", full)
    with pytest.raises(
        ModelError, match=r"No space left.*; set RAYGR_CACHE to a folder with \d+ MB of room"
    ) as refused:
        unpack(Path("m.gguf"), tmp_path / "cache" / "model")
    assert "\n" not in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made_names_the_setting(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(default_model, "check_sha256", lambda gguf: None)
    with pytest.raises(ModelError, match="set RAYGR_CACHE"):
        unpack(Path("m.gguf"), tmp_path / "file" / "cache" / "model")


def test_the_process_that_was_first_wins(tmp_path, monkeypatch):
    def beside_another(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "of the other").touch()

    monkeypatch.setattr(default_model, "check_sha256", lambda gguf: None)
    monkeypatch.setattr(default_model, "write_model", beside_another)
    unpack(Path("m.gguf"), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "of the other").exists()


def test_a_models_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert model_folder("~/llama") == "/somewhere/llama"
    assert model_folder("meta/llama") == "meta/llama"
