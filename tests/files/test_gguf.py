"""A GGUF file as a base: what it holds, dequantised, is the model; the command line takes it for a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from files.gguf_files import TOKENS, write

import peftfx
from peftfx.bases.load import load_base
from peftfx.cli.main import app
from peftfx.errors import PeftfxError
from peftfx.files import is_gguf


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, hf.LlamaForCausalLM]:
    """A file in blocks of 8 bits, and the model that it stands for."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write(path)


IDS = torch.tensor([[1, 5, 9, 30, 4], [1, 7, 7, 12, 3]])


def test_a_base_is_the_model_that_the_file_stands_for(
    written: tuple[Path, hf.LlamaForCausalLM], capsys: pytest.CaptureFixture[str]
) -> None:
    path, want = written
    got = load_base(path)
    assert "Converting" not in capsys.readouterr().err
    assert type(got) is hf.LlamaForCausalLM
    assert not got.training
    assert got.lm_head.weight is got.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, want(IDS).logits, rtol=1e-4, atol=1e-5)
    assert load_base(path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_info_and_a_dry_run_tell_what_the_file_holds(
    written: tuple[Path, hf.LlamaForCausalLM], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, want = written
    app(["info", str(path), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["facts"]["model_type"]) == ("base", "llama")
    assert told["facts"]["files"] == {path.name: path.stat().st_size}
    words = ["export", "--base", path, "--output", tmp_path / "out", "--dry-run", "--json"]
    app([str(word) for word in words], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in want.parameters())


def test_the_command_line_exports_it_with_an_adapter_and_it_generates(
    written: tuple[Path, hf.LlamaForCausalLM], tmp_path: Path
) -> None:
    path, _ = written
    adapted = peftfx.transform(load_base(path), peftfx.LoRA(r=2, target="all-linear"), seed=0)
    with torch.no_grad():
        for p in adapted.adapters.parameters():
            p.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    words = ["export", "--base", path, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"]
    app([str(word) for word in words], standalone_mode=False)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    served = peftfx.runtime.load(tmp_path / "out")
    told = {"max_new_tokens": 6, "do_sample": False}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(served.generate(**inputs, **told), adapted.generate(**inputs, **told))
    assert served.tokenizer("abcd").input_ids[-2:] == [TOKENS.index("ab"), TOKENS.index("cd")]


def test_inspect_needs_no_weights(written: tuple[Path, object], capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = written
    app(["inspect", str(path), "--target", "attention.query", "--json"], standalone_mode=False)
    assert [site["path"] for site in json.loads(capsys.readouterr().out)] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]


def test_a_broken_file_and_a_missing_package_are_told(
    written: tuple[Path, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = written
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:900])
    assert is_gguf(short)
    with pytest.raises(PeftfxError, match="cannot read this GGUF file"):
        load_base(short)
    monkeypatch.setattr("peftfx.bases.files.gguf.find_spec", lambda name: None)
    with pytest.raises(PeftfxError, match="not installed: gguf accelerate"):
        load_base(path)


def test_a_head_that_the_file_lacks_is_not_made_up(written: tuple[Path, object]) -> None:
    with pytest.raises(PeftfxError, match=r"lacks the weights of score\.weight"):
        load_base(written[0], task="text-classification")
