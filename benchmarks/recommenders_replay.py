"""The RePlay side of llm_profiles.py, run by a python that has RePlay's dependencies, with RePlay's code on its path.

One training of RePlay's SASRec with LLM profiles: Lightning runs it on RePlay's own data sets, windows, loss and Adam.
In the first `profile_epochs` epochs the loss also holds the distance between the mean state of a history and a linear
map of the user's profile; with 0 epochs it is the base. Validation stops it as raygr's training stops, and raygr ranks
its scores.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import LambdaCallback
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import PandasSequentialDataset, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.models.nn.optimizer_utils import FatOptimizerFactory
from replay.models.nn.sequential.sasrec import SasRecPredictionDataset
from replay.models.nn.sequential.sasrec_with_llm import SasRecLLM, SasRecLLMTrainingDataset

from raygr.metrics.ranking import full_ranks, rank_metrics

CHOSEN_BY = "ndcg_at_10"


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    lightning.seed_everything(job["seed"])
    Path(sys.argv[2]).write_text(json.dumps(train(job)))


def train(job: dict) -> dict:
    """Test ranks of the epoch with the best validation, and the course of the training."""
    schema = item_schema(job["items"])
    model, found = make_model(job, schema), {"validation": [], "best_epoch": 0}
    weights = {}

    def evaluate(trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % job["evaluate_every"] and epoch < job["epochs"]:
            return
        value = rank_metrics(target_ranks(job, schema, model, "validation").numpy())[CHOSEN_BY]
        if value > max(found["validation"], default=0.0):
            found["best_epoch"] = epoch
            weights.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        found["validation"].append(value)
        print(f"epoch {epoch:3}  validation NDCG@10 {value:.4f}", file=sys.stderr, flush=True)
        trainer.should_stop = epoch - found["best_epoch"] >= job["patience"] * job["evaluate_every"]

    trainer = lightning.Trainer(
        max_epochs=job["epochs"],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[LambdaCallback(on_train_epoch_end=evaluate)],
    )
    started, batches = time.perf_counter(), training_batches(job, schema)
    trainer.fit(model, batches)
    found |= {"epochs": trainer.current_epoch, "seconds": time.perf_counter() - started}
    model.load_state_dict(weights)
    return found | {"ranks": target_ranks(job, schema, model, "test").tolist()}


def item_schema(items: int) -> TensorSchema:
    """RePlay counts items from 0, and the number behind the last one is its padding."""
    item = TensorFeatureInfo(
        name="item_id",
        is_seq=True,
        cardinality=items,
        padding_value=items,
        feature_type=FeatureType.CATEGORICAL,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
        feature_hint=FeatureHint.ITEM_ID,
    )
    return TensorSchema(item)


def sequences(schema: TensorSchema, histories: list[list[int]]) -> PandasSequentialDataset:
    """Histories of raygr's item_index, which counts from 1, as RePlay's; users count from 0 in both."""
    rows = [(user, [item - 1 for item in history]) for user, history in enumerate(histories)]
    return PandasSequentialDataset(schema, "user_id", "item_id", pd.DataFrame(rows, columns=["user_id", "item_id"]))


def make_model(job: dict, schema: TensorSchema) -> SasRecLLM:
    return SasRecLLM(
        schema,
        profile_emb_dim=len(job["profiles"][0]),
        block_count=job["blocks"],
        head_count=job["heads"],
        hidden_size=job["width"],
        max_seq_len=job["history"],
        dropout_rate=job["dropout"],
        loss_type="CE",
        optimizer_factory=FatOptimizerFactory(learning_rate=job["learning_rate"]),
        profile_distil_epochs=job["profile_epochs"],
        **job["distillation"],
    )


def training_batches(job: dict, schema: TensorSchema) -> torch.utils.data.DataLoader:
    profile_UA = torch.tensor(job["profiles"])
    dataset = SasRecLLMTrainingDataset(
        sequences(schema, job["histories"]["train"]),
        max_sequence_length=job["history"],
        user_profile_embeddings=profile_UA,
        existing_profile_binary_mask=torch.ones(len(profile_UA), dtype=torch.bool),
        sliding_window_step=job["history"] // 2,
        padding_value=job["items"],
    )
    return torch.utils.data.DataLoader(dataset, batch_size=job["batch"], shuffle=True)


@torch.no_grad()
def target_ranks(job: dict, schema: TensorSchema, model: SasRecLLM, part: str) -> torch.Tensor:
    """The rank of each user's target of the part, by raygr's rule: among all items that the user had not before."""
    histories, was_training = job["histories"][part], model.training
    model.eval()
    dataset = SasRecPredictionDataset(sequences(schema, histories), job["history"], padding_value=job["items"])
    scores_BI = torch.cat([model.predict(batch) for batch in torch.utils.data.DataLoader(dataset, batch_size=256)])
    model.train(was_training)
    row_N, item_N = (torch.tensor(column) for column in zip(*pairs(histories), strict=True))
    return full_ranks(scores_BI, torch.tensor(job["targets"][part]), row_N, item_N)


def pairs(histories: list[list[int]]) -> Iterator[tuple[int, int]]:
    return ((user, item) for user, history in enumerate(histories) for item in history)


if __name__ == "__main__":
    main()
