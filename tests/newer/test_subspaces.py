"""AdaMSS: which clusters go on being trained, step by step as in HF PEFT; and what its files do not tell."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import peftfx
from peftfx.testing.models import Causal

BASE = Causal((), layers=1, groups=2).build()
IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
OPTIONS = {
    "r": 6,
    "num_subspaces": 3,
    "subspace_rank": 2,
    "target_modules": ["q_proj", "v_proj"],
    "use_asa": True,
    "asa_target_subspaces": 2,
    "init_warmup": 1,
    "final_warmup": 6,
    "mask_interval": 2,
}


def loss(model: nn.Module) -> Tensor:
    return model(**CALL, labels=IDS).loss


def trained(model: nn.Module) -> set[str]:
    names = (name.replace("base_model.model.", "").replace(".default", "") for name, _ in _trained(model))
    return {name.replace("adapters.", "").replace("_A.", "_A_").replace("_B.", "_B_") for name in names}


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_clusters_are_frozen_as_in_hf_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(BASE), peft.AdamssConfig(**OPTIONS))
    with torch.no_grad():
        for _, p in _trained(theirs):
            p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = peftfx.load(copy.deepcopy(BASE), tmp_path, inputs=CALL)
    for model in (ours, theirs):
        model.train()
    optimizers = [torch.optim.SGD([p for _, p in _trained(model)], lr=0.5) for model in (ours, theirs)]
    seen = set()
    for step in range(8):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss(model).backward()
            optimizer.step()
            (ours if model is ours else theirs.base_model).update_and_allocate(step)
            optimizer.zero_grad()
        assert trained(ours) == trained(theirs), f"step {step}"
        seen.add(len(trained(ours)))
    assert len(seen) > 1, "nothing was frozen"
    torch.testing.assert_close(loss(ours), loss(theirs), atol=1e-5, rtol=1e-4)


def test_clusters_are_of_the_base_that_a_file_was_trained_on(tmp_path: Path) -> None:
    rule = peftfx.AdaMSS(r=6, num_subspaces=2, target_modules=["q_proj"])
    ours = peftfx.transform(copy.deepcopy(BASE), rule, inputs=CALL)
    sizes = sum(p.numel() for p in ours.adapter("default").parameters())
    assert peftfx.plan(copy.deepcopy(BASE), rule, inputs=CALL).parameters == sizes
    ours.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peftfx.load(copy.deepcopy(BASE), tmp_path, inputs=CALL)
    other = copy.deepcopy(BASE)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(torch.linspace(1, 1.5, 8))  # of the same clusters
    with pytest.warns(UserWarning, match="another base"):
        peftfx.load(other, tmp_path, inputs=CALL)
