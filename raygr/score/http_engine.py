"""Ask a server with OpenAI's chat API: PROMPT rows in, answers in the score store out, within a budget.

One event loop in the calling process keeps `concurrency` requests under way. The openai client repeats requests that
failed; a reply that cannot be read is repeated here. Every batch of answers is a file of the store, so whatever ends
the run, the same command continues it and asks no answered prompt again. What was spent is kept in the run's folder.
"""

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import openai
import pyarrow as pa
import pyarrow.compute as pc

from raygr import files, runs
from raygr.config import ConfigError
from raygr.execution.console import log_progress
from raygr.score.chat_replies import Reply, Sample, joined, read_reply, sample_of
from raygr.score.config import HttpConfig, ScoreConfig
from raygr.score.engine import request_seed
from raygr.score.external_llm import request_fields, request_of
from raygr.score.store import REFUSED_BY_ENGINE, ScoreStore, StoredScore
from raygr.score.subjects import PROMPTS, PromptSettings, encoder_of, stored_table

logger = logging.getLogger(__name__)

SPENT = "spent.json"  # in a score run: all that its attempts spent
REFUSED = (400, 413, 422)  # the server refuses one prompt; other statuses that are not repeated concern all prompts
REPEATED = (408, 409, 429)  # as the openai client does, beside 5xx
PATIENCE = 8  # prompts, or as many as are under way: so many failures in a row end the run
LONGEST_WORDS = 300  # characters of a server's message
SECRET = 8  # characters: shorter keys, such as EMPTY, may be words of an answer


@dataclasses.dataclass
class Spending:
    """Requests with their repetitions, and tokens."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    counted_here: int = 0
    """Replies whose own count of tokens was missing or impossible, so that the tokenizer of `llm` counted."""

    def add(self, requests: int, input_tokens: int, output_tokens: int) -> None:
        self.requests += requests
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens


class StopAsking(Exception):
    """No further prompt can be asked; the message says why."""


class Unanswered(Exception):
    """One prompt has no answer after all retries."""


class Refused(Exception):
    """The server refuses one prompt."""


def ask_server(
    run: runs.Run, config: ScoreConfig, settings: PromptSettings, store: ScoreStore, missing: pa.Array
) -> int:
    """Ask the prompts of these subjects and return how many were answered.

    RunError where some are left: the budget is reached, requests failed after all retries, or the server refuses all.
    """
    for name in ("openai", "httpx2"):  # a line per request
        logging.getLogger(name).setLevel(logging.WARNING)
    asking = Asking(run, config, settings, store, len(missing))
    log_progress(logger, f"score {config.subjects}", 0, len(missing), config.subjects)
    asyncio.run(asking.ask_all(prompt_rows(run.path, missing)))
    left = len(missing) - asking.filed
    if left:
        reason = asking.stopped or (
            f"{left} prompts failed after {config.http.retries} retries each (the last: {asking.failure}); "
            "http.leave_out_failed=true finishes the run without them"
        )
        raise runs.RunError(
            f"{run.path}: {reason}. Now answered: {asking.filed}, left: {left}; the same command continues from there"
        )
    return asking.filed


def prompt_rows(run: str, subjects: pa.Array) -> Iterator[dict[str, Any]]:
    """PROMPT rows of these subjects, read as they are needed."""
    wanted = pc.is_in(pc.field("subject_id"), value_set=subjects)
    columns = ["prompt_ids", "prompt_sha256"]
    for batch in stored_table(run, PROMPTS).to_batches(columns=columns, filter=wanted, batch_size=256):
        yield from batch.to_pylist()


def api_key(http: HttpConfig) -> str | None:
    """The server's key; ConfigError where the environment lacks it or it fits into no header."""
    if http.api_key_env is None:
        return None
    key = os.environ.get(http.api_key_env, "").strip()
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"http.api_key_env: the environment variable {http.api_key_env} holds no key")
    return key


class Asking:
    """The state of one attempt: what was answered, spent and reserved, and why it stopped."""

    def __init__(
        self, run: runs.Run, config: ScoreConfig, settings: PromptSettings, store: ScoreStore, asked: int
    ) -> None:
        self.config, self.http, self.settings, self.store, self.asked = config, config.http, settings, store, asked
        self.key, self.request = api_key(config.http), request_fields(config, settings)
        self.spent_file = run.file(SPENT)
        self.spent = Spending(**files.read_json(self.spent_file)) if files.exists(self.spent_file) else Spending()
        self.reserved = Spending()  # the most that requests under way may take
        self.batch: dict[str, StoredScore] = {}
        self.filed, self.next_start = 0, 0.0
        self.stopped, self.failure = "", ""
        self.has_answers = store.has_answers()
        self.fruitless = 0  # prompts in a row that failed, or that were refused before there was any answer

    async def ask_all(self, rows: Iterator[dict[str, Any]]) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=self.http.url, api_key=self.key or "none", timeout=self.http.timeout, max_retries=self.http.retries
        )
        async with self.client:
            try:
                await asyncio.gather(*(self.work(rows) for _ in range(self.http.concurrency)))
            finally:  # also after Ctrl-C
                self.file()

    async def work(self, rows: Iterator[dict[str, Any]]) -> None:
        """Ask one prompt after the other; all workers take theirs from `rows`."""
        for row in rows:
            if self.stopped:
                return
            try:
                answer = await self.answer(row)
                self.fruitless, self.has_answers = 0, True
            except StopAsking as stop:
                self.stopped = self.stopped or str(stop)
                return
            except (Refused, Unanswered) as error:
                is_refused, self.failure = isinstance(error, Refused), str(error)
                self.fruitless += not (is_refused and self.has_answers)
                if self.fruitless >= max(PATIENCE, self.http.concurrency):
                    self.stopped = self.stopped or f"{self.fruitless} prompts in a row got no answer ({error})"
                if not is_refused and not self.http.leave_out_failed:
                    continue
                nothing = (None,) * len(self.settings.aspects.names)
                answer = StoredScore(nothing, nothing, REFUSED_BY_ENGINE, str(error))
            self.batch[row["prompt_sha256"]] = answer
            if len(self.batch) == self.config.batch_size:
                self.file()

    def file(self) -> None:
        """Write the answers that are not yet in the store, and what was spent."""
        if self.batch:
            self.store.write(list(self.batch), list(self.batch.values()))
            self.filed += len(self.batch)
            self.batch = {}
        files.write_json(self.spent, self.spent_file)
        subjects = self.config.subjects
        log_progress(logger, f"score {subjects}", self.filed, self.asked, subjects, self.spending())

    async def answer(self, row: Mapping[str, Any]) -> StoredScore:
        """The answer to one PROMPT row, from as many requests as its samples take."""
        asked = request_of(row, self.settings, self.request)["body"]
        if self.http.top_logprobs:
            asked |= {"logprobs": True, "top_logprobs": self.http.top_logprobs}
        samples: list[Sample] = []
        while len(samples) < self.http.samples:
            body, number = dict(asked), self.http.samples - len(samples)
            if number > 1:
                body["n"] = number  # servers that ignore it give one answer each time
            if self.http.send_seed and self.config.temperature > 0:
                body["seed"] = request_seed(self.config.seed, row["prompt_ids"]) + len(samples)
            samples += await self.samples(body | dict(self.config.requests.body), len(row["prompt_ids"]))
        return joined(samples)

    async def samples(self, body: dict[str, Any], prompt_tokens: int) -> list[Sample]:
        """The answers of one request, repeated while the reply cannot be read."""
        left, names = self.http.retries, self.settings.aspects.names
        while True:
            text, reply, used = await self.reply(body, prompt_tokens, left)
            if reply.choices:
                return [sample_of(choice, names) for choice in reply.choices]
            left -= used
            if left < 0:
                raise Unanswered(f"the reply holds no answer: {self.words(text)}")
            await asyncio.sleep(min(8, 0.5 * 2 ** (self.http.retries - left - 1)))

    async def reply(self, body: dict[str, Any], prompt_tokens: int, retries: int) -> tuple[str, Reply, int]:
        """The server's reply as text, without the key, and as read, and the number of requests that it took."""
        longest = body.get("n", 1) * int(body.get(self.config.requests.token_limit, self.request.max_tokens))
        await self.wait_for_budget(prompt_tokens, longest)
        self.reserved.add(1, prompt_tokens, longest)
        used = 1
        try:
            await self.wait_for_turn()
            client = self.client.with_options(max_retries=retries)
            said = {"model": body["model"], "messages": body["messages"], "extra_body": body}
            response = await client.chat.completions.with_raw_response.create(**said)
            used += response.retries_taken
            text = self.without_key(response.text)
            reply = read_reply(text)
            self.count_tokens(reply, prompt_tokens, longest)
            return text, reply, used
        except openai.APIError as error:
            used += int(error.request.headers.get("x-stainless-retry-count", 0))
            raise self.outcome(error) from None
        finally:
            self.reserved.add(-1, -prompt_tokens, -longest)
            self.spent.requests += used

    def outcome(self, error: openai.APIError) -> Exception:
        """What an error that was repeated often enough, or need not be, means for the run."""
        if not isinstance(error, openai.APIStatusError):
            return Unanswered(self.words(f"{self.http.url}: {error} {error.__cause__ or ''}"))
        said = error.body.get("message") if isinstance(error.body, dict) else None
        words = self.words(f"status {error.status_code}: {said or error.message}")
        if error.status_code in REFUSED:
            return Refused(words)
        if error.status_code in REPEATED or error.status_code >= 500:
            return Unanswered(words)
        return StopAsking(f"{self.http.url} answers {words}")

    def words(self, text: str) -> str:
        """A message on one line, shortened and without the key."""
        return " ".join(self.without_key(text).split())[:LONGEST_WORDS]

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key and len(self.key) >= SECRET else text

    async def wait_for_turn(self) -> None:
        """Sleep until `requests_per_minute` allows another request."""
        if self.http.requests_per_minute:
            now = time.monotonic()
            start = max(now, self.next_start)
            self.next_start = start + 60 / self.http.requests_per_minute
            await asyncio.sleep(start - now)

    async def wait_for_budget(self, input_tokens: int, output_tokens: int) -> None:
        """Wait while requests under way hold the rest of the budget; StopAsking where the budget lacks one request."""
        while True:
            most = dataclasses.replace(self.spent)
            most.add(1, input_tokens, output_tokens)
            most.add(self.reserved.requests, self.reserved.input_tokens, self.reserved.output_tokens)
            needed = {
                "budget_requests": most.requests,
                "budget_tokens": most.input_tokens + most.output_tokens,
                "budget_cost": self.http.cost(most.input_tokens, most.output_tokens),
            }
            limits = {name: vars(self.http)[name] for name in needed if vars(self.http)[name] is not None}
            reached = [name for name, limit in limits.items() if needed[name] > limit]
            if not reached:
                return
            if not self.reserved.requests:
                raise StopAsking(
                    f"http.{reached[0]}: {limits[reached[0]]} is reached ({self.spending()}): set it higher to go on"
                )
            await asyncio.sleep(0.02)

    def spending(self) -> str:
        spent = self.spent
        cost = self.http.cost(spent.input_tokens, spent.output_tokens)
        text = f"spent {spent.requests} requests, {spent.input_tokens} + {spent.output_tokens} tokens"
        return f"{text}, {cost:.2f} at the given prices" if cost else text

    def count_tokens(self, reply: Reply, prompt_tokens: int, longest: int) -> None:
        """Add the tokens of a reply to what was spent; a count that is missing or impossible is not believed."""
        tokenizer = encoder_of(self.settings).tokenizer
        written = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in reply.texts())
        match reply.usage:  # tokenizers differ, but hardly by more than a factor of 4
            case {"prompt_tokens": int(given), "completion_tokens": int(made)} if (
                prompt_tokens / 4 <= given <= 4 * prompt_tokens and written / 4 <= made <= max(longest, written)
            ):
                self.spent.add(0, given, made)
            case _:
                self.spent.add(0, prompt_tokens, written)
                self.spent.counted_here += 1
