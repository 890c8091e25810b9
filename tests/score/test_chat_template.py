"""The chat template around prompts, and text encoded without added tokens."""

import logging
import time

import pytest
from families import family_tokenizer
from toy_data import TWO
from transformers import AutoTokenizer

from raygr.score.chat_template import PromptError, encode_plain
from raygr.score.prompts import Item, PromptEncoder, system_text, user_lead_in


def test_added_tokens_that_are_not_marked_special_stay_plain_text(tokenizer):
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["<tool_call>", "<tool_call><x>"])
    added = set(other.convert_tokens_to_ids(["<tool_call>", "<tool_call><x>"]))
    text = "a <tool_call><x> b<tool_call>"
    assert added & set(other.encode(text))
    (ids,) = encode_plain(other, [text])
    assert not added & set(ids)
    assert other.decode(ids) == text


def test_thousands_of_added_tokens_cost_next_to_nothing():
    """Gemma 3 has 6,400 added tokens that are not marked special; a user with 60 reviews has 240 lines."""
    gemma = family_tokenizer.__wrapped__("gemma3")  # a new one, since the shared tokenizer must not change
    gemma.add_tokens([f"<unused{number}>" for number in range(2, 6400)])
    texts = [f"{number} I <b>really</b> liked it, and <unused{number}> too. " * 4 for number in range(240)]
    encode_plain(gemma, texts[:1])
    started = time.perf_counter()
    encoded = encode_plain(gemma, texts)
    assert time.perf_counter() - started < 0.5  # 0.02 on an idle machine; 20 when each token was searched for
    assert gemma.batch_decode(encoded) == texts
    assert not set(gemma.added_tokens_decoder) & {token for ids in encoded for token in ids}


def test_a_model_without_a_chat_template_gets_plain_roles_and_a_notice(tokenizer, caplog):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with caplog.at_level(logging.WARNING):
        prompt = PromptEncoder(bare, TWO, "items", max_prompt_tokens=1024).item_prompt(Item(title="A"))
    assert "no chat template" in caplog.text
    expected = f"System: {system_text(TWO, 'items')}\nUser: {user_lead_in(TWO, 'items')}\ntitle: A\n"
    assert bare.decode(prompt.prefix_ids) == expected


def test_a_template_without_a_system_role_gets_the_system_text_in_the_users_turn(tokenizer):
    gemma_like = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    gemma_like.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    )
    prompt = PromptEncoder(gemma_like, TWO, "items", max_prompt_tokens=1024).item_prompt(Item(title="A"))
    text = f"<|im_start|>{system_text(TWO, 'items')}\n\n{user_lead_in(TWO, 'items')}\ntitle: A<|im_end|><|im_start|>"
    assert gemma_like.decode(prompt.prefix_ids) == text


def test_a_template_that_drops_the_system_text_is_refused(tokenizer):
    deaf = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    deaf.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(PromptError, match="does not keep"):
        PromptEncoder(deaf, TWO, "items", max_prompt_tokens=1024)
