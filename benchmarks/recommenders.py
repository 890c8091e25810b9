"""Compares raygr's recommenders with other programs: seconds per epoch, time to the same quality, users per second.

    raygr prepare --config configs/ml-100k/prepare.yaml --set output=outputs/benchmark/ml-100k

    python3.11 -m venv /tmp/rectools
    /tmp/rectools/bin/pip install torch==2.13.0+cpu 'rectools[torch]==0.19.0'
    python3.11 -m venv /tmp/recbole
    /tmp/recbole/bin/pip install torch==2.13.0+cpu recbole==1.2.1 'setuptools<81' 'numpy<2' 'scipy<1.14' 'pandas<2.3'
    git clone https://github.com/hidasib/GRU4Rec_PyTorch_Official /tmp/gru4rec  # its licence: research only

    python benchmarks/recommenders.py --rectools-python /tmp/rectools/bin/python \\
        --recbole-python /tmp/recbole/bin/python --gru4rec /tmp/gru4rec

(Where pip does not know torch's CPU build by itself: `--extra-index-url https://download.pytorch.org/whl/cpu`.)

A side is PROGRAM-MODEL, or PROGRAM-MODEL:N with a batch size of its own:

raygr-sasrec, raygr-bert4rec, raygr-gru4rec    raygr's loop as a worker of Ray Train runs it, without Ray around it
raygr-gru4rec_lanes    session-parallel batches, the loss over as many items a position as GRU4Rec's, Adagrad
rectools-sasrec, rectools-bert4rec             RecTools, trained by Lightning as it does by itself
recbole-sasrec         RecBole, which makes a sample of every prefix of a history; its own batch size is 2048
official-gru4rec       GRU4Rec's own PyTorch code: session-parallel batches, sampled cross-entropy, Adagrad

Equal on all sides: train interactions (written out by raygr, the newest `--history` + 1 of each user; BERT4Rec one
less), targets, width, blocks, heads, dropout, batch size, full softmax cross-entropy (GRU4Rec's own code samples),
learning rate (the Adagrad sides have GRU4Rec's), the share of masked items, threads, torch, seed.
Validation is leave-one-out NDCG@10 over the whole catalogue without the items of the train part, after every epoch.
raygr and GRU4Rec's network rank by all scores, RecTools makes lists of ten; GRU4Rec's own evaluation, which ranks every
event and filters nothing, is replaced by one that walks its network to each user's last event.

Each side has a process of its own that waits while the others work: a round is one epoch and one evaluation of every
side. A side ends after `--epochs`, after `--patience` evaluations without a better one, or when its `--budget` is
spent. Seconds of an epoch are the median over rounds but the first, a pair's ratio is the median over its common
rounds. The quality to reach is 95% of the lower of the pair's best, its time all epochs and evaluations up to there.
`peak_share`: the matmul work that one epoch of the model needs (no padding, only the earlier positions in causal
attention, logits at targets alone), as a share of what the same threads multiply in an epoch's time.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PROGRAMS = {
    "raygr": ("sasrec", "bert4rec", "gru4rec", "gru4rec_lanes"),
    "rectools": ("sasrec", "bert4rec"),
    "recbole": ("sasrec",),
    "official": ("gru4rec",),
}
SIDES = tuple(f"{program}-{model}" for program, models in PROGRAMS.items() for model in models)
LEVEL = 0.95  # of the lower best: the very best of a noisy curve is a matter of luck
PASSES = 3  # forward, and backward to inputs and to weights


class Side(NamedTuple):
    program: str
    model: str
    batch: int | None

    def __str__(self) -> str:
        return f"{self.program}-{self.model}" + (f":{self.batch}" if self.batch else "")


def main() -> None:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder))
    print_table(record)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="outputs/benchmark/ml-100k", help="a prepare run")
    parser.add_argument("--sides", nargs="+", type=read_side, default=[read_side(side) for side in SIDES])
    parser.add_argument("--rectools-python", help="python of the virtual environment with RecTools")
    parser.add_argument("--recbole-python", help="python of the virtual environment with RecBole")
    parser.add_argument("--gru4rec", help="folder of GRU4Rec's own code; it runs under this python")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--history", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--adagrad-rate", type=float, default=0.05)
    parser.add_argument("--mask-rate", type=float, default=0.2)
    parser.add_argument("--negatives", type=int, default=512, help="of GRU4Rec's own code, beside those in the batch")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=10)
    parser.add_argument("--budget", type=float, default=600, help="seconds of training of a side")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recommenders.json"))
    return parser.parse_args()


def read_side(text: str) -> Side:
    name, _, batch = text.partition(":")
    program, _, model = name.partition("-")
    if model not in PROGRAMS.get(program, ()) or (batch and not (batch.isdecimal() and int(batch) > 0)):
        raise argparse.ArgumentTypeError(f"{text} is not PROGRAM-MODEL or PROGRAM-MODEL:N of {', '.join(SIDES)}")
    return Side(program, model, int(batch) if batch else None)


SETTINGS = ("data", "width", "blocks", "heads", "history", "batch", "dropout", "learning_rate", "adagrad_rate")
SETTINGS += ("mask_rate", "negatives", "epochs", "patience", "budget", "threads", "seed")


def make_job(arguments: argparse.Namespace) -> dict:
    """The settings and interactions that all sides read. raygr reads the interactions from its own prepare run."""
    from raygr.data.interactions import read_interactions
    from raygr.schema import TRAIN, VALIDATION

    data = read_interactions(arguments.data)
    train: list[list[int]] = [[] for _ in range(data.users)]
    target = [0] * data.users
    for user, item, split in zip(data.user_N.tolist(), data.item_N.tolist(), data.split_N.tolist(), strict=True):
        if split == TRAIN:
            train[user].append(item)
        elif split == VALIDATION:
            target[user] = item  # the last one counts
    if not all(len(history) > 1 for history in train) or not all(target):
        raise SystemExit(f"{arguments.data}: every user needs two train interactions and a validation one")
    job = {name: getattr(arguments, name) for name in SETTINGS}
    gru4rec = arguments.gru4rec and str(Path(arguments.gru4rec).absolute())
    return job | {"gru4rec": gru4rec, "items": data.items, "train": train, "target": target}


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    job = make_job(arguments)
    peak = matmul_peak(job)
    runs = []
    for number, side in enumerate(arguments.sides):  # one after the other, so that none loads beside another
        file = folder / f"{number}.json"
        file.write_text(json.dumps(job | {"model": side.model, "batch": side.batch or job["batch"]}))
        runs.append(start(side, arguments, file))
    while waiting := [run for run in runs if not is_done(run, job)]:
        for run in waiting:
            take_round(run)
    for run in runs:
        run["process"].communicate()
    sides = [side_record(run, job, peak) for run in runs]
    record = {"cpu": processor(), "cores": os.cpu_count(), "matmul_flops_per_second": peak}
    record |= {name: job[name] for name in SETTINGS}
    record |= {"users": len(job["train"]), "items": job["items"], "train_interactions": sum(map(len, job["train"]))}
    return record | {"sides": sides, "pairs": pairs(sides)}


def start(side: Side, arguments: argparse.Namespace, file: Path) -> dict:
    here = Path(__file__).resolve().parent
    own = {"rectools": arguments.rectools_python, "recbole": arguments.recbole_python}.get(side.program, sys.executable)
    if own is None or (side.program == "official" and not arguments.gru4rec):
        raise SystemExit(f"{side} needs --{side.program}-python or --gru4rec; see --help for the environment")
    environment = {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": str(arguments.threads)}
    command = [str(Path(own).absolute()), str(here / f"recommenders_{side.program}.py"), str(file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # in the temporary folder, because RecBole leaves logs where it runs
    process = subprocess.Popen(command, env=os.environ | environment, cwd=file.parent, **pipes)
    run = {"side": side, "process": process, "epochs": [], "evaluations": [], "ndcg": []}
    return run | {"about": read_answer(run)}


def is_done(run: dict, job: dict) -> bool:
    since_best = len(run["ndcg"]) - 1 - run["ndcg"].index(max(run["ndcg"])) if run["ndcg"] else 0
    return len(run["epochs"]) >= job["epochs"] or since_best >= job["patience"] or sum(run["epochs"]) >= job["budget"]


def take_round(run: dict) -> None:
    run["epochs"].append(ask(run, "epoch")["seconds"])
    answer = ask(run, "evaluate")
    run["evaluations"].append(answer["seconds"])
    run["ndcg"].append(mean_ndcg(answer["ranks"]))
    run["last"] = {name: answer[name] for name in ("peak_bytes", "threads")}
    line = f"epoch {len(run['epochs']):3}  {run['side']!s:20} {run['epochs'][-1]:8.3f} s  NDCG@10 {run['ndcg'][-1]:.4f}"
    print(line, file=sys.stderr, flush=True)


def ask(run: dict, order: str) -> dict:
    started = time.perf_counter()
    with suppress(BrokenPipeError):  # a process that has ended gives no answer either
        run["process"].stdin.write(order + "\n")
        run["process"].stdin.flush()
    return read_answer(run) | {"seconds": time.perf_counter() - started}


def read_answer(run: dict) -> dict:
    line = run["process"].stdout.readline()
    if not line:
        ended = run["process"].wait()
        raise SystemExit(f"{run['side']} ended with {ended} before it answered; its own messages are above")
    return json.loads(line)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def matmul_peak(job: dict) -> float:
    """FLOP/s of torch in fp32: the better of a large square product and of states with the item table."""
    import torch

    torch.set_num_threads(job["threads"])
    return max(product_flops(1024, 1024, 1024), product_flops(2048, job["width"], job["items"]))


def product_flops(rows: int, inner: int, columns: int) -> float:
    """FLOP/s of the best of many products."""
    import torch

    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        torch.matmul(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inner * columns / min(seconds)


def mean_ndcg(ranks: list[float]) -> float:
    return sum(1 / math.log2(1 + rank) for rank in ranks if rank <= 10) / len(ranks)


def epoch_flops(model: str, job: dict) -> float:
    """FLOP of the matrix products in an epoch of the model, forward and backward."""
    width, items, blocks = job["width"], job["items"], job["blocks"]
    longest = job["history"]
    causal_lengths = [min(len(history) - 1, longest) for history in job["train"]]
    if model == "sasrec":
        products = [n * 6 * width**2 + n * (n + 1) * width for n in causal_lengths]
        total = blocks * sum(products) + sum(causal_lengths) * width * items
    elif model == "bert4rec":
        lengths = [min(len(history), longest) for history in job["train"]]
        masked = job["mask_rate"] * sum(lengths)
        products = [n * 12 * width**2 + 2 * n**2 * width for n in lengths]
        total = blocks * sum(products) + masked * (width**2 + width * items)
    else:
        scored = items if model == "gru4rec" else job["negatives"] + job["batch"]
        total = sum(causal_lengths) * (6 * width**2 + width * scored)
    return 2.0 * PASSES * total


def side_record(run: dict, job: dict, peak: float) -> dict:
    side, warm = run["side"], run["epochs"][1:] or run["epochs"]
    # GRU4Rec's own code samples, as raygr's lanes do
    model = "gru4rec_lanes" if side.program == "official" else side.model
    flops, seconds = epoch_flops(model, job | {"batch": side.batch or job["batch"]}), statistics.median(warm)
    return {
        "side": str(side),
        "program": side.program,
        "model": side.model,
        "batch": side.batch or job["batch"],
        "seconds_per_epoch": seconds,
        "peak_share": flops / seconds / peak,
        "users_per_second": len(job["target"]) / statistics.median(run["evaluations"][1:] or run["evaluations"]),
        "best_ndcg_at_10": max(run["ndcg"]),
        **run["last"],
        "about": run["about"],
        "epochs": run["epochs"],
        "evaluations": run["evaluations"],
        "ndcg_at_10": run["ndcg"],
    }


def pairs(sides: list[dict]) -> list[dict]:
    """Pairs each raygr side with every other program's side of the same model."""
    found = []
    for own in (side for side in sides if side["program"] == "raygr"):
        for other in (side for side in sides if side["program"] != "raygr"):
            if own["model"].partition("_")[0] == other["model"]:
                found.append(pair(own, other))
    return found


def pair(own: dict, other: dict) -> dict:
    """How many times as long the other program takes for an epoch, an evaluation, and to the same NDCG@10."""
    rounds = [theirs / ours for ours, theirs in zip(own["epochs"][1:], other["epochs"][1:], strict=False)] or [
        other["epochs"][0] / own["epochs"][0]
    ]
    level = LEVEL * min(own["best_ndcg_at_10"], other["best_ndcg_at_10"])
    own_seconds, other_seconds = seconds_to(level, own), seconds_to(level, other)
    return {
        "side": own["side"],
        "beside": other["side"],
        "times_per_epoch": statistics.median(rounds),
        "lowest": min(rounds),
        "highest": max(rounds),
        "times_users_per_second": own["users_per_second"] / other["users_per_second"],
        "ndcg_at_10": level,
        "seconds_to_it": own_seconds,
        "other_seconds_to_it": other_seconds,
        "times_to_it": other_seconds / own_seconds,
    }


def seconds_to(level: float, side: dict) -> float:
    """Seconds of training and evaluation until NDCG@10 reaches the level. The side must reach it."""
    epochs = next(place for place, ndcg in enumerate(side["ndcg_at_10"], start=1) if ndcg >= level)
    return sum(side["epochs"][:epochs]) + sum(side["evaluations"][:epochs])


def print_table(record: dict) -> None:
    print(f"matmul peak {record['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s, {record['threads']} threads")
    print(f"{'side':22} s/epoch  peak share  users/s  best NDCG@10  epochs  peak MiB")
    for side in record["sides"]:
        print(
            f"{side['side']:22} {side['seconds_per_epoch']:7.3f}  {side['peak_share']:10.1%}  "
            f"{side['users_per_second']:7,.0f}  {side['best_ndcg_at_10']:12.4f}  {len(side['epochs']):6}  "
            f"{side['peak_bytes'] / 2**20:8,.0f}"
        )
    for one in record["pairs"]:
        print(
            f"{one['side']} beside {one['beside']}: an epoch {one['times_per_epoch']:.1f} times as fast "
            f"({one['lowest']:.1f} to {one['highest']:.1f} in single rounds), users/s "
            f"{one['times_users_per_second']:.1f} times, NDCG@10 {one['ndcg_at_10']:.4f} in {one['seconds_to_it']:.1f} "
            f"against {one['other_seconds_to_it']:.1f} s ({one['times_to_it']:.1f} times)"
        )


if __name__ == "__main__":
    main()
