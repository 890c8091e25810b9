"""`raygr aspects check`: weak aspects by their words, their prompt and their scores."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_data import cycles, write_prepared

from raygr import schema
from raygr.cli import main
from raygr.score.aspect_checks import score_lines, word_problems
from raygr.score.aspects import Aspect, load_aspects

SHIPPED = sorted((Path(__file__).parents[2] / "configs/aspects").glob("*.yaml"))
GAMES = next(str(path) for path in SHIPPED if path.name == "games.yaml")


def aspect(name: str, description: str = "From nothing to all (e.g., 1 for nothing, 10 for all).") -> Aspect:
    return Aspect(name=name, description=description)


@pytest.mark.parametrize(
    ("aspects", "expected"),
    [
        ([aspect("pace", "Slow or fast."), aspect("luck")],
         ["pace: a description of 3 words is short", "pace: does not say what 1 and what 10 means"]),
        ([aspect("pace", "From 1 for slow to fast")], ["pace: does not say what 10 means"]),
        ([aspect("pace", "Word " * 39 + "from 1 to 10")], ["pace: a description of 43 words is long"]),
        ([aspect("tension level", "Calm vs. tense (1 for calm, 10 for tense)."), aspect("tension levels")],
         ["tension level and tension levels: much the same name"]),
        ([aspect("pace", "Slow or quick rhythm (e.g., 1 for slow, 10 for quick)."),
          aspect("speed", "Quick or slow rhythm of play (e.g., 1 for slow, 10 for quick).")],
         ["pace and speed: much the same description"]),
    ],
)  # fmt: skip
def test_weak_words_are_named(aspects, expected):
    found = word_problems(aspects)
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_aspects_say_different_things(path: Path):
    assert not [line for line in word_problems(load_aspects(str(path)).aspects) if "much the same" in line]


def write_scores(folder: Path, names: tuple[str, ...], scores_SA: np.ndarray) -> str:
    rows = [
        dict.fromkeys(schema.SCORE_SCHEMA.names)
        | {"subject_id": f"i{n}", "reason": "ok"}
        | {"expected": row.tolist(), "ratings": np.rint(row).astype(int).tolist()}
        for n, row in enumerate(scores_SA)
    ]
    (folder / "scores").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.score_schema(names)), folder / "scores/part-0.parquet")
    record = {"job": "score", "config": {"output": str(folder), "subjects": "items"}, "inputs": {}}
    (folder / "run.json").write_text(json.dumps(record))
    return str(folder)


def test_scores_show_dead_aspects_and_those_that_say_the_same(tmp_path: Path):
    aspects = load_aspects(GAMES)
    scores_SA = np.random.default_rng(0).uniform(1, 10, (60, 12))
    scores_SA[:, 2] = 5.01
    scores_SA[:, 5] = 8 - scores_SA[:, 3] / 2  # the opposite, less wide
    scores_SA[:, 8] = 4 + scores_SA[:, 7] / 4  # the same, less wide
    lines = score_lines(aspects, write_scores(tmp_path / "run", aspects.names, scores_SA))
    names = aspects.names
    assert lines[1:4] == [
        f"{names[2]}: dead, the same for nearly all (standard deviation 0.00 of 1..10)",
        f"{names[3]} and {names[5]}: rank correlation -1.00, one of them is enough",
        f"{names[7]} and {names[8]}: rank correlation +1.00, one of them is enough",
    ]
    assert lines[4] == f"drop: {names[2]}, {names[5]}, {names[8]}"
    kept = [name for place, name in enumerate(names) if place not in (2, 5, 8)]
    assert lines[5].endswith("aspect_names: [" + ", ".join(map(repr, kept)) + "]")
    other = write_scores(tmp_path / "other", ("pace",), scores_SA[:, :1])
    assert "has scores of other aspects: pace" in score_lines(aspects, other)[0]


def test_the_prompt_is_shown_with_its_tokens(tmp_path: Path, tokenizer, capsys):
    write_prepared(tmp_path / "prepare", cycles(6, 8, 4), items=8)
    assert main(["aspects", "check", GAMES, "--data", str(tmp_path / "prepare")]) == 0
    said = capsys.readouterr().out
    assert f"{GAMES}: 12 aspects of games" in said and "prompts of 8 items: " in said
    assert '"story depth": ' in said or "story depth" in said.partition("===")[2]
    assert main(["aspects", "check", str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml: no such configuration file" in capsys.readouterr().err
