"""GRU4Rec's official PyTorch code as a side of recommenders.py. None of that code is in this repository.

`fit` trains as it is, with the newest train interactions of a user as one session; its batches wait before an epoch
and answer after it.
"""

import sys

import pandas as pd
import torch
from recommenders_orders import Orders, read_job

HISTORIES_AT_ONCE = 512


def main() -> None:
    job = read_job()
    sys.path.insert(0, job["gru4rec"])
    import gru4rec_pytorch as official

    gru = official.GRU4Rec(
        layers=[job["width"]],
        loss="cross-entropy",
        batch_size=job["batch"],
        dropout_p_embed=job["dropout"],
        dropout_p_hidden=job["dropout"],
        learning_rate=job["adagrad_rate"],
        n_sample=job["negatives"],
        constrained_embedding=True,
        n_epochs=job["epochs"] + 1,  # one more than is asked for: before it, orders to evaluate come
        device=torch.device("cpu"),
    )
    orders = Orders(lambda: target_ranks(job, gru))
    iterate = official.SessionDataIterator.__call__

    def waiting_batches(self, enable_neg_samples, reset_hook=None):
        orders.wait_for_epoch()
        yield from iterate(self, enable_neg_samples, reset_hook)
        orders.answer()

    official.SessionDataIterator.__call__ = waiting_batches
    rows = [(user, item, step) for user, items in enumerate(newest(job)) for step, item in enumerate(items)]
    frame = pd.DataFrame(rows, columns=["SessionId", "ItemId", "Time"])
    orders.answer(torch=torch.__version__, items=int(frame["ItemId"].nunique()))
    # the weights of its Theano version, which are the default, are float64 under a new numpy, and refused
    gru.fit(frame, sample_cache_max_size=1_000_000, compatibility_mode=False)


def newest(job: dict) -> list[list[int]]:
    return [history[-job["history"] - 1 :] for history in job["train"]]


@torch.no_grad()
def target_ranks(job: dict, gru) -> list[float]:
    """The network walked to each user's last interaction, histories of about one length at once."""
    model, place_of = gru.model.eval(), gru.data_iterator.itemidmap.to_dict()
    histories = [items[-job["history"] :] for items in job["train"]]
    ranks = [float("inf")] * len(histories)
    order = sorted(range(len(histories)), key=lambda user: len(histories[user]))
    for first in range(0, len(order), HISTORIES_AT_ONCE):
        users = order[first : first + HISTORIES_AT_ONCE]
        scores = last_scores(model, [[place_of[item] for item in histories[user]] for user in users], job["width"])
        for row, user in enumerate(users):
            target = place_of.get(job["target"][user])
            if target is None:
                continue  # no item of the train part
            target_score = scores[row, target].clone()
            scores[row, [place_of[item] for item in set(job["train"][user]) & place_of.keys()]] = -torch.inf
            ranks[user] = 1 + int((scores[row] > target_score).sum())
    model.train()
    return [min(rank, len(place_of) + 1) for rank in ranks]


def last_scores(model, histories: list[list[int]], width: int) -> torch.Tensor:
    """(histories, items); shorter histories begin later, so that all end at the same step."""
    longest = max(map(len, histories))
    hidden = [torch.zeros(len(histories), width)]
    items = torch.tensor([[0] * (longest - len(history)) + history for history in histories])
    for step in range(longest):
        before = torch.tensor([step < longest - len(history) for history in histories])
        embedded, outputs, biases = model.embed(items[:, step], hidden, None)
        state = model.hidden_step(embedded, hidden)
        hidden[0] = torch.where(before[:, None], 0.0, state)
    return model.score_items(state, outputs, biases)


if __name__ == "__main__":
    main()
