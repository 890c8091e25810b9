"""The TRL side of finetune.py, run by the Python of TRL's own virtual environment.

It takes from raygr only the rules that read ratings from a text and the reward; both need numpy and torch alone.
Settings differ from TRL's defaults to make the sides equal, or because they are faster on a CPU: no gradient
checkpointing and no bf16, which TRL turns on. `dr_grpo` with unscaled rewards is TRL's loss nearest to raygr's: a sum
over tokens divided by a constant, and advantages that are not divided by their standard deviation.

How TRL 1.16 computes a step. Every prompt is in the batch once per completion, padded to the longest, and is prefilled
that often; completions are sampled with a KV cache and logits of the last position alone. Continuous batching shares
full pages of equal beginnings instead, but only with requests of a later batch than the first of them, and puts a
batch's requests into one row under a dense mask. The loss runs over prompts and completions from the start again,
without that cache, which has no gradients. Log-probabilities and entropies come from the output head in tiles, which
the backward pass computes a second time. On CUDA the head gets the positions of completions alone; on a CPU it gets
those of the prompts too, which are masked afterwards.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from finetune import Pipe, Side, peak_bytes, read_side
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from raygr.finetune.rewards import reciprocal_rank, standardised
from raygr.score.answer_format import parse_ratings

# small, so that each prompt is in a later batch than the one before it; the defaults, 256 and 8,192, share nothing
PAGED = {"page_size": 16, "max_batch_tokens": 512}


class Rewards:
    """raygr's reward, and the rows and mean reward of the current step."""

    def __init__(self, job: dict) -> None:
        self.job = job
        self.rows: list[int] = []
        self.mean = 0.0

    def target_rank(self, completions: list[str], row: list[int], **kwargs) -> list[float]:
        """`row`: the index of each completion's user in the job."""
        rewards = [self.of_text(*pair) for pair in zip(completions, row, strict=True)]
        self.rows, self.mean = row, sum(rewards) / len(rewards)
        return rewards

    def of_text(self, text: str, row: int) -> float:
        ratings = [float("nan") if r is None else r for r in parse_ratings(text, tuple(self.job["names"])).ratings]
        ratings_1A = torch.tensor([ratings], dtype=torch.float64)
        user_1A = standardised(ratings_1A, self.job["rating_mean"], self.job["rating_std"])
        candidates_CA = torch.tensor(self.job["examples"][row]["candidates"], dtype=torch.float64)
        return float(reciprocal_rank(user_1A, candidates_CA, torch.arange(len(candidates_CA)) == 0))


class Rounds(TrainerCallback):
    """Waits before every optimizer step, and answers after it."""

    def __init__(self, job: dict, rewards: Rewards, pipe: Pipe) -> None:
        self.job, self.rewards, self.pipe = job, rewards, pipe
        self.seen = 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.pipe.wait()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        users, group = self.job["users"], self.job["completions"]
        step = range((state.global_step - 1) * users, state.global_step * users)
        if self.rewards.rows != [row for row in step for _ in range(group)]:
            raise SystemExit(f"TRL took the users {self.rewards.rows} in step {state.global_step}")
        # TRL's own count: every completion with its prompt
        new, self.seen = state.num_input_tokens_seen - self.seen, state.num_input_tokens_seen
        prompts = group * sum(len(self.job["examples"][row]["prompt_ids"]) for row in step)
        figures = {"tokens": int(new) - prompts, "reward": self.rewards.mean, "threads": torch.get_num_threads()}
        self.pipe.answer(**figures, peak_bytes=peak_bytes())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--sides", type=read_side, required=True)
    arguments = parser.parse_args()
    pipe = Pipe()
    job, side = json.loads(arguments.job.read_text()), arguments.sides
    torch.set_num_threads(job["threads"])
    if "compact" in side.kind:
        # decides in TRL whether the head gets scored positions alone; the kernels use their own module's function
        trl.trainer.utils._use_triton = lambda device: True
    rewards, tokenizer = Rewards(job), AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    check_prompts(job, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa"),
            reward_funcs=rewards.target_rank,
            args=grpo_config(job, side, folder),
            train_dataset=Dataset.from_list(
                [{"prompt": example["prompt"], "row": row} for row, example in enumerate(job["examples"])]
            ),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **job["lora"]),
            callbacks=[Rounds(job, rewards, pipe)],
        )
        pipe.answer(torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__)
        trainer.train()


def check_prompts(job: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that TRL, which tokenises texts by this same call, reads the same prompts."""
    ids = tokenizer(text=[example["prompt"] for example in job["examples"]])["input_ids"]
    for row, (own, example) in enumerate(zip(ids, job["examples"], strict=True)):
        if own != example["prompt_ids"]:
            raise SystemExit(f"prompt {row} of the job: the tokens of its text are not those that raygr reads")


def grpo_config(job: dict, side: Side, folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=side.at_once,
        gradient_accumulation_steps=job["users"] * job["completions"] // side.at_once,
        num_generations=job["completions"],
        max_completion_length=job["tokens"],
        **sampling(job, paged="paged" in side.kind),
        temperature=job["temperature"],
        beta=0.0,
        num_iterations=1,
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=job["learning_rate"],
        max_grad_norm=job["max_grad_norm"],
        max_steps=1 + job["rounds"],
        shuffle_dataset=False,
        seed=job["seed"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )


def sampling(job: dict, *, paged: bool) -> dict:
    """Settings under which no completion ends early; continuous batching has no `min_new_tokens`."""
    if not paged:
        return {"generation_kwargs": {"min_new_tokens": job["tokens"]}}
    longest = max(len(example["prompt_ids"]) for example in job["examples"]) + job["tokens"]
    pages = job["users"] * job["completions"] * (longest // PAGED["page_size"] + 2)  # by default, half of the memory
    return {
        "generation_kwargs": {"eos_token_id": -1},
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": PAGED | {"num_blocks": pages},
    }


if __name__ == "__main__":
    main()
