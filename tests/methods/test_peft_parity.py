"""Methods against HF PEFT's: forward, gradients and files both ways, at the options that make them differ."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.loha.layer import HadaWeightCP
from torch import nn

import peftfx
from peftfx.methods import method_named
from peftfx.testing.parity import compare

CASES: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("LORA", {"r": 3, "lora_alpha": 5, "lora_bias": True}),
    ("LOHA", {"r": 3, "alpha": 5, "rank_pattern": {"blocks.0": 2}}),
    ("MISS", {"r": 3}),
    ("MISS", {"r": 4, "init_weights": "mini"}),
    ("MISS", {"r": 4, "init_weights": "bat"}),
    ("FOURIERFT", {"n_frequency": 20, "n_frequency_pattern": {"up": 7}}),
    ("HIRA", {"r": 3}),
    ("HRA", {"r": 4}),
    ("HRA", {"r": 3, "apply_GS": True}),
    ("LOKR", {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 3, "rank_pattern": {"blocks.0": 3}}),
    ("OFT", {"oft_block_size": 4}),
    ("BOFT", {"boft_block_size": 4}),
    ("ROAD", {"group_size": 4, "variant": "road_4"}),
    ("SHIRA", {"r": 1}),
    ("DELORA", {"r": 3, "rank_pattern": {"blocks.0": 2}, "lambda_pattern": {"up": 4}}),
    ("GRALORA", {"r": 2, "hybrid_r": 3, "alpha": 6}),
    ("RANDLORA", {"r": 3}),
    ("PEANUT", {"r": 3, "depth": 2, "act_fn": "silu"}),
    ("GLORA", {"r": 3}),
    ("OSF", {"effective_rank": 3, "rank_pattern": {"blocks.0": 0.25}}),
    ("WAVEFT", {"n_frequency": 30, "wavelet_family": "db3", "n_frequency_pattern": {"up": 7}}),
)
#: More options of theirs, too many for every run.
MORE: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("LOKR", {"r": 2, "use_effective_conv2d": True, "init_weights": "lycoris"}),
    ("OFT", {"r": 2, "oft_block_size": 0, "block_share": True}),
    ("OFT", {"oft_block_size": 3, "use_cayley_neumann": False}),
    ("OFT", {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    ("BOFT", {"boft_block_num": 2, "boft_block_size": 0}),
    ("ROAD", {"group_size": 4}),
    ("ROAD", {"group_size": 2, "variant": "road_2"}),
    ("SHIRA", {"r": 2, "random_seed": 4}),
    ("GRALORA", {"r": 4, "gralora_k": 1}),
    ("RANDLORA", {"r": 4, "sparse": True, "save_projection": False}),
    ("RANDLORA", {"r": 4, "very_sparse": True}),
    ("GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    ("GLORA", {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"}),
    ("OSF", {}),
    ("WAVEFT", {"n_frequency": 30, "use_idwt": False}),
    ("WAVEFT", {"n_frequency": 30, "proportional_parameters": True}),
)
#: Where the gradients that HF PEFT writes out are not those of its forward; the tests below show it.
FORWARD = (("LOHA", {"r": 3, "use_effective_conv2d": True}), ("C3A", {"block_size": 4}))


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: str(value))
def test_it_computes_and_trains_as_hf_peft(kind: str, options: Mapping[str, object]) -> None:
    compare(method_named(kind), options)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options"), MORE, ids=lambda value: str(value))
def test_it_is_hf_pefts_with_other_options(kind: str, options: Mapping[str, object]) -> None:
    compare(method_named(kind), options)


@pytest.mark.parametrize(("kind", "options"), FORWARD, ids=lambda value: str(value))
def test_it_computes_as_hf_peft(kind: str, options: Mapping[str, object]) -> None:
    compare(method_named(kind), options, gradients=False)


def test_gradients_that_hf_peft_writes_out_are_not_those_of_its_forward() -> None:
    rng = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()  # noqa: E731
    cores = [t for _ in range(2) for t in (new(2, 2, 3, 3), new(2, 4), new(2, 5))]
    assert not torch.autograd.gradcheck(HadaWeightCP.apply, cores, raise_exception=False)
    assert not torch.autograd.gradcheck(
        BlockCircularConvolution.apply, (new(3, 8), new(2, 2, 4)), raise_exception=False
    )


@pytest.mark.parametrize("r", [2, 4])
def test_orthonormal_reflections_start_with_numbers(r: int) -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    rule = peftfx.HRA(r=r, apply_GS=True, target="all-linear | head")
    adapted = peftfx.transform(model, rule, inputs={"input": inputs}, seed=0)
    adapted(inputs).square().sum().backward()
    (trained,) = (p for p in adapted.parameters() if p.requires_grad)
    assert trained.grad is not None
    assert torch.isfinite(trained.grad).all()
    assert torch.linalg.matrix_rank(trained) == r


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fouriers_angles_are_those_of_a_transform_at_any_size(dtype: torch.dtype) -> None:
    """In float32 a frequency times a place is not exact above 2 ** 24, and in bfloat16 above 256."""
    model, inputs = nn.Sequential(nn.Linear(3, 28_672, bias=False)), {"input": torch.ones(1, 3)}
    rule = peftfx.FourierFT(n_frequency=40, init_weights=False, target="all-linear | head")
    adapted = peftfx.transform(model, rule, inputs=inputs, seed=0)
    adapted.adapter("default").to(dtype)
    (spectrum,) = (p.detach() for p in adapted.parameters() if p.requires_grad)
    assert spectrum.dtype == dtype
    rows, columns = rule.places((28_672, 3), "")
    whole = torch.zeros(28_672, 3, dtype=torch.float64)
    whole[rows, columns] = spectrum.double()
    want = model[0].weight.detach() + (150 * torch.fft.ifft2(whole).real).float()
    adapted.merge()
    torch.testing.assert_close(model[0].weight.detach(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_butterflies_are_those_that_hf_peft_has_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class BlockDiagonal:
        apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks]))

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)
    compare(method_named("BOFT"), {"boft_block_size": 2, "boft_n_butterfly_factor": 2})
