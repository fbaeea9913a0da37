"""Arguments of calls of exported models: `logits_to_keep` and masks do what they do in transformers, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every_model.checks import build
from support.few import but_for

import peftfx
from peftfx import PeftfxError, runtime

TEXT = torch.tensor([[3, 5, 8, 9, 2], [4, 5, 6, 7, 8]])
PLACES = torch.tensor([3, 1])


def test_a_forward_view_gives_logits_of_the_tokens_that_are_asked_for(tmp_path: Path) -> None:
    base = build("text-generation", "llama")
    peftfx.export_onnx(base, tmp_path / "out", view="forward")
    served = runtime.load(tmp_path / "out")
    for text in (TEXT, TEXT[:1, :3]):
        for kept in (0, 1, 2, PLACES[1:]):
            given = {"input_ids": text, "logits_to_keep": kept}
            torch.testing.assert_close(served(**given).logits, base(**given).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(PeftfxError, match=r"the graph does not take this argument \[output_hidden_states\]"):
        served(input_ids=TEXT, output_hidden_states=True)
    assert served(input_ids=TEXT, output_hidden_states=False, use_cache=True, return_dict=True).logits.shape[1] == 5


def test_what_a_call_of_the_export_keeps_is_kept_in_its_graph(tmp_path: Path) -> None:
    base = build("text-generation", "llama")
    peftfx.export_onnx(base, tmp_path / "last", inputs={"input_ids": TEXT, "logits_to_keep": 1})
    last = runtime.load(tmp_path / "last")
    assert last(input_ids=TEXT).logits.shape[1] == 1
    with pytest.raises(PeftfxError, match="does not take this argument"):
        last(input_ids=TEXT, logits_to_keep=2)
    peftfx.export_onnx(base, tmp_path / "places", inputs={"input_ids": TEXT, "logits_to_keep": PLACES})
    places = runtime.load(tmp_path / "places")
    assert places.model.axes["logits_to_keep"] == ("kept",)
    for kept in (PLACES, PLACES[:1], torch.tensor([0, 1, 4])):  # not one for each row
        given = {"input_ids": TEXT, "logits_to_keep": kept}
        torch.testing.assert_close(places(**given).logits, base(**given).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kept", [1, PLACES])
def test_the_decode_view_takes_no_other_arguments(kept: object, tmp_path: Path) -> None:
    base, given = build("text-generation", "llama"), {"input_ids": TEXT, "logits_to_keep": kept}
    with pytest.raises(PeftfxError, match=r"does not take this argument \[logits_to_keep\]"):
        peftfx.export_onnx(base, tmp_path / "out", inputs=given, view="decode")


@pytest.mark.parametrize("kind", but_for({"t5"}, ["llama", "t5"]))
def test_masks_of_other_numbers_are_refused_where_text_is_generated(kind: str, tmp_path: Path) -> None:
    """The graphs take whole numbers, so 0.5 would be 0."""
    base = build("text-generation" if kind == "llama" else "text2text-generation", kind)
    peftfx.export_onnx(base, tmp_path / "out", view="decode")
    ways = [runtime.load(tmp_path / "out")]
    if kind == "llama":
        ways.append(peftfx.transform(base, peftfx.LoRA(r=2, target="all-linear"), seed=0, road="graph"))
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    plain = torch.ones_like(TEXT)
    want = base.generate(input_ids=TEXT, attention_mask=plain, **options)
    for model in ways:
        for mask in (plain, plain.float(), plain.bool()):
            assert torch.equal(model.generate(input_ids=TEXT, attention_mask=mask, **options), want)
        for wrong in (0.5, float("nan"), 2.0, -1.0):
            mask = plain.float()
            mask[1, 0] = wrong
            with pytest.raises(PeftfxError, match=rf"a mask has zeros and ones, not {wrong:g} \[attention_mask\]"):
                model.generate(input_ids=TEXT, attention_mask=mask, **options)
    given = {"input_ids": TEXT, **({"decoder_input_ids": TEXT} if kind == "t5" else {})}
    with pytest.raises(PeftfxError, match=r"a mask is \[batch, length\], not \[2, 1, 5, 5\]"):
        ways[0](**given, attention_mask=torch.ones(2, 1, 5, 5))
