"""An adapter is refused for what it was not tuned for, and by the engine where it moves nothing."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from toy_data import walks, write_prepared

from raygr import files, runs
from raygr.config import ConfigError
from raygr.score.adapters import (
    adapter_folder,
    adapter_rank,
    check_adapter,
    check_learned,
    copied_adapter,
    model_sha256,
    read_note,
)
from raygr.score.aspects import load_aspects
from raygr.score.config import ScoreConfig
from raygr.score.engine import ScoringEngine
from raygr.score.stage import score

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")


def write_adapter(folder: Path, **changes: Any) -> str:
    """The files that scoring looks at; no weights."""
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
    fitting = {"shared_prompt_sha256": "p", "model": "org/model", "mode": "generate", "force": False}
    check_adapter(folder, **(fitting | changes))


def test_an_adapter_is_taken_for_what_it_was_tuned_for(tmp_path: Path):
    slots, free = write_adapter(tmp_path / "slots"), write_adapter(tmp_path / "free", rollouts="free")
    check(slots)
    check(free)
    check(free, mode="generate-free")
    assert read_note(slots).normalisation == {"item_mean": [5.0]}


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
        ({"mode": "probe"}, "slots rollouts, which mode: generate asks for, not mode: probe"),
        ({"mode": "generate-free"}, "not mode: generate with structured: false"),
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
    assert "by force_adapter" in caplog.text


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
    assert "says not what it was tuned for" in caplog.text and "org/model" not in caplog.text
    check(folder, mode="probe", model="org/other")
    assert "is an adapter of org/model, says its adapter_config.json, and not of org/other" in caplog.text


def test_scoring_refuses_before_its_run_starts(tmp_path: Path):
    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    adapter = write_adapter(tmp_path / "adapter", aspects=list(load_aspects(ASPECTS).names))
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "users", "aspects": ASPECTS}
    with pytest.raises(ConfigError, match=r"another prompt .*; another base model .*; slots rollouts"):
        score(ScoreConfig(**shared, adapter=adapter))
    assert not (tmp_path / "s").exists()


def write_tuned(folder: Path, *, best_step: int, **changes: Any) -> str:
    """A finetune run; the folder of its adapter."""
    run = runs.start_run(str(folder), job="finetune", config={"warm_start_epochs": 0, "adapter": None} | changes)
    adapter = write_adapter(folder / "adapter")
    runs.finish_run(run, inputs=[], counts={"best_step": best_step})
    return adapter


def test_an_adapter_whose_reward_never_rose_is_refused_before_scoring_starts(tmp_path: Path):
    untouched = write_tuned(tmp_path / "untouched", best_step=0)
    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "users", "aspects": ASPECTS}
    for path in (untouched, str(tmp_path / "untouched")):
        with pytest.raises(ConfigError, match="reward never rose, so its adapter is the bare model") as caught:
            score(ScoreConfig(**shared, adapter=path, force_adapter=True))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "s").exists()
    check_learned(write_tuned(tmp_path / "learned", best_step=3))
    check_learned(write_tuned(tmp_path / "taught", best_step=0, warm_start_epochs=1))
    check_learned(write_tuned(tmp_path / "gone-on", best_step=0, adapter="learned"))
    check_learned(write_adapter(tmp_path / "alone"))


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


class StandInModel:
    """Answers like vllm.LLM.generate; a LoRA request adds `shift` to every log-probability."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def generate(self, inputs: list[dict], sampling: list[Any], *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        added = self.shift if lora_request else 0.0
        position = {token: SimpleNamespace(logprob=-1.0 - token / 10 + added) for token in range(10)}
        return [SimpleNamespace(outputs=[SimpleNamespace(logprobs=[position])]) for _ in inputs]


@pytest.mark.parametrize(("shift", "is_refused"), [(0.0, True), (1e-3, False), (-0.5, False), (np.nan, True)])
def test_the_engine_refuses_an_adapter_that_moves_no_log_probability(
    monkeypatch: pytest.MonkeyPatch, shift: float, is_refused: bool
):
    engine = ScoringEngine.__new__(ScoringEngine)  # without loading a model
    engine.settings = SimpleNamespace(shared_ids=(1, 2), tails=((3,),), adapter="outputs/tuned/adapter")
    engine.llm, engine.lora, engine.rating_ids = StandInModel(shift), "request", list(range(10))
    engine.merged = None
    monkeypatch.setattr(ScoringEngine, "sampling", lambda self, **parameters: parameters)
    if is_refused:
        with pytest.raises(RuntimeError, match="outputs/tuned/adapter moves no log-probability of the bare model"):
            engine.check_adapter_answers()
    else:
        engine.check_adapter_answers()


# vLLM answers -1 - r / 10; the merged model `apart` from it, the bare one `moved` from the merged one. (5e-4, 5e-4) is
# vLLM answering just as the bare model under an adapter that moves little.
@pytest.mark.parametrize(
    ("apart", "moved", "is_refused"),
    [
        (0.0, 0.4, False),
        (0.15, 0.4, False),
        (0.25, 0.4, True),
        (0.4, 0.4, True),
        (3e-5, 5e-4, False),
        (5e-4, 5e-4, True),
        (3e-4, 1e-4, True),
    ],
)
def test_the_engine_refuses_a_merged_model_that_it_does_not_answer_as(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, apart: float, moved: float, is_refused: bool
):
    engine = merged_engine(monkeypatch, apart=apart, moved=moved)
    if is_refused:
        with pytest.raises(RuntimeError, match="answers not as the model with outputs/tuned/adapter in its weights"):
            engine.check_adapter_answers()
    else:
        engine.check_adapter_answers()
    assert not caplog.text


@pytest.mark.parametrize("apart", [0.0, 1e-4])
def test_the_engine_says_where_an_adapter_moves_too_little_to_be_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, apart: float
):
    merged_engine(monkeypatch, apart=apart, moved=1e-4).check_adapter_answers()
    assert "outputs/tuned/adapter moves log-probabilities by 1.0e-04 at most: too small to check" in caplog.text


def merged_engine(monkeypatch: pytest.MonkeyPatch, *, apart: float, moved: float) -> ScoringEngine:
    """Without loading a model."""
    engine = ScoringEngine.__new__(ScoringEngine)
    engine.settings = SimpleNamespace(shared_ids=(1, 2), tails=((3,),), adapter="outputs/tuned/adapter")
    engine.llm, engine.lora, engine.rating_ids = StandInModel(0.0), None, list(range(10))
    monkeypatch.setattr(ScoringEngine, "sampling", lambda self, **parameters: parameters)
    tuned_R = -1.0 - np.arange(10) / 10 + apart
    engine.merged = SimpleNamespace(tuned_R=tuned_R, bare_R=tuned_R - moved)
    return engine
