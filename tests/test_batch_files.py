"""Prompts go out as chat requests and answers come back into the store, every other line counted by its reason."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from toy_data import walks, write_prepared

from raygr import runs
from raygr.aspects.aspects import load_aspects
from raygr.aspects.batch_files import import_answers, write_requests
from raygr.aspects.store import ScoreStore
from raygr.cli import main
from raygr.config import ConfigError, ScoreConfig

ASPECTS = str(Path(__file__).parent.parent / "configs" / "aspects" / "movies.yaml")
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
    """JSON allows U+2028 and its like in a string, but str.splitlines and other readers end a line there."""
    odd = "a\u2028b\u2029c\x85d"
    message = {"messages": [{"role": "user", "content": odd}]}
    monkeypatch.setattr("raygr.aspects.batch_files.request_line", lambda row, settings, request: message)
    rows = [{"prompt_ids": [1], "shared_tokens": 0, "prompt_sha256": digest} for digest in "ab"]
    write_requests(pa.Table.from_pylist(rows), str(tmp_path / "p.jsonl"), settings=None, request=None)
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [message, message]


def test_answers_and_the_lines_left_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    path = write_lines(
        tmp_path / "a.jsonl", [answer_line("a", answer_text(7)), answer_line("b", None, status=500), "x"]
    )
    import_answers(path, ScoreStore(str(tmp_path / "store")), asked={"a", "b"}, names=NAMES)
    assert f"answers of {path}: 1 of 3 kept; left out: 1 failed, 1 not json" in caplog.messages


def test_every_line_is_filed_or_counted_by_its_reason(tmp_path: Path):
    store = ScoreStore(str(tmp_path / "store"))
    lines = [
        answer_line("a", answer_text(7)),
        answer_line("a", answer_text(3)),
        "",
        answer_line("b", None),  # refused
        answer_line("c", "story complexity: 11\npace: 4/10"),
        answer_line("d", answer_text(5), status=500),
        {"id": "b2", "custom_id": "d", "response": None, "error": {"message": "too long"}},
        answer_line("elsewhere", answer_text(5)),
        {"id": "b3"},
        '{"custom_id": "d", "resp',
        "[1]",
    ]
    path = write_lines(tmp_path / "answers.jsonl", lines)
    asked = {"a", "b", "c", "d"}
    assert import_answers(path, store, asked=asked, names=NAMES) == {
        "filed": 3, "repeated": 1, "failed": 2, "unknown_prompt": 1, "no_custom_id": 1, "not_json": 2
    }  # fmt: skip
    rows = {row["prompt_sha256"]: row for row in store.read().to_pylist()}
    assert rows.keys() == {"a", "b", "c"}
    assert rows["a"]["ratings"] == [7] * 12 and rows["a"]["expected"] == [7.0] * 12 and rows["a"]["reason"] == "ok"
    assert (rows["b"]["reason"], rows["b"]["completion"]) == ("no_aspect_read", "")
    assert rows["c"]["ratings"][:1] == [None] and rows["c"]["ratings"][NAMES.index("pace")] == 4
    assert rows["c"]["reason"] == "out_of_range"
    again = import_answers(path, store, asked=asked, names=NAMES)
    assert again["known_before"] == 4 and "filed" not in again
    with pytest.raises(ValueError, match=r"no line answers a prompt of this run .*unknown_prompt"):
        import_answers(path, store, asked={"other"}, names=NAMES)


@pytest.mark.parametrize("changes", [{"mode": "probe"}, {"mode": "generate"}])
def test_another_llm_needs_free_text(tmp_path: Path, changes: dict[str, Any]):
    from raygr.aspects.scoring import export_prompts, score

    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "items", "aspects": ASPECTS, **changes}
    with pytest.raises(ConfigError, match="set mode=generate and structured=false"):
        export_prompts(ScoreConfig(**shared), str(tmp_path / "requests.jsonl"))
    with pytest.raises(ConfigError, match="set mode=generate and structured=false"):
        score(ScoreConfig(**shared, answered_by="gpt-4o-mini"))
    assert not (tmp_path / "s").exists()


def test_another_llm_needs_a_name(tmp_path: Path):
    """Else its answers would be filed, and shown, as those of `model`."""
    from raygr.aspects.scoring import export_prompts, score

    data = write_prepared(tmp_path / "prepare", walks(2, 9, 5, seed=0), items=9)
    shared = {"output": str(tmp_path / "s"), "data": data, "subjects": "items", "aspects": ASPECTS}
    nameless = ScoreConfig(**shared, mode="generate", structured=False)
    answers = write_lines(tmp_path / "answers.jsonl", [answer_line("a", answer_text(7))])
    with pytest.raises(ConfigError, match=r"answered_by: not set, .* as those of smollm2: set it") as caught:
        score(nameless, answers=answers)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="answered_by: not set"):
        export_prompts(nameless, str(tmp_path / "r.jsonl"))
    assert not (tmp_path / "s").exists() and not (tmp_path / "r.jsonl").exists()


@pytest.mark.slow
def test_a_score_run_by_another_llm(tmp_path: Path, local_ray: Any, capsys: pytest.CaptureFixture):
    data = write_prepared(tmp_path / "prepare", walks(6, 9, 6, seed=0), items=9, ratings=[[1, 2, 3, 4, 5, 1]] * 6)
    requests, output = str(tmp_path / "requests.jsonl"), str(tmp_path / "scores")
    flags = [f"output={output}", f"data={data}", "subjects=users", f"aspects={ASPECTS}", "mode=generate"]
    flags += ["structured=false", "answered_by=gpt-4o-mini", "temperature=0.5"]
    command = ["score", *(word for flag in flags for word in ("--set", flag))]
    assert main([*command, "--export-prompts", requests]) == 0
    lines = [json.loads(line) for line in Path(requests).read_text().splitlines()]
    assert len(lines) == 6 and {line["method"] for line in lines} == {"POST"}
    assert lines[0]["body"].keys() == {"messages", "model", "max_tokens", "temperature"}
    assert (lines[0]["body"]["model"], lines[0]["body"]["temperature"]) == ("gpt-4o-mini", 0.5)
    system, user = lines[0]["body"]["messages"]
    assert system["content"].startswith("You are a movie recommender. ")
    assert user["content"].startswith("Here are some previous movie reviews of the user:\nreview 1: rating: 1.0\n")
    assert "at 3" in user["content"] and "at 4" not in user["content"]  # position 4 is validation
    assert "<|im_" not in user["content"] + system["content"]

    answers = write_lines(
        tmp_path / "first.jsonl", [answer_line(line["custom_id"], answer_text(9)) for line in lines[:4]]
    )
    assert main([*command, "--import-answers", answers]) == 2
    assert "2 prompts have no answer of gpt-4o-mini yet" in capsys.readouterr().err
    assert main([*command, "--export-prompts", requests]) == 0
    left = [json.loads(line)["custom_id"] for line in Path(requests).read_text().splitlines()]
    assert sorted(left) == sorted(line["custom_id"] for line in lines[4:])
    rest = write_lines(tmp_path / "rest.jsonl", [answer_line(custom_id, "no idea") for custom_id in left])
    assert main([*command, "--import-answers", rest]) == 0
    rows = runs.read_table(f"{output}/scores").to_pylist()
    assert sorted(row["reason"] for row in rows) == ["no_aspect_read"] * 2 + ["ok"] * 4
    assert {(row["model"], row["mode"]) for row in rows} == {("gpt-4o-mini", "generate-free")}
    record = runs.read_run(output, job="score")
    assert record["counts"]["answers"] == {"filed": 2} and rest in record["inputs"]
    assert record["counts"]["engine"]["subjects"] == 0
