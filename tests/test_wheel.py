"""The wheel in an environment that holds only what its core depends on: it serves notebooks, and says what else needs.

The environment is not downloaded: it links to the installed packages that the wheel asks for, and to theirs.
"""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROGRAM = """
import contextlib, io, json, sys
import pandas as pd
import raygr
from raygr.cli import main
from raygr.files import shipped
from raygr.score.aspects import load_aspects
from raygr.simulate.config import SimulateConfig
from raygr.simulate.stage import simulate

shop = simulate(SimulateConfig(output="shop", shoppers=100))
orders = pd.read_json(shop.file("reviews.jsonl.gz"), lines=True)
scores = pd.read_csv(shop.file("item_scores.csv"))
recommender = raygr.fit(raygr.prepare_frame(orders, columns={"item_id": "parent_asin"}), scores, settings={"epochs": 2})
recommender.save("saved")
loaded = [name for name in ("ray", "vllm", "transformers", "peft", "matplotlib") if name in sys.modules]
score = ["--output", "scores", "--data", "data", "--subjects", "items", "--aspects", "configs/aspects/movies.yaml"]
with contextlib.redirect_stderr(io.StringIO()) as said:
    code = main(["score", *score])
print(json.dumps({
    "place": raygr.__file__,
    "lists": recommender.recommend(n=3)["rank"].value_counts().to_dict(),
    "aspects": len(load_aspects(shipped("configs/aspects/movies.yaml")).aspects),
    "paper": shipped("configs/paper/table-3.yaml"),
    "explained": len(recommender.explain()),
    "loaded": loaded,
    "refused": [code, said.getvalue().strip()],
}))
"""


def closure(requirements: list[str], extras: tuple[str, ...] = ()) -> dict[str, importlib.metadata.Distribution]:
    """The installed packages that the requirements ask for, and those that these ask for."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [(Requirement(one), extras) for one in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, asked = waiting.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": one}) for one in ("", *asked)):
            continue
        name = canonicalize_name(requirement.name)
        new = {(name, one) for one in ("", *requirement.extras)} - seen
        if new:
            seen |= new
            found[name] = importlib.metadata.distribution(name)
            waiting += [(Requirement(one), tuple(requirement.extras)) for one in found[name].requires or ()]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment with the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("raygr", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *build, str(folder / "source")], check=True)
    venv.create(folder / "env")
    [packages] = (folder / "env").glob("lib/python*/site-packages")
    [wheel] = folder.glob("*.whl")
    shutil.unpack_archive(wheel, packages, "zip")
    [own] = importlib.metadata.distributions(path=[str(packages)])
    for package in closure(own.requires or []).values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (packages / top).exists() and not top.endswith(".pth"):
                (packages / top).symlink_to(package.locate_file(top))
    return folder / "env/bin/python"


def test_the_core_trains_and_recommends_and_names_what_else_needs(python: Path, tmp_path: Path):
    command = [str(python), "-I", "-c", PROGRAM]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["loaded"] == [] and found["aspects"] == 12
    for place in (found["place"], found["paper"]):
        assert Path(place).is_relative_to(python.parents[1]) and Path(place).exists()
    assert found["lists"]["1"] == found["lists"]["3"] > 50 and found["explained"] == 24
    message = "raygr score: this needs transformers, which is not installed: pip install 'raygr[llm]'"
    assert found["refused"] == [2, message]
