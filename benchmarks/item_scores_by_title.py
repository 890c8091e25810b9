"""Item scores of ML-1M for the films of ML-100k that have the same title and year.

    make data-ml-1m data-ml-100k
    python benchmarks/item_scores_by_title.py outputs/ml-100k/item_scores_llm.csv

Other copies of the two catalogues: --ml-1m FILE and --ml-100k FILE, in any form that `format: movielens` reads.
"""

import argparse
import csv
from pathlib import Path

from raygr.prepare.column_files import item_columns
from raygr.prepare.config import PrepareConfig

SCORES = Path("datasets/ml-1m-item-scores.csv")


def film_ids(path: str) -> dict[str, str]:
    """Title with year -> movie_id."""
    config = PrepareConfig(output="unused", reviews=(), format="movielens")
    tables = [columns.table for columns in item_columns(path, config, ("item_id", "title"))]
    ids, titles = ([cell.as_py() for table in tables for cell in table[name]] for name in ("item_id", "title"))
    return dict(zip(map(as_text, titles), map(as_text, ids), strict=True))


def as_text(cell: str | bytes) -> str:
    return cell.decode() if isinstance(cell, bytes) else cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ml-1m", default="data/ml-1m/movies.dat", help="the films that have scores")
    parser.add_argument("--ml-100k", default="data/ml-100k/u.item", help="the films that get them")
    options = parser.parse_args()
    titles = {movie_id: title for title, movie_id in film_ids(options.ml_1m).items()}
    ours = film_ids(options.ml_100k)
    with SCORES.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    matched = [[ours[titles[row[0]]], *row[1:]] for row in rows if titles[row[0]] in ours]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *matched])
    print(f"{len(matched)} of {len(ours)} titles -> {options.output}")


if __name__ == "__main__":
    main()
