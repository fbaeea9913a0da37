"""Videos beside a text are encoded by a graph of their own; what is written is what `peft` and transformers write."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from every_model.checks import build
from support.decoding import assert_writes_the_same
from support.few import but_for
from videos.clips import OPTIONS, SIZE, TASK, call, made, saved

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.errors import PeftfxWarning

pytestmark = pytest.mark.further

SLICED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WHOLE = ("llava_onevision", "llava_next_video")
ONE = [[5, 6, ("video", 4, 1), 7, 8]]
ROWS = [[5, ("video", 4, 1), 7, 8, ("image", 1, 3), 9], [3, 4, 6]]
SEVERAL = [[5, ("video", 4, 1), 7, ("video", 2, 5), 9], [3, ("video", 6, 2), 6, ("image", 1, 4), 8]]
IMAGE = [[("image", 1, 3), 4, 5]]
TEXT = [[4, 5, 9], [7, 8, 3]]


@pytest.mark.parametrize("kind", but_for({"qwen2_5_vl", "llava_next_video"}, (*SLICED, *WHOLE)))
def test_what_is_written_about_videos_is_what_peft_writes(kind: str, tmp_path: Path) -> None:
    want = saved(kind, tmp_path)
    model = peftfx.load(made(kind, tmp_path), tmp_path / "adapter")
    model.export(tmp_path / "out", view="decode", image_size=SIZE, videos=True)
    served = runtime.load(tmp_path / "out")
    assert set(served.graphs) == {"vision_encoder", "video_encoder", "model"}
    said = []
    for rows in (ONE, ROWS, IMAGE, TEXT, [[("video", 8, 6), 3]], *([SEVERAL] if kind in SLICED else [])):
        given = call(want.get_base_model(), rows)
        for beams in (1, 2):
            tokens = assert_writes_the_same(served, want, given, 1e-4, **OPTIONS, num_beams=beams)
            said.append(tuple(tokens[0, -5:].tolist()))
    assert len(set(said)) > 2


def test_a_video_is_encoded_under_the_adapter_of_its_row(tmp_path: Path) -> None:
    wants = {name: saved("qwen2_vl", tmp_path, name, alpha) for name, alpha in (("a", 8), ("b", 3))}
    wants[None] = made("qwen2_vl", tmp_path)
    model = peftfx.load(made("qwen2_vl", tmp_path), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.export(tmp_path / "out", view="decode", image_size=SIZE, videos=True, batched=["a", "b"])
    served, names = runtime.load(tmp_path / "out"), ["b", None, "a"]
    rows = [[5, ("video", 4, 1), 7], [("video", 6, 2), 3, ("image", 1, 1)], [4, ("video", 2, 3), 9, 8]]
    given = call(wants[None], rows)
    said = served.generate(**given, **OPTIONS, adapter_ids=names)
    for row, name in enumerate(names):
        assert torch.equal(said[row], wants[name].generate(**given, **OPTIONS)[row]), name


@pytest.mark.parametrize("kind", but_for({*SLICED, "llava_onevision"}, (*SLICED, *WHOLE)))
def test_adapters_are_swapped_where_videos_are_read(kind: str, tmp_path: Path) -> None:
    """They act where videos are encoded, too."""
    wants = {name: saved(kind, tmp_path, name, alpha) for name, alpha in (("a", 8), ("b", 3))}
    base = made(kind, tmp_path)
    peftfx.export_onnx(base, tmp_path / "out", view="decode", image_size=SIZE, videos=True, slots="all-linear")
    served = runtime.load(tmp_path / "out")
    assert set(served.graphs) == {"vision_encoder", "video_encoder", "model"}
    for name in wants:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the graph does not run these modules", PeftfxWarning)
            ours = peftfx.load(made(kind, tmp_path), tmp_path / name)
            path = peftfx.export_adapter(ours, tmp_path / "out", tmp_path / f"{name}.onnx_adapter")
        served.load_adapter(path, name)
    for rows in (ONE, ROWS, TEXT):
        given, said = call(base, rows), set()
        for name, model in (*wants.items(), (None, base)):
            served.set_adapter(name)
            said.add(tuple(assert_writes_the_same(served, model, given, 1e-4, **OPTIONS)[0, -5:].tolist()))
        assert len(said) == 3


def test_what_the_graphs_do_not_take_is_refused(tmp_path: Path) -> None:
    base = made("qwen2_vl", tmp_path)
    peftfx.export_onnx(base, tmp_path / "out", view="decode", image_size=SIZE, videos=True)
    served = runtime.load(tmp_path / "out")
    given = call(base, ONE)
    other = {**given, "video_grid_thw": torch.tensor([[2, 4, 16]])}
    with pytest.raises(PeftfxError, match=r"made for slices of videos with video_grid_thw \[\[1, 8, 8\]\]"):
        served.generate(**other, **OPTIONS)
    plain = {name: given[name] for name in ("input_ids", "pixel_values_videos", "video_grid_thw")}
    plain["position_ids"] = torch.zeros(4, *plain["input_ids"].shape, dtype=torch.long)
    with pytest.raises(PeftfxError, match=r"the patches of 2 slices, but video_grid_thw \[\[3, 8, 8\]\] counts 3"):
        served(**{**plain, "video_grid_thw": torch.tensor([[3, 8, 8]])})
    fewer = {"pixel_values_videos": plain["pixel_values_videos"][:64], "video_grid_thw": torch.tensor([[1, 8, 8]])}
    with pytest.raises(PeftfxError, match="the text has 32 video tokens, and its videos 16 pieces"):
        served(**{**plain, **fewer})
    with pytest.raises(PeftfxError, match="a call with videos needs the positions of its tokens"):
        served(**{name: value for name, value in plain.items() if name != "position_ids"})
    with pytest.raises(PeftfxError, match="needs this argument too"):
        served(**{name: value for name, value in plain.items() if name != "video_grid_thw"})


def test_an_export_says_why_it_has_no_videos(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match="the model's class has no video encoder that runs by itself"):
        peftfx.export_onnx(build(TASK, "llava"), tmp_path / "out", view="decode", videos=True)
    with pytest.raises(PeftfxError, match="the model's code finds no video at the video token of its config"):
        peftfx.export_onnx(build(TASK, "glm4v"), tmp_path / "out", view="decode", image_size=SIZE, videos=True)
    base = made("qwen2_vl", tmp_path)
    with pytest.raises(PeftfxError, match="a graph of videos goes with one that writes text"):
        peftfx.export_onnx(base, tmp_path / "out", view="forward", image_size=SIZE, videos=True)
    with pytest.warns(PeftfxWarning, match="videos are left out, and text with images is served: pass --videos"):
        peftfx.export_onnx(base, tmp_path / "out", view="decode", image_size=SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]
