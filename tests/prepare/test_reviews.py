"""Raw lines to ids and texts, without Ray: all formats, and all reasons to refuse a row."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raygr.config import ConfigError
from raygr.prepare import raw_files
from raygr.prepare.bad_rows import InputError, Tally
from raygr.prepare.column_files import check_columns
from raygr.prepare.config import PrepareConfig
from raygr.prepare.json_lines import as_text
from raygr.prepare.metadata import item_texts, read_items
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.raw_files import expand_files, file_kind
from raygr.prepare.reviews import read_reviews

GOOD = {"rating": 4.0, "title": "T", "text": "body", "asin": "A0", "parent_asin": "P0", "user_id": "U0",
        "timestamp": 1_600_000_000_000}  # fmt: skip
GOOD_2018 = {"overall": 5.0, "reviewerID": "V0", "asin": "A1", "reviewText": "old", "summary": "S",
             "unixReviewTime": 1_500_000_000}  # fmt: skip


def config(format: str = "amazon", **columns: str) -> PrepareConfig:
    return PrepareConfig(output="unused", reviews=("unused",), format=format, columns=columns)


def write_lines(path: Path, lines: list[bytes | dict]) -> str:
    data = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def scan(path: str, settings: PrepareConfig, read=read_reviews) -> list[dict]:
    return pa.concat_tables(rows for rows, _ in read(path, settings, Cpus(1))).to_pylist()


def texts(path: str, settings: PrepareConfig, rows: list[int], read=read_reviews, finish=None) -> list[dict]:
    found = pa.concat_tables(
        finish(texts) if finish else texts for _, texts in read(path, settings, Cpus(1)) if len(texts)
    )
    return [row for row in found.drop_columns("repaired").to_pylist() if row["row"] in rows]


def reasons(rows: list[dict]) -> Counter:
    return Counter(row["reason"] for row in rows if row["reason"])


def test_amazon_years_are_told_apart_line_by_line(tmp_path):
    path = write_lines(tmp_path / "r.jsonl.gz", [GOOD, GOOD_2018, {**GOOD, "parent_asin": None}])
    rows = scan(path, config())
    assert [(r["user_id"], r["item_id"], r["rating"], r["timestamp"]) for r in rows] == [
        ("U0", "P0", 4.0, 1_600_000_000_000),
        ("V0", "A1", 5.0, 1_500_000_000_000),
        ("U0", "A0", 4.0, 1_600_000_000_000),
    ]
    assert texts(path, config(), [0, 1]) == [
        {"row": 0, "review_title": "T", "review_text": "body"},
        {"row": 1, "review_title": "S", "review_text": "old"},
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"rating": 4.0, "user', "malformed_json"),
        (b"[1, 2]", "malformed_json"),
        (b"[" * 5000, "malformed_json"),
        ({**GOOD, "user_id": None}, "missing_user"),
        ({**GOOD, "user_id": ""}, "missing_user"),
        ({**GOOD, "user_id": ["U"]}, "missing_user"),
        ({**GOOD, "asin": None, "parent_asin": ""}, "missing_item"),
        ({**GOOD, "rating": "good"}, "rating_not_a_number"),
        ({**GOOD, "rating": None}, "rating_not_a_number"),
        ({**GOOD, "rating": True}, "rating_not_a_number"),
        (json.dumps({**GOOD, "rating": float("nan")}).encode(), "rating_not_a_number"),
        ({**GOOD, "rating": 6}, "rating_out_of_range"),
        ({**GOOD, "rating": 0}, "rating_out_of_range"),
        ({**GOOD, "timestamp": "yesterday"}, "time_not_read"),
        ({**GOOD, "timestamp": None}, "time_not_read"),
        ({**GOOD, "timestamp": 1_600_000_000}, "time_out_of_range"),
        ({**GOOD, "timestamp": 10**40}, "time_out_of_range"),
        ({**GOOD_2018, "unixReviewTime": 1_500_000_000_000}, "time_out_of_range"),
        (json.dumps(GOOD).encode().replace(b"body", b"b\xff\xfe"), "invalid_utf8"),
    ],
)
def test_each_bad_line_has_its_reason_and_costs_no_other_line(tmp_path, line, reason):
    rows = scan(write_lines(tmp_path / "r.jsonl", [GOOD, line, GOOD_2018]), config())
    assert reasons(rows) == {reason: 1}
    bad = next(row for row in rows if row["reason"])
    assert bad["row"] == 1
    assert bad["snippet"] and len(bad["snippet"]) <= 120
    assert sorted(row["row"] for row in rows if not row["reason"]) == [0, 2]


def test_lenient_values_are_read(tmp_path):
    odd = {**GOOD, "rating": "3.0", "timestamp": "1600000000000", "user_id": 17, "title": None, "text": ["a", " b "]}
    surrogate = json.dumps({**GOOD, "text": "cut \ud83d"}).encode()
    path = write_lines(tmp_path / "r.jsonl", [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), odd, b"", surrogate])
    rows = scan(path, config())
    assert not reasons(rows)
    assert [row["row"] for row in rows] == [0, 1, 3]  # a blank line is no row but counts as a line
    assert (rows[1]["user_id"], rows[1]["rating"]) == ("17", 3.0)
    assert [t["review_text"] for t in texts(path, config(), [1, 3])] == ["a b", "cut ?"]


def test_two_objects_on_a_line_are_malformed(tmp_path):
    double = json.dumps(GOOD).encode() * 2
    rows = scan(write_lines(tmp_path / "r.jsonl", [double, GOOD]), config())
    assert reasons(rows) == {"malformed_json": 1}


def test_a_blank_line_does_not_make_up_for_two_objects_on_another(tmp_path):
    double = json.dumps(GOOD).encode() * 2
    rows = scan(write_lines(tmp_path / "r.jsonl", [GOOD, b"", double, GOOD_2018]), config())
    assert reasons(rows) == {"malformed_json": 1}
    assert [row["row"] for row in rows if not row["reason"]] == [0, 3]


def test_windows_line_ends_and_a_last_line_without_newline(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD_2018).encode())
    assert [row["row"] for row in scan(str(path), config())] == [0, 1]


def test_row_numbers_go_on_over_block_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 500)
    lines = [{**GOOD, "user_id": f"U{i}", "text": "x" * i} for i in range(50)]
    path = write_lines(tmp_path / "r.jsonl.gz", lines)
    assert [row["user_id"] for row in scan(path, config())] == [f"U{i}" for i in range(50)]
    assert [len(t["review_text"]) for t in texts(path, config(), [3, 17, 49])] == [3, 17, 49]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_broken_gzip_keeps_the_rows_before_the_break(tmp_path, damage):
    rng = np.random.default_rng(0)
    lines = [{**GOOD, "text": rng.bytes(40).hex()} for _ in range(20_000)]
    path = tmp_path / "r.jsonl.gz"
    write_lines(path, lines)
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[:half] if damage == "cut" else data[:half] + b"\xff" * 5000)
    rows = scan(str(path), config())
    good = [row for row in rows if not row["reason"]]
    assert reasons(rows)["broken_gzip"] == 1
    assert 9_000 < len(good) < 11_000
    assert len(rows) - len(good) < 200  # garbage may inflate to nonsense lines before zlib notices


def test_a_line_without_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(raw_files, "MAX_LINE_BYTES", 5000)
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b"x" * 20_000)
    assert reasons(scan(str(path), config())) == {"line_too_long": 1}


def test_examples_are_three_per_reason(tmp_path):
    path = write_lines(tmp_path / "r.jsonl", [{**GOOD, "user_id": ""}] * 9 + [GOOD])
    tally = Tally([path])
    for rows, _ in read_reviews(path, config(), Cpus(1)):
        tally.add(rows, file=0)
    record = tally.record()
    assert (record["read"], record["by_reason"]) == (10, {"missing_user": 9})
    assert [e["line"] for e in record["examples"]["missing_user"]] == [1, 2, 3]
    with pytest.raises(InputError, match=r"9 of 10 rows are bad.*(?s:.)*missing_user: 9"):
        tally.check(0.5, what="reviews")


def test_published_movielens_files(tmp_path):
    (tmp_path / "ratings.dat").write_bytes(b"1::1193::5::978300760\n1::661::3::x\n2::7\n")
    (tmp_path / "movies.dat").write_bytes("1193::Café Noir (1995)::Drama|War\n".encode("latin-1"))
    (tmp_path / "u.data").write_bytes(b"196\t242\t3\t881250949\n")
    flags = "|".join("1" if i in (1, 18) else "0" for i in range(19))
    (tmp_path / "u.item").write_bytes(f"242|Kolya (1996)|24-Jan-1997||http://x|{flags}\n".encode())
    rows = scan(str(tmp_path / "ratings.dat"), config("movielens"))
    assert reasons(rows) == {"time_not_read": 1, "missing_columns_in_line": 1}
    assert (rows[0]["item_id"], rows[0]["timestamp"]) == ("1193", 978_300_760_000)
    assert scan(str(tmp_path / "u.data"), config("movielens"))[0]["user_id"] == "196"
    film = texts(str(tmp_path / "movies.dat"), config("movielens"), [0], read_items, item_texts)[0]
    assert (film["title"], film["categories"], film["details"]) == ("Café Noir (1995)", "Drama War", "")
    film = texts(str(tmp_path / "u.item"), config("movielens"), [0], read_items, item_texts)[0]
    assert (film["title"], film["categories"]) == ("Kolya (1996)", "Action Western")


def test_movielens_csv_of_other_releases_and_its_missing_columns(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,bad,1147868817\n,1,3,1147868817\n")
    rows = scan(str(path), config("movielens"))
    assert reasons(rows) == {"rating_not_a_number": 1, "missing_user": 1}
    assert rows[0]["timestamp"] == 1_147_880_044_000
    path.write_text("user,movie\n1,2\n")
    rows = scan(str(path), config("movielens"))
    assert reasons(rows) == {"missing_columns": 1}
    assert "user_id/userId" in rows[0]["snippet"]


def test_movie_plot_genres_and_credits_become_item_texts(tmp_path):
    path = tmp_path / "movies.csv"
    path.write_text('movie_id,title,genres,director,actors,plot\n1,One,A|B,Ann,"X, Y","Line\nbreak"\n2,Two,A,,,\n')
    assert [r["item_id"] for r in scan(str(path), config("movielens"), read_items)] == ["1", "2"]
    one, two = texts(str(path), config("movielens"), [0, 1], read_items, item_texts)
    assert (one["description"], one["categories"], one["details"]) == (
        "Line\nbreak", "A B", "Director: Ann Actors: X, Y")  # fmt: skip
    assert (two["description"], two["details"]) == ("", "")


def test_a_named_column_that_the_file_has_not_is_no_silent_default(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("user_id,item_id,timestamp,stars\na,x,1500000000,5\n")
    assert scan(str(path), config("table", rating="stars"))[0]["rating"] == 5.0
    rows = scan(str(path), config("table", rating="star"))
    assert reasons(rows) == {"missing_columns": 1}
    assert rows[0]["snippet"].startswith("no star among user_id, item_id")


@pytest.mark.parametrize(
    ("format", "columns", "message"),
    [
        ("table", {"ratings": "stars"}, "columns: our names do not include ratings; they are user_id, item_id, rating"),
        ("amazon", {"rating": "stars"}, "columns: only for format: table, not for amazon"),
    ],
)
def test_columns_that_would_have_no_effect_are_refused(format: str, columns: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        check_columns(config(format, **columns))


def test_csv_table_with_bad_bytes_short_rows_and_no_rating(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(
        gzip.compress(b"who,what,when,words\na,x,1500000000,hi\nb\xff,x,1500000000,ho\nc,y\nd,y,1500000001,\n")
    )
    names = {"user_id": "who", "item_id": "what", "timestamp": "when", "review_text": "words"}
    rows = scan(str(path), config("table", **names))
    assert reasons(rows) == {"invalid_utf8": 1, "malformed_csv": 1}
    good = [(r["user_id"], r["rating"], r["timestamp"], r["row"]) for r in rows if not r["reason"]]
    assert good == [("a", None, 1_500_000_000_000, 0), ("d", None, 1_500_000_001_000, 3)]
    assert [t["review_text"] for t in texts(str(path), config("table", **names), [0, 3])] == ["hi", ""]


def test_broken_gzip_of_a_csv(tmp_path):
    rng = np.random.default_rng(0)
    body = "".join(f"u{rng.integers(1 << 40)},i{i},{1_500_000_000 + i}\n" for i in range(5000))
    data = gzip.compress(("user_id,item_id,timestamp\n" + body).encode())
    path = tmp_path / "t.csv.gz"
    path.write_bytes(data[: len(data) // 2])
    rows = scan(str(path), config("table"))
    assert reasons(rows)["broken_gzip"] == 1
    assert sum(row["reason"] is None for row in rows) > 1500


def test_parquet_and_json_tables(tmp_path):
    table = pa.table({"user_id": [1, 2], "item_id": ["x", None], "rating": [4.5, None],
                      "timestamp": pa.array([1_500_000_000_000] * 2, pa.timestamp("ms"))})  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    rows = scan(str(tmp_path / "t.parquet"), config("table"))
    assert (rows[0]["user_id"], rows[0]["rating"], rows[0]["timestamp"]) == ("1", 4.5, 1_500_000_000_000)
    assert rows[1]["reason"] == "missing_item"
    path = write_lines(tmp_path / "t.jsonl", [{"user_id": "a", "asin": "x", "timestamp": 1_500_000_000}, b"{"])
    rows = scan(path, config("table", item_id="asin"))
    assert (rows[0]["item_id"], rows[0]["rating"], rows[0]["timestamp"]) == ("x", None, 1_500_000_000_000)
    assert reasons(rows) == {"malformed_json": 1}
    (tmp_path / "no.parquet").write_bytes(b"no parquet at all")
    assert reasons(scan(str(tmp_path / "no.parquet"), config("table"))) == {"broken_parquet": 1}


def test_item_texts_of_2023_2018_and_2014(tmp_path):
    new = {"parent_asin": "P", "title": "New", "description": ["a", "b"], "features": ["f"], "categories": ["C", "D"],
           "details": '{"Size": "L", "Rank": {"Toys": 3}, "None": null}', "average_rating": 4.5,
           "rating_number": 7}  # fmt: skip
    old = {"asin": "Q", "title": None, "description": [], "feature": ["only", "features"], "category": ["E"],
           "details": {"\n   Weight: \n  ": " 3 ounces\n"}, "brand": "Acme"}  # fmt: skip
    oldest = b"{'asin': 'R', 'title': \"It's\", 'categories': [['G', 'H']]}"
    path = write_lines(tmp_path / "m.jsonl", [new, old, oldest, b"{", {"title": "nameless"}])
    rows = scan(path, config(), read_items)
    assert [r["item_id"] for r in rows if not r["reason"]] == ["P", "Q", "R"]
    assert reasons(rows) == {"malformed_json": 1, "missing_item": 1}
    one, two, three = texts(path, config(), [0, 1, 2], read_items, item_texts)
    assert one == {"row": 0, "title": "New", "description": "a b", "categories": "C D",
                   "details": "Size: L Rank: Toys: 3", "rating": 4.5, "rating_count": 7}  # fmt: skip
    assert (two["title"], two["description"], two["details"]) == ("", "only features", "Brand: Acme Weight: 3 ounces")
    assert (three["title"], three["categories"], three["rating"]) == ("It's", "G H", None)


def test_files_are_expanded_sorted_and_missing_ones_named(tmp_path):
    for name in ("b.csv", "a.csv", "c.txt"):
        (tmp_path / name).touch()
    patterns = [f"{tmp_path}/c.txt", f"{tmp_path}/*.csv", f"{tmp_path}/a.csv"]
    assert [Path(file).name for file in expand_files(patterns, what="reviews")] == ["c.txt", "a.csv", "b.csv"]
    with pytest.raises(InputError, match=r"no file matches .*nothing"):
        expand_files([f"{tmp_path}/nothing*.gz"], what="reviews")


def test_extension_before_compression():
    assert [file_kind(p) for p in ("a/x.jsonl.gz", "s3://b/u.data", "ratings.DAT", "t.csv.bz2")] == [
        "jsonl", "data", "dat", "csv"]  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("<b>A&amp;B</b><br />c", "A&B c"),
        ("I <3 this, 2 < 3 > 1", "I <3 this, 2 < 3 > 1"),
        ("Mother&#39;s Day &lt;br&gt;", "Mother's Day <br>"),  # written as text, so it stays text
        (["<div class='x'>one</div>", {"key": "&quot;two&quot;"}], 'one key: "two"'),
        ("AT&T", "AT&T"),
    ],
)
def test_html_becomes_plain_text(raw, plain):
    assert as_text(raw) == plain


def test_a_lone_surrogate_costs_nothing_in_a_json_table(tmp_path):
    line = b'{"user_id": "a", "item_id": "x", "timestamp": 1500000000, "review_text": "bad \\ud800"}'
    path = write_lines(tmp_path / "t.jsonl", [line])
    assert not reasons(scan(path, config("table")))
    assert texts(path, config("table"), [0])[0]["review_text"] == "bad ?"


def test_a_column_that_no_json_row_has_is_missing(tmp_path):
    row = {"user_id": "a", "item_id": "x", "timestamp": 1_500_000_000, "stars": 4}
    rows = scan(write_lines(tmp_path / "t.jsonl", [row]), config("table", rating="strs"))
    assert reasons(rows) == {"missing_columns": 1}
    assert rows[-1]["snippet"] == "no strs among user_id, item_id, timestamp, stars"


def test_counts_out_of_range_are_unknown(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [{"parent_asin": "P", "rating_number": 3_000_000_000}])
    assert texts(path, config(), [0], read_items, item_texts)[0]["rating_count"] is None


def test_half_stars_of_movielens_are_ratings(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::7::0.5::1600000000\n")
    assert scan(str(tmp_path / "ratings.dat"), config("movielens"))[0]["rating"] == 0.5


def test_columns_of_metadata_apart(tmp_path):
    (tmp_path / "m.csv").write_text("id,name\nx,N\n")
    settings = PrepareConfig(output="o", reviews=("r",), format="table", columns={"item_id": "product_id"},
                             item_columns={"item_id": "id", "title": "name"})  # fmt: skip
    assert scan(str(tmp_path / "m.csv"), settings, read_items)[0]["item_id"] == "x"
    assert texts(str(tmp_path / "m.csv"), settings, [0], read_items, item_texts)[0]["title"] == "N"


def test_json_of_other_kinds(tmp_path):
    python2 = b"{u'user_id': u'a', u'item_id': u'x', u'timestamp': 1500000000}"
    assert scan(write_lines(tmp_path / "t.ndjson", [python2]), config("table"))[0]["user_id"] == "a"
    rows = scan(write_lines(tmp_path / "t.json", [b'[{"user_id": "a"}]']), config("table"))
    assert (reasons(rows), rows[0]["snippet"][:12]) == ({"not_json_lines": 1}, "a JSON array")


@pytest.mark.parametrize(
    ("name", "data", "reason", "snippet"),
    [
        ("a.csv.bz2", b"no bzip2 at all", "broken_bz2", "breaks off after row 0 (OSError"),
        ("a.csv.zip", b"no zip at all", "broken_zip", "breaks off after row 0 (BadZipFile"),
        ("a.csv", gzip.compress(b"user_id\n"), "misnamed_file", "its first bytes are those of a gzip file"),
        ("a.parquet", b"<html>", "broken_parquet", "cannot be read as Parquet"),
    ],
)
def test_a_bad_file_is_one_refusal_with_its_reason(tmp_path, name, data, reason, snippet):
    (tmp_path / name).write_bytes(data)
    [row] = scan(str(tmp_path / name), config("table"))
    assert (row["reason"], row["snippet"][: len(snippet)]) == (reason, snippet)


def test_parquet_columns_that_are_nested_views_or_finer_than_milliseconds(tmp_path):
    plain = {"item_id": ["x"], "timestamp": pa.array([1_500_000_000_123_456_789], pa.timestamp("ns", "Europe/Berlin"))}
    pq.write_table(pa.table({"user_id": [{"a": 1}], **plain}), tmp_path / "a.parquet")
    assert "user_id is a struct" in scan(str(tmp_path / "a.parquet"), config("table"))[0]["snippet"]
    for ids in (pa.array(["1"], pa.string_view()), pa.array(["1"]).dictionary_encode(), pa.array([1.0])):
        pq.write_table(pa.table({"user_id": ids, **plain}), tmp_path / "b.parquet")
        [row] = scan(str(tmp_path / "b.parquet"), config("table"))
        assert (row["user_id"], row["timestamp"], row["reason"]) == ("1", 1_500_000_000_123, None)
