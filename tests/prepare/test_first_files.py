"""`raygr init`: what it sees in one's own files, and the three files that it writes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygr.cli import main
from raygr.config import ConfigError, load_config
from raygr.prepare.config import PrepareConfig
from raygr.prepare.first_files import chosen_aspects, init
from raygr.prepare.first_look import core_sizes, look_at
from raygr.score.aspects import load_aspects


def orders(rows: int = 200, **changes: list) -> dict[str, list]:
    """20 customers who each buy 10 of 20 products; the columns have names of a shop."""
    columns = {
        "Order No": list(range(rows)),
        "CustomerID": [f"c{row // 10}" for row in range(rows)],
        "sku": [f"s{(row // 10 + row % 10) % 20}" for row in range(rows)],
        "ordered_at": [f"2026-01-{1 + row % 10:02} 12:00" for row in range(rows)],
    }
    return columns | changes


def products(word: str = "game") -> dict[str, list]:
    return {"article": [f"s{n}" for n in range(20)], "name": [f"The {word} of part {n}" for n in range(20)]}


def write(path: Path, columns: dict[str, list], delimiter: str = ",") -> str:
    lines = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("".join(delimiter.join(map(str, line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_columns_are_told_by_their_names_and_those_of_the_items_by_their_ids(tmp_path: Path):
    look = look_at(write(tmp_path / "o.csv", orders(), ";"), write(tmp_path / "p.csv", products()), {})
    assert look.columns == {"user_id": "CustomerID", "item_id": "sku", "timestamp": "ordered_at"}
    assert look.item_columns == {"item_id": "article", "title": "name"}
    assert (look.timestamps, look.first_time, look.rating_range) == ("time", "2026-01-01 12:00", None)
    assert (look.rows, look.repeated, look.core) == (200, 0, 5)
    assert look.cores[5] == (20, 20, 200) and look.texts[0] == "The game of part 0"


def test_json_lines_and_parquet_have_columns_too(tmp_path: Path):
    reviews, items = tmp_path / "o.jsonl.gz", tmp_path / "p.parquet"
    named = {"reviewerID": "CustomerID", "asin": "sku", "unixReviewTime": "ordered_at", "overall": "Order No"}
    columns = orders() | {"ordered_at": [1_700_000_000 + row for row in range(200)], "Order No": [1, 10] * 100}
    rows = [json.dumps({new: columns[old][row] for new, old in named.items()}) for row in range(200)]
    reviews.write_bytes(gzip.compress("\n".join(rows).encode()))
    pq.write_table(pa.table({"asin": products()["article"], "title": products()["name"]}), items)
    look = look_at(str(reviews), str(items), {})
    assert look.columns == dict(zip(("user_id", "item_id", "timestamp", "rating"), named, strict=True))
    assert look.item_columns == {"item_id": "asin", "title": "title"} and look.rating_range == (1.0, 10.0)


@pytest.mark.parametrize(
    ("changes", "given", "expected"),
    [
        ({"ordered_at": [f"{row}" for row in range(200)]}, {}, "position"),
        ({"ordered_at": ["01/02/2026"] * 200}, {}, "times such as '01/02/2026' cannot be read"),
        ({"CustomerID": ["c"] * 200}, {}, "too few"),
        ({}, {"user_id": "buyer"}, "has no column buyer; it has Order No, CustomerID"),
        ({"sku": [f"x{row}" for row in range(200)]}, {}, "no column holds ids of sku"),
    ],
)
def test_what_cannot_be_told_is_asked_for(tmp_path: Path, changes, given, expected):
    files = write(tmp_path / "o.csv", orders(**changes)), write(tmp_path / "p.csv", products())
    if expected == "position":
        assert look_at(*files, given).timestamps == expected
        return
    if "sku" in changes:
        changes = orders()
        write(tmp_path / "p.csv", {name: [f"y{one}" for one in values] for name, values in products().items()})
        write(tmp_path / "o.csv", changes)
    with pytest.raises(ConfigError, match=expected):
        look_at(*files, given)


def test_columns_without_known_names_are_asked_for(tmp_path: Path):
    columns = dict(zip(("a", "b", "c", "d"), orders().values(), strict=True))
    files = write(tmp_path / "o.csv", columns), write(tmp_path / "p.csv", products())
    with pytest.raises(ConfigError, match=r"which column is user_id and which is item_id.*: --columns user_id=NAME it"):
        look_at(*files, {})
    found = look_at(*files, {"user_id": "b", "item_id": "c"})
    assert found.columns == {"user_id": "b", "item_id": "c", "timestamp": "d"}


def test_the_sizes_of_a_core_are_those_of_a_slow_count():
    pairs = np.unique(np.random.default_rng(0).integers(0, 12, (2, 60)), axis=1)
    for k in (2, 3, 4, 6):
        left = {tuple(pair) for pair in pairs.T.tolist()}
        while True:
            users, items = ([pair[side] for pair in left] for side in (0, 1))
            kept = {pair for pair in left if users.count(pair[0]) >= k and items.count(pair[1]) >= k}
            if kept == left:
                break
            left = kept
        assert core_sizes(pairs, k) == (len({u for u, _ in left}), len({i for _, i in left}), len(left))


@pytest.mark.parametrize(
    ("texts", "name", "why"),
    [
        (
            ["Cotton shirt", "Blue jeans, slim", "Mug"],
            "clothing",
            "because 2 of 3 items have words such as shirt, jeans",
        ),
        (["A multiplayer puzzle", "Chess"], "games", "because 1 of 2 items"),
        (["Green tea", "Black tea", "Mug", "Film"], "products", "words of movies are in 1 of 4 items"),
        (["Gift card"], "gift-cards", "because 1 of 1 items have words such as gift-card"),
    ],
)
def test_the_set_whose_words_the_items_have_is_chosen(texts, name, why):
    choice = chosen_aspects([*texts])
    assert choice.name == name and why in choice.why


def test_the_written_files_are_read_as_they_stand(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "orders.csv", orders(title=[f"Game {row % 20}" for row in range(200)]))
    assert main(["init", "orders.csv", "--folder", "shop"]) == 0
    said = capsys.readouterr().out
    assert "5-core: 200 interactions of 20 users with 20 items stay\n" in said and "aspects: games, because" in said
    assert said.count("; not read: Order No\n") == said.count("not read") == 1
    assert said.endswith("raygr pipeline --config shop/pipeline.yaml\n")
    config = load_config(PrepareConfig, "shop/prepare.yaml", [])
    assert config.reviews == config.metadata == (f"{tmp_path}/orders.csv",)
    assert config.columns == {"user_id": "CustomerID", "item_id": "sku", "timestamp": "ordered_at"}
    assert (config.item_columns, config.min_user_interactions) == ({"title": "title"}, 5)
    assert len(load_aspects("shop/aspects.yaml").aspects) == 12
    assert main(["pipeline", "--config", "shop/pipeline.yaml", "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()
    stages = ["prepare", "score", "train", "train", "train", "compare", "recommend", "report"]
    assert [line.split()[1] for line in plan] == stages and all("to run" in line for line in plan)
    assert main(["init", "orders.csv", "--folder", "shop"]) == 2
    assert "shop/prepare.yaml, shop/aspects.yaml, shop/pipeline.yaml: there already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"gone\.csv: no such file"):
        init("gone.csv", None, folder="other", columns={})


def test_columns_without_use_and_a_core_that_leaves_little_are_told(tmp_path: Path):
    """4 of 40 customers buy the same three products, the others buy what nobody else has."""
    bought = [f"s{row % 3}" if row < 12 else f"x{row}" for row in range(120)]
    shop = {"customer": [f"c{row // 3}" for row in range(120)], "sku": bought, "time": [*range(120)]}
    items = {"sku": bought, "name": ["Game"] * 120, "weight": [1] * 120}
    said = init(write(tmp_path / "o.csv", shop), write(tmp_path / "p.csv", items), folder=f"{tmp_path}/s", columns={})
    assert "p.csv: 111 items; item_id is sku, title is name; not read: weight\n" in said
    assert "3-core: 12 interactions of 4 users with 3 items stay, 10% of all: few items were bought by several" in said


def test_every_line_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "orders.csv", orders(title=[f"Tea {row % 20}" for row in range(200)]))
    init("orders.csv", None, folder="", columns={})
    for line in Path("prepare.yaml").read_text().splitlines():
        assert "#" in line or line.startswith("min_item_interactions")
