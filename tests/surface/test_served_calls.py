"""What users pass to a served model: tensors, arrays and lists; tokens that torch refuses are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.zoo import ZOO

import peftfx
from peftfx.errors import PeftfxError

IDS = torch.tensor([[3, 5, 8, 9], [4, 4, 7, 6]])


@pytest.fixture(scope="module", params=["decode", "forward"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / request.param
    peftfx.export_onnx(ZOO["llama"].build().eval(), directory, view=request.param)
    return directory


def test_arrays_lists_and_short_integers_are_taken(exported: Path) -> None:
    served, mask = peftfx.runtime.load(exported), torch.ones_like(IDS)
    want = served(input_ids=IDS, attention_mask=mask).logits
    kinds = (np.asarray, torch.Tensor.tolist, torch.Tensor.int, lambda t: t.numpy().astype(">u4"))
    for kind in kinds:
        assert torch.equal(served(input_ids=kind(IDS), attention_mask=kind(mask)).logits, want)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"tokens are rows of whole numbers, not int64 \[4\]"),
        (IDS.float(), r"tokens are rows of whole numbers, not float32 \[2, 4\]"),
        ([[1, 2], [3]], "not a tensor"),
        ("a text", "tokens are rows of whole numbers, not 'a text'"),
        (IDS - 4, "a token is negative: -1"),
    ],
    ids=["one row", "floats", "ragged", "text", "negative"],
)
def test_other_tokens_are_refused(exported: Path, ids: object, message: str) -> None:
    with pytest.raises(PeftfxError, match=message):
        peftfx.runtime.load(exported)(input_ids=ids)


def test_a_mask_of_floats_is_that_of_whole_numbers(exported: Path) -> None:
    served, mask = peftfx.runtime.load(exported), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    want = served(input_ids=IDS, attention_mask=mask).logits
    assert torch.equal(served(input_ids=IDS, attention_mask=mask.float()).logits, want)
    with pytest.raises(PeftfxError, match=r"a mask has zeros and ones, not 0\.5"):
        served(input_ids=IDS, attention_mask=mask * 0.5)


def test_a_mask_shorter_than_the_text_is_refused(exported: Path) -> None:
    """transformers takes it as a mask that hides the last tokens, and its `generate` fails."""
    served = peftfx.runtime.load(exported)
    decodes = served.can_generate()
    message = "the mask tells of 3 tokens, and there are 4" if decodes else r"3 in attention_mask"
    with pytest.raises(PeftfxError, match=message):
        served(input_ids=IDS, attention_mask=torch.ones(2, 3))
    if decodes:
        cache = served(input_ids=IDS).cache
        with pytest.raises(PeftfxError, match=r"of 4 tokens, and there are 5(.|\n)*the 4 in the cache too"):
            served(input_ids=IDS[:, :1], attention_mask=torch.ones_like(IDS), cache=cache)


def test_names_of_adapters_need_a_batched_export(exported: Path) -> None:
    with pytest.raises(PeftfxError, match=r"no adapters to choose from(.|\n)*--batched"):
        peftfx.runtime.load(exported)(input_ids=IDS, adapter_names=["one", "__base__"])


def test_generation_takes_arrays_and_lists(exported: Path) -> None:
    served, mask = peftfx.runtime.load(exported), torch.ones_like(IDS)
    if exported.name == "forward":
        return
    want = served.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=[98])
    for kind in (np.asarray, torch.Tensor.tolist, torch.Tensor.int):
        got = served.generate(
            kind(IDS), attention_mask=kind(mask), max_new_tokens=3, do_sample=False, eos_token_id=[98]
        )
        assert torch.equal(got, want)
    with pytest.raises(PeftfxError, match="tokens are rows"):
        served.generate(IDS[0])


def test_a_model_of_sounds_generates_from_arrays_and_lists(tmp_path: Path) -> None:
    model = ZOO["whisper"].build().eval()
    peftfx.export_onnx(model, tmp_path / "out", view="decode")
    served, heard = peftfx.runtime.load(tmp_path / "out"), ZOO["whisper"].inputs(model=model)["input_features"]
    want = served.generate(heard, max_new_tokens=3, do_sample=False)
    for kind in (np.asarray, torch.Tensor.tolist):
        assert torch.equal(served.generate(kind(heard), max_new_tokens=3, do_sample=False), want)
        assert torch.equal(served.generate(input_features=kind(heard), max_new_tokens=3, do_sample=False), want)


def test_pixels_are_cast_to_what_the_graph_takes(tmp_path: Path) -> None:
    model = ZOO["vit"].build().eval()
    peftfx.export_onnx(model, tmp_path / "out", view="forward")
    served, pixels = peftfx.runtime.load(tmp_path / "out"), ZOO["vit"].inputs(model=model)["pixel_values"]
    want = served(pixel_values=pixels).logits
    assert torch.equal(served(pixel_values=pixels.double()).logits, want)
    assert torch.equal(served(pixel_values=pixels.numpy()).logits, want)
