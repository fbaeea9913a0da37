"""GPTQ: the integers of a weight are chosen for what its outputs are on a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from support import quantised as q
from support.words import word_tokenizer
from torch import nn

import peftfx as px
from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError
from peftfx.export.command import export_directory
from peftfx.export.merge_command import merge_directory
from peftfx.export.rounding.gptq import factor_of, outputs_off, round_by_inputs
from peftfx.quantisation.rounding import round_blocks

WORDS = [f"w{number}" for number in range(96)]


def words(count: int, seed: int = 0) -> str:
    """Text in which one word is followed by few others."""
    random, found = torch.Generator().manual_seed(seed), [0]
    for _ in range(count - 1):
        found.append((found[-1] * 5 + int(torch.randint(3, (1,), generator=random))) % len(WORDS))
    return " ".join(WORDS[number] for number in found)


def write_tokenizer(directory: Path) -> None:
    """A word is a token."""
    word_tokenizer(WORDS, unk_token="w0").save_pretrained(directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose hidden states lie in few directions, as those of trained models do."""
    folder = tmp_path_factory.mktemp("gptq")
    model = q.tiny(hidden_size=64, intermediate_size=128, num_hidden_layers=1, vocab_size=96)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        few = torch.randn(96, 6, generator=random) @ torch.randn(6, 64, generator=random)
        model.model.embed_tokens.weight.copy_(few + 0.1 * torch.randn(96, 64, generator=random))
        model.lm_head.weight.mul_(10)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    adapted = px.transform(model, px.LoRA(r=2, target="attention.query | mlp.down"), seed=0).eval()
    with torch.no_grad():
        for p in adapted.adapters.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text(words(1200))
    return folder


@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_nearer_on_such_inputs(symmetric: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 100, generator=random)
    x = torch.randn(400, 12, generator=random) @ torch.randn(12, 100, generator=random)
    x += 0.1 * torch.randn(400, 100, generator=random)
    x[:, 7] = 0  # never read
    grid = round_blocks(weight, 4, 32, symmetric=symmetric)
    made = round_by_inputs(weight, grid, factor_of(x.T @ x), 4)
    off = {}
    for name, found in (("plain", grid), ("gptq", made)):
        values = found.values(8)[:, :100]
        off[name] = float((x @ (values - weight).T).norm() / (x @ weight.T).norm())
        assert outputs_off(weight, values, x.T @ x) == pytest.approx(off[name], rel=1e-3)
    assert off["gptq"] < 0.6 * off["plain"]
    assert int(made.integers.max()) <= 15
    assert (made.integers != grid.integers).float().mean() < 0.7, "most numbers stay near what they were"


def test_inputs_that_say_nothing_round_to_the_nearest() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    grid = round_blocks(weight, 4, 32, search=False)
    assert torch.equal(round_by_inputs(weight, grid, factor_of(torch.eye(32)), 4).integers, grid.integers)
    nothing = round_by_inputs(weight, grid, factor_of(torch.zeros(32, 32)), 4)
    assert torch.equal(nothing.integers, grid.integers)


def test_an_export_is_nearer_than_without_the_text(base: Path, tmp_path: Path) -> None:
    given, kl = {"adapter": base / "adapter", "calibration": base / "text.txt", "view": "forward"}, {}
    for name, scheme in (("plain", "int4"), ("gptq", "int4(gptq=True)")):
        report = export_directory(base / "base", tmp_path / name, quantize=scheme, **given)
        kl[name] = report.agreement["model"].kl
    fitted = report.gptq
    assert fitted is not None
    assert fitted.weights == 8
    assert fitted.tokens == 896, "the last fifth is what it is compared on; rows are of 128"
    assert not fitted.left
    assert fitted.off < 0.8 * fitted.plain
    assert "8 weights on 896 tokens of text.txt" in str(report)
    assert kl["gptq"] < 0.8 * kl["plain"]


def test_a_directory_has_them_too(base: Path, tmp_path: Path) -> None:
    text = {"calibration": base / "text.txt", "adapter": base / "adapter"}
    plain = merge_directory(base / "base", tmp_path / "plain", quantize="int4(symmetric=False)", **text)
    report = merge_directory(base / "base", tmp_path / "gptq", quantize="int4(symmetric=False, gptq=True)", **text)
    assert report.gptq is not None
    assert report.gptq.weights == 7, "the head stays, as transformers leaves it"
    assert report.agreement["model"].kl < 0.8 * plain.agreement["model"].kl
    assert max(report.lost.values()) > max(plain.lost.values()), "the weights themselves are farther off"
    assert load_base(tmp_path / "gptq") is not None


def test_a_text_that_says_nothing_is_one_message(base: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    with pytest.raises(PeftfxError, match="GPTQ needs the layers' inputs on a text, but no text is given"):
        merge_directory(base / "base", tmp_path / "out", quantize="int4(gptq=True)")
    with pytest.raises(PeftfxError, match="128 tokens or more, and this one has 2"):
        merge_directory(base / "base", tmp_path / "out", quantize="int4(gptq=True)", calibration=short)
    with pytest.raises(PeftfxError, match="not to nf4"):
        merge_directory(base / "base", tmp_path / "out", quantize="nf4(gptq=True)", calibration=short)
    one = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model = px.transform(one, px.LoRA(r=2, target="0"), inputs={"input": torch.zeros(2, 32)})
    with pytest.raises(PeftfxError, match="no tokenizer"):
        model.export(tmp_path / "out", quantize="int4(gptq=True)", calibration=base / "text.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.slow
def test_an_encoder_and_a_decoder_are_rounded_by_one_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    hf.T5ForConditionalGeneration(hf.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)).save_pretrained(
        tmp_path / "t5"
    )
    write_tokenizer(tmp_path / "t5")
    (tmp_path / "text.txt").write_text(words(700))
    text = tmp_path / "text.txt"
    report = export_directory(tmp_path / "t5", tmp_path / "out", quantize="int8(gptq=True)", calibration=text)
    assert report.gptq is not None
    assert report.gptq.weights == 17, "6 of the encoder, 10 of the decoder, and the head"
    assert not report.gptq.left
    assert report.gptq.off < report.gptq.plain
    assert set(report.quantized) == {"encoder_model.onnx", "decoder_model.onnx"}
