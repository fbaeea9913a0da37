"""Merged in place, the base computes what the adapted model did; what cannot be merged changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from support.adapted import CONVS, Convs, adapt, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Late(LoRA):
    """LoRA whose second fold on real values fails."""

    __hash__ = LoRA.__hash__

    def fold(self, site, base, p):  # type: ignore[no-untyped-def]
        if base.weight.device.type != "meta" and "layer.1" in site.path:
            raise RuntimeError("out of memory, say")
        return super().fold(site, base, p)


class TestMerge:
    """Merged weights are the adapter and the base in one, and the base is a model like any other."""

    @pytest.mark.parametrize(
        "name", ["gpt2", "albert", "custom", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5", "unet"))]
    )
    def test_the_base_computes_what_the_adapted_model_did(self, name: str) -> None:
        adapted = adapt(name, LoRA(r=3, target="all-linear | conv | embedding"))
        inputs = ZOO[name].inputs(3, 6, model=adapted.base)
        leaf = lambda out: out if isinstance(out, Tensor) else out[0]  # noqa: E731
        want, plain = leaf(adapted(**inputs)), leaf(adapted.base(**inputs))
        identity = id(adapted.base)
        placed = {p.site.path for p in adapted.adapter("default").placements}
        report = adapted.merge()
        base = adapted.remove()
        assert id(base) == identity
        assert set(report.sites) == placed
        assert report.worst[1].max_abs == 0
        assert "the weights are fp32's" in str(report)
        assert adapted.names() == ()
        torch.testing.assert_close(leaf(base(**inputs)), want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(want, plain, atol=1e-2)
        torch.testing.assert_close(leaf(adapted(**inputs)), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_tied_weights_part_and_reload(self, name: str, tmp_path: Path) -> None:
        adapted = adapt(name, LoRA(target="embedding.token"))
        base = adapted.base
        tied = base.get_output_embeddings().weight
        assert tied is base.get_input_embeddings().weight
        head = tied.detach().clone()
        inputs = ZOO[name].inputs(model=base)
        want = adapted(**inputs).logits
        report = adapted.merge()
        adapted.remove()
        assert {name.rpartition(".")[0] for name in report.untied} == set(report.sites)
        assert all(base.get_parameter(name) is not base.get_output_embeddings().weight for name in report.untied)
        assert base.config.tie_word_embeddings is False
        assert torch.equal(base.get_output_embeddings().weight, head)
        torch.testing.assert_close(base(**inputs).logits, want, rtol=0, atol=1e-5)
        base.save_pretrained(tmp_path)
        loaded = type(base).from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, base(**inputs).logits)

    def test_an_untied_model_reloads_equal(self, tmp_path: Path) -> None:
        adapted = adapt("bert", LoRA(bias="all", modules_to_save=["classifier"]))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        want = adapted(**inputs).logits
        adapted.merge()
        base = adapted.remove()
        base.save_pretrained(tmp_path)
        loaded = hf.BertForSequenceClassification.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).logits, base(**inputs).logits)
        torch.testing.assert_close(base(**inputs).logits, want, rtol=0, atol=1e-5)

    def test_a_half_precision_base_is_merged_in_fp32_and_rounded_once(self) -> None:
        base = ZOO["llama"].build().to(torch.bfloat16)
        adapted = peftfx.transform(base, LoRA(r=4, lora_alpha=6))
        torch.manual_seed(0)
        randomise(adapted)
        place = "model.layers.1.self_attn.q_proj"
        a, b = (adapted.adapter("default").get(f"{place}.lora_{x}") for x in "AB")
        assert a.dtype == b.dtype == torch.float32
        old = base.get_submodule(place).weight.detach().clone()
        report = adapted.merge()
        exact = old.float() + 1.5 * (b @ a).detach()
        want = exact.to(torch.bfloat16)
        assert torch.equal(base.get_submodule(place).weight, want)
        lost = (want.float() - exact).abs().max()
        # the sum in one operation or in two: its own last bit is a ten-thousandth of what rounding takes
        assert report.roundings[place].max_abs == pytest.approx(float(lost), rel=1e-3)
        assert report.roundings[place].max_rel == pytest.approx(float(lost / exact.abs().max()), rel=1e-3)
        assert report.bytes == 2 * sum(base.get_submodule(site).weight.numel() for site in report.sites)
        assert report.adapter_bytes == 4 * 4 * 2 * (32 + 32 + 32 + 16)
        assert f"at {report.worst[0]}" in str(report)
        assert not torch.equal(want, old + (1.5 * (b @ a)).to(torch.bfloat16).detach())

    def test_convolutions_grouped_dilated_and_reflected(self) -> None:
        x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0))
        adapted = peftfx.transform(Convs(), LoRA(r=4, target_modules=CONVS), inputs={"x": x})
        randomise(adapted)
        base, p = adapted.base, adapted.adapter("default")
        old = {n: t.clone() for n, t in base.state_dict().items()}
        want = adapted(x)

        def delta(path: str) -> Tensor:
            a, b = p.get(f"{path}.lora_A"), p.get(f"{path}.lora_B")
            return 2 * torch.einsum("or,rikl->oikl", b[..., 0, 0], a)

        manual = F.conv2d(x, old["grouped.weight"], old["grouped.bias"], padding=1, groups=4)
        low = F.conv2d(x, p.get("grouped.lora_A"), padding=1)
        manual = torch.tanh(manual + 2 * F.conv2d(low, p.get("grouped.lora_B"), groups=4))
        manual = torch.tanh(
            F.conv2d(manual, old["dilated.weight"] + delta("dilated"), old["dilated.bias"], padding="same", dilation=2)
        )
        manual = F.conv2d(
            F.pad(manual, (2, 2, 1, 1), mode="reflect"),
            old["reflected.weight"] + delta("reflected"),
            old["reflected.bias"],
            stride=2,
        )
        torch.testing.assert_close(want, manual, rtol=0, atol=1e-5)
        assert set(adapted.merge().sites) == set(CONVS)
        torch.testing.assert_close(base(x), want, rtol=0, atol=1e-5)
        adapted.add_adapter("next", LoRA(r=4, target_modules=CONVS))
        randomise(adapted)
        want = adapted(x)
        adapted.merge()
        torch.testing.assert_close(base(x), want, rtol=0, atol=1e-5)

    def test_merging_in_training_mode_merges_what_evaluation_computes(self) -> None:
        adapted = adapt("bert", LoRA(lora_dropout=0.5))
        inputs = ZOO["bert"].inputs(model=adapted.base)
        want = adapted(**inputs).logits
        adapted.train()
        adapted(**inputs)
        adapted.merge()
        assert adapted.base.training
        torch.testing.assert_close(adapted.remove().eval()(**inputs).logits, want, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("why", ["late", "nan"])
    def test_a_merge_that_fails_changes_nothing(self, why: str) -> None:
        adapted = adapt("bert", Late() if why == "late" else LoRA())
        if why == "nan":
            next(p for n, p in adapted.adapters.named_parameters() if "layer.1" in n).data[0, 0] = float("nan")
        base = adapted.base
        state = {n: t.clone() for n, t in base.state_dict().items()}
        error, text = (RuntimeError, "out of memory") if why == "late" else (PeftfxError, "not finite.*layer.1")
        with pytest.raises(error, match=text):
            adapted.train().merge()
        assert adapted.active == adapted.names() == ("default",)
        assert all(torch.equal(t, state[n]) for n, t in base.state_dict().items())
        inputs = ZOO["bert"].inputs(model=base)
        assert not torch.equal(adapted(**inputs).logits, adapted(**inputs).logits)  # dropout is on, as before


class Strided(nn.Module):
    """A linear layer over every second place of a sequence, whose length is an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 16, 3, stride=2, padding=1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).transpose(1, 2))


def test_one_rotation_for_all_blocks_behind_a_strided_convolution() -> None:
    """It was refused: the product branched on the length."""
    rule = peftfx.OFT(oft_block_size=4, block_share=True, target_modules=["linear"])
    adapted = peftfx.transform(Strided(), rule, inputs={"x": torch.randn(2, 4, 9)}).eval()
    randomise(adapted)
    x = torch.randn(3, 4, 14)
    want = adapted(x=x).detach()
    assert not torch.allclose(adapted.base(x), want)
    torch.testing.assert_close(adapted.merge_and_unload()(x), want)
