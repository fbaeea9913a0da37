"""LoRAs on stacks of weights that a model's own code reads, as `peft` writes them (`target_parameters`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import peft
import pytest
import torch
from support.adapted import gradients, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import peftfx
from peftfx import PeftfxError

COUNT, WIDTH, OUT = 3, 6, 10
STACK = "layers.up"


class Layers(nn.Module):
    """Several layers' weights in one parameter. `read` multiplies by them."""

    def __init__(self, read: Callable[[Layers, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.read = read
        self.up = nn.Parameter(torch.randn(shape) * 0.5)
        self.bias = nn.Parameter(torch.randn(COUNT, OUT) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


class Model(nn.Module):
    """The layers' outputs for [batch, n, in], behind a linear layer."""

    def __init__(self, read: Callable[[Layers, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = Layers(read, shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.tanh(self.first(x))).tanh()


def at_once(layers: Layers, x: Tensor) -> Tensor:
    return torch.bmm(x.flatten(0, 1).expand(COUNT, -1, -1), layers.up)


def against_all(layers: Layers, x: Tensor) -> Tensor:
    return x[:, None] @ layers.up.transpose(1, 2)


def one_by_one(layers: Layers, x: Tensor) -> Tensor:
    return sum(F.linear(x * (i + 1), layers.up[i], layers.bias[i]) for i in range(COUNT))  # type: ignore[return-value]


def unbound(layers: Layers, x: Tensor) -> Tensor:
    return torch.stack([(x + i) @ weight for i, weight in enumerate(layers.up)])


def two_of_them(layers: Layers, x: Tensor) -> Tensor:
    """The second layer is never read, and the last one twice."""
    return (x @ layers.up[0].t()) * torch.sigmoid(x @ layers.up[-1].t()) + (x + 1) @ layers.up[-1].t()


IN_OUT, OUT_IN = (COUNT, WIDTH, OUT), (COUNT, OUT, WIDTH)
READS = {
    "bmm": (at_once, IN_OUT),
    "matmul": (against_all, OUT_IN),
    "linear": (one_by_one, OUT_IN),
    "unbind": (unbound, IN_OUT),
    "some": (two_of_them, OUT_IN),
}


def build(name: str) -> Model:
    torch.manual_seed(3)
    return Model(*READS[name])


def sample(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(rows))


def theirs(name: str, folder: Path) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["first"], target_parameters=[STACK])
    made = peft.get_peft_model(build(name), config)
    randomise(made)
    made.save_pretrained(str(folder))
    return made


@pytest.mark.parametrize("name", READS)
def test_what_peft_wrote_is_loaded_trained_merged_exported_and_saved(name: str, tmp_path: Path) -> None:
    wanted, x = theirs(name, tmp_path / "adapter").eval(), sample(2, 4)
    ours = peftfx.load(build(name), tmp_path / "adapter", inputs={"x": x})
    (site,) = (p.site for p in ours.adapter("default").placements if p.site.path == STACK)
    assert (site.kind, site.shape, site.transposed) == ("experts", READS[name][1], READS[name][1] == IN_OUT)
    for call in (x, sample(1, 1), sample(3, 5)):
        torch.testing.assert_close(ours(call), wanted(call), atol=1e-5, rtol=1e-5)
    assert float((wanted(x) - build(name)(x)).detach().abs().max()) > 0.05

    ours.export(tmp_path / "out")
    session = ort.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for call in (sample(3, 5), sample(1, 2)):
        (got,) = session.run(None, {"x": call.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), wanted(call).detach(), atol=1e-5, rtol=1e-5)

    ours.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(build(name), str(tmp_path / "again"))
    torch.testing.assert_close(again(x), wanted(x), atol=1e-6, rtol=1e-6)
    ours.merge()
    torch.testing.assert_close(ours(x), wanted(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", READS)
def test_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    wanted, x = theirs(name, tmp_path).train(), sample(2, 4)
    ours = peftfx.load(build(name), tmp_path, inputs={"x": x}).train()
    for model in (wanted, ours):
        model(x).square().sum().backward()
    got, want = gradients(ours), gradients(wanted)
    named = {f"adapters.default.{STACK}.lora_{f}": f"base_model.model.layers.lora_{f}.default.weight" for f in "AB"}
    if READS[name][1] == OUT_IN:
        for own, other in named.items():
            torch.testing.assert_close(got[own], want[other], atol=1e-5, rtol=1e-4)
        return
    a, b = (want[other] for other in named.values())  # `peft` takes the weights for [out, in]
    own_a, own_b = (got[own] for own in named)
    torch.testing.assert_close(own_a.unflatten(0, (COUNT, -1)), b.unflatten(1, (-1, COUNT)).permute(2, 1, 0))
    torch.testing.assert_close(own_b.unflatten(1, (-1, COUNT)).permute(2, 1, 0), a.unflatten(0, (COUNT, -1)))


def also_summed(layers: Layers, x: Tensor) -> Tensor:
    return torch.bmm(x.flatten(0, 1).expand(COUNT, -1, -1), layers.up) + layers.up.sum()


def over_another_axis(layers: Layers, x: Tensor) -> Tensor:
    return x @ layers.up[:, 1].t()


@pytest.mark.parametrize(
    ("read", "shape", "by"), [(also_summed, IN_OUT, "bmm|sum"), (over_another_axis, OUT_IN, "select")]
)
def test_a_stack_that_something_else_reads_is_refused(
    read: Callable[[Layers, Tensor], Tensor], shape: tuple[int, ...], by: str
) -> None:
    with pytest.raises(PeftfxError, match=f"up is read by ({by})"):
        peftfx.transform(Model(read, shape), peftfx.LoRA(r=2, target_parameters=[STACK]), inputs={"x": sample(2, 4)})
