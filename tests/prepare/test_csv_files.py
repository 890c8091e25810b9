"""CSV files in all forms and with all kinds of damage: a bad row costs only itself."""

import gzip
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygr.config import ConfigError
from raygr.prepare import csv_files, raw_files
from raygr.prepare.bad_rows import InputError, Tally
from raygr.prepare.column_files import check_columns
from raygr.prepare.config import PrepareConfig
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.reviews import read_reviews

HEADER = "user_id,item_id,rating,timestamp,review_text"
TEXTS = ["fine", "good, very", 'say "hi"', "two\nlines", "", "é", "a\n\nb", '"', 'l1\n"q" he said, "x"\nl3', '\n""']


def table(**given) -> PrepareConfig:
    return PrepareConfig(output="unused", reviews=("unused",), format="table", **given)


def scan(path: Path, **given) -> list[dict]:
    return (
        pa.concat_tables(rows for rows, _ in read_reviews(str(path), table(**given), Cpus(1)))
        .sort_by("row")
        .to_pylist()
    )


def texts_of(path: Path) -> pa.Table:
    return pa.concat_tables(texts for _, texts in read_reviews(str(path), table(), Cpus(1)) if len(texts))


def reasons(rows: list[dict]) -> Counter:
    return Counter(row["reason"] for row in rows if row["reason"])


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def lines(count: int, text: str = '"fine"') -> list[str]:
    return [HEADER, *(f"u{i},i{i},4,{1_500_000_000 + i},{text}" for i in range(count))]


def test_a_quote_that_never_closes_costs_its_row_alone(tmp_path):
    rows = lines(1200, "fine")
    rows[301] = rows[301].replace("fine", '"fine')
    (tmp_path / "a.csv").write_text("\n".join(rows))
    found = scan(tmp_path / "a.csv")
    assert (len(found), reasons(found), found[300]["reason"]) == (1200, {"unclosed_quote": 1}, "unclosed_quote")


def test_two_stray_quotes_swallow_no_rows_between_them(tmp_path):
    rows = lines(100, "fine")
    rows[11], rows[60] = rows[11].replace("fine", '"fine'), rows[60].replace("fine", 'fine"')
    (tmp_path / "a.csv").write_text("\n".join(rows))
    found = scan(tmp_path / "a.csv")
    assert (len(found), reasons(found)) == (100, {"unclosed_quote": 1})


def test_a_long_row_and_its_neighbours_are_read(tmp_path):
    rows = lines(20, "fine")
    rows[11] = rows[11].replace("fine", "x" * 9_000_000)
    (tmp_path / "a.csv").write_text("\n".join(rows))
    found = scan(tmp_path / "a.csv")
    assert (len(found), reasons(found)) == (20, {})


def test_a_row_beyond_the_limit_is_refused_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "MAX_ROW_BYTES", 2000)
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 500)
    rows = lines(20, "fine")
    rows[11] = rows[11].replace("fine", "x" * 9000)
    (tmp_path / "a.csv").write_text("\n".join(rows))
    found = scan(tmp_path / "a.csv")
    assert (len(found), reasons(found), found[10]["row"]) == (20, {"line_too_long": 1}, 10)


def test_a_cut_gzip_is_fatal_unless_allowed(tmp_path):
    body = "\n".join([HEADER, *(f"u{i * 7919 % 9973},i{i},4,{1_500_000_000 + i},x" for i in range(3000))])
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(body.encode())[:9000])
    tally = Tally([str(path)])
    for rows, _ in read_reviews(str(path), table(), Cpus(1)):
        tally.add(rows, file=0)
    with pytest.raises(InputError, match=rf"a\.csv\.gz breaks off after row {tally.read - 1} .*allow_broken_files"):
        tally.check(1.0, what="reviews")
    tally.check(1.0, what="reviews", allow_broken_files=True)
    assert tally.times().startswith("times from 2017-07-14 02:40:00 to ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "user_id;item_id;rating;timestamp\nu;i;4;1600000000\n"),
        ("a.tsv", "user_id\titem_id\trating\ttimestamp\nu\ti\t4\t1600000000\n"),
        ("a.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4.0\t1600000000\n"),
        ("b.csv", "user_id, item_id, rating, timestamp\nu,i,4,1600000000\n"),
        ("c.csv", "user_id,item_id,rating,timestamp\ru,i,4,1600000000\r"),
    ],
)
def test_separators_and_headers(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    [row] = scan(tmp_path / name)
    assert (row["user_id"], row["item_id"], row["rating"], row["timestamp"]) == ("u", "i", 4.0, 1_600_000_000_000)


def test_positions_without_a_header_and_their_contradictions(tmp_path):
    (tmp_path / "a.csv").write_text("7,2020-09-13T12:26:40.123Z,u,4\n")
    places = {"user_id": 2, "item_id": 0, "timestamp": 1}
    [row] = scan(tmp_path / "a.csv", header=False, columns=places)
    assert (row["user_id"], row["item_id"], row["timestamp"]) == ("u", "7", 1_600_000_000_123)
    with pytest.raises(ConfigError, match="set header: false"):
        check_columns(table(columns=places))
    with pytest.raises(ConfigError, match="needs positions"):
        check_columns(table(header=False))


def test_windows_texts_are_read_and_counted(tmp_path):
    (tmp_path / "a.csv").write_bytes((HEADER + "\nu,i,4,1600000000,Café ’\nv,i,4,1600000000,x\n").encode("cp1252"))
    rows = texts_of(tmp_path / "a.csv")
    assert (rows["review_text"].to_pylist(), rows["repaired"].to_pylist()) == (["Café ’", "x"], [True, False])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=20), st.sampled_from(["\n", "\r\n"]), st.integers(40, 400))
def test_any_text_is_read_back_over_any_block_border(tmp_path_factory, texts, end, block):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    rows = [f"u{i},i,4,1600000000,{quoted(text)}" for i, text in enumerate(texts)]
    path.write_bytes(end.join([HEADER, *rows]).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK_BYTES", block)
        found = texts_of(path)
    assert found["review_text"].to_pylist() == texts


def damaged(line: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(line))
    kinds = (line[:at], line[:at] + bytes([draw.randrange(256)]) + line[at + 1 :], line[:at] + b'"' + line[at:],
             line.replace(b",", b"", 1), line[:at] + b"\r" + line[at:], line[:at] + b"\n" + line[at:])  # fmt: skip
    return draw.choice(kinds)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(TEXTS), min_size=2, max_size=20), st.integers(0, 10**6), st.sampled_from([40, 100, 4096])
)
def test_damage_costs_its_own_rows_alone_and_every_row_is_counted(tmp_path_factory, texts, seed, block):
    draw, path = random.Random(seed), tmp_path_factory.mktemp("csv") / "a.csv"
    rows = [f"user{i},i,4,{1_500_000_000 + i},{quoted(text)}".encode() for i, text in enumerate(texts)]
    hit = {draw.randrange(len(rows)) for _ in range(draw.randrange(3))}
    rows = [damaged(row, draw) if i in hit else row for i, row in enumerate(rows)]
    path.write_bytes(b"\n".join([HEADER.encode(), *rows]) + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK_BYTES", block)
        found = scan(path)
    assert [row["row"] for row in found] == list(range(len(found)))  # usable or refused, each one once
    usable = {(row["user_id"], row["timestamp"]) for row in found if row["reason"] is None}
    assert usable >= {(f"user{i}", (1_500_000_000 + i) * 1000) for i in range(len(rows)) if i not in hit}
