"""Experts' weights as sites: found by dataflow, adapted whole or in part, merged; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.adapted import randomise
from support.few import but_for
from support.mixtures import MIXTURES, mixture, router_of
from torch import Tensor

import peftfx
from peftfx import LoRA, PeftfxError
from peftfx.export.slots.adapter_tensors import adapter_tensors
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare


def text() -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # as the example: one capture serves both


@pytest.mark.parametrize("name", but_for({*MIXTURES} - {"mixtral", "gpt_oss", "deepseek_v3"}, MIXTURES))
def test_sites_of_experts_and_routers_are_found(name: str) -> None:
    model = mixture(name)
    sites = {site.path: site for site in peftfx.inspect(model)}
    (layer,) = {path.partition(".experts.")[0] for path in sites if ".experts." in path}
    up, down, router = (
        sites[f"{layer}.{end}"] for end in ("experts.gate_up_proj", "experts.down_proj", router_of(name))
    )
    assert (up.kind, up.role, down.role, router.role) == ("experts", "experts.gate_up", "experts.down", "router")
    stacked = model.get_submodule(f"{layer}.experts")
    assert (up.shape, down.shape) == (tuple(stacked.gate_up_proj.shape), tuple(stacked.down_proj.shape))
    half = up.rows // 2
    gate, other = up.parts
    assert (gate.role, other.role) == ("experts.gate", "experts.up")
    if name == "gpt_oss":  # its rows lie alternately, and its weights are stored [in, out]
        assert up.transposed
        assert gate.rows[:2] == ((0, 1), (2, 3))
    else:
        assert (gate.rows, other.rows) == (((0, half),), ((half, 2 * half),))
    assert f"{layer}.experts.gate_up_proj" in str(peftfx.inspect(model))


@pytest.mark.parametrize("target", ["experts.gate_up | experts.down", "experts.up", "router"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merged_is_unmerged(name: str, target: str) -> None:
    ours = peftfx.transform(mixture(name), LoRA(r=2, lora_alpha=6, target=target))
    plain = ours(**text()).logits
    torch.testing.assert_close(plain, mixture(name)(**text()).logits)
    randomise(ours)
    want = ours(**text()).logits
    assert float((want - plain).abs().max()) > 0.01
    ours.merge()
    torch.testing.assert_close(ours(**text()).logits, want, atol=2e-5, rtol=1e-4)


def test_a_part_leaves_the_other_rows_of_each_expert() -> None:
    model = mixture("gpt_oss")
    before = model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    ours = peftfx.transform(model, LoRA(r=2, target="experts.gate"))
    randomise(ours)
    ours.merge()
    after = model.model.layers[0].mlp.experts.gate_up_proj
    changed = (after != before).any(1)  # [experts, out]
    assert changed[:, 0::2].all()
    assert not changed[:, 1::2].any()


@pytest.mark.parametrize("rank", [3, 8])
def test_in_bfloat16(rank: int) -> None:
    ours = peftfx.transform(mixture("mixtral").bfloat16(), LoRA(r=rank, target="experts"))
    randomise(ours)
    want = ours(**text()).logits.float()
    ours.merge()
    assert float((ours(**text()).logits.float() - want).norm() / want.norm()) < 0.02


def test_a_sum_of_two_adapters_concatenates_each_experts_factors() -> None:
    ours = peftfx.transform(mixture("mixtral"), LoRA(r=2, target="experts"), "one")
    ours.add_adapter("two", LoRA(r=3, lora_alpha=9, target="experts.down | experts.gate_up"))
    randomise(ours)
    ours.set_adapter(["one", "two"])
    want = ours(**text()).logits
    ours.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    ours.set_adapter("sum")
    torch.testing.assert_close(ours(**text()).logits, want, atol=2e-5, rtol=1e-4)


def test_what_names_modules_picks_no_parameter() -> None:
    ours = peftfx.transform(mixture("qwen2_moe"), LoRA(target_modules=["down_proj"]))
    assert [p.site.role for p in ours.adapter("default").placements] == ["mlp.down"]


WRONG = (
    (LoRA(target="experts", lora_dropout=0.1), "cannot have lora_dropout"),
    (LoRA(target="experts.down", use_dora=True), "cannot have use_dora"),
    (LoRA(target="experts", lora_bias=True), "cannot have lora_bias"),
    (LoRA(target="experts", init_lora_weights="pissa"), "cannot have init_lora_weights='pissa'"),
    (LoRA(target_parameters=["router.weight"], use_dora=True), "cannot have use_dora"),
    (LoRA(target_parameters=["experts.gate_up_proj_bias"]), "its gate_up_proj_bias is read by index"),
    (LoRA(target_parameters=["experts.nothing"]), "name none of the model's"),
    (peftfx.IA3(target="experts"), "IA3 does not act on a site of kind experts"),
    (peftfx.VeRA(target="experts"), "VeRA does not act on a site of kind experts"),
)


@pytest.fixture(scope="module")
def gpt_oss() -> AdaptedModel:
    """A mixture captured once; what is refused leaves no adapter on it."""
    return bare(mixture("gpt_oss"))


@pytest.mark.parametrize(("rule", "message"), WRONG)
def test_what_cannot_be_is_refused(rule: peftfx.LoRA, message: str, gpt_oss: AdaptedModel) -> None:
    with pytest.raises(PeftfxError, match=message):
        gpt_oss.add_adapter("default", rule)


def test_a_loop_over_the_experts_is_adapted_as_their_grouped_products() -> None:
    model = mixture("mixtral")
    model.set_experts_implementation("eager")
    looped, grouped = (
        peftfx.transform(m, LoRA(r=2, target="experts.gate | experts.down")) for m in (model, mixture("mixtral"))
    )
    assert [p.site.role for p in looped.adapter("default").placements] == ["experts.gate_up", "experts.down"]
    randomise(looped)
    grouped.load_state_dict(looped.state_dict())
    want = grouped(**text()).logits
    torch.testing.assert_close(looped(**text()).logits, want, atol=1e-5, rtol=1e-4)
    looped.merge()
    torch.testing.assert_close(looped(**text()).logits, want, atol=2e-5, rtol=1e-4)


def test_an_implementation_that_gathers_weights_is_refused_with_the_one_that_works() -> None:
    model = mixture("mixtral")
    model.set_experts_implementation("batched_mm")
    with pytest.raises(PeftfxError, match=r"set_experts_implementation\('grouped_mm'\)"):
        peftfx.transform(model, LoRA(target_parameters=["experts.down_proj"]))


def test_no_slot_of_a_graph_takes_experts(tmp_path: Path) -> None:
    ours = peftfx.transform(mixture("mixtral"), LoRA(r=2, target="experts"))
    randomise(ours)
    with pytest.raises(PeftfxError, match="experts' weights cannot be put"):
        ours.export(tmp_path / "rows", batched=["default"])
    with pytest.raises(PeftfxError, match="experts' weights cannot be put"):
        adapter_tensors(ours, decodes=True)
