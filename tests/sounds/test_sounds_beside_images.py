"""Images and sounds in one text, each encoded by a graph of its own: what is written is what `peft` writes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from every_model.checks import build
from sounds.seeing import KINDS, OPTIONS, SIZE, TASK, call, loaded, made, saved
from support.decoding import assert_writes_the_same
from support.few import but_for
from videos.clips import call as clip_call

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.bases.processors.pictures import pictures_of
from peftfx.errors import PeftfxWarning
from peftfx.views.decode import positions
from peftfx.views.finding.named_views import find_view
from peftfx.views.finding.sound_views import find_sounds, why_not_heard
from peftfx.views.images.encoded import encode_images
from peftfx.views.sounds.encoded import encode_sounds

SEEN, HEARD = ("image", 0, 1), ("sound", 57, 2)
BOTH = [[5, 6, SEEN, 7, HEARD, 8, 9], [4, ("sound", 90, 3), ("image", 0, 4), 3]]
APART = [[5, SEEN, 7], [4, ("sound", 71, 5), 3], [9, 8, 7]]
SEVERAL = [[HEARD, 5, ("sound", 31, 6), SEEN], [3, ("image", 0, 2), 4, ("image", 0, 3)]]
TEXT = [[4, 5, 9], [7, 8, 3]]


def test_a_view_with_both_encoded_gives_what_the_forward_gives() -> None:
    """The views run the model's own code, here on plain tensors, without a graph."""
    base = made("gemma4_unified")
    with pictures_of(SIZE):
        view = find_view(base, "decode")
        given = call(base, BOTH)
        with torch.no_grad():
            want = base(**given).logits
            images = [{n: given[n][i : i + 1] for n, _ in view.images.inputs} for i in range(2)]
            seen = torch.cat([encode_images(base, one, view.images) for one in images])
            heard = encode_sounds(base, {name: given[name] for name in view.sounds.names})
            mask = given["attention_mask"]
            text = {"input_ids": given["input_ids"], "attention_mask": mask, "position_ids": positions(mask)}
            inputs = {**view.inputs(base, sizes={"batch": 2, "past": 0, "sequence": mask.shape[1]}), **text}
            inputs |= {"image_features": seen, "audio_features": heard}
            if "token_type_ids" in inputs:
                inputs["token_type_ids"] = given["mm_token_type_ids"]
            got = view(base, inputs)["logits"]
    assert len(heard) == int((given["input_ids"] == base.config.audio_token_id).sum())
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.further
@pytest.mark.parametrize("kind", but_for({"gemma4", "gemma3n"}, KINDS))
def test_what_is_written_about_both_is_what_peft_writes(kind: str, tmp_path: Path) -> None:
    if kind == "gemma3n":
        pytest.importorskip("timm")
    want = saved(kind, tmp_path / "adapter")
    size = {} if kind == "gemma3n" else {"image_size": SIZE}  # its pictures have one size
    loaded(kind, tmp_path / "adapter").export(tmp_path / "out", view="decode", **size)
    served = runtime.load(tmp_path / "out")
    assert set(served.graphs) == {"vision_encoder", "audio_encoder", "model"}
    said = set()
    for rows in (BOTH, APART, SEVERAL, TEXT, [[5, SEEN, 7]], [[5, HEARD, 7]]):
        given = call(want.get_base_model(), rows)
        for beams in (1, 2) if rows in (BOTH, TEXT) else (1,):
            tokens = assert_writes_the_same(served, want, given, 5e-4, **OPTIONS, num_beams=beams)
        said.add(tuple(tokens[0, -5:].tolist()))
    assert len(said) > 2
    few = call(want.get_base_model(), [[5, HEARD, 7]])
    with pytest.raises(PeftfxError, match="tokens of sounds"):
        served.generate(**{**few, "input_ids": few["input_ids"][:, :-2], "attention_mask": None}, **OPTIONS)


@pytest.mark.further
def test_the_graphs_of_an_adapted_model_write_about_both(tmp_path: Path) -> None:
    """On the graph road, `generate` runs the graphs of the views itself."""
    want = saved("gemma4_unified", tmp_path)
    with pictures_of(SIZE):
        model = peftfx.load(made("gemma4_unified"), tmp_path, road="graph")
        for rows in (BOTH, TEXT):
            given = call(want.get_base_model(), rows)
            assert torch.equal(model.generate(**given, **OPTIONS), want.generate(**given, **OPTIONS))


@pytest.mark.further
def test_sounds_are_heard_beside_trained_tokens(tmp_path: Path) -> None:
    """An adapter's module has two names then, of a tied head: torch's capture gives stand-ins, and sounds were lost."""
    kind = "gemma4_unified"
    want = saved(kind, tmp_path / "adapter", targets="model.", trainable_token_indices=[5, 9])
    loaded(kind, tmp_path / "adapter").export(tmp_path / "out", view="decode", image_size=SIZE)
    served, given = runtime.load(tmp_path / "out"), call(want.get_base_model(), BOTH)
    assert_writes_the_same(served, want, given, 5e-4, **OPTIONS)


@pytest.mark.further
def test_rows_choose_adapters_of_the_layers_of_text_and_images(tmp_path: Path) -> None:
    kind, wants = "gemma4_unified", {}
    for name, alpha in (("a", 8), ("b", 3)):
        wants[name] = saved(kind, tmp_path / name, alpha, "language_model")
    wants[None] = made(kind)
    model = loaded(kind, tmp_path / "a")
    model.load_adapter(tmp_path / "b", "b")
    model.export(tmp_path / "out", view="decode", image_size=SIZE, batched=["default", "b"])
    served, given = runtime.load(tmp_path / "out"), call(wants[None], APART)
    said = served.generate(**given, **OPTIONS, adapter_ids=["b", None, "default"])
    for row, name in enumerate(("b", None, "a")):
        assert torch.equal(said[row], wants[name].generate(**given, **OPTIONS)[row]), name
    saved(kind, tmp_path / "c")
    heard = loaded(kind, tmp_path / "c")
    with pytest.raises(PeftfxError, match="an adapter acts in the sound encoder"):
        heard.export(tmp_path / "out2", view="decode", image_size=SIZE, batched=["default"])


@pytest.mark.further
def test_an_adapter_is_swapped_in_all_graphs(tmp_path: Path) -> None:
    kind = "gemma4_unified"
    want, base = saved(kind, tmp_path / "a", targets="model."), made(kind)  # not the head
    with pictures_of(SIZE):
        peftfx.export_onnx(base, tmp_path / "out", view="decode", image_size=SIZE, slots="all-linear")
        path = peftfx.export_adapter(loaded(kind, tmp_path / "a"), tmp_path / "out", tmp_path / "a.onnx_adapter")
    served, given = runtime.load(tmp_path / "out"), call(base, BOTH)
    for name, model in ((None, base), ("a", want)):
        if name is not None:
            served.load_adapter(path, name)
        assert torch.equal(served.generate(**given, **OPTIONS), model.generate(**given, **OPTIONS))


@pytest.mark.further
@pytest.mark.parametrize("kind", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_a_sound_encoder_that_reads_masks_is_told_by_its_cause(kind: str) -> None:
    with pictures_of(SIZE):
        assert "its code branches on a mask's values" in why_not_heard(build(TASK, kind))


@pytest.mark.further
@pytest.mark.parametrize(("places", "lengths"), [(60, (194, 97)), (24, (97,)), (14, (97,))])
def test_a_recording_has_no_more_pieces_than_a_text_has_places(places: int, lengths: tuple[int, ...]) -> None:
    """One of 194 frames has 25 pieces, and torch takes the size -1 of what is filled up for another."""
    pytest.importorskip("timm")
    base = made("gemma3n")
    base.config.audio_soft_tokens_per_image = places
    assert find_sounds(base).lengths == lengths


def test_a_forward_that_does_more_with_sounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are written where embedded text is handed on only if the code does nothing else with them."""
    base = made("gemma4_unified")
    own = type(base.model).forward

    @functools.wraps(own)
    def louder(self: object, *args: object, input_features: object = None, **kwargs: object) -> object:
        if input_features is not None:
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None] + 1
        return own(self, *args, input_features=input_features, **kwargs)

    monkeypatch.setattr(type(base.model), "forward", louder)
    with pictures_of(SIZE), pytest.raises(PeftfxError, match="other arguments with them"):
        find_sounds(base)


@pytest.mark.further
def test_sounds_are_heard_where_images_are_left_out(tmp_path: Path) -> None:
    """Without a size of pictures, only sounds have a graph; an image is then refused in plain words."""
    kind = "gemma4_unified"
    want = saved(kind, tmp_path / "adapter")
    model = peftfx.load(made(kind), tmp_path / "adapter")
    with pytest.warns(PeftfxWarning, match="images are left out, and text with sounds is served"):
        model.export(tmp_path / "out", view="decode")
    served, base = runtime.load(tmp_path / "out"), want.get_base_model()
    assert set(served.graphs) == {"audio_encoder", "model"}
    for rows in ([[HEARD, 5, 6], [7, ("sound", 33, 4), 8]], TEXT):
        given = {name: value for name, value in call(base, rows).items() if name != "mm_token_type_ids"}
        assert torch.equal(served.generate(**given, **OPTIONS), want.generate(**given, **OPTIONS))
    seen = {name: value for name, value in call(base, [[SEEN, 5]]).items() if name != "mm_token_type_ids"}
    with pytest.raises(PeftfxError, match="does not take this argument"):
        served.generate(**seen, **OPTIONS)


@pytest.mark.further
def test_a_text_has_a_video_and_a_sound(tmp_path: Path) -> None:
    kind = "muse_spark"
    want = saved(kind, tmp_path / "adapter")
    loaded(kind, tmp_path / "adapter").export(tmp_path / "out", view="decode", image_size=SIZE, videos=True)
    served, base = runtime.load(tmp_path / "out"), want.get_base_model()
    assert set(served.graphs) == {"vision_encoder", "video_encoder", "audio_encoder", "model"}
    seen, heard = clip_call(base, [[5, ("video", 4, 1), 7, 8]]), call(base, [[HEARD, 9]])
    texts = {name: torch.cat((seen[name], heard[name]), 1) for name in ("input_ids", "attention_mask")}
    given = {**heard, **seen, **texts}
    assert torch.equal(served.generate(**given, **OPTIONS), want.generate(**given, **OPTIONS))
