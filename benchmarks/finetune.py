"""Measures completions per second of a reinforcement learning step: raygr's `slots` and `free`, and TRL's GRPO.

    python3.11 -m venv /tmp/trl
    /tmp/trl/bin/pip install -c requirements/cpu.lock trl==1.16.0 peft
    python benchmarks/finetune.py --trl-python /tmp/trl/bin/python

(Where pip does not find torch's CPU build by itself: `--extra-index-url https://download.pytorch.org/whl/cpu`.)

slots        raygr with the answer's template fixed: only the ratings are sampled
free         raygr with sampled text
trl          TRL's GRPO trainer as it is, sampling with `generate`
trl-paged    the same, sampling with transformers' continuous batching. Its pages and batches are small enough that
             completions of one prompt, and prompts with the same beginning, share their prefill
trl-compact, trl-compact-paged
             the two with one line of TRL replaced: the loss takes no logits of prompt tokens, as on a GPU. On a CPU
             TRL takes all of them and masks them; see finetune_trl.py

TRL's vLLM backend is made for GPUs and was not tried.

All sides have the same model, LoRA rank, alpha and targets, the same users per step in the same order, the same
prompts token by token (checked), completions per user, temperature, highest learning rate, gradient clipping, reward
(rank of the target by the ratings read from the text), threads and seed. There is no KL penalty and one update per
rollout, in fp32 with SDPA attention. The models are trained; gradient checkpointing, evaluation, logging and saving are
off.

A completion has `--tokens` tokens, as many as an answer in format with one-token ratings. TRL must not end one sooner,
and `free` waits for an end-of-turn token that the model never writes; both counts are checked. In `slots` a 10 is two
tokens, so its completions are slightly longer. Compare the ratio per completion: the cost of a step with the same users
and answers. The ratio per token is the same for `free` and favours `slots` because of its tens.
A model that has not learned the format makes `free` more expensive than it will be later: every completion out of
format adds the answer that it should have been as a second row of the loss. TRL has no such loss.
The bare model's texts hold few ratings, so most rewards of sampled text are equal and their advantages 0. The work is
the same, but these few steps say nothing about learning.

A side is KIND:N, where N is the number of completions in one pass of the loss. raygr also samples N at once; TRL always
samples the whole batch. The other completions of a step follow by gradient accumulation. Name a kind several times to
find its fastest N. raygr is compared with the fastest side of TRL as it is, and with the fastest compact side. Each
side runs in its own process, which waits while the others work. A round is one optimizer step of every side. The first
round warms up; it is also the one in ten in which raygr logs its KL divergence to the base model. Seconds are those of
whole steps. A ratio is over all rounds; its range is that of single rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

RAYGR = ("slots", "free")
RIVALS = (("trl", "trl-paged"), ("trl-compact", "trl-compact-paged"))
KINDS = (*RAYGR, *RIVALS[0], *RIVALS[1])
SIDES = ("slots:16", "free:8", "trl:4", "trl-compact:4")


class Side(NamedTuple):
    kind: str
    at_once: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.at_once}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/ml-100k/finetune.yaml", help="settings; their output is not used")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="overrides it; repeatable")
    parser.add_argument("--trl-python", help="python of the virtual environment with TRL")
    parser.add_argument("--sides", nargs="+", type=read_side, default=list(map(read_side, SIDES)), metavar="KIND:N")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each side")
    parser.add_argument("--tokens", type=int, help="tokens of a completion")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune.json"))
    parser.add_argument("--job", type=Path, help="internal: the file that a measured process reads")
    arguments = parser.parse_args()
    if arguments.job:
        raygr_side(json.loads(arguments.job.read_text()), arguments.sides[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        record = measure(arguments, Path(folder, "job.json"))
    print_table(record)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def read_side(text: str) -> Side:
    kind, _, at_once = text.partition(":")
    if kind not in KINDS or not at_once.isdecimal() or int(at_once) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not KIND:N with a KIND of {', '.join(KINDS)}")
    return Side(kind, int(at_once))


def measure(arguments: argparse.Namespace, file: Path) -> dict:
    job = make_job(arguments)
    check_sides(arguments, job)
    file.write_text(json.dumps(job))
    processes, versions = [], []
    for side in arguments.sides:  # one after the other, so that no two load at once
        processes.append(start(side, arguments, file))
        versions.append(read_answer(side, processes[-1]))
    steps = [[] for _ in processes]
    for number in range(1 + arguments.rounds):
        for side, process, own in zip(arguments.sides, processes, steps, strict=True):
            own.append(take_step(side, process))
            check_tokens(side, own[-1]["tokens"], job)
            print(f"round {number}  {side!s:14} {own[-1]['seconds']:7.1f} s", file=sys.stderr, flush=True)
    for process in processes:
        process.communicate()
    per_step = job["users"] * job["completions"]
    sides = [
        side_record(side, own[1:], per_step) | {"versions": version}
        for side, own, version in zip(arguments.sides, steps, versions, strict=True)
    ]
    shown = ("model", "lora", "users", "completions", "tokens", "prompt_tokens", "rounds", "threads", "seed")
    record = {"cpu": processor(), "cores": os.cpu_count()} | {name: job[name] for name in shown}
    return record | {"sides": sides, "ratios": ratios(sides)}


def settings(file: str, overrides: list[str]):
    """The configuration restricted to what both programs support: the base task by rank, without KL penalty."""
    from raygr.config import load_config
    from raygr.finetune.config import FinetuneConfig

    config = load_config(FinetuneConfig, file, overrides)
    return replace(config, task="base", reward="reciprocal_rank", kl_weight=0.0, gradient_checkpointing=False)


def make_job(arguments: argparse.Namespace) -> dict:
    """The work of all sides, as JSON. raygr's sides also read the configuration; TRL's sides read only this."""
    from transformers import AutoTokenizer

    from raygr.finetune.examples import PROFILE_MIDDLE, PROFILE_SPREAD, load_tuning_data
    from raygr.finetune.loop import RL_ORDER, step_examples, step_size
    from raygr.finetune.metrics import tuning_task

    config = settings(arguments.config, arguments.set)
    data = load_tuning_data(config)
    examples = [one for n in range(1 + arguments.rounds) for one in step_examples(config, data.train, n, RL_ORDER)]
    items_IA, tokenizer = tuning_task(config, data.items_IA, None).items_IA, AutoTokenizer.from_pretrained(data.model)
    lora = {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    return {
        "config": arguments.config,
        "set": arguments.set,
        "model": data.model,
        "lora": lora | {"target_modules": list(config.lora_targets)},
        "users": step_size(config),
        "completions": config.completions,
        "tokens": arguments.tokens or answer_tokens(data.template),
        "prompt_tokens": sum(len(one.prompt_ids) for one in examples) / len(examples),
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "seed": config.seed,
        "temperature": config.temperature,
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "names": data.names,
        "rating_mean": [PROFILE_MIDDLE] * len(data.names),
        "rating_std": [PROFILE_SPREAD] * len(data.names),
        "examples": [
            {
                "prompt": tokenizer.decode(example.prompt_ids),
                "prompt_ids": example.prompt_ids,
                "candidates": items_IA[example.candidate_C].tolist(),  # standardised, the target first
            }
            for example in examples
        ],
    }


def answer_tokens(template) -> int:
    """Tokens of an answer in format with one-token ratings, including its end-of-turn token."""
    return sum(map(len, template.pieces)) + len(template.pieces) + len(template.ending)


def check_sides(arguments: argparse.Namespace, job: dict) -> None:
    users, group = job["users"], job["completions"]
    if len(job["examples"]) < (1 + job["rounds"]) * users:
        raise SystemExit(f"the users to train on do not fill {1 + job['rounds']} steps of {users}: fewer --rounds")
    for side in arguments.sides:
        if (users * group) % side.at_once or (side.kind in RAYGR and side.at_once % group):
            raise SystemExit(f"{side} does not divide the {users} x {group} completions of a step (raygr's into users)")
        if side.kind not in RAYGR and not arguments.trl_python:
            raise SystemExit(f"{side} needs --trl-python; see --help for the environment")
        if side.kind == "free" and job["tokens"] < 2 * len(job["names"]):
            raise SystemExit(f"--tokens: free rollouts have {2 * len(job['names'])} at least")


def start(side: Side, arguments: argparse.Namespace, file: Path) -> subprocess.Popen:
    here = Path(__file__).resolve().parent
    program = (sys.executable, "finetune.py") if side.kind in RAYGR else (arguments.trl_python, "finetune_trl.py")
    environment = {"PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": str(arguments.threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [program[0], str(here / program[1]), "--job", str(file), "--sides", str(side)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def take_step(side: Side, process: subprocess.Popen) -> dict:
    started = time.perf_counter()
    with suppress(BrokenPipeError):  # a process that has ended gives no answer, which read_answer reports
        process.stdin.write("\n")
        process.stdin.flush()
    return read_answer(side, process) | {"seconds": time.perf_counter() - started}


def read_answer(side: Side, process: subprocess.Popen) -> dict:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{side} ended with {process.wait()} before it answered; its own messages are above")
    return json.loads(line)


def check_tokens(side: Side, tokens: int, job: dict) -> None:
    wanted = job["users"] * job["completions"] * job["tokens"]
    if tokens != wanted and not (side.kind == "slots" and tokens > wanted):
        raise SystemExit(f"{side} made {tokens} completion tokens in a step, not {wanted}: the sides are not equal")


class Pipe:
    """A measured process's side of the pipe: one line in, one step, one line of JSON out."""

    def __init__(self) -> None:
        self.answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout too

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the benchmark has ended")

    def answer(self, **figures: float | str) -> None:
        print(json.dumps(figures), file=self.answers, flush=True)


def peak_bytes() -> int:
    """Peak memory of this process; getrusage would start at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def raygr_side(job: dict, side: Side) -> None:
    import torch
    import transformers

    from raygr.finetune.examples import load_tuning_data
    from raygr.finetune.loop import start_tuning, tune
    from raygr.finetune.rewards import Normalisation
    from raygr.models.workers import Share

    pipe = Pipe()
    torch.set_num_threads(job["threads"])
    at_once = side.at_once // job["completions"]
    config = replace(settings(job["config"], job["set"]), rollouts=side.kind, batch_size=at_once)
    config = replace(config, accumulation=job["users"] // at_once)
    data = load_tuning_data(config)
    if side.kind == "free":
        data = data._replace(template=endless(data.template, data.model, job["tokens"]))
    # no evaluation before the last step of the last epoch, which is never reached
    config = replace(config, epochs=max(config.epochs, job["rounds"] + 2), evaluate_every_steps=1_000_000)
    tuning = start_tuning(config, data, torch.device("cpu"), Share())
    statistics = (tuning.task.item_mean, tuning.task.item_std, job["rating_mean"], job["rating_std"])
    # as after the SFT warm-up and its evaluation
    tuning.progress.normalisation = Normalisation(*statistics)
    tuning.progress.evaluations.append({})
    tuning.progress.sft_step = 1_000_000
    steps = tune(tuning)
    pipe.answer(torch=torch.__version__, transformers=transformers.__version__)
    for number in range(1 + job["rounds"]):
        pipe.wait()
        next(steps)
        line = tuning.progress.lines[-1]
        prompts = [example["prompt_ids"] for example in job["examples"][number * job["users"] :][: job["users"]]]
        # a step's tokens are each user's prompt, once, and the completions
        tokens = round(line["tokens_per_second"] * line["seconds"]) - sum(map(len, prompts))
        figures = {"tokens": tokens, "reward": line["reward"], "threads": torch.get_num_threads()}
        pipe.answer(**figures, peak_bytes=peak_bytes())


def endless(template, model: str, tokens: int):
    """A template whose free completions have `tokens` tokens: the model never writes its end-of-turn token."""
    from transformers import AutoTokenizer

    from raygr.finetune import sampling

    sampling.FREE_ROOM = free_room(template, tokens)
    sampling.ending_tokens = lambda model, template: list(template.ending)
    never = max(AutoTokenizer.from_pretrained(model).added_tokens_decoder)  # the last reserved one
    return template._replace(ending=(never,))


def free_room(template, tokens: int) -> float:
    """The FREE_ROOM at which `sampling.free_places` equals `tokens`."""
    return (tokens - 2 * len(template.pieces) + 0.5) / template.places


def side_record(side: Side, steps: list[dict], completions: int) -> dict:
    """Figures of the timed steps, each with `completions` completions."""
    seconds, tokens = [step["seconds"] for step in steps], sum(step["tokens"] for step in steps)
    return {
        "side": str(side),
        "kind": side.kind,
        "seconds": seconds,
        "completions_per_second": completions * len(steps) / sum(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "tokens_per_completion": tokens / (completions * len(steps)),
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "threads": steps[-1]["threads"],
        "rewards": [step["reward"] for step in steps],
    }


def ratios(sides: list[dict]) -> list[dict]:
    """Compares every raygr side with the fastest side of TRL as it is, and with the fastest compact one."""
    found = []
    for kinds in RIVALS:
        rivals = [side for side in sides if side["kind"] in kinds]
        for own in (side for side in sides if side["kind"] in RAYGR and rivals):
            found.append(ratio(own, max(rivals, key=lambda side: side["completions_per_second"])))
    return found


def ratio(own: dict, other: dict) -> dict:
    """Completions and tokens per second of `own` divided by those of `other`, and the range over the rounds."""
    rounds = [theirs / ours for ours, theirs in zip(own["seconds"], other["seconds"], strict=True)]
    return {
        "side": own["side"],
        "beside": other["side"],
        "times": own["completions_per_second"] / other["completions_per_second"],
        "lowest": min(rounds),
        "highest": max(rounds),
        "times_per_token": own["tokens_per_second"] / other["tokens_per_second"],
    }


def print_table(record: dict) -> None:
    print(f"{'side':14} completions/s  seconds a step  tokens a completion  peak MiB")
    for side in record["sides"]:
        figures = (side["completions_per_second"], sum(side["seconds"]) / len(side["seconds"]))
        print(
            f"{side['side']:14} {figures[0]:13.3f}  {figures[1]:14.1f}  {side['tokens_per_completion']:19.1f}"
            f"  {side['peak_bytes'] / 2**20:8,.0f}"
        )
    for one in record["ratios"]:
        spread = f"{one['lowest']:.2f} to {one['highest']:.2f}"
        print(
            f"{one['side']} makes {one['times']:.2f} times the completions of {one['beside']} ({spread} in single "
            f"rounds), {one['times_per_token']:.2f} times its tokens"
        )


if __name__ == "__main__":
    main()
