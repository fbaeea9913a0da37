"""The decoder as optimum reads it: in a loop like optimum's, by plain ONNX Runtime, token by token what torch gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.adapted import randomise
from support.few import but_for
from support.zoo import ZOO

import peftfx
from peftfx import PeftfxError
from peftfx.export.deployment.merged_decoder import write_merged_decoder

NEW = 6


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def generated(directory: Path, inputs: dict[str, torch.Tensor], start: int) -> np.ndarray:
    """The likeliest tokens: as in optimum, keys and values come from the decoder, and its first past is empty."""
    encoder, decoder = (session(directory / f"{name}.onnx") for name in ("encoder_model", "decoder_model_merged"))
    (hidden,) = encoder.run(["last_hidden_state"], {name: value.numpy() for name, value in inputs.items()})
    shapes = {value.name: value.shape for value in decoder.get_inputs()}
    pasts = [name for name in shapes if name.startswith("past_key_values.")]
    layers = [name.split(".")[1:] for name in pasts]
    assert layers == sorted(layers, key=lambda part: int(part[0])), "optimum zips them with its own by their order"
    assert [part[1:] for part in layers[:4]] == [[s, k] for s in ("decoder", "encoder") for k in ("key", "value")]
    tokens = np.full((len(hidden), 1), start)
    cache = {name: np.zeros((len(hidden), shapes[name][1], 0, shapes[name][3]), np.float32) for name in pasts}
    feed = {"encoder_hidden_states": hidden}
    if "encoder_attention_mask" in shapes:
        feed["encoder_attention_mask"] = inputs["attention_mask"].numpy()
    names = [value.name for value in decoder.get_outputs()]
    for _ in range(NEW):
        made = dict(zip(names, decoder.run(names, {**feed, **cache, "input_ids": tokens[:, -1:]}), strict=True))
        cache = {name: made[name.replace("past_key_values", "present")] for name in pasts}
        tokens = np.concatenate([tokens, made["logits"][:, -1].argmax(-1)[:, None]], axis=1)
    return tokens


@pytest.mark.parametrize("name", but_for({"whisper"}, ["t5", "whisper"]))
def test_the_tokens_are_those_of_the_adapted_model(name: str, tmp_path: Path) -> None:
    adapted = peftfx.transform(ZOO[name].build(), peftfx.LoRA(r=4, target="all-linear"), seed=0).eval()
    randomise(adapted.adapters)
    report = adapted.export(tmp_path / "out", view="decode", merged_decoder=True)
    assert report.bytes["decoder_model_merged.onnx"] < 100_000
    assert [path.name for path in (tmp_path / "out").glob("*.data")] == ["model.onnx.data"]
    inputs = ZOO[name].inputs(3, 6, 5, model=adapted.base)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    start = adapted.base.config.decoder_start_token_id
    options = {"do_sample": False, "suppress_tokens": None, "begin_suppress_tokens": None}
    want = adapted.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, eos_token_id=-1, **options).numpy()
    got = generated(tmp_path / "out", inputs, start)
    np.testing.assert_array_equal(got[:, -want.shape[1] :], want)


def test_a_model_without_an_encoder_is_refused(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(PeftfxError, match=r"is for an encoder-decoder.*\[merged_decoder\]"):
        peftfx.export_onnx(ZOO["llama"].build().eval(), tmp_path / "out", merged_decoder=True, progress=told.append)
    assert not any("write" in line for line in told)
    assert not (tmp_path / "out").exists()
    with pytest.raises(PeftfxError, match="is for an encoder-decoder"):
        write_merged_decoder(tmp_path)
