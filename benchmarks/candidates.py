"""Seconds to draw every user's 100 candidates, uniformly and by popularity, on made-up interactions.

    python benchmarks/candidates.py --users 1000000 --items 100000

Every user has twenty items, drawn by Zipf's law, so popular ones are owned often.
"""

import argparse
import time

import numpy as np

from raygr.train.candidates import candidate_weights, sample_candidates

LENGTH = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parsed = parser.parse_args()
    generator = np.random.default_rng(0)
    user_N = np.repeat(np.arange(parsed.users), LENGTH)
    share_I = 1 / np.arange(1, parsed.items + 1)
    item_N = generator.choice(parsed.items, len(user_N), p=share_I / share_I.sum()) + 1
    count_I = np.bincount(item_N - 1, minlength=parsed.items)
    for name in ("uniform-100", "popularity-100"):
        begun = time.perf_counter()
        sample_candidates(
            user_N, item_N, weight_I=candidate_weights(name, count_I), users=parsed.users, seed=[0, len(name)]
        )
        print(f"{name:15} {time.perf_counter() - begun:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
