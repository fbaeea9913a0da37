"""Sounds in views with a cache: encoded once by a graph of their own, then text is generated, as `peft` generates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from sounds.hearing import KINDS, MODELS, SOUND, adapted_by_peft, exported_once, loaded
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.serving.beside_text.sounds import ServedWithSounds
from peftfx.views.finding.named_views import find_view
from peftfx.views.finding.sound_views import find_sounds
from peftfx.views.sounds.views import DecodeWithSounds, SoundEncoder

Inputs = dict[str, Tensor]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def call(base: nn.Module, texts: int, sounds: int, length: int = 11) -> Inputs:
    """A call whose last text of several is padded on the left, as for generation."""
    made = example_inputs(base, sizes={"batch": texts, "sequence": length, "sounds": sounds}, seed=sounds)
    made["attention_mask"] = torch.ones_like(made["attention_mask"])
    if texts > 1:
        ids = made["input_ids"][-1]
        heard = ids == SOUND
        made["input_ids"][-1] = torch.cat([ids[~heard][:2], ids[heard], ids[~heard][2:]])
        made["attention_mask"][-1, :2] = 0
    return made


@pytest.fixture(scope="module")
def served_as(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[peft.PeftModel, ServedWithSounds]]:
    """`served_as(kind)`: the model that `peft` adapted, and its export with a cache, which is made once."""

    exported = exported_once("decode", tmp_path_factory)

    @functools.cache
    def make(kind: str) -> tuple[peft.PeftModel, ServedWithSounds]:
        want, directory = exported(kind)
        found = runtime.load(directory)
        assert isinstance(found, ServedWithSounds)
        return want, found

    return make


@pytest.fixture(params=KINDS)
def served(
    request: pytest.FixtureRequest, served_as: Callable[[str], tuple[peft.PeftModel, ServedWithSounds]]
) -> tuple[peft.PeftModel, ServedWithSounds]:
    return served_as(request.param)


def test_tokens_are_those_of_peft(served: tuple[peft.PeftModel, ServedWithSounds]) -> None:
    want, model = served
    for texts, sounds in ((1, 1), (3, 3), (1, 2), (2, 3)):
        inputs = call(want.get_base_model(), texts, sounds)
        assert torch.equal(model.generate(**inputs, **GREEDY), want.generate(**inputs, **GREEDY))
        with torch.no_grad():
            expected = want(**inputs).logits
        shown = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs)["logits"][shown], expected[shown], atol=3e-5, rtol=3e-4)
    beams = {**GREEDY, "num_beams": 2}
    inputs = call(want.get_base_model(), 2, 2)
    assert torch.equal(model.generate(**inputs, **beams), want.generate(**inputs, **beams))


def test_what_graphs_take_may_be_arrays_and_lists(served: tuple[peft.PeftModel, ServedWithSounds]) -> None:
    want, model = served
    inputs = call(want.get_base_model(), 2, 2)
    expected = want.generate(**inputs, **GREEDY)
    forms: list[Callable[[Tensor], object]] = [
        Tensor.numpy,
        Tensor.tolist,
        lambda v: v if v.is_floating_point() else v.int(),
    ]
    for form in forms:
        given = {name: form(value) for name, value in inputs.items()}
        assert torch.equal(model.generate(**given, **GREEDY), expected)
    text = torch.tensor([[5, -3, 6]])
    with pytest.raises(PeftfxError, match="a token is negative: -3"):
        model.generate(input_ids=text, attention_mask=torch.ones_like(text), **GREEDY)


def test_a_sound_is_heard_and_a_text_needs_none(served: tuple[peft.PeftModel, ServedWithSounds]) -> None:
    want, model = served
    inputs = call(want.get_base_model(), 1, 1)
    other = {**inputs, model.sounds.recording: inputs[model.sounds.recording].flip(1, 2)}
    assert not torch.equal(model(**inputs)["logits"], model(**other)["logits"])
    text = {"input_ids": torch.randint(5, 60, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert torch.equal(model.generate(**text, **GREEDY), want.generate(**text, **GREEDY))


@pytest.mark.parametrize("kind", ["qwen", *(pytest.param(k, marks=pytest.mark.further) for k in MODELS if k != "qwen")])
def test_an_adapted_model_generates_over_its_graphs(kind: str, tmp_path: Path) -> None:
    want = adapted_by_peft(kind, tmp_path)
    inputs = call(want.get_base_model(), 2, 2)
    torch.manual_seed(0)
    ours = peftfx.load(MODELS[kind](), tmp_path, road="graph")
    assert torch.equal(ours.generate(**inputs, **GREEDY), want.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("qwen", "feature_attention_mask"),
        pytest.param("flamingo", "input_features_mask", marks=pytest.mark.further),
    ],
)
def test_masks_say_how_long_sounds_are(
    kind: str, mask: str, served_as: Callable[[str], tuple[peft.PeftModel, ServedWithSounds]]
) -> None:
    want, model = served_as(kind)
    inputs = call(want.get_base_model(), 2, 2)
    inputs[mask][1, 20:] = 0  # 5 of 8 tokens are left
    places = (inputs["input_ids"][1] == SOUND).nonzero().flatten()
    inputs["input_ids"][1, places[5:]] = torch.arange(20, 20 + len(places) - 5)
    assert torch.equal(model.generate(**inputs, **GREEDY), want.generate(**inputs, **GREEDY))
    with pytest.raises(PeftfxError, match="the text has 13 tokens of sounds, and its sounds 16 pieces"):
        model.generate(**{**inputs, mask: torch.ones_like(inputs[mask])}, **GREEDY)
    del inputs[mask]
    with pytest.raises(PeftfxError, match="how long each sound is") as refused:
        model.generate(**inputs, **GREEDY)
    assert refused.value.where == mask


@pytest.fixture
def granite(
    served_as: Callable[[str], tuple[peft.PeftModel, ServedWithSounds]],
) -> tuple[peft.PeftModel, ServedWithSounds]:
    return served_as("granite")


def written(base: nn.Module, frames: int, pieces: int) -> Inputs:
    """One text with a sound of so many frames, and so many tokens for it."""
    random = torch.Generator().manual_seed(frames)
    ids = torch.tensor([[5, *[SOUND] * pieces, 6, 7, 8]])
    recording = torch.randn(1, frames, base.config.encoder_config.input_dim, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": recording}


@pytest.mark.further
@pytest.mark.parametrize("frames", [3, 19, 20, 33, 40, 41, 119])
def test_sounds_may_have_any_length(granite: tuple[peft.PeftModel, ServedWithSounds], frames: int) -> None:
    """Frames are encoded in blocks of 20, the last filled up, and read in windows of 6, of which 2 tokens are left."""
    want, model = granite
    inputs = written(want.get_base_model(), frames, -(-frames // 6) * 2)
    assert torch.equal(model.generate(**inputs, **GREEDY), want.generate(**inputs, **GREEDY))


@pytest.mark.further
def test_a_length_on_the_other_side_of_a_branch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a graph could not have both sides of the branch that fills up a block."""
    monkeypatch.setattr("peftfx.views.capture.with_whole_blocks", lambda graph: graph)
    want = adapted_by_peft("granite", tmp_path / "adapter")
    loaded("granite", tmp_path / "adapter").export(tmp_path / "onnx", view="decode")
    model = runtime.load(tmp_path / "onnx")
    with pytest.raises(PeftfxError, match=r"sound_length is 40, and the graph takes sound_length % 20 > 0"):
        model.generate(**written(want.get_base_model(), 40, 14), **GREEDY)


@pytest.mark.further
def test_a_mask_of_the_forward_says_which_pieces_count(granite: tuple[peft.PeftModel, ServedWithSounds]) -> None:
    want, model = granite
    inputs = written(want.get_base_model(), 33, 9)
    counts = torch.ones(1, 12, dtype=torch.bool)
    counts[0, 9:] = False
    given = {**inputs, "input_features_mask": counts}
    assert torch.equal(model.generate(**given, **GREEDY), want.generate(**given, **GREEDY))
    with pytest.raises(PeftfxError, match="each of the 1 sounds has 12 pieces"):
        model.generate(**inputs, input_features_mask=counts[:, :11], **GREEDY)


@pytest.mark.further
def test_a_text_with_other_tokens_than_its_sounds_have_is_refused(
    granite: tuple[peft.PeftModel, ServedWithSounds],
) -> None:
    want, model = granite
    inputs = written(want.get_base_model(), 33, 11)
    with pytest.raises(PeftfxError, match="the text has 11 tokens of sounds, and its sounds 12 pieces"):
        model.generate(**inputs, **GREEDY)
    del inputs["input_features"]
    with pytest.raises(PeftfxError, match="the text has 11 tokens of sounds, and its sounds 0 pieces"):
        model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("kind", KINDS)
def test_the_views_together_are_the_forward(kind: str) -> None:
    """Without a graph: the model's own forward with recordings, and the two views one after the other."""
    torch.manual_seed(0)
    base = MODELS[kind]()
    encoder, decode = find_view(base, "audio"), find_view(base, "decode")
    assert isinstance(encoder, SoundEncoder)
    assert isinstance(decode, DecodeWithSounds)
    given = call(base, 2, 3)
    names = find_sounds(base).names
    sizes = {"batch": 2, "sequence": given["input_ids"].shape[1], "past": 0}
    with torch.no_grad():
        features = encoder(base, {name: given[name] for name in names if name in given})
        text = {name: given[name] for name in ("input_ids", "attention_mask")}
        inputs = decode.inputs(base, sizes=sizes) | text | features
        inputs["position_ids"] = decode.positions_of(given["attention_mask"])
        got, want = decode(base, inputs)["logits"], base(**given).logits
    shown = given["attention_mask"].bool()
    torch.testing.assert_close(got[shown], want[shown])


@pytest.mark.further
def test_a_prefix_comes_before_a_text_with_sounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_layers=2, token_dim=16)
    options.num_attention_heads = 2
    served, want, inputs = _under_a_prompt(options, tmp_path)

    def logits(tokens: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = want(**{**inputs, "input_ids": tokens, "attention_mask": mask}).logits
        return found

    assert torch.equal(served.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}), _greedy(inputs, logits))


@pytest.mark.further
@pytest.mark.parametrize("kind", ["voxtral", "qwen"])
def test_virtual_tokens_come_before_a_text_with_sounds(kind: str, tmp_path: Path) -> None:
    """`peft` gives such a model embedded tokens, and its code then leaves sounds out: they are written here by hand."""
    torch.manual_seed(0)
    options = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", num_layers=2, token_dim=32)
    options.num_attention_heads = 2
    served, want, inputs = _under_a_prompt(options, tmp_path, kind)
    base = want.get_base_model()
    if kind == "qwen":
        heard = base.model.audio_tower(inputs["input_features"]).last_hidden_state
        features = base.model.multi_modal_projector(heard).flatten(0, 1)
    else:
        features = base.model.get_audio_features(inputs["input_features"]).pooler_output
    rows = want.prompt_encoder["default"].embedding.weight.expand(2, -1, -1)

    def logits(tokens: Tensor, mask: Tensor) -> Tensor:
        text = base.get_input_embeddings()(tokens)
        text[tokens == SOUND] = features
        ahead = torch.ones(2, 3, dtype=torch.long)
        embedded, shown = torch.cat([rows, text], 1), torch.cat([ahead, mask], 1)
        found: Tensor = base(inputs_embeds=embedded, attention_mask=shown).logits
        return found

    assert torch.equal(served.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}), _greedy(inputs, logits))


def _under_a_prompt(
    options: peft.PeftConfig, root: Path, kind: str = "voxtral"
) -> tuple[ServedWithSounds, peft.PeftModel, Inputs]:
    """An exported model under a random soft prompt, what `peft` makes of it, and a call."""
    base = MODELS[kind]()
    want = peft.get_peft_model(base, options).eval()
    with torch.no_grad():
        for weight in want.prompt_encoder.parameters():
            weight.normal_()
    want.save_pretrained(str(root / "adapter"))
    state = {name: value.clone() for name, value in base.state_dict().items()}
    ours = MODELS[kind]()
    ours.load_state_dict(state)
    peftfx.load(ours, root / "adapter").export(root / "onnx", view="decode")
    return runtime.load(root / "onnx"), want, call(base, 2, 2)


def _greedy(inputs: Inputs, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Three tokens more, each from the whole text."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(3):
            tokens = torch.cat([tokens, logits(tokens, mask)[:, -1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return tokens
