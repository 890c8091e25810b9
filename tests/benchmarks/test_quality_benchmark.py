"""The table of benchmarks/quality.py and the configurations that it names. No test makes its runs of hours."""

import importlib.util
from pathlib import Path

import pytest

from raygr.config import load_config
from raygr.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("benchmark_of_quality", ROOT / "benchmarks" / "quality.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("name", benchmark.REFERENCES)
def test_every_run_has_a_configuration_at_width_64_with_an_output_of_its_own(name):
    config = load_config(TrainConfig, str(ROOT / benchmark.CONFIGS / f"train-{name}.yaml"), [])
    assert (config.base_width, config.item_scores) == (64, None)
    assert config.output.endswith(f"train-{name}")


def test_results_stand_beside_the_published_figures():
    ranking = {"ndcg_at_10": 0.1774, "recall_at_10": 0.3, "mrr": 0.15}
    test = {"full": ranking, "uniform-100": {**ranking, "ndcg_at_10": 0.5949}}
    rows = benchmark.table({"sasrec": {"metrics": {"test": test, "epochs": 40}}}).splitlines()
    assert rows[-1] == "| sasrec | 0.1774 | 0.3000 | 0.1500 | 0.177 | 0.5949 | 0.590 | 40 |"


def test_what_nobody_published_stays_empty():
    ranking = {"ndcg_at_10": 0.1, "recall_at_10": 0.2, "mrr": 0.1}
    test = {"full": ranking, "uniform-100": ranking}
    rows = benchmark.table({"gru4rec-plus": {"metrics": {"test": test, "epochs": 7}}}).splitlines()
    assert rows[-1] == "| gru4rec-plus | 0.1000 | 0.2000 | 0.1000 |  | 0.1000 |  | 7 |"
