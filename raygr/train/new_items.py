"""The place of new items in the whole catalogue: an offset of their scores, chosen without looking at the test.

New items are those that the data set aside, and those that a recommender is given later. Training does not know them:
they have the highest item_index and no learned part, so their scores are not comparable with those of other items.
Shape letters: `B` rows of a batch, `I` items, `D` width, `Y` places of a list.
"""

import numpy as np
import torch
from torch import Tensor

from raygr.models.inference import score_items
from raygr.schema import VALIDATION
from raygr.train.evaluate import TARGETS_AT_ONCE, left_out, user_states
from raygr.train.state import Training

CALIBRATED_ON = 2048  # validation targets
PLACES = 10  # of the lists in which hidden items are counted
GROUPS = (2, 20)  # fewest and most groups of hidden items
GROUPS_WITHOUT_NEW = 10  # on data without new items: a tenth of the items is hidden
SEEN = -1e30  # the score of items that are not ranked; finite, so that differences are numbers


@torch.inference_mode()
def calibrated_offset(training: Training) -> float:
    """The offset of new items' scores, measured with known items whose learned part is hidden.

    Known items fall into random groups of about as many items as there are new ones, or into GROUPS_WITHOUT_NEW. Each
    group is hidden in turn: its items are scored without their learned part, like new items. With the offset, hidden
    items fill as large a share of the first PLACES of the validation users' lists as they are of the known items. Only
    the order of scores counts, so this holds for every loss. The offset is 0 where users have seen almost all items.
    """
    training.model.eval()
    inputs, targets = training.inputs, training.inputs.targets[VALIDATION]
    known = inputs.items - inputs.new_items
    groups = int(np.clip(known // inputs.new_items, *GROUPS)) if inputs.new_items else GROUPS_WITHOUT_NEW
    order_I = torch.from_numpy(np.random.default_rng(training.config.seed).permutation(known))
    group_I = order_I.to(training.device) % groups
    rows_ID, base_ID = training.model.embedding.item_rows(), training.model.embedding.base_ID
    unlearned_ID = rows_ID - torch.nn.functional.pad(base_ID, (0, rows_ID.shape[1] - base_ID.shape[1]))
    found = []
    for example_B in torch.arange(min(len(targets.user_E), CALIBRATED_ON)).split(TARGETS_AT_ONCE):
        states = user_states(training, targets, example_B, rows_ID)
        scores_BI, unlearned_BI = (
            score_items(training.model, rows, states).float() for rows in (rows_ID, unlearned_ID)
        )
        row_N, item_N = left_out(training, targets, example_B)
        scores_BI[row_N, item_N - 1] = unlearned_BI[row_N, item_N - 1] = SEEN
        for group in range(groups):
            is_hidden_I = group_I == group
            found.append(missing_scores(scores_BI[:, :known][:, ~is_hidden_I], unlearned_BI[:, :known][:, is_hidden_I]))
    offset = float(np.quantile(torch.cat([one.flatten() for one in found]).cpu().numpy(), 1 / groups))
    return offset if abs(offset) < -SEEN / 1e6 else 0.0


def missing_scores(scores_BI: Tensor, hidden_BI: Tensor) -> Tensor:
    """What the n-th best hidden item needs to be among the first places with n - 1 hidden ones before it, (B, Y).

    An offset brings as many hidden items into the first places as there are needs below it.
    """
    places = min(PLACES, scores_BI.shape[1], hidden_BI.shape[1])
    best_BY, hidden_BY = (one.topk(places, dim=1).values for one in (scores_BI, hidden_BI))
    return torch.where(hidden_BY == SEEN, -SEEN, best_BY.flip(1) - hidden_BY)  # no offset brings back a seen item
