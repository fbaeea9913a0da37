"""Tensors of `peft` into an adapter that is there: by a state, a swap, or `load_adapter` of a name that is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import adapt, randomise
from support.zoo import ZOO
from torch import nn

import peftfx
from peftfx import PeftfxError

AT: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"]}
LORA: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte", "lm_head"]}),  # one weight, which the state has twice
        ("gemma2", {"target_modules": ["embed_tokens", "lm_head"]}),
    ],
)
def test_a_state_of_peft(base: str, options: dict[str, list[str]], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(ZOO[base].build(), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    ours = peftfx.transform(ZOO[base].build(), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **options)).eval()
    given = ZOO[base].inputs(3, 7, model=ours.base)
    randomise(theirs, 3)
    peftfx.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=0, atol=1e-5)
    randomise(theirs, 4)
    theirs.save_pretrained(str(tmp_path))
    peftfx.hotswap_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=0, atol=1e-5)


def test_an_adapter_in_the_place_of_one_that_is_not_trained_is_not_trained(tmp_path: Path) -> None:
    adapt("llama", "lora(r=5)@attention.query").save_pretrained(tmp_path)
    ours = adapt("llama", "lora(r=3)@attention.query")
    ours.add_adapter("more", "lora(r=2)@mlp.up")
    peftfx.hotswap_adapter(ours, tmp_path)  # of another rank: with tensors of its own
    trained = {name.split(".")[1] for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {"more"}


OWN = ["oft(oft_block_size=4)", "fourierft(n_frequency=10)", "vera(r=4)", "boft", "psoft(r=8)", "adalora"]


@pytest.mark.parametrize("rule", OWN)
def test_a_models_own_state(rule: str) -> None:
    adapted = adapt("gpt2", f"{rule}@mlp.up")
    own = {name: 1.5 * tensor for name, tensor in peftfx.get_peft_model_state_dict(adapted).items()}
    peftfx.set_peft_model_state_dict(adapted, own)
    got = peftfx.get_peft_model_state_dict(adapted)
    assert own
    assert all(torch.equal(got[name], tensor) for name, tensor in own.items())


def saved(base: nn.Module, config: peft.PeftConfig, directory: Path, seed: int) -> Path:
    """An adapter of `peft` in a directory, random."""
    made = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    randomise(made, seed)
    made.save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_a_file_for_a_name_that_is_taken_is_read_into_its_adapter(road: str, tmp_path: Path) -> None:
    """As in `peft`: the parameters stay, so an optimizer goes on with them; what is active stays."""
    base, config = ZOO["llama"].build(), peft.LoraConfig(**LORA)
    first, second = (saved(base, config, tmp_path / str(seed), seed) for seed in (3, 5))
    ours = peftfx.load(copy.deepcopy(base), first, road=road).eval()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(first), is_trainable=True).eval()
    ours.add_adapter("other", peftfx.IA3(target="mlp.down"))
    given = ZOO["llama"].inputs(2, 6, model=base, labels=True)
    for model in (ours, theirs):
        model.set_adapter("default")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for path in (None, second, None):
            if path is not None:
                model.load_adapter(str(path), "default", is_trainable=True)
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    close(ours(**given).logits, theirs(**given).logits)
    ours.set_adapter("other")
    ours.load_adapter(second, "default", is_trainable=False)
    assert ours.active == ("other",)
    assert not any(p.requires_grad for p in ours.adapter("default").parameters())
    theirs.load_adapter(str(second), "default")
    ours.set_adapter("default")
    close(ours(**given).logits, theirs(**given).logits)


def steps(model: nn.Module, given: dict[str, torch.Tensor], count: int = 1, *, allocate: bool = False) -> torch.Tensor:
    """The logits after steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(count):
        model.train()(**given).loss.backward()
        optimizer.step()
        if allocate:
            model.update_and_allocate(step)  # type: ignore[operator]
        optimizer.zero_grad()
    return model.eval()(**given).logits.detach()


ALLOCATED = peftfx.AdaLoRA(init_r=4, target_r=2, total_step=6, tinit=1, tfinal=2, target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize("put", ["load", "swap", "state"])
@pytest.mark.parametrize("rule", [ALLOCATED, peftfx.LoRA(r=2, init_lora_weights="pissa_niter_4", **AT)])
def test_an_adapters_own_file_is_read_into_it_in_whatever_form(rule: Any, put: str, tmp_path: Path) -> None:
    """A file of AdaLoRA has the ranks that are left, one of a random start has the start: both were refused."""
    ours = peftfx.transform(ZOO["llama"].build(), rule)
    given = ZOO["llama"].inputs(2, 6, model=ours.base, labels=True)
    want, kept = steps(ours, given, 6, allocate=rule is ALLOCATED), {n: id(p) for n, p in ours.named_parameters()}
    ours.save_pretrained(tmp_path / "own")
    state = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert not torch.allclose(steps(ours, given), want, atol=1e-4)
    if put == "load":
        ours.load_adapter(tmp_path / "own", "default")
    elif put == "swap":
        peftfx.hotswap_adapter(ours, tmp_path / "own")
    else:
        peftfx.set_peft_model_state_dict(ours, state)
    torch.testing.assert_close(ours(**given).logits, want, rtol=0, atol=1e-6)
    assert {n: id(p) for n, p in ours.named_parameters()} == kept
    torch.testing.assert_close(peftfx.get_peft_model_state_dict(ours), state, rtol=0, atol=0)
    other = peftfx.transform(ZOO["llama"].build(), rule)
    randomise(other, 5)
    other.save_pretrained(tmp_path / "other")
    if rule is ALLOCATED:  # all ranks are in this file, and in the adapter after it
        ours.load_adapter(tmp_path / "other", "default")
        torch.testing.assert_close(ours(**given).logits, other.eval()(**given).logits, rtol=0, atol=1e-6)
        got = peftfx.get_peft_model_state_dict(ours)
        torch.testing.assert_close(got, peftfx.get_peft_model_state_dict(other), rtol=0, atol=0)


@pytest.mark.parametrize("put", [peftfx.hotswap_adapter, lambda model, path: model.load_adapter(path, "default")])
def test_a_file_is_read_where_other_code_has_switched_dropout_off(
    put: Callable[[peftfx.model.adapted.AdaptedModel, Path], object], tmp_path: Path
) -> None:
    """As TRL's `disable_dropout` does. The rate that counts is the one that was asked for: this was refused."""
    base, config = ZOO["llama"].build(), peft.LoraConfig(**LORA, lora_dropout=0.3)
    first, second = (saved(base, config, tmp_path / str(seed), seed) for seed in (3, 5))
    ours = peftfx.load(copy.deepcopy(base), first)
    kept = list(ours.adapter("default").parameters())
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    put(ours.train(), second)
    assert all(one is other for one, other in zip(kept, ours.adapter("default").parameters(), strict=True))
    given = ZOO["llama"].inputs(2, 6, model=base)
    close(ours(**given).logits, peftfx.load(copy.deepcopy(base), second).eval()(**given).logits)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(**LORA | {"r": 2}), r"other ranks(.|\n)*under another name; or(.|\n)*hotswap_adapter"),
        (peft.LoraConfig(**LORA, lora_alpha=3), "scales"),
        (peft.LoraConfig(**LORA | {"modules_to_save": None}), "options differ"),
        (
            peft.LoraConfig(**LORA | {"target_modules": ["q_proj", "up_proj", "k_proj"]}, use_rslora=True),
            r"it acts at 'model\.layers\.0\.self_attn\.k_proj', and(.|\n)*use_rslora is True in the file, and False",
        ),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "options differ"),
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "options differ"),
    ],
)
def test_a_file_of_another_adapter_is_not_read_into_it(config: peft.PeftConfig, message: str, tmp_path: Path) -> None:
    base = ZOO["llama"].build()
    ours = peftfx.load(base, saved(base, peft.LoraConfig(**LORA), tmp_path / "own", 3))
    kept = {name: tensor.clone() for name, tensor in ours.adapter("default").tensors()}
    other = saved(ZOO["llama"].build(), config, tmp_path / "other", 5)
    with pytest.raises(PeftfxError, match=message):
        ours.load_adapter(other, "default")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ours.adapter("default").tensors())


def test_an_adapter_beside_that_of_a_peft_model_has_a_name_of_its_own(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(**LORA))
    with pytest.raises(PeftfxError, match="already an adapter named 'default'"):
        peftfx.load(theirs, saved(ZOO["llama"].build(), peft.LoraConfig(**LORA), tmp_path, 3))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_do_not_act_are_those_of_the_new_file(tmp_path: Path) -> None:
    """Saved again after a swap, those of the first file were beside the tensors of the second."""
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    base = hf.BartForCausalLM(hf.BartConfig(vocab_size=99, **sizes, is_decoder=True))
    for name in ("first", "second"):  # a call with tokens alone runs no attention to an encoder
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules="all-linear")).save_pretrained(
            str(tmp_path / name)
        )
    want = load_file(tmp_path / "second" / "adapter_model.safetensors")
    for put in (
        lambda model: peftfx.hotswap_adapter(model, tmp_path / "second"),
        lambda model: model.load_adapter(tmp_path / "second", "default"),
        lambda model: peftfx.set_peft_model_state_dict(model, want),
    ):
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "first")
        put(ours)
        ours.save_pretrained(tmp_path / "again")
        got = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert any(".encoder_attn." in name for name in got)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
