"""Initializers that are optional inputs: the slots of a program's layers, and tensors of the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from peftfx.bases.tasks import PEFT_HEADS, PEFT_TASKS, task_of
from peftfx.export.metadata import PERM, SOURCE
from peftfx.export.translation.to_onnx import every_value
from peftfx.graph.graph import BASE
from peftfx.graph.places import module_at
from peftfx.graph.slots import INNER, OUTER, RANK, SLOT_OWN, SLOT_TOKENS, Slot
from peftfx.sites.site import HEAD, NormSite, Site
from peftfx.sites.sites import Sites


def open_initializers(program: ir.Model, slots: Sequence[Slot], base: nn.Module, sites: Sites) -> tuple[Slot, ...]:
    """Make the slots of a program optional inputs, and some tensors of the base, too. Return all slots.

    The tensors of the base are the biases at sites with slots, norms, the heads that HF PEFT trains with an adapter,
    and other heads that give labels, or that have slots.
    """
    values = {str(value.name): value for value in program.graph.inputs}
    for slot in slots:
        value = values[slot.name]
        value.const_value = TorchTensor(neutral_of(slot), name=slot.name)
        value.meta[SOURCE] = ("ones", slot.empty, slot.dtype)
        # Each site has a rank of its own. One name for all ranks would tell ONNX Runtime that they are equal, and it
        # plans memory by that.
        value.shape = ir.Shape([f"{slot.at}.{s}".strip(".") if isinstance(s, str) else s for s in slot.shape])
        program.graph.initializers[slot.name] = value
    for value in every_value(program.graph):
        if value.shape is not None and not value.is_graph_input():
            value.shape = ir.Shape([None if str(d) in (RANK, SLOT_TOKENS) else d for d in value.shape])
    return (*slots, *_own(program, slots, base, sites))


def _own(program: ir.Model, slots: Sequence[Slot], base: nn.Module, sites: Sites) -> Iterator[Slot]:
    """Make tensors of the base optional inputs, and yield their slots."""
    at = {slot.at for slot in slots if slot.what == OUTER}
    wanted = dict.fromkeys(site.bias for site in sites if site.path in at and site.bias is not None)
    norms = [tensor for site in sites.norms for tensor in _of_norm(base, site)]
    wanted |= dict.fromkeys((*norms, *(f"{BASE}.{name}" for name in head_tensors(base))))
    chosen = [site for site in untied_heads(sites) if site.path in at or _gives_labels(base, site)]
    wanted |= dict.fromkeys(tensor for site in chosen for tensor in (site.weight, site.bias) if tensor is not None)
    found = {value.meta.get(SOURCE): value for value in program.graph.initializers.values()}
    for target in wanted:
        value = found.get(target)
        if value is None or not value.shape or value.dtype is None:  # tied, not read, or a number: files hold none
            continue
        program.graph.inputs.append(value)
        shape = tuple(int(str(size)) for size in value.shape)
        perm = tuple(int(axis) for axis in value.metadata_props.get(PERM, "").split())
        kind = str(ir.tensor_adapters.to_torch_dtype(value.dtype)).removeprefix("torch.")
        yield Slot(str(value.name), SLOT_OWN, target.removeprefix(f"{BASE}."), shape, kind, perm)


def _of_norm(base: nn.Module, site: NormSite) -> list[str]:
    """Return the targets of a norm's parameters: those of its module, or a bare parameter."""
    module = module_at(base, site.path)
    if module is None:
        return [site.weight]
    return [f"{BASE}.{site.path}.{name}" for name, _ in module.named_parameters(recurse=False)]


def head_tensors(base: nn.Module) -> list[str]:
    """Return the names of the heads' tensors that HF PEFT trains and saves with any adapter of this task."""
    kinds = {task: kind for kind, task in PEFT_TASKS.items()}
    ends = PEFT_HEADS.get(kinds.get(task_of(base), ""), ())
    paths = [path for path, _ in base.named_modules() if ends and path.endswith(ends)]
    return [f"{path}.{name}" for path in paths for name in base.get_submodule(path).state_dict()]


def untied_heads(sites: Sites) -> list[Site]:
    """Return the heads whose weight nothing else reads: a slot for a tied weight would change both its readers."""
    read = Counter(site.weight for site in sites)
    return [site for site in sites.weights if site.role == HEAD and read[site.weight] == 1]


def _gives_labels(base: nn.Module, site: Site) -> bool:
    """Say whether a head gives the model's labels. Heads that give tokens are large, and rarely trained."""
    labels = getattr(getattr(base, "config", None), "num_labels", None)
    return labels == site.rows


def neutral_of(slot: Slot) -> Tensor:
    """Return the tensor that changes nothing in a slot."""
    return (torch.ones if slot.what in (INNER, OUTER) else torch.zeros)(slot.empty, dtype=getattr(torch, slot.dtype))
