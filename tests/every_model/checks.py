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

import peft
import torch
import transformers as hf
from every_model.diffusion_models import MODELS, build_denoiser
from every_model.pictures import has_pictures, home_of
from every_model.tiny_configs import tiny_config
from sounds.hearing import prompts_with_sounds
from support.adapted import randomise
from support.parity import outputs
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
from peftfx.serving.beside_text.sounds import ServedWithSounds

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
    FEATURES: ("", None),
    DIFFUSERS: ("", None),
}
_SOURCES = ("input_ids", "attention_mask", "input_features", "input_values")  #: the inputs of `generate`
UNSEEN = ({"batch": 3, "sequence": 11, "decoder_sequence": 4}, {"batch": 1, "sequence": 6, "decoder_sequence": 3})
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


class NotBuilt(Exception):
    """The model does not run by itself, or `peft` does not adapt it."""


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

    return _noisy(made)


def _noisy(made: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _encodes(model_type: str) -> bool:
    """Whether a model of this type is an encoder if it is not told otherwise."""
    return model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def check(task: str, model_type: str, view: str) -> Result:
    """Check one model in one view, `forward` or `decode`."""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        try:
            base = _built(task, model_type)
            want = _adapted_by_peft(base, task, model_type, directory / "adapter")
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
            return Result("differs", _line(error))
        except peftfx.PeftfxError as error:
            return Result("refused", _line(error))
        except Exception as error:
            return Result("crashed", f"{type(error).__name__}: {_line(error)}")
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
    return _result(_generated(want, peftfx.runtime.load(directory), [inputs]))


def _exported(got: peftfx.AdaptedModel, directory: Path, view: str, **options: Any) -> str:
    """Export a view, and return what a warning says if it leaves out all that the model reads beside text."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PeftfxWarning)
        got.export(directory, view=view, **options)
    return next((str(w.message) for w in told if "text alone is served" in str(w.message)), "")


def _built(task: str, model_type: str) -> nn.Module:
    inputs: dict[str, Tensor] = {}
    try:
        model = build(task, model_type)
        inputs = example_inputs(model)
        with torch.no_grad():
            found = model(**inputs)
    except Exception as error:
        of_text = {name: value for name, value in inputs.items() if name in _SOURCES[:2]}
        always = of_text.keys() < inputs.keys() and _refusal(model, of_text) == _line(error)
        raise NotBuilt("its own code raises for text alone too: " * always + _line(error)) from error
    if any(bool(v.isnan().any()) for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()):
        raise NotBuilt("its outputs are not numbers")
    return model


def _refusal(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """What a call of a model raises; nothing if it runs."""
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return _line(error)
    return ""


def _adapted_by_peft(base: nn.Module, task: str, model_type: str, directory: Path) -> nn.Module:
    run = _run(base)
    targets = [n for n, m in run.items() if _multiplies(m)]
    if task == "text-classification":  # `peft` trains copies of these
        targets = [n for n in targets if not n.endswith(("classifier", "score"))]
    convs = [n for n, m in run.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    try:
        try:
            made = _with_lora(base, targets or convs, TASKS[task][1])
        except ValueError as error:
            if "Mamba" not in str(error):
                raise
            apart = [n for n in targets if n.rpartition(".")[2] != "out_proj"]  # that `peft` refuses there
            made = _with_lora(build(task, model_type), apart, TASKS[task][1])
        outputs(made, example_inputs(base))
        made.save_pretrained(str(directory), save_embedding_layers=False)
    except Exception as error:
        raise NotBuilt(f"peft: {_line(error)}") from error
    return made


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer is a plain product: `peft` takes it for one, also where a subclass computes otherwise."""
    if not isinstance(module, nn.Linear):
        return isinstance(module, hf.pytorch_utils.Conv1D)
    if type(module).forward is nn.Linear.forward:
        return True
    x = torch.randn(2, 3, module.in_features)
    try:
        return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), atol=1e-5)
    except Exception:  # it takes other arguments
        return False


def _with_lora(base: nn.Module, targets: list[str], task_type: str | None) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task_type)
    made: nn.Module = peft.get_peft_model(base, config).eval()
    randomise(made)
    return made


def _run(base: nn.Module) -> dict[str, nn.Module]:
    """The modules that a call of the model runs, but for the output embedding, which `all-linear` leaves out too."""
    run: set[nn.Module] = set()

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):  # `peft`'s layer takes no others: a router may give two
            run.add(module)

    hooks = [module.register_forward_hook(note) for module in base.modules()]
    with torch.no_grad():
        base(**example_inputs(base))
    for hook in hooks:
        hook.remove()
    head = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = base.get_output_embeddings()  # type: ignore[operator]
    return {n: m for n, m in base.named_modules() if m in run and m is not head}


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
            fars = [(name, far) for name, far in fars if far > 2 * _far(expected[name], exact[name], mask)]
        worst = max(worst, *(far for _, far in fars), 0.0)
        changed = max(_far(expected[n], plain[n], None) for n in expected if n in plain)
        assert changed > 1e-3, "the adapter changes nothing: the check would pass without it"
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
    got, want = got[~never], want[~never]
    if not want.numel():
        return 0.0
    return float((got.float() - want.float()).abs().max()) / max(1e-3, float(want.float().abs().max()))


def _steps(want: nn.Module, directory: Path, model: nn.Module, base: nn.Module) -> float:
    """How far the logits of generated tokens are from `peft`'s: of a prompt, padded on the left, or of a source."""
    got = peftfx.runtime.load(directory)
    if isinstance(got, ServedWithSounds):
        return _generated(want, got, [prompts_with_sounds(model, texts) for texts in (2, 1)])
    inputs = example_inputs(model, sizes={"batch": 2, "sequence": 6}, seed=3)
    sources = _SOURCES[:2] if "input_ids" in inputs else _SOURCES
    inputs = {name: value for name, value in inputs.items() if name in sources}
    for name in inputs.keys() & {"input_ids", "attention_mask"}:  # without the tokens of an image, which is not given
        inputs[name] = inputs[name][:, -6:]
    if "decoder_input_ids" not in example_inputs(model):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][1, :2] = 0
    return _generated(want, got, [inputs, {name: value[:1] for name, value in inputs.items()}])


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
            raise NotBuilt(f"its generate: {_line(error)}") from error
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


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    more = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return " ".join(lines[: more + 1])[:300]
