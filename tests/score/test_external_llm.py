"""Prompts are exported as chat requests and answers imported into the store; other lines are counted by reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from toy_data import hashes, sha256, walks, write_prepared

from raygr import files, runs
from raygr.cli import main
from raygr.config import ConfigError
from raygr.score.aspects import load_aspects
from raygr.score.config import RequestConfig, ScoreConfig
from raygr.score.external_llm import (
    Request,
    import_answers,
    numbered,
    read_answer,
    request_line,
    write_file,
    write_requests,
)
from raygr.score.store import ScoreStore

ASPECTS = str(Path(__file__).parents[2] / "configs" / "aspects" / "movies.yaml")
NAMES = load_aspects(ASPECTS).names


def answer_text(rating: int) -> str:
    return "\n".join(f"{name}: {rating}" for name in NAMES)


def answer_line(custom_id: str, content: str | None, *, status: int = 200) -> dict[str, Any]:
    """A line of a batch service's output file."""
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    return {"id": "b1", "custom_id": custom_id, "response": {"status_code": status, "body": body}, "error": None}


def write_lines(path: Path, lines: list[Any]) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def test_a_request_is_one_line_for_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """JSON allows characters such as U+2028 in a string, but str.splitlines and other readers end a line there."""
    odd = "a\u2028b\u2029c\x85d"
    monkeypatch.setattr("raygr.score.external_llm.system_text", lambda aspects, subjects: odd)
    monkeypatch.setattr("raygr.score.external_llm.user_lead_in", lambda aspects, subjects: odd)
    tokenizer = SimpleNamespace(decode=lambda ids, clean_up_tokenization_spaces: odd)
    encoder = SimpleNamespace(subject_ids=lambda ids: ids, tokenizer=tokenizer)
    monkeypatch.setattr("raygr.score.external_llm.encoder_of", lambda settings: encoder)
    settings = SimpleNamespace(aspects=None, subjects=None)
    rows = [{"prompt_ids": [1], "shared_tokens": 0, "prompt_sha256": digest} for digest in "ab"]
    write_requests(pa.Table.from_pylist(rows), str(tmp_path / "p.jsonl"), settings=settings, request=request())
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    said = [[message["content"] for message in json.loads(line)["body"]["messages"]] for line in lines]
    assert said == [[odd, f"{odd}\n{odd}"]] * 2


def test_no_file_of_an_earlier_export_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the third file of a paid batch is still in the folder; the first two were moved away."""
    monkeypatch.setattr("raygr.score.external_llm.request_lines", lambda *given: iter(["a\n", "b\n", "c\n"]))
    (tmp_path / "p-3.jsonl").write_text("paid for")
    with pytest.raises(runs.RunError, match=r"p-3\.jsonl exists already"):
        write_requests(None, str(tmp_path / "p.jsonl"), settings=None, request=request(requests_per_file=1))
    assert (tmp_path / "p-3.jsonl").read_text() == "paid for"


def test_answers_and_the_lines_left_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    path = write_lines(
        tmp_path / "a.jsonl",
        [answer_line(sha256("a"), answer_text(7)), answer_line(sha256("b"), None, status=500), "x"],
    )
    import_answers([path], ScoreStore(str(tmp_path / "store")), asked_N=hashes("a", "b"), names=NAMES)
    assert f"answers of {path}: 1 of 3 kept; left out: 1 failed, 1 not json" in caplog.messages


def test_every_line_is_filed_or_counted_by_its_reason(tmp_path: Path):
    store = ScoreStore(str(tmp_path / "store"))
    lines = [
        answer_line(sha256("a"), answer_text(7)),
        answer_line(sha256("a"), answer_text(3)),
        "",
        answer_line(sha256("b"), None),  # refused
        answer_line(sha256("c"), "story complexity: 11\npace: 4/10"),
        answer_line(sha256("d"), answer_text(5), status=500),
        {"id": "b2", "custom_id": "d", "response": None, "error": {"message": "too long"}},
        answer_line(sha256("elsewhere"), answer_text(5)),
        {"id": "b3"},
        '{"custom_id": "d", "resp',
        "[1]",
    ]
    path = write_lines(tmp_path / "answers.jsonl", lines)
    asked_N = hashes("a", "b", "c", "d")
    assert import_answers([path], store, asked_N=asked_N, names=NAMES) == {
        "filed": 3, "repeated": 1, "failed": 2, "unknown_prompt": 1, "no_custom_id": 1, "not_json": 2
    }  # fmt: skip
    rows = {name: row for row in store.read().to_pylist() for name in "abc" if row["prompt_sha256"] == sha256(name)}
    assert rows.keys() == {"a", "b", "c"}
    assert rows["a"]["ratings"] == [7] * 12 and rows["a"]["expected"] == [7.0] * 12 and rows["a"]["reason"] == "ok"
    assert (rows["b"]["reason"], rows["b"]["completion"]) == ("no_aspect_read", "")
    assert rows["c"]["ratings"][:1] == [None] and rows["c"]["ratings"][NAMES.index("pace")] == 4
    assert rows["c"]["reason"] == "out_of_range"
    again = import_answers([path], store, asked_N=asked_N, names=NAMES)
    assert again["known_before"] == 4 and "filed" not in again
    with pytest.raises(ValueError, match=r"no line answers a prompt of this run .*unknown_prompt"):
        import_answers([path], store, asked_N=hashes("other"), names=NAMES)


OPENAI = {"id": "batch_req_1", "custom_id": "a", "error": None}


def openai_line(message: dict[str, Any], finish_reason: str = "stop", **choice: Any) -> dict[str, Any]:
    body = {"object": "chat.completion", "choices": [{"message": message, "finish_reason": finish_reason, **choice}]}
    return OPENAI | {"response": {"status_code": 200, "request_id": "r", "body": body}}


def anthropic_line(content: list[dict[str, Any]], stop_reason: str = "end_turn") -> dict[str, Any]:
    message = {"type": "message", "role": "assistant", "content": content, "stop_reason": stop_reason}
    return {"custom_id": "a", "result": {"type": "succeeded", "message": message}}


def gemini_line(candidate: dict[str, Any]) -> dict[str, Any]:
    return {"key": "a", "response": {"candidates": [candidate], "usageMetadata": {}, "modelVersion": "gemini"}}


THOUGHT, TEXT = {"type": "thinking", "thinking": "pace: 2?"}, {"type": "text", "text": "pace: 8"}


@pytest.mark.parametrize(
    ("line", "text", "is_cut"),
    [
        (openai_line({"role": "assistant", "content": "pace: 8", "refusal": None}), "pace: 8", False),
        (openai_line({"content": "pace: 8", "reasoning_content": "pace: 2?", "reasoning": "2"}), "pace: 8", False),
        (openai_line({"content": "pa"}, finish_reason="length", index=0), "pa", True),
        (openai_line({"content": None, "refusal": "No."}), "", False),
        (openai_line({"content": [{"type": "thinking", "thinking": [TEXT]}, TEXT]}), "pace: 8", False),  # Mistral
        (
            anthropic_line([THOUGHT, {"type": "text", "text": "pa"}, {"type": "text", "text": "ce: 8"}]),
            "pace: 8",
            False,
        ),
        (anthropic_line([TEXT], stop_reason="max_tokens"), "pace: 8", True),
        (anthropic_line([], stop_reason="refusal"), "", False),
        (
            gemini_line(
                {"content": {"parts": [{"text": "2?", "thought": True}, {"text": "pace: 8"}], "role": "model"}}
            ),
            "pace: 8",
            False,
        ),
        (gemini_line({"content": {"role": "model"}, "finishReason": "MAX_TOKENS"}), "", True),
        ({"key": "a", "response": {"promptFeedback": {"blockReason": "SAFETY"}}}, "", False),
    ],
)
def test_the_answers_of_several_services_are_read_without_their_reasoning(line, text, is_cut):
    assert read_answer(json.dumps(line)) == ("a", text, is_cut)


@pytest.mark.parametrize(
    "line",
    [
        OPENAI | {"response": {"status_code": 400, "body": {"error": {"message": "model"}}}},
        OPENAI | {"response": None, "error": {"code": "batch_expired", "message": "too late"}},
        {"custom_id": "a", "result": {"type": "errored", "error": {"type": "invalid_request_error"}}},
        {"custom_id": "a", "result": {"type": "expired"}},
        {"key": "a", "error": {"code": 400, "message": "bad"}},
        {"key": "a", "response": {"candidates": []}},
    ],
)
def test_a_request_that_failed_is_no_answer(line):
    assert read_answer(json.dumps(line)) == "failed"


def test_an_answer_that_was_cut_off_says_so_and_its_last_number_is_no_rating(tmp_path: Path):
    store = ScoreStore(str(tmp_path / "store"))
    texts = {"a": "wit: 7\npace: 1", "b": "wit: 7\npace: 1\nThese ratings rest on", "c": "<think>Well"}
    lines = [openai_line({"content": text}, "length") | {"custom_id": sha256(name)} for name, text in texts.items()]
    import_answers([write_lines(tmp_path / "a.jsonl", lines)], store, asked_N=hashes(*texts), names=("wit", "pace"))
    rows = {row["prompt_sha256"]: (row["ratings"], row["reason"]) for row in store.read().to_pylist()}
    expected = {"a": ([7, None], "length"), "b": ([7, 1], "ok"), "c": ([None, None], "length")}
    assert rows == {sha256(name): row for name, row in expected.items()}


def test_a_better_answer_replaces_what_nothing_was_read_of(tmp_path: Path):
    store = ScoreStore(str(tmp_path / "store"))
    poor = write_lines(tmp_path / "a.jsonl", [answer_line(sha256("a"), None), answer_line(sha256("b"), "wit: 4")])
    good = write_lines(tmp_path / "b.jsonl", [answer_line(sha256(name), "wit: 6\npace: 8") for name in "ab"])
    names, asked_N = ("wit", "pace"), hashes("a", "b")
    assert import_answers([poor], store, asked_N=asked_N, names=names) == {"filed": 2}
    assert store.answered(asked_N, unread=False).tolist() == [False, True]
    assert import_answers([good], store, asked_N=asked_N, names=names) == {"filed": 2}
    assert import_answers([poor, good], store, asked_N=asked_N, names=names) == {"known_before": 4}
    assert {tuple(row["ratings"]) for row in store.read().to_pylist()} == {(6, 8)}


def request(**layout: Any) -> Request:
    return Request(model="big", max_tokens=90, temperature=0.5, layout=RequestConfig(**layout))


def test_a_request_has_the_layout_of_its_service():
    chat = [{"role": "system", "content": "Rate."}, {"role": "user", "content": "A film"}]
    body = {"model": "big", "messages": chat, "temperature": 0.5}
    openai = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    assert request_line("a", "Rate.", "A film", request()) == openai | {"body": body | {"max_completion_tokens": 90}}
    older = request(token_limit="max_tokens", url="/chat", body={"model": "other"})
    assert request_line("a", "Rate.", "A film", older) == openai | {
        "url": "/chat", "body": body | {"model": "other", "max_tokens": 90}
    }  # fmt: skip
    mistral = request_line("a", "Rate.", "A film", request(api="mistral"))
    assert mistral == {"custom_id": "a", "body": body | {"max_tokens": 90}}
    anthropic = request_line("a", "Rate.", "A film", request(api="anthropic")._replace(temperature=None))
    params = {"model": "big", "system": "Rate.", "messages": chat[1:], "max_tokens": 90}
    assert anthropic == {"custom_id": "a", "params": params}
    assert request_line("a", "Rate.", "A film", request(api="gemini")) == {
        "key": "a",
        "request": {
            "system_instruction": {"parts": [{"text": "Rate."}]},
            "contents": [{"role": "user", "parts": [{"text": "A film"}]}],
            "generation_config": {"temperature": 0.5, "maxOutputTokens": 90},
        },
    }


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [({"requests_per_file": 2}, [2, 2, 1]), ({"megabytes_per_file": 25e-6}, [2, 2, 1]), ({}, [5])],
)
def test_batches_are_split_at_the_limits_of_a_service(tmp_path: Path, limits: dict[str, Any], sizes: list[int]):
    lines = iter([f'{{"line": {number}}}\n' for number in range(5)])  # 12 bytes each
    path, line, written = str(tmp_path / "r.v1.jsonl"), next(lines), []
    while line is not None:
        line = write_file(numbered(path, len(written) + 1), line, lines, RequestConfig(**limits))
        written.append(Path(numbered(path, len(written) + 1)).read_text().splitlines())
    assert [len(one) for one in written] == sizes
    assert [json.loads(text)["line"] for one in written for text in one] == list(range(5))
    assert sorted(path.name for path in tmp_path.iterdir())[0] == ("r-2.v1.jsonl" if len(sizes) > 1 else "r.v1.jsonl")


@pytest.mark.parametrize("changes", [{"mode": "probe"}, {"mode": "generate"}])
def test_another_llm_needs_free_text(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="set mode: generate and structured: false"):
        ScoreConfig(output="s", data="d", subjects="items", aspects="a", answered_by="gpt-4o-mini", **changes)


def test_another_llm_needs_a_name(tmp_path: Path):
    """Without a name, the answers would be stored and shown as those of `llm`."""
    from raygr.score.stage import export_prompts, score

    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "items", "aspects": ASPECTS}
    nameless = ScoreConfig(**shared, mode="generate", structured=False)
    answers = write_lines(tmp_path / "answers.jsonl", [answer_line(sha256("a"), answer_text(7))])
    with pytest.raises(ConfigError, match=r"answered_by: not set, .* as those of smollm2: set it") as caught:
        score(nameless, answers=[answers])
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="answered_by: not set"):
        export_prompts(nameless, str(tmp_path / "r.jsonl"))
    assert not (tmp_path / "s").exists() and not (tmp_path / "r.jsonl").exists()


@pytest.mark.slow
def test_a_score_run_by_another_llm(tmp_path: Path, capsys: pytest.CaptureFixture):
    data = write_prepared(tmp_path / "prepare", walks(6, 9, 6, seed=0), items=9, ratings=[[1, 2, 3, 4, 5, 1]] * 6)
    requests, output = str(tmp_path / "requests.jsonl"), str(tmp_path / "scores")
    flags = [f"output={output}", f"data={data}", "subjects=users", f"aspects={ASPECTS}", "mode=generate"]
    flags += ["structured=false", "answered_by=gpt-4o-mini", "temperature=0.5"]
    command = ["score", *(word for flag in flags for word in ("--set", flag))]
    assert main([*command, "--export-prompts", requests]) == 0
    lines = [json.loads(line) for line in Path(requests).read_text().splitlines()]
    assert len(lines) == 6 and {line["method"] for line in lines} == {"POST"}
    assert lines[0]["body"].keys() == {"messages", "model", "max_completion_tokens", "temperature"}
    assert (lines[0]["body"]["model"], lines[0]["body"]["temperature"]) == ("gpt-4o-mini", 0.5)
    system, user = lines[0]["body"]["messages"]
    assert system["content"].startswith("You are a movie recommender. ")
    assert user["content"].startswith("Here are some previous movie reviews of the user:\nreview 1: rating: 1.0\n")
    assert "at 3" in user["content"] and "at 4" not in user["content"]  # position 4 is validation
    assert "<|im_" not in user["content"] + system["content"]

    ids = [line["custom_id"] for line in lines]
    answers = write_lines(tmp_path / "first.jsonl", [answer_line(one, answer_text(9)) for one in ids[:3]])
    refused = write_lines(tmp_path / "refused.jsonl", [answer_line(ids[3], None)])
    assert main([*command, "--import-answers", answers, refused]) == 2
    assert "2 prompts have no answer of gpt-4o-mini yet" in capsys.readouterr().err
    smaller = [*command, "--set", "requests.requests_per_file=2", "--set", "requests.service_model=big"]
    assert main([*smaller, "--export-prompts", requests]) == 2
    assert f"{requests} exists already" in capsys.readouterr().err
    assert main([*smaller, "--export-prompts", str(tmp_path / "left.jsonl")]) == 0
    paths = capsys.readouterr().out.split()
    assert paths == [str(tmp_path / "left.jsonl"), str(tmp_path / "left-2.jsonl")]
    left = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    assert sorted(line["custom_id"] for line in left) == sorted(ids[3:])  # the refused one among them
    assert {line["body"]["model"] for line in left} == {"big"}
    rest = write_lines(
        tmp_path / "rest.jsonl",
        [answer_line(ids[3], answer_text(2)), *(answer_line(one, "no idea") for one in ids[4:])],
    )
    assert main([*smaller, "--import-answers", rest]) == 0
    rows = files.read_table(f"{output}/scores").to_pylist()
    assert sorted(row["reason"] for row in rows) == ["no_aspect_read"] * 2 + ["ok"] * 4
    assert {(row["model"], row["mode"]) for row in rows} == {("gpt-4o-mini", "generate-free")}
    record = runs.read_run(output, job="score")
    assert record.counts["answers"] == {"filed": 3} and rest in record.inputs
    assert record.counts["engine"]["subjects"] == 0
    assert [path.name.split("-")[0] for path in Path(output, "store").glob("*/*")] == ["compacted"]
