"""Whole blocks and single rows give the same tables, on one CPU and on several."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygr.prepare import metadata, parallel_map, raw_files, reviews
from raygr.prepare.config import PrepareConfig
from raygr.prepare.json_lines import decode_line
from raygr.prepare.metadata import item_texts, read_items
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.raw_files import Lines
from raygr.prepare.reviews import read_reviews

CONFIG = PrepareConfig(output="unused", reviews=("unused",))
IDS = st.one_of(st.sampled_from(["U0", "", "é", "1"]), st.integers(-3, 10**6), st.sampled_from([7.0, 7.5, True, ["U"]]))
NUMBERS = st.sampled_from([4.0, 1, 5, 0, 6.5, "3.0", "good", None, True, float("nan"), float("inf"), 10**40, [4]])
TIMES = st.sampled_from([1_600_000_000_000, 1_600_000_000, "1600000000000", "yesterday", 10**40, None])
TEXTS = st.sampled_from(["fine", "", " <b>A&amp;B</b> ", "cut \ud83d", None, ["a", " b "], {"k": "v"}, 7])
NEW = {
    "user_id": IDS,
    "parent_asin": IDS,
    "asin": IDS,
    "rating": NUMBERS,
    "timestamp": TIMES,
    "title": TEXTS,
    "text": TEXTS,
}
OLD = {
    "reviewerID": IDS,
    "asin": IDS,
    "overall": NUMBERS,
    "unixReviewTime": TIMES,
    "summary": TEXTS,
    "reviewText": TEXTS,
}
ITEM = {
    "parent_asin": IDS,
    "asin": IDS,
    "title": TEXTS,
    "details": TEXTS,
    "average_rating": NUMBERS,
    "rating_number": NUMBERS,
}
GOOD = json.dumps(
    {"user_id": "U1", "parent_asin": "P", "rating": 4, "timestamp": 1_600_000_000_000, "text": "ok"}
).encode()
BROKEN = st.sampled_from([b"", b"  ", b"{", b"[1, 2]", b"null", GOOD * 2, GOOD + b" ", b" " + GOOD, GOOD + b"\r",
                          GOOD.replace(b"ok", b"o\xff"), GOOD.replace(b"ok", rb"o\x"), b"[" * 3000])  # fmt: skip


def lines_of(fields: dict[str, st.SearchStrategy]) -> st.SearchStrategy[bytes]:
    """Lines with any of the fields, each of any type, beside good and broken ones."""
    objects = st.fixed_dictionaries({}, optional=fields).map(lambda row: json.dumps(row).encode())
    return st.lists(st.one_of(objects, st.just(GOOD), BROKEN), min_size=1, max_size=12).map(b"\n".join)


def scanned(read: Any, finish: Any, path: Path) -> tuple[list[dict], list[dict], Counter]:
    """Rows and final texts in order, and the counts of the reasons."""
    found = list(read(str(path), CONFIG, Cpus(1)))
    rows = [row for table, _ in found for row in table.sort_by("row").to_pylist()]
    for row in rows:
        row["snippet"] = row["snippet"] is not None and None  # only the first rows of a block have one
    texts = [row for _, table in found if len(table) for row in finish(table).to_pylist()]
    return rows, texts, Counter(row["reason"] for row in rows)


def assert_same(tmp_path_factory: Any, data: bytes, block: int, read: Any, finish: Any) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_files, "BLOCK_BYTES", block)
        whole = scanned(read, finish, path)
        refusing = type("Refusing", (), {"decode": staticmethod(lambda line: b"\xff".decode())})
        for module in (reviews, metadata):
            scan = module.scan_lines
            patch.setattr(module, "scan_lines", lambda lines, _, *more, scan=scan: scan(lines, refusing, *more))
        row_by_row = scanned(read, finish, path)
    assert whole == row_by_row


@settings(max_examples=80, deadline=None)
@given(st.one_of(lines_of(NEW), lines_of(OLD), lines_of(NEW | OLD)), st.sampled_from([60, 400, 1 << 20]))
def test_blocks_of_reviews_equal_single_rows(tmp_path_factory, data, block):
    assert_same(tmp_path_factory, data, block, read_reviews, lambda texts: texts)


@settings(max_examples=60, deadline=None)
@given(lines_of(ITEM), st.sampled_from([60, 1 << 20]))
def test_blocks_of_metadata_equal_single_rows(tmp_path_factory, data, block):
    assert_same(tmp_path_factory, data, block, read_items, item_texts)


@pytest.mark.parametrize(
    "fields", [{"rating": "3.0", "text": " two  words "}, {"user_id": 17, "title": " <b>x</b>  y"}]
)
def test_a_field_of_another_type_leaves_the_other_fields_as_they_are(fields):
    """Ids and texts are repaired apart: a rating written as text must not collapse the whitespace of a text."""
    line = json.dumps({**json.loads(GOOD), **fields}).encode()
    record = reviews.decode_review(line)
    texts = decode_line(line, reviews.TEXT, reviews.repair_text)
    assert (record.title, record.text) == (texts.title, texts.text)


# --- several CPUs ----------------------------------------------------------------------------


def first_line(lines: Lines) -> bytes:
    if lines.first == 11:
        raise ValueError("the twelfth")
    return lines.split()[0]


@pytest.mark.parametrize("way", [Cpus.in_threads, Cpus.in_processes])
def test_results_keep_their_order_and_errors_come_back(way, monkeypatch):
    monkeypatch.setattr(parallel_map, "FIRST_HERE", 2)
    items = [Lines(number, b"%d\n" % number, []) for number in range(20)]
    found = []
    with pytest.raises(ValueError, match="the twelfth"), Cpus(2) as cpus:
        found.extend(way(cpus, first_line, items))
    assert found == [b"%d" % number for number in range(11)]


def test_several_processes_read_what_one_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(parallel_map, "FIRST_HERE", 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"{", GOOD.replace(b"4", b"9")] * 40))
    with Cpus(2) as cpus:
        one, several = (list(read_reviews(str(path), CONFIG, given)) for given in (Cpus(1), cpus))
    assert len(one) > 5 and np.sum([len(rows) for rows, _ in one]) == 120
    assert one == several
    assert pa.concat_tables(rows for rows, _ in several)["row"].null_count == 0
