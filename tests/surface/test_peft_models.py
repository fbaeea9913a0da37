"""A HF PEFT model is taken over: names, weights and the active adapter; what it computes is what peft computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from support.adapted import randomise
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning

LINEARS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "lora": peft.LoraConfig(r=3, target_modules=LINEARS, modules_to_save=["lm_head"], use_dora=True),
    "pissa": peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "biases": peft.LoraConfig(r=2, target_modules=["down_proj", "v_proj"], bias="all", lora_bias=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ada": peft.AdaLoraConfig(init_r=3, target_modules=LINEARS, total_step=10),
    "tokens": peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
    "lora and tokens": peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "llama": peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).logits


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("lora", "pissa", "prompt") else pytest.mark.slow) for k in CONFIGS]
)
def test_what_peft_computes(kind: str) -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), CONFIGS[kind])
    randomise(theirs)
    want, kept = logits(theirs), dict(theirs.named_parameters())
    ours = peftfx.transform(theirs)
    torch.testing.assert_close(logits(ours), want, rtol=0, atol=1e-5)
    assert ours.active_adapters == ["default"]
    assert ours.adapter("default").rules[0].peft_type == CONFIGS[kind].peft_type
    assert ours.base.model.embed_tokens.weight.data_ptr() in {p.data_ptr() for p in kept.values()}  # shared
    assert torch.equal(logits(theirs), want)  # and it stays what it is
    assert all(p is kept[name] for name, p in theirs.named_parameters())
    ours.train()(input_ids=torch.arange(3, 15).view(2, 6), labels=torch.arange(3, 15).view(2, 6)).loss.backward()
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }


class Attends(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("bias", [True, False])
def test_an_attention_of_torch_in_which_one_layer_of_peft_is_inside_another(bias: bool) -> None:
    theirs = peft.get_peft_model(Attends(bias).eval(), peft.LoraConfig(r=3, target_modules=["attention"]))
    randomise(theirs)
    x = torch.randn(3, 5, 16)
    want = theirs(x).detach()
    ours = peftfx.transform(theirs, inputs={"x": x}).eval()
    torch.testing.assert_close(ours(x), want)
    assert (ours.base(x) - want).abs().max() > 1e-3
    assert torch.equal(theirs(x), want)


def test_several_and_one_more() -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=3, target_modules=LINEARS), "one")
    theirs.add_adapter("default", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    for seed, name in enumerate(("default", "one")):
        theirs.set_adapter(name)
        randomise(theirs, seed)
    want = logits(theirs)
    ours = peftfx.load(theirs)
    assert (sorted(ours.names()), ours.active) == (["default", "one"], ("one",))
    torch.testing.assert_close(logits(ours), want, rtol=0, atol=1e-5)
    ours.set_adapter("default")
    theirs.set_adapter("default")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    theirs.base_model.disable_adapter_layers()
    more = peftfx.transform(theirs, peftfx.IA3(), "more")
    assert more.active == ("more",)
    more.set_adapter(())
    torch.testing.assert_close(logits(more), logits(theirs), rtol=0, atol=1e-5)


def test_what_cannot_be_taken_over_is_refused() -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=3, target_modules=LINEARS))
    theirs.merge_adapter()
    with pytest.raises(PeftfxError, match="merged into the base"):
        peftfx.transform(theirs)
    mixed = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=3, target_modules=LINEARS), mixed=True)
    with pytest.raises(PeftfxError, match="several methods"):
        peftfx.transform(mixed)
    arrow = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    arrow.peft_config["default"].arrow_config = peft.ArrowConfig(top_k=1)
    with pytest.raises(PeftfxError, match=r"mixes several LoRAs .* \[adapter 'default'/adapter_config\.json\]"):
        peftfx.transform(arrow)
    with pytest.raises(PeftfxError, match="no adapter is named"):
        peftfx.load(ZOO["llama"].build())


def test_wrong_arguments_are_told_before_a_model_is_captured(tmp_path: Path) -> None:
    """A capture of a large model takes a minute. This one cannot be captured."""
    model = nn.Module()
    (tmp_path / "notes").write_text("")
    calls: dict[str, Callable[[], object]] = {
        r"no argument 'input'.*\n.*did you mean 'inputs'": lambda: peftfx.load(model, tmp_path, input={}),  # type: ignore[call-arg]
        r"no adapter_config\.json": lambda: peftfx.load(model, tmp_path),
        "unknown method 'lorra'": lambda: peftfx.transform(model, "lorra"),
        "LoRA has no option 'k'": lambda: peftfx.plan(model, "lora(k=4)"),
        "unknown road 'graf'": lambda: peftfx.transform(model, "lora(r=4)", road="graf"),
        "not an earlier output": lambda: peftfx.export_onnx(model, tmp_path),
    }
    for what, call in calls.items():
        with pytest.raises(PeftfxError, match=what):
            call()


def test_a_warning_of_a_config_is_given_once() -> None:
    rule = peft.LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True)
    with pytest.warns(PeftfxWarning) as caught:
        peftfx.transform(ZOO["llama"].build(), rule)
    assert len([w for w in caught if "ensure_weight_tying changes nothing" in str(w.message)]) == 1


@pytest.mark.parametrize("start", but_for({"olora", "orthogonal"}, ["pissa", "olora", "mica", "orthogonal"]))
def test_an_adapter_whose_start_moved_the_base_is_saved_for_the_bases_files(start: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    theirs = peft.get_peft_model(ZOO["llama"].build(), config)
    randomise(theirs)
    want, ours = logits(theirs), peftfx.transform(theirs)
    trained = {n.rpartition(".lora_")[2][0] for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n[-1] for n, p in ours.named_parameters() if p.requires_grad} == trained
    ours.save_pretrained(tmp_path / "own")
    again = peft.PeftModel.from_pretrained(ZOO["llama"].build(), str(tmp_path / "own"))
    torch.testing.assert_close(logits(again), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(peftfx.load(ZOO["llama"].build(), tmp_path / "own")), want, rtol=0, atol=1e-5)
    if start in ("pissa", "olora"):
        ours.add_weighted_adapter(["default"], [0.5], "halved")
        with pytest.raises(PeftfxError, match="whose weights their start moved"):
            ours.save_pretrained(tmp_path / "all")


def test_options_that_are_no_starts_stay(tmp_path: Path) -> None:
    config = peft.MissConfig(r=2, target_modules=["q_proj"], init_weights="bat")
    theirs = peft.get_peft_model(ZOO["llama"].build(), config)
    randomise(theirs)
    torch.testing.assert_close(logits(peftfx.transform(theirs)), logits(theirs), rtol=0, atol=1e-5)


def test_a_merge_waits_until_the_peft_model_is_gone() -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(theirs)
    want, ours = logits(theirs), peftfx.transform(theirs)
    for merge in (ours.merge, ours.merge_adapter):
        with pytest.raises(PeftfxError, match="the model of peft that the adapters were taken from"):
            merge()
    assert torch.equal(logits(theirs), want)
    del theirs
    ours.merge()
    torch.testing.assert_close(logits(ours), want, rtol=0, atol=1e-5)


def test_prompts_are_taken_over_without_their_encoder_and_that_is_said() -> None:
    config = peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(ZOO["llama"].build(), config)
    with pytest.warns(PeftfxWarning, match="without the encoder of its prompts"):
        peftfx.transform(theirs)


@pytest.mark.parametrize("name", ["default", "model"])
def test_what_was_frozen_by_hand_stays_frozen(name: str) -> None:
    theirs = peft.get_peft_model(ZOO["llama"].build(), CONFIGS["lora"], name)
    frozen = ("lora_A", "layers.0", "lm_head")
    for path, parameter in theirs.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not any(part in path for part in frozen))
    ours = peftfx.transform(theirs)
    trained = {path for path, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained
    assert not [path for path in trained if any(part in path for part in frozen)]
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == count


def test_an_adapter_that_was_loaded_to_serve_is_trained_here(tmp_path: Path) -> None:
    peft.get_peft_model(ZOO["llama"].build(), CONFIGS["ia3"]).save_pretrained(tmp_path)
    ours = peftfx.transform(peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path))
    assert all(p.requires_grad for p in ours.adapter("default").parameters())
