"""Bases whose weights are on disk, in host memory or not there yet: adapters train as over a base that is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from support.adapted import randomise
from support.quantised import tiny
from torch import Tensor
from transformers import LlamaForCausalLM

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel
from peftfx.model.adapted import AdaptedModel

IDS = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
RULE = peftfx.LoRA(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
STARTED = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
RULES = [RULE, peftfx.LlamaAdapter(adapter_len=3, adapter_layers=1), peftfx.PrefixTuning(num_virtual_tokens=3)]


def base() -> LlamaForCausalLM:
    return tiny(num_hidden_layers=1)


def offloaded(folder: Path, to: str = "disk") -> LlamaForCausalLM:
    places = {"model.embed_tokens": "cpu", "model.layers": to, "model.norm": "cpu", "lm_head": to}
    return dispatch_model(
        base(), {**places, "model.rotary_emb": "cpu"}, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def steps(model: AdaptedModel) -> tuple[list[float], Tensor]:
    """The losses of three steps, and the logits after them."""
    randomise(model.adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("rule", RULES, ids=["DoRA", "LlamaAdapter", "PrefixTuning"])
def test_steps_over_a_base_on_disk_are_those_over_a_whole_one(rule: object, tmp_path: Path) -> None:
    model = peftfx.transform(offloaded(tmp_path), rule, seed=0)
    assert model.road == "modules"
    assert model.base.lm_head.weight.is_meta
    torch.testing.assert_close(steps(model), steps(peftfx.transform(base(), rule, seed=0)), atol=0, rtol=0)


def test_hooks_that_move_nothing_leave_the_modules_road() -> None:
    model = peftfx.transform(offloaded(Path(), "cpu"), RULE, seed=0)
    assert (model.road, model.obstacle) == ("modules", "")
    model.merge()


def test_saved_loaded_exported_merged_and_removed(tmp_path: Path) -> None:
    model = peftfx.transform(offloaded(tmp_path / "a"), RULE, seed=0)
    _, want = steps(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peftfx.load(offloaded(tmp_path / "b"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, want, atol=0, rtol=0)
    with pytest.raises(PeftfxError, match="weights of the base are offloaded"):
        model.merge()
    model.export(tmp_path / "onnx", view="forward", merge=True)
    got = OnnxModel(tmp_path / "onnx")(input_ids=IDS, attention_mask=torch.ones_like(IDS))["logits"]
    torch.testing.assert_close(torch.as_tensor(got), want, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.remove()(input_ids=IDS).logits, base()(input_ids=IDS).logits, atol=0, rtol=0)


def test_a_base_is_adapted_on_the_meta_device_and_filled_later() -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(base().config).eval()
    model = peftfx.transform(empty, RULE, seed=0)
    assert all(p.is_meta for p in model.parameters())
    empty.load_state_dict(base().state_dict(), assign=True)
    empty.model.rotary_emb = base().model.rotary_emb  # its buffers are in no state
    with pytest.raises(PeftfxError, match="the adapter's parameters have no values") as error:
        model(input_ids=IDS)
    assert "reset_parameters()" in error.value.hint
    model.reset_parameters(seed=0)
    torch.testing.assert_close(steps(model), steps(peftfx.transform(base(), RULE, seed=0)), atol=0, rtol=0)


def test_an_adapter_is_loaded_onto_weights_that_are_read_from_their_files(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk"}
    for rule in (RULE, peftfx.LoRA(**STARTED), peftfx.DeLoRA(target="attention"), peftfx.OSF(target="attention")):
        model = peftfx.transform(base(), rule, seed=0)
        randomise(model)
        folder = tmp_path / type(rule).__name__ / str(getattr(rule, "use_dora", ""))
        model.save_pretrained(folder)
        whole = LlamaForCausalLM.from_pretrained(
            tmp_path / "base", device_map={**places, "model.rotary_emb": "cpu"}, offload_folder=tmp_path / "disk"
        )
        loaded = peftfx.load(whole, folder)
        assert loaded.base.lm_head.weight.is_meta
        for ids in (IDS, IDS[:1, :4]):
            with torch.no_grad():
                want = model.eval()(input_ids=ids).logits
                torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, want, atol=1e-6, rtol=0)
