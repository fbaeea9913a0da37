"""What users pass as the model: wrapped, compiled, adapted by `peft` or by peftfx; and from where they export it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel

CALL = {
    "input_ids": torch.tensor([[0, 0, 7, 5, 9], [4, 6, 1, 8, 2]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
SEEN = CALL["attention_mask"].bool()


def llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture
def theirs() -> peft.PeftModel:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    return model.eval()


def served(directory: Path) -> Tensor:
    logits: Tensor = peftfx.runtime.load(directory)(**CALL).logits
    return logits[SEEN]


def same(got: Tensor, want: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got, want(**CALL).logits[SEEN], atol=1e-5, rtol=1e-5)


def inferred(model: nn.Module) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(model)


WRAPPED: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str]] = {
    "compiled": (lambda m: torch.compile(m, backend="eager"), "this model is compiled", "`model._orig_mod`"),
    "scripted": (lambda m: nn.Sequential(m, torch.jit.script(nn.Linear(4, 4))), "has scripted", "that was scripted"),
    "of inference tensors": (inferred, r"made under torch.inference_mode\(\)", "outside of the block"),
    "for several devices": (nn.DataParallel, "wrapped for several devices", "`model.module`"),
    "adapted": (lambda m: peftfx.transform(m, peftfx.LoRA(r=2)), "adapted by peftfx already", "load_adapter"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_is_refused_with_the_model_to_pass(name: str, tmp_path: Path) -> None:
    wrap, what, hint = WRAPPED[name]
    model = wrap(llama())
    calls: list[Callable[[], object]] = [
        lambda: peftfx.transform(model, peftfx.LoRA(r=2)),
        lambda: peftfx.load(model, tmp_path),
        lambda: peftfx.plan(model, peftfx.LoRA(r=2)),
        *([] if name == "adapted" else [lambda: peftfx.export_onnx(model, tmp_path / "out", inputs=CALL)]),
    ]
    for call in calls:
        with pytest.raises(PeftfxError, match=what) as caught:
            call()
        assert hint in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_peft_model_is_exported_with_its_active_adapters(theirs: peft.PeftModel, tmp_path: Path) -> None:
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    randomise(theirs)
    theirs.set_adapter("other")
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    peftfx.export_onnx(theirs, tmp_path / "out", view="forward")
    same(served(tmp_path / "out"), theirs)
    assert all(torch.equal(before[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_peft_model_is_inspected_as_its_base(theirs: peft.PeftModel) -> None:
    assert {site.path for site in peftfx.inspect(theirs)} == {site.path for site in peftfx.inspect(llama())}
    assert str(peftfx.plan(theirs, "lora(r=4)@mlp")) == str(peftfx.plan(llama(), "lora(r=4)@mlp"))


UNDER: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "nothing": nullcontext,
}


@pytest.mark.parametrize("name", UNDER)
def test_an_export_computes_in_the_models_own_dtype(name: str, theirs: peft.PeftModel, tmp_path: Path) -> None:
    adapted = peftfx.load(theirs)
    with UNDER[name]():
        adapted.export(tmp_path / "out", view="forward")
    same(served(tmp_path / "out"), theirs)


@pytest.mark.parametrize("view", ["forward", "decode"])
def test_a_float64_model_is_exported(view: str, tmp_path: Path) -> None:
    """Of the fused operators, some have no float64."""
    model = llama().double()
    peftfx.export_onnx(model, tmp_path / "out", view=view)
    with torch.no_grad():
        want = model(**CALL).logits[SEEN]
    got = peftfx.runtime.load(tmp_path / "out")(**CALL).logits[SEEN]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # its norms compute in float32


def test_threads_export_one_after_the_other(theirs: peft.PeftModel, tmp_path: Path) -> None:
    adapted, errors = peftfx.load(theirs), list[BaseException]()

    def export(directory: Path) -> None:
        try:
            adapted.export(directory, view="forward")
        except BaseException as error:
            errors.append(error)

    def threads() -> Iterator[threading.Thread]:
        for index in range(3):
            yield threading.Thread(target=export, args=(tmp_path / str(index),))

    started = list(threads())
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert errors == []
    for index in range(3):
        same(served(tmp_path / str(index)), theirs)


def test_a_layer_that_torch_compile_keeps_past_hf_peft_is_told() -> None:
    base = nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 4)).eval()
    rule = peftfx.LoRA(r=2, target_modules=["0._orig_mod", "1"])
    with pytest.warns(UserWarning, match=r"at 0\._orig_mod: torch\.compile keeps the layer that HF PEFT replaces"):
        peftfx.transform(base, rule, inputs={"input": torch.randn(3, 8)})


@dataclass
class Pair:
    first: Tensor
    second: Tensor


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, pair: Any, x: Tensor | None = None) -> Tensor:
        y = self.layer(pair.first) * pair.second
        return y if x is None else y + x


class Padded(nn.Module):
    """torch's attention, whose mask says what is hidden: NaN where a row hides all."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.layer = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y: Tensor = self.attention(self.layer(x), x, x, key_padding_mask=padding)[0]
        return y


class Returns(nn.Module):
    def __init__(self, made: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.made = nn.Linear(8, 8), made

    def forward(self, x: Tensor) -> object:
        return self.made(self.layer(x))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.layer(xs[0]) + xs[1]


@dataclass
class Given:
    first: Tensor
    second: Tensor


@pytest.mark.parametrize("beside", [False, True])
def test_a_dataclass_is_taken_once_torch_knows_its_class(beside: bool) -> None:
    """Beside another tensor its tensors were constants of the graph."""

    def inputs(*size: int) -> dict[str, Any]:
        more = {"x": torch.randn(*size)} if beside else {}
        return {"pair": Given(torch.randn(*size), torch.randn(*size)), **more}

    model = Sums().eval()
    with pytest.raises(PeftfxError, match=r"object of the class Given, whose tensors .* \[pair\]") as caught:
        peftfx.capture(model, inputs(2, 8))
    assert "torch.export.register_dataclass(Given)" in caught.value.hint
    with pytest.raises(PeftfxError, match="object of the class SimpleNamespace"):
        peftfx.capture(model, {"pair": SimpleNamespace(first=torch.randn(2, 8), second=torch.randn(2, 8))})
    torch.export.register_dataclass(Given)
    try:
        graph, case = peftfx.capture(model, inputs(2, 8)), inputs(5, 8)
        flat = {"pair.first": case["pair"].first, "pair.second": case["pair"].second, **case}
        got = graph(**{name: value for name, value in flat.items() if isinstance(value, Tensor)})
        torch.testing.assert_close(got, model(**case))
    finally:
        pytree._deregister_pytree_node(Given)


def test_a_mask_of_what_is_hidden_hides_no_whole_row_where_an_export_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, padding = Padded().eval(), torch.arange(5) >= torch.tensor([1, 1])[:, None]
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 5, 8), "padding": padding})
    x, padding = torch.randn(3, 7, 8), torch.arange(7) >= torch.tensor([2, 7, 4])[:, None]
    want = model(x=x, padding=padding)
    torch.testing.assert_close(OnnxModel(tmp_path / "out")(x=x, padding=padding)["output"], want)


def test_a_dataclass_is_returned_once_torch_knows_its_class(tmp_path: Path) -> None:
    base, x = Returns(lambda y: Pair(y, 2 * y)).eval(), torch.randn(2, 8)
    with pytest.raises(PeftfxError, match="returns an object of the class Pair, which") as caught:
        peftfx.export_onnx(base, tmp_path / "out", inputs={"x": x})
    assert "torch.export.register_dataclass(Pair)" in caught.value.hint
    torch.export.register_dataclass(Pair)
    try:
        ours = peftfx.transform(base, peftfx.LoRA(r=2, target_modules=["layer"]), inputs={"x": x})
        ours.export(tmp_path / "out")
        x = torch.randn(5, 8)
        served, want = peftfx.runtime.load(tmp_path / "out")(x=x), ours(x=x)
        torch.testing.assert_close((served.first, served.second), (want.first, want.second))
    finally:
        pytree._deregister_pytree_node(Pair)


def test_what_has_no_name_and_what_is_complex_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(PeftfxError, match=r"its forward takes \*xs, whose values have no names"):
        peftfx.transform(Listed().eval(), peftfx.LoRA(r=2), inputs={"xs": (x, x)})
    with pytest.raises(PeftfxError, match="no inputs and outputs of complex numbers") as caught:
        peftfx.export_onnx(Returns(torch.fft.fft).eval(), tmp_path / "out", inputs={"x": x})
    assert "torch.view_as_real" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


class Masked(nn.Linear):
    """A layer that changes its weight in each call."""

    def forward(self, input: Tensor) -> Tensor:
        self.weight.data *= torch.tril(torch.ones_like(self.weight))
        return super().forward(input)


def test_a_weight_that_is_changed_past_autograd_is_told(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="changes a tensor past the capture") as caught:
        peftfx.export_onnx(Masked(4, 4), tmp_path / "out", inputs={"input": torch.randn(2, 4)})
    assert "compute it anew" in caught.value.hint


@torch.enable_grad()  # type: ignore[untyped-decorator]
def slope_of_tanh(y: Tensor) -> Tensor:
    return torch.autograd.grad(torch.tanh(y).sum(), y)[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, of its own capture
@pytest.mark.parametrize(
    ("computed", "told"),
    [
        (lambda y: torch.sparse.mm(torch.eye(2).to_sparse(), y), "such as sparse or nested ones"),
        (lambda y: slope_of_tanh(y.detach().requires_grad_()), "or takes gradients in a call"),
    ],
)
def test_what_no_graph_can_hold_is_told(computed: Callable[[Tensor], Tensor], told: str) -> None:
    with pytest.raises(PeftfxError, match=told):
        peftfx.capture(Returns(computed).eval(), {"x": torch.randn(2, 8)})
