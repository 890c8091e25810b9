"""Prompts as batches of chat requests for another LLM, and its answers back into the score store.

A batch is a file of JSON lines, one request each, under the prompt's hash, by which an answer finds its prompt whatever
the order. `request_line` writes and `read_answer` reads the layouts of these services:

openai     platform.openai.com/docs/guides/batch; so take and answer vLLM's `run-batch` and most others.
mistral    docs.mistral.ai/capabilities/batch: the same without method and url, which the job names.
anthropic  platform.claude.com/docs/en/build-with-claude/batch-processing: each line is an element of `requests`.
gemini     ai.google.dev/gemini-api/docs/batch-api: GenerateContentRequests under a `key`; the job names the model.

Answers are read by the rules of answer_parsing.py. A service gives no probabilities, so the expected rating is the
rating.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from raygr import files, runs
from raygr.data.row_counts import log_rows
from raygr.score.answer_parsing import read_completion
from raygr.score.config import RequestConfig
from raygr.score.prompts import system_text, user_lead_in
from raygr.score.store import ScoreStore, StoredScore
from raygr.score.subjects import PromptSettings, encoder_of

FILED, KNOWN = "filed", "known_before"
NOT_JSON, NO_ID, UNKNOWN_PROMPT, REPEATED, FAILED = "not_json", "no_custom_id", "unknown_prompt", "repeated", "failed"
# Characters that some readers end a line at, though JSON allows them inside a string.
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
ANSWERS_AT_ONCE = 4096  # answers of one file of the store
# finish_reason, stop_reason or finishReason of an answer that was cut off at the token limit
CUT = ("length", "max_tokens", "MAX_TOKENS", "model_length", "model_context_window_exceeded")


class Request(NamedTuple):
    """What every request of a batch says besides its messages."""

    model: str
    max_tokens: int
    temperature: float | None
    """None leaves it out."""
    layout: RequestConfig


class Answer(NamedTuple):
    prompt_sha256: str
    text: str
    is_cut: bool


def write_requests(prompts: pa.Table, path: str, *, settings: PromptSettings, request: Request) -> list[str]:
    """One line per distinct prompt of the PROMPT rows, in as many files as the layout's limits ask for; their paths.

    The first is `path`, the others have a number before its ending: requests.jsonl, requests-2.jsonl.
    """
    lines = request_lines(prompts, settings, request)
    line, paths = next(lines, None), []
    while line is not None or not paths:
        paths.append(numbered(path, len(paths) + 1))
        check_free(paths[-1])
        line = write_file(paths[-1], line, lines, request.layout)
    return paths


def check_free(path: str) -> None:
    if files.exists(path):
        raise runs.RunError(f"{path} is there already: export to another file, or move that one away")


def write_file(path: str, line: str | None, lines: Iterator[str], layout: RequestConfig) -> str | None:
    """Writes `line` and those that follow while they fit into one file; the first that does not."""
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
    for row in prompts.select(["prompt_ids", "shared_tokens", "prompt_sha256"]).to_pylist():
        if row["prompt_sha256"] not in written:
            written.add(row["prompt_sha256"])
            system = system_text(settings.aspects, settings.subjects)
            line = request_line(row["prompt_sha256"], system, user_message(row, settings), request)
            yield json.dumps(line, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def request_line(digest: str, system: str, user: str, request: Request) -> dict[str, Any]:
    """One request in the layout of `request`; `body` of the layout wins over what is chosen here."""
    layout = request.layout
    sampling = {} if request.temperature is None else {"temperature": request.temperature}
    said = [{"role": "user", "content": user}]
    match layout.api:
        case "gemini":
            sampling |= {"maxOutputTokens": request.max_tokens}
            body = {
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


def user_message(row: dict[str, Any], settings: PromptSettings) -> str:
    """The user's side of the prompt, cut as the token budget cut it, without the chat template."""
    encoder = encoder_of(settings)
    subject_ids = row["prompt_ids"][row["shared_tokens"] : len(row["prompt_ids"]) - len(encoder.closing)]
    text = encoder.tokenizer.decode(subject_ids, clean_up_tokenization_spaces=False)
    return user_lead_in(settings.aspects, settings.subjects) + "\n" + text


def import_answers(
    paths: Sequence[str], store: ScoreStore, *, asked: set[str], names: tuple[str, ...]
) -> dict[str, int]:
    """Files the answers to the prompts in `asked`; the count of lines by what became of them.

    An answer of which more ratings are read replaces one that is there. ValueError where no line answers a prompt.
    """
    counts: Counter[str] = Counter()
    known = store.ratings_known()
    for path in paths:
        file_answers(path, store, asked, known, names, counts)
    others = {reason: count for reason, count in counts.items() if reason != FILED}
    log_rows(f"answers of {', '.join(paths)}", read=counts.total(), kept=counts[FILED], dropped=others)
    if not counts[FILED] and not counts[KNOWN]:
        raise ValueError(f"{', '.join(paths)}: no line answers a prompt of this run ({json.dumps(counts)})")
    return dict(counts)


def file_answers(
    path: str, store: ScoreStore, asked: set[str], known: dict[str, int], names: tuple[str, ...], counts: Counter[str]
) -> None:
    """Files one file's answers; counts every line in `counts`, and notes in `known` the ratings of those filed."""
    batch: dict[str, StoredScore] = {}
    seen: set[str] = set()
    for answer in read_answers(path, counts):
        score = stored(answer, names)
        read = sum(rating is not None for rating in score.ratings)
        reason = reason_of_answer(answer.prompt_sha256, read, asked=asked, known=known, seen=seen)
        counts[reason] += 1
        if reason == FILED:
            seen.add(answer.prompt_sha256)
            known[answer.prompt_sha256] = read
            batch[answer.prompt_sha256] = score
        if len(batch) == ANSWERS_AT_ONCE:
            store.write(list(batch), list(batch.values()))
            batch = {}
    if batch:
        store.write(list(batch), list(batch.values()))


def reason_of_answer(digest: str, read: int, *, asked: set[str], known: Mapping[str, int], seen: set[str]) -> str:
    if digest not in asked:
        return UNKNOWN_PROMPT
    if read > known.get(digest, -1):
        return FILED
    return REPEATED if digest in seen else KNOWN


def read_answers(path: str, counts: Counter[str]) -> Iterator[Answer]:
    """The answers of one file; every line that holds none is counted by its reason."""
    with fsspec.open(path, "rt", encoding="utf-8", errors="replace", compression="infer") as file:
        for line in file:
            if not line.strip():
                continue
            answer = read_answer(line)
            if isinstance(answer, str):
                counts[answer] += 1
            else:
                yield answer


def read_answer(line: str) -> Answer | str:
    """The answer of one line, or why it is none. A refusal has no content: an answer without ratings."""
    try:
        record = json.loads(line)
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
        case {"key": str(digest), "response": {"candidates": [{**candidate}, *_]}}:
            parts = (candidate.get("content") or {}).get("parts")
            return Answer(digest, text_of(parts), candidate.get("finishReason") in CUT)
        case {"key": str(digest), "response": {"promptFeedback": _}}:  # blocked, which is a refusal
            return Answer(digest, "", is_cut=False)
        case dict():
            return FAILED if identifier(record) else NO_ID
    return NOT_JSON


def identifier(record: Mapping[str, Any]) -> str | None:
    found = record.get("custom_id", record.get("key"))
    return found if isinstance(found, str) else None


def text_of(content: Any) -> str:
    """The text of an answer's content, a string or a list of parts; parts of the model's reasoning are left out.

    Reasoning is a part of another type (Anthropic, Mistral), is marked `thought` (Gemini), or stands in a field of its
    own beside the content (vLLM, OpenAI).
    """
    if isinstance(content, str):
        return content
    parts = [part for part in content or () if isinstance(part, dict)]
    texts = [part.get("text") for part in parts if part.get("type", "text") == "text" and not part.get("thought")]
    return "".join(text for text in texts if isinstance(text, str))


def stored(answer: Answer, names: tuple[str, ...]) -> StoredScore:
    parsed = read_completion(answer.text, names, is_cut=answer.is_cut)
    expected = tuple(None if rating is None else float(rating) for rating in parsed.ratings)
    return StoredScore(ratings=parsed.ratings, expected=expected, reason=parsed.reason, completion=answer.text)
