"""The model's chat template around prompts: its fixed parts, and token ids of template and plain text.

Item and review text is data: control tokens of the chat template inside it are encoded as plain text.
"""

import logging
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SYSTEM_MARK, USER_MARK, ANSWER_MARK = "raygr-system-text", "raygr-user-text", "raygr-answer-text"
# Tags around a model's reasoning, in several families.
REASONING = re.compile(
    r"[<\[\u25c1](?P<end>/?)(?:think(?:ing)?|thought|reasoning|seed:think)[>\]\u25b7]", re.IGNORECASE
)
TODAY = datetime(2024, 7, 26)  # for templates that print the date: a prompt's hash must be the same tomorrow


class PromptError(ValueError):
    """The tokenizer, chat template or token budget does not allow a prompt."""


class ChatParts(NamedTuple):
    """The chat template's text around system message, user message and answer."""

    opening: str
    between: str
    closing: str  # behind the user message, up to the start of the answer
    space: str  # white space that the template puts before an answer, as Mistral's does
    ending: str  # behind the answer


@lru_cache(maxsize=4)
def chat_parts(tokenizer: PreTrainedTokenizerBase) -> ChatParts:
    """The parts of the tokenizer's template; PromptError where it changes or repeats the messages."""
    if tokenizer.chat_template is None:
        logger.warning("%s has no chat template: prompts are plain 'System:' and 'User:' text", tokenizer.name_or_path)
        # tokenizers without a template may still start every text with a control token
        first = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer.encode("x")[:1] else ""
        return ChatParts(f"{first}System: ", "\nUser: ", "\n", "", "")
    messages = [("system", SYSTEM_MARK), ("user", USER_MARK)]
    try:
        text = render_chat(tokenizer, messages)
    except TemplateError:  # some templates, such as Gemma's, have no system role
        messages = [("user", f"{SYSTEM_MARK}\n\n{USER_MARK}")]
        text = render_chat(tokenizer, messages)
    match = re.fullmatch(f"(.*){SYSTEM_MARK}(.*){USER_MARK}(.*)", text, re.DOTALL)
    if match is None or text.count(SYSTEM_MARK) != 1 or text.count(USER_MARK) != 1:
        raise PromptError(f"the chat template of {tokenizer.name_or_path} does not keep system and user text: {text!r}")
    answered = render_chat(tokenizer, [*messages, ("assistant", ANSWER_MARK)], answered=True)
    lead, _, ending = answered.partition(USER_MARK)[2].partition(ANSWER_MARK)
    closing, space = answer_start(tokenizer.name_or_path, match[3], lead)
    return ChatParts(match[1], match[2], closing, space, ending)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], *, answered: bool = False) -> str:
    """Render (role, content) messages, with a fixed date and without reasoning."""
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=not answered,
        enable_thinking=False,  # Qwen 3 reasons by default; other templates ignore the name
        strftime_now=TODAY.strftime,
    )
    return str(text)


def answer_start(model: str, closing: str, lead: str) -> tuple[str, str]:
    """The template's text between user message and answer, and the white space before the answer.

    `closing` is the template's text where the model is asked; `lead` is its text before an answer that is part of the
    conversation. A model that always reasons is asked before or inside its block of reasoning: the block is completed
    here, so that the answer starts behind it.
    """
    added = lead[len(closing) :] if lead.startswith(closing) else ""
    start = closing + added if added.strip() else closing
    tags = list(REASONING.finditer(start))
    if tags and not tags[-1]["end"]:
        tag = tags[-1][0]
        start = f"{start.rstrip()}\n\n{tag[0]}/{tag[1:]}\n\n"
    if start == closing:
        return closing, added
    logger.info("%s is asked to answer without reasoning: its prompts end with %r", model, start)
    return start, ""


def encode_control(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a part of the chat template, with its control tokens."""
    return encode_behind(tokenizer, [text], plain=False)[0]


def encode_opening(tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, str]]) -> list[int]:
    """Encode the start of a prompt, given as pairs of template text and the plain text behind it.

    The ids equal those of the whole text unless the plain text contains an added token.
    """
    pieces = [""]
    for control, text in parts:
        first, *others = cut_at_added_tokens(tokenizer, text)
        pieces[-1] += control + first
        pieces += others
    start = tokenizer.encode(pieces[0], add_special_tokens=False)
    return [*start, *(token for ids in encode_behind(tokenizer, pieces[1:], plain=False) for token in ids)]


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode each text as it stands behind other text, without any of the tokenizer's added tokens."""
    pieces = [cut_at_added_tokens(tokenizer, text) for text in texts]
    encoded = iter(encode_behind(tokenizer, [piece for group in pieces for piece in group], plain=True))
    return [[token for _ in group for token in next(encoded)] for group in pieces]


def encode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """Encode each answer as it stands in the chat template.

    For tokenizers that start a text with a space, the template decides whether the answer has one: it has behind
    Mistral's "[/INST]", but not behind Zephyr's line break.
    """
    parts = chat_parts(tokenizer)
    before = encode_control(tokenizer, parts.closing)
    whole = encode_behind(tokenizer, [parts.closing + parts.space + answer for answer in answers], plain=False)
    if not guard_from_space(tokenizer)[0] or any(ids[: len(before)] != before for ids in whole):
        return encode_plain(tokenizer, answers)
    return [ids[len(before) :] for ids in whole]


def encode_behind(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, plain: bool) -> list[list[int]]:
    """Encode each text as it stands behind other text; `plain` splits special tokens into ordinary ones.

    Some tokenizers put a space before every text that they are given, though only the first text should have one.
    """
    if not texts:
        return []
    guard, guard_ids = guard_from_space(tokenizer)
    encoded = tokenizer([guard + text for text in texts], add_special_tokens=False, split_special_tokens=plain)
    return [ids[len(guard_ids) :] for ids in encoded["input_ids"]]


@lru_cache(maxsize=4)
def guard_from_space(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """Text that keeps the tokenizer's added space away when put before another, and its ids; "" if none is added."""
    guard, letter, both, longer = tokenizer(["\n", "x", "\nx", "\n\nx"], add_special_tokens=False)["input_ids"]
    adds_space = tokenizer.convert_ids_to_tokens(letter)[0].startswith("\u2581") and both != [*guard, *letter]
    stays_apart = both[: len(guard)] == longer[: len(guard)] == guard
    return ("\n", guard) if adds_space and stays_apart else ("", [])


class AddedTokens(NamedTuple):
    contents: frozenset[str]
    lengths: tuple[int, ...]  # of the contents, in characters
    first: re.Pattern[str]  # a character that one of them starts with


@lru_cache(maxsize=4)
def added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens | None:
    """The tokenizer's added tokens besides white space and single characters; cached, since Gemma 3 has 6,400."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values() if len(token.content.strip()) > 1}
    if not contents:
        return None
    first = re.compile(f"[{re.escape(''.join(sorted({content[0] for content in contents})))}]")
    return AddedTokens(frozenset(contents), tuple(sorted({len(content) for content in contents})), first)


def cut_at_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Cut `text` into pieces without an added token.

    `split_special_tokens` splits only tokens marked special, which Qwen's `<tool_call>`, for example, is not.
    """
    added = added_tokens(tokenizer)
    if added is None:
        return [text]
    starts = [match.start() for match in added.first.finditer(text)]
    cuts = [at + 1 for at in starts if any(text[at : at + length] in added.contents for length in added.lengths)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
