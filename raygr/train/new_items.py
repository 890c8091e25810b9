"""The place of new items in the whole catalogue: an offset of their scores, chosen without looking at the test.

Training does not know new items: they have the highest item_index and no learned part, so their scores are not
comparable with those of other items. Shape suffixes: `B` targets, `I` items, `D` width, `F` groups of hidden items.
"""

import numpy as np
import torch
from torch import Tensor

from raygr.models.inference import score_items
from raygr.schema import VALIDATION
from raygr.train.evaluate import TARGETS_AT_ONCE, left_out, user_states
from raygr.train.state import Training

CALIBRATED_ON = 2048  # validation targets
LIMIT, STEPS = 100.0, 50  # largest offset, and steps of the bisection


@torch.inference_mode()
def calibrated_offset(training: Training) -> float:
    """The offset of new items' scores, measured with known items whose learned part is hidden.

    Known items fall into random groups of about as many items as there are new ones. Each group is hidden in turn: its
    items are scored without their learned part, like new items. With the offset, the softmax gives all hidden groups
    together as much probability as they have validation targets. A target is in one group, so this is one per target.
    """
    training.model.eval()
    inputs, targets = training.inputs, training.inputs.targets[VALIDATION]
    known = inputs.items - inputs.new_items
    order_I = torch.from_numpy(np.random.default_rng(training.config.seed).permutation(known))
    group_I = order_I.to(training.device) % max(2, known // inputs.new_items)
    embedding = training.model.embedding
    rows_ID = embedding.item_rows()
    unlearned_ID = rows_ID - torch.nn.functional.pad(embedding.base_ID, (0, embedding.width - embedding.base_width))
    ahead = []
    for example_B in torch.arange(min(len(targets.user_E), CALIBRATED_ON)).split(TARGETS_AT_ONCE):
        states = user_states(training, targets, example_B, rows_ID)
        scores_BI, unlearned_BI = (
            score_items(training.model, rows, states).float() for rows in (rows_ID, unlearned_ID)
        )
        row_N, item_N = left_out(training, targets, example_B)
        scores_BI[row_N, item_N - 1] = unlearned_BI[row_N, item_N - 1] = -torch.inf
        ahead.append(logits_of_groups(scores_BI[:, :known], unlearned_BI[:, :known], group_I))
    return offset_for_share(torch.cat(ahead).double())


def logits_of_groups(scores_BI: Tensor, unlearned_BI: Tensor, group_I: Tensor) -> Tensor:
    """The log odds that the softmax gives each hidden group against all other items, (B, F)."""
    columns = []
    for group in range(int(group_I.max()) + 1):
        hidden_BI = unlearned_BI[:, group_I == group]
        columns.append(hidden_BI.logsumexp(1) - scores_BI[:, group_I != group].logsumexp(1))
    return torch.stack(columns, dim=1)


def offset_for_share(logit_BF: Tensor) -> float:
    """The number c for which the sum over F of sigmoid(logit + c) is 1 on average."""
    low, high = -LIMIT, LIMIT
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if (logit_BF + middle).sigmoid().sum(1).mean() > 1 else (middle, high)
    return middle
