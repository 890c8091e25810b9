"""Items that are taught: what probe mode reads is computed exactly, a rule is learned, and inputs are checked."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import JOINED, NAMES, PROMPTS, SMALL_VOCABULARY, SPLIT, save_tiny_llama, tiny_policy
from toy_data import cycles, write_csv, write_prepared, write_score_run

from raygr.config import ConfigError, check_config
from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningData, TuningExample
from raygr.finetune.loop import Tuning, checkpoint_state, restore, start_tuning
from raygr.finetune.losses import probe_loss
from raygr.finetune.policy import Policy, adapter_state, adapter_weights, probed_log_probs
from raygr.finetune.sampling import AnswerTemplate
from raygr.finetune.teaching import load_taught_items, teach
from raygr.models.workers import Share
from raygr.score.engine import rating_probabilities

CPU = torch.device("cpu")
NONE = np.empty(0, np.int64)
SETTINGS = {"output": "", "data": "", "item_scores": "", "aspects": "", "subjects": "items"}


def example_of(n: int, prompt: tuple[int, ...], scores: list[float]) -> TuningExample:
    return TuningExample(n, f"i{n}", prompt, NONE, NONE, NONE > 0, np.array(scores))


def policy_of(template: AnswerTemplate, **changes: Any) -> Policy:
    config = FinetuneConfig(**SETTINGS, **changes)
    model = tiny_policy()
    if config.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return Policy(config, model, None, template, NAMES, CPU, torch.float32, {}, {})


def engine_reading(model: torch.nn.Module, prompt: tuple[int, ...], template: AnswerTemplate) -> np.ndarray:
    """P(1..10) as ScoringEngine.probe reads it: one request per aspect, and a forced `1` where `10` is two tokens."""
    ratings = template.ratings

    def log_probs(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits_V = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
        return logits_V[[*ratings.digits, ratings.ten[-1]]].numpy()

    rows, zeros = [], []
    for tail in template.pieces:
        rows.append(log_probs([*prompt, *tail]))
        zeros.append(log_probs([*prompt, *tail, ratings.digits[0]])[9])
    return rating_probabilities(np.array(rows), np.array(zeros) if ratings.ten_is_split else None)


@pytest.mark.parametrize("template", [SPLIT, JOINED], ids=["ten is two tokens", "one token"])
def test_the_taught_ratings_are_those_that_probe_mode_reads(template: AnswerTemplate):
    policy = policy_of(template)
    examples = [example_of(n, prompt, [1.0, 1.0]) for n, prompt in enumerate(PROMPTS)]
    read_BAQ = probed_log_probs(policy, examples).exp().detach().numpy()
    expected_BAQ = np.stack([engine_reading(policy.model, prompt, template) for prompt in PROMPTS])
    np.testing.assert_allclose(read_BAQ, expected_BAQ, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_cross_entropy_of_the_two_levels_around_the_teachers_score():
    log_probs_BAQ = torch.randn(1, 2, 10, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    loss_B = probe_loss(log_probs_BAQ, torch.tensor([[7.25, 10.0]]))
    seven_eight = 0.75 * log_probs_BAQ[0, 0, 6] + 0.25 * log_probs_BAQ[0, 0, 7]
    torch.testing.assert_close(loss_B, -(seven_eight + log_probs_BAQ[0, 1, 9])[None] / 2)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for is_on in (False, True):
        policy = policy_of(SPLIT, gradient_checkpointing=is_on)
        examples = [example_of(n, prompt, [3.5, 10.0]) for n, prompt in enumerate(PROMPTS)]
        teacher_BA = torch.tensor(np.array([one.teacher_A for one in examples]))
        probe_loss(probed_log_probs(policy, examples), teacher_BA).sum().backward()
        gradients.append({name: weight.grad for name, weight in adapter_weights(policy.model).items()})
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6)


# --- the loop ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), vocabulary=SMALL_VOCABULARY)


def toy_items(folder: str, *, train: int = 32, held_out: int = 12) -> TuningData:
    """Items whose texts say their scores: token 80 + n is n on the first aspect, 100 + n is 11 - n on the second."""
    generator = np.random.default_rng(0)
    examples = []
    for n in range(train + held_out):
        first, second = generator.integers(1, 11, 2).tolist()
        prompt = (20, 21, 22, 23, *[70] * (n % 2), 80 + first, 100 + second, 24, 25)
        examples.append(example_of(n, prompt, [first, 11.0 - second]))
    scores_IA = np.array([one.teacher_A for one in examples])
    return TuningData(scores_IA, examples[:train], examples[train:], NAMES, folder, SPLIT, {})


def tuning_of(folder: str, *, share: Share | None = None, **changes: Any) -> Tuning:
    settings = {"lora_rank": 4, "learning_rate": 3e-2, "epochs": 2, "batch_size": 8}
    config = FinetuneConfig(**SETTINGS, **(settings | changes))
    return start_tuning(config, toy_items(folder), CPU, share or Share())


def run(tuning: Tuning) -> Tuning:
    for _ in teach(tuning):
        pass
    return tuning


def test_a_rule_from_texts_to_scores_is_learned(folder):
    evaluations = run(tuning_of(folder, epochs=40)).progress.evaluations
    first, last = evaluations[0], max(evaluations, key=lambda one: one["metrics"]["spearman"])
    assert first["metrics"]["spearman"] < 0.5
    assert last["metrics"]["spearman"] > 0.8


def test_an_interrupted_run_equals_the_straight_one(folder):
    straight, states = tuning_of(folder, lora_dropout=0.1), []
    for is_checkpoint in teach(straight):
        if is_checkpoint:
            states.append(copy.deepcopy(checkpoint_state(straight)))
    assert len(states) == 1 + 2  # before, and two epochs
    for state in states[:-1]:
        resumed = tuning_of(folder, lora_dropout=0.1)
        restore(resumed, state)
        run(resumed)
        assert resumed.progress.evaluations == straight.progress.evaluations
        for name, weight in adapter_state(resumed.model).items():
            assert torch.equal(weight, adapter_state(straight.model)[name])


def test_the_best_evaluation_chooses_the_adapter(folder):
    progress = run(tuning_of(folder, epochs=6)).progress
    values = [one["metrics"]["spearman"] for one in progress.evaluations]
    assert progress.best_value == max(values)
    assert progress.evaluations[values.index(max(values))]["step"] == progress.best_step


# --- inputs --------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_prepared(tmp_path / "prepare", cycles(3, 30, 6), items=30)
    (tmp_path / "aspects.yaml").write_text(
        "{category: movies, subject: movie, a_subject: a movie, a_critic: a critic, a_recommender: a recommender, "
        "reviews: movie reviews, aspects: [{name: pace, description: Slow.}, {name: humor, description: Dry.}]}"
    )
    return tmp_path


def settings(toy: Path, scores: str) -> FinetuneConfig:
    places = {"output": str(toy / "tuned"), "data": str(toy / "prepare"), "aspects": str(toy / "aspects.yaml")}
    return FinetuneConfig(**places, subjects="items", item_scores=scores)


def test_only_items_with_all_scores_are_taught_and_the_others_are_counted(toy: Path):
    scores: dict[str, list[float | None]] = {f"i{n}": [n / 3, 7.5] for n in range(3, 23)}
    scores |= {"i24": [None, 3.0], "elsewhere": [5.0, 5.0]}
    data = load_taught_items(settings(toy, write_score_run(toy / "scores", scores, aspects=["pace", "humor"])))
    assert data.counts == {
        **{"items": 30, "train": 16, "held_out": 4, "without_scores": 9, "without_all_scores": 1},
        **{"scored_but_not_in_the_data": 1, "prompts_cut": 0},
    }
    taught = data.train + data.held_out
    assert {one.user_id for one in taught} == {f"i{n}" for n in range(3, 23)}
    for one in taught:
        assert one.teacher_A.tolist() == pytest.approx([one.user_index / 3, 7.5])
        assert one.user_id == f"i{one.user_index}"
    again = load_taught_items(settings(toy, str(toy / "scores")))
    assert [one.user_id for one in again.held_out] == [one.user_id for one in data.held_out]


def test_scores_outside_the_scale_and_too_few_items_are_refused(toy: Path):
    names = ["pace", "humor"]
    far = write_csv(toy / "far.csv", {f"i{n}": [float(n), 5.0] for n in range(1, 20)}, names)
    with pytest.raises(ConfigError, match=r"far.csv: ratings outside 1..10 of i11"):
        load_taught_items(settings(toy, str(far)))
    few = write_csv(toy / "few.csv", {f"i{n}": [float(n), 5.0] for n in range(1, 10)}, names)
    with pytest.raises(ConfigError, match=r"all scores of 9 items .* 2 of them are held out, and at least 3"):
        load_taught_items(settings(toy, str(few)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "profile", "completions": 8}, "completions, teacher: no effect on subjects: items"),
        ({"warm_start_epochs": 2, "teacher": "profile"}, "warm_start_epochs: no effect on subjects: items"),
        ({"rollouts": "slots"}, "rollouts: slots is not for subjects: items, which need probe"),
        ({"subjects": "users", "rollouts": "probe"}, "rollouts: probe is not for subjects: users, which need slots"),
        ({"keep_best_by": "auc"}, "keep_best_by: auc is not measured with subjects: items"),
        ({"subjects": "users", "keep_best_by": "spearman"}, "keep_best_by: spearman is not measured"),
        ({"epochs": 0}, "epochs: 0 passes over the items teach nothing"),
    ],
)
def test_settings_that_do_not_fit_items_are_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_config(FinetuneConfig, SETTINGS | changes, source="toy")


def test_defaults_are_those_of_what_is_tuned():
    items, users = FinetuneConfig(**SETTINGS), FinetuneConfig(**(SETTINGS | {"subjects": "users"}))
    assert (items.rollouts, items.learning_rate) == ("probe", 1e-3)
    assert (users.rollouts, users.learning_rate) == ("slots", 1e-5)
    assert replace(users, epochs=3).rollouts == "slots"
