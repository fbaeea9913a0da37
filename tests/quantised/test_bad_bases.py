"""A quantised base that cannot be read is one message, and a base in floating point is quantised on the way."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import quantised as q
from torch import Tensor, nn

from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError
from peftfx.export.command import export_directory
from peftfx.quantisation.coded import Coded, keeping
from peftfx.quantisation.rounding import tabled

Q = "model.layers.0.self_attn.q_proj"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
Change = Callable[[dict[str, Tensor]], object]
BAD: dict[str, tuple[dict[str, object], q.Pack, Change, str]] = {
    "no quant_state": (BNB, q.table4(), lambda t: t.pop(STATE), "incomplete"),
    "no absmax": (BNB, q.table4(), lambda t: t.pop(f"{Q}.weight.absmax"), "there is no weight.absmax"),
    "a state that is no JSON": (BNB, q.table4(), lambda t: t.update({STATE: t[STATE][:9]}), "quant_state lacks"),
    "short codes": (
        BNB,
        q.table4(),
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:9]}),
        "weight has 18 numbers",
    ),
    "other scales": (GPTQ, q.gptq(), lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:1]}), "scales is"),
    "uneven groups": (GPTQ, q.gptq(), lambda t: t[f"{Q}.g_idx"].fill_(1), "into groups of 32"),
    "other bits": ({**GPTQ, "bits": 5}, q.gptq(), len, "bits is 5"),
    "an unknown method": (
        {"quant_method": "aqlm"},
        q.gptq(),
        len,
        "peftfx cannot read a base that is quantised in this way",
    ),
    "another of torchao's": ({"quant_method": "torchao"}, q.torchao(), len, "tensor is of an unnamed type"),
    "no layers": ({"quant_method": "awq", "bits": 4, "group_size": 32}, q.fp8(), len, "the files have no layer"),
    "a shape that is not the model's": (GPTQ, q.gptq(), lambda t: _cut(t), "neither the base nor an adapter"),
}


def _cut(tensors: dict[str, Tensor]) -> None:
    for name in ("qweight", "scales"):
        tensors[f"{Q}.{name}"] = tensors[f"{Q}.{name}"][:, :32].contiguous()
    tensors[f"{Q}.qzeros"] = tensors[f"{Q}.qzeros"][:, :4].contiguous()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_base_is_one_message(name: str, tmp_path: Path) -> None:
    said, pack, change, message = BAD[name]
    q.write(tmp_path, q.tiny(num_hidden_layers=1), said, pack)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(PeftfxError, match=message) as caught:
        load_base(tmp_path)
    assert len(str(caught.value)) < 800


def test_a_coded_weight_is_one_tensor_that_is_never_written(tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1)
    q.write(tmp_path, model, BNB, q.table4())
    weight = load_base(tmp_path).get_parameter(f"{Q}.weight")
    assert isinstance(weight, Coded)
    want = model.get_parameter(f"{Q}.weight")
    assert (weight.T @ torch.eye(64)).equal(want.T)
    assert weight[3:5].equal(want[3:5])
    assert weight.identity == weight.detach().identity != weight.T.identity
    with pytest.raises(PeftfxError, match="cannot be written"), torch.no_grad():
        weight.add_(1)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    q.write(tmp_path / "base", q.tiny(num_hidden_layers=1), BNB, q.table4())
    with pytest.raises(PeftfxError, match="compute in fp32"):
        export_directory(tmp_path / "base", tmp_path / "out", dtype="fp16")


def test_a_base_is_quantised_on_the_way(tmp_path: Path) -> None:
    model = q.tiny(num_hidden_layers=1)
    model.bfloat16().save_pretrained(tmp_path / "base")
    report = export_directory(tmp_path / "base", tmp_path / "out", quantize_base="nf4")
    (choice,) = report.codes["model"]
    assert (choice.operator, len(choice.weights)) == ("MatMulBnb4", 7)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            values, blocks = tabled(module.weight).dequantise(), module.weight.detach().float().view(-1, 64)
            near = blocks.abs().amax(1).view(-1, 1) * 0.17  # half of the widest step of a table
            assert ((values.view(-1, 64) - blocks).abs() <= near).all()
    with pytest.raises(PeftfxError, match="unknown quantisation of a base"):
        export_directory(tmp_path / "base", tmp_path / "other", quantize_base="int3")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    from bitsandbytes.functional import quantize_4bit

    torch.manual_seed(0)
    for shape in ((128, 256), (33, 50)):
        weight = torch.randn(shape).to(dtype)
        codes, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
        ours = tabled(weight)
        assert torch.equal(ours.packed(), codes.view(-1))
        assert torch.equal(ours.magnitudes(), state.absmax.float())


def test_inside_a_verification_a_weight_is_dequantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q.write(tmp_path, q.tiny(num_hidden_layers=1), BNB, q.table4())
    weight = load_base(tmp_path).get_parameter(f"{Q}.weight")
    assert isinstance(weight, Coded)
    want, made = weight.codes.dequantise(), list[int]()
    monkeypatch.setattr(type(weight.codes), "dequantise", lambda codes: made.append(1) or want.clone())
    with keeping(tmp_path):
        assert all(found.equal(want) for found in (weight + 0, weight.T.T + 0, weight[:] + 0))
        assert len(made) == 1
    assert not list(tmp_path.glob("values-*"))
    assert (weight + 0).equal(want)
    assert len(made) == 2
