"""Lists of trained models beside the matrix product that they need, and the latency of a single list.

    python benchmarks/serving.py --models sasrec gru4rec --latency 5000 100000 1000000

Models have random weights, width 64 and histories of 50 items. `bulk`: the lists of ten of `--users` users among
`--items` items, as `raygr recommend` makes and writes them, batch by batch; the plain product of as many users' vectors
with all items' rows follows each batch, so that other work on the machine slows both. `hours_for_a_million_users` is
extrapolated from these users. `latency`: the median of `recommender.recommend(user)` and of the product of one vector.
"""

import argparse
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

from raygr import files
from raygr.recommend.config import RecommendConfig
from raygr.recommend.recommender import Recommender, with_rows
from raygr.recommend.stage import recommendations, subjects_of_users
from raygr.train.config import TrainConfig
from raygr.train.state import build_model

HISTORY, WIDTH, LIST = 50, 64, 10
CALLS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sasrec", "gru4rec"])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=RecommendConfig.batch_size)
    parser.add_argument("--latency", nargs="*", type=int, default=[5_000, 100_000, 1_000_000], help="numbers of items")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results/serving.json")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    bulk = [measured_bulk(model, parsed.items, parsed.users, parsed.batch_size) for model in parsed.models]
    latency = [measured_latency(parsed.models[0], items) for items in parsed.latency]
    for found in (*bulk, *latency):
        print(found)
    command = " ".join(["python benchmarks/serving.py", *sys.argv[1:]])
    files.write_json({"command": command, "threads": parsed.threads, "bulk": bulk, "latency": latency}, parsed.output)


@torch.inference_mode()
def measured_bulk(model: str, items: int, users: int, batch_size: int) -> dict[str, float | str]:
    recommender = random_recommender(model, items, users)
    config = RecommendConfig(output="none", train_run="none", n=LIST)
    subjects = subjects_of_users(None, recommender)
    vectors_BD, rows_DI = torch.randn(batch_size, WIDTH), recommender.rows_ID.T
    seconds, of_product, of_encoder = 0.0, 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for first in range(-batch_size, users - batch_size + 1, batch_size):  # the first batch again, to warm up
            batch = subjects.slice(max(0, first), batch_size)
            began = time.perf_counter()
            files.write_table(recommendations(recommender, batch, config), f"{folder}/part-{first}.parquet")
            done = time.perf_counter()
            vectors_BD @ rows_DI
            multiplied = time.perf_counter()
            recommender.states(recommender.of_users(batch["subject_id"].to_pylist()))
            if first >= 0:
                seconds, of_product = seconds + done - began, of_product + multiplied - done
                of_encoder += time.perf_counter() - multiplied
    users = users // batch_size * batch_size
    return {
        "model": model,
        "items": items,
        "users": users,
        "users_per_second": round(users / seconds, 1),
        "product_users_per_second": round(users / of_product, 1),
        "share_of_product": round(of_product / seconds, 3),
        "encoder_share": round(of_encoder / seconds, 3),
        "hours_for_a_million_users": round(1e6 / users * seconds / 3600, 2),
    }


def measured_latency(model: str, items: int) -> dict[str, float | str]:
    recommender = random_recommender(model, items, users=CALLS + 1)
    vector_1D, found, product = torch.randn(1, WIDTH), [], []
    for user in range(CALLS + 1):
        began = time.perf_counter()
        recommender.recommend(f"u{user}", n=LIST)
        done = time.perf_counter()
        vector_1D @ recommender.rows_ID.T
        found.append(done - began)
        product.append(time.perf_counter() - done)
    slowest = sorted(found[1:])[int(0.9 * CALLS)]
    names = {"milliseconds": statistics.median(found[1:]), "milliseconds_90th": slowest}
    names["product_milliseconds"] = statistics.median(product[1:])
    return {"model": model, "items": items} | {name: round(1000 * value, 2) for name, value in names.items()}


def random_recommender(model: str, items: int, users: int) -> Recommender:
    torch.manual_seed(0)
    config = TrainConfig(output="none", data="none", model=model, base_width=WIDTH, max_history=HISTORY)
    recommender = Recommender(
        run="none",
        config=config,
        model=build_model(config, items=items, scores_IA=None, users_UA=None).eval(),
        rows_ID=torch.empty(0),
        unit_ID=torch.empty(0),
        repeats=False,
        item_ids_I=np.array([f"i{item}" for item in range(items)]),
        user_ids_U=np.array([f"u{user}" for user in range(users)]),
        items_N=np.random.default_rng(0).integers(1, items + 1, users * HISTORY),
        rating_N=np.full(users * HISTORY, np.nan, np.float32),
        first_U=np.arange(users + 1) * HISTORY,
        aspects=(),
        catalogue_IA=None,
        new_items=0,
        new_item_offset=0.0,
        list_scores=None,
        index_of_item={},
        index_of_user={f"u{user}": user for user in range(users)},
    )
    return with_rows(recommender)


if __name__ == "__main__":
    main()
