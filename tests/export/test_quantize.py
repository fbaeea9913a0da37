"""Quantised exports: what ONNX Runtime computes is what the rounded weights say, and how far that is off is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers as hf
from onnx import helper, numpy_helper
from onnx_ir.tensor_adapters import TorchTensor
from support.command import Result
from support.mixtures import mixture
from support.quantised import BLOCK, pack, unpack
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn

import peftfx as px
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.coded.rounded import left_out, quantize
from peftfx.export.coded.schemes import ROUTER_LEFT, scheme_for
from peftfx.export.metadata import SOURCE
from peftfx.export.rounding.held_codes import HeldGraph
from peftfx.export.translation import stamped
from peftfx.export.verification.agreement import _shown
from peftfx.export.verification.comparison import VerificationError
from peftfx.export_options.quantize import BITS, Scheme, parse_schemes
from peftfx.graph.graph import DERIVED, Graph
from peftfx.graph.rewriter import Rewriter
from peftfx.quantisation.codes import TABLES
from peftfx.quantisation.rounding import round_blocks, round_table


def _kernel(x: Tensor, blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """ONNX Runtime's own product, computed in float."""
    rows, columns = scales.shape[0], x.shape[-1]
    numbers = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", "blocks", "scales"], ["y"], domain="com.microsoft", **numbers)
    tensors = [numpy_helper.from_array(t.numpy(), n) for t, n in ((blocks, "blocks"), (scales, "scales"))]
    shown = [helper.make_tensor_value_info(n, 1, ["n", size]) for n, size in (("x", columns), ("y", rows))]
    graph = helper.make_graph([node], "one", shown[:1], shown[1:], tensors)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (7, 40), (3, 4096 * 3)])
def test_blocks_stand_for_the_nearest_weights_and_onnx_runtime_reads_them_so(
    bits: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftfx.quantisation.rounding._AT_ONCE", 5000)  # in several goes
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    weight[0, :BLOCK] = 0  # a block of nothing
    blocks, scales = pack(weight, bits, BLOCK, search=False)
    rounded = unpack(blocks, scales, bits, columns)
    step = scales.abs().repeat_interleave(BLOCK, 1)[:, :columns]
    # half a step, but for what is beyond the last integer on the side opposite to the largest
    assert (
        (rounded - weight).abs() <= step * (0.5 + 1e-5) + step * ((weight / step).abs() > (1 << bits - 1) - 1)
    ).all()
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_kernel(x, blocks, scales, bits), x @ rounded.T, rtol=1e-4, atol=1e-3)


def _adapted(name: str) -> px.AdaptedModel:
    adapted = px.transform(ZOO[name].build(), px.LoRA(r=4, target="all-linear"), seed=0)
    with torch.no_grad():
        for p in adapted.adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    return adapted


def _rounded(adapted: px.AdaptedModel, kind: str) -> nn.Module:
    """The merged model, its linear weights rounded to what the blocks stand for; what was tied is tied."""
    linears = [site for site in adapted.sites if site.kind == "linear"]
    adapted.merge()
    model = adapted.remove()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for site in linears:
        module = model.get_submodule(site.path)
        weight = module.weight.detach()
        rows = weight.T if site.transposed else weight
        new = unpack(*pack(rows, BITS[kind], BLOCK), BITS[kind], rows.shape[1])
        module.weight = nn.Parameter(new.T.contiguous() if site.transposed else new)
    if tied:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
    return model


# a head of its own, and one tied to the embedding
@pytest.mark.parametrize(("name", "kind"), [("llama", "int4"), pytest.param("gpt2", "int8", marks=pytest.mark.slow)])
def test_it_computes_what_the_rounded_weights_say_and_its_error_is_in_the_report(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftfx.export.coded.rounded._ACCURACY", 1)  # activations in float
    adapted = _adapted(name)
    linears = [site for site in adapted.sites if site.kind == "linear"]
    report = adapted.export(tmp_path / "small", view="decode", quantize=kind)
    assert len(report.quantized["model.onnx"]) == len(linears)
    served = px.runtime.load(tmp_path / "small")
    ids = torch.randint(4, 90, (3, 8), generator=torch.Generator().manual_seed(0))
    got, plain = served(input_ids=ids).logits, adapted(input_ids=ids).logits.detach()
    want = _rounded(adapted, kind)(input_ids=ids).logits.detach()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert 1e-3 < float((want - plain).abs().max() / plain.abs().max()) < 3 * report.max_rel


@pytest.mark.parametrize("scheme", ["int4", "int8(symmetric=False)", "nf4"])
def test_a_head_tied_to_the_embedding_is_one_table_of_codes(scheme: str, tmp_path: Path) -> None:
    size = {"vocab_size": 90, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**size, num_attention_heads=4, pad_token_id=0, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    report = px.export_onnx(model, tmp_path / "out", view="forward", quantize=f"{scheme}@head")
    kept = {
        v.name: list(v.dims) for v in onnx.load(tmp_path / "out/model.onnx", load_external_data=False).graph.initializer
    }
    assert not [name for name, dims in kept.items() if dims == [90, 64]], "no float copy"
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        (text,) = parse_schemes(scheme)
        if scheme == "nf4":
            codes, largest = round_table(weight, "nf4", 64)
            weight.copy_((torch.tensor(TABLES["nf4"])[codes.int()].view(-1, 64) * largest.unsqueeze(1)).view_as(weight))
        else:
            made = round_blocks(weight, text.bits, text.block, symmetric=text.symmetric)
            weight.copy_(made.values(text.middle))
        ids = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(0))
        want = model(input_ids=ids).logits
    got = px.runtime.load(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    off = float((got - want).abs().max() / want.abs().max())
    assert off < (1e-5 if scheme == "nf4" else 0.02), "what is looked up, and the head, are the rounded weight"
    assert report.quantized


def test_it_is_smaller_and_generates(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**size, num_attention_heads=4, pad_token_id=0)).eval()
    sizes = {}
    for kind in (None, "int4"):
        report = px.export_onnx(model, tmp_path / str(kind), view="decode", quantize=kind)
        sizes[kind] = report.bytes["model.onnx.data"]
        served = px.runtime.load(tmp_path / str(kind))
        ids = torch.randint(4, 64, (2, 6), generator=torch.Generator().manual_seed(0))
        tokens = served.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False)
        assert tokens.shape[0] == 2
    assert sizes["int4"] < 0.27 * sizes[None]


def test_an_adapter_apart_stays_in_floating_point(tmp_path: Path) -> None:
    adapted = _adapted("llama")
    report = adapted.export(tmp_path / "apart", merge=False, view="forward", quantize="int8")
    kept = {value.name: value.data_type for value in onnx.load(tmp_path / "apart/model.onnx").graph.initializer}
    factors = [name for name in kept if name.startswith("adapters.")]
    assert len(factors) == 2 * (len(report.quantized["model.onnx"]) - 1)  # the head has no adapter
    assert {kept[name] for name in factors} == {1}


def test_in_half_precision_scales_are_too(tmp_path: Path) -> None:
    report = px.export_onnx(ZOO["bert"].build().half(), tmp_path / "half", quantize="int4")
    kept = {value.name: value.data_type for value in onnx.load(tmp_path / "half/model.onnx").graph.initializer}
    assert {kept[name] for name in kept if name.endswith(".scales")} == {10}
    assert 0 < report.max_rel < 2


def test_an_error_beyond_the_bound_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="disagrees"):
        _adapted("llama").export(tmp_path / "out", view="forward", quantize="int4", max_error=1e-4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "what"),
    [({"quantize": "int3"}, "unknown quantisation 'int3'"), ({"max_error": 0.1}, "max_error has no effect")],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], what: str, tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=what):
        px.export_onnx(nn.Linear(32, 32), tmp_path / "out", inputs={"input": torch.zeros(2, 32)}, **options)


def test_the_command_line_takes_it(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    ZOO["llama"].build().save_pretrained(tmp_path / "base")
    base, output = str(tmp_path / "base"), str(tmp_path / "out")
    done = peftfx("export", "--base", base, "--quantize", "int4", "--output", output)
    assert done.code == 0, done.err
    assert "quantised" in done.out
    refused = peftfx("export", "--base", base, "--quantize", "int4", "--max-error", "1e-6", "--output", output + "2")
    assert refused.code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "least"), [(4, 0.95), (8, 1.0)])
def test_a_grid_that_is_searched_is_nearer(bits: int, least: float, symmetric: bool) -> None:
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(bits)) + (0 if symmetric else 0.5)
    off = {}
    for search in (True, False):
        made = round_blocks(weight, bits, BLOCK, symmetric=symmetric, search=search)
        zeros = torch.tensor(1 << bits - 1) if made.zeros is None else made.zeros.unsqueeze(-1)
        values = (made.integers.float() - zeros) * made.scales.unsqueeze(-1)
        off[search] = float((values.flatten(1) - weight).square().mean())
    assert off[True] <= least * off[False]


def test_a_table_that_is_searched_is_nearer() -> None:
    weight, numbers, off = (
        torch.randn(31, 50, generator=torch.Generator().manual_seed(0)),
        torch.tensor(TABLES["nf4"]),
        {},
    )
    for search in (True, False):
        codes, largest = round_table(weight, "nf4", 64, search=search)
        values = numbers[codes.int()] * largest.repeat_interleave(64)[: codes.numel()]
        off[search] = float((values - weight.view(-1)).square().mean())
    assert off[True] < 0.97 * off[False]


def test_schemes_by_role_and_zeros_of_their_own(tmp_path: Path) -> None:
    adapted = _adapted("llama")
    text = "int4(block=16, symmetric=False); nf4@mlp.down; int8@attention.value; none@head"
    report = adapted.export(tmp_path / "mixed", view="forward", quantize=text)
    kinds = report.schemes["model.onnx"]
    assert kinds["int8(block=32)@attention.value"] == 2
    assert kinds["int4(block=16, symmetric=False)"] >= 8
    names = report.quantized["model.onnx"]
    assert not any("lm_head" in name for name in names)
    operators = {node.op_type for node in onnx.load(tmp_path / "mixed/model.onnx").graph.node}
    assert "MatMulNBits" in operators
    assert 0 < report.max_rel < 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("int5", "unknown quantisation 'int5'"),
        ("int4(block=24)", "no operator with blocks of 24"),
        ("int4(size=32)", "no option 'size'"),
        ("int4(32)", "by name"),
        ("nf4(symmetric=False)", "no zero points"),
        ("int4@", "cannot read"),
    ],
)
def test_a_scheme_that_makes_no_sense_is_one_message(text: str, what: str) -> None:
    with pytest.raises(PeftfxError, match=what):
        parse_schemes(text)


def test_matrices_of_a_stack_are_rounded_one_by_one() -> None:
    stack, x = torch.randn(3, 64, 48, generator=torch.Generator().manual_seed(0)), torch.ones(2, 64)
    value = ir.Value(name="experts", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(stack.shape))
    value.const_value = TorchTensor(stack, name="experts")
    value.meta[SOURCE] = "base.experts"
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 64]))
    axes = ir.node("Constant", [], {"value_ints": [0]})
    split = ir.node("Split", [value], {"axis": 0, "num_outputs": 3}, num_outputs=3)
    cut = [ir.node("Squeeze", [piece, axes.outputs[0]]) for piece in split.outputs]
    products = [ir.node("MatMul", [given, squeeze.outputs[0]]) for squeeze in cut]
    total = ir.node("Sum", [product.outputs[0] for product in products])
    nodes = [axes, split, *cut, *products, total]
    graph = ir.Graph([given], total.outputs, nodes=nodes, initializers=[value], opset_imports={"": 21})
    total.outputs[0].name = "y"
    model = ir.Model(graph, ir_version=10)
    assert sum(map(len, quantize(model, lambda source: Scheme("int8")).values())) == 3
    assert left_out(model, lambda source: Scheme("int8")) == {}
    assert "experts" not in graph.initializers
    run = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    want = sum(x @ matrix for matrix in stack)
    torch.testing.assert_close(torch.from_numpy(run.run(None, {"x": x.numpy()})[0]), want, rtol=0.02, atol=0.1)


def test_a_router_is_rounded_only_if_a_scheme_names_it() -> None:
    sites = px.inspect(mixture("qwen3_moe"))
    (router,) = sites.filter(role="router")
    (head,) = sites.filter(role="head")
    for text, rounded, others in (
        ("int4", False, True),
        ("int8@router", True, False),
        ("int4; int8@router", True, True),
        ("int8@router; int4", False, True),
        ("none@head; int4@router", True, False),
    ):
        choose = scheme_for(sites, parse_schemes(text))
        for source in (router.weight, f"{DERIVED}.{router.path}.weight"):
            assert (choose(source) is not None) == rounded, text
        assert (choose(head.weight) is not None) == others, text


@pytest.mark.slow
def test_experts_are_rounded_and_what_is_not_is_told(tmp_path: Path) -> None:
    size = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = hf.MixtralConfig(**size, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    report = px.export_onnx(hf.MixtralForCausalLM(config).eval(), tmp_path / "out", view="forward", quantize="int4")
    assert len(report.quantized["model.onnx"]) == 4 + 8 + 1
    router = {name: why for name, why in report.left["model.onnx"].items() if "gate" in name}
    assert list(router.values()) == [ROUTER_LEFT]
    others = report.left["model.onnx"].items() - router.items()
    assert others == {("model.embed_tokens.weight", "no product reads it, but Gather")}
    assert report.agreement["model"].kl < 0.01
    assert "not quantised: model.embed_tokens.weight" in str(report)


def test_a_scheme_that_rounds_no_weight_is_refused(tmp_path: Path) -> None:
    model = ZOO["llama"].build().eval()
    with pytest.raises(PeftfxError, match=r"int4\(block=256\) rounds no weight of this model: of \d+ weights, its 32"):
        px.export_onnx(model, tmp_path / "out", view="forward", quantize="int4(block=256)")
    with pytest.raises(PeftfxError, match=r"it is in bfloat16, and those in float32(.|\n)*model.float"):
        px.export_onnx(model.bfloat16(), tmp_path / "out", view="forward", quantize="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [1, 5])
def test_the_mask_of_a_text_says_nothing_of_its_classes(labels: int, tmp_path: Path) -> None:
    """As many tokens as classes, or one token and one class, are no tokens to compare."""
    torch.manual_seed(0)
    config = hf.BertConfig(**TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=labels)
    model = hf.BertForSequenceClassification(config).eval()
    report = px.export_onnx(model, tmp_path / "out", quantize="int8")
    if labels == 1:  # a single logit is a score, of which KL and top-1 say nothing
        assert report.agreement == {}
        with pytest.raises(PeftfxError, match="no logits of classes: it has no kl"):
            px.export_onnx(model, tmp_path / "bounded", quantize="int8", max_error="kl=0.1")
    else:
        (found,) = report.agreement.values()
        assert found.tokens == sum(call["input_ids"][0] for call in report.probes)
        assert 0 < found.kl < 0.1


def test_segments_agree_pixel_by_pixel(tmp_path: Path) -> None:
    """Their logits are [batch, classes, height, width]."""
    logits = torch.randn(2, 5, 4, 3)
    shown, _ = _shown(logits, logits, None, 1)
    assert shown.shape == (2 * 4 * 3, 5)
    assert shown.argmax(-1).view(2, 4, 3).equal(logits.argmax(1))
    model = ZOO["segformer"].build().eval()
    (found,) = px.export_onnx(model, tmp_path / "out", quantize="int8").agreement.values()
    with torch.no_grad():
        pixels = model(**ZOO["segformer"].inputs(1)).logits[0, 0].numel()
    assert found.tokens % pixels == 0


def test_a_stack_that_one_product_reads_stays_and_is_told(tmp_path: Path) -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.stack = nn.Linear(64, 64), nn.Parameter(torch.randn(3, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.first(x).repeat(3, 1, 1), self.stack)

    report = px.export_onnx(Stacked().eval(), tmp_path / "out", inputs={"x": torch.randn(5, 64)}, quantize="int4")
    assert report.left["model.onnx"] == {"stack": "a product reads it as a stack of 3 weights"}
    assert list(report.quantized["model.onnx"]) == ["first.weight"]


def _negated(graph: Graph) -> Graph:
    """Make the graph give the negative of its first output, in place."""
    (output,) = (n for n in graph.nodes() if n.op == "output")
    first, *others = output.args[0]
    output.args = ((Rewriter(graph.module.graph).before(output).call(torch.ops.aten.neg.default, first), *others),)
    graph.module.recompile()
    return graph


def test_an_error_that_is_larger_than_the_output_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bound, the report had the numbers, and there was no message."""
    prepare = stamped.prepare
    monkeypatch.setattr(stamped, "prepare", lambda graph: _negated(prepare(graph)))
    with pytest.raises(VerificationError, match="apart from the rounding of its weights"):
        px.export_onnx(ZOO["llama"].build(), tmp_path / "out", view="forward", quantize="int8")
    monkeypatch.setattr(HeldGraph, "hold", lambda _: "")  # as where rounding alone loses so much
    with pytest.warns(PeftfxWarning, match=r"more than its outputs are large \(logits: 2 times\)"):
        px.export_onnx(ZOO["llama"].build(), tmp_path / "out", view="forward", quantize="int8")
