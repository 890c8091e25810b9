"""The prepare stage: the contract of its files, reductions against plain loops, real data, refusals."""

import dataclasses
import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygr.config import load_config
from raygr.files import read_json, read_table
from raygr.prepare import raw_files, selection, stage, text_store
from raygr.prepare.bad_rows import InputError
from raygr.prepare.coded_rows import CodedRows
from raygr.prepare.config import PrepareConfig
from raygr.prepare.selection import passes, reduce
from raygr.prepare.stage import prepare as run_prepare
from raygr.runs import Run, RunError, read_run
from raygr.schema import INTERACTION_SCHEMA, ITEM_SCHEMA, REVIEW_SCHEMA, USER_SCHEMA

CONFIGS = Path(__file__).parents[2] / "configs"


def review(user: str, item: str, time: int, rating: float = 4.0) -> dict:
    return {"user_id": user, "parent_asin": item, "asin": item, "rating": rating, "title": f"{user}{item}",
            "text": f"{user} on {item} at {time}", "timestamp": 1_600_000_000_000 + time}  # fmt: skip


def write_lines(path: Path, rows: list[dict]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def loose(tmp_path: Path, **settings) -> PrepareConfig:
    """A configuration that drops nothing, except as `settings` say."""
    defaults = {"min_user_interactions": 1, "min_item_interactions": 1, "output": str(tmp_path / "run")}
    return PrepareConfig(**{**defaults, **settings})


def counts_of(run: Run) -> dict:
    return read_run(run.path, job="prepare").counts


def check_contract(run: Run) -> dict[str, pa.Table]:
    """Schemas, index ranges and joins that every prepare run must keep."""
    tables = {
        name: read_table(run.file(name)) for name in ("items", "reviews", "interactions.parquet", "users.parquet")
    }
    schemas = (ITEM_SCHEMA, REVIEW_SCHEMA, INTERACTION_SCHEMA, USER_SCHEMA)
    for table, schema in zip(tables.values(), schemas, strict=True):
        assert table.schema.remove_metadata().equals(schema)
    items, reviews, rows, users = tables.values()
    assert sorted(items["item_index"].to_pylist()) == list(range(1, items.num_rows + 1))
    assert users["user_index"].to_pylist() == list(range(users.num_rows))
    keys = list(zip(rows["user_index"].to_pylist(), rows["position"].to_pylist(), strict=True))
    assert keys == [(u, p) for u, n in enumerate(users["interactions"].to_pylist()) for p in range(n)]
    numbers = [(name, "ascending") for name in ("user_index", "position")]
    assert reviews.sort_by(numbers).select(INTERACTION_SCHEMA.names).equals(rows)
    assert not any(items[name].null_count for name in ("title", "description", "categories", "details"))
    counts, sizes = counts_of(run), read_json(run.file("statistics.json"))
    for part in ("reviews", "items", "users", "reviewed_items"):
        extra = counts[part]["without_metadata"] if part == "items" else 0
        assert counts[part]["kept"] - extra == counts[part]["read"] - sum(counts[part]["by_reason"].values())
    assert (sizes["users"], sizes["items"], sizes["reviews"]) == (users.num_rows, items.num_rows, rows.num_rows)
    return tables


# --- small hand-written data -------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Run:
    """Two review files and two metadata files; the numbers in the tests below are worked out by hand."""
    folder = tmp_path_factory.mktemp("small")
    a, b = review("ann", "x", 1, 5.0), review("bob", "y", 5, 1.0)
    first = [review("ann", "z", 4, 3.0), a, b, review("ann", "y", 2, 4.0)]
    second = [
        review("ann", "x", 9, 1.0),
        review("bob", "x", 5, 2.0),
        review("ann", "w", 3, 2.0),
        review("cy", "x", 7, 5.0),
    ]
    meta = [{"parent_asin": "y", "title": "Y", "average_rating": 4.9, "rating_number": 77},
            {"parent_asin": "y", "title": "Y again"}, {"parent_asin": "unknown", "title": "?"}]  # fmt: skip
    more = [{"parent_asin": "x", "title": "X" * 30}, {"parent_asin": "y", "title": "Y of another file"}]
    files = [write_lines(folder / "r0.jsonl.gz", first), write_lines(folder / "r1.jsonl", second)]
    metadata = [write_lines(folder / "m0.jsonl.gz", meta), write_lines(folder / "m1.jsonl.gz", more)]
    config = loose(folder, reviews=files, metadata=metadata, max_text_chars=20, parallelism=2)
    return run_prepare(config)


def test_a_run_here_equals_one_on_ray(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "outputs_on_ray", lambda *_: pytest.fail("Ray was used"))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in small_run.config.items()}
    here = run_prepare(PrepareConfig(**{**given, "parallelism": 1, "ray": "never", "output": str(tmp_path / "here")}))
    for name, order in (("items", "item_index"), ("reviews", "timestamp"), ("interactions.parquet", None)):
        tables = [read_table(run.file(name)) for run in (small_run, here)]
        one, other = (table.sort_by(order) if order else table for table in tables)
        assert one.num_rows and one.equals(other)
    assert counts_of(here) == counts_of(small_run)
    with pytest.raises(ValueError, match=r"ray: never reads in the calling process.*set parallelism: 1"):
        PrepareConfig(**{**given, "ray": "never"})


def test_small_run_keeps_the_contract(small_run):
    assert check_contract(small_run)["interactions.parquet"].num_rows == 7


def test_order_positions_and_split(small_run):
    rows = read_table(small_run.file("interactions.parquet")).to_pylist()
    item = ["", "w", "x", "y", "z"]
    # ann: x once (the first of two), y, w, z; bob: y and x at the same time, in input order; cy: one.
    assert [(r["user_index"], item[r["item_index"]], r["split"]) for r in rows] == [
        (0, "x", "train"), (0, "y", "train"), (0, "w", "validation"), (0, "z", "test"),
        (1, "y", "train"), (1, "x", "train"), (2, "x", "train")]  # fmt: skip


def test_texts_follow_their_interaction_and_long_ones_are_cut(small_run):
    for row in read_table(small_run.file("reviews")).to_pylist():
        user, item = ["ann", "bob", "cy"][row["user_index"]], ["", "w", "x", "y", "z"][row["item_index"]]
        time = row["timestamp"] - 1_600_000_000_000
        assert row["review_title"] == f"{user}{item}"
        assert row["review_text"] == f"{user} on {item} at {time}"[:20]
    counts = counts_of(small_run)
    assert counts["items"]["text_cut"] == 1
    assert counts["reviews"]["text_cut"] == 0


def test_items_take_the_first_metadata_row_and_train_ratings_only(small_run):
    items = {row["item_id"]: row for row in read_table(small_run.file("items")).to_pylist()}
    assert {name: items[name]["title"] for name in items} == {"w": "", "x": "X" * 20, "y": "Y", "z": ""}
    assert (items["x"]["train_rating"], items["x"]["train_rating_count"]) == (4.0, 3)
    assert (items["z"]["train_rating"], items["z"]["train_rating_count"]) == (None, 0)  # ann's test item
    assert (items["z"]["all_rating"], items["z"]["all_rating_count"]) == (3.0, 1)
    assert (round(items["y"]["all_rating"], 4), items["y"]["all_rating_count"]) == (4.9, 77)
    assert counts_of(small_run)["items"]["by_reason"] == {"item_not_kept": 1, "duplicate": 2}
    assert counts_of(small_run)["items"]["without_metadata"] == 2


def test_cutoffs_are_the_last_train_interaction(small_run):
    users = read_table(small_run.file("users.parquet")).to_pylist()
    assert [(u["user_id"], u["interactions"], u["cutoff"], u["cutoff_position"]) for u in users] == [
        ("ann", 4, 1_600_000_000_002, 1),
        ("bob", 2, 1_600_000_000_005, 1), ("cy", 1, 1_600_000_000_007, 0)]  # fmt: skip


def test_a_finished_run_is_not_overwritten(small_run):
    config = PrepareConfig(**{**small_run.config, "reviews": tuple(small_run.config["reviews"])})
    with pytest.raises(RunError, match="finished"):
        run_prepare(config)


def test_a_run_without_run_json_is_done_again_without_stale_parts(tmp_path):
    rows = [review("a", i, t) for t, i in enumerate("xyz")]
    config = loose(tmp_path, reviews=[write_lines(tmp_path / "r.jsonl", rows)])
    run = run_prepare(config)
    Path(run.file("run.json")).unlink()
    stale = Path(run.file("reviews")) / "part-00007-00003-00000.parquet"
    stale.write_bytes((Path(run.file("reviews")) / "part-00000-00000-00000.parquet").read_bytes())
    check_contract(run_prepare(config))
    assert not stale.exists()


def test_large_files_are_written_as_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "PART_BYTES", 200)
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 500)
    monkeypatch.setattr(text_store, "GROUP_ROWS", 16)
    rows = [review("ab"[time % 2], "xyz"[time % 3], time) for time in range(60)]
    path = write_lines(tmp_path / "r.jsonl.gz", rows)
    run = run_prepare(loose(tmp_path, reviews=[path], keep_duplicate="all", min_item_interactions=1))
    tables = check_contract(run)
    assert len(list(Path(run.file("reviews")).iterdir())) > 4
    texts = tables["reviews"].sort_by("timestamp")["review_text"].to_pylist()
    assert texts == [row["text"] for row in rows]
    assert {one.name for one in Path(run.path).iterdir() if one.is_dir()} == {"items", "reviews"}


def test_bad_rows_are_counted_with_examples_and_too_many_refused(tmp_path):
    rows = [review("a", i, t) for t, i in enumerate("xyz")] + [{**review("a", "w", 9), "rating": 11}]
    path = write_lines(tmp_path / "r.jsonl", rows)
    with pytest.raises(InputError, match=r"(?s)1 of 4 rows are bad.*rating_out_of_range: 1.*r\.jsonl:4: "):
        run_prepare(loose(tmp_path, reviews=[path]))
    run = run_prepare(loose(tmp_path, reviews=[path], max_bad_fraction=0.5, output=str(tmp_path / "again")))
    counts = counts_of(run)["reviews"]
    assert counts["by_reason"] == {"rating_out_of_range": 1}
    example = counts["examples"]["rating_out_of_range"][0]
    assert (example["file"], example["line"], example["snippet"][:10]) == (path, 4, '{"user_id"')
    check_contract(run)


def test_bad_metadata_is_refused_too(tmp_path):
    reviews = write_lines(tmp_path / "r.jsonl", [review("a", i, t) for t, i in enumerate("xyz")])
    (tmp_path / "m.jsonl").write_text('{"parent_asin": "x"}\n{"parent\n')
    with pytest.raises(InputError, match=r"(?s)metadata: 1 of 2 rows.*malformed_json"):
        run_prepare(loose(tmp_path, reviews=[reviews], metadata=[str(tmp_path / "m.jsonl")]))


def test_ids_of_metadata_that_match_nothing_are_refused_with_both_sides(tmp_path):
    """The reviews have the id 0001, the metadata have 1 in an integer column."""
    (tmp_path / "r.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,{i:04d},{i}\n" for i in range(1, 9)))
    pq.write_table(pa.table({"item_id": list(range(1, 9)), "title": ["t"] * 8}), tmp_path / "m.parquet")
    config = loose(tmp_path, reviews=[str(tmp_path / "r.csv")], metadata=[str(tmp_path / "m.parquet")], format="table")
    config = dataclasses.replace(config, timestamps="position")
    with pytest.raises(InputError, match=r"8 of 8 items have none, such as '0001', '0002', .* ids such as '1', '2', "):
        run_prepare(config)
    assert not (tmp_path / "run" / "reviews").exists()


def test_metadata_that_match_little_are_warned_of(caplog):
    reduced, _ = reduce(interactions_of(random_scan(200)), loose(Path("x"), reviews=["x"]))
    kept, _ = selection.assign(reduced, loose(Path("x"), reviews=["x"]))
    items = kept.item_ids.to_pylist()
    stage.check_matched(kept, pa.array(items), matched=len(items))
    assert not caplog.text
    stage.check_matched(kept, pa.array([*items[:3], "1"]), matched=3)
    assert f"metadata: {len(items) - 3} of {len(items)} items have none, such as {items[3]!r}" in caplog.text


def test_what_is_left_out_is_said_by_reason(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [review(user, item, time) for time, (user, item) in enumerate(["ax", "ax", "ay", "az", "bx", "bx", "cw"])]
    rows += [{**review("a", "q", 9), "rating": 11}]
    metadata = [{"parent_asin": "x", "title": "X"}, {"parent_asin": "y", "title": " "}, {"parent_asin": "x"}]
    config = loose(
        tmp_path, reviews=[write_lines(tmp_path / "r.jsonl", rows)],
        metadata=[write_lines(tmp_path / "m.jsonl", metadata)],
        max_bad_fraction=0.5, max_text_chars=9,
    )  # fmt: skip
    check_contract(run_prepare(config))
    for line in (
        "reviews: 5 of 8 kept; left out: 1 rating out of range, 2 duplicate",
        "of each user and item only the first review stays; keep_duplicate: all keeps repeats",
        "users: 3 of 3 kept",
        "reviewed items: 4 of 4 kept",
        "rows of metadata: 2 of 3 kept; left out: 1 duplicate",
        "2 of 4 items have no metadata",
        "3 of 4 items have no title or text",
        "2 of 3 users have no test interaction",
        "5 review texts were cut to 9 characters",
    ):
        assert line in caplog.messages


def test_repeats_are_kept_when_asked_for(tmp_path):
    """An earlier version silently dropped 220 of 2,000 orders of a shop as duplicates."""
    rows = [f"u{n % 4},i{n % 3},{1_700_000_000 + n}\n" for n in range(48)]
    (tmp_path / "orders.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    run = run_prepare(loose(tmp_path, reviews=[str(tmp_path / "orders.csv")], format="table", keep_duplicate="all"))
    tables = check_contract(run)
    assert tables["interactions.parquet"].num_rows == 48 and counts_of(run)["reviews"]["by_reason"] == {}
    assert read_json(run.file("statistics.json"))["density"] == 1.0  # each of 12 pairs four times


def test_what_cannot_be_prepared_says_what_to_change(tmp_path):
    missing = loose(tmp_path, reviews=[str(tmp_path / "no*.gz")])
    with pytest.raises(InputError, match="no file matches"):
        run_prepare(missing)
    assert not Path(missing.output).exists()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="empty"):
        run_prepare(loose(tmp_path, reviews=[str(tmp_path / "empty.jsonl")]))
    path = write_lines(tmp_path / "r.jsonl", [review("a", i, t) for t, i in enumerate("xyz")])
    with pytest.raises(InputError, match=r"lower min_user_interactions=4"):
        run_prepare(loose(tmp_path, reviews=[path], min_user_interactions=4, output=str(tmp_path / "b")))
    (tmp_path / "t.csv").write_text("user,item\n1,2\n")
    with pytest.raises(InputError, match="missing_columns"):
        run_prepare(loose(tmp_path, reviews=[str(tmp_path / "t.csv")], format="table", output=str(tmp_path / "c")))
    (tmp_path / "p.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"u,{i},{i}\n" for i in range(9)))
    with pytest.raises(InputError, match=r"needs times, but .*p\.csv has positions"):
        run_prepare(loose(tmp_path, reviews=[str(tmp_path / "p.csv")], format="table", split="temporal",
                          timestamps="position", output=str(tmp_path / "d")))  # fmt: skip


# --- reductions against plain loops ---------------------------------------------------------------


def random_scan(rows: int = 600, seed: int = 0) -> pa.Table:
    """Unordered rows of three files with many equal times and repeated pairs of user and item."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user_id": [f"u{v}" for v in rng.integers(0, 60, rows)],
            "item_id": [f"i{v}" for v in rng.integers(0, 40, rows)],
            "rating": pa.array(rng.integers(1, 6, rows), pa.float32()),
            "timestamp": rng.integers(0, 50, rows),
            "file": pa.array(rng.integers(0, 3, rows), pa.int32()),
            "row": rng.permutation(rows),
        }
    )


def interactions_of(scan: pa.Table) -> selection.ScannedInteractions:
    """Adds the rows file by file, each in two tables, the later ones first."""
    coded = CodedRows(("user_id", "item_id"), stage.HELD)
    for file in (2, 0, 1):
        rows = scan.filter(pa.compute.equal(scan["file"], file)).sort_by("row")
        for table in (rows.slice(len(rows) // 2), rows.slice(0, len(rows) // 2)):
            coded.add(table, file)
    return selection.from_rows(coded)


def events(scan: pa.Table) -> list[tuple]:
    """(time, file, row, user, item) in chronological order."""
    columns = [scan[name].to_pylist() for name in ("timestamp", "file", "row", "user_id", "item_id")]
    return sorted(zip(*columns, strict=True))


def as_events(data: selection.ScannedInteractions) -> list[tuple]:
    users, items = data.user_ids.to_pylist(), data.item_ids.to_pylist()
    columns = (data.timestamp.tolist(), data.file.tolist(), data.row.tolist())
    names = [users[u] for u in data.user], [items[i] for i in data.item]
    return sorted(zip(*columns, *names, strict=True))


def plain_reduce(rows: list[tuple], config: PrepareConfig) -> list[tuple]:
    ordered = rows if config.keep_duplicate == "first" else rows[::-1]
    kept = rows if config.keep_duplicate == "all" else list({(r[3], r[4]): r for r in reversed(ordered)}.values())
    by_user = defaultdict(list)
    for row in sorted(kept):
        by_user[row[3]].append(row)
    last = config.last_interactions or len(rows)
    kept = sorted(row for history in by_user.values() for row in history[-last:])
    steps = [(4, config.min_item_interactions), (3, config.min_user_interactions)]
    if config.filter == "users_then_items":
        steps.reverse()
    while True:
        before = len(kept)
        for column, minimum in steps:
            count = Counter(row[column] for row in kept)
            kept = [row for row in kept if count[row[column]] >= minimum]
        if config.filter != "k_core" or len(kept) == before:
            return kept


@pytest.mark.parametrize("filter", ["k_core", "items_then_users", "users_then_items"])
@pytest.mark.parametrize("keep", ["first", "last", "all"])
@pytest.mark.parametrize("last", [None, 7])
def test_reduce_against_loops(filter, keep, last):
    scan = random_scan()
    config = PrepareConfig(output="x", reviews=("x",), filter=filter, keep_duplicate=keep, last_interactions=last,
                           min_user_interactions=5, min_item_interactions=6)  # fmt: skip
    kept, dropped = reduce(interactions_of(scan), config)
    assert as_events(kept) == plain_reduce(events(scan), config)
    assert 0 < len(kept) < 600
    assert sum(one.interactions for one in dropped.values()) == 600 - len(kept)


def test_one_pass_filters_and_the_k_core_differ_on_a_chain():
    # u0 has i0 alone, i0 has u0 and u1; dropping u0 leaves i0 with one, and so on.
    user, item = np.array([0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 1])
    once = passes([(item, 2), (user, 2)], repeat=False)
    core = passes([(item, 2), (user, 2)], repeat=True)
    assert once.tolist() == [False, True, True, True, True]
    assert core.tolist() == [False, False, False, True, True]


def test_the_sample_of_users_depends_on_the_seed_alone():
    config = PrepareConfig(output="x", reviews=("x",), sample_users=5, min_user_interactions=1, min_item_interactions=1)
    scan = random_scan()
    shuffled = scan.take(np.random.default_rng(9).permutation(scan.num_rows))
    first, again = (as_events(reduce(interactions_of(table), config)[0]) for table in (scan, shuffled))
    assert first == again
    assert len({event[3] for event in first}) == 5
    other = as_events(reduce(interactions_of(scan), dataclasses.replace(config, seed=1))[0])
    assert {event[3] for event in first} != {event[3] for event in other}


# --- real data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gift_cards(shared_data, tmp_path_factory) -> Run:
    folder = shared_data / "amazon2018_gift_cards"
    return run_prepare(PrepareConfig(
        output=str(tmp_path_factory.mktemp("gift") / "run"), reviews=(f"{folder}/Gift_Cards_5.json.gz",),
        metadata=(f"{folder}/meta*.json.gz",)))  # fmt: skip


def test_gift_cards(gift_cards):
    tables = check_contract(gift_cards)
    assert counts_of(gift_cards)["reviews"]["read"] == 2972
    assert tables["items"].filter(pa.compute.equal(tables["items"]["title"], "")).num_rows == 0
    assert min(Counter(tables["interactions.parquet"]["item_index"].to_pylist()).values()) >= 5


def test_no_rating_outside_train_reaches_train_rating(gift_cards):
    tables = check_contract(gift_cards)
    train = defaultdict(list)
    for row in tables["interactions.parquet"].to_pylist():
        if row["split"] == "train":
            train[row["item_index"]].append(row["rating"])
    for item in tables["items"].to_pylist():
        ratings = train[item["item_index"]]
        assert item["train_rating_count"] == len(ratings)
        assert item["train_rating"] == (pytest.approx(np.mean(ratings)) if ratings else None)
    last_train = {u["user_index"]: u["cutoff_position"] for u in tables["users.parquet"].to_pylist()}
    for row in tables["interactions.parquet"].to_pylist():
        assert (row["split"] == "train") == (row["position"] <= last_train[row["user_index"]])


def test_musical_instruments_without_metadata(shared_data, tmp_path):
    path = shared_data / "amazon2014_musical_instruments" / "Musical_Instruments_5.json.gz"
    run = run_prepare(PrepareConfig(output=str(tmp_path / "run"), reviews=(str(path),)))
    check_contract(run)
    assert read_json(run.file("statistics.json"))["reviews"] == 10_261
    assert counts_of(run)["items"]["without_metadata"] == 900


def test_all_beauty_with_temporal_split(shared_data, tmp_path):
    folder = shared_data / "amazon2023_all_beauty"
    config = loose(tmp_path, reviews=[f"{folder}/All*.gz"], metadata=[f"{folder}/meta*.gz"], split="temporal")
    tables = check_contract(run_prepare(config))
    by_part = defaultdict(list)
    for row in tables["interactions.parquet"].to_pylist():
        by_part[row["split"]].append(row["timestamp"])
    assert max(by_part["train"]) <= min(by_part["validation"]) <= max(by_part["validation"]) < min(by_part["test"])


@pytest.mark.parametrize(
    ("name", "ratings", "rows", "timestamps"),
    [("ml-1m", "interactions", 999_611, "position"), ("ml-100k", "ratings", 99_287, "time")],
)
def test_movielens(shared_data, tmp_path, name, ratings, rows, timestamps):
    folder = shared_data / name
    config = PrepareConfig(output=str(tmp_path / "run"), format="movielens", timestamps=timestamps,
                           reviews=(f"{folder}/{ratings}.csv.gz",), metadata=(f"{folder}/movies.csv.gz",))  # fmt: skip
    run = run_prepare(config)
    assert read_json(run.file("statistics.json"))["reviews"] == rows
    films = {row["title"]: row for row in read_table(run.file("items")).to_pylist()}
    assert films["Toy Story (1995)"]["details"].startswith("Director: John Lasseter Actors: Tom Hanks")
    assert set(read_table(run.file("reviews"), columns=["review_text"])["review_text"].unique().to_pylist()) == {""}
    if name == "ml-100k":
        check_contract(run)


def test_office_products_as_a_table(shared_data, tmp_path):
    folder = shared_data / "amazon2018_office_products"
    config = PrepareConfig(output=str(tmp_path / "run"), format="table", columns={"item_id": "asin"},
                           reviews=(f"{folder}/interactions.csv.gz",),
                           metadata=(f"{folder}/items.jsonl.gz",))  # fmt: skip
    tables = check_contract(run_prepare(config))
    assert min(tables["interactions.parquet"]["timestamp"].to_pylist()) > 900_000_000_000
    assert counts_of(Run(path=config.output, job="prepare", config={}, started=0.0))["reviews"]["read"] == 21_290


@pytest.mark.parametrize(
    ("name", "files", "separator", "film"),
    [
        ("ml-1m", ("ratings.dat", "movies.dat"), "::", "{0}::Film {0} (1999)::Drama|War\n"),
        (
            "ml-100k",
            ("u.data", "u.item"),
            "\t",
            "{0}|Film {0} (1999)|01-Jan-1999||http://x|" + "|".join("0" * 19) + "\n",
        ),
    ],
)
def test_shipped_configurations_read_movielens_as_published(tmp_path, monkeypatch, name, files, separator, film):
    monkeypatch.chdir(tmp_path)
    ratings, films = (tmp_path / "data" / name / file for file in files)
    ratings.parent.mkdir(parents=True)
    rows = [(user, item, 1 + item % 5, 978_300_760 + 60 * item) for user in range(1, 7) for item in range(1, 6)]
    ratings.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    films.write_text("".join(film.format(item) for item in range(1, 6)))
    run = run_prepare(load_config(PrepareConfig, str(CONFIGS / name / "prepare.yaml"), []))
    tables = check_contract(run)
    assert tables["interactions.parquet"].num_rows == len(rows)
    assert set(tables["items"]["title"].to_pylist()) == {f"Film {item} (1999)" for item in range(1, 6)}
    assert min(tables["interactions.parquet"]["timestamp"].to_pylist()) == 978_300_820_000


def test_shipped_configuration_reads_gift_cards_as_published(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gift-cards").symlink_to(shared_data / "amazon2018_gift_cards")
    run = run_prepare(load_config(PrepareConfig, str(CONFIGS / "gift-cards" / "prepare.yaml"), []))
    assert counts_of(run)["reviews"]["kept"] == 2941


def test_every_prepare_configuration_is_valid():
    files = sorted(CONFIGS.rglob("prepare.yaml"))
    assert len(files) >= 5
    for file in files:
        load_config(PrepareConfig, str(file), [])
