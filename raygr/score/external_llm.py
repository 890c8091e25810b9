"""Export prompts as batches of chat requests for another LLM, and import its answers into the score store.

A batch is a file of JSON lines with one request each. The prompt's hash is the request's id, so answers may come in any
order. `request_line` writes and `read_answer` reads the layouts of these services:

openai     platform.openai.com/docs/guides/batch; also vLLM's `run-batch` and most other services.
mistral    docs.mistral.ai/capabilities/batch: the same without method and url, which belong to the job.
anthropic  platform.claude.com/docs/en/build-with-claude/batch-processing: each line is an element of `requests`.
gemini     ai.google.dev/gemini-api/docs/batch-api: GenerateContentRequests under a `key`; the job names the model.

Answers are read by the rules of answer_format.py. A service gives no probabilities, so the expected rating is the
rating itself.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa

from raygr import files, runs
from raygr.data.row_counts import log_rows
from raygr.score.answer_format import aspect_tails, completion_tokens, parse_ratings
from raygr.score.config import RequestConfig, ScoreConfig
from raygr.score.prompts import system_text, user_lead_in
from raygr.score.store import ScoreStore, StoredScore
from raygr.score.subjects import PromptSettings, encoder_of

FILED, KNOWN = "filed", "known_before"
NOT_JSON, NO_ID, UNKNOWN_PROMPT, REPEATED, FAILED = "not_json", "no_custom_id", "unknown_prompt", "repeated", "failed"
# Some readers end a line at these characters, which JSON allows inside a string.
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
IS_HASH = re.compile("[0-9a-f]{64}")
ANSWERS_AT_ONCE = 4096  # answers in one file of the store
# finish_reason, stop_reason or finishReason of an answer that reached the token limit
CUT = ("length", "max_tokens", "MAX_TOKENS", "model_length", "model_context_window_exceeded")


class Request(NamedTuple):
    """The fields of every request of a batch besides its messages."""

    model: str
    max_tokens: int
    temperature: float | None
    """None leaves the field out."""
    layout: RequestConfig


def request_fields(config: ScoreConfig, settings: PromptSettings) -> Request:
    """The fields that `config.requests` asks for."""
    layout, tokenizer = config.requests, encoder_of(settings).tokenizer
    return Request(
        model=str(layout.service_model or config.answered_by),
        max_tokens=layout.max_tokens or completion_tokens(aspect_tails(tokenizer, settings.aspects)),
        temperature=config.temperature if layout.send_temperature else None,
        layout=layout,
    )


class Answer(NamedTuple):
    prompt_sha256: str
    text: str
    is_cut: bool


def write_requests(prompts: pa.Table, path: str, *, settings: PromptSettings, request: Request) -> list[str]:
    """Write one line per distinct prompt of the PROMPT rows; return the paths of the files.

    The layout's limits decide how many files there are. The first is `path`; the others have a number before the
    ending: requests.jsonl, requests-2.jsonl.
    """
    lines = request_lines(prompts, settings, request)
    line, paths = next(lines, None), list[str]()
    while line is not None or not paths:
        paths.append(numbered(path, len(paths) + 1))
        check_free(paths[-1])
        line = write_file(paths[-1], line, lines, request.layout)
    return paths


def check_free(path: str) -> None:
    if files.exists(path):
        raise runs.RunError(f"{path} exists already: export to another file, or move that one away")


def write_file(path: str, line: str | None, lines: Iterator[str], layout: RequestConfig) -> str | None:
    """Write `line` and those that follow while they fit into one file; return the first that does not fit."""
    written, size = 0, 0
    with fsspec.open(path, "wt", encoding="utf-8", compression="infer") as file:
        while line is not None:
            size += len(line.encode())
            if written and (written == layout.requests_per_file or size > layout.megabytes_per_file * 10**6):
                return line
            file.write(line)
            written += 1
            line = next(lines, None)
    return None


def numbered(path: str, number: int) -> str:
    if number == 1:
        return path
    folder, slash, name = path.rpartition("/")
    stem, endings = name.split(".")[0], "".join(PurePosixPath(name).suffixes)
    return f"{folder}{slash}{stem}-{number}{endings}"


def request_lines(prompts: pa.Table, settings: PromptSettings, request: Request) -> Iterator[str]:
    written = set()
    for row in prompts.select(["prompt_ids", "prompt_sha256"]).to_pylist():
        if row["prompt_sha256"] not in written:
            written.add(row["prompt_sha256"])
            line = request_of(row, settings, request)
            yield json.dumps(line, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def request_of(row: Mapping[str, Any], settings: PromptSettings, request: Request) -> dict[str, Any]:
    """The request of one PROMPT row."""
    encoder = encoder_of(settings)
    subject = encoder.subject_ids(row["prompt_ids"])  # cut as the token budget cut it
    text = str(encoder.tokenizer.decode(list(subject), clean_up_tokenization_spaces=False))
    user = f"{user_lead_in(settings.aspects, settings.subjects)}\n{text}"
    return request_line(row["prompt_sha256"], system_text(settings.aspects, settings.subjects), user, request)


def request_line(digest: str, system: str, user: str, request: Request) -> dict[str, Any]:
    """One request in the layout of `request`, whose `body` overrides the fields set here."""
    layout = request.layout
    sampling = {} if request.temperature is None else {"temperature": request.temperature}
    said = [{"role": "user", "content": user}]
    match layout.api:
        case "gemini":
            sampling |= {"maxOutputTokens": request.max_tokens}
            body: dict[str, Any] = {
                "system_instruction": {"parts": [{"text": system}]},
                "contents": [{"role": "user", "parts": [{"text": user}]}],
                "generation_config": sampling,
            }
            return {"key": digest, "request": {**body, **layout.body}}
        case "anthropic":
            body = {"model": request.model, "system": system, "messages": said, "max_tokens": request.max_tokens}
            return {"custom_id": digest, "params": {**body, **sampling, **layout.body}}
    limit = layout.token_limit if layout.api == "openai" else "max_tokens"
    messages = [{"role": "system", "content": system}, *said]
    body = {"messages": messages, "model": request.model, limit: request.max_tokens, **sampling, **layout.body}
    address = {"method": "POST", "url": layout.url} if layout.api == "openai" else {}
    return {"custom_id": digest, **address, "body": body}


def import_answers(
    paths: Sequence[str], store: ScoreStore, *, asked_N: np.ndarray, names: tuple[str, ...]
) -> dict[str, int]:
    """Write the answers to these prompts to the store; count the lines by what became of them.

    `asked_N` holds the prompts' hashes as `binary_hashes` returns them.
    An answer replaces a stored one only if more ratings are read from it. ValueError where no line answers a prompt.
    """
    counts: Counter[str] = Counter()
    asked_N = np.sort(asked_N)
    read_N = store.ratings_known(asked_N)  # of equal prompts only the first one's entry is used
    for path in paths:
        batch: dict[str, StoredScore] = {}
        filed = set()
        for answer in read_answers(path):
            if isinstance(answer, str):
                counts[answer] += 1
                continue
            digest, parsed = answer.prompt_sha256, parse_ratings(answer.text, names, is_cut=answer.is_cut)
            read = sum(rating is not None for rating in parsed.ratings)
            place = place_of(digest, asked_N)
            if place is None:
                counts[UNKNOWN_PROMPT] += 1
            elif read <= read_N[place]:
                counts[REPEATED if digest in filed else KNOWN] += 1
            else:
                counts[FILED] += 1
                filed.add(digest)
                read_N[place] = read
                expected = tuple(None if rating is None else float(rating) for rating in parsed.ratings)
                batch[digest] = StoredScore(parsed.ratings, expected, parsed.reason, answer.text)
            if len(batch) == ANSWERS_AT_ONCE:
                store.write(list(batch), list(batch.values()))
                batch = {}
        if batch:
            store.write(list(batch), list(batch.values()))
    others = {reason: count for reason, count in counts.items() if reason != FILED}
    log_rows(f"answers of {', '.join(paths)}", read=counts.total(), kept=counts[FILED], dropped=others)
    if not counts[FILED] and not counts[KNOWN]:
        raise ValueError(f"{', '.join(paths)}: no line answers a prompt of this run ({json.dumps(counts)})")
    return dict(counts)


def place_of(digest: str, sorted_N: np.ndarray) -> int | None:
    """The first place of a hash among sorted ones; None where it is not there, or is no hash."""
    if not IS_HASH.fullmatch(digest):
        return None
    wanted = np.array(bytes.fromhex(digest), sorted_N.dtype)
    place = int(np.searchsorted(sorted_N, wanted))
    return place if place < len(sorted_N) and sorted_N[place] == wanted else None


def read_answers(path: str) -> Iterator[Answer | str]:
    """The answer of each line of a file, or the reason why the line has none; empty lines are skipped."""
    with fsspec.open(path, "rt", encoding="utf-8", errors="replace", compression="infer") as file:
        for line in file:
            if line.strip():
                yield read_answer(line)


def read_answer(line: str) -> Answer | str:
    """The answer of one line, or the reason why it has none. A refusal is an answer without text."""
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError:
        return NOT_JSON
    match record:
        case {"error": error, **_rest} if error:
            return FAILED if identifier(record) else NO_ID
        case {"custom_id": str(digest), "response": {"body": {"choices": [{"message": message, **choice}, *_]}}}:
            if record["response"].get("status_code", 200) != 200 or not isinstance(message, dict):
                return FAILED
            return Answer(digest, text_of(message.get("content")), choice.get("finish_reason") in CUT)
        case {"custom_id": str(digest), "result": {"type": "succeeded", "message": dict(message)}}:
            return Answer(digest, text_of(message.get("content")), message.get("stop_reason") in CUT)
        case {"key": str(digest), "response": {"candidates": [dict(candidate), *_]}}:
            parts = (candidate.get("content") or {}).get("parts")
            return Answer(digest, text_of(parts), candidate.get("finishReason") in CUT)
        case {"key": str(digest), "response": {"promptFeedback": _}}:  # blocked: a refusal
            return Answer(digest, "", is_cut=False)
        case dict():
            return FAILED if identifier(record) else NO_ID
    return NOT_JSON


def identifier(record: Mapping[str, Any]) -> str | None:
    found = record.get("custom_id", record.get("key"))
    return found if isinstance(found, str) else None


def text_of(content: Any) -> str:
    """The text of an answer's content, a string or a list of parts, without the model's reasoning.

    Reasoning is a part of another type (Anthropic, Mistral), a part marked `thought` (Gemini), or a field beside the
    content (vLLM, OpenAI).
    """
    if isinstance(content, str):
        return content
    parts = [part for part in content or () if isinstance(part, dict)]
    texts = [part.get("text") for part in parts if part.get("type", "text") == "text" and not part.get("thought")]
    return "".join(text for text in texts if isinstance(text, str))
