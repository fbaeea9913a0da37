"""Graph: a captured program. Passes never change their input: they copy its structure and share its tensors."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError
from peftfx.graph.conditions import Condition, unmet
from peftfx.graph.decisions import Decision, opposed
from peftfx.graph.linking import link
from peftfx.graph.lint import check_calls, check_interface, check_order, check_values
from peftfx.graph.recipe import Recipe
from peftfx.sites.sites import Sites

BASE = "base"  #: where a graph's `get_attr` nodes find the captured module
ADAPTERS = "adapters"  #: where `get_attr` nodes find adapter tensors, as `adapters.<adapter>.<site path>.<parameter>`
CONSTANTS = "constants"  #: where `get_attr` nodes find tensors that the capture lifted out of the code
DERIVED = "derived"  #: where `get_attr` nodes find weights that are computed from other tensors


@dataclass(frozen=True)
class TensorSpec:
    """An input of a graph: its name, dtype, and shape with a string for each axis whose size is free."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def accepts(self, value: torch.Tensor) -> bool:
        """Return whether `value` has this dtype and rank, and this size on every fixed axis."""
        return (
            value.dtype == self.dtype
            and value.ndim == len(self.shape)
            and all(isinstance(want, str) or want == got for want, got in zip(self.shape, value.shape, strict=True))
        )

    def __str__(self) -> str:
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass
class Graph:
    """A program in pre-dispatch ATen: positional tensors in, a flat tuple of tensors out.

    Attributes:
        module: the `fx.GraphModule`; its `get_attr` nodes resolve, when it runs, to the captured module's own
            parameters (under `base.`), to adapters' (under `adapters.`), to lifted constants and to derived weights.
        inputs: one spec for each placeholder, in order.
        out_spec: the spec that rebuilds the model's own output (a `ModelOutput`, tuple, ...) from the flat tuple.
        sizes: the size of each named axis in the example that the graph was captured with.
        training: whether dropout and similar layers are active.
        sites: the adaptable places, found on the base graph and carried through every rewrite.
        derived: recipes of the weights under `derived.`, by name.
        conditions: statements about the named axes, under which this program computes what the model's code computes.
        filled: statements that an axis is not empty, where the model's code asked if it is. The code may compute the
            same for an empty axis; an export tries it.
        fixed: the line of the model's code that fixed an axis at the example's size, by the axis's name, where known.
        decisions: branches on booleans of a call's inputs, of which this program has one side.
        backwards: names of steps of the model's code that have a backward of their own, which this program has not.

    Examples:
        >>> graph = peftfx.capture(model)
        >>> graph.run(torch.tensor([[3, 5, 8]]), torch.ones(1, 3, dtype=torch.long))[0].shape
        torch.Size([1, 3, 64])
    """

    module: fx.GraphModule = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    out_spec: pytree.TreeSpec = field(repr=False)
    sizes: Mapping[str, int]
    training: bool
    sites: Sites = field(repr=False)
    derived: dict[str, Recipe] = field(default_factory=dict, repr=False)
    conditions: tuple[Condition, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[Condition, ...] = ()
    decisions: tuple[Decision, ...] = ()
    backwards: tuple[str, ...] = ()

    @property
    def base(self) -> nn.Module:
        """The captured module; its tensors are shared, never copied."""
        return self.module.get_submodule(BASE)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the flat outputs: the fields of the model's output, nested fields joined by dots."""
        # A rebuilt output may have its fields in another order than the model's code set them in.
        made = pytree.tree_unflatten(range(self.out_spec.num_leaves), self.out_spec)
        return tuple(name for _, name in sorted(zip(pytree.tree_leaves(made), leaf_names(made), strict=True)))

    def sizes_of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the sizes that the named axes have in a call.

        Args:
            tensors: the inputs by name.
        """
        return {
            axis: size
            for spec in self.inputs
            for axis, size in zip(spec.shape, tensors[spec.name].shape, strict=True)
            if isinstance(axis, str)
        }

    def mixed(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Return an axis that has two sizes in a call where this program assumes one size, or None.

        Args:
            tensors: the inputs by name.
        """
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for axis, size in zip(spec.shape, tensors[spec.name].shape, strict=False):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    return axis
        return None

    def nodes(self) -> Iterator[fx.Node]:
        """Iterate over the graph's nodes in topological order."""
        return iter(self.module.graph.nodes)

    def clone(self) -> Graph:
        """Return a copy whose structure can be rewritten. Tensors, sites and node values are shared."""
        graph = fx.Graph()
        val_map: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.module.graph, val_map))
        for old, new in val_map.items():
            new.meta = dict(old.meta)
        holders = dict(self.module.named_children())
        return dataclasses.replace(self, module=link(graph, holders), derived=dict(self.derived))

    def run(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Run the graph whatever the `conditions` say, and return the flat outputs in the order of `outputs`.

        Args:
            tensors: the inputs, in the order of `inputs`.
        """
        self.refuse_unlike(tensors)
        return list(self.module.forward(*tensors))  # `__call__` is patched while another thread traces

    def refuse_unlike(self, tensors: Sequence[torch.Tensor]) -> None:
        """Refuse positional inputs whose types or sizes are not those of this program.

        Args:
            tensors: the inputs, in the order of `inputs`.

        Raises:
            PeftfxError: an input has another type or size.
        """
        for spec, value in zip(self.inputs, tensors, strict=True):
            if not spec.accepts(value):
                got = TensorSpec(spec.name, value.dtype, tuple(value.shape))
                raise PeftfxError(
                    f"the graph takes {spec}, not {got}", spec.name, "capture it again with such an input"
                )

    def __repr__(self) -> str:
        given = ", ".join(f"{spec.name} [{', '.join(map(str, spec.shape))}]" for spec in self.inputs)
        return f"Graph({given}; {len(self.module.graph.nodes):,} nodes)"

    def __call__(self, **kwargs: torch.Tensor) -> object:
        """Run the graph on keyword arguments, and rebuild the model's own output.

        Raises:
            PeftfxError: an input is missing or does not fit, or the model's code takes another branch at these sizes. A
                branch that only size 1 takes is not refused: see `conditions`.
        """
        missing = [s.name for s in self.inputs if s.name not in kwargs]
        if missing or len(kwargs) != len(self.inputs):
            names = ", ".join(s.name for s in self.inputs)
            raise PeftfxError(f"the graph takes exactly the inputs {names}", ", ".join(kwargs), "pass those, by name")
        flat = [kwargs[s.name] for s in self.inputs]
        mixed = self.mixed(kwargs)
        if mixed is not None:
            hint = "capture it again with such inputs, their axes under other names"
            raise PeftfxError(f"two inputs have different sizes along {mixed}", mixed, hint)
        broken = [c for c in unmet(self.conditions, self.sizes_of(kwargs), edges=False) if c.code]
        if broken:
            hint = "capture it again with an input of this size: the model's code computes something else there"
            raise PeftfxError(f"the graph is equal to the model only where {broken[0]}", broken[0].where, hint)
        turned = opposed(self.decisions, kwargs)
        if turned:
            hint = "capture it again with these inputs: the model's code computes something else there"
            raise PeftfxError(f"the graph is equal to the model only where {turned[0]}", turned[0].where, hint)
        flat = self.run(*flat)
        return pytree.tree_unflatten(flat, self.out_spec)

    def get(self, target: str) -> torch.Tensor:
        """Return the tensor that a `get_attr` node with this `target` reads now. A derived weight is computed."""
        name = target.removeprefix(f"{DERIVED}.")
        if name != target and name in self.derived and name not in self.evaluated:
            return self.derived[name].evaluate(self.get)
        value = operator.attrgetter(target)(self.module)
        assert isinstance(value, torch.Tensor), target
        return value

    @property
    def evaluated(self) -> frozenset[str]:
        """The names of the derived weights that have a value."""
        holder = self.module._modules.get(DERIVED)
        return frozenset(() if holder is None else (name for name, _ in holder.named_buffers()))

    def text(self) -> str:
        """Return the program as text that does not depend on the names of its nodes."""
        names: dict[fx.Node, str] = {}
        lines = []
        for node in self.nodes():
            names[node] = f"%{len(names)}"
            args = fx.node.map_arg((node.args, tuple(node.kwargs.items())), lambda n: _Name(names[n]))
            lines.append(f"{names[node]} = {node.op} {node.target if node.op != 'output' else ''} {args[0]} {args[1]}")
        return "\n".join(re.sub(r"\bcpu\b|device\(type='cpu'\)", "cpu", line) for line in lines)

    def lint(self) -> None:
        """Check the structure: order and names, values and holders, inputs and outputs, and the calls of the sites.

        Raises:
            PeftfxError: the first fault found, and where.
        """
        check_order(self.module)
        check_values(self.module, {f"{DERIVED}.{name}" for name in self.derived})
        check_interface(self.module, self.inputs, self.out_spec.num_leaves)
        check_calls(self.module, self.sites)


class _Name(str):
    """A string that prints without quotes inside argument tuples."""

    def __repr__(self) -> str:
        return str(self)


def path_name(path: pytree.KeyPath) -> str:
    """Return a pytree path as a dotted name: `added_cond_kwargs.text_embeds`, `hidden_states.0`."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def leaf_names(value: object, at: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return dotted names of an output's leaves: fields of a `ModelOutput`, items of a tuple; else `output`.

    Objects of a class that is registered with torch's pytrees, such as a dataclass, have the names of its fields.
    """
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif pytree.tree_is_leaf(value):
        return (".".join(at) or "output",)
    else:
        inside, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda item: item is not value)
        items = [(path_name(path), item) for path, item in inside]
    return tuple(name for key, item in items for name in leaf_names(item, (*at, key)))
