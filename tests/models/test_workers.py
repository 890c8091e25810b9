"""Sums over workers, with a stand-in for torch's all_reduce: two workers that hold the same values."""

import pytest
import torch

from raygr.models.workers import Share


def test_one_worker_keeps_its_own_values():
    values = torch.tensor([1.0, 2.0])
    assert Share().total(values) is values
    Share().add_up([values])
    assert values.tolist() == [1.0, 2.0]


def test_several_workers_add_up_all_tensors_at_once(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def doubled(values: torch.Tensor) -> None:
        calls.append(values.numel())
        values.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", doubled)
    tensors = [torch.ones(2, 3), torch.tensor(5.0), torch.arange(2.0)]
    Share(1, 2).add_up(tensors)
    assert [tensor.tolist() for tensor in tensors] == [[[2.0] * 3] * 2, 10.0, [0.0, 2.0]]
    assert Share(0, 2).total(torch.tensor([3.0])).tolist() == [6.0]
    assert calls == [9, 1]
