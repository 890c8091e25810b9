"""Columns of lists with more values than 32-bit offsets can count."""

import numpy as np
import pyarrow as pa
import torch

from raygr.data import list_columns
from raygr.data.vector_tables import list_rows
from raygr.schema import CANDIDATE_SCHEMA
from raygr.train.outputs import candidate_table


def test_rows_come_in_chunks_that_their_offsets_can_count(monkeypatch):
    """36 million users with 60 values each exceed 2**31 values, the limit of the offsets of one chunk."""
    assert list_columns.VALUES_IN_CHUNK < 2**31
    monkeypatch.setattr(list_columns, "VALUES_IN_CHUNK", 7)
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    column = list_columns.list_column(rows)
    assert (column.type, [len(chunk) for chunk in column.chunks]) == (pa.list_(pa.float32()), [2] * 5)
    np.testing.assert_array_equal(np.array(column.to_pylist(), np.float32), rows)
    np.testing.assert_array_equal(list_rows(column, "v"), rows)
    drawn = torch.arange(12).reshape(4, 3)
    table = candidate_table({"uniform-100": drawn})
    assert table.schema.equals(CANDIDATE_SCHEMA) and table["items"].num_chunks == 2
    assert table["items"].to_pylist() == drawn.tolist()
    assert table["user_index"].to_pylist() == [0, 1, 2, 3]


def test_no_rows_are_a_column_too():
    assert len(list_columns.list_column(np.empty((0, 3), np.float32))) == 0


def test_lists_of_any_kind_are_rows():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    for kind in (pa.list_(pa.float64(), 2), pa.large_list(pa.float32()), pa.list_(pa.int64())):
        column = pa.chunked_array([pa.array(rows[:1], kind), pa.array(rows[1:], kind)])
        assert list_rows(column, "v").tolist() == rows
