"""The shipped item scores, the data paths of the configurations, and the make targets that fetch the data."""

import gzip
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from raygr.data.vector_tables import read_vectors
from raygr.score.aspects import load_aspects

ROOT = Path(__file__).parents[2]

# Stands in for curl: copies the file of the URL's name from $PUBLISHER, and fails where there is none.
CURL = """#!/bin/sh
while [ $# -gt 1 ]; do
  case $1 in --output) shift; output=$1;; esac
  shift
done
exec cp "$PUBLISHER/$(basename "$1")" "$output"
"""


@pytest.mark.parametrize(
    ("name", "count", "aspects"),
    [("ml-1m-item-scores", 3416, "movies"), ("amazon-2018-video-games-item-scores", 1216, "games")],
)
def test_shipped_item_scores_are_complete_and_in_range(name: str, count: int, aspects: str):
    scores = read_vectors(str(ROOT / f"datasets/{name}.csv"), subjects="items", column="expected", aspects=None)
    assert scores.aspects == tuple(aspect.name for aspect in load_aspects(f"configs/aspects/{aspects}.yaml").aspects)
    assert scores.values_SA.shape == (count, 12)
    assert len(set(scores.ids_S.tolist())) == count
    assert set(scores.values_SA.ravel()) == set(range(1, 11))


def test_no_configuration_reads_data_outside_the_checkout():
    files = [path for path in ROOT.glob("configs/**/*") if path.is_file()]
    assert len(files) > 40
    assert [str(path) for path in files if "../" in path.read_text(encoding="utf-8")] == []


@pytest.fixture
def fetch(tmp_path: Path):
    """Runs a make target in an empty folder against files of `publisher`."""
    publisher, commands = tmp_path / "publisher", tmp_path / "bin"
    publisher.mkdir()
    commands.mkdir()
    (commands / "curl").write_text(CURL)
    (commands / "curl").chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PUBLISHER": str(publisher)}

    def make(target: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-f", str(ROOT / "Makefile"), target]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)

    return publisher, make


@pytest.mark.parametrize(("name", "file"), [("ml-1m", "ratings.dat"), ("ml-100k", "u.data")])
def test_movielens_is_fetched_checked_and_unpacked(fetch, tmp_path: Path, name: str, file: str):
    publisher, make = fetch
    with zipfile.ZipFile(publisher / f"{name}.zip", "w") as archive:
        archive.writestr(f"{name}/{file}", "1::2::3::4\n")
    (publisher / f"{name}.zip.md5").write_text("MD5 (some.zip) = " + "0" * 32 + "\n")
    refused = make(f"data-{name}")
    assert refused.returncode and "does not have the MD5 that GroupLens publishes" in refused.stdout
    assert not (tmp_path / "data" / name).exists()
    md5 = hashlib.md5((publisher / f"{name}.zip").read_bytes()).hexdigest()
    (publisher / f"{name}.zip.md5").write_text(f"MD5 ({name}.zip) = {md5}\n")
    found = make(f"data-{name}")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "data" / name / file).read_text() == "1::2::3::4\n"
    assert "up to date" in make(f"data/{name}/{file}").stdout


def test_gift_cards_are_fetched(fetch, tmp_path: Path):
    publisher, make = fetch
    for name in ("Gift_Cards_5.json.gz", "meta_Gift_Cards.json.gz"):
        (publisher / name).write_bytes(gzip.compress(b"{}\n"))
    assert make("data-gift-cards").returncode == 0
    assert {path.name for path in (tmp_path / "data/gift-cards").iterdir()} == {
        "Gift_Cards_5.json.gz",
        "meta_Gift_Cards.json.gz",
    }


@pytest.mark.parametrize("name", ["ml-1m", "ml-100k", "gift-cards"])
def test_fetching_without_a_network_says_what_to_do(fetch, name: str):
    _, make = fetch
    result = make(f"data-{name}")
    assert result.returncode
    assert "could not be fetched. This target needs a network" in result.stdout
    assert f"place the unpacked files in data/{name}" in result.stdout
