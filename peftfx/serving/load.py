"""Load an exported directory in ONNX Runtime, to call it, generate and classify. No torch model is built.

model = peftfx.runtime.load("out")
model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime as ort

from peftfx.bases.processors.beside_text import CROSS_MASK
from peftfx.bases.sentences.steps import SENTENCE
from peftfx.errors import PeftfxError
from peftfx.files import is_file
from peftfx.serving.adapter_file import is_adapter_file
from peftfx.serving.onnx_model import OnnxModel
from peftfx.serving.providers import Provider
from peftfx.serving.served import Served, ServedForward
from peftfx.views.decode import PAST
from peftfx.views.images.encoded import IMAGE_FEATURES
from peftfx.views.sounds.encoded import AUDIO_FEATURES

ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"
VISION_ENCODER, VIDEO_ENCODER, AUDIO_ENCODER = "vision_encoder.onnx", "video_encoder.onnx", "audio_encoder.onnx"


def load(
    directory: str | Path,
    *,
    threads: int = 0,
    options: ort.SessionOptions | None = None,
    adapter: str | Path | None = None,
    providers: Sequence[Provider] = (),
) -> Served:
    """Load a `directory` that `peftfx export` wrote.

    Args:
        directory: the directory. It has `model.onnx`, or the graphs of an encoder and a decoder, and `config.json`.
        threads: the most threads of one operator; 0 lets ONNX Runtime choose.
        options: ONNX Runtime's session options, in place of those that `OnnxModel` chooses.
        adapter: an `.onnx_adapter` to load, if the model was exported with slots; or the name of an adapter that a
            batched export has.
        providers: the execution providers of ONNX Runtime, in order of preference: full names
            (`CUDAExecutionProvider`), short names (`cuda`, `directml`, `openvino`), or pairs of a name and the
            provider's options. The CPU is the default, and always comes last.

    Returns:
        A model with `generate` if it has a cache in and out, a model with `encode` if it embeds sentences, otherwise a
        `Served`.

    Raises:
        PeftfxError: there is no such model, or ONNX Runtime cannot open it or lacks a provider.
    """
    directory = Path(directory)
    if is_adapter_file(directory):
        hint = "peftfx run GRAPH --adapter FILE; in Python, load the graph, and then model.load_adapter(file)"
        raise PeftfxError("this is an adapter for a graph, not a model", str(directory), hint)
    if is_file(directory):
        raise PeftfxError(
            "this is a file of an export, not the export", str(directory), "give the folder that it is in"
        )
    opened = functools.partial(OnnxModel, threads=threads, options=options, providers=providers)
    made = (_encoder_and_decoder if is_file(directory / ENCODER) else _one_graph)(directory, opened)
    if adapter is not None and made.row_adapters:
        made.set_adapter(str(adapter))
    elif adapter is not None:
        made.load_adapter(adapter)
    return made


def _encoder_and_decoder(directory: Path, opened: Callable[[Path], OnnxModel]) -> Served:
    """Return the model whose text is encoded by a graph of its own."""
    from peftfx.serving.beside_text.images import ServedSeq2SeqWithImages
    from peftfx.serving.generators import ServedSeq2Seq

    encoder, decoder = opened(directory / ENCODER), opened(directory / DECODER)
    if is_file(directory / VISION_ENCODER) and IMAGE_FEATURES in encoder.inputs:
        return ServedSeq2SeqWithImages(directory, decoder, encoder, opened(directory / VISION_ENCODER))
    return ServedSeq2Seq(directory, decoder, encoder)


def _one_graph(directory: Path, opened: Callable[[Path], OnnxModel]) -> Served:
    """Return the model whose text is read by one graph, with the encoders of what is beside the text."""
    from peftfx.serving.beside_text.images import ServedOverImages, ServedWithImages
    from peftfx.serving.beside_text.sounds import (
        ServedWithImagesAndSounds,
        ServedWithSounds,
        ServedWithVideosAndSounds,
    )
    from peftfx.serving.beside_text.videos import ServedWithVideos
    from peftfx.serving.generators import ServedGenerator
    from peftfx.serving.sentences import ServedSentences

    model = opened(directory)
    sees = is_file(directory / VISION_ENCODER)
    hears = AUDIO_FEATURES in model.inputs and is_file(directory / AUDIO_ENCODER)
    if sees and IMAGE_FEATURES in model.inputs:
        encoder = opened(directory / VISION_ENCODER)
        sounds = (opened(directory / AUDIO_ENCODER),) if hears else ()
        if is_file(directory / VIDEO_ENCODER):
            watches = ServedWithVideosAndSounds if sounds else ServedWithVideos
            return watches(directory, model, encoder, opened(directory / VIDEO_ENCODER), *sounds)
        return (ServedWithImagesAndSounds if sounds else ServedWithImages)(directory, model, encoder, *sounds)
    if sees and CROSS_MASK in model.inputs:
        return ServedOverImages(directory, model, opened(directory / VISION_ENCODER))
    if hears:
        return ServedWithSounds(directory, model, opened(directory / AUDIO_ENCODER))
    if any(name.startswith(f"{PAST}.") for name in model.inputs):
        return ServedGenerator(directory, model)
    return (ServedSentences if SENTENCE in model.outputs else ServedForward)(directory, model)
