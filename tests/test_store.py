"""The score store: every hash once, whatever was retried or shared."""

import numpy as np

from raygr.aspects.store import ScoreStore, StoredScore, store_key


def answer(rating: int) -> StoredScore:
    return StoredScore(ratings=(rating, None), expected=(rating + 0.5, None), reason="some", completion="text")


def test_a_retried_batch_leaves_one_answer_per_hash(tmp_path):
    store = ScoreStore(str(tmp_path / "store"))
    assert store.hashes() == set()
    store.write(["a", "b"], [answer(1), answer(2)])
    store.write(["a", "b"], [answer(1), answer(2)])  # the actor was killed after it wrote
    store.write(["b", "c"], [answer(2), answer(3)])  # another run asked too
    table = store.read()
    assert sorted(table["prompt_sha256"].to_pylist()) == ["a", "b", "c"]
    row = next(row for row in table.to_pylist() if row["prompt_sha256"] == "c")
    assert row == {
        "prompt_sha256": "c",
        "ratings": [3, None],
        "expected": [3.5, None],
        "reason": "some",
        "completion": "text",
    }


def test_scores_from_probabilities_are_the_mode_and_the_mean():
    probabilities = np.zeros((2, 10))
    probabilities[0, [6, 9]] = 0.75, 0.25  # 7 and 10
    probabilities[1] = np.nan
    score = StoredScore.from_probabilities(probabilities)
    assert score.ratings == (7, None)
    assert score.expected == (7.75, None)
    assert score.reason == "not_finite"


def test_only_what_changes_an_answer_is_in_the_key():
    key = {"model": "m", "adapter": "", "mode": "probe", "temperature": 0.0, "seed": 0}
    assert store_key(**key) == store_key(**key | {"seed": 1})
    assert store_key(**key | {"mode": "generate", "temperature": 1.0}) != store_key(
        **key | {"mode": "generate", "temperature": 1.0, "seed": 1}
    )
    others = [{"model": "n"}, {"adapter": "x"}, {"mode": "generate"}]
    assert len({store_key(**key), *(store_key(**key | other) for other in others)}) == 4
