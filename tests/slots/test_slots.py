"""Slots in half precision, at convs and embeddings, and under any names: what is put there is the adapted model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.command import Result
from support.slots import stirred
from support.zoo import ZOO
from torch import Tensor, nn

from peftfx import IA3, AdaLoRA, LoRA, PeftfxError, PrefixTuning, export_onnx, runtime, transform
from peftfx.export import OnnxModel
from peftfx.export.slots import initializers
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export.verification import verify as verification
from peftfx.export.verification.comparison import VerificationError, reference_of
from peftfx.export.verification.in_parts import InParts
from peftfx.export.verification.verify import verify
from peftfx.graph.slots import Manifest
from peftfx.serving.adapter_file import read_adapter_file

Run = Callable[..., Result]
HALVES = {"fp16": (torch.float16, 10), "bf16": (torch.bfloat16, 16)}  #: and their numbers in ONNX


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_base_in_half_precision_has_slots_and_rows_in_it(name: str, tmp_path: Path) -> None:
    dtype, number = HALVES[name]
    model = ZOO["llama"].build().to(dtype)
    report = export_onnx(model, tmp_path / "graph", view="decode", slots="all-linear")
    assert ("twin" in report.verified) == (name == "bf16")
    rules = {"low": [LoRA(r=2, target="mlp", use_dora=True), PrefixTuning(num_virtual_tokens=3)], "other": LoRA(r=3)}
    adapted = transform(model, rules["low"], "low", seed=0)
    path = export_adapter(stirred(adapted, "low"), tmp_path / "graph", tmp_path / "low")  # held against torch
    assert {value.element_type() for value in read_adapter_file(path)[1].values()} == {number}
    view, graph = adapted.view("decode"), adapted.graph(view="decode")
    assert view is not None
    cases = [view.inputs(adapted.base, sizes=view.trials[0], seed=1)]
    with pytest.raises(VerificationError):  # the base alone is another model
        verify(tmp_path / "graph", reference_of(graph), cases, atol=2e-2, rtol=2e-2, shown=view.shown)
    adapted.add_adapter("other", rules["other"], seed=0)
    batched = stirred(adapted, "other").export(tmp_path / "many", view="decode", batched=["low", "other"])
    assert batched.max_rel < 3e-2  # each row was held against its adapter alone


class Layers(nn.Module):
    """An embedding, and convs of one to three dimensions: in groups, dilated, with strides, padded in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12, padding_idx=0)
        self.one = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.two = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=4)
        self.mirror = nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect", bias=False)
        self.three = nn.Conv3d(1, 6, (3, 3, 1), padding="same")
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor, picture: Tensor) -> Tensor:
        text = self.one(self.words(input_ids).transpose(1, 2)).mean(2)
        seen = self.mirror(self.two(picture * text[:, :, None, None]))
        return self.head(10 * self.three(seen[:, None]).mean((2, 3, 4)))


RULES = {
    "low": LoRA(r=4, lora_alpha=6, target="conv | embedding | head"),
    "dora": LoRA(r=4, use_dora=True, target="conv | embedding"),
    "bias": LoRA(r=8, lora_bias=True, target="one | two | three"),
    "scales": IA3(target="conv", feedforward_modules=()),
    "adalora": AdaLoRA(init_r=3, target="mirror | three"),
}


class Words(Layers):
    """The embedding and the conv in groups."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.one(self.words(input_ids).transpose(1, 2)).mean(2)


def test_what_is_put_at_an_embedding_and_a_conv_in_groups_is_held_against_torch(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.randint(30, (3, 7))}
    adapted = transform(Words().eval(), LoRA(r=4, target="conv | embedding"), "low", inputs=inputs, seed=0)
    adapted.add_adapter("words", LoRA(r=3, target="embedding"), seed=0)
    export_onnx(stirred(adapted, "low", "words").base, tmp_path / "graph", inputs=inputs, slots="conv | embedding")
    adapted.set_adapter("low")
    export_adapter(adapted, tmp_path / "graph", tmp_path / "adapter")
    adapted.export(tmp_path / "many", inputs=inputs, batched=["low", "words"])


@pytest.mark.further
def test_convs_and_embeddings_have_slots_and_rows_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    inputs = {"input_ids": torch.randint(30, (3, 7)), "picture": torch.randn(3, 8, 12, 10)}
    export_onnx(model, tmp_path / "graph", inputs=inputs, slots="conv | embedding | head")
    served = OnnxModel(tmp_path / "graph")
    with torch.no_grad():
        base = model(**inputs)
    torch.testing.assert_close(served(**inputs)["output"], base, atol=1e-5, rtol=1e-5)
    adapted = transform(model, RULES["low"], "low", inputs=inputs, seed=0)
    for name in list(RULES)[1:]:
        adapted.add_adapter(name, RULES[name], seed=0)
    stirred(adapted, *RULES)
    for active in (*RULES, ["low", "bias"]):
        adapted.set_adapter(active)
        path = export_adapter(adapted, tmp_path / "graph", tmp_path / "adapter", check=False, force=True)
        served.put(read_adapter_file(path)[1])
        with torch.no_grad():
            want = adapted(**inputs)
        torch.testing.assert_close(served(**inputs)["output"], want, atol=1e-4, rtol=1e-4)
        assert float((want - base).abs().max()) > 1e-2
    adapted.export(tmp_path / "many", inputs=inputs, batched=list(RULES))  # each row is held against its adapter alone


@pytest.mark.slow
def test_a_lora_of_peft_on_embeddings_and_on_a_conv(tmp_path: Path, peftfx: Run) -> None:
    for name, modules in {"gpt2": ["wte", "wpe", "c_attn"], "vit": ["projection", "q_proj"]}.items():
        base, root = ZOO[name].build(), tmp_path / name
        base.save_pretrained(root / "base")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=modules)).eval()
        randomise(theirs)
        theirs.save_pretrained(str(root / "adapter"))
        slots = ("--slots", "embedding.token | embedding.position | conv | all-linear")
        made = peftfx("export", "--base", root / "base", "--swappable", *slots, "--output", root / "graph")
        assert made.code == 0, made.err
        written = peftfx(
            "export-adapter", "--adapter", root / "adapter", "--for", root / "graph", "--output", root / "x"
        )
        assert written.code == 0, written.err
        served, inputs = (
            runtime.load(root / "graph", adapter=root / "x.onnx_adapter"),
            ZOO[name].inputs(2, 5, model=base),
        )
        if name == "gpt2":
            want = theirs.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            got = served.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
            assert torch.equal(got, want)
            continue
        with torch.no_grad():
            torch.testing.assert_close(served(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_rows_that_a_conv_reads_as_one_are_refused(tmp_path: Path) -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, video: Tensor) -> Tensor:
            return self.conv(video.flatten(0, 1)).mean((1, 2, 3)).unflatten(0, (video.shape[0], -1))

    inputs = {"video": torch.randn(2, 5, 3, 6, 6)}
    adapted = transform(Frames().eval(), LoRA(r=2, target="conv"), "x", inputs=inputs)
    with pytest.raises(PeftfxError, match="the tokens of all rows as one"):
        adapted.export(tmp_path / "out", inputs=inputs, batched=["x"])


def test_a_layer_that_reads_no_row_is_refused(tmp_path: Path) -> None:
    """Swin 2's biases of positions are a table's, the same for all images."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(7, 6))
            self.bias, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.bias(self.table).sum(0))

    inputs = {"x": torch.randn(3, 5, 4)}
    adapted = transform(Biased().eval(), LoRA(r=2, target="linear"), "x", inputs=inputs)
    with pytest.raises(PeftfxError, match=r"computes the same for all rows(.|\n)*\[bias\]"):
        adapted.export(tmp_path / "out", inputs=inputs, batched=["x"])


def test_images_that_become_one_pixel_have_slots(tmp_path: Path) -> None:
    """In the example two strides are equal there, and in the calls they are not."""

    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8)
            self.third, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

        def forward(self, image: Tensor) -> Tensor:
            return self.head(self.third(self.second(self.first(image))).mean((2, 3)))

    torch.manual_seed(0)
    base, example = Narrowing().eval(), {"image": torch.randn(2, 3, 8, 8)}
    export_onnx(base, tmp_path / "graph", inputs=example, slots="conv", view="forward")
    adapted = transform(base, LoRA(r=2, target_modules=["first", "third"], init_lora_weights=False), inputs=example)
    served = runtime.load(tmp_path / "graph")
    served.load_adapter(export_adapter(adapted, tmp_path / "graph", tmp_path / "one"))
    for shape in ((3, 3, 8, 8), (2, 3, 48, 80)):
        image = torch.randn(shape)
        got = served(image=image)["output"]
        torch.testing.assert_close(got, adapted.eval()(image).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.further
def test_heads_that_do_not_fit_are_refused(tmp_path: Path, peftfx: Run) -> None:
    model = ZOO["bert"].build()
    options = {"task_type": "SEQ_CLS", "r": 2, "target_modules": ["query"]}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
    theirs.save_pretrained(str(tmp_path / "three"))
    theirs.classifier.modules_to_save["default"].weight.data = torch.randn(5, 32)
    theirs.classifier.modules_to_save["default"].bias.data = torch.randn(5)
    theirs.save_pretrained(str(tmp_path / "five"))
    model.save_pretrained(tmp_path / "base")
    model.bert.save_pretrained(tmp_path / "bare")
    for base, adapter, lines in (
        (
            "base",
            "five",
            (
                "classifier.weight: [5, 32] in the file, [3, 32] in this model",
                "the same number of labels and of tokens",
            ),
        ),
        ("bare", "three", ("a head for text-classification, and the graph is of BertModel", "--task")),
    ):
        graph = tmp_path / f"{base}.graph"
        assert peftfx("export", "--base", tmp_path / base, "--swappable", "--output", graph).code == 0
        result = peftfx("export-adapter", "--adapter", tmp_path / adapter, "--for", graph, "--output", tmp_path / "x")
        assert result.code == 2
        assert all(line in " ".join(result.err.split()) for line in lines), result.err
    assert not list(tmp_path.glob("x*"))


@pytest.mark.slow
def test_an_adapter_of_a_quantised_graph_is_held_to_what_the_graph_lost(tmp_path: Path) -> None:
    model = ZOO["bert"].build()
    report = export_onnx(model, tmp_path / "graph", slots="all-linear", quantize="int8")
    bounds = Manifest.read(tmp_path / "graph")
    assert bounds.atol == 0
    assert 0 < bounds.lost == report.max_rel < 0.05
    adapted = stirred(transform(model, LoRA(r=4, target="all-linear"), "x", seed=0), "x")
    export_adapter(adapted, tmp_path / "graph", tmp_path / "adapter")
    cases = [ZOO["bert"].inputs(3, 6, model=model)]
    with pytest.raises(VerificationError):  # that much tells the adapter from the base
        verify(tmp_path / "graph", reference_of(adapted.graph()), cases, atol=0, rtol=4 * bounds.lost)
    export_onnx(model, tmp_path / "bounded", slots="all-linear", quantize="int8", max_error=0.1)
    assert Manifest.read(tmp_path / "bounded").rtol == 0.1


class Digits(nn.Module):
    """Layers under numbers, and under paths that are alike once their dots are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)))
        self.add_module("0_0", nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.get_submodule("0_0")(torch.tanh(self.get_submodule("0")(x)))))


def test_slots_of_layers_whose_names_are_no_names_in_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Digits().eval(), torch.randn(2, 4)
    export_onnx(model, tmp_path / "graph", slots="all-linear", inputs={"x": x})
    rule = LoRA(r=2, target="0.0 | 0.1 | 0_0", init_lora_weights=False)
    adapted = transform(model, rule, inputs={"x": x})
    export_adapter(adapted, tmp_path / "graph", tmp_path / "low.onnx_adapter")
    served = runtime.load(tmp_path / "graph", adapter=tmp_path / "low.onnx_adapter")
    x = torch.randn(5, 4)
    torch.testing.assert_close(served(x=x)["output"], adapted(x=x).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("parts", [pytest.param(False, marks=pytest.mark.further), True])
def test_what_slots_hold_by_themselves_is_compared(
    parts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls put tensors into all slots: a graph that computes nothing with empty slots passed."""
    if parts:
        monkeypatch.setattr(verification, "MAPPED", 0)
        monkeypatch.setattr(verification, "InParts", functools.partial(InParts, limit=1, least=0))
    model, options = ZOO["llama"].build(), {"view": "forward", "slots": "attention.query"}
    report = export_onnx(model, tmp_path / "right", **options)
    assert (" parts" in report.verified) == parts
    monkeypatch.setattr(initializers, "neutral_of", lambda slot: torch.zeros(slot.empty))
    with pytest.raises(VerificationError, match="ONNX Runtime disagrees"):
        export_onnx(model, tmp_path / "wrong", **options)


class Counting(nn.Module):
    """A model that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.layer(x))


def test_an_export_leaves_buffers_that_the_code_writes_as_they_were(tmp_path: Path) -> None:
    model, inputs = Counting().eval(), {"x": torch.randn(2, 3, 4)}
    export_onnx(model, tmp_path / "graph", inputs=inputs, slots="all-linear")
    assert model.calls == 0
    adapted = transform(model, LoRA(target_modules=["layer"], init_lora_weights=False), inputs=inputs)
    export_adapter(adapted, tmp_path / "graph", tmp_path / "low.onnx_adapter")
    assert model.calls == 0


class Measured(nn.Module):
    """A model whose code returns its text's length, or adds up its tokens in a loop."""

    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.returns = returns
        self.words, self.layer, self.head = nn.Embedding(30, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> object:
        states = self.head(self.layer(self.words(input_ids)))
        if self.returns:
            return states, int(input_ids.shape[1])
        return torch.stack([states[:, i] for i in range(states.shape[1])]).sum(0)


@pytest.mark.parametrize("returns", [True, False])
def test_a_text_of_a_fixed_length_has_no_slot_for_a_prompt(returns: bool, tmp_path: Path) -> None:
    """The export was refused: its graph with virtual tokens was only right with as many as in its example."""
    model, inputs = Measured(returns=returns).eval(), {"input_ids": torch.randint(30, (2, 6))}
    export_onnx(model, tmp_path / "graph", inputs=inputs, slots="all-linear | head")
    served = OnnxModel(tmp_path / "graph")
    assert "prompt" not in served.slots
    assert {slot.rpartition(".")[0] for slot in served.slots} >= {"layer", "head"}
    adapted = transform(model, LoRA(r=2, target="layer | head", init_lora_weights=False), inputs=inputs)
    export_adapter(adapted, tmp_path / "graph", tmp_path / "low.onnx_adapter")  # held against torch
