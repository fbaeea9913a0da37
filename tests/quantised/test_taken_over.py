"""A HF PEFT model over a base of bitsandbytes is taken over: both models compute what it computed before."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from quantised import in_memory as made
from support import quantised as q
from support.adapted import randomise
from support.few import but_further
from torch import Tensor, nn

import peftfx

pytest.importorskip("bitsandbytes")
IDS = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
KINDS = {
    "int8": made.bitsandbytes8,
    "nf4": lambda model: made.bitsandbytes4(model, "nf4", double=True),
    "fp4": lambda model: made.bitsandbytes4(model, "fp4", double=False),
}
CONFIG = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


def theirs(kind: str) -> peft.PeftModel:
    base = KINDS[kind](q.tiny()).eval()
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"
    model = peft.get_peft_model(base, copy.deepcopy(CONFIG))
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    for seed, name in enumerate(("more", "default")):
        model.set_adapter(name)
        randomise(model, seed)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran"])
@pytest.mark.parametrize("kind", but_further({"fp4"}, KINDS))
@pytest.mark.filterwarnings("ignore:.*rounded the scales of")
def test_both_models_compute_what_they_did_whichever_is_called_first(kind: str, ran: bool) -> None:
    for ours_first in (False, True):
        model = theirs(kind)
        if ran:
            logits(model)
        ours = peftfx.transform(model)
        for name in ("default", "more"):
            model.set_adapter(name)
            ours.set_adapter(name)
            other = theirs(kind)
            other.set_adapter(name)
            for ids in (IDS, IDS[:1, :4]):
                for one in (ours, model) if ours_first else (model, ours):
                    torch.testing.assert_close(logits(one, ids), logits(other, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", but_further({"fp4"}, KINDS))
def test_ours_trains_as_theirs_would_and_leaves_theirs_as_it_is(kind: str, tmp_path: Path) -> None:
    model, other = theirs(kind), theirs(kind)
    ours = peftfx.transform(model)
    first = logits(theirs(kind))
    for one in (ours, other):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            one.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(ours), logits(other), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-5)
    ours.save_pretrained(tmp_path / "own")
    want = logits(peftfx.load(KINDS[kind](q.tiny()).eval(), tmp_path / "own").floating())
    torch.testing.assert_close(logits(ours.floating()), want, rtol=0, atol=1e-5)
    ours.export(tmp_path / "out", view="forward")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", but_further({"fp4"}, KINDS))
def test_over_a_base_in_bfloat16_a_lora_is_rounded_before_it_is_added(kind: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        made = KINDS[kind](q.tiny().to(torch.bfloat16))
        made.is_loaded_in_8bit, made.is_loaded_in_4bit = kind == "int8", kind != "int8"
        return made

    other = peft.get_peft_model(base(), copy.deepcopy(CONFIG))
    randomise(other)
    other.save_pretrained(tmp_path)
    ours = peftfx.load(base(), tmp_path)
    for ids in (IDS, IDS[:1, :4], IDS):
        losses = []
        for one in (ours, other):
            one.zero_grad()
            loss = one.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                for p in one.parameters():
                    if p.requires_grad:
                        p.sub_(0.1 * p.grad)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(ours), logits(other), rtol=0, atol=1e-3)
