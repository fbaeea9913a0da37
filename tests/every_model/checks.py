"""One model of one type: built tiny, with a random LoRA of `peft` on all that is linear, exported, and held against it.

The outputs of ONNX Runtime are compared with those of `peft`'s own model, at sizes that nothing was captured at; in the
decode view step by step, each model with its own cache, over the same tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from every_model.by_peft import NotBuilt, adapted_by_peft, line_of
from every_model.diffusion_models import MODELS, build_denoiser
from every_model.pictures import has_pictures, home_of
from every_model.tiny_configs import tiny_config
from sounds.hearing import prompts_with_sounds
from support.parity import apart, outputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.models.auto import modeling_auto

import peftfx
import peftfx.runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of, pictures_vary
from peftfx.bases.processors.readers import reads_images
from peftfx.errors import PeftfxWarning
from peftfx.export.verification.comparison import VerificationError
from peftfx.graph.graph import path_name
from peftfx.serving.beside_text.sounds import Hearing, ServedWithSounds
from peftfx.views.finding.sound_views import find_sounds
from peftfx.views.sounds.encoded import SOUND_LENGTH, SOUNDS, encode_sounds
from peftfx.views.sounds.views import SoundEncoder

SEEING = "image-text-to-text"
PICTURE = (64, 64)  #: the size of pictures in decode views
FEATURES = "feature-extraction"  #: models without a head
DIFFUSERS = "diffusers"  #: not a task, but a library: denoisers
#: Tasks of the page: the table of transformers that lists their model types, and `peft`'s name of them.
TASKS: Mapping[str, tuple[str, str | None]] = {
    "text-generation": ("CAUSAL_LM", "CAUSAL_LM"),
    "text2text-generation": ("SEQ_TO_SEQ_CAUSAL_LM", "SEQ_2_SEQ_LM"),
    "text-classification": ("SEQUENCE_CLASSIFICATION", "SEQ_CLS"),
    "fill-mask": ("MASKED_LM", None),
    "image-classification": ("IMAGE_CLASSIFICATION", None),
    SEEING: ("IMAGE_TEXT_TO_TEXT", None),
    "speech-to-text": ("SPEECH_SEQ_2_SEQ", None),
    "ctc": ("CTC", None),
    "audio-classification": ("AUDIO_CLASSIFICATION", None),
    "token-classification": ("TOKEN_CLASSIFICATION", None),
    "question-answering": ("QUESTION_ANSWERING", None),
    "multiple-choice": ("MULTIPLE_CHOICE", None),
    "object-detection": ("OBJECT_DETECTION", None),
    "zero-shot-object-detection": ("ZERO_SHOT_OBJECT_DETECTION", None),
    "zero-shot-image-classification": ("ZERO_SHOT_IMAGE_CLASSIFICATION", None),
    "semantic-segmentation": ("SEMANTIC_SEGMENTATION", None),
    "universal-segmentation": ("UNIVERSAL_SEGMENTATION", None),
    "mask-generation": ("MASK_GENERATION", None),
    "depth-estimation": ("DEPTH_ESTIMATION", None),
    "keypoint-detection": ("KEYPOINT_DETECTION", None),
    "keypoint-matching": ("KEYPOINT_MATCHING", None),
    "pose-estimation": ("POSE_ESTIMATION", None),
    "image-to-image": ("IMAGE_TO_IMAGE", None),
    "image-matting": ("IMAGE_MATTING", None),
    "video-classification": ("VIDEO_CLASSIFICATION", None),
    "visual-question-answering": ("VISUAL_QUESTION_ANSWERING", None),
    "document-question-answering": ("DOCUMENT_QUESTION_ANSWERING", None),
    "text-recognition": ("TEXT_RECOGNITION", None),
    "audio-frame-classification": ("AUDIO_FRAME_CLASSIFICATION", None),
    "audio-xvector": ("AUDIO_XVECTOR", None),
    FEATURES: ("", None),
    DIFFUSERS: ("", None),
}
_SOURCES = ("input_ids", "attention_mask", "input_features", "input_values")  #: the inputs of `generate`
UNSEEN = ({"batch": 3, "sequence": 11, "decoder_sequence": 4}, {"batch": 1, "sequence": 6, "decoder_sequence": 3})
_SEEDS: Mapping[str, int] = {"depth_anything": 1}  #: where most outputs would be zero
BOUND = 1e-4  #: of the largest output
_NEVER = -1e38  #: logits that are lower are a mask: of tokens that a model never writes


@dataclasses.dataclass(frozen=True)
class Result:
    """How a check ended.

    Attributes:
        status: `equal`; `refused`, with an error that says why; `differs`; `crashed`; `not built`, where it is no fault
            of peftfx: the tiny model does not run, or `peft` does not adapt it.
        note: why, in one sentence.
    """

    status: str
    note: str = ""


def model_types(task: str) -> list[str]:
    """The model types that transformers lists for a task, or the denoisers."""
    return list(_table(task))


def _table(task: str) -> Mapping[str, object]:
    if task == DIFFUSERS:
        return MODELS
    kind = f"FOR_{TASKS[task][0]}_" if task != FEATURES else ""
    table: Mapping[str, object] = getattr(modeling_auto, f"MODEL_{kind}MAPPING_NAMES")
    return table


def build(task: str, model_type: str) -> nn.Module:
    """A tiny model in eval mode, no parameter of which is at its initial value."""
    if task == DIFFUSERS:
        return _noisy(lambda: build_denoiser(model_type))
    names = _table(task)[model_type]
    name = names if isinstance(names, str) else names[0]  # type: ignore[index]
    more = {"is_decoder": True} if task == "text-generation" and _encodes(model_type) else {}

    def made() -> nn.Module:
        kind = getattr(hf, name)
        config = tiny_config(model_type, kind, **more)
        if task == "text-classification":  # of a batch, the last token that is no padding is classified
            text = config.get_text_config()
            text.pad_token_id = config.pad_token_id = getattr(text, "pad_token_id", None) or 1
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 4
        if has_pictures(model_type):
            config.name_or_path = home_of(model_type)
        return kind(config)  # type: ignore[no-any-return]

    return _noisy(made, _SEEDS.get(model_type, 0))


def _noisy(made: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = made()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            _measure_norms(model.eval())
    return model.eval()


def _measure_norms(model: nn.Module) -> None:
    """Give batch norms the statistics of a call, without which the signals of a deep model of convolutions vanish."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        with contextlib.suppress(Exception):  # of a model that does not run, which is found later
            model(**example_inputs(model, sizes={"batch": 8}))


def _encodes(model_type: str) -> bool:
    """Whether a model of this type is an encoder if it is not told otherwise."""
    return model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check(task: str, model_type: str, view: str) -> Result:
    """Check one model in one view, `forward` or `decode`."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            _must_run(lambda: build(task, model_type))
            want = adapted_by_peft(lambda: build(task, model_type), TASKS[task][1], directory / "adapter")
        except NotBuilt as error:
            return Result("not built", str(error))
        try:
            got = peftfx.load(build(task, model_type), directory / "adapter")
            if view == "decode" and task == SEEING:
                return _seen(want, got, directory / "out")
            alone = _exported(got, directory / "out", view)
            if alone and task != "text-generation":  # there it is asked for
                return Result("refused", alone)
            far = (_steps if view == "decode" else _calls)(want, directory / "out", got.base, build(task, model_type))
        except NotBuilt as error:
            return Result("not built", str(error))
        except VerificationError as error:
            if _padding_of_others_matters(got.base):
                return Result("not built", "its own outputs of one text depend on whether another text has padding")
            return Result("differs", line_of(error))
        except peftfx.PeftfxError as error:
            return Result("refused", line_of(error))
        except Exception as error:
            return Result("crashed", f"{type(error).__name__}: {line_of(error)}")
        return _result(far)


def _result(far: float) -> Result:
    return Result("equal") if far <= BOUND else Result("differs", f"by {far:.1e} of the largest")


def _seen(want: nn.Module, got: peftfx.AdaptedModel, directory: Path) -> Result:
    """The result of a decode view with images; of a chosen size, where a picture's size decides what it is made of."""
    takes = set(inspect.signature(got.base.forward).parameters)
    size = PICTURE if reads_images(got.base) and pictures_vary(got.base, takes) else None
    if alone := _exported(got, directory, "decode", **({} if size is None else {"image_size": size})):
        return Result("refused", alone)
    with pictures_of(size):
        inputs = example_inputs(got.base, sizes={"batch": 2, "sequence": 6}, seed=3)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    served = peftfx.runtime.load(directory)
    both = [_with_sounds(got.base, inputs)] if isinstance(served, Hearing) else []
    return _result(_generated(want, served, [inputs, *both]))


def _with_sounds(base: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A call with a sound too at the end of each text, and a token behind it."""
    sounds, ids = find_sounds(base), inputs["input_ids"]
    heard = SoundEncoder(sounds).inputs(base, sizes={SOUNDS: len(ids), SOUND_LENGTH: sounds.lengths[-1]}, seed=3)
    heard |= {name: torch.ones_like(heard[name]) for name in sounds.masks}
    with torch.no_grad():
        pieces = len(encode_sounds(base, heard)) // len(ids)
    more = torch.cat((torch.full((len(ids), pieces), sounds.token), ids[:, -1:]), 1)
    texts = {"input_ids": more, "attention_mask": torch.ones_like(more), "mm_token_type_ids": more * 0}
    longer = {name: torch.cat((inputs[name], texts[name]), 1) for name in texts if name in inputs}
    return {**inputs, **longer, **heard}


def _exported(got: peftfx.AdaptedModel, directory: Path, view: str, **options: Any) -> str:
    """Export a view, and return what a warning says if it leaves out all that the model reads beside text."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PeftfxWarning)
        got.export(directory, view=view, **options)
    return next((str(w.message) for w in told if "text alone is served" in str(w.message)), "")


def _must_run(built: Callable[[], nn.Module]) -> None:
    """Refuse a model that does not run by itself, on its example inputs."""
    inputs: dict[str, Tensor] = {}
    model = nn.Module()
    try:
        model = built()
        inputs = example_inputs(model)
        with torch.no_grad():
            found = model(**inputs)
    except Exception as error:
        of_text = {name: value for name, value in inputs.items() if name in _SOURCES[:2]}
        always = of_text.keys() < inputs.keys() and _refusal(model, of_text) == line_of(error)
        raise NotBuilt("its own code raises for text alone too: " * always + line_of(error)) from error
    if any(bool(v.isnan().any()) for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()):
        raise NotBuilt("its outputs are not numbers")


def _padding_of_others_matters(base: nn.Module) -> bool:
    """Whether the first row's outputs are others where the last row has padding: a graph has one of the two."""
    inputs = example_inputs(base)
    if "attention_mask" not in inputs or bool(inputs["attention_mask"].all()):
        return False
    padded, full = outputs(base, inputs), outputs(base, {**inputs, "attention_mask": inputs["attention_mask"] * 0 + 1})
    return any(v.ndim and v.is_floating_point() and _far(v[:1], full[n][:1], None) > BOUND for n, v in padded.items())


def _refusal(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """What a call of a model raises; nothing if it runs."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return line_of(error)
    return ""


def _calls(want: nn.Module, directory: Path, model: nn.Module, base: nn.Module) -> float:
    """How far the forward view is from `peft`'s model, of the largest output."""
    got = peftfx.export.OnnxModel(directory)
    worst = 0.0
    for seed, sizes in enumerate(UNSEEN, 3):
        inputs = example_inputs(model, sizes=sizes, seed=seed)
        flat = {path_name(path): value for path, value in pytree.tree_flatten_with_path(inputs)[0]}
        if "position_ids" in set(got.inputs) - set(flat):
            flat["position_ids"] = _positions(model, inputs)  # which are made of the types of tokens, if there are any
            flat = {name: value for name, value in flat.items() if name in got.inputs}
        expected, plain, found = outputs(want, inputs), outputs(base, inputs), got(**flat)
        mask = inputs.get("attention_mask")
        pairs = [(name.removesuffix(".output"), value) for name, value in found.items()]
        fars = [(name, _far(value, expected[name], mask)) for name, value in pairs]
        if max(far for _, far in fars) > BOUND:
            exact = _in_float64(want, inputs)
            noise = {name: _far(expected[name], exact[name], mask) for name, _ in fars}
            fars = [(name, far) for name, far in fars if far == torch.inf or far > 2 * noise[name]]
        worst = max(worst, *(far for _, far in fars), 0.0)
        changed = max(_far(expected[n], plain[n], None) for n in expected if n in plain)
        if changed <= 1e-3:  # so the check would pass without the adapter
            raise NotBuilt("an adapter hardly changes the tiny model's outputs")
    return worst


def _positions(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The positions that the model's own class makes, for a graph that takes them: whole numbers."""
    made: Tensor
    if hasattr(model, "_prepare_position_ids_for_generation"):
        made = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))  # type: ignore[operator]
    else:  # without a head a call makes them: those that reach its first layer of text
        seen: list[Tensor] = []
        hooks = [m.register_forward_pre_hook(_noting(seen), with_kwargs=True) for m in model.modules()]
        outputs(model, inputs)
        for hook in hooks:
            hook.remove()
        made = seen[0]
    assert torch.equal(made, made.long())
    return made.long()


def _noting(seen: list[Tensor]) -> Callable[..., None]:
    def note(_: nn.Module, args: object, kwargs: Mapping[str, object]) -> None:
        positions = kwargs.get("position_ids")
        seen.extend([positions] if isinstance(positions, Tensor) else [])

    return note


def _in_float64(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs of a copy of the model in float64. Two programs that are as near to them are twice that apart."""
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, dict(inputs))
    return outputs(copy.deepcopy(model).double(), wide)


def _far(got: Tensor, want: Tensor, mask: Tensor | None) -> float:
    assert got.shape == want.shape, (tuple(got.shape), tuple(want.shape))
    if mask is not None and got.shape[:2] == mask.shape:
        got, want = got[mask.bool()], want[mask.bool()]
    never = want.float() <= _NEVER
    if not torch.equal(never, got.float() <= _NEVER):
        return float("inf")
    got, want = got[~never].float(), want[~never].float()
    if not want.numel():
        return 0.0
    return apart(got, want) / max(1e-3, float(want.abs().max()))


def _steps(want: nn.Module, directory: Path, model: nn.Module, base: nn.Module) -> float:
    """How far the logits of generated tokens are from `peft`'s: of a prompt, padded on the left, or of a source."""
    got = peftfx.runtime.load(directory)
    if isinstance(got, ServedWithSounds) and not reads_images(model):
        return _generated(want, got, [prompts_with_sounds(model, texts) for texts in (2, 1)])
    inputs = example_inputs(model, sizes={"batch": 2, "sequence": 6}, seed=3)
    sources = _SOURCES[:2] if "input_ids" in inputs else _SOURCES
    inputs = {name: value for name, value in inputs.items() if name in sources}
    for name in inputs.keys() & {"input_ids", "attention_mask"}:  # without the tokens of an image, which is not given
        inputs[name] = inputs[name][:, -6:]
    if "decoder_input_ids" not in example_inputs(model):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :2] = 0
    heard = [_with_sounds(model, inputs)] if isinstance(got, Hearing) else []
    return _generated(want, got, [inputs, {name: value[:1] for name, value in inputs.items()}, *heard])


def _generated(want: nn.Module, got: Any, cases: list[dict[str, Tensor]]) -> float:
    """How far the logits of generated tokens are from `peft`'s, of the largest."""
    options = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False, "output_logits": True}
    forced = hf.LogitsProcessorList([_Forced(5)])
    worst = 0.0
    for case in cases:
        case = {name: value for name, value in case.items() if name != "decoder_input_ids"}
        how = {**case, **options, "return_dict_in_generate": True, "logits_processor": forced}
        try:
            by_peft = want.generate(**how)
        except Exception as error:
            raise NotBuilt(f"its generate: {line_of(error)}") from error
        expected, found = (torch.stack(list(result.logits), 1) for result in (by_peft, got.generate(**how)))
        worst = max(worst, _far(found, expected, None))
    return worst


class _Forced(hf.LogitsProcessor):
    """Chooses each row's tokens by their number, so that near-ties of random weights decide nothing."""

    def __init__(self, lowest: int) -> None:
        self.lowest = lowest

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.lowest + (7 * input_ids.shape[1] + torch.arange(len(scores))) % 60
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)
