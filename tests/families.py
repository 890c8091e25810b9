"""Tiny tokenizers and random models that imitate the model families that raygr is used with.

Each tokenizer splits text, digits and spaces as its family's does, and has the family's control tokens and its chat
template without tools. Vocabularies are trained on a few lines. Attention windows are smaller than any prompt.
"""

import json
from dataclasses import dataclass, field
from functools import cache

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

WORDS = """You are a movie critic. You should rate the movie on a scale of 1 to 10 on the following dimensions:
tension level: how much humor: the tension is 3 4 5 6 7 8 9 10
Your response should be in the following format, where <rating> is a number between 1 and 10: x
Here is some information about a movie: title: categories: rating: description: details: Sure, I think so
system user assistant model Today Date Knowledge Cutoff Metadata Instructions Reasoning Mode June December
""".splitlines()
CHATML = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THINKING_TURN = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
)
TEMPLATES = {
    "llama3": (
        "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
        "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Cutting Knowledge Date: December 2023\n' }}"
        "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
        "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "qwen2.5": CHATML,
    "qwen3": THINKING_TURN
    + "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}",
    "qwen3-thinking": THINKING_TURN + "{{- '<think>\n' }}{%- endif %}",
    "deepseek-r1": (
        "{{bos_token}}{%- for message in messages %}{%- if message['role'] == 'system' %}{{ message['content'] }}"
        "{%- elif message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- else %}"
        "{{'<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>'}}{%- endif %}"
        "{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}"
    ),
    "gemma3": (
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set prefix = '' -%}"
        "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must alternate') }}"
        "{%- endif -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}{{ message['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi4": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + "
        "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "smollm2": CHATML,
    "smollm3": (
        "{%- set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}"
        "{%- set today = strftime_now('%d %B %Y') -%}"
        "{{- '<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: ' ~ today ~ '\n' }}"
        "{{- 'Reasoning Mode: ' + mode + '\n\n## Custom Instructions\n\n' + messages[0].content.rstrip() + '\n\n' }}"
        "{{- '<|im_end|>\n' }}{%- set start = '<|im_start|>assistant\n' + "
        "('' if mode == '/think' else '<think>\n\n</think>\n') %}{%- for message in messages[1:] %}"
        "{%- if message.role == 'assistant' %}{{- start + message.content + '<|im_end|>\n' }}{%- else %}"
        "{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- start }}{%- endif %}"
    ),
}
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THREE_DIGITS, ONE_DIGIT = LETTERS + r"\p{N}{1,3}" + REST, LETTERS + r"\p{N}" + REST


@dataclass(frozen=True)
class Family:
    """The parts of a family's tokenizer and model."""

    splits: str
    """The regular expression of a byte-level tokenizer, or the kind of a SentencePiece tokenizer."""
    special: tuple[str, ...]
    """Control tokens; the first is the end-of-text token."""
    end_of_turn: str
    config: type[PreTrainedConfig]
    plain: tuple[str, ...] = ()
    """Added tokens that are not marked as special."""
    bos: str | None = None
    shape: dict = field(default_factory=dict)
    """Further settings of the model's configuration."""


CHATML_TOKENS, WINDOW = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), {"sliding_window": 6}
TWO_KINDS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
THINK = ("<think>", "</think>", "<tool_call>")
HEADERS = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
R1 = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
FAMILIES = {
    "llama3": Family(THREE_DIGITS, HEADERS, "<|eot_id|>", LlamaConfig, bos=HEADERS[1]),
    "qwen2.5": Family(ONE_DIGIT, CHATML_TOKENS, "<|im_end|>", Qwen2Config, THINK[2:]),
    "qwen3": Family(ONE_DIGIT, CHATML_TOKENS, "<|im_end|>", Qwen3Config, THINK, shape={"head_dim": 8}),
    "qwen3-thinking": Family(ONE_DIGIT, CHATML_TOKENS, "<|im_end|>", Qwen3Config, THINK, shape={"head_dim": 8}),
    "deepseek-r1": Family(THREE_DIGITS, R1, R1[0], LlamaConfig, THINK[:2], bos=R1[1]),
    "gemma3": Family(
        "spaces as they are",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        Gemma3TextConfig,
        ("<unused1>", "[multimodal]"),
        bos="<bos>",
        shape=TWO_KINDS | {"head_dim": 8},
    ),
    "mistral": Family("space before a text", ("</s>", "<s>"), "</s>", MistralConfig, bos="<s>", shape=WINDOW),
    "zephyr": Family("space before the first text", ("</s>", "<s>"), "</s>", MistralConfig, bos="<s>", shape=WINDOW),
    "phi3": Family("space before a text", ("<|endoftext|>", *ROLES), "<|end|>", Phi3Config, shape=WINDOW),
    "phi4": Family(THREE_DIGITS, (*CHATML_TOKENS, "<|im_sep|>"), "<|im_end|>", Phi3Config),
    "smollm2": Family("digits alone", CHATML_TOKENS, "<|im_end|>", LlamaConfig),
    "smollm3": Family(THREE_DIGITS, CHATML_TOKENS, "<|im_end|>", SmolLM3Config, THINK[:2]),
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The family's tokenizer, which all tests share and must not change."""
    family = FAMILIES[name]
    is_sentencepiece = family.splits.startswith("space")
    inner = sentencepiece_like(family.splits) if is_sentencepiece else byte_level(family.splits)
    # Phi 3's role tokens strip the line break behind them
    special = [AddedToken(token, normalized=False, special=True, rstrip=token in ROLES) for token in family.special]
    inner.add_special_tokens(special)
    inner.add_tokens([AddedToken(token, normalized=False) for token in family.plain])
    named = {"eos_token": family.special[0], "bos_token": family.bos}
    # as in the published Llama 3: decoding removes the space of "so ."
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=name == "llama3", **named)
    made.chat_template = TEMPLATES[name]
    return made


def byte_level(splits: str) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if splits != "digits alone":
        split = pre_tokenizers.Split(Regex(splits), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # tokens of two digits, as tokenizers with groups of digits have
    numbers = [f"{number}" for number in range(10, 100)] * 20
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(WORDS * 5 + numbers, trainer)
    return inner


def sentencepiece_like(kind: str) -> Tokenizer:
    """BPE over characters with a mark for spaces, single digits, and bytes for unknown characters."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    # marks start words, as in SentencePiece
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁0-9\n]+|[▁0-9]"), "isolated")
    trained.train_from_iterator(WORDS * 5, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "spaces as they are":
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        steps.append(decoders.Strip(" ", 1, 0))
        if kind == "space before a text":  # each text between control tokens
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(steps)
    return inner


def family_model(name: str) -> PreTrainedModel:
    """A random model of two layers with the family's attention."""
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    torch.manual_seed(0)
    config = family.config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **family.shape,
    )
    return AutoModelForCausalLM.from_config(config).eval()
