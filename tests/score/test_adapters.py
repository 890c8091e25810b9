"""Scoring refuses an adapter that was tuned for something else, and one that changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from tiny_policy import tiny_llama, tiny_policy
from toy_data import walks, write_prepared

from raygr import files, runs
from raygr.config import ConfigError
from raygr.score.adapters import (
    adapter_folder,
    adapter_rank,
    check_adapter,
    check_effect,
    copied_adapter,
    model_sha256,
    read_note,
)
from raygr.score.aspects import load_aspects
from raygr.score.config import ScoreConfig
from raygr.score.stage import score

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")


def write_adapter(folder: Path, **changes: Any) -> str:
    """Write the files that scoring reads, without weights."""
    note = {
        "shared_prompt_sha256": "p",
        "rollouts": "slots",
        "model": "org/model",
        "model_sha256": "",
        "aspects": ["pace"],
        "normalisation": {"item_mean": [5.0]},
    }
    folder.mkdir(parents=True)
    peft = {"r": 8, "base_model_name_or_path": "org/model"}
    (folder / "adapter_config.json").write_text(json.dumps(peft), encoding="utf-8")
    (folder / "raygr.json").write_text(json.dumps(note | changes), encoding="utf-8")
    return str(folder)


def check(folder: str, **changes: Any) -> None:
    fitting = {"subjects": "users", "shared_prompt_sha256": "p", "model": "org/model", "mode": "generate"}
    check_adapter(folder, **(fitting | changes))


def test_an_adapter_is_taken_for_what_it_was_tuned_for(tmp_path: Path):
    slots, free = write_adapter(tmp_path / "slots"), write_adapter(tmp_path / "free", rollouts="free")
    check(slots)
    check(free)
    check(free, mode="generate-free")
    assert read_note(slots).normalisation == {"item_mean": [5.0]}
    items = {"rollouts": "probe", "subjects": "items"}
    check(write_adapter(tmp_path / "probe", **items), mode="probe", subjects="items")


def test_an_adapter_behind_a_uri_is_copied_for_the_engine(tmp_path: Path):
    local = write_adapter(tmp_path / "adapter")
    assert copied_adapter(None) is None and copied_adapter(local) is None
    filesystem, inner = files.filesystem_of(f"memory://{tmp_path.name}/adapter")
    filesystem.put(f"{local}/", inner, recursive=True)
    copy = copied_adapter(adapter_folder(f"memory://{tmp_path.name}/adapter"))
    copied = {path.name: path.read_text() for path in Path(copy.name).iterdir()}
    assert copied == {path.name: path.read_text() for path in Path(local).iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_prompt_sha256": "q"}, r"tuned with another prompt \(its aspects: pace\)"),
        ({"model": "org/other"}, r"another base model \(org/model, not org/other\)"),
        ({"mode": "probe"}, "slots rollouts, which need mode: generate, not mode: probe"),
        ({"mode": "generate-free"}, "not mode: generate with structured: false"),
        ({"subjects": "items", "shared_prompt_sha256": "q"}, "tuned with prompts of users, not of items"),
    ],
)
def test_an_adapter_is_refused_for_anything_else_unless_forced(
    tmp_path: Path, changes: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
):
    folder = write_adapter(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=message) as caught:
        check(folder, **changes)
    assert "\n" not in str(caught.value)
    check(folder, **changes, force=True)
    assert "because of force_adapter" in caplog.text


def test_an_adapter_of_items_is_for_their_prompts_in_probe_mode_alone(tmp_path: Path):
    folder = write_adapter(tmp_path / "adapter", rollouts="probe", subjects="items")
    with pytest.raises(ConfigError, match=r"prompts of items, not of users \(force_adapter"):
        check(folder, mode="probe", shared_prompt_sha256="q")
    with pytest.raises(ConfigError, match="probe rollouts, which need mode: probe, not mode: generate"):
        check(folder, subjects="items")


def test_a_model_folder_is_known_by_its_content_not_its_place(tmp_path: Path):
    for name, content in (("one", "{}"), ("moved", "{}"), ("other", "{ }")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    tuned = {"model": "gone", "model_sha256": model_sha256(str(tmp_path / "one"))}
    folder = write_adapter(tmp_path / "adapter", **tuned)
    check(folder, model=str(tmp_path / "moved"))
    with pytest.raises(ConfigError, match="another base model"):
        check(folder, model=str(tmp_path / "other"))


def test_the_folder_of_a_finetune_run_stands_for_its_adapter(tmp_path: Path):
    run = runs.start_run(str(tmp_path / "tuned"), job="finetune", config={})
    inner = write_adapter(tmp_path / "tuned" / "adapter")
    with pytest.raises(runs.RunError, match="`raygr finetune` did not finish there"):
        adapter_folder(run.path)
    runs.finish_run(run, inputs=[], counts={})
    assert adapter_folder(run.path) == adapter_folder(inner) == inner
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        adapter_folder(str(tmp_path))


def test_an_adapter_of_another_tool_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = write_adapter(tmp_path / "adapter")
    Path(folder, "raygr.json").unlink()
    check(folder, mode="probe")
    assert "prompt, base model and mode were not checked" in caplog.text and "org/model" not in caplog.text
    check(folder, mode="probe", model="org/other")
    assert "is an adapter of org/model according to its adapter_config.json, not of org/other" in caplog.text


def test_scoring_refuses_before_its_run_starts(tmp_path: Path):
    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    adapter = write_adapter(tmp_path / "adapter", aspects=list(load_aspects(ASPECTS).names))
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "users", "aspects": ASPECTS}
    with pytest.raises(ConfigError, match=r"another prompt .*; another base model .*; slots rollouts"):
        score(ScoreConfig(**shared, adapter=adapter))
    assert not (tmp_path / "s").exists()


def write_weights(folder: str, *, b: float, **others: float) -> str:
    """Write weights with PEFT's names: A is random, B and `others` are constant."""
    weights = {"layer.lora_A.weight": torch.rand(4, 8), "layer.lora_B.weight": torch.full((8, 4), b)}
    weights |= {f"layer.{name}": torch.full((8,), value) for name, value in others.items()}
    safetensors.torch.save_file(weights, f"{folder}/adapter_model.safetensors")
    return folder


def test_an_adapter_that_changes_nothing_is_refused_before_scoring_starts(tmp_path: Path):
    run = runs.start_run(str(tmp_path / "untouched"), job="finetune", config={})
    untouched = write_weights(write_adapter(tmp_path / "untouched" / "adapter"), b=0.0)
    runs.finish_run(run, inputs=[], counts={})
    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "users", "aspects": ASPECTS}
    for path in (untouched, run.path):
        with pytest.raises(ConfigError, match=r"was never trained, .* it changes no score") as caught:
            score(ScoreConfig(**shared, adapter=path, force_adapter=True))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_an_adapter_is_refused_for_its_weights_alone(tmp_path: Path):
    """Other weights than A and B change the model, too: DoRA's magnitudes, biases, fully trained modules."""
    check_effect(write_adapter(tmp_path / "without safetensors"))
    check_effect(write_weights(write_adapter(tmp_path / "trained"), b=1e-3))
    check_effect(write_weights(write_adapter(tmp_path / "dora"), b=0.0, lora_magnitude_vector=1.0))
    broken = write_weights(write_adapter(tmp_path / "broken"), b=float("nan"))
    with pytest.raises(ConfigError, match="weights that are not finite"):
        check_effect(broken)


def test_the_fresh_adapter_of_peft_changes_nothing(tmp_path: Path):
    fresh = get_peft_model(tiny_llama(vocabulary=128), LoraConfig(r=4, target_modules=["q_proj"]))
    fresh.save_pretrained(tmp_path / "fresh")
    with pytest.raises(ConfigError, match="was never trained"):
        check_effect(str(tmp_path / "fresh"))
    tiny_policy().save_pretrained(tmp_path / "tuned")
    check_effect(str(tmp_path / "tuned"))


def test_an_adapter_of_a_rank_that_no_engine_takes_is_refused_before_scoring_starts(tmp_path: Path):
    folder = write_adapter(tmp_path / "adapter")
    for rank, room in ((1, 8), (8, 8), (9, 16), (300, 320), (512, 512)):
        Path(folder, "adapter_config.json").write_text(json.dumps({"r": rank}))
        assert adapter_rank(folder) == room
    Path(folder, "adapter_config.json").write_text(json.dumps({"r": 513}))
    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "users", "aspects": ASPECTS}
    with pytest.raises(ConfigError, match="has rank 513, and vLLM takes 512 at most"):
        score(ScoreConfig(**shared, adapter=folder))
    assert not (tmp_path / "s").exists()
