"""JSON lines to records: whole blocks at full speed, single lines where a block holds anything unusual.

The number of a row is the number of its line. The functions at the end turn values of unexpected types into texts, ids
and numbers.
"""

import ast
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from raygr.data.ids import EXACT_FLOATS
from raygr.prepare.bad_rows import Refusal, cut_snippet
from raygr.prepare.raw_files import Lines

Record = TypeVar("Record", bound=msgspec.Struct | dict[str, Any])
BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
OBJECT = msgspec.json.Decoder(dict[str, Any])
PYTHON_DICT = re.compile(r"\s*\{\s*(?:u?'|u\")")
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")


class Decoded(NamedTuple, Generic[Record]):
    """Records of lines, these lines and their indexes, and the lines that hold no record; blank lines are neither."""

    at: Sequence[int]
    raw: list[bytes]
    records: list[Record]
    refused: list[Refusal]


def decode_block(
    block: Lines, decoder: msgspec.json.Decoder[Record], decode_one: Callable[[bytes], Record | str | None]
) -> Decoded[Record]:
    """The records of a block: all at once, or from `decode_one` (as `decode_line`) where `decoder` refuses any line."""
    lines = block.split()
    try:
        if not block.block.isascii():
            str(block.block, "utf-8")  # msgspec does not check the UTF-8 of fields that it skips
        return Decoded(range(len(lines)), lines, list(map(decoder.decode, lines)), [])
    except BAD_JSON:
        entries = list(map(decode_one, lines))
    refused = [
        Refusal(block.first + at, entry, cut_snippet(lines[at]))
        for at, entry in enumerate(entries)
        if isinstance(entry, str)
    ]
    known = {at: entry for at, entry in enumerate(entries) if entry is not None and not isinstance(entry, str)}
    return Decoded(list(known), [lines[at] for at in known], list(known.values()), refused)


def decode_line(
    line: bytes, decoder: msgspec.json.Decoder[Record], repair: Callable[[Mapping[str, Any]], Record]
) -> Record | str | None:
    """The record of a line, `repair`ed where a field has another type; else the reason, or None for a blank line."""
    try:
        text = str(line, "utf-8")
        return decoder.decode(line)
    except UnicodeDecodeError:
        return "invalid_utf8"
    except (msgspec.DecodeError, RecursionError):
        pass
    if not text.strip():
        return None
    values = decode_loosely(text)
    return repair(values) if isinstance(values, dict) else "malformed_json"


def decode_object(line: bytes) -> dict[str, Any] | str | None:
    """The JSON object of a line; else the reason why there is none, or None for a blank line."""
    return decode_line(line, OBJECT, dict)


def decode_loosely(text: str) -> object:
    """JSON with lone surrogates or NaN, or a Python literal (metadata of 2014, u'...' of Python 2), else None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not PYTHON_DICT.match(text):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def as_text(value: object) -> str:
    """The text of any value, with HTML removed and whitespace collapsed; null is "".

    Lists of any depth are joined by spaces, mappings become "key: value" pairs.
    """
    return " ".join(words(value))


def without_surrogates(text: str) -> str:
    """The text with "?" for lone surrogates (an emoji cut in two), which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def without_html(text: str) -> str:
    """The text with spaces for tags and characters for entities: `<b>A&amp;B</b>` becomes ` A&B `."""
    return html.unescape(TAG.sub(" ", text)) if "<" in text or "&" in text else text


def words(value: object) -> Iterable[str]:
    if isinstance(value, str):
        yield from without_html(without_surrogates(value)).split()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            text = as_text(inner)
            if text:
                yield f"{as_text(key).rstrip(': ')}: {text}"
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from words(inner)
    elif value is not None:
        yield str(value)


def as_id(value: object) -> str | None:
    """A string or a whole number (7.0 is 7) as an id; None for any other value."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT_FLOATS:
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def as_number(value: object) -> float | None:
    """A number, or a string that holds one, as a finite float; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
