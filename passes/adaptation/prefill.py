"""Replace virtual tokens before a causal model by the keys and values that they leave in its cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from peftfx.errors import PeftfxError
from peftfx.graph.graph import CONSTANTS, DERIVED, Graph
from peftfx.graph.recipe import Get
from peftfx.graph.rewriter import Rewriter
from peftfx.passes.base import Pass, PassResult, attributes_of
from peftfx.views.cache_prefix import Prefilled
from peftfx.views.decode import Decode

NAME = "sequence.prefilled"  #: the name of the derived tensor
_TOLERANCE = 1e-4  #: tolerance between the keys under two different texts, relative to the largest


@dataclass(frozen=True)
class Left:
    """The recipe of what virtual tokens leave in a cache. It runs the model on them, one weight at a time.

    The model is run with two different texts after the tokens. This detects a model whose virtual tokens see the text.

    Attributes:
        graph: the model's decode view with the virtual tokens in its stream of tokens, adapted.
        view: the decode view.
        entry: has the number of virtual tokens, and a token to put after them.
    """

    graph: Graph = field(repr=False)
    view: Decode
    entry: Prefilled

    @torch.no_grad()
    def evaluate(self, get: Get) -> Tensor:
        """Compute a row for each virtual token, with everything that the layers keep of it.

        Raises:
            PeftfxError: the result depends on the text after the virtual tokens.
        """

        def read(target: str) -> Tensor:
            return self.graph.get(target) if target.startswith(f"{CONSTANTS}.") else get(target)

        flat = _Reads(self.graph.module, read).run(*self._texts())
        outputs = dict(zip(self.graph.outputs, flat, strict=True))
        kept = [outputs[name][:, :, : self.entry.shape[0]] for name in self.view.present_names]
        for rows in kept:
            if float((rows[0] - rows[1]).abs().max()) > _TOLERANCE * float(rows.abs().max()):
                what = "virtual tokens of this model see the text behind them: they are no constant ahead of its cache"
                raise PeftfxError(what, type(self.graph.base).__name__, "use its forward, or prefix tuning")
        return torch.cat([rows[0].transpose(0, 1).flatten(1) for rows in kept], 1)

    def _texts(self) -> list[Tensor]:
        """Make two texts of one token each, without a past."""
        assert self.entry.tokens is not None
        filler = self.entry.tokens.filler
        device = next((p.device for p in self.graph.base.parameters()), torch.device("cpu"))
        made = self.view.inputs(self.graph.base, sizes={"batch": 2, "sequence": 1, "past": 0})
        made["input_ids"] = torch.tensor([[filler], [filler + 1 if filler == 0 else filler - 1]])
        return [made[spec.name].to(device) for spec in self.graph.inputs]


class _Reads(fx.Interpreter):
    """An interpreter that runs a program on tensors, each of which is read when it is needed."""

    def __init__(self, module: fx.GraphModule, get: Get) -> None:
        super().__init__(module)
        self.get = get

    def fetch_attr(self, target: str) -> Tensor:
        """Return a tensor of the program."""
        return self.get(target)


@dataclass(frozen=True, eq=False)
class Prefill(Pass):
    """Fill the hole of a decode view with what virtual tokens leave in its cache, computed when it is needed.

    Attributes:
        left: the recipe of these keys and values.
    """

    left: Left

    def __call__(self, graph: Graph) -> PassResult:
        new = graph.clone()
        hole = attributes_of(new)[f"{CONSTANTS}.{self.left.entry.name}"]
        new.derived[NAME] = self.left
        rewriter = Rewriter(new.module.graph)
        rewriter.replace(hole, rewriter.attribute(f"{DERIVED}.{NAME}", hole.meta["val"]))
        rewriter.erase(hole)
        rewriter.close(new)
        return PassResult(new, 1)
