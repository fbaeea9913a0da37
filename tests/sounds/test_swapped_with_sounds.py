"""Adapters are swapped in exports of models of text and sounds, in a forward view and in views with a cache."""

from __future__ import annotations

import threading
from pathlib import Path

import peft
import pytest
import torch
from sounds.hearing import MODELS, adapted_by_peft, loaded
from support.adapted import randomise

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.serving.served import Served

pytestmark = pytest.mark.further

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def swapped(kind: str, view: str, root: Path) -> tuple[Served, dict[str | None, torch.nn.Module]]:
    """An export with slots, into which two adapters were put; and the models that `peft` adapted, by name."""
    torch.manual_seed(0)
    base = MODELS[kind]()
    peftfx.export_onnx(base, root / "out", slots="all-linear", view=view)
    served, wants = runtime.load(root / "out"), dict[str | None, torch.nn.Module]({None: base})
    for name, alpha in (("a", 8), ("b", 3)):
        wants[name] = adapted_by_peft(kind, root / name, alpha)
        served.load_adapter(peftfx.export_adapter(loaded(kind, root / name), root / "out", root / f"{name}_"), name)
    return served, wants


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_text_is_generated_under_each_adapter(kind: str, tmp_path: Path) -> None:
    served, wants = swapped(kind, "decode", tmp_path)
    for texts, sounds in ((1, 1), (2, 3)):
        inputs = example_inputs(MODELS[kind](), sizes={"batch": texts, "sequence": 9, "sounds": sounds}, seed=texts)
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        for name, want in wants.items():
            served.set_adapter(name)
            assert torch.equal(served.generate(**inputs, **GREEDY), want.generate(**inputs, **GREEDY)), name


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_forward_takes_any_number_of_sounds(kind: str, tmp_path: Path) -> None:
    served, wants = swapped(kind, "forward", tmp_path)
    for texts, sounds in ((1, 1), (3, 2), (2, 5)):
        inputs = example_inputs(MODELS[kind](), sizes={"batch": texts, "sequence": 9, "sounds": sounds}, seed=texts)
        shown = inputs["attention_mask"].bool()
        for name, want in wants.items():
            served.set_adapter(name)
            with torch.no_grad():
                expected = want(**inputs).logits
            torch.testing.assert_close(served(**inputs)["logits"][shown], expected[shown], atol=3e-5, rtol=3e-4)


def test_a_call_is_one_adapter_s_in_both_graphs(tmp_path: Path) -> None:
    """Another thread makes an adapter active between the graph of sounds and that of the text."""
    served, wants = swapped("voxtral", "decode", tmp_path)
    inputs = example_inputs(MODELS["voxtral"](), sizes={"batch": 1, "sequence": 9}, seed=2)
    encode = served.encode_sounds

    def switching(*given: object) -> object:
        features = encode(*given)
        thread = threading.Thread(target=served.set_adapter, args=("b",))
        thread.start(), thread.join()
        return features

    served.set_adapter("a")
    served.encode_sounds = switching
    with torch.no_grad():
        torch.testing.assert_close(served(**inputs)["logits"], wants["a"](**inputs).logits, atol=3e-5, rtol=3e-4)
    assert served.active == "b"


def test_a_prefix_is_put_into_a_graph_of_a_text_with_sounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = MODELS["voxtral"]()
    peftfx.export_onnx(base, tmp_path / "out", slots="all-linear", view="decode")
    torch.manual_seed(0)
    options = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_layers=2, token_dim=16)
    options.num_attention_heads = 2
    want = peft.get_peft_model(MODELS["voxtral"](), options).eval()
    randomise(want)
    want.save_pretrained(str(tmp_path / "a"))
    served = runtime.load(tmp_path / "out")
    ours = loaded("voxtral", tmp_path / "a")
    served.load_adapter(peftfx.export_adapter(ours, tmp_path / "out", tmp_path / "a_"), "a")
    inputs = example_inputs(base, sizes={"batch": 1, "sequence": 9}, seed=4)
    tokens = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(3):
            given = {**inputs, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            tokens = torch.cat([tokens, want(**given).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(served.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}), tokens)


def test_each_row_has_its_adapter_beside_sounds(tmp_path: Path) -> None:
    wants: dict[str | None, torch.nn.Module] = {}
    for name, alpha in (("a", 8), ("b", 3)):
        torch.manual_seed(0)
        options = peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)")
        wants[name] = peft.get_peft_model(MODELS["voxtral"](), options).eval()
        randomise(wants[name])
        wants[name].save_pretrained(str(tmp_path / name))
    model = loaded("voxtral", tmp_path / "a")
    wants[None] = model.get_base_model()
    model.load_adapter(tmp_path / "b", "b")
    model.export(tmp_path / "out", view="decode", batched=["default", "b"])
    served, names = runtime.load(tmp_path / "out"), ["b", None, "default"]
    inputs = example_inputs(MODELS["voxtral"](), sizes={"batch": 3, "sequence": 9, "sounds": 4}, seed=3)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    for beams in (1, 2):
        said = served.generate(**inputs, **GREEDY, num_beams=beams, adapter_ids=names)
        logits = served(**inputs, adapter_ids=names)["logits"]
        for row, name in enumerate(("b", None, "a")):
            assert torch.equal(said[row], wants[name].generate(**inputs, **GREEDY, num_beams=beams)[row])
            with torch.no_grad():
                expected = wants[name](**inputs).logits
            torch.testing.assert_close(logits[row], expected[row], atol=3e-5, rtol=3e-4)


def test_an_adapter_in_the_sound_encoder_cannot_be_of_a_row(tmp_path: Path) -> None:
    ours = peftfx.transform(MODELS["voxtral"](), peftfx.LoRA(r=2, target="attention.query"), "low")
    with pytest.raises(PeftfxError, match="an adapter acts in the sound encoder") as refused:
        ours.export(tmp_path / "out", view="decode", batched=["low"])
    assert refused.value.where == "model.audio_tower.layers.0.self_attn.q_proj"
    assert not list(tmp_path.iterdir())
