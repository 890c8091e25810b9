"""A tiny random Llama with SmolLM2's tokenizer, and users with the same taste or with two opposite tastes."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from toy_data import TWO
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from raygr.finetune.config import FinetuneConfig
from raygr.finetune.examples import TuningData, TuningExample
from raygr.finetune.sampling import AnswerTemplate, answer_ids, answer_template
from raygr.score.answer_format import RatingTokens
from raygr.score.aspects import Aspect, AspectSet
from raygr.score.default_model import model_folder

NAMES = ("tension level", "humor")
# pieces (50, 51) and (60,); digits 1..9 are tokens 1..9, "0" is token 10, the end of turn 99
SPLIT = AnswerTemplate(((50, 51), (60,)), (99,), RatingTokens(tuple(range(1, 10)), (1, 10)))
JOINED = SPLIT._replace(ratings=RatingTokens(SPLIT.ratings.digits, (11,)))
PROMPTS = [(5, 6, 7, 8, 9), (5, 6, 7, 20, 21, 22, 23), (5, 6, 7, 30)]
SMALL_VOCABULARY = 128  # enough for SPLIT, and fast


def aspect_set(names: tuple[str, ...] = NAMES) -> AspectSet:
    return replace(TWO, aspects=tuple(Aspect(name=name, description=f"how much {name}") for name in names))


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder("smollm2"))


@cache
def template() -> AnswerTemplate:
    return answer_template(tokenizer(), aspect_set())


def tiny_llama(seed: int = 0, *, vocabulary: int = 49_152) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=None,  # Llama's default, 2, would end free completions
    )
    return LlamaForCausalLM(config).eval()


def tiny_policy(seed: int = 0) -> PeftModel:
    """A tiny Llama with an adapter that changes its outputs; PEFT's fresh adapter changes nothing."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(seed), lora).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def save_tiny_llama(folder: Path, *, vocabulary: int = 49_152) -> str:
    tiny_llama(vocabulary=vocabulary).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def terse_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token for each piece of the answer and for each digit, and unused ones up to 128."""
    words = ["<end>", *(f"{start}{name}: " for start, name in zip(("", "\n"), NAMES, strict=True)), *"0123456789"]
    words += [f"<{n}>" for n in range(len(words), SMALL_VOCABULARY)]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[-1]))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]|[^0-9]+"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=words[0])


def save_terse_llama(folder: Path) -> str:
    """Saves a model that learns to write a whole answer as text within a few steps."""
    model = tiny_llama(vocabulary=SMALL_VOCABULARY)
    # without it, a model this narrow with tied embeddings cannot give one token a high probability
    torch.nn.init.constant_(model.model.norm.weight, 3.0)
    model.save_pretrained(folder)
    terse_tokenizer().save_pretrained(folder)
    return str(folder)


def toy_examples(
    users: int, *, items: int = 40, seed: int = 0, kinds: int = 1
) -> tuple[np.ndarray, list[TuningExample]]:
    """Item scores, and users who like items with a high first and a low second aspect.

    With two kinds, every other user likes the opposite; one token of the prompt, 40 or 41, tells the kind.
    """
    generator = np.random.default_rng(seed)
    items_IA = generator.uniform(1, 10, (items, len(NAMES)))
    liking_I = items_IA @ np.array([1.0, -1.0])
    examples = []
    for user in range(users):
        kind = user % kinds
        order_I = np.argsort(liking_I if kind == 0 else -liking_I)
        others = generator.choice(order_I[: items // 2], 10, replace=False)
        target = generator.choice(order_I[-items // 4 :])
        judged = np.array([*generator.choice(order_I[: items // 2], 2), target])
        examples.append(
            TuningExample(
                user_index=user,
                user_id=f"u{user}",
                prompt_ids=(20, 21, 22, 23, *[70 + user] * (1 + user % 3), *[40 + kind] * (kinds > 1), 24, 25),
                candidate_C=np.array([target, *others]),
                judged_N=judged,
                liked_N=np.array([False, False, True]),
                teacher_A=np.array([7.5, 2.0]),
            )
        )
    return items_IA, examples


def toy_inputs(
    folder: str, answer: AnswerTemplate = SPLIT, *, users: int = 8, held_out: int = 4, kinds: int = 1
) -> TuningData:
    items_IA, examples = toy_examples(users + held_out, kinds=kinds)
    return TuningData(items_IA, examples[:users], examples[users:], NAMES, folder, answer, {})


def toy_config(**changes: object) -> FinetuneConfig:
    """Settings of a small run; an SFT warm-up has a teacher and a learning rate from which a tiny model learns."""
    if changes.get("warm_start_epochs"):
        changes = {"teacher": "profile", "warm_start_learning_rate": 1e-2} | changes
    config = FinetuneConfig(output="", data="", item_scores="", aspects="", lora_rank=4, candidate_items=10, epochs=1)
    taught = {"teacher": "profile"} if changes.get("warm_start_epochs") else {}
    return replace(config, **taught | changes)


def naive_rating_log_probs(model, prompt: tuple[int, ...], answer: AnswerTemplate, before: tuple[int, ...]):
    """log P(1..10) of the next rating, computed by whole forward passes."""
    piece = answer.pieces[len(before)]
    start = [*prompt, *answer_ids(AnswerTemplate(answer.pieces[: len(before)], (), answer.ratings), before), *piece]
    with torch.no_grad():
        at_slot = model(torch.tensor([start])).logits[0, -1].double().log_softmax(-1)
        behind = model(torch.tensor([[*start, answer.ratings.ten[0]]])).logits[0, -1].double().log_softmax(-1)
    digits = at_slot[list(answer.ratings.digits)].numpy()
    if answer.ratings.ten_is_split:
        zero = behind[answer.ratings.ten[1]].exp().item()
        return np.log([digits_1(digits) * (1 - zero), *np.exp(digits[1:]), digits_1(digits) * zero])
    return np.append(digits, at_slot[answer.ratings.ten[0]].item())


def digits_1(digits: np.ndarray) -> float:
    return float(np.exp(digits[0]))
