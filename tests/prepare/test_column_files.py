"""Tables of all writers are read alike; damage costs only its own rows, and each row is usable or has a reason."""

import json
import random
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from raygr.prepare import raw_files
from raygr.prepare.config import PrepareConfig
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.reviews import read_reviews

START = 1_500_000_000_000  # ms
WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6).filter(lambda text: text.strip())
IDS = st.one_of(WORDS, st.integers(0, 10**9))
ROW = st.tuples(IDS, IDS, st.sampled_from([None, 1.0, 2.5, 5.0]), st.integers(START, START + 10**11))
NAMES = ("user_id", "item_id", "rating", "timestamp")
TIME_TYPES = [pa.timestamp(unit, zone) for unit in ("ms", "us", "ns") for zone in (None, "UTC", "Europe/Berlin")]
TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]


def scan(path: Path) -> list[dict]:
    config = PrepareConfig(output="unused", reviews=(str(path),), format="table")
    return [row for rows, _ in read_reviews(str(path), config, Cpus(1)) for row in rows.sort_by("row").to_pylist()]


def usable(rows: list[dict]) -> list[tuple]:
    assert [row["row"] for row in rows] == list(range(len(rows)))  # each row once, usable or refused
    return [tuple(row[name] for name in NAMES) for row in rows if row["reason"] is None]


def as_read(rows: list[tuple]) -> list[tuple]:
    return [(str(user), str(item), rating, time) for user, item, rating, time in rows]


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.integers(40, 400))
def test_json_lines_are_read_back_over_any_block_border(tmp_path_factory, rows, block):
    path = tmp_path_factory.mktemp("json") / "a.jsonl"
    path.write_text("".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK_BYTES", block)
        assert usable(scan(path)) == as_read(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.sampled_from(TEXT_TYPES), st.sampled_from(TIME_TYPES))
def test_parquet_of_any_types_is_read_back(tmp_path_factory, rows, text_type, time_type):
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    users, items, ratings, times = zip(*as_read(rows), strict=True)
    ids = [pa.array(column, pa.string()).cast(text_type) for column in (users, items)]
    stamps = pa.array(times, pa.timestamp("ms", time_type.tz)).cast(time_type)
    pq.write_table(pa.table([*ids, pa.array(ratings, pa.float64()), stamps], names=NAMES), path)
    assert usable(scan(path)) == as_read(rows)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([40, 4096]))
def test_damaged_json_lines_cost_their_own_rows_alone(tmp_path_factory, seed, block):
    draw, path = random.Random(seed), tmp_path_factory.mktemp("json") / "a.jsonl"
    whole = [(f"user{n}", "i", 4.0, START + n) for n in range(draw.randrange(2, 20))]
    lines = [json.dumps(dict(zip(NAMES, row, strict=True))).encode() for row in whole]
    hit = {draw.randrange(len(lines)) for _ in range(draw.randrange(3))}
    for n in hit:
        at = draw.randrange(1, len(lines[n]))  # a blank line is no row
        changed = bytes([draw.randrange(256)])
        lines[n] = draw.choice([lines[n][:at], lines[n][:at] + changed + lines[n][at + 1 :], lines[n] + lines[n]])
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK_BYTES", block)
        found = usable(scan(path))
    assert set(found) >= {row for n, row in enumerate(whole) if n not in hit}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_a_damaged_parquet_file_is_refused_with_a_reason_and_never_an_error(tmp_path_factory, seed, is_cut):
    """A cut file is always detected; a changed bit may not be, because Parquet files have no checksums by default."""
    draw, path = random.Random(seed), tmp_path_factory.mktemp("parquet") / "a.parquet"
    columns = [["u"] * 50, [f"i{n}" for n in range(50)], [4.0] * 50, [START + n for n in range(50)]]
    pq.write_table(pa.table(columns, names=NAMES), path)
    data = bytearray(path.read_bytes())
    if is_cut:
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    rows = scan(path)
    assert len(rows) <= 51  # its rows, and the refusal
    if is_cut:
        assert [row["reason"] for row in rows] == ["broken_parquet"]
