"""The simulated shop: raw format, equal bytes, and the effects of popularity, nearness and tastes."""

import csv
import gzip
import json

import numpy as np
import pytest

from raygr.config import ConfigError
from raygr.metrics.z_scores import standardise
from raygr.runs import is_finished
from raygr.simulate.config import SimulateConfig
from raygr.simulate.review_texts import ASPECT_PHRASES, explaining_aspects, review_text
from raygr.simulate.stage import (
    CATALOGUE,
    LONGEST,
    SHORTEST,
    Films,
    draw_films,
    draw_popularity,
    draw_purchases,
    draw_tastes,
    nearness,
    read_films,
    select_aspects,
    simulate,
    write_shop,
)

SHOPPERS = 40


@pytest.fixture(scope="module")
def films() -> Films:
    """Sixty films with random scores."""
    scores_IA = np.random.default_rng(7).integers(1, 11, size=(60, len(ASPECT_PHRASES)))
    ids = [f"T{number:03d}" for number in range(60)]
    titles = [f"Film {number}" for number in range(60)]
    return Films(ids, titles, ["1999"] * 60, [["Drama", "War"]] * 60, ["A plot."] * 60, list(ASPECT_PHRASES), scores_IA)


@pytest.fixture(scope="module")
def shop(films, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    write_shop(str(folder), films, shoppers=SHOPPERS, seed=3)
    return folder


def read_lines(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_records_have_the_fields_of_amazon_reviews_2023(shop):
    review, item = read_lines(shop / "reviews.jsonl.gz")[0], read_lines(shop / "meta.jsonl.gz")[0]
    assert " ".join(review) == (
        "rating title text images asin parent_asin user_id timestamp helpful_vote verified_purchase"
    )
    assert " ".join(item) == (
        "main_category title average_rating rating_number features description price images videos store "
        "categories details parent_asin bought_together"
    )
    assert item["title"] == "Film 0 (1999)" and item["details"] == {"Release year": "1999"}
    assert item["categories"] == ["Drama", "War"] and item["description"] == ["A plot."]


def test_shoppers_buy_different_films_in_order(shop):
    histories: dict[str, list[dict]] = {}
    for review in read_lines(shop / "reviews.jsonl.gz"):
        histories.setdefault(review["user_id"], []).append(review)
    assert len(histories) == SHOPPERS
    for history in histories.values():
        assert SHORTEST <= len(history) <= LONGEST
        assert len({review["parent_asin"] for review in history}) == len(history)
        times = [review["timestamp"] for review in history]
        assert times == sorted(set(times)) and 1_500_000_000_000 < times[0] < 1_900_000_000_000
        assert {review["rating"] for review in history} <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_item_averages_are_those_of_the_reviews(shop):
    ratings: dict[str, list[float]] = {}
    for review in read_lines(shop / "reviews.jsonl.gz"):
        ratings.setdefault(review["parent_asin"], []).append(review["rating"])
    for item in read_lines(shop / "meta.jsonl.gz"):
        own = ratings.get(item["parent_asin"], [])
        assert item["rating_number"] == len(own)
        assert item["average_rating"] == (pytest.approx(np.mean(own), abs=0.051) if own else None)


def test_equal_seeds_give_equal_bytes_and_others_do_not(films, shop, tmp_path):
    names = ["reviews.jsonl.gz", "meta.jsonl.gz", "item_scores.csv", "tastes.csv"]
    write_shop(str(tmp_path / "again"), films, shoppers=SHOPPERS, seed=3)
    write_shop(str(tmp_path / "other"), films, shoppers=SHOPPERS, seed=4)
    assert [(tmp_path / "again" / n).read_bytes() for n in names] == [(shop / n).read_bytes() for n in names]
    assert (tmp_path / "other" / names[0]).read_bytes() != (shop / names[0]).read_bytes()


def test_shipped_scores_and_tastes_are_tables_by_id(films, shop):
    with open(shop / "item_scores.csv", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["item_id", *ASPECT_PHRASES]
    assert rows[5] == ["T005", *map(str, films.scores_IA[5])]
    with open(shop / "tastes.csv", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["user_id", *ASPECT_PHRASES] and len(rows) == SHOPPERS and rows[0][0] == "S00001"


def test_tastes_are_two_to_four_aspects_of_length_one():
    tastes_UA = draw_tastes(500, 12, generator=np.random.default_rng(0))
    kept_U = (tastes_UA != 0).sum(axis=1)
    assert set(kept_U) == {2, 3, 4}
    np.testing.assert_allclose(np.linalg.norm(tastes_UA, axis=1), 1.0)
    assert 0.4 < (tastes_UA[tastes_UA != 0] > 0).mean() < 0.6


def test_shoppers_choose_and_like_what_fits_their_tastes(films):
    generator = np.random.default_rng(1)
    tastes_UA = draw_tastes(300, 12, generator=generator)
    purchases = draw_purchases(films, tastes_UA, generator=generator)
    fit_UI = tastes_UA @ standardise(films.scores_IA)[0].T
    first_fit_U = np.take_along_axis(fit_UI, purchases.films_UL[:, :10], axis=1).mean(axis=1)
    assert first_fit_U.mean() > 0.4  # chance is 0
    liking_UL = np.take_along_axis(fit_UI, purchases.films_UL, axis=1)
    assert np.corrcoef(liking_UL.ravel(), purchases.ratings_UL.ravel())[0, 1] > 0.5


def test_popular_films_are_bought_more_often(films):
    tastes_UA = draw_tastes(300, 12, generator=np.random.default_rng(2))
    popularity_I = draw_popularity(60, generator=np.random.default_rng(5))  # the first draw of the purchases below
    first_UL = draw_purchases(films, tastes_UA, generator=np.random.default_rng(5)).films_UL[:, :5]
    counts_I = np.bincount(first_UL.ravel(), minlength=60)
    assert np.corrcoef(popularity_I, counts_I)[0, 1] > 0.5


def test_nearness_prefers_the_film_seen_last():
    levels_IA = np.array([[0.0, 0.0], [1.0, 1.0], [4.0, 4.0], [-5.0, 3.0]])
    near_UI = nearness(levels_IA, np.array([[1], [2]]))
    distances_UI = ((levels_IA[[1, 2]][:, None] - levels_IA[None]) ** 2).sum(axis=2)
    for near_I, distance_I in zip(near_UI, distances_UI, strict=True):
        assert list(near_I.argsort()) == list((-distance_I).argsort())
        np.testing.assert_allclose([near_I.mean(), near_I.std()], [0, 1], atol=1e-12)
    assert not nearness(levels_IA, np.zeros((2, 0), dtype=int)).any()


def test_films_are_drawn_from_the_softmax():
    logits = np.log(np.array([0.6, 0.3, 0.1] + [1e-9] * 60))
    fixed_UI = np.tile(logits, (4000, 1))
    first_U = draw_films(fixed_UI, np.zeros((63, 2)), generator=np.random.default_rng(0))[:, 0]
    np.testing.assert_allclose(np.bincount(first_U, minlength=63)[:3] / 4000, [0.6, 0.3, 0.1], atol=0.03)


def test_reviews_name_what_explains_the_rating():
    taste_A = np.array([0.8, 0.0, -0.6, 0.0])
    levels_A = np.array([1.5, 0.1, -1.0, 2.0])
    assert explaining_aspects(5, taste_A, levels_A) == (0, 2)  # liked and high, disliked and low
    disappointing_A = np.array([-1.5, 0.1, 1.0, 2.0])
    assert explaining_aspects(1, taste_A, disappointing_A) == (0, 2)
    text = review_text(5, list(ASPECT_PHRASES)[:4], taste_A, levels_A, generator=np.random.default_rng(0))
    assert "intricate, many-layered story" in text and "how little thinking it asks for" in text


def test_catalogue_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "films.csv").write_text("id,title\n1,A\n")
    with pytest.raises(ValueError, match="film_id"):
        read_films(str(tmp_path / "films.csv"))


def test_shoppers_of_chosen_aspects_have_tastes_and_reviews_of_these_alone(tmp_path):
    names = ["pace", "tension level", "emotional intensity", "realism vs. fantasy"]
    run = simulate(SimulateConfig(output=str(tmp_path / "shop"), shoppers=10, aspect_names=tuple(names)))
    with open(f"{run.path}/item_scores.csv", encoding="utf-8") as file:
        header, first, *_ = csv.reader(file)
    films = read_films(str(CATALOGUE))
    assert header == ["item_id", *names]
    assert first == [films.ids[0], *(str(films.scores_IA[0, films.aspects.index(name)]) for name in names)]
    words = {word for name, pair in ASPECT_PHRASES.items() if name not in names for word in pair}
    texts = [record["text"] for record in read_lines(tmp_path / "shop" / "reviews.jsonl.gz")]
    assert not any(word in text for word in words for text in texts)
    assert sum(ASPECT_PHRASES["pace"][1] in text for text in texts) > 5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pace", "wit", "tension level", "humor"], "the catalogue has no wit, humor; it has story complexity"),
        (["pace", "tension level", "emotional intensity"], "aspect_names: give 4 or more, each once, not pace"),
        (["pace", "pace", "tension level", "emotional intensity"], "each once, not pace, pace"),
    ],
)
def test_aspects_that_the_catalogue_has_not_are_refused(names: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        select_aspects(read_films(str(CATALOGUE)), names)


def test_packaged_catalogue_feeds_the_job(tmp_path):
    films = read_films(str(CATALOGUE))
    assert films.aspects == list(ASPECT_PHRASES) and len(set(films.ids)) == len(films.ids) >= 300
    assert films.scores_IA.min() >= 1 and films.scores_IA.max() <= 10
    run = simulate(SimulateConfig(output=str(tmp_path / "shop"), shoppers=10))
    record = json.loads((tmp_path / "shop" / "run.json").read_text())
    assert is_finished(run.path) and record["job"] == "simulate"
    assert record["counts"]["reviews"] == len(read_lines(tmp_path / "shop" / "reviews.jsonl.gz"))
