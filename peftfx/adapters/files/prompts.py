"""HF PEFT directories of soft prompts. PEFT saves the prompt that an encoder computed, and not the encoder.

peftfx keeps the encoder's parameters beside the prompt, in a file that PEFT does not read, so that training can go on.
Without that file, or if the encoder no longer computes the saved prompt, the prompt itself is loaded and trained.

PEFT also wants the task's head in the file, trained or not. So the head is always written. A head that is read is
taken if it differs from the base's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.base.replaced import replaced_weights, take_one_name
from peftfx.adapters.files.names import name_of_base, own_memory
from peftfx.adapters.files.sizes import without_memory
from peftfx.bases.guests import own_modules
from peftfx.bases.tasks import PEFT_HEADS, PEFT_TASKS, task_of
from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.method import PLACING
from peftfx.contract.override import SAVED, Override
from peftfx.contract.placed import Placed, Placements
from peftfx.contract.placement import SequencePlacement
from peftfx.contract.sequence import PROMPT, SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.files import is_file
from peftfx.rules.peft_files import STATE, WEIGHTS, Weights
from peftfx.rules.placements import prompt_placement
from peftfx.rules.trained_copies import is_inside, overrides_of, saved_modules
from peftfx.sites.sites import Sites

Contents = tuple[dict[str, object], dict[str, dict[str, Tensor]]]
"""An adapter's config, and its tensors by file."""


def read_prompt(
    directory: Path,
    weights: Weights,
    method: SequenceMethod,
    base: nn.Module,
    sites: Sites,
    config: Mapping[str, object],
) -> tuple[Adapter, dict[str, str]]:
    """Return the adapter in a directory, and the adapter's key for each name that the file must have."""
    placement = prompt_placement(method, base, sites)
    saved = saved_modules(base, method)
    overrides = overrides_of(base, method, (*saved, *_other_heads(base, weights, saved, config.get("task_type"))), ())
    take_one_name(weights, overrides)
    overrides += replaced_weights(base, weights, (), overrides)
    adapter = Adapter([Placed(method, Placements([placement]), tuple(overrides))], config)
    adapter.copy_overridden(base)
    wanted = {_override_name(override): override.key for override in overrides}
    state = _state(directory, weights, placement, base)
    if state is not None:
        for name, value in state.items():
            adapter.put(f"{placement.key}.{name}", value, trained=not method.is_constant(name, value))
        weights.names.pop(PROMPT)
        return adapter, wanted
    like = next((p for p in base.parameters() if p.is_floating_point()), torch.empty(0))
    for name, shape in placement.method.written_shapes().items():
        device = like.device if tuple(shape) == weights.shapes.get(name) else torch.device("meta")  # refused later
        adapter.put(f"{placement.key}.{name}", torch.empty(shape, dtype=adapter_dtype(like.dtype), device=device))
        wanted[name] = f"{placement.key}.{name}"
    return adapter, wanted


@torch.no_grad()
def split(adapter: Adapter) -> None:
    """Split the prompt that was read into the parameters that the method trains, if the method splits prompts."""
    (placement,) = adapter.placements.prompts
    method, holder = placement.method, adapter.get_submodule(placement.key)
    if method.splits:
        made = method.split(adapter.get(f"{placement.key}.{PROMPT}").detach())
        del holder._parameters[PROMPT]
        for name, value in made.items():
            adapter.put(f"{placement.key}.{name}", value, trained=not method.is_constant(name, value))


def _heads(base: nn.Module, kind: object) -> list[str]:
    """Return the paths of the modules that HF PEFT saves with every prompt of this task type."""
    ends = PEFT_HEADS.get(str(kind), ())
    return [path for path, _ in own_modules(base) if path.endswith(ends)] if ends else []


def _other_heads(base: nn.Module, weights: Weights, saved: Sequence[str], kind: object) -> list[str]:
    """Return the heads in a file that differ from the base's; equal heads are dropped from `weights.names`."""
    other = []
    for path in (path for path in _heads(base, kind) if not is_inside(path, saved)):
        own = {f"{path}.{name}": tensor for name, tensor in base.get_submodule(path).state_dict().items()}
        if own.keys() <= weights.names.keys():
            if all(weights[n].shape == t.shape and torch.equal(weights[n].to(t), t) for n, t in own.items()):
                for name in own:
                    weights.names.pop(name)
            else:
                other.append(path)
    return other


def _override_name(override: Override) -> str:
    return override.key.removeprefix(f"{SAVED}.")


@torch.no_grad()
def _state(
    directory: Path, weights: Weights, placement: SequencePlacement, base: nn.Module
) -> dict[str, Tensor] | None:
    """Return the encoder's parameters, if their file exists and they compute the saved prompt."""
    method = placement.method
    if method.splits or not is_file(directory / STATE) or PROMPT not in weights.names:
        return None
    file = Weights(directory, "", STATE)
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    with without_memory():
        wanted = placement.init(base, torch.Generator(device).manual_seed(0))
    if {name: tuple(t.shape) for name, t in wanted.items()} != file.shapes:
        hint = f"delete {STATE} to load the prompt alone, or save the adapter again"
        raise PeftfxError("this file does not fit the encoder that the config describes", str(directory / STATE), hint)
    state = {name: file[name].to(like.device, like.dtype) for name, like in wanted.items()}
    saved, prompt = weights[PROMPT].float(), method.saved(state).cpu().float()
    same = saved.shape == prompt.shape and torch.allclose(
        prompt, saved, rtol=1e-4, atol=1e-5 * float(saved.abs().max())
    )
    return state if same else None


@torch.no_grad()
def written_prompt(base: nn.Module, adapter: Adapter, rule: Placed) -> Contents:
    """Return the config and the tensors that `save_pretrained` writes for a soft prompt."""
    (placement,) = rule.placements.prompts
    method, params = placement.method, adapter.params(placement)
    config = _config(base, adapter, method)
    tensors = method.written(params)
    for path in _heads(base, config["task_type"]):
        head = base.get_submodule(path).state_dict(keep_vars=True)
        tensors |= {f"{method.prefix}{path}.{name}": tensor for name, tensor in head.items()}
    named = ((name, o) for o in adapter.overrides for name in o.by_each_name())  # another rule may train the head
    trained = {f"{method.prefix}{_override_name(name)}": o for name, o in named}
    tensors |= {n: adapter.get(o.key) for n, o in trained.items() if n in tensors or o in rule.overrides}
    files = {WEIGHTS: tensors}
    if PROMPT not in params and not method.splits:
        files[STATE] = dict(params)
    plain = {file: {n: t.cpu() for n, t in own_memory(tensors)} for file, tensors in files.items()}
    return config, plain


def _config(base: nn.Module, adapter: Adapter, method: SequenceMethod) -> dict[str, object]:
    """Return HF PEFT's config; the task type is always written, because PEFT reads from it how to call the model."""
    options = {name: getattr(method, name) for name in method.options() if name not in PLACING}
    kinds = {task: name for name, task in PEFT_TASKS.items()}
    records = {"base_model_name_or_path": name_of_base(base), **adapter.records}
    records["task_type"] = records.get("task_type") or kinds.get(task_of(base))
    return {**records, **options, "peft_type": method.peft_type, "inference_mode": True}
