"""The RecTools side of recommenders.py, run by the python of RecTools' own virtual environment.

Its models cut histories to the newest `session_max_len` + 1 (BERT4Rec: one less) and pad them on the left to that
length; Lightning trains them as `fit` does by itself, but for a callback that waits before an epoch and answers after
it. Lists of ten come from `recommend`, whose data set has all train interactions, so that all of them are filtered.
"""

import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import LambdaCallback
from recommenders_orders import Orders, read_job
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet

MISSED = 1000  # a rank beyond the list


def main() -> None:
    job = read_job()
    seed_everything(job["seed"])
    dataset, model = Dataset.construct(train_interactions(job)), make_model(job)
    orders = Orders(lambda: target_ranks(job, dataset, model))
    model._trainer = Trainer(
        max_epochs=job["epochs"] + 1,  # one more than is asked for: behind the last it waits for orders to evaluate
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[
            LambdaCallback(
                on_train_epoch_start=lambda trainer, module: orders.wait_for_epoch(),
                on_train_epoch_end=lambda trainer, module: orders.answer(),
            )
        ],
    )
    orders.answer(torch=torch.__version__, items=len(dataset.item_id_map.external_ids))
    model.fit(dataset)


def train_interactions(job: dict) -> pd.DataFrame:
    rows = [(user, item, step) for user, history in enumerate(job["train"]) for step, item in enumerate(history)]
    frame = pd.DataFrame(rows, columns=[Columns.User, Columns.Item, Columns.Datetime])
    frame[Columns.Datetime] = pd.to_datetime(frame[Columns.Datetime], unit="s")
    return frame.assign(**{Columns.Weight: 1.0})


def make_model(job: dict) -> SASRecModel | BERT4RecModel:
    own = {"mask_prob": job["mask_rate"]} if job["model"] == "bert4rec" else {}
    kind = BERT4RecModel if job["model"] == "bert4rec" else SASRecModel
    return kind(
        n_blocks=job["blocks"],
        n_heads=job["heads"],
        n_factors=job["width"],
        dropout_rate=job["dropout"],
        session_max_len=job["history"],
        batch_size=job["batch"],
        loss="softmax",
        lr=job["learning_rate"],
        item_net_block_types=(IdEmbeddingsItemNet,),
        recommend_torch_device="cpu",
        **own,
    )


def target_ranks(job: dict, dataset: Dataset, model: SASRecModel | BERT4RecModel) -> list[float]:
    model.is_fitted = True  # `fit` says so at its end only
    lists = model.recommend(users=list(range(len(job["target"]))), dataset=dataset, k=10, filter_viewed=True)
    model.lightning_model.train()
    target_of = pd.Series(job["target"])
    hits = lists[lists[Columns.Item].to_numpy() == target_of[lists[Columns.User]].to_numpy()]
    return hits.set_index(Columns.User)[Columns.Rank].reindex(target_of.index, fill_value=MISSED).tolist()


if __name__ == "__main__":
    main()
