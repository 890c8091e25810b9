"""A server answers the prompts of a score run: every row once, whatever fails; budgets; expected ratings; the key."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chat_server import chat_server
from toy_data import TWO, walks, write_prepared
from transformers import AutoModelForCausalLM

from raygr import files, runs
from raygr.cli import main
from raygr.config import ConfigError
from raygr.score.answer_format import format_regex
from raygr.score.chat_replies import joined, sample_of
from raygr.score.config import ScoreConfig
from raygr.score.default_model import small_model_folder
from raygr.score.http_engine import SPENT, ask_server
from raygr.score.stage import missing_subjects
from raygr.score.store import ScoreStore, open_store
from raygr.score.subjects import chosen_prompts, prompt_settings, subjects_of

ITEMS = 24
NAMES = TWO.names
KEY = "sk-a-secret-of-41"


def rating_of(body: Mapping[str, Any]) -> int:
    """The rating that the server gives to an item: its number in the title, modulo 10."""
    said = body["messages"][-1]["content"]
    return int(said.partition("title ")[2].split()[0]) % 10 + 1


def reply(text: str, *, usage: Any = None, count: int = 1, **choice: Any) -> dict[str, Any]:
    one = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}
    return {"id": "c", "object": "chat.completion", "choices": [one] * count, "usage": usage}


def answer(body: Mapping[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 150, "completion_tokens": 10, "total_tokens": 160}
    return reply("\n".join(f"{name}: {rating_of(body)}" for name in NAMES), usage=usage)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    write_prepared(folder / "prepare", walks(3, ITEMS, 6, seed=0), items=ITEMS)
    words = {name: value for name, value in vars(TWO).items() if name != "aspects"}
    described = [{"name": one.name, "description": one.description} for one in TWO.aspects]
    (folder / "aspects.yaml").write_text(yaml.safe_dump(words | {"aspects": described}), encoding="utf-8")
    return folder


def config_of(data: Path, output: Path, url: str, **changes: Any) -> ScoreConfig:
    http = {"url": url, "concurrency": 4, "retries": 3, "timeout": 5.0} | changes.pop("http", {})
    settings = {"data": f"{data}/prepare", "aspects": f"{data}/aspects.yaml", "subjects": "items", "answered_by": "big"}
    settings |= {"mode": "generate", "structured": False, "engine": "http", "batch_size": 4, "http": http}
    return ScoreConfig(output=str(output), **(settings | changes))


def ask(config: ScoreConfig) -> ScoreStore:
    """What the stage does between prompts/ and scores/, without Ray."""
    run = runs.start_run(config.output, job="score", config=config, inputs=[config.data])
    try:
        settings, store = prompt_settings(config, "items"), open_store(config, on_gpu=False)
        prompts = chosen_prompts(config.data, settings, subjects_of(config.data, "items", None))
        files.write_table(prompts, run.file("prompts/part-0.parquet"))
        missing = missing_subjects(run, store, retry_failed=False)
        if len(missing):
            ask_server(run, config, settings, store, missing)
        return store
    finally:
        runs.unlock(run.path)


def ratings_of(store: ScoreStore, config: ScoreConfig) -> dict[str, list[int | None]]:
    """The ratings of each subject; every row of the store, so that an answer that is there twice is an error."""
    prompts = files.read_table(f"{config.output}/prompts")
    subjects = dict(zip(prompts["prompt_sha256"].to_pylist(), prompts["subject_id"].to_pylist(), strict=True))
    rows = store.dataset().to_table().to_pylist()
    assert len({row["prompt_sha256"] for row in rows}) == len(rows)
    return {subjects[row["prompt_sha256"]]: row["ratings"] for row in rows}


ALL = {f"i{item}": [item % 10 + 1] * len(NAMES) for item in range(1, ITEMS + 1)}


# --- faults --------------------------------------------------------------------------------------


def test_every_row_is_answered_once_whatever_the_server_does(data: Path, tmp_path: Path):
    wrong = {"prompt_tokens": -7, "completion_tokens": 10**12}
    kinds: list[list[Any]] = [
        ["drop"], ["half"], [(429, "slow down", {"Retry-After": "1"})], [(500, "broken"), (503, "busy")],
        [("slow", 3.0)], ["{not JSON"], [{"choices": []}], [{"choices": [{"message": None}]}],
        [{"error": {"message": "odd"}}], ["<html>a proxy's page</html>"], [{"usage": {}}, (502, "gateway"), "null"], [],
    ]  # fmt: skip
    faults = {f"title {item}": kinds[item % len(kinds)] for item in range(1, ITEMS + 1)}
    with chat_server(lambda body: answer(body) | {"usage": wrong}, faults) as server:
        config = config_of(data, tmp_path / "run", server.url, http={"concurrency": 16, "timeout": 1.0})
        assert ratings_of(ask(config), config) == ALL
        sent = sum(1 + len(found) for found in faults.values())
        spent = files.read_json(f"{config.output}/{SPENT}")
        assert len(server.requests) == spent["requests"] == sent
        times = [[at for at, said, _ in server.requests if said.endswith(f"title {item}")] for item in (2, 14)]
        assert all(later - first >= 1.0 for first, later in times)  # Retry-After
    prompts = files.read_table(f"{config.output}/prompts")["prompt_tokens"].to_pylist()
    assert spent["counted_here"] >= ITEMS and spent["input_tokens"] >= sum(prompts)  # unreadable replies cost, too


def test_a_server_that_is_not_there_ends_the_run_soon_and_what_was_answered_stays(data: Path, tmp_path: Path):
    with chat_server(answer) as server:
        config = config_of(data, tmp_path / "run", server.url, http={"budget_requests": 6, "retries": 0})
        with pytest.raises(runs.RunError, match=r"budget_requests: 6 is reached"):
            ask(config)
    gone = config_of(data, tmp_path / "run", server.url, http={"retries": 0})
    with pytest.raises(
        runs.RunError, match=r"8 prompts in a row got no answer .*Connection error.* answered: 0, left: 18"
    ):
        ask(gone)
    with chat_server(answer) as server:
        again = config_of(data, tmp_path / "run", server.url)
        assert ratings_of(ask(again), again) == ALL
        assert len(server.requests) == ITEMS - 6


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_would_fail_for_all_stops_at_once(data: Path, tmp_path: Path, status: int, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("A_KEY", f" {KEY}\n")
    with chat_server(answer, {"": [(status, f"no entry with {KEY}")] * 9}) as server:
        config = config_of(data, tmp_path / "run", server.url, http={"api_key_env": "A_KEY"})
        with pytest.raises(runs.RunError) as stopped:
            ask(config)
        assert f"{server.url} answers status {status}: no entry with ***." in str(stopped.value)
        assert len(server.requests) <= 4
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert_no_key(tmp_path, caplog.text + str(stopped.value))


def test_a_refused_prompt_is_counted_and_a_server_that_refuses_all_is_told(data: Path, tmp_path: Path):
    with chat_server(answer, {"title 5": [(400, "too\nlong")] * 9}) as server:
        config = config_of(data, tmp_path / "run", server.url)
        store = ask(config)
        assert len(server.requests) == ITEMS
    rows = [row for row in store.read().to_pylist() if row["reason"] != "ok"]
    assert [(row["reason"], row["completion"]) for row in rows] == [("refused_by_engine", "status 400: too long")]
    with chat_server(answer, {"": [(400, "logprobs are not supported")] * 9}) as server:
        with pytest.raises(runs.RunError, match=r"8 prompts in a row got no answer .status 400: logprobs are not"):
            ask(config_of(data, tmp_path / "all", server.url))
        assert len(server.requests) < ITEMS


def test_a_prompt_that_always_fails_is_left_out_only_if_asked(data: Path, tmp_path: Path):
    with chat_server(answer, {"title 5": [(500, "a bug")] * 99}) as server:
        config = config_of(data, tmp_path / "run", server.url, http={"retries": 0})
        with pytest.raises(runs.RunError, match=r"1 prompts failed after 0 retries .*a bug.*answered: 23, left: 1"):
            ask(config)
        without = config_of(data, tmp_path / "run", server.url, http={"retries": 0, "leave_out_failed": True})
        found = ratings_of(ask(without), without)
    assert found == ALL | {"i5": [None, None]}


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "larger", "most"),
    [
        ({"budget_requests": 7}, {"budget_requests": 30}, 7),
        # 160 tokens are spent on an answer; before each, its prompt and the longest answer must fit
        ({"budget_tokens": 1700}, {"budget_tokens": 10**6}, 1700 // 160),
        ({"budget_cost": 0.2}, {"budget_cost": 99.0}, 11),
    ],
)
def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(data: Path, tmp_path: Path, budget, larger, most):
    prices = {"price_per_million_input": 100.0, "price_per_million_output": 300.0}  # .018 an answer
    with chat_server(answer) as server:
        config = config_of(data, tmp_path / "run", server.url, http=prices | budget)
        with pytest.raises(runs.RunError, match=f"http.{next(iter(budget))}: .* is reached") as reached:
            ask(config)
        done = len(server.requests)
        assert most - 2 <= done <= most
        assert f"answered: {done}, left: {ITEMS - done}; the same command continues" in str(reached.value)
        assert len(open_store(config, on_gpu=False).read()) == done
        with pytest.raises(runs.RunError, match="is reached"):  # earlier attempts count
            ask(config)
        assert len(server.requests) == done
        config = config_of(data, tmp_path / "run", server.url, http=prices | larger)
        assert ratings_of(ask(config), config) == ALL
        assert len(server.requests) == ITEMS
    spent = files.read_json(f"{config.output}/{SPENT}")
    assert spent == {"requests": ITEMS, "input_tokens": 150 * ITEMS, "output_tokens": 10 * ITEMS, "counted_here": 0}


def test_requests_per_minute_are_kept(data: Path, tmp_path: Path):
    with chat_server(answer) as server:
        ask(config_of(data, tmp_path / "run", server.url, http={"requests_per_minute": 1200}))
        times = [at for at, _, _ in server.requests]
    assert times[-1] - times[0] >= 0.9 * (ITEMS - 1) / 20


# --- expected ratings ----------------------------------------------------------------------------


def spoken(*tokens: tuple[str, dict[str, float]]) -> dict[str, Any]:
    """A choice whose tokens have these alternatives with their probabilities."""
    content = []
    for text, others in tokens:
        listed = [{"token": one, "logprob": math.log(p), "bytes": list(one.encode())} for one, p in others.items()]
        own = {"token": text, "logprob": math.log(others.get(text, 0.9)), "bytes": list(text.encode())}
        content.append(own | {"top_logprobs": listed})
    text = "".join(text for text, _ in tokens)
    return {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": content}}


PACE, LENGTH = ("pace:", {}), ("\nmovie length (duration):", {})


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # 10 is one token; "7" and " 7" are one rating; words do not count
        ([PACE, (" 7", {" 7": 0.4, "7": 0.1, " 10": 0.25, " 1": 0.05, " a": 0.2})], [(3.5 + 2.5 + 0.05) / 0.8, None]),
        # 10 is two tokens and the answer says 10: the next token divides P("1") between 1 and 10
        (
            [PACE, (" ", {}), ("1", {"1": 0.6, "8": 0.3}), ("0", {"0": 0.75, "\n": 0.25})],
            [(0.15 * 1 + 0.45 * 10 + 0.3 * 8) / 0.9, None],
        ),
        # ... and where it says 1
        (
            [PACE, (" ", {}), ("1", {"1": 0.6, "2": 0.2}), ("\n", {"0": 0.25, "\n": 0.75})],
            [(0.45 * 1 + 0.15 * 10 + 0.2 * 2) / 0.8, None],
        ),
        # ... elsewhere P("1") is left out
        ([PACE, (" ", {}), ("8", {"8": 0.5, "1": 0.3, "9": 0.2})], [(4 + 1.8) / 0.7, None]),
        # one aspect shows that 10 is one token, so "1" is the rating 1 in the other
        (
            [PACE, (" 8", {" 8": 0.5, " 1": 0.5}), LENGTH, (" 10", {" 10": 0.5, " 9": 0.5})],
            [4.5, 9.5],
        ),
        # characters of several bytes before the rating, one of them split between tokens
        ([("é \U0001f600 pace:", {}), (" 7", {" 7": 0.5, " 6": 0.5})], [6.5, None]),
        # a token with more than the rating, and no alternatives
        ([PACE, (" 7/10", {" 7/10": 0.5, " 6": 0.5}), LENGTH, (" 3", {})], [7.0, 3.0]),
    ],
)
def test_expected_ratings_are_means_over_alternatives(tokens, expected):
    sample = sample_of(spoken(*tokens), NAMES)
    assert sample.expected == [None if one is None else pytest.approx(one, rel=1e-6) for one in expected]


def test_reasoning_tokens_and_wrong_tokens_move_nothing():
    choice = spoken(("pace: 1 ... think", {}), PACE, (" 7", {" 7": 0.5, " 6": 0.5}))
    choice["message"]["content"] = "pace: 7"
    assert sample_of(choice, NAMES).expected == [6.5, None]
    choice["message"]["content"] = "pace:  7"  # not the text of the tokens
    assert sample_of(choice, NAMES).expected == [7.0, None]
    for odd in (None, {"content": None}, {"content": [{"token": 3}]}, {"content": []}, [1], "x"):
        assert sample_of({"message": {"content": "pace: 7"}, "logprobs": odd}, NAMES).expected == [7.0, None]
    impossible = spoken(PACE, (" 7", {" 7": 0.5}))
    impossible["logprobs"]["content"][1]["logprob"] = -9999.0
    impossible["logprobs"]["content"][1]["top_logprobs"] = [{"token": "a", "logprob": 0.0, "bytes": None}]
    assert sample_of(impossible, NAMES).expected == [7.0, None]


@pytest.mark.parametrize("honours_n", [True, False])
def test_samples_are_averaged_however_the_server_gives_them(data: Path, tmp_path: Path, honours_n: bool):
    given = [2, 4, 4, 9]

    def one_of_many(body: dict[str, Any]) -> dict[str, Any]:
        """Four answers to a prompt; the last one lacks an aspect."""
        number = server.seen[body["messages"][-1]["content"]]
        texts = [f"{NAMES[0]}: {rating}" + f"\n{NAMES[1]}: 5" * (rating < 9) for rating in given]
        chosen = texts if honours_n else [texts[number - 1]]
        replies = [reply(text)["choices"][0] for text in chosen]
        return {"choices": replies, "usage": None}

    with chat_server(one_of_many) as server:
        config = config_of(data, tmp_path / "run", server.url, temperature=1.0, http={"samples": 4})
        rows = ask(config).read().to_pylist()
        seeds = [body["seed"] for _, said, body in server.requests if said == server.requests[0][1]]
        assert len(seeds) == len(set(seeds)) == (1 if honours_n else 4)
        assert server.requests[0][2]["n"] == 4
    assert {(tuple(row["ratings"]), tuple(row["expected"]), row["reason"]) for row in rows} == {
        ((4, 5), (4.75, 5.0), "ok")
    }
    assert all(row["completion"].count("pace") == 4 for row in rows)


def test_of_equally_frequent_ratings_the_first_counts_and_a_missing_one_keeps_its_reason():
    texts = ["pace: 8", "pace: 3", "nothing"]
    found = joined([sample_of({"message": {"content": text}}, NAMES) for text in texts])
    assert (found.ratings, found.expected, found.reason) == ((8, None), (5.5, None), "some_aspects_missing")


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actors": 2, "engine_kwargs": {"dtype": "auto"}}, "actors, engine_kwargs: no effect on engine: http"),
        ({"engine": "vllm"}, "http: no effect on engine: vllm"),
        ({"answered_by": None}, "engine: http asks the LLM answered_by at the address http.url: set both"),
        ({"http": {"url": None}}, "engine: http asks the LLM answered_by at the address http.url: set both"),
        ({"http": {"url": "localhost:8000"}}, "url: expected http://host/v1"),
        ({"http": {"url": "http://me:secret@host/v1"}}, "url: expected http://host/v1"),
        ({"http": {"url": "http://host/v1?key=secret"}}, "url: expected http://host/v1"),
        ({"http": {"url": "http://host/v1/chat/completions"}}, "leave out /chat/completions"),
        ({"http": {"budget_cost": 3.0}}, "budget_cost: set price_per_million_input"),
        ({"http": {"samples": 3}}, "http.samples: without a temperature"),
        ({"requests": {"api": "gemini"}}, "no effect on engine: http"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data: Path, tmp_path: Path, changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        config_of(data, tmp_path, "http://host/v1", **changes)


def test_what_changes_answers_is_in_the_key_of_the_store_and_a_budget_is_not(data: Path, tmp_path: Path):
    def key(**changes: Any) -> str:
        return open_store(config_of(data, tmp_path, changes.pop("url", "http://a/v1"), **changes), on_gpu=False).path

    others = [{"http": {"top_logprobs": 0}}, {"temperature": 1.0}, {"requests": {"body": {"effort": "low"}}}]
    others += [
        {"answered_by": "small"},
        {"requests": {"max_tokens": 999}},
        {"temperature": 1.0, "http": {"samples": 2}},
    ]
    assert len({key(), *(key(**one) for one in others)}) == 1 + len(others)
    same = {"budget_requests": 3, "retries": 0, "concurrency": 99, "api_key_env": "K", "leave_out_failed": True}
    assert key() == key(url="http://b/v1", http=same)


@pytest.mark.parametrize("value", ["", " ", "two words", "line\nline", "schlüssel"])
def test_a_key_that_fits_no_header_is_refused_without_saying_it(data: Path, tmp_path: Path, value: str, monkeypatch):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(ConfigError) as refused:
        ask(config_of(data, tmp_path / "run", "http://127.0.0.1:9/v1", http={"api_key_env": "A_KEY"}))
    assert str(refused.value) == "http.api_key_env: the environment variable A_KEY holds no key"


# --- the whole stage -----------------------------------------------------------------------------


def assert_no_key(folder: Path, *texts: str) -> None:
    held = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not held and not [text for text in texts if KEY in text]


@pytest.mark.slow
def test_a_score_run_by_a_server(data: Path, tmp_path: Path, capsys, caplog, monkeypatch):
    """The key is nowhere, not even where the server repeats it in an answer; run.json says what was spent."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("A_KEY", KEY)

    def telling(body: dict[str, Any]) -> dict[str, Any]:
        return reply(f"Your key is {KEY}.\n{NAMES[0]}: {rating_of(body)}\n{NAMES[1]}: {rating_of(body)}")

    with chat_server(telling, {"title 3": [(500, f"{KEY} broke")], "title 4": [(400, f"{KEY} is bad")] * 9}) as server:
        settings = {"output": tmp_path / "run", "data": data / "prepare", "aspects": data / "aspects.yaml"}
        settings |= {"subjects": "items", "engine": "http", "answered_by": "big", "mode": "generate"}
        settings |= {"structured": "false", "http.url": server.url, "http.api_key_env": "A_KEY"}
        settings |= {"http.price_per_million_input": 2.5}
        command = [
            "score",
            "--debug",
            *(word for name, value in settings.items() for word in ("--set", f"{name}={value}")),
        ]
        assert main([*command, "--set", "http.budget_requests=10"]) == 2
        assert main(command) == 0
        assert len(server.requests) == ITEMS + 2  # one repeated, and the refused one asked by both attempts
    record = runs.read_run(str(tmp_path / "run"), job="score")
    assert record.counts["by_reason"] == {"ok": ITEMS - 1, "refused_by_engine": 1}
    assert record.counts["server"]["requests"] == ITEMS + 2
    rows = {row["subject_id"]: row for row in files.read_table(f"{tmp_path}/run/scores").to_pylist()}
    assert {name: row["ratings"] for name, row in rows.items()} == ALL | {"i4": [None, None]}
    assert rows["i4"]["completion"] == "status 400: *** is bad"
    assert {(row["model"], row["mode"]) for row in rows.values()} == {("big", "generate-free")}
    said = capsys.readouterr()
    assert "http.budget_requests: 10 is reached" in said.err
    assert_no_key(tmp_path, said.out, said.err, caplog.text)


# --- vLLM's own server ---------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def posted(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as found:
        return json.load(found)


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory):
    """The address of `vllm serve` with the small model, in a process group of its own that is stopped at the end."""
    pytest.importorskip("vllm")
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", small_model_folder()]
    command += ["--host", "127.0.0.1", "--served-model-name", "smol", "--dtype", "float32", "--max-model-len", "1024"]
    command += ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(1 << 28)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    environment.pop("OMP_NUM_THREADS", None)  # of the tests: the server has all cores, as users start it
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        latest = time.monotonic() + 480
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert server.poll() is None and time.monotonic() < latest, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=20)
            os.killpg(server.pid, signal.SIGKILL)


def forced_pace(model: Any, prompt_ids: list[int], tokenizer: Any) -> float:
    """The expected rating at `pace: ` where a format is forced: behind `1` there is `0` or the line's end."""
    at = [*prompt_ids, *tokenizer("pace: ", add_special_tokens=False).input_ids]
    ids = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    end = tokenizer("\n", add_special_tokens=False).input_ids[0]
    first_V, second_V = (model(torch.tensor([one])).logits[0, -1].softmax(-1) for one in (at, [*at, ids[1]]))
    zero = (second_V[ids[0]] / (second_V[ids[0]] + second_V[end])).item()
    shares = first_V[ids[1:]].tolist()
    by_rating = [shares[0] * (1 - zero), *shares[1:], shares[0] * zero]
    return sum(rating * share for rating, share in enumerate(by_rating, start=1)) / sum(by_rating)


@pytest.mark.slow
def test_vllm_s_server_behind_faults_answers_as_the_engine_does(
    data: Path, tmp_path: Path, vllm_url: str, tokenizer: Any, local_ray
):
    """Same answers as the engine's, and the expected ratings that the forced format leaves."""
    from raygr.score.stage import score

    kinds = [["drop"], [(429, "slow down", {"Retry-After": "1"})], [(500, "broken")], ["{not JSON"], [("slow", 90.0)]]
    faults = {f"title {item}": kinds[item % len(kinds)] for item in range(1, 11)}
    body = {"structured_outputs": {"regex": format_regex(TWO)}}
    with chat_server(lambda asked: posted(f"{vllm_url}/chat/completions", asked), faults) as proxy:
        http = {"timeout": 60.0, "concurrency": 8}
        requests = {"service_model": "smol", "body": body}
        config = config_of(data, tmp_path / "http", proxy.url, http=http, requests=requests, max_subjects=ITEMS)
        by_server = files.read_table(f"{score(config).path}/scores").to_pylist()
        assert len(proxy.requests) == ITEMS + len(faults)
    shared = {"data": config.data, "aspects": config.aspects, "subjects": "items", "mode": "generate"}
    engine = ScoreConfig(output=str(tmp_path / "engine"), max_subjects=ITEMS, **shared)
    by_engine = files.read_table(f"{score(engine).path}/scores").to_pylist()
    spent = runs.read_run(config.output, job="score").counts["server"]
    assert spent["input_tokens"] == sum(row["prompt_tokens"] for row in by_engine) + 2 * by_engine[0]["prompt_tokens"]
    assert [row["completion"] for row in by_server] == [row["completion"] for row in by_engine]
    assert [row["ratings"] for row in by_server] == [row["ratings"] for row in by_engine]
    prompts = files.read_table(f"{config.output}/prompts", ["subject_id", "prompt_ids"]).to_pylist()
    model = AutoModelForCausalLM.from_pretrained(small_model_folder(), dtype=torch.float32)
    by_hand = {row["subject_id"]: forced_pace(model, row["prompt_ids"], tokenizer) for row in prompts[:4]}
    found = {row["subject_id"]: row["expected"][0] for row in by_server if row["subject_id"] in by_hand}
    assert found == pytest.approx(by_hand, abs=0.25)  # the server computes in bf16
