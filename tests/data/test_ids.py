"""Ids of all types become the same strings; files of ids keep every character."""

import decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygr.data.ids import check_lines, complete_ids, id_strings, read_id_lines, write_id_lines
from raygr.data.vector_tables import read_vectors
from raygr.prepare.config import PrepareConfig
from raygr.prepare.metadata import read_items
from raygr.prepare.parallel_map import Cpus
from raygr.prepare.reviews import read_reviews

WHOLE = [decimal.Decimal("7.00"), decimal.Decimal("12.00"), None]
SAME_IDS = {
    "string": pa.array(["7", "12", None]),
    "large_string": pa.array(["7", "12", None], pa.large_string()),
    "string_view": pa.array(["7", "12", None], pa.string_view()),
    "dictionary": pa.array(["7", "12", None], pa.large_string()).dictionary_encode(),
    "int64": pa.array([7, 12, None]),
    "uint8": pa.array([7, 12, None], pa.uint8()),
    "float": pa.array([7.0, 12.0, None]),
    "float with NaN": pa.array([7.0, 12.0, float("nan")]),
    "half": pa.array([7.0, 12.0, None], pa.float16()),
    "decimal": pa.array(WHOLE),
    "wide decimal": pa.array(WHOLE, pa.decimal256(60, 2)),
    "dictionary of decimals": pa.array(WHOLE).dictionary_encode(),
    "binary": pa.array([b"7", b"12", None]),
    "binary_view": pa.array([b"7", b"12", None], pa.binary_view()),
}


@pytest.mark.parametrize("column", SAME_IDS.values(), ids=SAME_IDS.keys())
def test_ids_are_the_same_strings_whatever_their_type(column):
    for form in (column, pa.chunked_array([column.slice(0, 1), column.slice(1)])):
        strings, is_bad = id_strings(form)
        assert (strings.type, strings.to_pylist(), is_bad.tolist()) == (pa.string(), ["7", "12", None], [False] * 3)


@pytest.mark.parametrize(
    ("column", "bad"),
    [
        (pa.array([1.0, 1.5, 2.0**53, float("inf")]), [False, True, True, True]),
        (pa.array([decimal.Decimal("1.0"), decimal.Decimal("1.5")]), [False, True]),
        (pa.array([b"a", b"\xff"]), [False, True]),
    ],
)
def test_values_that_are_no_ids_are_marked(column, bad):
    strings, is_bad = id_strings(column)
    assert is_bad.tolist() == bad == strings.is_null().to_pylist()


@pytest.mark.parametrize("column", [pa.array([True]), pa.array([["a"]]), pa.array([0], pa.timestamp("s"))])
def test_types_without_ids_are_refused(column):
    with pytest.raises(ValueError, match="are no ids: use text or whole numbers"):
        id_strings(column)


def test_a_row_without_an_id_is_named():
    column = pa.chunked_array([pa.array([1.0, 2.0]), pa.array([3.0, 4.5])])
    with pytest.raises(ValueError, match=r"t\.parquet: row 4 has no id, but 4\.5"):
        complete_ids(column, "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: row 2 has no id, but 4\.5"):
        complete_ids(column, "t.parquet", length=np.array([2, 2]))


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1), st.sampled_from(["", "\ufeff"]))
def test_ids_survive_a_file_of_one_id_per_line(tmp_path_factory, ids, mark):
    path = str(tmp_path_factory.getbasetemp() / "ids.txt")
    check_lines(ids)
    write_id_lines(ids, path)
    Path(path).write_bytes(mark.encode() + Path(path).read_bytes())
    assert read_id_lines(path) == (ids if mark or not ids[0].startswith("\ufeff") else [ids[0][1:], *ids[1:]])


def test_ids_with_a_line_break_are_refused_for_such_a_file():
    with pytest.raises(ValueError, match=r"'a\\nb' \(1 such\) holds a line break"):
        check_lines(["x\u2028y", "a\nb"])


def test_vectors_keep_ids_with_other_line_ends(tmp_path: Path):
    ids = ["a\u2028b", "c\x85d", "e\x0bf\x1cg", " h "]
    np.save(tmp_path / "v.npy", np.arange(8.0).reshape(4, 2))
    write_id_lines(ids, str(tmp_path / "v.ids.txt"))
    assert (
        read_vectors(str(tmp_path / "v.npy"), subjects="items", column="expected", aspects=None).ids_S.tolist() == ids
    )


@pytest.mark.parametrize("kind", ["decimal", "float", "large_string", "string_view", "dictionary", "int64"])
def test_tables_and_raw_files_read_all_of_them(tmp_path: Path, kind: str):
    ids = SAME_IDS[kind].slice(0, 2)
    pq.write_table(pa.table({"id": ids, "a": [1.0, 2.0]}), tmp_path / "v.parquet")
    assert read_vectors(
        str(tmp_path / "v.parquet"), subjects="items", column="expected", aspects=None
    ).ids_S.tolist() == ["7", "12"]
    path = str(tmp_path / "r.parquet")
    pq.write_table(pa.table({"user_id": ids, "item_id": ids, "timestamp": [1_600_000_000, 1_600_000_001]}), path)
    config = PrepareConfig(output="o", reviews=(path,), format="table", timestamps="position")
    ((scan, _),) = read_reviews(path, config, Cpus(1))
    assert (scan["user_id"].to_pylist(), scan["item_id"].to_pylist()) == (["7", "12"], ["7", "12"])
    ((scan, _),) = read_items(path, config, Cpus(1))
    assert scan["item_id"].to_pylist() == ["7", "12"]


def test_fractions_among_raw_ids_are_refused_by_reason(tmp_path: Path):
    path = str(tmp_path / "r.parquet")
    ids = pa.array([7.0, 1.5, None])
    pq.write_table(pa.table({"user_id": ["a", "b", "c"], "item_id": ids, "timestamp": [1, 2, 3]}), path)
    ((scan, _),) = read_reviews(
        path, PrepareConfig(output="o", reviews=(path,), format="table", timestamps="position"), Cpus(1)
    )
    assert scan["reason"].to_pylist() == [None, "id_not_whole", "missing_item"]
    ((scan, _),) = read_items(
        path, PrepareConfig(output="o", reviews=(path,), format="table", timestamps="position"), Cpus(1)
    )
    assert scan["reason"].to_pylist() == [None, "id_not_whole", "missing_item"]


def test_ids_in_json_tables_are_text_or_whole_numbers(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(f'{{"user_id": {user}, "item_id": "x", "timestamp": 1}}\n' for user in ("7", "7.0", "true", "7.5"))
    )
    ((scan, _),) = read_reviews(
        str(path), PrepareConfig(output="o", reviews=(str(path),), format="table", timestamps="position"), Cpus(1)
    )
    assert scan["user_id"].to_pylist() == ["7", "7", None, None]
    assert scan["reason"].to_pylist() == [None, None, "missing_user", "missing_user"]
