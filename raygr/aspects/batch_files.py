"""Prompts as a batch of chat requests for another LLM, and its answers back into the score store.

Both are the JSON lines that batch services share: a request per line, `custom_id` the prompt's hash, so that an
answer finds its prompt whatever the order, and one to another prompt is told apart. Answers are read by the rules
of parsing.py. A service gives no probabilities, so the expected rating is the rating itself.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from raygr.aspects.parsing import parse_ratings
from raygr.aspects.prompts import system_text, user_lead_in
from raygr.aspects.store import ScoreStore, StoredScore
from raygr.aspects.subjects import PromptSettings, encoder_of
from raygr.balance import log_rows

FILED, KNOWN = "filed", "known_before"
NOT_JSON, NO_ID, UNKNOWN_PROMPT, REPEATED, FAILED = "not_json", "no_custom_id", "unknown_prompt", "repeated", "failed"
# Characters that some readers end a line at, though JSON allows them inside a string.
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
ANSWERS_AT_ONCE = 4096  # answers of one file of the store


class Request(NamedTuple):
    """What every request of a batch says besides its messages."""

    model: str
    max_tokens: int
    temperature: float


class Answer(NamedTuple):
    prompt_sha256: str
    text: str


def write_requests(prompts: pa.Table, path: str, *, settings: PromptSettings, request: Request) -> None:
    """One line per distinct prompt of the PROMPT rows."""
    written = set()
    with fsspec.open(path, "wt", encoding="utf-8", compression="infer") as file:
        for row in prompts.select(["prompt_ids", "shared_tokens", "prompt_sha256"]).to_pylist():
            if row["prompt_sha256"] not in written:
                written.add(row["prompt_sha256"])
                line = json.dumps(request_line(row, settings, request), ensure_ascii=False)
                file.write(line.translate(LINE_ENDS) + "\n")


def request_line(row: dict[str, Any], settings: PromptSettings, request: Request) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": system_text(settings.aspects, settings.subjects)},
        {"role": "user", "content": user_message(row, settings)},
    ]
    return {
        "custom_id": row["prompt_sha256"],
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, **request._asdict()},
    }


def user_message(row: dict[str, Any], settings: PromptSettings) -> str:
    """The user's side of the prompt, cut as the token budget cut it, without the chat template."""
    encoder = encoder_of(settings)
    subject_ids = row["prompt_ids"][row["shared_tokens"] : len(row["prompt_ids"]) - len(encoder.closing)]
    text = encoder.tokenizer.decode(subject_ids, clean_up_tokenization_spaces=False)
    return user_lead_in(settings.aspects, settings.subjects) + text


def import_answers(path: str, store: ScoreStore, *, asked: set[str], names: tuple[str, ...]) -> dict[str, int]:
    """Files the answers to the prompts in `asked`; the count of lines by what became of them.

    ValueError where no line answers one of them.
    """
    counts: Counter[str] = Counter()
    batch: dict[str, StoredScore] = {}
    for answer in read_answers(path, asked, store.hashes(), counts):
        batch[answer.prompt_sha256] = stored(answer.text, names)
        if len(batch) == ANSWERS_AT_ONCE:
            store.write(list(batch), list(batch.values()))
            batch = {}
    if batch:
        store.write(list(batch), list(batch.values()))
    others = {reason: count for reason, count in counts.items() if reason != FILED}
    log_rows(f"answers of {path}", read=counts.total(), kept=counts[FILED], dropped=others)
    if not counts[FILED] and not counts[KNOWN]:
        raise ValueError(f"{path}: no line answers a prompt of this run ({json.dumps(counts)})")
    return dict(counts)


def read_answers(path: str, asked: set[str], known: set[str], counts: Counter[str]) -> Iterator[Answer]:
    """The first usable answer to each prompt that is not known yet; every other line is counted by its reason."""
    seen = set()
    with fsspec.open(path, "rt", encoding="utf-8", errors="replace", compression="infer") as file:
        for line in file:
            if not line.strip():
                continue
            answer = read_answer(line)
            if isinstance(answer, str):
                counts[answer] += 1
                continue
            reason = reason_of_answer(answer.prompt_sha256, asked=asked, known=known, seen=seen)
            counts[reason] += 1
            if reason == FILED:
                seen.add(answer.prompt_sha256)
                yield answer


def reason_of_answer(digest: str, *, asked: set[str], known: set[str], seen: set[str]) -> str:
    if digest not in asked:
        return UNKNOWN_PROMPT
    if digest in seen:
        return REPEATED
    return KNOWN if digest in known else FILED


def read_answer(line: str) -> Answer | str:
    """The answer of one line, or why it is none. A refusal has no content: an answer without ratings."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return NOT_JSON
    match record:
        case {"custom_id": str(digest), "response": {"body": {"choices": [{"message": {"content": content}}, *_]}}}:
            if record.get("error") or record["response"].get("status_code", 200) != 200:
                return FAILED
            return Answer(digest, content) if isinstance(content, str) else Answer(digest, "")
        case {"custom_id": str()}:
            return FAILED
        case dict():
            return NO_ID
    return NOT_JSON


def stored(text: str, names: tuple[str, ...]) -> StoredScore:
    parsed = parse_ratings(text, names)
    expected = tuple(None if rating is None else float(rating) for rating in parsed.ratings)
    return StoredScore(ratings=parsed.ratings, expected=expected, reason=parsed.reason, completion=text)
