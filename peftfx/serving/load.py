"""Load an exported directory in ONNX Runtime, to call it, generate and classify. No torch model is built.

model = peftfx.runtime.load("out")
model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
"""

from __future__ import annotations

from collections.abc import Sequence
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
    from peftfx.serving.beside_text.images import ServedOverImages, ServedSeq2SeqWithImages, ServedWithImages
    from peftfx.serving.beside_text.sounds import ServedWithSounds
    from peftfx.serving.beside_text.videos import ServedWithVideos
    from peftfx.serving.generators import ServedGenerator, ServedSeq2Seq
    from peftfx.serving.sentences import ServedSentences

    directory = Path(directory)
    if is_adapter_file(directory):
        hint = "peftfx run GRAPH --adapter FILE; in Python, load the graph, and then model.load_adapter(file)"
        raise PeftfxError("this is an adapter for a graph, not a model", str(directory), hint)
    if is_file(directory):
        raise PeftfxError(
            "this is a file of an export, not the export", str(directory), "give the folder that it is in"
        )
    if is_file(directory / ENCODER):
        encoder, decoder = (
            OnnxModel(directory / name, threads=threads, options=options, providers=providers)
            for name in (ENCODER, DECODER)
        )
        if is_file(directory / VISION_ENCODER) and IMAGE_FEATURES in encoder.inputs:
            vision = OnnxModel(directory / VISION_ENCODER, threads=threads, options=options, providers=providers)
            made: Served = ServedSeq2SeqWithImages(directory, decoder, encoder, vision)
        else:
            made = ServedSeq2Seq(directory, decoder, encoder)
    else:
        model = OnnxModel(directory, threads=threads, options=options, providers=providers)
        if is_file(directory / VISION_ENCODER) and IMAGE_FEATURES in model.inputs:
            encoder = OnnxModel(directory / VISION_ENCODER, threads=threads, options=options, providers=providers)
            made = ServedWithImages(directory, model, encoder)
            if is_file(directory / VIDEO_ENCODER):
                videos = OnnxModel(directory / VIDEO_ENCODER, threads=threads, options=options, providers=providers)
                made = ServedWithVideos(directory, model, encoder, videos)
        elif is_file(directory / VISION_ENCODER) and CROSS_MASK in model.inputs:
            encoder = OnnxModel(directory / VISION_ENCODER, threads=threads, options=options, providers=providers)
            made = ServedOverImages(directory, model, encoder)
        elif is_file(directory / AUDIO_ENCODER) and AUDIO_FEATURES in model.inputs:
            encoder = OnnxModel(directory / AUDIO_ENCODER, threads=threads, options=options, providers=providers)
            made = ServedWithSounds(directory, model, encoder)
        elif any(name.startswith(f"{PAST}.") for name in model.inputs):
            made = ServedGenerator(directory, model)
        else:
            made = (ServedSentences if SENTENCE in model.outputs else ServedForward)(directory, model)
    if adapter is not None and made.row_adapters:
        made.set_adapter(str(adapter))
    elif adapter is not None:
        made.load_adapter(adapter)
    return made
