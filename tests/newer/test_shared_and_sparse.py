"""Methods that share, mix, replace or pick, against HF PEFT; and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.contract.common.householder import orthonormal
from peftfx.errors import PeftfxError
from peftfx.methods import method_named
from peftfx.runtime import load
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


def test_logits_that_choose_nothing_are_exported_and_no_other_infinity(tmp_path: Path) -> None:
    options = {"num_vectors": 16, "vector_length": 4, "r": 3, "save_only_topk_weights": True, "task_type": "CAUSAL_LM"}
    config = peft.VBLoRAConfig(target_modules=["q_proj", "v_proj"], **options)
    theirs = peft.get_peft_model(ZOO["llama"].build(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = peftfx.load(ZOO["llama"].build(), tmp_path / "adapter").eval()
    ids = torch.arange(3, 18).view(3, 5)
    for merge in (True, False):
        loaded.export(tmp_path / "out", merge=merge, view="forward", force=True)
        for rows in (ids, ids[:1, :2]):
            found = load(tmp_path / "out")(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
            torch.testing.assert_close(
                torch.as_tensor(found), theirs(input_ids=rows).logits.detach(), atol=1e-4, rtol=0
            )
    key, logits = next((name, p) for name, p in loaded.named_parameters() if "vblora_logits" in name)
    for value in (float("inf"), float("nan")):
        with torch.no_grad():
            logits.view(-1)[0] = value
        with pytest.raises(PeftfxError, match="holds NaN or an infinity") as caught:
            loaded.export(tmp_path / "other", view="forward")
        assert str(caught.value.where) in key


def test_all_logits_of_a_model_of_peft_are_taken_over(tmp_path: Path) -> None:
    options = {"num_vectors": 16, "vector_length": 4, "r": 3, "save_only_topk_weights": True}
    config = peft.VBLoRAConfig(target_modules=["q_proj", "v_proj"], **options)
    theirs = peft.get_peft_model(ZOO["llama"].build(), config)
    randomise(theirs)
    ours, ids = peftfx.transform(theirs), torch.arange(3, 18).view(3, 5)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    wanted = {n: p for n, p in theirs.named_parameters() if "vblora_logits" in n}
    found = {n: p for n, p in ours.named_parameters() if "vblora_logits" in n}
    assert len(found) == len(wanted) == 8
    for own, other in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
    assert config.save_only_topk_weights
    ours.save_pretrained(tmp_path / "own")
    again = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "own").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, atol=1e-5, rtol=0)


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
    with pytest.raises(PeftfxError, match="the target matches no site"):  # the hint was to exclude the only target
        peftfx.transform(Idle(), peftfx.UniLoRA(target_modules=["one"]), inputs={"x": torch.ones(1, 4)})


class Between(nn.Module):
    """Between two layers that act are one that never runs, and one whose results reach no output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.unread = nn.Linear(4, 5), nn.Linear(9, 8), nn.Linear(5, 12)
        self.last, self.large = nn.Linear(5, 6), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.unread(hidden)
        return self.last(hidden)


COUNTING: tuple[Case, ...] = (
    ("TINYLORA", {"u": 6, "weight_tying": 0.5}),
    ("TINYLORA", {"u": 6, "save_projection": False}),
    ("UNILORA", {"r": 2, "theta_d_length": 7}),
    ("WAVEFT", {"n_frequency": 9, "proportional_parameters": True}),
    ("FROD", {"save_projection": False}),
    ("LILY", {"r": 2, "stride_A": 2}),
)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "options"), COUNTING, ids=lambda value: str(value))
def test_places_are_counted_as_hf_peft_counts_them_where_some_do_not_run(
    kind: str, options: Mapping[str, object], tmp_path: Path
) -> None:
    base, x = Between(), torch.randn(3, 4)
    targets = ["first", "idle", "unread", "last", "large"]
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](target_modules=targets, **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs", inputs={"x": x}).eval()
    torch.testing.assert_close(ours(x=x), theirs(x))
    ours.save_pretrained(tmp_path / "ours")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    ours.export(tmp_path / "onnx", inputs={"x": x})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_of_one_vector_has_no_place_in_a_head_that_is_trained_whole(tmp_path: Path) -> None:
    """It names no modules: the config's targets are in the head, too. It was refused."""
    config = peft.UniLoraConfig(r=2, theta_d_length=30, target_modules=["dense"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(ZOO["roberta"].build(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours, given = peftfx.load(ZOO["roberta"].build(), tmp_path), ZOO["roberta"].inputs(3, 5)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits)
