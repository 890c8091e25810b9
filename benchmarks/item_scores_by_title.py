"""Item scores of ML-1M carried over to the films of ML-100k with the same title and year.

`python benchmarks/item_scores_by_title.py outputs/ml-100k/item_scores_llm.csv`; ../shared/data as in configs/.
"""

import csv
import gzip
import sys
from pathlib import Path

DATA = Path("../shared/data")


def movies(folder: str) -> dict[str, str]:
    """Title -> movie_id."""
    with gzip.open(DATA / folder / "movies.csv.gz", "rt", encoding="utf-8", newline="") as file:
        return {row["title"]: row["movie_id"] for row in csv.DictReader(file)}


def main(output: Path) -> None:
    titles = {movie_id: title for title, movie_id in movies("ml-1m").items()}
    ours = movies("ml-100k")
    with open(DATA / "ml-1m" / "item_scores_llm.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    matched = [[ours[titles[row[0]]], *row[1:]] for row in rows if titles[row[0]] in ours]
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *matched])
    print(f"{len(matched)} of {len(ours)} titles -> {output}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
