"""A starting adapter is refused, before Ray starts, for other users, another shape or another model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_policy import NAMES, SMALL_VOCABULARY, save_tiny_llama, tiny_llama, toy_config

from raygr import files, runs
from raygr.config import ConfigError, check_config, read_yaml
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.lora import check_start, load_start, save_adapter, with_adapter
from raygr.score.adapters import AdapterNote, model_sha256

CONFIGS = Path(__file__).parents[2] / "configs"
FIRST = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), vocabulary=SMALL_VOCABULARY)


def note_of(model: str) -> AdapterNote:
    names = {"shared_prompt_sha256": "p", "rollouts": "slots", "model": model, "model_sha256": model_sha256(model)}
    return AdapterNote(**names, aspects=NAMES, normalisation={})


def write_data(path: Path, content: str = "four users") -> str:
    """A file in place of a prepare run, of which only the content is compared."""
    path.write_text(content)
    return str(path)


def write_run(folder: Path, model: str, config: FinetuneConfig) -> str:
    """Writes a finetune run with a fresh adapter; returns the folder of the adapter."""
    run = runs.start_run(str(folder), job="finetune", config=config)
    save_adapter(fresh(config), note_of(model), run.file("adapter"))
    runs.finish_run(run, inputs=[config.data], counts={"best_step": 0})
    return run.file("adapter")


def fresh(config: FinetuneConfig) -> Any:
    return with_adapter(tiny_llama(vocabulary=SMALL_VOCABULARY), config)


def refusal(config: FinetuneConfig, folder: str, model: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_start(config, folder, note_of(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_users_that_the_adapter_was_tuned_on_are_not_held_out(model: str, tmp_path: Path):
    config = toy_config(data=write_data(tmp_path / "data"))
    folder = write_run(tmp_path / "warm", model, config)
    check_start(replace(config, task="classification", keep_out=9, max_users=7), folder, note_of(model))
    check_start(replace(config, data=write_data(tmp_path / "moved")), folder, note_of(model))
    assert "may be held out here: seed is 0 there and 1 here" in refusal(replace(config, seed=1), folder, model)
    both = refusal(replace(config, seed=1, held_out_fraction=0.5), folder, model)
    assert both.endswith("seed is 0 there and 1 here; held_out_fraction is 0.2 there and 0.5 here")
    other = write_data(tmp_path / "other", "five users")
    text = refusal(replace(config, data=other), folder, model)
    assert text.endswith(f"data was {config.data} there, of other content than {other} is here")
    write_data(tmp_path / "data", "prepared anew")
    assert "of other content" in refusal(config, folder, model)


def finetune_stages(path: Path) -> list[FinetuneConfig]:
    stages = read_yaml(str(path))["stages"]
    found = [settings for stage in stages for job, settings in stage.items() if job == "finetune"]
    return [check_config(FinetuneConfig, settings, source=str(path)) for settings in found]


def test_shipped_pipelines_hold_the_same_users_out_throughout():
    gone_on = 0
    for path in CONFIGS.rglob("pipeline*.yaml"):
        stages = finetune_stages(path)
        tuned = {one.output: (one.data, one.seed, one.held_out_fraction) for one in stages}
        for one in stages:
            assert one.adapter is None or tuned[one.adapter] == tuned[one.output], path
            gone_on += one.adapter is not None
    assert gone_on >= 4


def write_foreign(folder: Path, config: FinetuneConfig, change: Any = None) -> str:
    """Writes an adapter without raygr.json, with changed weights."""
    fresh(config).save_pretrained(folder)
    weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    if change:
        change(weights)
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


def test_an_adapter_of_a_model_of_another_width_is_refused_in_one_line(model: str, tmp_path: Path):
    def widened(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            rows, columns = weights[name].shape
            wide = (rows, 2 * columns) if "lora_A" in name else (2 * rows, columns)
            weights[name] = torch.zeros(wide)

    folder = write_foreign(tmp_path / "wide", toy_config(), widened)
    text = refusal(toy_config(), folder, model)
    assert f"other weights than lora_targets of {model}, 16 of them: {FIRST} is (4, 64) there and (4, 32) here" in text


def test_an_adapter_of_other_places_is_refused_in_one_line(model: str, tmp_path: Path):
    few = write_foreign(tmp_path / "few", toy_config(lora_targets=("q_proj", "v_proj")))
    assert f"8 of them: {FIRST} is missing there and (4, 32) here" in refusal(toy_config(), few, model)
    more = write_foreign(tmp_path / "more", toy_config())
    text = refusal(toy_config(lora_targets=("q_proj", "v_proj")), more, model)
    assert f"8 of them: {FIRST} is (4, 32) there and missing here" in text


def test_an_adapter_without_weights_is_refused_in_one_line(model: str, tmp_path: Path):
    folder = write_foreign(tmp_path / "none", toy_config())
    Path(folder, "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refusal(toy_config(), folder, model)


def test_targets_given_as_a_pattern_are_known_by_their_weights(model: str, tmp_path: Path):
    def moved(weights: dict[str, torch.Tensor]) -> None:
        weights[FIRST] += 1

    folder = write_foreign(tmp_path / "pattern", toy_config(), moved)
    file = files.join(folder, "adapter_config.json")
    files.write_json(files.read_json(file) | {"target_modules": r".*self_attn\.[qkvo]_proj"}, file)
    check_start(toy_config(), folder, note_of(model))
    started, saved = fresh(toy_config()), safetensors.torch.load_file(Path(folder, "adapter_model.safetensors"))
    load_start(started, folder)
    weights = {name.replace(".default", ""): weight.data for name, weight in started.named_parameters()}
    torch.testing.assert_close(weights[FIRST], saved[FIRST])
