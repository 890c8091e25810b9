"""Explanations: the split against the model's own score and worked by hand, files, errors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_run import random_run
from toy_data import random_scores, walks, write_csv, write_prepared, write_score_run

from raygr import files, runs
from raygr.cli import main
from raygr.explain.explanation import explain_item
from raygr.explain.sentences import UserExplanation, sentence
from raygr.recommend import recommender as recommender_module
from raygr.recommend.recommender import Recommender, load_recommender
from raygr.train.config import TrainConfig

torch.set_num_threads(1)

USERS, ITEMS, LENGTH, WINDOW = 12, 20, 8, 5
ASPECTS = ["pace", "mood", "movie length (duration)"]
HISTORIES = walks(USERS, ITEMS, LENGTH, seed=7)
RATINGS = (np.random.default_rng(1).integers(1, 6, size=(USERS, LENGTH)) * 1.0).tolist()
SCORES_IA = random_scores(ITEMS, 3, seed=3)
USERS_UA = np.random.default_rng(5).uniform(1, 10, size=(USERS, 3)).astype(np.float32)
MODELS = {
    "gru4rec": {"model": "gru4rec"},
    "gru4rec+": {"model": "gru4rec", "loss": "bpr_max", "negatives": 4, "final_activation": "elu-0.5"},
    "sasrec": {"model": "sasrec"},
    "bert4rec": {"model": "bert4rec"},
}
PROFILE = {"user_scores": "profile", "user_side": "add"}
STATE = {"user_scores": "history", "user_side": "learned"}
CONCAT = {"fusion": "concat", "base_width": 7, "guided_weight": 2.0}  # 7 + 3 aspects: a multiple of the heads


def trained(folder: Path, **changes: Any) -> str:
    """A finished train run of a model with random weights, whose learned maps are not 0."""
    data = str(folder / "prepare")
    if not runs.is_finished(data):
        write_prepared(folder / "prepare", HISTORIES, items=ITEMS, ratings=RATINGS)
        write_csv(folder / "s.csv", {f"i{i + 1}": row.tolist() for i, row in enumerate(SCORES_IA)}, ASPECTS)
        users = {f"u{u}": row.tolist() for u, row in enumerate(USERS_UA[:-1])}  # the last one was not scored
        write_score_run(
            folder / "users",
            users,
            aspects=ASPECTS,
            cutoffs=dict.fromkeys(users, LENGTH - 3),
            data=str(folder / "prepare"),
        )
    output = folder / f"train-{len(list(folder.glob('train-*')))}"
    settings = {"item_scores": str(folder / "s.csv"), "fusion": "add", "user_scores": "none"}
    settings |= {"base_width": 8, "max_history": WINDOW} | changes
    return random_run(TrainConfig(output=str(output), data=data, **settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    return trained(folder, **PROFILE)


@pytest.fixture(scope="module")
def recommender(run: str) -> Recommender:
    return load_recommender(run)


def own_scores(recommender: Recommender, user: int, history: list[int]) -> torch.Tensor:
    """The model's scores of items 1..I after one history alone, without the split."""
    model, window = recommender.model, history[-WINDOW:]
    embedding, guided_1A = model.embedding, None
    if embedding.has_user_side:
        guided_1A = embedding.tuned_users(embedding.users_UA[user][None], torch.tensor([user]))
    with torch.inference_mode():
        rows_ID = embedding.item_rows()
        state_1D = model.encode(rows_ID, torch.tensor([window]), torch.tensor([len(window)]))
        if embedding.state is not None:
            rating_1L = torch.tensor([RATINGS[user][: len(history)][-WINDOW:]])
            asked = (torch.tensor([window]), torch.tensor([len(window)]), rating_1L)
            guided_1A = embedding.state.at_end(embedding.standard_rows(), *asked, None)
        guided_11A = None if guided_1A is None else guided_1A[:, None]
        return embedding.refined_state(state_1D[:, None], guided_11A)[0, 0] @ rows_ID.T


def summed(user: UserExplanation) -> float:
    own = sum(term.encoder_term + term.user_term for term in user.terms)
    return user.base_part + own + user.other_encoder_terms + user.other_user_terms


def check_adds_up(recommender: Recommender) -> list[UserExplanation]:
    """Checks three items for user 0: item 6 (test interaction), item 4 (train interaction) and an unseen item."""
    found = []
    for user, at in ((0, LENGTH - 1), (1, 4), (2, None)):
        history = HISTORIES[user] if at is None else HISTORIES[user][:at]
        item = min(set(range(1, ITEMS + 1)) - set(history)) if at is None else HISTORIES[user][at]
        scores_I = own_scores(recommender, user, history)
        [one] = explain_item(recommender, f"i{item}", [f"u{user}"]).users
        assert one.score == pytest.approx(float(scores_I[item - 1]), rel=1e-5, abs=1e-6)
        assert summed(one) == pytest.approx(float(scores_I[item - 1]), rel=1e-5, abs=1e-5)
        better = sum(scores_I[other - 1] > scores_I[item - 1] for other in range(1, ITEMS + 1) if other not in history)
        assert (one.rank, one.ranked, one.history) == (better + 1, ITEMS - len(history), len(history))
        assert one.part == {LENGTH - 1: "test", 4: "train", None: None}[at]
        assert one.spread == pytest.approx(float(np.std(scores_I.numpy())), rel=1e-5)
        assert one.rating == (None if at is None else RATINGS[user][at])
        found.append(one)
    return found


@pytest.mark.parametrize("sides", [{}, PROFILE, STATE], ids=["items", "items and users", "guided state"])
@pytest.mark.parametrize("fusion", [{}, CONCAT], ids=["add", "concat"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parts_add_up_to_the_models_own_score(folder: Path, model: dict, fusion: dict, sides: dict):
    found = check_adds_up(load_recommender(trained(folder, **model, **fusion, **sides)))
    terms = [term for user in found for term in user.terms]
    assert len(terms) == 3 * len(ASPECTS) and all(term.encoder_term for term in terms)
    assert all(bool(term.user_term) == bool(sides) for term in terms)


@pytest.mark.parametrize(
    "changes",
    [
        {**CONCAT, **PROFILE, "user_side": "concat"},
        {**CONCAT, **PROFILE, "linear_map": True},
        {**PROFILE, "add_map": "linear", "train_user_guided": True},
        {"user_scores": "llm", "user_score_run": "users", "user_side": "add"},
        {**STATE, "fusion": "none"},
    ],
    ids=["9b", "linear map", "trained users", "llm", "guided state alone"],
)
def test_parts_add_up_in_every_other_form(folder: Path, changes: dict):
    trained(folder)  # writes users
    paths = {"user_score_run": str(folder / "users")} if "user_score_run" in changes else {}
    found = check_adds_up(load_recommender(trained(folder, **changes | paths)))
    assert all(term.encoder_term or term.user_term for user in found for term in user.terms)


def test_a_term_of_the_guided_state_is_what_the_user_looks_for_times_the_standardised_score(folder: Path):
    recommender, item = load_recommender(trained(folder, **STATE)), HISTORIES[3][6]
    [found] = explain_item(recommender, f"i{item}", ["u3"]).users
    standard_A = (SCORES_IA[item - 1] - SCORES_IA.mean(0)) / SCORES_IA.std(0)
    assert found.base_moved > 0  # `fusion: add` lets the encoder read aspects, too
    for term, standard in zip(found.terms, standard_A, strict=True):
        assert term.looks_for and term.user_term == pytest.approx(term.looks_for * standard, rel=1e-4)


def test_the_sentence_says_what_the_user_looks_for_and_that_no_aspect_is_in_the_base_part(folder: Path):
    recommender = load_recommender(trained(folder, **STATE, fusion="none"))
    [found] = explain_item(recommender, f"i{HISTORIES[3][6]}", ["u3"]).users
    assert found.base_moved == 0 and found.base_part == pytest.approx(found.base_part_at_mean, rel=1e-5)
    looks_for = {term.aspect: term.looks_for for term in found.terms}
    most, least = max(looks_for, key=looks_for.get), min(looks_for, key=looks_for.get)
    said = sentence("title", found)
    assert said.endswith("The base part depends on no aspect.")
    is_sought, is_avoided = (found.speaks(value) for value in (max(looks_for[most], 0), min(looks_for[least], 0)))
    assert (f"looks for {most} most ({looks_for[most]:+.2f} a deviation)" in said) == is_sought
    assert (f"avoids {least} most ({looks_for[least]:+.2f})" in said) == is_avoided


def test_terms_worked_by_hand(recommender: Recommender):
    """`add` with levels: weights fall by a half per level away from the score, and the user's part meets whole rows."""
    user, item = 3, HISTORIES[3][6]
    embedding, weights = recommender.model.embedding, recommender.model.state_dict()
    history = HISTORIES[user][:6][-WINDOW:]
    with torch.inference_mode():
        rows_ID = embedding.item_rows()
        state_D = recommender.model.encode(rows_ID, torch.tensor([history]), torch.tensor([WINDOW]))[0]
    [found] = explain_item(recommender, f"i{item}", [f"u{user}"]).users
    for aspect, term in enumerate(found.terms):
        expected = 0.0
        for level in range(1, 11):
            weight = max(0.0, 1 - abs(SCORES_IA[item - 1, aspect] - level) / 2)
            expected += weight * float(state_D @ weights["embedding.item_map_FD"][10 * aspect + level - 1])
        assert term.encoder_term == pytest.approx(expected, rel=1e-4, abs=1e-6)
        pull_D = embedding.users_UA[user, aspect] * weights["embedding.user_map_AD"][aspect]
        assert term.user_term == pytest.approx(float(pull_D @ rows_ID[item - 1]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "changes", [{}, {**CONCAT, **PROFILE}, {"model": "bert4rec"}], ids=["add", "concat", "bert4rec"]
)
def test_the_base_part_depends_on_what_the_encoder_reads(folder: Path, changes: dict):
    """Expected, without the split: states of a history with the catalogue's mean aspects, times learned rows."""
    recommender = load_recommender(trained(folder, **changes))
    model, history = recommender.model, HISTORIES[3][:6][-WINDOW:]
    embedding = model.embedding
    with torch.inference_mode():
        rows_ID = embedding.item_rows()
        learned_ID = embedding.base_ID
        if changes.get("fusion") == "concat":
            learned_ID = torch.cat([learned_ID, torch.zeros(ITEMS, len(ASPECTS))], dim=1)
        plain_ID = learned_ID + (rows_ID - learned_ID).mean(0)
        base_I, plain_I = (
            model.encode(rows, torch.tensor([history]), torch.tensor([WINDOW]))[0] @ learned_ID.T
            for rows in (rows_ID, plain_ID)
        )
    item = HISTORIES[3][6]
    [found] = explain_item(recommender, f"i{item}", ["u3"]).users
    assert found.base_part == pytest.approx(float(base_I[item - 1]), rel=1e-4, abs=1e-5)
    assert found.base_part_at_mean == pytest.approx(float(plain_I[item - 1]), rel=1e-4, abs=1e-5)
    change_I = (plain_I - base_I) - (plain_I - base_I).mean()
    assert found.base_moved == pytest.approx(float(change_I.norm() / (base_I - base_I.mean()).norm()), rel=1e-4)
    assert found.base_moved > 0.01
    assert files.read_json(f"{recommender.config.output}/metrics.json")["base_moved"] > 0.01


def test_concat_terms_are_products_of_one_dimension_each(folder: Path):
    recommender = load_recommender(trained(folder, **CONCAT, **PROFILE))
    user, item = 3, HISTORIES[3][7]
    state_D = recommender.states(recommender.up_to(np.array([user]), np.array([user * LENGTH + 7])))[0]
    [found] = explain_item(recommender, f"i{item}", [f"u{user}"]).users
    products = (state_D * recommender.rows_ID[item - 1])[CONCAT["base_width"] :].tolist()
    assert [term.encoder_term + term.user_term for term in found.terms] == pytest.approx(products, rel=1e-4)
    # standardised scores average to 0 over the catalogue, and so do their terms
    assert [term.average_term for term in found.terms] == pytest.approx([0.0] * 3, abs=1e-6)


def test_average_terms_are_those_of_a_loop_over_all_items(recommender: Recommender, monkeypatch: pytest.MonkeyPatch):
    histories = recommender.up_to(np.array([2]), np.array([2 * LENGTH + 7]))
    monkeypatch.setattr(recommender_module, "ITEMS_AT_ONCE", 7)
    [found] = explain_item(recommender, f"i{HISTORIES[2][7]}", ["u2"]).users
    each = [recommender.split_scores(histories, torch.tensor([item])) for item in range(1, ITEMS + 1)]
    for aspect, term in enumerate(found.terms):
        values = [float(parts.encoder_BCA[0, 0, aspect] + parts.user_BCA[0, 0, aspect]) for parts in each]
        assert term.average_term == pytest.approx(np.mean(values), rel=1e-4)
        assert term.lift() == pytest.approx(values[HISTORIES[2][7] - 1] - np.mean(values), rel=1e-3, abs=1e-5)


def test_aspects_that_are_not_picked_are_one_sum(recommender: Recommender):
    whole, part = (
        explain_item(recommender, "i3", ["u0", "u1"], aspects=aspects).users for aspects in (None, ["mood", "pace"])
    )
    for full, picked in zip(whole, part, strict=True):
        assert [term.aspect for term in picked.terms] == ["mood", "pace"] and picked.other_aspects == 1
        assert (picked.terms[1], picked.terms[0]) == full.terms[:2]
        hidden, others = (
            full.terms[2],
            (picked.other_encoder_terms, picked.other_user_terms, picked.other_average_terms),
        )
        assert others == (hidden.encoder_term, hidden.user_term, hidden.average_term)
        assert summed(picked) == pytest.approx(full.score, rel=1e-5)


def test_the_llms_values_are_shown_as_they_are(folder: Path):
    trained(folder)
    settings = {"user_scores": "llm", "user_score_run": str(folder / "users"), "user_side": "add"}
    recommender = load_recommender(trained(folder, **settings))
    explanation = explain_item(recommender, "i3", ["u4", "u2"])
    assert [[term.user_value for term in user.terms] for user in explanation.users] == USERS_UA[[4, 2]].tolist()
    assert "LLM" in explanation.user_values
    for term, item_value in zip(explanation.users[0].terms, SCORES_IA[2], strict=True):
        assert term.item_value == item_value and term.gap == item_value - term.user_value
    with pytest.raises(ValueError, match=r"user u11 has no values to compare with item i3.*LLM"):
        explain_item(recommender, "i3", ["u11"])


def test_the_command_writes_figure_json_and_sentences(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--set", "item=i3", "--set", "users=[u0, u1]", "--set", "aspect_names=[movie length (duration), pace]"]
    assert main(["explain", *flags, "--set", f"train_run={run}", "--set", f"output={tmp_path}/a"]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/a"
    found = json.loads((tmp_path / "a" / "explanation.json").read_text())
    assert (found["item_id"], found["title"], found["chosen"]) == ("i3", "title 3", "item and users as given")
    for number, user in enumerate(found["users"]):
        assert user["user_id"] == f"u{number}"
        assert [term["aspect"] for term in user["terms"]] == ["movie length (duration)", "pace"]
        assert [term["item_value"] for term in user["terms"]] == SCORES_IA[2, [2, 0]].tolist()
        parts = [term[name] for term in user["terms"] for name in ("encoder_term", "user_term")]
        parts += [user["base_part"], user["other_encoder_terms"], user["other_user_terms"]]
        assert sum(parts) == pytest.approx(user["score"], rel=1e-5, abs=1e-5)
    assert [text.split()[0] for text in found["sentences"]] == ["u0", "u1"]
    assert (tmp_path / "a" / "explanation.png").read_bytes().startswith(b"\x89PNG")
    drawing = (tmp_path / "a" / "explanation.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    assert {"movie length (duration)", "pace", "1 other aspects", "item i3: title 3"} <= set(texts)
    first = found["users"][0]
    for term in first["terms"]:
        assert f"{term['gap']:+z.1f}" in texts and f"{term['level']} {term['user_value']:.1f}" in texts
    assert any(text.startswith("u0: ") and f"score {first['score']:.2f} =" in text for text in texts)


def test_a_picked_case_is_the_same_every_time(recommender: Recommender, run: str, tmp_path: Path):
    first = explain_item(recommender)
    assert first == explain_item(recommender)
    high, low = first.users
    assert high.rating > low.rating and "train" not in (high.part, low.part)
    assert "held-out" in first.chosen
    for name in ("a", "b"):
        assert main(["explain", "--set", f"train_run={run}", "--set", f"output={tmp_path}/{name}"]) == 0
    for kind in ("json", "svg", "png"):
        assert (tmp_path / f"a/explanation.{kind}").read_bytes() == (tmp_path / f"b/explanation.{kind}").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["item=nothing"], "has no item nothing (1 unknown, 20 known items)"),
        (["item=i3", "users=[nobody]"], "has no user nobody (1 unknown, 12 known users)"),
        (["aspect_names=[paste]"], "no aspect paste; the model has: pace, mood, movie length (duration)"),
        ([f"item=i{HISTORIES[4][0]}", "users=[u4]"], "is the first of user u4"),
    ],
)
def test_what_is_wrong_is_one_line(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags, message):
    assert (
        main(
            [
                "explain",
                *[word for one in flags for word in ("--set", one)],
                "--set",
                f"train_run={run}",
                "--set",
                f"output={tmp_path}/a",
            ]
        )
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and said[-1].startswith("raygr explain: ")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_scores": None, "fusion": "none", "user_scores": "history"}, "is a base model without aspects"),
        ({"control": "shuffled"}, r"is a control arm \(shuffled\)"),
        (PROFILE | {"user_control": "shuffled"}, "user vectors are not those of its users"),
    ],
)
def test_models_without_values_of_their_items_are_refused(folder: Path, changes: dict, message: str):
    trained(folder)
    with pytest.raises(ValueError, match=message):
        explain_item(load_recommender(trained(folder, **changes)), "i3", ["u1"])


def test_vectors_and_missing_scores_are_refused(folder: Path):
    trained(folder)
    vectors = {f"i{i + 1}": (row - 6).tolist() for i, row in enumerate(SCORES_IA)}
    path = write_csv(folder / "vectors.csv", vectors, ASPECTS)
    with pytest.raises(ValueError, match=r"vectors\.csv has values from -5 to 4: only scores on 1\.\.10"):
        explain_item(load_recommender(trained(folder, item_scores=path)), "i3", ["u1"])
    some = {f"i{i + 1}": row.tolist() for i, row in enumerate(SCORES_IA) if i != 2}
    recommender = load_recommender(trained(folder, item_scores=write_csv(folder / "some.csv", some, ASPECTS)))
    for users in (["u1"], []):
        with pytest.raises(ValueError, match=r"item i3 lacks a score in .*some\.csv"):
            explain_item(recommender, "i3", users)
    assert explain_item(recommender, "i4", ["u1"]).item_id == "i4"
