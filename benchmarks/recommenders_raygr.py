"""The raygr side of recommenders.py: the training loop of a worker, without Ray."""

import torch
from recommenders_orders import Orders, read_job

from raygr.execution.distributed import keep_freed_memory
from raygr.models.workers import Share
from raygr.schema import VALIDATION
from raygr.train.config import TrainConfig
from raygr.train.evaluate import target_ranks
from raygr.train.inputs import load_inputs
from raygr.train.loop import accumulate_gradients, take_step
from raygr.train.optimizer import learning_rate
from raygr.train.state import Training, start_training
from raygr.train.step import epoch_contents, epoch_draws, whole_batch


def settings(job: dict) -> TrainConfig:
    is_lanes = job["model"] == "gru4rec_lanes"
    # of the lanes: as many items a position in the loss as GRU4Rec's own code has
    own = {"negatives": job["negatives"] + job["batch"], "loss": "sampled_cross_entropy", "optimizer": "adagrad"}
    return TrainConfig(
        output="none",
        data=job["data"],
        model=job["model"].partition("_")[0],
        base_width=job["width"],
        blocks=job["blocks"],
        heads=job["heads"],
        max_history=job["history"],
        windows="last",  # what the others have
        dropout=job["dropout"],
        batch_size=job["batch"],
        learning_rate=job["adagrad_rate"] if is_lanes else job["learning_rate"],
        mask_rate=job["mask_rate"],
        mask_last_rate=0.0,
        session_parallel=is_lanes,
        epochs=job["epochs"],
        seed=job["seed"],
        **(own if is_lanes else {}),
    )


def main() -> None:
    job = read_job()
    keep_freed_memory()
    config = settings(job)
    training = start_training(config, load_inputs(config), torch.device("cpu"), Share())
    orders = Orders(lambda: target_ranks(training, VALIDATION, ["full"])["full"].tolist())
    orders.answer(torch=torch.__version__, items=training.inputs.items)
    while True:
        orders.wait_for_epoch()
        training.progress.epoch += 1
        orders.answer(loss=one_epoch(training))


def one_epoch(training: Training) -> float:
    """An epoch of the training loop without its evaluation; returns the mean loss per position."""
    config, epoch = training.config, training.progress.epoch
    draws = epoch_draws(config.seed, epoch, 0)
    torch.manual_seed(draws.dropout_seed)
    training.session_BD = None
    training.model.train()
    total, positions = torch.zeros(()), 0
    contents = epoch_contents(config, training.inputs, epoch)
    for step, content in enumerate(contents, start=(epoch - 1) * len(contents)):
        whole = whole_batch(config, training.inputs, content, training.popularity_I, draws)
        total += accumulate_gradients(training, whole)
        take_step(training, learning_rate(config, step, config.epochs * len(contents)))
        positions += whole.positions()
    return float(total) / positions


if __name__ == "__main__":
    main()
