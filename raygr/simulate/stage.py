"""The `simulate` stage: a shop with known tastes, made from the packaged film catalogue.

Films (films.csv beside this file) -> reviews.jsonl.gz and meta.jsonl.gz in the raw format of Amazon Reviews 2023,
item_scores.csv (the aspect scores of the catalogue) and tastes.csv (the true tastes of each shopper). The shop is a
positive control: aspects matter here by construction, which is not certain in real data.

The next film of a shopper is drawn without repeats. Its weight depends on popularity (a power law of the film's rank),
on the distance to the last two films in the aspects, and on the shopper's hidden tastes, most of which are zero.
Shape letters: `U` users, `I` items, `A` aspects, `L` history length.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from raygr.config import ConfigError
from raygr.files import join, write_text
from raygr.metrics.z_scores import standardise
from raygr.runs import Run, finish_run, start_run
from raygr.simulate.config import SimulateConfig
from raygr.simulate.review_texts import TITLES, choice, review_text

CATALOGUE = Path(__file__).with_name("films.csv")
FILM_COLUMNS = ("film_id", "title", "year", "genres", "plot")  # one column per aspect follows
SHORTEST, LONGEST = 8, 16  # number of films of a shopper, both included; small, as in a real shop
FEWEST_TASTES, MOST_TASTES = 2, 4  # number of aspects that a shopper cares about, both included
POPULARITY_EXPONENT, POPULARITY_SHIFT = 0.9, 8.0  # weight of rank r is (r + shift) ** -exponent
# Weights in the exponent of the softmax, of terms with standard deviation 1. With these weights a recommender that
# learns from the ids of 1,000 shoppers reaches two thirds of the true model's NDCG@10 (.16 of .25; popularity .06), so
# aspects can still help.
TASTE_WEIGHT, NEARNESS_WEIGHT = 1.6, 1.6
RATING_CENTRE, RATING_NOISE = 2.9, 0.8  # mean rating of a film that fits no taste, and its standard deviation
FIRST_DAY_MS, DAY_MS = 1_514_764_800_000, 86_400_000  # 2018-01-01
START_DAYS, GAP_DAYS = 700, 14  # days over which first purchases spread; mean days between two purchases


class Films(NamedTuple):
    """The catalogue; row i of `scores_IA` (integers 1..10) and entry i of each list describe film i."""

    ids: list[str]
    titles: list[str]
    years: list[str]
    genres: list[list[str]]
    plots: list[str]
    aspects: list[str]
    scores_IA: np.ndarray


class Purchases(NamedTuple):
    """Films and ratings (1..5) of each shopper in order; entries from `lengths_U` on are unused."""

    films_UL: np.ndarray
    ratings_UL: np.ndarray
    times_UL: np.ndarray  # milliseconds since 1970, strictly increasing along a row
    lengths_U: np.ndarray


def simulate(config: SimulateConfig) -> Run:
    """Writes the run folder of a simulated shop; equal settings give equal bytes."""
    films = read_films(str(CATALOGUE))
    films = select_aspects(films, config.aspect_names) if config.aspect_names else films
    run = start_run(config.output, job="simulate", config=config)
    counts = write_shop(run.path, films, shoppers=config.shoppers, seed=config.seed)
    finish_run(run, inputs=[str(CATALOGUE)], counts=counts)
    return run


def write_shop(folder: str, films: Films, *, shoppers: int, seed: int) -> dict[str, int]:
    """Writes the four files into `folder` and returns their row counts; `films` holds LONGEST films or more."""
    generator = np.random.default_rng(seed)
    tastes_UA = draw_tastes(shoppers, len(films.aspects), generator=generator)
    purchases = draw_purchases(films, tastes_UA, generator=generator)
    reviews = list(review_records(films, tastes_UA, purchases, generator=generator))
    user_ids = [user_id(user) for user in range(shoppers)]
    write_lines(reviews, join(folder, "reviews.jsonl.gz"))
    write_lines(film_records(films, reviews), join(folder, "meta.jsonl.gz"))
    write_vectors("item_id", films.ids, films.aspects, films.scores_IA, join(folder, "item_scores.csv"))
    write_vectors("user_id", user_ids, films.aspects, tastes_UA.round(4), join(folder, "tastes.csv"))
    return {"shoppers": shoppers, "films": len(films.ids), "reviews": len(reviews)}


def read_films(path: str) -> Films:
    """Reads a CSV with FILM_COLUMNS and then one column per aspect; `|` separates the genres."""
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    if tuple(header[: len(FILM_COLUMNS)]) != FILM_COLUMNS:
        raise ValueError(f"{path} must begin with the columns {', '.join(FILM_COLUMNS)}, not {', '.join(header)}")
    ids, titles, years, genres, plots = (list(column) for column in zip(*(row[:5] for row in rows), strict=True))
    scores_IA = np.array([[int(score) for score in row[5:]] for row in rows])
    return Films(ids, titles, years, [g.split("|") for g in genres], plots, header[5:], scores_IA)


def select_aspects(films: Films, names: Sequence[str]) -> Films:
    """The films with these aspects only; ConfigError if the films lack one, or if they are too few for a taste."""
    unknown = [name for name in names if name not in films.aspects]
    if unknown:
        raise ConfigError(f"aspect_names: the catalogue has no {', '.join(unknown)}; it has {', '.join(films.aspects)}")
    if len(set(names)) < max(MOST_TASTES, len(names)):
        raise ConfigError(f"aspect_names: give {MOST_TASTES} or more, each once, not {', '.join(names)}")
    columns = [films.aspects.index(name) for name in names]
    return films._replace(aspects=list(names), scores_IA=films.scores_IA[:, columns])


def draw_tastes(shoppers: int, aspects: int, *, generator: np.random.Generator) -> np.ndarray:
    """(U, A) tastes of unit length: two to four aspects are liked (positive) or disliked, the others are 0."""
    order_UA = generator.random((shoppers, aspects)).argsort(axis=1).argsort(axis=1)
    kept_U1 = generator.integers(FEWEST_TASTES, MOST_TASTES + 1, size=(shoppers, 1))
    strength_UA = generator.uniform(0.6, 1.4, (shoppers, aspects)) * generator.choice([-1.0, 1.0], (shoppers, aspects))
    tastes_UA = np.where(order_UA < kept_U1, strength_UA, 0.0)
    return tastes_UA / np.linalg.norm(tastes_UA, axis=1, keepdims=True)


def draw_purchases(films: Films, tastes_UA: np.ndarray, *, generator: np.random.Generator) -> Purchases:
    """Draws the films of all shoppers by popularity, nearness and taste, and their ratings by taste and noise."""
    shoppers = len(tastes_UA)
    levels_IA = standardise(films.scores_IA)[0]
    fit_UI = tastes_UA @ levels_IA.T
    popularity_I = draw_popularity(len(films.ids), generator=generator)
    films_UL = draw_films(popularity_I + TASTE_WEIGHT * fit_UI, levels_IA, generator=generator)
    liking_UL = np.take_along_axis(fit_UI, films_UL, axis=1)
    noise_UL = RATING_NOISE * generator.standard_normal(films_UL.shape)
    ratings_UL = np.clip(np.rint(RATING_CENTRE + liking_UL + noise_UL), 1, 5).astype(int)
    lengths_U = generator.integers(SHORTEST, LONGEST + 1, size=shoppers)
    return Purchases(films_UL, ratings_UL, draw_times(shoppers, generator=generator), lengths_U)


def draw_popularity(films: int, *, generator: np.random.Generator) -> np.ndarray:
    """(I,) log weights: a power law of a random rank, so popularity is independent of the aspects."""
    rank_I = generator.permutation(films)
    return -POPULARITY_EXPONENT * np.log(rank_I + POPULARITY_SHIFT)


def draw_films(fixed_UI: np.ndarray, levels_IA: np.ndarray, *, generator: np.random.Generator) -> np.ndarray:
    """(U, L) film numbers, drawn without repeats from the softmax of the fixed term plus nearness.

    The argmax of logits plus Gumbel noise is a draw from their softmax, so one argmax serves all shoppers.
    """
    fixed_UI, everyone_U = fixed_UI.copy(), np.arange(len(fixed_UI))
    chosen_UL = np.zeros((len(fixed_UI), LONGEST), dtype=int)
    for step in range(LONGEST):
        logits_UI = fixed_UI + NEARNESS_WEIGHT * nearness(levels_IA, chosen_UL[:, max(0, step - 2) : step])
        chosen_UL[:, step] = (logits_UI + generator.gumbel(size=logits_UI.shape)).argmax(axis=1)
        fixed_UI[everyone_U, chosen_UL[:, step]] = -np.inf
    return chosen_UL


def nearness(levels_IA: np.ndarray, recent_UX: np.ndarray) -> np.ndarray:
    """(U, I) closeness of each film to the mean of the last 0 to 2 films, standardised per shopper; 0 without any."""
    if recent_UX.shape[1] == 0:
        return np.zeros((len(recent_UX), len(levels_IA)))
    centre_UA = levels_IA[recent_UX].mean(axis=1)
    # The negative squared distance without the term that is constant per shopper, which does not change a softmax.
    closeness_UI = 2 * centre_UA @ levels_IA.T - (levels_IA**2).sum(axis=1)
    return standardise(closeness_UI.T)[0].T


def draw_times(shoppers: int, *, generator: np.random.Generator) -> np.ndarray:
    start_U1 = generator.uniform(0, START_DAYS, (shoppers, 1))
    days_UL = start_U1 + generator.exponential(GAP_DAYS, (shoppers, LONGEST)).cumsum(axis=1)
    # One millisecond per position keeps the order even if a gap rounds to zero.
    return FIRST_DAY_MS + (days_UL * DAY_MS).astype(np.int64) + np.arange(LONGEST)


def review_records(
    films: Films, tastes_UA: np.ndarray, purchases: Purchases, *, generator: np.random.Generator
) -> Iterable[dict[str, Any]]:
    """One record per purchase in Amazon's format, by shopper, oldest first."""
    levels_IA = standardise(films.scores_IA)[0]
    for user, taste_A in enumerate(tastes_UA):
        for position in range(purchases.lengths_U[user]):
            film, rating = purchases.films_UL[user, position], int(purchases.ratings_UL[user, position])
            yield {
                "rating": float(rating),
                "title": choice(TITLES[rating], generator=generator),
                "text": review_text(rating, films.aspects, taste_A, levels_IA[film], generator=generator),
                "images": [],
                "asin": films.ids[film],
                "parent_asin": films.ids[film],
                "user_id": user_id(user),
                "timestamp": int(purchases.times_UL[user, position]),
                "helpful_vote": int(generator.poisson(0.5)),
                "verified_purchase": True,
            }


def film_records(films: Films, reviews: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """One record per film in Amazon's format; a film without a review has no average rating."""
    ratings: dict[str, list[float]] = {film: [] for film in films.ids}
    for review in reviews:
        ratings[review["parent_asin"]].append(review["rating"])
    for film, own in enumerate(ratings.values()):
        yield {
            "main_category": "Movies & TV",
            "title": f"{films.titles[film]} ({films.years[film]})",
            "average_rating": round(sum(own) / len(own), 1) if own else None,
            "rating_number": len(own),
            "features": [],
            "description": [films.plots[film]],
            "price": None,
            "images": [],
            "videos": [],
            "store": None,
            "categories": films.genres[film],
            "details": {"Release year": films.years[film]},
            "parent_asin": films.ids[film],
            "bought_together": None,
        }


def user_id(user: int) -> str:
    return f"S{user + 1:05d}"


def write_lines(records: Iterable[dict[str, Any]], path: str) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    filesystem, inner = fsspec.core.url_to_fs(path)
    filesystem.makedirs(inner.rpartition("/")[0], exist_ok=True)
    # No time in the header, so that equal records give equal bytes.
    filesystem.pipe_file(inner, gzip.compress(text.encode(), mtime=0))


def write_vectors(id_name: str, ids: list[str], names: list[str], values: np.ndarray, path: str) -> None:
    """Writes a CSV with a column of ids and one column per name."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([id_name, *names])
    writer.writerows([subject, *row] for subject, row in zip(ids, values.tolist(), strict=True))
    write_text(buffer.getvalue(), path)
