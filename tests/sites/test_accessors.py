"""A model whose accessors of embeddings are not written is targeted, captured and exported as one without accessors."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from support.adapted import randomise
from torch import nn

import peftfx


class Plain(nn.Module):
    """An embedding, two layers and a head, without transformers' accessors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.lm_head = nn.Linear(8, 13)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        return self.lm_head(hidden + self.down(torch.tanh(self.up(hidden))))


class Unwritten(Plain):
    """The same with accessors that raise, as transformers' own do where a model has no such module."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize("target", ["all-linear", "all-linear | embedding.token"])
@pytest.mark.parametrize("road", ["graph", "modules"])
def test_accessors_that_raise_change_nothing(tmp_path: Path, target: str, road: str) -> None:
    call, longer = {"input_ids": torch.tensor([[1, 5, 9]])}, torch.tensor([[2, 4, 6, 8, 10], [1, 3, 5, 7, 12]])
    outputs = []
    for kind in (Plain, Unwritten):
        torch.manual_seed(0)
        adapted = peftfx.transform(kind().eval(), peftfx.LoRA(r=2, target=target), inputs=call, road=road)
        randomise(adapted)
        peftfx.export_onnx(adapted, tmp_path / kind.__name__, inputs=call)
        session = onnxruntime.InferenceSession(tmp_path / kind.__name__ / "model.onnx")
        with torch.no_grad():
            outputs.append(adapted(input_ids=longer))
        served = session.run(None, {session.get_inputs()[0].name: longer.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(served), outputs[-1], atol=1e-5, rtol=1e-5)
    assert torch.equal(*outputs)
