"""Matrices as Arrow columns of lists, in chunks whose offsets fit into 32 bits."""

import numpy as np
import pyarrow as pa

VALUES_IN_CHUNK = 1 << 30  # the offsets of a chunk are 32-bit integers: fewer than 2**31 values


def list_column(rows: np.ndarray) -> pa.ChunkedArray:
    """The rows of (N, W) as N lists; the values of a contiguous array are not copied."""
    count, width = rows.shape
    step = max(1, VALUES_IN_CHUNK // max(1, width))
    parts = [rows[first : first + step] for first in range(0, count, step)]
    offsets = [pa.array(np.arange(len(part) + 1) * width, pa.int32()) for part in parts]
    chunks = [pa.ListArray.from_arrays(of, pa.array(part.ravel())) for of, part in zip(offsets, parts, strict=True)]
    return pa.chunked_array(chunks, pa.list_(pa.from_numpy_dtype(rows.dtype)))
