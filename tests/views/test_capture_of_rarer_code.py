"""What few models' code does, captured as any other: each was a fault that a sweep of all model types found."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from support.few import but_further
from support.zoo import ZOO
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution
from transformers.utils import ModelOutput

import peftfx
import peftfx.runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.views.dry_run import fake_run
from peftfx.views.finding.decode_view import decode_view

HUB = "kernels-community/flash-attn2"  #: a kernel by its name on the hub


class Apart(nn.Module):
    """torch's attention over weights that three modules have, none of which is called."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        biases = torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias))
        return F.multi_head_attention_forward(
            *(x, x, x, 8, 2, torch.empty([0]), biases, None, None, False, 0.0),
            *(self.out_proj.weight, self.out_proj.bias, self.training),
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )[0]


def test_an_attention_with_joined_biases_has_its_layers() -> None:
    torch.manual_seed(0)
    model, x = Apart(), torch.randn(5, 2, 8)
    adapted = peftfx.transform(
        model, peftfx.LoRA(r=2, target="attention.query | attention.value", init_lora_weights=False), inputs={"x": x}
    )
    assert [(s.path, s.role) for s in adapted.sites.weights][:3] == [
        (f"{name[0]}_proj", f"attention.{name}") for name in ("query", "key", "value")
    ]
    before, want = model(x), adapted(x=x)
    assert float((want - before).detach().abs().max()) > 1e-2
    adapted.merge()
    torch.testing.assert_close(adapted.remove()(x), want)


class Unlearned(nn.Module):
    """A layer under `no_grad`, beside which a number is computed from a size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y, rows = self.first(x), x.shape[0] * 2 + 1
        return self.second(y) / rows


class Counts(nn.Module):
    """Code that asks for the length of a tensor, and of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.layer(x), x]
        if len(x) != x.shape[0]:
            raise ValueError("these are the same")
        rows = torch.arange(len(parts[0])).view(len(x), *[1] * (x.ndim - 1))
        return (parts[0] + rows) / len(parts)


def test_the_length_of_a_tensor_stays_free(tmp_path: Path) -> None:
    model = Counts().eval()
    report = peftfx.export_onnx(model, tmp_path / "out", inputs={"x": torch.randn(2, 5, 4)})
    assert not report.sizes
    assert "len" not in globals()
    for batch in (1, 3):
        x = torch.randn(batch, 6, 4)
        torch.testing.assert_close(peftfx.export.OnnxModel(tmp_path / "out")(x=x)["output"], model(x))


class Repeats(nn.Module):
    """Code that multiplies lists by the batch, and reads one of them itself if told to."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        starts, pairs = [3.0, 4.0] * batch, batch * [[1.0, 2.0]]
        assert isinstance(starts, list)
        if self.reads:
            return x + torch.tensor([*starts[1:], 9.0])[::2, None]
        return x + torch.tensor(starts)[::2, None] * torch.tensor(pairs, dtype=torch.float64)


@pytest.mark.parametrize("reads", [False, True])
def test_a_list_that_is_repeated_for_each_row_keeps_the_batch_free(reads: bool) -> None:
    model, x = Repeats(reads), torch.randn(3, 2)
    graph = peftfx.capture(model, {"x": x}, axes={"x": ("batch", None)})
    torch.testing.assert_close(graph(x=x), model(x))
    assert (graph.fixed.keys() == {"batch"}) == reads, "what reads the list fixes its length, as Python does"
    if not reads:
        other = torch.randn(5, 2)
        torch.testing.assert_close(graph(x=other), model(other))
    assert torch.tensor([0] * 3).shape == (3,)


class Splits(nn.Module):
    """Code that splits a tensor into as many parts as an index has columns, and counts what a mask chooses."""

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        first, second = torch.split(x, [2] * at.shape[-1], dim=-1)
        torch._check(x[x == x].numel() == x.numel())
        return first * second


def test_a_repeated_list_says_how_a_tensor_is_split_and_a_count_of_a_mask_is_compared() -> None:
    x, at = torch.randn(3, 4), torch.zeros(3, 2)
    graph = peftfx.capture(Splits(), {"x": x, "at": at}, axes={"x": ("batch", None), "at": ("batch", "columns")})
    other = torch.randn(5, 4)
    torch.testing.assert_close(graph(x=other, at=torch.zeros(5, 2)), other[:, :2] * other[:, 2:])
    assert graph.fixed.keys() == {"columns"}


def test_a_number_leaves_a_region_without_gradients() -> None:
    torch.manual_seed(0)
    model, x = Unlearned(), torch.randn(3, 4)
    graph = peftfx.capture(model, {"x": x})
    assert [site.path for site in graph.sites.weights] == ["first", "second"]
    other = torch.randn(5, 4)
    torch.testing.assert_close(graph(x=other), model(other))


@dataclass
class Found(ModelOutput):
    first: Tensor | None = None
    second: Tensor | None = None
    third: Tensor | None = None


class Late(nn.Module):
    """Sets the fields of its output in another order than their class has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Found:
        found = Found(first=x, third=self.layer(x))  # type: ignore[call-arg]
        found["second"] = x * 2
        return found


def test_outputs_have_the_names_under_which_they_were_set() -> None:
    model, x = Late(), torch.randn(3, 4)
    graph = peftfx.capture(model, {"x": x})
    want, got = model(x), dict(zip(graph.outputs, graph.run(x), strict=True))
    assert set(got) == {"first", "second", "third"}
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def test_images_of_no_size_of_their_own_are_free_in_height_and_width(tmp_path: Path) -> None:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    torch.manual_seed(0)
    model = hf.ResNetForImageClassification(config).eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="conv", init_lora_weights=False))
    adapted.export(tmp_path / "out")
    served = peftfx.runtime.load(tmp_path / "out")
    for shape in ((1, 3, 64, 64), (3, 3, 50, 94)):
        x = torch.randn(shape)
        torch.testing.assert_close(served(pixel_values=x).logits, adapted(pixel_values=x).logits, atol=1e-4, rtol=1e-4)


def test_a_probe_of_the_decode_view_shows_no_padding() -> None:
    model = ZOO["llama"].build()
    view = decode_view(model)
    for sizes in view.trials:
        made = view.inputs(model, sizes=sizes)
        assert not (made["input_ids"] == model.config.pad_token_id).any()
        assert made["input_ids"].shape == (sizes["batch"], sizes["sequence"])
    assert (example_inputs(model)["input_ids"] == model.config.pad_token_id).any()


def test_a_decode_view_without_a_mask_is_refused() -> None:
    class Maskless(hf.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, cache: object = None, use_cache: bool = True) -> object:  # type: ignore[override]
            return super().forward(input_ids=input_ids, cache=cache, use_cache=use_cache)

    model = Maskless(ZOO["llama"].build().config).eval()
    with pytest.raises(peftfx.PeftfxError, match="takes no attention mask"):
        decode_view(model)


class Checked(nn.Module):
    """Code that says what it takes, of the values in a tensor, and code that branches on them."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.layer, self.branches = nn.Linear(4, 4), branches

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        assert lengths.max().item() <= x.shape[1]
        if lengths is not None and lengths.min().item() < 1:
            raise ValueError("a row is empty")
        if self.branches and lengths.max().item() <= 3:
            return 2 * self.layer(x)
        return self.layer(x) * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]


def test_what_code_asserts_of_values_is_taken_for_true_and_a_branch_on_them_is_refused() -> None:
    inputs = {"x": torch.randn(2, 5, 4), "lengths": torch.tensor([5, 3])}
    model = Checked(branches=False).eval()
    graph = peftfx.capture(model, inputs)
    case = {"x": torch.randn(3, 7, 4), "lengths": torch.tensor([1, 7, 2])}
    torch.testing.assert_close(graph(**case), model(**case))
    with pytest.raises(peftfx.PeftfxError, match=r"branches on the values of a tensor, at \w+\.py:\d+"):
        peftfx.capture(Checked(branches=True).eval(), inputs)


class Keeping(nn.Module):
    """Code that keeps a table for each length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tables = nn.Linear(4, 4), dict[int, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] not in self.tables:
            self.tables[x.shape[1]] = torch.arange(x.shape[1]).float()
        return self.layer(x) + self.tables[x.shape[1]][:, None]


def test_a_size_as_a_key_is_refused_by_name() -> None:
    said = r"a size, or a number in a tensor, as a key of a dict or in a set, at \w+\.py:\d+ \(`if x\.shape\[1\] not in"
    with pytest.raises(peftfx.PeftfxError, match=said):
        peftfx.capture(Keeping().eval(), {"x": torch.randn(2, 5, 4)})


def test_a_dry_run_asks_for_the_numbers_in_a_tensor() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 4, "vocab_size": 99}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size": 16}
    model = hf.JetMoeForCausalLM(hf.JetMoeConfig(**sizes, **experts)).eval()
    assert [kept.name for kept in decode_view(model).layers[0].kept] == ["key", "value"]


def test_a_dry_run_takes_for_true_what_code_asserts_of_values() -> None:
    model, lengths = Checked(branches=False).eval(), torch.tensor([5, 3])
    with fake_run(model) as fake:
        assert model(fake(torch.randn(2, 5, 4)), fake(lengths)).shape == (2, 5, 4)


class EachRow(nn.Module):
    """Code that loops over the rows of a batch, which fixes their number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([2 * row for row in x])


def test_the_models_own_line_is_named_where_a_loop_fixes_a_size() -> None:
    graph = peftfx.capture(EachRow(), {"x": torch.ones(2, 3)}, axes={"x": ("batch", None)})
    assert graph.fixed["batch"].startswith(f"{Path(__file__).name}:")


class Runs(nn.Module):
    """It calls a function of a file that pytest, which gives assertions messages, does not rewrite."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.run = runpy.run_path(str(file))["run"]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.run(x)
        return made


def test_what_code_asserts_without_a_message_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "square.py").write_text("def run(x):\n    assert x.shape[0] == x.shape[1]\n    return x * 2\n")
    with pytest.raises(peftfx.PeftfxError, match=r"its code asserts `x.shape\[0\] == x.shape\[1\]`, at square.py:2"):
        peftfx.capture(Runs(tmp_path / "square.py"), {"x": torch.ones(2, 3)})


class OneByOne(hf.LlamaForCausalLM):
    """Its code takes a text at once, and behind it one token at a time."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, **kwargs: Any) -> Any:
        assert cache is None or not cache.get_seq_length() or input_ids.shape[1] == 1, "one at a time"
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, cache=cache, **kwargs)


def test_code_that_goes_on_by_one_token_at_a_time_is_refused_with_the_reason() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = OneByOne(hf.LlamaConfig(**sizes, intermediate_size=32)).eval()
    view = decode_view(model)
    with pytest.raises(
        peftfx.PeftfxError, match=r"goes on with a text by one token at a time.*AssertionError, at test_"
    ):
        peftfx.capture(model, view.inputs(model), axes=view.axes, call=view)


class Stumbling(nn.Module):
    """Code that goes wrong by itself, or in a function that other models share."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.layer, self.shared = nn.Linear(4, 4), shared

    def forward(self, x: Tensor) -> Tensor:
        if self.shared:
            select_best_resolution((x.sum().item(), 4), [(4, 4), (8, 8)])
        return self.layer(x) + self.keys.numel()  # type: ignore[operator]

    keys = None


def test_an_error_of_a_models_code_has_its_line() -> None:
    said = r"no attribute 'numel', at test_capture_of_rarer_code\.py:\d+ \(`return self\.layer\(x\) \+ self\.keys"
    with pytest.raises(peftfx.PeftfxError, match=said):
        peftfx.capture(Stumbling(shared=False).eval(), {"x": torch.randn(2, 4)})


def test_a_shared_line_is_named_with_the_models_own() -> None:
    said = r"at image_processing_utils\.py:\d+ \(`.*`\), called from test_capture_of_rarer_code\.py:\d+ "
    with pytest.raises(peftfx.PeftfxError, match=said):
        peftfx.capture(Stumbling(shared=True).eval(), {"x": torch.randn(2, 4)})


def test_a_classifier_over_a_decoder_without_a_padding_token_is_told_to_name_it() -> None:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(vocab_size=16, **size))
    with pytest.raises(peftfx.PeftfxError, match=r"no padding token(.|\n)*config\.pad_token_id = "):
        peftfx.transform(model, peftfx.LoRA())
    model.config.pad_token_id = 0
    assert peftfx.transform(model, peftfx.LoRA()).names() == ("default",)


@pytest.mark.parametrize(
    "attention", but_further({"flash_attention_2", HUB}, ("flex_attention", "flash_attention_2", HUB))
)
def test_attention_of_other_kernels_is_captured_as_torchs_own(attention: str, tmp_path: Path) -> None:
    """No graph has these kernels, some run on no CPU, and what they compute is the same."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.MistralForCausalLM(hf.MistralConfig(vocab_size=99, **size, num_key_value_heads=2, sliding_window=4))
    plain = {"input_ids": torch.randint(5, 90, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    plain["attention_mask"][1, :3] = 0
    want = model.eval()(**plain).logits
    model.config._attn_implementation_internal = attention
    peftfx.transform(model, peftfx.LoRA(r=2)).export(tmp_path / "out", view="decode")
    assert model.config._attn_implementation == attention
    shown = plain["attention_mask"].bool()
    got = peftfx.runtime.load(tmp_path / "out")(**plain).logits
    torch.testing.assert_close(got[shown], want[shown], atol=1e-5, rtol=1e-4)
