"""The RecBole side of recommenders.py, run by the python of RecBole's own virtual environment.

Its trainer runs epoch by epoch and scores validation by itself. Sequential models rank seen items too there, so
their scores are taken out before a rank is read.
"""

import tempfile
from pathlib import Path

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from recommenders_orders import Orders, read_job


def main() -> None:
    job = read_job()
    with tempfile.TemporaryDirectory() as folder:
        write_interactions(job, Path(folder, "histories"))
        config = make_config(job, folder)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train_data, valid_data, _ = data_preparation(config, dataset)
        model = get_model(config["model"])(config, train_data._dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    orders = Orders(lambda: target_ranks(job, trainer, valid_data))
    orders.answer(torch=torch.__version__, items=dataset.item_num - 1, samples=len(train_data._dataset))
    for epoch in range(job["epochs"] + 1):
        orders.wait_for_epoch()
        trainer._train_epoch(train_data, epoch)
        orders.answer()


def write_interactions(job: dict, folder: Path) -> None:
    """The newest train interactions and the validation target behind them, as RecBole's atomic file."""
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, (history, target) in enumerate(zip(job["train"], job["target"], strict=True)):
        kept = [*history[-job["history"] - 1 :], target]
        lines += [f"{user}\t{item}\t{step}" for step, item in enumerate(kept)]
    Path(folder, f"{folder.name}.inter").write_text("\n".join(lines) + "\n")


def make_config(job: dict, folder: str) -> Config:
    settings = {
        "data_path": folder,
        "use_gpu": False,
        "seed": job["seed"],
        "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": job["history"],
        "eval_args": {"split": {"LS": "valid_only"}, "order": "TO", "mode": "full"},
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "epochs": job["epochs"],
        "train_batch_size": job["batch"],
        "eval_batch_size": 256 * (job["items"] + 1),  # counted in scores: 256 users at once, as raygr
        "learning_rate": job["learning_rate"],
        "n_layers": job["blocks"],
        "n_heads": job["heads"],
        "hidden_size": job["width"],
        "inner_size": job["width"],
        "hidden_dropout_prob": job["dropout"],
        "attn_dropout_prob": job["dropout"],
        "hidden_act": "relu",
    }
    return Config(model="SASRec", dataset="histories", config_dict=settings)


@torch.no_grad()
def target_ranks(job: dict, trainer, valid_data) -> list[float]:
    trainer.model.eval()
    trainer.tot_item_num = valid_data._dataset.item_num
    trainer.item_tensor = valid_data._dataset.get_item_feature()
    to_item = {int(name): place for place, name in enumerate(valid_data._dataset.field2id_token["item_id"]) if place}
    to_user = [int(name) if name != "[PAD]" else -1 for name in valid_data._dataset.field2id_token["user_id"]]
    rank_of = [0.0] * len(job["target"])
    for batch in valid_data:
        interaction, scores, row, item = trainer._full_sort_batch_eval(batch)
        users = [to_user[place] for place in interaction["user_id"].tolist()]
        target_score = scores[row, item].clone()
        for place, user in enumerate(users):
            scores[place, [to_item[name] for name in set(job["train"][user]) & to_item.keys()]] = -torch.inf
        scores[row, item] = target_score
        for user, rank in zip(users, (1 + (scores > target_score[:, None]).sum(1)).tolist(), strict=True):
            rank_of[user] = rank
    trainer.model.train()
    return rank_of


if __name__ == "__main__":
    main()
