"""Data-parallel training in torch alone: which worker this is, and sums over all workers.

Both training loops use this module. A loop needs no Ray: its process group exists wherever there are several workers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    """The part of every batch that belongs to this worker: examples `rank`, `rank + workers`, and so on."""

    rank: int = 0
    workers: int = 1

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of all workers' `values`. One worker gets its own tensor back; several change it in place.

        The sum also gathers results: each worker leaves the other workers' places at 0.
        """
        if self.workers > 1:
            torch.distributed.all_reduce(values)
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all workers, in one all-reduce of one flat vector."""
        if self.workers == 1:
            return
        flat = self.total(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
