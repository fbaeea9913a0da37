"""The optimised form of graphs that calls run: without unused nodes and plain masks, and in checkpointed pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.linking import link
from peftfx.graph.rewriter import program_of
from peftfx.model.graphs.pieces import Pieces, layers_end
from peftfx.passes.optimization.dead_code import Sweep
from peftfx.passes.optimization.plain_masks import kind_of, masks_of, sources, without_masks

Kinds = tuple[tuple[str, str], ...]
_TAKEN = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")


@dataclass(frozen=True)
class Checkpoints:
    """The options by which layers are checkpointed.

    Attributes:
        given: options of `torch.utils.checkpoint.checkpoint`.
        options: options of transformers' `activation_checkpointing_enable`.
        in_modules: whether checkpointing is enabled in the base's modules; done when a call first takes that road.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    in_modules: bool = False

    @property
    def every(self) -> int:
        """The interval of checkpointed layers: 1 for every layer, 2 for every second layer."""
        return int(self.options.get("every_n_layers", 1))

    def refuse_for(self, graph: Graph) -> None:
        """Refuse options that a graph cannot be checkpointed with, and graphs without a place to cut.

        Raises:
            PeftfxError: an option is unknown, or no layer's end is found in the graph.
        """
        other = [name for name in self.given if name not in _TAKEN]
        other += [name for name, value in self.options.items() if value and name != "every_n_layers"]
        if other:
            hint = f"leave it out; when calls run a graph, there are every_n_layers, {', '.join(_TAKEN)}"
            raise PeftfxError(f"calls run a graph, whose layers cannot be checkpointed with {other[0]}", other[0], hint)
        if self.every < 1:
            raise PeftfxError(f"not a number of layers: {self.every}", "every_n_layers", "give 1 or more")
        if not layers_end(graph):
            what = "calls run a graph, and no place was found in it where a layer of the model ends"
            raise PeftfxError(what, "gradient checkpointing", "train with a smaller batch")


class Runs:
    """The optimised forms of cached graphs; each is made when first needed."""

    def __init__(self) -> None:
        self._swept: dict[object, tuple[Graph, Graph]] = {}  # both graphs: an id is valid only while its object lives
        self._masks: dict[int, tuple[Graph, _Masks | None]] = {}
        self._pieces: dict[object, tuple[Graph, Pieces]] = {}

    def swept(self, graph: Graph, kinds: Kinds = ()) -> Graph:
        """Return a graph without nodes whose results are not used; the new graph is only for running.

        Args:
            graph: the graph.
            kinds: the masks to leave out, by the names of their nodes, each with what the mask shows.
        """
        if graph.derived:  # derived weights are computed again and written into this graph itself
            return graph
        key = (id(graph), kinds)
        if key not in self._swept:
            made = without_masks(graph, dict(kinds)) if kinds else graph
            self._swept[key] = graph, Sweep()(made).graph
        return self._swept[key][1]

    def runner(
        self, graph: Graph, tensors: Sequence[Tensor], checkpoints: Checkpoints | None
    ) -> Callable[..., list[Tensor]]:
        """Return the function that runs a graph for a call with these inputs."""
        found = self.swept(graph, self._kinds(graph, tensors))
        if checkpoints is None or found.derived:
            return found.run
        key = (id(found), checkpoints.every, *map(repr, checkpoints.given.items()))
        if key not in self._pieces:
            self._pieces[key] = found, Pieces(found, checkpoints.every, checkpoints.given)
        return self._pieces[key][1].run

    def forget(self) -> None:
        """Drop all forms, because their graphs have been dropped."""
        self._swept.clear()
        self._masks.clear()
        self._pieces.clear()

    def _kinds(self, graph: Graph, tensors: Sequence[Tensor]) -> Kinds:
        """Return, for these inputs, which masks of a graph show everything, or all earlier positions."""
        if graph.derived or any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
            return ()
        if id(graph) not in self._masks:
            self._masks[id(graph)] = graph, _Masks.of(graph)
        masks = self._masks[id(graph)][1]
        return () if masks is None else masks.kinds(tensors)


@dataclass(frozen=True)
class _Masks:
    """The attention masks of a graph, and a program that computes them.

    Attributes:
        names: the names of the masks' nodes.
        program: computes the masks from the graph's inputs.
    """

    names: tuple[str, ...]
    program: fx.GraphModule

    @staticmethod
    def of(graph: Graph) -> _Masks | None:
        """Return the masks of a graph, or None if there are none."""
        masks = masks_of(graph)
        needed = {node for mask in masks for node in sources(mask, graph) or ()}
        inputs = [node for node in graph.nodes() if node.op == "placeholder"]
        body = [node for node in graph.nodes() if node in needed and node.op != "placeholder"]
        made = program_of(inputs, body, masks)
        holders = dict(graph.module.named_children())
        return _Masks(tuple(mask.name for mask in masks), link(made, holders)) if masks else None

    def kinds(self, tensors: Sequence[Tensor]) -> Kinds:
        """Return the names and kinds of the masks that, for these inputs, show everything or all earlier positions."""
        with torch.no_grad():
            seen = zip(self.names, self.program.forward(*tensors), strict=True)
            return tuple((name, kind) for name, mask in seen if (kind := kind_of(mask)))
