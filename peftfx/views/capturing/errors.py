"""What is told when a model's code cannot be captured."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from peftfx.bases.processors.image_size import processor_file
from peftfx.bases.processors.padding import lacks_padding
from peftfx.bases.processors.readers import SIZED, encodes_in_forward, reads_images, reads_sized_images
from peftfx.bases.processors.sounds.recordings import RECORDINGS
from peftfx.errors import CaptureError, first_line
from peftfx.views.capturing.raised import line_of, packs, raised_at, said_by
from peftfx.views.dry_run import fake_run
from peftfx.views.entry import Entry, EntryCall

#: torch's text about an output of a class that it does not know. The class is named with its module.
_UNKNOWN = re.compile(r"Found <class '(?:[^']*\.)?([^.']+)'> in output, which is not a known type")

_REPORT = "see `__cause__` (on the command line: --verbose) for torch.export's own report"


def capture_error(
    model: nn.Module, error: BaseException, entry: Entry | None, call: EntryCall, given: Collection[str]
) -> CaptureError:
    """Return the error for a model whose code raised an error in a capture.

    Args:
        model: the model.
        error: what its code, or torch.export, raised.
        entry: the soft prompt's entry, if it was captured under one.
        call: the call that was captured.
        given: the names of the call's tensors.
    """
    if _goes_on_by_one(model, call):
        what = "its code goes on with a text by one token at a time, and a decode view takes prompts at once, too"
        raised = f"{type(error).__name__}, at {line_of(error, model)}"
        return CaptureError(
            f"cannot capture this model: {what} ({raised})", type(model).__name__, "use the forward view"
        )
    why, hint, line = first_line(error), _REPORT, line_of(error, model)
    if isinstance(error, TypeError) and "unhashable" in str(error) and "SymInt" in str(error):
        why = "its code has a size, or a number in a tensor, as a key of a dict or in a set"
        hint = f"compute anew what is kept by such a key; {_REPORT}"
    elif "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        why = "its code branches on the values of a tensor"
        hint = _how_to_avoid_the_branch(model, call)
    elif type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        why = f"its code runs {error}, whose result, or its size, follows from the values of a tensor"
        hint = "compute it outside of the model, or pass arguments or a config that avoid it"
    elif type(error).__name__ == "UnsupportedOperatorException":
        why = f"its code runs {error} on tensors for which torch has no rule, such as sparse or nested ones"
        hint = "compute with dense tensors: tensor.to_dense(), or padded rows and a mask"
    elif type(error).__name__ == "UncapturedHigherOrderOpError":
        why = "its code calls torch.cond, or another operator that takes functions, which no graph here has"
        hint = "compute both sides, and choose by torch.where"
    elif packs(error):
        why = "its code packs rows by their lengths (torch.nn.utils.rnn.pack_padded_sequence)"
        hint = "run the recurrent layer on the padded rows, without lengths, and take what you need behind it"
    elif unknown := _UNKNOWN.search(str(error)):
        why = f"its forward returns an object of the class {unknown[1]}, which torch.export does not know"
        hint = f"call torch.export.register_dataclass({unknown[1]}) first, or return a tuple or a dict"
        line = ""
    elif "fake tensor in the exported program constant's list" in str(error):
        why = "its code changes a tensor past the capture, as by `weight.data *= mask`, or takes gradients in a call"
        hint = "compute it anew in each call: F.conv1d(x, self.weight * self.mask); write a gradient out"
    elif nameless := _nameless(model, error):
        why = f"its forward takes *{nameless}, whose values have no names, and a graph's inputs have names"
        hint, line = "write a forward with an argument for each of them", ""
    elif str(error).strip():
        hint = _what_is_lacking(model, error, call, given) or _REPORT
        line = "" if said_by(error, "raise") else line  # the code says itself what is wrong
    elif isinstance(error, AssertionError) and (asserted := said_by(error, "assert")):
        why, line = f"its code asserts `{asserted}`", raised_at(error)
    what = "cannot capture this model" if entry is None else "cannot capture this model under a soft prompt"
    return CaptureError(f"{what}: {why}{', at ' if line else ''}{line}", type(model).__name__, hint)


def _how_to_avoid_the_branch(model: nn.Module, call: EntryCall) -> str:
    """Return what to do about code that branches on the values of a tensor."""
    if _loops_over_experts(model):
        return "its code loops over the chosen experts: call model.set_experts_implementation('grouped_mm')"
    if _is_forward(call) and reads_sized_images(model):
        return SIZED
    if _is_forward(call) and _lacks_processor(model) and not _has_folder(model):
        return _FOLDER
    return f"pass arguments or a config that avoid the branch; {_REPORT}"


def _what_is_lacking(model: nn.Module, error: BaseException, call: EntryCall, given: Collection[str]) -> str:
    """Return what to do if a call or the model's config lacks something that the code needs; empty if that is unknown.

    The arguments are those of `capture_error`.
    """
    if lacks_padding(model) and "padding" in str(error):
        return "name the token that pads texts: model.config.pad_token_id = tokenizer.pad_token_id, or eos_token_id"
    if _is_forward(call) and _lacks_processor(model):
        return (_PROCESSOR if reads_images(model) else _FILES) if _has_folder(model) else _FOLDER
    if lacking := _lacking(model, given, f"{error} {line_of(error, model)}"):
        files = "" if lacking in RECORDINGS else f"; or {_FILES}"
        return f"this call has no {lacking}: in Python, pass inputs= of a call that has{files}"
    return ""


def _is_forward(call: EntryCall) -> bool:
    """Return whether a call is of the model's forward, and not of a view with inputs of its own."""
    return getattr(call, "inputs", None) is None


_FILES = "copy the files of its processor (preprocessor_config.json) into its folder"
_PROCESSOR = (
    f"{_FILES}; or pass --view decode, or, in Python, inputs= of a text without images, to adapt the layers that it "
    "runs"
)
_FOLDER = (
    "set model.config.name_or_path to a folder with the files of its processor (preprocessor_config.json): examples of "
    "images are made by it; or pass inputs= of a text without images, to adapt the layers that it runs"
)


def _lacks_processor(model: nn.Module) -> bool:
    """Return whether a model reads images, and no processor beside it makes an example of one."""
    return isinstance(model, PreTrainedModel) and encodes_in_forward(model) and processor_file(model) is None


def _lacking(model: nn.Module, given: Collection[str], said: str) -> str:
    """Return the argument for pictures or sounds that an error's text names, and the call has not; empty if none."""
    names = {"pixel_values", *RECORDINGS, str(getattr(model, "main_input_name", ""))} - {"", *given}
    taken = inspect.signature(model.forward).parameters
    return next((name for name in sorted(names) if name in taken and re.search(rf"\b{name}\b", said)), "")


def _has_folder(model: nn.Module) -> bool:
    """Return whether a model came from a folder, or from a hub, and was not made from a config alone."""
    return bool(getattr(getattr(model, "config", None), "name_or_path", None))


def _nameless(model: nn.Module, error: BaseException) -> str:
    """Return the name of a `*` parameter for which a call had values by name; empty if there is none."""
    if not isinstance(error, TypeError):
        return ""
    own = inspect.signature(model.forward).parameters.values()
    names = (p.name for p in own if p.kind is p.VAR_POSITIONAL)
    return next((name for name in names if f"unexpected keyword argument '{name}'" in str(error)), "")


def _loops_over_experts(model: nn.Module) -> bool:
    chosen = getattr(getattr(model, "config", None), "_experts_implementation", None)
    return chosen == "eager" and isinstance(model, PreTrainedModel) and bool(model._can_set_experts_implementation())


def _goes_on_by_one(model: nn.Module, call: EntryCall) -> bool:
    """Return whether a view with a past runs with one new token and not with two, on fake tensors."""
    inputs = getattr(call, "inputs", None)
    if inputs is None or "past" not in {axis for axes in getattr(call, "axes", {}).values() for axis in axes}:
        return False

    def runs(tokens: int) -> bool:
        given = inputs(model, sizes={"batch": 1, "sequence": tokens, "past": 3})
        try:
            with fake_run(model) as fake:
                call(model, {name: fake(value) for name, value in given.items()})
        except Exception:  # a model's code raises various errors for a size that it does not take
            return False
        return True

    return runs(1) and not runs(2)
