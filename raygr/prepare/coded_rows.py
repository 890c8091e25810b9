"""Usable rows of all files as flat arrays: ids as integer codes, without a Python object per row."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MERGE_IDS = 1_000_000
# Of a review, types by column: 28 bytes a row with the codes of its ids and its file.
HELD = {"rating": np.float32, "timestamp": np.int64, "row": np.uint32}


class IdCodes:
    """Codes of ids in the order of their first occurrence.

    Ids that wait are coded together once they are as many as the known ones, so that the work grows linearly.
    """

    def __init__(self) -> None:
        self.known = pa.array([], pa.large_string())
        self.codes: list[np.ndarray] = []
        self._waiting: list[pa.DictionaryArray] = []

    def add(self, ids: pa.ChunkedArray) -> None:
        self._waiting.append(ids.combine_chunks().cast(pa.large_string()).dictionary_encode())
        if sum(len(one.dictionary) for one in self._waiting) > max(MERGE_IDS, len(self.known)):
            self.merge()

    def merge(self) -> None:
        """Codes the ids that wait; known ids keep their codes."""
        known = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self.known)
        chunks = pa.chunked_array([known, *self._waiting]).unify_dictionaries().chunks
        self.known = chunks[0].dictionary
        self.codes += [chunk.indices.to_numpy() for chunk in chunks[1:]]
        self._waiting = []


class CodedRows:
    """Columns of rows that are added in any order; they come out in the order of files and rows."""

    def __init__(self, ids: tuple[str, ...], numbers: Mapping[str, type]) -> None:
        """`ids` and `numbers` are columns of SCAN_SCHEMA; `numbers` gives the types that they are held in."""
        self._ids = {name: IdCodes() for name in ids}
        self._types = numbers
        self._numbers: dict[str, list[np.ndarray]] = {name: [] for name in ("file", *numbers)}
        self._starts: list[tuple[int, int]] = []

    def add(self, rows: pa.Table, file: int) -> None:
        """Adds rows of SCAN_SCHEMA, in order, of the file with this index."""
        if not len(rows):
            return
        self._starts.append((file, rows["row"][0].as_py()))
        for name, codes in self._ids.items():
            codes.add(rows[name])
        self._numbers["file"].append(np.full(len(rows), file, np.int32))
        for name, kind in self._types.items():
            self._numbers[name].append(rows[name].to_numpy().astype(kind))

    def pop(self, name: str) -> np.ndarray:
        """The column of a number, which is no longer held afterwards."""
        return self._joined(self._numbers.pop(name))

    def pop_ids(self, name: str) -> tuple[np.ndarray, pa.Array]:
        """int32 indexes into the sorted distinct ids, and those ids; they are no longer held afterwards."""
        ids = self._ids.pop(name)
        ids.merge()
        order = pc.sort_indices(ids.known).to_numpy()
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return place[self._joined(ids.codes)], ids.known.take(pa.array(order))

    def _joined(self, pieces: list[np.ndarray]) -> np.ndarray:
        order = sorted(range(len(self._starts)), key=self._starts.__getitem__)
        return np.concatenate([pieces[at] for at in order]) if order else np.empty(0, np.int32)
