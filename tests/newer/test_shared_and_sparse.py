"""Methods that share, mix, replace or pick, against HF PEFT; and what is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import peftfx
from peftfx.contract.common.householder import orthonormal
from peftfx.errors import PeftfxError
from peftfx.methods import method_named
from peftfx.testing.parity import compare

Case = tuple[str, Mapping[str, object]]
CASES: tuple[Case, ...] = (
    ("BEFT", {}),
    ("PVERA", {"r": 4}),
    ("DEFT", {"r": 3, "decomposition_method": "qr"}),
    ("SUPERTUNING", {"sparsity": 0.8, "r": 3}),
    ("VBLORA", {"num_vectors": 6, "vector_length": 4, "r": 3}),
    ("UNILORA", {"theta_d_length": 30, "r": 3}),
    ("TINYLORA", {"u": 5, "weight_tying": 0.5, "init_weights": "uniform"}),
    ("FROD", {"sparse_rate": 0.1}),
    ("PSOFT", {"r": 3}),
    ("ADAMSS", {"r": 5, "num_subspaces": 3}),
    ("LILY", {"r": 3, "num_B": 3}),
    ("POLY", {"r": 2, "n_tasks": 3, "n_skills": 3, "n_splits": 2}),
)
MORE: tuple[Case, ...] = (
    ("PVERA", {"r": 4, "save_projection": False}),
    ("DEFT", {"r": 3, "alpha": 5}),
    ("DEFT", {"r": 3, "para": True}),
    ("SUPERTUNING", {"sparsity": 0.5, "select_top": False, "save_precomputed_indices": False}),
    ("UNILORA", {"theta_d_length": 30, "save_indices": True}),
    ("TINYLORA", {"u": 5, "save_projection": False, "init_weights": "uniform"}),
    ("FROD", {"sparse_rate": 0.1, "save_projection": False}),
    ("FROD", {"sparse_rate": 0.0}),
    ("PSOFT", {"r": 4, "psoft_orth": False, "ab_svd_init": "pissa_init", "psoft_mag_a": False}),
    ("PSOFT", {"r": 4, "psoft_svd": "lowrank", "random_seed": 3, "use_cayley_neumann": True}),
    ("PSOFT", {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.5}),
    ("PSOFT", {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 2, "psoft_mag_b": False}),
    ("ADAMSS", {"r": 5, "num_subspaces": 2, "subspace_rank": 3, "use_dynamic_rank": True, "random_seed": 4}),
    ("ADAMSS", {"r": 50, "init_weights": None}),
    ("POLY", {"r": 3, "init_weights": False}),
)


@pytest.mark.parametrize(
    ("kind", "options"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
    ids=lambda value: str(value),
)
def test_it_computes_and_trains_as_hf_peft(kind: str, options: Mapping[str, object]) -> None:
    compare(method_named(kind), options)


def test_weights_of_the_largest_logits_alone_are_read_and_written_as_hf_peft_does() -> None:
    options = {"num_vectors": 6, "vector_length": 4, "r": 3, "save_only_topk_weights": True}
    compare(method_named("VBLORA"), options, gradients=False)


def test_an_orthonormal_factor_has_the_signs_of_lapack() -> None:
    p = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(orthonormal(p), torch.linalg.qr(p)[0])


@pytest.mark.parametrize("kind", ["XLORA", "SHADOW"])
def test_what_is_refused_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(PeftfxError, match=f"refuses HF PEFT's method {kind}") as caught:
        peftfx.transform(torch.nn.Linear(4, 4), f"{kind.lower()}()@all-linear", inputs={"input": torch.ones(1, 4)})
    assert "did you mean" not in str(caught.value)


def test_options_that_draw_what_is_computed_are_refused_by_name() -> None:
    with pytest.raises(PeftfxError, match="sample_at_inference"):
        method_named("PVERA").from_options({"sample_at_inference": True})


def test_places_that_hf_peft_counts_must_run() -> None:
    class Idle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(x)

    with pytest.raises(PeftfxError, match="no call of the model runs these"):
        peftfx.transform(Idle(), peftfx.UniLoRA(target_modules=["one", "two"]), inputs={"x": torch.ones(1, 4)})
