"""What prompts with images and prompts with sounds have in common: the processor, and what it makes of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from peftfx.bases.chats import filled_template
from peftfx.bases.processors.token_types import MODALITIES, TYPES
from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError
from peftfx.serving.runs.asked import Asked, Found
from peftfx.serving.runs.streaming import Writer
from peftfx.views.images.encoded import Images

TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Beside:
    """What a prompt has beside it.

    Attributes:
        word: its name in the messages of chat templates and among the arguments of the processors' calls.
        plural: its name in messages.
        argument: the argument of a processor's call.
        parts: names that a processor has for the part that reads it.
        written: the attribute of a processor with the token that stands for one in a prompt.
    """

    word: str
    plural: str
    argument: str
    parts: tuple[str, ...]
    written: str


WITH_IMAGES = Beside("image", "images", "images", ("image_processor",), "image_token")
WITH_VIDEOS = Beside("video", "videos", "videos", ("video_processor",), "video_token")
WITH_SOUNDS = Beside("audio", "sounds", "audio", ("feature_extractor", "audio_processor"), "audio_token")


@dataclass(frozen=True)
class GivenBeside:
    """What a run gives beside its prompt.

    Attributes:
        kind: what it is.
        values: the images, videos or sounds, as processors take them.
        token: the token that stands for a piece of one.
    """

    kind: Beside
    values: Sequence[Any]
    token: int


def processor_of(directory: Path, *kinds: Beside) -> Any:
    """Load the processor of text and of what is beside it, such as images, in a directory.

    Raises:
        PeftfxError: the directory has no such processor.
    """
    from transformers import AutoProcessor

    hint = "put the base model's processor files there"
    with understanding(directory, "no processor can be loaded", hint):
        found = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    for kind in kinds:
        if not any(hasattr(found, part) for part in kind.parts) or not hasattr(found, "tokenizer"):
            raise PeftfxError(f"the directory has no processor of text and {kind.plural}", str(directory), hint)
    return found


def processed(processor: Any, asked: Asked, *given: GivenBeside, **options: object) -> Any:
    """Return what a processor makes of the prompt and of what is beside it.

    Some processors put tokens for images before a prompt themselves, and others want them in it. With a chat template,
    they go where the template puts them.

    Args:
        processor: the processor.
        asked: what the user asks for.
        given: what is beside the prompt.
        options: more arguments of the processor's call.
    """
    assert asked.prompt is not None
    beside = {**{one.kind.argument: one.values for one in given}, **options, "return_tensors": "pt"}
    if asked.chat:
        return dict(processor(text=_templated(processor, asked, given), **beside))
    with suppress(Exception):  # whatever a processor raises for a prompt without these tokens
        made = dict(processor(text=asked.prompt, **beside))
        if all(bool((made["input_ids"] == one.token).any()) for one in given):
            return made
    return dict(processor(text=_with_tokens(processor, asked.prompt, given), **beside))


def _with_tokens(processor: Any, prompt: str, given: Sequence[GivenBeside]) -> str:
    """Return the prompt with a token before it for each image or sound, unless it has such tokens already."""
    before = ""
    for one in given:
        token = getattr(processor, one.kind.written, None)
        if isinstance(token, str) and token not in prompt:
            before += token * len(one.values)
    return before + prompt


def _templated(processor: Any, asked: Asked, given: Sequence[GivenBeside]) -> str:
    beside = [{"type": one.kind.word} for one in given for _ in one.values]
    content = [*beside, {"type": "text", "text": asked.prompt}]
    said = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": False}
    return str(filled_template(processor, said, str(asked.directory), "leave --chat out", **options))


def idle_outputs(images: Images | None, made: Mapping[str, Tensor]) -> set[str]:
    """Return the outputs of a processor that change nothing: labels, and types of tokens that the model does not read.

    Args:
        images: how the model reads images; None if it reads none.
        made: the outputs.
    """
    unread = set() if images is None or images.typed or images.sections else {MODALITIES, TYPES}
    return unread | {name for name in made if name.endswith(TYPES) and not made[name].any()} | {"labels"}


def types_in(images: Images, made: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the types of tokens that the graphs take, or that positions are computed from."""
    if (images.sections or images.typed) and MODALITIES in made:
        return (MODALITIES,)
    return (TYPES,) if images.typed else ()


def taken_by_graphs(
    made: dict[str, Any], known: Collection[str], directory: Path, idle: Collection[str]
) -> dict[str, Tensor]:
    """Return those outputs of a processor that the graphs take.

    Args:
        made: the outputs.
        known: the names of those that the graphs take.
        directory: the directory, for the error.
        idle: the names of outputs that no model would take.

    Raises:
        PeftfxError: the processor makes other outputs, which the graphs would not see, or lacks one.
    """
    lost = [name for name in made if name not in known and name not in idle]
    missing = [name for name in known if name not in made]
    if lost or missing:
        name = (lost or missing)[0]
        what = f"the processor makes {name}, which the graphs do not take" if lost else f"the processor makes no {name}"
        raise PeftfxError(what, str(directory), "run the model by transformers, or export its forward view")
    return {name: made[name] for name in known}


def written_after(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    asked: Asked,
    beside: Mapping[str, Sequence[Path]],
    out: TextIO | None,
) -> Found:
    """Write the text that follows a prompt, each word to `out` as it is generated.

    Args:
        model: the served model.
        tokenizer: its tokenizer.
        inputs: what the processor makes of the prompt and of what is beside it.
        asked: what the user asks for.
        beside: the files beside the prompt, by the name that the result has for them.
        out: the file; None writes nothing.
    """
    writer = Writer(model, tokenizer, out)
    hint = "put their tokens into the prompt, with text between them, or pass --chat; --verbose shows the cause"
    what = f"the model's code does not take this prompt with its {' and '.join(beside)}"
    with understanding(asked.directory, what, hint):
        text, _ = writer.follow(asked, inputs)
    files = {name: [str(path) for path in paths] for name, paths in beside.items()}
    return Found({"prompt": asked.prompt, **files, "text": text}, writer.words(text))
