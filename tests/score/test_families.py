"""Prompts, ratings, free text, ends of turns and log-probabilities for each model family."""

import logging
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, family_model, family_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_policy import NAMES, aspect_set, naive_rating_log_probs, toy_config
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, Qwen3NextConfig
from transformers.utils import chat_template_utils

from raygr.config import ConfigError
from raygr.finetune.lora import with_adapter
from raygr.finetune.prefix_cache import TokenRows, completion_logits, packed_logits, prefill
from raygr.finetune.sampling import answer_ids, answer_template, read_completion, sample_free, sample_slots
from raygr.score.answer_format import aspect_tails, parse_ratings, rating_tokens, token_ends
from raygr.score.chat_template import TODAY, chat_parts, render_chat
from raygr.score.engine import ScoringEngine
from raygr.score.prompts import Item, PromptEncoder, item_lines, lines_text, system_text, user_lead_in
from raygr.score.shared_prefix import check_passes, register_attention

ASPECTS = aspect_set()
FILM = Item(title="Sátántangó (1994)", categories="Drama", rating=4.5, rating_count=7)
NAUGHTY = "<|im_end|></s><|eot_id|><end_of_turn><|end|><think></think><|endoftext|><eos>[multimodal]<tool_call>"
ALL, JOINED_TENS = list(FAMILIES), {"llama3", "deepseek-r1", "phi4", "smollm3"}
WINDOWS = [name for name, family in FAMILIES.items() if "sliding_window" in family.shape]
FREE = "Sure – 🎬 naïve ! I think so . **Tension level**: I think\n8/10\n- Tension Level: 7.5 🎬\nHumor: 10 it is"


def whole_text(name: str) -> str:
    """The prompt of FILM as the family's own template renders it, up to the start of the answer."""
    user = f"{user_lead_in(ASPECTS, 'items')}\n{lines_text(item_lines(FILM, 5.0))}"
    messages = [("system", system_text(ASPECTS, "items")), ("user", user)]
    if name in ("mistral", "gemma3"):
        messages = [("user", f"{messages[0][1]}\n\n{user}")]
    text = render_chat(family_tokenizer(name), messages)
    return text + {"qwen3-thinking": "\n</think>\n\n", "deepseek-r1": "\n</think>\n\n"}.get(name, "")


def prompt_ids(name: str, item: Item = FILM) -> tuple[int, ...]:
    encoder = PromptEncoder(family_tokenizer(name), ASPECTS, "items", max_prompt_tokens=4000)
    return encoder.item_prompt(item).prefix_ids


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_is_what_the_familys_template_renders(name):
    tokenizer = family_tokenizer(name)
    expected = tokenizer.encode(whole_text(name), add_special_tokens=False)
    assert tokenizer.decode(prompt_ids(name)) == tokenizer.decode(expected)
    # equal token by token up to the subject's text, which is encoded separately
    shared = PromptEncoder(tokenizer, ASPECTS, "items", max_prompt_tokens=4000).shared
    assert shared[:-1] == expected[: len(shared) - 1]


@pytest.mark.parametrize("name", ALL)
def test_control_tokens_in_a_subjects_text_stay_text(name):
    tokenizer = family_tokenizer(name)
    plain, naughty = (prompt_ids(name, Item(title=f"A {text} B", categories="C")) for text in ("", NAUGHTY))
    added = set(tokenizer.added_tokens_decoder)
    assert [t for t in naughty if t in added] == [t for t in plain if t in added]
    assert f"title: A {NAUGHTY} B\ncategories: C" in tokenizer.decode(naughty)


@pytest.mark.parametrize("name", ALL)
def test_tails_and_ratings_are_those_of_a_whole_answer(name):
    tokenizer = family_tokenizer(name)
    ratings, parts = rating_tokens(tokenizer, ASPECTS), chat_parts(tokenizer)
    assert ratings.ten_is_split == (name not in JOINED_TENS)
    spelled = [*((digit,) for digit in ratings.digits), ratings.ten]
    for tail, aspect in zip(aspect_tails(tokenizer, ASPECTS), NAMES, strict=True):
        for rating, digits in enumerate(spelled, start=1):
            text = f"{whole_text(name)}{parts.space}{aspect}: {rating}{parts.ending}"
            whole = tokenizer.encode(text, add_special_tokens=False)
            end = len(whole) - len(tokenizer.encode(parts.ending, add_special_tokens=False))
            assert tuple(whole[:end][-len(tail + digits) :]) == tail + digits


@pytest.mark.parametrize("name", ALL)
def test_a_turn_ends_where_the_family_ends_it(name):
    tokenizer = family_tokenizer(name)
    answer = answer_template(tokenizer, ASPECTS)
    assert tokenizer.decode(answer.ending) == FAMILIES[name].end_of_turn
    ids = [*answer_ids(answer, [10, 3]), *answer.ending]
    read = read_completion(tokenizer, ids, NAMES, answer.ending)
    assert read.ratings == (10, 3) and all(read.correct_T)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("first_space", ["", " "], ids=["decoded alone", "decoded behind a prompt"])
def test_a_rating_in_free_text_is_found_at_its_token(name, first_space):
    tokenizer = family_tokenizer(name)
    ids = [*tokenizer.encode(first_space + FREE, add_special_tokens=False), *answer_template(tokenizer, ASPECTS).ending]
    text = first_space + FREE
    parsed = parse_ratings(text, NAMES)
    assert parsed.ratings == (8, 10)
    digits = rating_tokens(tokenizer, ASPECTS)
    engine = SimpleNamespace(tokenizer=tokenizer, rating_ids=[*digits.digits, digits.ten[-1]])
    output = SimpleNamespace(token_ids=ids, text=text)
    places = dict(ScoringEngine.rating_positions(engine, output, parsed))
    assert ids[places[1]] == digits.ten[0]
    assert ids[places[0]] == digits.digits[6]  # the 7 of 7.5, which rounds to 8
    read = read_completion(tokenizer, ids, NAMES, (tokenizer.eos_token_id,))
    tokens = [token for token, aspect in zip(ids, read.aspect_T, strict=True) if aspect == 1]
    assert read.ratings == (8, 10) and tuple(tokens) == digits.ten


def test_characters_of_several_tokens_do_not_shift_those_behind():
    for name in ("smollm2", "gemma3"):
        tokenizer = family_tokenizer(name)
        ids = tokenizer.encode("🎬🎬 8", add_special_tokens=False)
        assert len(ids) > 6
        ends = token_ends(tokenizer, ids, "🎬🎬 8")
        assert ends == sorted(ends) and ends[-2:] == [3, 4]


@pytest.mark.parametrize("name", ALL)
def test_a_prompt_is_the_same_every_day(name, monkeypatch):
    tokenizer = family_tokenizer(name)
    openings = set()
    for year in (2025, 2031):
        day = SimpleNamespace(now=lambda year=year: datetime(year, 12, 3))
        monkeypatch.setattr(chat_template_utils, "datetime", day)
        openings.add(chat_parts.__wrapped__(tokenizer).opening)  # without the cache
    (opening,) = openings
    assert (f"{TODAY:%Y}" in opening) == (name in ("llama3", "smollm3"))


@pytest.mark.parametrize("name", ["qwen3-thinking", "deepseek-r1"])
def test_a_model_that_always_thinks_is_asked_behind_its_thoughts_and_this_is_said(name, caplog):
    with caplog.at_level(logging.INFO):
        parts = chat_parts.__wrapped__(family_tokenizer(name))
    assert parts.closing.endswith("<think>\n\n</think>\n\n")
    assert "without reasoning" in caplog.text


def family_policy(name: str) -> PeftModel:
    """The family's model with an adapter that changes its outputs."""
    targets = ["qkv_proj", "o_proj"] if name.startswith("phi") else ["q_proj", "v_proj", "o_proj"]
    base = family_model(name)
    base.set_attn_implementation(register_attention())
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")).eval()
    torch.manual_seed(1)
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def short_prompts() -> list[tuple[int, ...]]:
    """Prompts of different lengths with a common start, longer than the attention windows."""
    ids = torch.randint(20, 400, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    return [tuple(ids[:20]), (*ids[:12], *ids[24:40])]


@pytest.mark.parametrize("name", ALL)
def test_log_probabilities_are_those_of_plain_passes(name):
    model, prompts = family_policy(name), short_prompts()
    ids_BRT = torch.randint(20, 400, (2, 3, 9), generator=torch.Generator().manual_seed(4))
    rows = TokenRows(ids_BRT, torch.ones_like(ids_BRT) > 0)
    with torch.no_grad():
        shared = completion_logits(model, prefill(model, prompts), rows).log_softmax(-1)
        packed = packed_logits(model, prompts, rows).log_softmax(-1)
        model.get_base_model().set_attn_implementation("eager")
        for b, r in np.ndindex(2, 3):
            whole = torch.tensor([[*prompts[b], *ids_BRT[b, r].tolist()]])
            plain = model(whole, use_cache=False).logits[0, len(prompts[b]) - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(shared[b, r], plain, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(packed[b, r], plain, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_slots_are_sampled_from_the_probabilities_of_plain_passes(name):
    model, prompts = family_policy(name), short_prompts()
    answer = answer_template(family_tokenizer(name), ASPECTS)
    uniform_BGA = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        slots = sample_slots(model, prefill(model, prompts), answer, uniform_BGA)
    for b, g, a in np.ndindex(2, 2, 2):
        before = tuple(slots.ratings_BGA[b, g, :a].tolist())
        expected = np.exp(naive_rating_log_probs(model, prompts[b], answer, before))
        np.testing.assert_allclose(slots.probabilities_BGAQ[b, g, a], expected / expected.sum(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_free_completions_end_at_every_end_that_the_model_has(name):
    model, answer = family_policy(name), answer_template(family_tokenizer(name), ASPECTS)
    prefilled = prefill(model, short_prompts())
    ((first, *others),), *_ = sample_free(model, prefilled, answer)
    assert others
    model.get_base_model().generation_config.eos_token_id = [0, first]  # a list, as Llama 3 and Phi have
    assert sample_free(model, prefilled, answer)[0] == [[first]]


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma3"])
def test_a_model_whose_passes_can_share_a_prompt_is_taken(name):
    """The check compares passes under two kinds of attention without the adapter, and restores both afterwards."""
    model, prompt = family_policy(name), short_prompts()[0]
    with torch.no_grad():
        before = model(torch.tensor([prompt]), use_cache=False).logits
        check_passes(model.get_base_model(), prompt, name=name)
        after = model(torch.tensor([prompt]), use_cache=False).logits
    assert model.get_base_model().config._attn_implementation == register_attention()
    torch.testing.assert_close(after, before, atol=0, rtol=0)


TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**TINY, attn_logit_softcapping=0.1, query_pre_attn_scalar=1), "off by"),
        (GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1, initial_context_length=64), "off by"),
        (
            Qwen3NextConfig(**TINY, num_experts=2, layer_types=["linear_attention", "full_attention"]),
            "linear_attention",
        ),
    ],
    ids=["capped", "sinks", "linear"],
)
def test_a_model_with_attention_of_another_kind_is_refused(config, message):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention())
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.ones_(weight)
    with pytest.raises(ConfigError, match=message):
        check_passes(model.eval(), range(20, 40), name="odd")


def test_targets_that_a_model_does_not_have_are_refused():
    with pytest.raises(ConfigError, match=r"no k_proj, q_proj, v_proj, but .*qkv_proj"):
        with_adapter(family_model("phi3"), toy_config())
