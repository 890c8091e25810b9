"""A model's chat template around the prompts: its fixed parts, and token ids of template and of plain text.

Item and review text is data: a control token of the chat template inside it is encoded as plain text.
"""

import logging
import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SYSTEM_MARK, USER_MARK = "raygr-system-text", "raygr-user-text"


class PromptError(ValueError):
    """A tokenizer, template or token budget that no prompt can be made with."""


def chat_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The chat template's text before the system prompt, between it and the user prompt, and behind both."""
    if tokenizer.chat_template is None:
        logger.warning("%s has no chat template: prompts are plain 'System:' and 'User:'", tokenizer.name_or_path)
        # tokenizers without a template may still start every text with a control token
        first = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer.encode("x")[:1] else ""
        return f"{first}System: ", "\nUser: ", "\n"
    try:
        text = render_chat(tokenizer, [("system", SYSTEM_MARK), ("user", USER_MARK)])
    except TemplateError:  # such as Gemma's, which knows no system role
        text = render_chat(tokenizer, [("user", f"{SYSTEM_MARK}\n\n{USER_MARK}")])
    match = re.fullmatch(f"(.*){SYSTEM_MARK}(.*){USER_MARK}(.*)", text, re.DOTALL)
    if match is None or text.count(SYSTEM_MARK) != 1 or text.count(USER_MARK) != 1:
        raise PromptError(f"the chat template of {tokenizer.name_or_path} does not keep system and user text: {text!r}")
    return match[1], match[2], match[3]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]]) -> str:
    # Llama 3 prints today's date and Qwen 3 thinks unless told otherwise: the hash of a prompt must be the
    # same tomorrow, and the answer must start at once. Other templates ignore the two names.
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
        date_string="26 Jul 2024",
    )


def encode_control(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a part of the chat template, control tokens included."""
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, in which no added token of the tokenizer takes part."""
    pieces = [cut_at_added_tokens(tokenizer, text) for text in texts]
    every = [piece for group in pieces for piece in group]
    if not every:
        return []
    encoded = iter(tokenizer(every, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return [[token for _ in group for token in next(encoded)] for group in pieces]


def cut_at_added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """`text` in pieces that hold no added token; `split_special_tokens` knows only those marked special.

    Qwen's `<tool_call>`, for one, is not marked.
    """
    unmarked = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    contents = [re.escape(content) for content in unmarked if len(content.strip()) > 1]
    if not contents:
        return [text]
    cuts = [match.start() + 1 for match in re.finditer(f"(?={'|'.join(contents)})", text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
