"""LoRAs on experts that `peft` wrote (`target_parameters`): loaded, trained, merged, exported with the cache; back."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.adapted import gradients, randomise
from support.few import but_for
from support.mixtures import MIXTURES, WITHOUT_GROUPS, mixture, router_of
from torch import Tensor, nn

import peftfx
import peftfx.runtime

GENERATE = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
QUICK = ("mixtral", "gpt_oss", *WITHOUT_GROUPS)  #: the others are exported in the slow tests
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def text(rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def theirs(name: str, *, parameters: list[str], **options: object) -> nn.Module:
    given = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": parameters, **options}
    made = peft.get_peft_model(mixture(name), peft.LoraConfig(**given))
    randomise(made)
    return made.eval()


MARKS = {**dict.fromkeys({*MIXTURES} - {*QUICK}, pytest.mark.slow), "longcat_flash": pytest.mark.further}
EACH = [pytest.param(n, marks=MARKS.get(n, ())) for n in (*MIXTURES, *WITHOUT_GROUPS)]


@pytest.mark.parametrize("name", EACH)
def test_what_peft_wrote_is_loaded_merged_and_exported_with_the_cache(name: str, tmp_path: Path) -> None:
    wanted = theirs(name, parameters=EXPERTS, target_modules=["o_proj"])
    wanted.save_pretrained(str(tmp_path / "adapter"))
    ours = peftfx.load(mixture(name), tmp_path / "adapter")
    call = text()
    want, bare = wanted(**call).logits, mixture(name)(**call).logits
    assert float((want - bare).abs().max()) > 0.1
    torch.testing.assert_close(ours(**call).logits, want, atol=2e-5, rtol=1e-4)

    report = ours.export(tmp_path / "out", view="decode")
    assert report.reference.startswith("the model's own code, with the adapter on its modules")
    call["attention_mask"][1, :3] = 0
    expected = wanted.generate(**call, **GENERATE)
    got = peftfx.runtime.load(tmp_path / "out").generate(**call, **GENERATE)
    assert got.sequences.equal(expected.sequences)
    for one, other in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    ours.merge()
    torch.testing.assert_close(ours.base(**text()).logits, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    wanted = theirs(name, parameters=[*EXPERTS, f"{router_of(name)}.weight"], rank_pattern={"experts.down_proj": 2})
    wanted.save_pretrained(str(tmp_path))
    ours = peftfx.load(mixture(name), tmp_path)
    for model in (wanted.train(), ours.train()):
        model(**text()).logits.square().mean().backward()
    want, got = gradients(wanted), gradients(ours)
    layer = "model.layers.0.mlp"
    named = {
        "experts.base_layer": "experts.gate_up_proj",
        "experts": "experts.down_proj",
        router_of(name): router_of(name),
    }
    assert len(want) == len(got) == 2 * len(named)
    for module, place in named.items():
        for factor in ("lora_A", "lora_B"):
            one = want[f"base_model.model.{layer}.{module}.{factor}.default.weight"]
            torch.testing.assert_close(got[f"adapters.default.{layer}.{place}.{factor}"], one, atol=1e-6, rtol=1e-4)


TARGETS = ("experts", "experts.down", "experts.gate", "router | experts.up", "experts | attention.query")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", but_for({"qwen2_moe"}, ("qwen2_moe", "gpt_oss")))
def test_ours_loads_in_peft(name: str, target: str, tmp_path: Path) -> None:
    ours = peftfx.transform(mixture(name), peftfx.LoRA(r=3, lora_alpha=4, target=target))
    randomise(ours)
    ours.save_pretrained(tmp_path)
    want = ours(**text()).logits
    wanted = peft.PeftModel.from_pretrained(mixture(name), str(tmp_path)).eval()
    torch.testing.assert_close(wanted(**text()).logits, want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(peftfx.load(mixture(name), tmp_path)(**text()).logits, want, atol=2e-5, rtol=1e-4)


def test_the_same_rule_starts_at_the_same_parameters(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_parameters=["experts.down_proj", "gate.weight"], target_modules=["q_proj"])
    ours = peftfx.transform(mixture("mixtral"), config)
    wanted = peft.get_peft_model(mixture("mixtral"), config)
    shapes = sorted(tuple(p.shape) for p in wanted.parameters() if p.requires_grad)
    assert sorted(tuple(p.shape) for p in ours.parameters() if p.requires_grad) == shapes
    torch.testing.assert_close(ours(**text()).logits, mixture("mixtral")(**text()).logits)
