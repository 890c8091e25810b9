"""Each autograd function of raygr/models/cpu_kernels.py beside torch's own operations, forward and backward.

    python benchmarks/cpu_kernels.py

One thread, width 64; ours and torch's in turn, the median of 30 rounds. Run it on an idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from raygr.models.cpu_kernels import causal_attention, dropout
from raygr.models.losses import cross_entropy, sampled_cross_entropy

RATE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = leaf(128, 50, 64)
    compare(
        "dropout, 128 x 50 x 64",
        lambda: dropout(values, RATE, training=True).sum(),
        lambda: functional.dropout(values, RATE, True).sum(),
        rounds,
    )
    query, key, value = (leaf(32, 2, 50, 32) for _ in range(3))
    compare(
        "causal attention, 32 x 2 x 50 x 32",
        lambda: causal_attention(query, key, value, RATE, True).sum(),
        lambda: functional.scaled_dot_product_attention(query, key, value, dropout_p=RATE, is_causal=True).sum(),
        rounds,
    )
    state = leaf(1536, 64)
    for items in (3_000, 30_000):
        rows, target = leaf(items, 64), torch.randint(1, items + 1, (1536,))
        compare(
            f"cross-entropy, 1,536 positions, {items:,} items",
            lambda rows=rows, target=target: cross_entropy(state, rows, target),
            lambda rows=rows, target=target: functional.cross_entropy(state @ rows.T, target - 1, reduction="sum"),
            rounds,
        )
    rows, target, negative = leaf(3_000, 64), torch.randint(1, 3_001, (1536,)), torch.randint(1, 3_001, (512,))
    is_spared, expected = torch.zeros(1536, 512, dtype=torch.bool), torch.ones(512)

    def plain() -> Tensor:
        target_score = (state * rows[target - 1]).sum(1, keepdim=True)
        others = (state @ rows[negative - 1].T - expected.log()).masked_fill(is_spared, -torch.inf)
        return (torch.cat([target_score, others], 1).logsumexp(1) - target_score[:, 0]).sum()

    compare(
        "sampled cross-entropy, 1,536 positions, 512 negatives",
        lambda: sampled_cross_entropy(state, rows, target, negative, is_spared, expected_K=expected),
        plain,
        rounds,
    )


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def compare(name: str, ours: Callable[[], Tensor], torchs: Callable[[], Tensor], rounds: int) -> None:
    seconds: dict[str, list[float]] = {"ours": [], "torch": []}
    for number in range(rounds + 2):  # the first two fill caches
        for who, loss in (("ours", ours), ("torch", torchs)):
            started = time.perf_counter()
            loss().backward()
            if number >= 2:
                seconds[who].append(time.perf_counter() - started)
    own, other = (statistics.median(seconds[who]) * 1000 for who in ("ours", "torch"))
    print(f"{name:55} {own:8.2f} ms, torch {other:8.2f} ms, {other / own:.2f} times as fast", flush=True)


if __name__ == "__main__":
    main()
