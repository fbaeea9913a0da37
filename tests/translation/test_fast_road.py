"""What took torch's road to ONNX although the fast one can take it: layers of torch itself, and code of diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from every_model.diffusion_models import build_denoiser
from support.few import but_for
from torch import Tensor, nn

import peftfx
from peftfx import LoRA
from peftfx.bases.example_inputs import example_inputs
from peftfx.export.verification.comparison import VerificationError


class Norms(nn.Module):
    """RMS norms of torch: with a weight and without, with an epsilon and without, over one axis and over two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)
        self.norms = nn.ModuleList(
            [nn.RMSNorm(6), nn.RMSNorm(6, eps=1e-3), nn.RMSNorm(6, elementwise_affine=False), nn.RMSNorm((5, 6))]
        )
        for norm in self.norms:
            if norm.weight is not None:
                nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(self.layer(x)) for norm in self.norms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_rms_norms_of_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    base = Norms().to(dtype).eval()
    rule = LoRA(r=2, target="/.*/", init_lora_weights=False)
    ours = peftfx.transform(base, rule, inputs={"x": torch.randn(2, 5, 6, dtype=dtype)})
    report = ours.export(tmp_path / "out")
    assert report.engine == "fast"
    assert report.fused.get("RMSNormalization", 0) == (0 if dtype == torch.float64 else 4)
    x = 1e-2 * torch.randn(3, 5, 6, dtype=dtype)  # so small that the epsilon counts
    close = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {"atol": 1e-5, "rtol": 1e-4}
    for want, got in zip(ours(x), peftfx.runtime.load(tmp_path / "out")(x).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), want, **close)


class Dropouts(nn.Module):
    """Dropouts of single numbers and of whole channels, also in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3)
        kinds = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
        self.drops = nn.ModuleList(kind(0.5, inplace) for kind in kinds for inplace in (False, True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for drop in self.drops:
            z = drop(y) * 2
            y = z - y
        return y


@torch.no_grad()
def test_dropouts_of_channels_are_nothing_in_inference(tmp_path: Path) -> None:
    rule = LoRA(r=2, target="/layer/", init_lora_weights=False)
    ours = peftfx.transform(Dropouts().eval(), rule, inputs={"x": torch.randn(2, 3, 6, 7)})
    assert ours.export(tmp_path / "out").engine == "fast"
    x = torch.randn(3, 3, 9, 5)
    (got,) = peftfx.runtime.load(tmp_path / "out")(x).values()
    torch.testing.assert_close(torch.as_tensor(got), ours(x), atol=1e-5, rtol=1e-4)


class Written(nn.Module):
    """Writes to what is one of several: a value whose halves are views in a tuple, and the first result of `topk`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        one, other = y[:, 2:].unflatten(-1, (2, 4)).unbind(-2)
        y[:, 2:] = torch.cat([-other, one], -1)
        best, places = y.topk(2, -1)
        best /= best.sum(-1, keepdim=True)
        y = y + best.sum(-1, keepdim=True) * places.sum(-1, keepdim=True)
        rows, columns = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(8), indexing="ij")
        return torch.einsum("ij,bjd->bid", 1 - torch.eye(x.shape[1]), y * (rows + columns))


@torch.no_grad()
def test_writes_to_one_of_several_grids_and_unit_matrices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = peftfx.transform(
        Written().eval(), LoRA(r=2, target="/.*/", init_lora_weights=False), inputs={"x": torch.randn(2, 5, 6)}
    )
    assert ours.export(tmp_path / "out").engine == "fast"
    for shape in ((1, 4, 6), (3, 9, 6)):
        x = torch.randn(shape)
        (got,) = peftfx.runtime.load(tmp_path / "out")(x).values()
        torch.testing.assert_close(torch.as_tensor(got), ours(x), atol=1e-5, rtol=1e-5)


class Renewed(nn.Module):
    """Each call writes a scale into a buffer. `seen`, which may have the same memory, is read behind the write."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("scale", torch.ones(6))
        self.register_buffer("seen", self.scale.view(1, 6) if shared else torch.ones(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.copy_(torch.where(x.amax() > 1, torch.full((6,), 2.0), torch.full((6,), 3.0)))
        return self.layer(x) * self.scale + self.seen


@torch.no_grad()
def test_a_buffer_that_each_call_writes_anew(tmp_path: Path) -> None:
    rule, x = LoRA(r=2, target="/.*/", init_lora_weights=False), torch.randn(2, 6)
    ours = peftfx.transform(Renewed().eval(), rule, inputs={"x": x})
    assert ours.export(tmp_path / "out").engine == "fast"
    run = peftfx.runtime.load(tmp_path / "out")
    for x in (torch.full((3, 6), 0.5), torch.full((1, 6), 1.5)):
        (got,) = run(x).values()
        torch.testing.assert_close(torch.as_tensor(got), ours(x), atol=1e-5, rtol=1e-5)
    shared = peftfx.transform(Renewed(shared=True).eval(), rule, inputs={"x": x})
    with pytest.raises(VerificationError, match="disagrees"):
        shared.export(tmp_path / "other")


@torch.no_grad()
def test_positions_of_longrope_are_scaled_by_the_length_of_the_text(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "rope_type": "longrope", "factor": 4.0, "partial_rotary_factor": 1.0}
    factors = {"short_factor": [1.1] * 4, "long_factor": [2.2] * 4, "original_max_position_embeddings": 12}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Phi3Config(
        **sizes, vocab_size=99, max_position_embeddings=64, pad_token_id=0, rope_parameters={**rope, **factors}
    )
    ours = peftfx.transform(transformers.Phi3ForCausalLM(config).eval(), LoRA(r=2, target="all-linear"))
    assert ours.export(tmp_path / "out", view="forward").engine == "fast"
    run = peftfx.runtime.load(tmp_path / "out")
    for length in (7, 20):
        ids = torch.randint(1, 99, (2, length))
        got = run(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
        torch.testing.assert_close(torch.as_tensor(got), ours(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", but_for({"auraflow", "cogview4"}, ["flux", "auraflow", "cogview4"]))
@torch.no_grad()
def test_denoisers_of_diffusers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build_denoiser(name)
    rule = LoRA(r=2, target=r"/.*to_[qkv]/", init_lora_weights=False)
    ours = peftfx.transform(base, rule, inputs=example_inputs(base))
    assert ours.export(tmp_path / "out").engine == "fast"
    inputs = example_inputs(base, sizes={"batch": 3, "sequence": 5}, seed=4)
    got = next(iter(peftfx.runtime.load(tmp_path / "out")(**inputs).values()))
    torch.testing.assert_close(torch.as_tensor(got), ours(**inputs).sample, atol=1e-4, rtol=1e-4)


class Builds(nn.Module):
    """Makes a layer in its call, and puts its own weight into it, as BigBird does for short texts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        made = nn.Linear(6, 6)
        made.weight, made.bias = self.layer.weight, self.layer.bias
        return made(self.layer(x))


@torch.no_grad()
def test_random_starts_that_nothing_reads_are_dropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Builds().eval()
    report = peftfx.export_onnx(base, tmp_path / "out", inputs={"x": torch.randn(2, 5, 6)})
    assert report.engine == "fast"
    x = torch.randn(3, 2, 6)
    (got,) = peftfx.runtime.load(tmp_path / "out")(x).values()
    torch.testing.assert_close(torch.as_tensor(got), base(x), atol=1e-5, rtol=1e-5)


@pytest.mark.further
@torch.no_grad()
@pytest.mark.parametrize("length", [7, 8])  # a text that is padded to whole windows of 4, and one that is whole
def test_a_token_that_attends_to_all(length: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LongformerConfig(vocab_size=99, attention_window=4, max_position_embeddings=66, **sizes)
    base = transformers.LongformerForSequenceClassification(config).eval()

    def call(batch: int, length: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 99, (batch, length))
        mask = torch.ones_like(ids)
        mask[-1, length - 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    rules = LoRA(r=4, target_modules=["query", "value_global"], init_lora_weights=False)
    adapted = peftfx.transform(base, rules, inputs=call(2, length))
    report = adapted.export(tmp_path / "out")
    assert report.engine == "fast"
    served = peftfx.runtime.load(tmp_path / "out")
    for case in (call(1, 5), call(3, 12), call(2, 30)):
        torch.testing.assert_close(served(**case)["logits"], adapted(**case).logits, atol=1e-5, rtol=1e-4)


class Distance(nn.Module):
    """Two results of one layer, of equal shapes, in an operator that is split up."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.pairwise_distance(self.layer(x), self.layer(y))


@torch.no_grad()
def test_two_operands_that_look_alike_stay_two(tmp_path: Path) -> None:
    """The calls of a layer with an adapter share what is known of their results; the distance became 0."""
    rules = LoRA(r=2, target_modules=["layer"], init_lora_weights=False)
    adapted = peftfx.transform(Distance().eval(), rules, inputs={"x": torch.randn(2, 6), "y": torch.randn(2, 6)}).eval()
    assert adapted.export(tmp_path / "out", merge=False).engine == "fast"
    x, y = torch.randn(3, 6), torch.randn(3, 6)
    (got,) = peftfx.runtime.load(tmp_path / "out")(x=x, y=y).values()
    torch.testing.assert_close(torch.as_tensor(got), adapted(x, y), atol=1e-5, rtol=1e-5)
