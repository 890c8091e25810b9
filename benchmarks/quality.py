"""The recommenders on MovieLens 1M beside published figures of the same protocol: full catalogue, leave-one-out.

    raygr prepare --config configs/ml-1m/prepare.yaml
    python benchmarks/quality.py sasrec gru4rec                    # or no name, for all
    python benchmarks/quality.py --at-once 6 --gpu-share 0.15        # side by side on one GPU

Each run is `raygr train` with its file in configs/ml-1m/. It takes hours on two cores; an interrupted run resumes, a
finished one is skipped. Its metrics are written to benchmarks/results/quality/<name>.json, which is to be committed.
`--set` is passed on to `raygr train`. The last lines printed are a Markdown table of all results.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from raygr import files, runs
from raygr.config import load_config
from raygr.pipeline import run_stages
from raygr.schema import HISTORY, METRICS
from raygr.train.config import TrainConfig

CONFIGS, RESULTS = Path("configs/ml-1m"), Path(__file__).parent / "results" / "quality"
SETS = ("full", "uniform-100", "popularity-100")


class Reference(NamedTuple):
    """Published NDCG@10 at width 64 (or the nearest) in the full catalogue, and of 100 uniform candidates."""

    source: str
    full: float | None = None
    uniform: float | None = None


REFERENCES = {
    "sasrec": Reference("monkey0head/time-to-split; pmixer/SASRec.pytorch", 0.177, 0.59),
    "gru4rec": Reference("monkey0head/time-to-split", 0.156),
    "bert4rec": Reference("monkey0head/time-to-split; asash/bert4rec_repro", 0.145, 0.601),
    "sasrec-bce": Reference("asash/gSASRec-pytorch", 0.126),
    "gru4rec-plus": Reference("none to trust"),
    "gru4rec-bpr": Reference("none; gru4rec-plus must not fall below it"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(REFERENCES)}; none is all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--gpu-share", type=float, default=1.0)
    parsed = parser.parse_args()
    unknown = [name for name in parsed.names if name not in REFERENCES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: runs are {', '.join(REFERENCES)}")
    configs = {name: quality_config(name, parsed.set) for name in parsed.names or REFERENCES}
    names = list(configs)
    for first in range(0, len(names), parsed.at_once):
        some = names[first : first + parsed.at_once]
        run_stages([("train", configs[name]) for name in some], at_once=parsed.at_once, gpu_share=parsed.gpu_share)
        for name in some:
            files.write_json(result_of(configs[name].output), str(result_file(name)))
    there = [name for name in REFERENCES if result_file(name).exists()]
    print(table({name: json.loads(result_file(name).read_text()) for name in there}))


def quality_config(name: str, overrides: list[str]) -> TrainConfig:
    config = load_config(TrainConfig, str(CONFIGS / f"train-{name}.yaml"), overrides)
    return dataclasses.replace(config, candidates=SETS)


def result_file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def result_of(output: str) -> dict[str, Any]:
    """The run's record and metrics, with what its epochs took."""
    lines = [json.loads(line) for line in Path(output, HISTORY).read_text().splitlines()]
    return {
        "run": runs.read_run(output, job="train"),
        "metrics": files.read_json(files.join(output, METRICS)),
        "training_seconds": sum(line["seconds"] for line in lines),
        "evaluation_seconds": sum(line.get("evaluation_seconds", 0.0) for line in lines),
    }


def table(results: dict[str, dict]) -> str:
    """Test metrics beside the references, one row per run."""
    lines = [
        "| run | NDCG@10 | Recall@10 | MRR | published NDCG@10 | 100 uniform, NDCG@10 | published | epochs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        test, reference = result["metrics"]["test"], REFERENCES[name]
        full, uniform = test["full"], test["uniform-100"]
        cells = [name, *(f"{full[metric]:.4f}" for metric in ("ndcg_at_10", "recall_at_10", "mrr"))]
        cells += [published(reference.full), f"{uniform['ndcg_at_10']:.4f}", published(reference.uniform)]
        lines.append("| " + " | ".join([*cells, str(result["metrics"]["epochs"])]) + " |")
    return "\n".join(lines)


def published(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
