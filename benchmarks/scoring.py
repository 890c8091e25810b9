"""Items per second of four ways to score, with the same model and items.

    python benchmarks/scoring.py --data outputs/quickstart/prepare --items 48 --out benchmarks/results/scoring.json

free          plain vLLM: the paper's prompt, one free completion per item, nothing of raygr's engine
structured    mode generate: forced format, expected ratings with an exact P(10)
probe         mode probe: whole blocks of the prompt from the prefix cache, one short tail per aspect, an exact P(10)
transformers  mode probe with engine: transformers: one pass, in which the tails of all aspects share their prompt

The ways run one after the other, each in a process of its own, because vLLM binds its process's threads. Seconds are
those of scoring, without loading the model. `distinct` tokens are those that any engine must compute at least once.
`peak_share` is the share of the cores' fp32 matmul peak (torch, with the model's shapes) that the layers' matrices use.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("free", "structured", "probe", "transformers")
ROUNDS = 2  # on different items; the first warms up the kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="outputs/quickstart/prepare")
    parser.add_argument("--items", type=int, default=48)
    parser.add_argument("--out", default="benchmarks/results/scoring.json")
    parser.add_argument("--way", choices=(*WAYS, "peak"))
    arguments = parser.parse_args()
    if arguments.way == "peak":
        print(json.dumps(matmul_peak()))
        return
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.data, arguments.items)))
        return
    results = [run_way(way, arguments) for way in WAYS]
    free = results[0]["items_per_second"]
    peak = run_peak()
    for result in results:
        result["times_free"] = result["items_per_second"] / free
        result["peak_share"] = result["tokens_per_second"] * peak["flops_per_token"] / peak["flops_per_second"]
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()})
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    content = {"cores": os.cpu_count(), "matmul": peak, "ways": results}
    Path(arguments.out).write_text(json.dumps(content, indent=1) + "\n")


def run_way(way: str, arguments: argparse.Namespace) -> dict:
    return run_apart(["--way", way, "--data", arguments.data, "--items", str(arguments.items)])


def run_peak() -> dict:
    return run_apart(["--way", "peak"])


def run_apart(arguments: list[str]) -> dict:
    from raygr.score.engine import engine_environment

    cores = sorted(os.sched_getaffinity(0))
    environment = engine_environment(threads=cores, bind=True, on_gpu=False, tensor_parallel_size=1)
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def matmul_peak() -> dict:
    """FLOP of one token in the layers' matrices, and FLOP/s of torch on the widest matrix with 2,048 tokens."""
    import torch
    from transformers import AutoConfig

    from raygr.score.default_model import model_folder

    shape = AutoConfig.from_pretrained(model_folder("smollm2"))
    width, inner = shape.hidden_size, shape.intermediate_size
    heads_width = shape.num_key_value_heads * width // shape.num_attention_heads
    layer = 2 * width * width + 2 * width * heads_width + 3 * width * inner
    tokens, matrix = torch.randn(2048, width), torch.randn(width, inner)
    best = min(timed(lambda: tokens @ matrix) for _ in range(50))
    return {
        "flops_per_token": 2 * layer * shape.num_hidden_layers,
        "flops_per_second": 2 * tokens.shape[0] * width * inner / best,
    }


def timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(way: str, data: str, items: int) -> dict:
    """Run one way on `ROUNDS` x `items` items; the figures are those of the last round."""
    from transformers import AutoTokenizer

    from raygr import files
    from raygr.score.answer_format import aspect_tails, format_regex, rating_tokens
    from raygr.score.aspects import load_aspects
    from raygr.score.default_model import model_folder
    from raygr.score.engine import EngineSettings, ScoringEngine, TokenCounts
    from raygr.score.prompts import PromptEncoder, item_from_row
    from raygr.score.transformers_engine import TransformersEngine

    aspects, model = load_aspects("configs/aspects/movies.yaml"), model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = PromptEncoder(tokenizer, aspects, "items", max_prompt_tokens=1024)
    rows = files.read_table(files.join(data, "items")).slice(0, items * ROUNDS).to_pylist()
    prompts = [encoder.item_prompt(item_from_row(row, "train")) for row in rows]
    tails = aspect_tails(tokenizer, aspects)
    settings = EngineSettings(
        model=model,
        adapter=None,
        mode={"free": "generate-free", "structured": "generate"}.get(way, "probe"),
        temperature=0.0,
        names=aspects.names,
        tails=tails,
        rating_tokens=rating_tokens(tokenizer, aspects),
        answer_regex=format_regex(aspects),
        max_completion_tokens=sum(len(tail) + 3 for tail in tails),
        shared_ids=prompts[0].prefix_ids[: prompts[0].shared_length],
        max_model_len=1536,
        tensor_parallel_size=1,
        on_gpu=False,
        engine_kwargs={},
        seed=0,
    )
    engine = (TransformersEngine if way == "transformers" else ScoringEngine)(settings, store=None)
    for number in range(ROUNDS):
        batch = [list(prompt.prefix_ids) for prompt in prompts[number * items : (number + 1) * items]]
        counts = TokenCounts()
        started = time.perf_counter()
        if way == "free":
            valid = plain_generation(engine, batch, counts)
        else:
            scores = engine.answer(batch, counts)
            valid = sum(score.reason == "ok" for score in scores)
        seconds = time.perf_counter() - started
    own = sum(len(prompt) for prompt in batch) - items * prompts[0].shared_length
    answer = sum(map(len, tails)) + len(tails)
    distinct = own + items * answer
    return {
        "way": way,
        "items": items,
        "items_per_second": items / seconds,
        "valid_share": valid / items,
        "tokens_given": counts.given,
        "tokens_computed": counts.computed,
        "tokens_distinct": distinct,
        "tokens_per_second": counts.computed / seconds,
    }


def plain_generation(engine, batch: list[list[int]], counts) -> int:
    """`vllm.LLM.generate` with the paper's prompt: greedy text without log-probabilities; count the valid answers."""
    from vllm import SamplingParams

    from raygr.score.answer_format import parse_ratings

    sampling = SamplingParams(temperature=0.0, max_tokens=engine.settings.max_completion_tokens)
    outputs = engine.run(batch, [sampling] * len(batch))
    counts.add(outputs)
    return sum(parse_ratings(output.outputs[0].text, engine.settings.names).reason == "ok" for output in outputs)


if __name__ == "__main__":
    main()
