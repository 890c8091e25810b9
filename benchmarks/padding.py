"""Effect on expected ratings of padding each prompt to a whole cache block, or cutting it; in plain transformers.

    python benchmarks/padding.py --data outputs/quickstart/prepare --items 48

vLLM's prefix cache holds whole blocks (32 tokens on a CPU), so in probe mode the partial block at a prompt's end is
computed again for each aspect. Padding behind the subject's text, or cutting that text, would avoid this. The script
prints how far expected ratings (1..10, all aspects of all items) move from those of the unchanged prompt; it takes two
minutes on two cores.
"""

import argparse

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from raygr import files
from raygr.score.answer_format import RatingTokens, aspect_tails, rating_tokens
from raygr.score.aspects import load_aspects
from raygr.score.default_model import model_folder
from raygr.score.engine import rating_probabilities
from raygr.score.prompts import PromptEncoder, item_from_row

BLOCK = 32
PADS = {"line breaks": "\n", "blanks": " ", "<|endoftext|>": "<|endoftext|>"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="outputs/quickstart/prepare")
    parser.add_argument("--items", type=int, default=48)
    arguments = parser.parse_args()
    folder, aspects = model_folder("smollm2"), load_aspects("configs/aspects/movies.yaml")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = PromptEncoder(tokenizer, aspects, "items", max_prompt_tokens=1024)
    tails, tokens = aspect_tails(tokenizer, aspects), rating_tokens(tokenizer, aspects)
    shared = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([encoder.shared]), past_key_values=shared, use_cache=True)
    shifts: dict[str, list[np.ndarray]] = {}
    rows = files.read_table(files.join(arguments.data, "items")).slice(0, arguments.items).to_pylist()
    for row in rows:
        ids = list(encoder.item_prompt(item_from_row(row, "train")).prefix_ids[len(encoder.shared) :])
        text, closing = ids[: -len(encoder.closing)], encoder.closing
        surplus = (len(encoder.shared) + len(ids)) % BLOCK
        changed = {name: [*text, *tokenizer.encode(pad) * (-surplus % BLOCK)] for name, pad in PADS.items()}
        changed["cut to a whole block"] = text[: max(0, len(text) - surplus)]
        whole_A = expected_ratings(model, shared, ids, tails, tokens)
        for name, other in changed.items():
            shift_A = expected_ratings(model, shared, [*other, *closing], tails, tokens) - whole_A
            shifts.setdefault(name, []).append(np.abs(shift_A))
    for name, values in shifts.items():
        shift = np.array(values)
        print(f"{name}: mean {shift.mean():.2f}, most {shift.max():.2f}, above 0.01 {100 * (shift > 0.01).mean():.1f}%")


@torch.inference_mode()
def expected_ratings(
    model: PreTrainedModel,
    shared: DynamicCache,
    own: list[int],
    tails: tuple[tuple[int, ...], ...],
    tokens: RatingTokens,
) -> np.ndarray:
    """Expected ratings (A,) from one pass behind the shared prefix; each tail attends to the prompt and itself only."""
    known, length = shared.get_seq_length(), len(own)
    branches = [[*tail, tokens.digits[0]] for tail in tails]
    ids = [*own, *(token for branch in branches for token in branch)]
    branch_T = torch.tensor([-1] * length + [n for n, branch in enumerate(branches) for _ in branch])
    place_T = torch.tensor([*range(length), *(length + n for branch in branches for n in range(len(branch)))])
    sees_TT = (branch_T[:, None] == branch_T) | (branch_T == -1)
    sees_TT &= torch.arange(len(ids))[:, None] >= torch.arange(len(ids))
    sees_TP = torch.cat([torch.ones(len(ids), known, dtype=torch.bool), sees_TT], dim=1)
    logits_TV = model(
        torch.tensor([ids]),
        position_ids=known + place_T[None],
        attention_mask=torch.zeros(sees_TP.shape).masked_fill(~sees_TP, float("-inf"))[None, None],
        past_key_values=shared,
        use_cache=True,
    ).logits[0]
    shared.crop(-len(ids))
    ends = np.cumsum([len(branch) for branch in branches]) + length - 1
    logprobs_TV = logits_TV.double().log_softmax(-1).numpy()
    rating_ids = [*tokens.digits, tokens.ten[-1]]
    return rating_probabilities(logprobs_TV[ends - 1][:, rating_ids], logprobs_TV[ends, tokens.ten[-1]]) @ np.arange(
        1, 11
    )


if __name__ == "__main__":
    main()
