"""Reading and aligning tables of id -> vector; each refusal states what is wrong."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_data import write_csv, write_score_run

from raygr import files
from raygr.data.vector_tables import Vectors, align_items, read_vectors

IDS_I = np.array(["i1", "i2", "i3", "i4"])


def read(path: str, *, column: str = "expected", aspects: tuple[str, ...] | None = None) -> Vectors:
    return read_vectors(path, subjects="items", column=column, aspects=aspects)


def align(vectors: Vectors, *, missing: str = "mean", control: str = "none", seed: int = 0):
    return align_items(vectors, IDS_I, missing=missing, control=control, seed=seed)


def test_a_score_run_of_an_older_version_names_its_aspects_in_every_row(tmp_path: Path):
    path = write_score_run(tmp_path / "run", {"i1": [1.0, 2.0], "i0": [3.0, None]}, aspects=["pace", "tension"])
    part = f"{path}/scores/part-0.parquet"
    rows = files.read_table(part).replace_schema_metadata(None)
    assert rows.schema.field("mode").type == pa.dictionary(pa.int32(), pa.string())
    for name in ("model", "adapter", "mode"):
        place = rows.column_names.index(name)
        rows = rows.set_column(place, name, rows[name].cast(pa.string()))
    named = rows.append_column("aspects", pa.array([["pace", "tension"]] * 2))
    files.write_table(named, part)
    vectors = read(path)
    assert vectors.aspects == ("pace", "tension") and vectors.ids_S.tolist() == ["i0", "i1"]
    np.testing.assert_array_equal(vectors.values_SA, [[3, np.nan], [1, 2]])
    files.write_table(rows.append_column("aspects", pa.array([["pace", "tension"], ["pace", "wit"]])), part)
    with pytest.raises(ValueError, match="not all rows have the aspects pace, tension; score again into a new folder"):
        read(path)


def test_score_run_gives_either_column_and_any_aspects(tmp_path: Path):
    path = write_score_run(tmp_path / "run", {"i1": [1.4, 2.0], "i2": [3.0, None]}, aspects=["pace", "tension"])
    vectors = read(path)
    assert vectors.ids_S.tolist() == ["i1", "i2"]
    assert vectors.values_SA == pytest.approx(np.array([[1.4, 2.0], [3.0, np.nan]]), nan_ok=True)
    assert read(path, column="ratings").values_SA[0].tolist() == [1.0, 2.0]
    swapped = read(path, aspects=("tension", "pace"))
    assert swapped.values_SA[0].tolist() == pytest.approx([2.0, 1.4])
    with pytest.raises(ValueError, match="no aspect speed; it has: pace, tension"):
        read(path, aspects=("speed",))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_own_vectors_from_a_file(tmp_path: Path, suffix: str):
    path = tmp_path / f"vectors.{suffix}"
    if suffix == "csv":
        write_csv(path, {"7": [0.5, -1], "8": [2, 3]}, ["a", "b"])
    else:
        pq.write_table(pa.table({"id": [7, 8], "a": [0.5, 2.0], "b": [-1, 3]}), path)
    vectors = read(str(path))
    assert vectors.ids_S.tolist() == ["7", "8"]
    assert vectors.aspects == ("a", "b")
    assert vectors.values_SA.tolist() == [[0.5, -1], [2, 3]]


def test_ids_of_a_csv_file_keep_their_zeros(tmp_path: Path):
    path = tmp_path / "vectors.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfid,a\n0005019281,3\n0005,4\n"))
    vectors = read(str(path))
    assert (vectors.ids_S.tolist(), vectors.aspects) == (["0005019281", "0005"], ("a",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,a\ni1,1\ni1,2\n", "id i1 occurs more than once"),
        ("id,a\ni1,1\ni2,\n", "column 'a' has an empty or infinite value in row 2"),
        ("id,a\ni1,high\n", "column 'a' is string, not numeric"),
        ("id\ni1\n", "expected an id column and at least one numeric column"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read(str(path))


def test_a_subject_scored_twice_is_refused(tmp_path: Path):
    path = Path(write_score_run(tmp_path / "run", {"i1": [1.0]}, aspects=["pace"]))
    part = path / "scores" / "part-0.parquet"
    pq.write_table(pq.read_table(part), path / "scores" / "part-1.parquet")
    with pytest.raises(ValueError, match="more than one score of i1"):
        read(str(path))


def test_a_missing_path_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read("nowhere.csv")


def test_missing_scores_stay_missing_or_are_refused():
    vectors = Vectors(np.array(["i3", "i1", "x"]), ("a",), np.array([[4.0], [8.0], [1.0]]))
    aligned = align(vectors)
    assert aligned.scores_IA[:, 0] == pytest.approx([8, np.nan, 4, np.nan], nan_ok=True)
    assert (aligned.missing, aligned.unknown) == (2, 1)
    with pytest.raises(ValueError, match="2 items have no complete scores, such as i2, i4"):
        align(vectors, missing="refuse")


def test_ids_of_other_data_are_refused():
    with pytest.raises(ValueError, match="none of the scored ids"):
        align(Vectors(np.array(["99"]), ("a",), np.array([[4.0]])))


def test_shuffling_moves_whole_rows_among_the_scored_items():
    vectors = Vectors(IDS_I[:3], ("a", "b"), np.array([[1.0, 2], [3, 4], [5, 6]]))
    shuffled = [align(vectors, control="shuffled", seed=seed).scores_IA for seed in range(5)]
    for scores_IA in shuffled:
        assert sorted(map(tuple, scores_IA[:3])) == [(1, 2), (3, 4), (5, 6)]
        assert np.isnan(scores_IA[3]).all()
    assert any(scores_IA[:3].tolist() != [[1, 2], [3, 4], [5, 6]] for scores_IA in shuffled)
    assert np.array_equal(shuffled[1], align(vectors, control="shuffled", seed=1).scores_IA, equal_nan=True)


def test_random_control_has_nothing_of_the_scores():
    vectors = Vectors(IDS_I, ("a",), np.array([[1.0], [1], [1], [1]]))
    scores_IA = align(vectors, control="random").scores_IA
    assert len(set(scores_IA[:, 0])) == 4


def test_vectors_in_one_list_column(tmp_path: Path):
    path = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"id": ["b", "a"], "vector": [[0.5, -1.0], [2.0, 3.0]]}), path)
    vectors = read(str(path))
    assert (vectors.ids_S.tolist(), vectors.aspects) == (["b", "a"], ("v0", "v1"))
    assert vectors.values_SA.tolist() == [[0.5, -1], [2, 3]]
    pq.write_table(pa.table({"id": ["b", "a"], "vector": [[0.5, -1.0], [2.0]]}), path)
    with pytest.raises(ValueError, match=r"vectors\.parquet: column 'vector': the lists have different lengths"):
        read(str(path))


def test_an_array_has_its_ids_beside_it(tmp_path: Path):
    path, names = tmp_path / "vectors.npy", tmp_path / "vectors.ids.txt"
    np.save(path, np.array([[0.5, -1.0], [2.0, 3.0]], np.float32))
    with pytest.raises(FileNotFoundError, match=r"vectors\.npy holds no ids: write one id per line.* to .*ids\.txt"):
        read(str(path))
    names.write_text("007\ni2\n")
    vectors = read(str(path))
    assert vectors.ids_S.tolist() == ["007", "i2"] and vectors.values_SA.tolist() == [[0.5, -1], [2, 3]]
    names.write_text("007\n")
    with pytest.raises(ValueError, match=r"shape \(2, 2\), .* has 1 ids"):
        read(str(path))
    names.write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"none of the scored ids \(x, y\) is an id of the data \(i1, i2"):
        align(read(str(path)))
