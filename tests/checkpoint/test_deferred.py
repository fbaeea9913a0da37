"""What is done to a deferred tensor waits, and is made once for what is asked for together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfx.adapters.deferred import Deferred


def test_operators_wait_and_what_they_share_is_made_once() -> None:
    made: list[int] = []

    def make() -> list[Tensor]:
        made.append(1)
        return [torch.arange(24.0).view(4, 6)]

    (tensor,) = Deferred.of(make, [torch.empty(4, 6, device="meta")])
    kept = nn.Parameter(tensor, requires_grad=False)
    first, second = kept.to(torch.bfloat16).chunk(2)
    assert (made, first.shape, first.dtype) == ([], (2, 6), torch.bfloat16)
    rows = [part.squeeze(0) for part in torch.cat([first, second]).split(1)]
    want = torch.arange(24.0).view(4, 6).bfloat16()
    for row, value in zip(rows, want, strict=True):
        assert isinstance(row, Deferred)
        assert row.value().equal(value)
    assert len(made) == 1
    assert rows[0].value().equal(want[0])  # asked for again, made again
    assert len(made) == 2
