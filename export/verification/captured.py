"""The captured base compared with the model's own code, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftfx.errors import PeftfxError, first_line, raise_if_memory_is_out
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.eager.kept_state import run_kept, state_kept
from peftfx.graph.graph import Graph, leaf_names
from peftfx.model.adapted import AdaptedModel
from peftfx.options import FORWARD
from peftfx.views.capturing.settling import close, largest_gap, near
from peftfx.views.entry import Entry, forward
from peftfx.views.view import View, as_captured


def eager_forward(adapted: AdaptedModel, call: Mapping[str, object]) -> object:
    """Run the model's own forward, with zeros as the active soft prompt, and return its output.

    Raises:
        StateError: the model keeps state, and computes something else in its next call.
    """
    entry, base = adapted.entry(), adapted.base

    def run() -> object:
        return base(**call) if entry is None else entry(forward, base, entry.hole(base), call)

    with state_kept(base) as kept:
        output = run()
        kept.refuse_other(by_name(output), lambda: by_name(run()))
    return output


def eager_view(view: View, entry: Entry | None, base: nn.Module, case: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the model's own code in a view, with zeros as the soft prompt, and return its outputs."""
    with state_kept(base):
        output = view(base, case) if entry is None else entry(view, base, entry.hole(base), case)
    assert isinstance(output, dict)
    return output


def by_name(output: object) -> dict[str, Tensor]:
    """Return the tensors of a model's output by name."""
    named = zip(leaf_names(output), pytree.tree_leaves(output), strict=True)
    return {name: value for name, value in named if isinstance(value, Tensor)}


def tensors_in(output: object) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def gives_nan(value: Tensor, case: Mapping[str, Tensor]) -> bool:
    """Return whether an output has a NaN elsewhere than at padding."""
    mask = case.get("attention_mask")
    if mask is not None and mask.ndim == 2 and mask.shape == value.shape[:2]:
        value = value[mask != 0]
    return bool(value.isnan().any())


def hold_call(captured: Graph, case: Mapping[str, Tensor], want: object) -> None:
    """Compare the captured base with `want`, the output of the model's own code, in one call of the forward.

    Raises:
        VerificationError: they differ.
    """
    got = run_kept(captured.run, captured, case)
    tensors = [(name, b) for name, b in zip(captured.outputs, got, strict=True) if isinstance(b, Tensor)]
    for (name, b), a in zip(tensors, tensors_in(want), strict=True):
        hold(name, a, b, close(captured.base))


def hold_view(adapted: AdaptedModel, view: View, case: dict[str, Tensor]) -> None:
    """Compare the captured base with the eager base in a view, in one call.

    Raises:
        PeftfxError: the eager model refuses the call, or makes a table longer for it, as the captured base cannot.
        VerificationError: the captured base differs from the eager base.
    """
    seen, entry = adapted.under_prompt(view)
    captured = adapted.graphs.captured(seen.inputs(adapted.base), entry, seen)
    try:
        with as_captured(adapted.base):
            want = eager_view(seen, entry, adapted.base, case)
    except Exception as error:
        raise_if_memory_is_out(error)
        raise refused(adapted, view, error) from error
    try:
        got = run_kept(captured.run, captured, case)
    except IndexError as error:
        raise refused(adapted, view, error) from error
    for (name, a), b in zip(want.items(), got, strict=True):
        shown = view.shown(name, case, a), view.shown(name, case, b)
        hold(name, *shown, close(captured.base), sizes=(a.shape, b.shape))


def hold(
    name: str, want: Tensor, got: Tensor, close: float, *, sizes: tuple[Sequence[int], Sequence[int]] | None = None
) -> None:
    """Compare an output of the captured model with the model's own output, and refuse a difference.

    `close` says how far they may be apart, relative to the largest magnitude. Where the model itself gives NaN, as at
    padding, nothing is compared. `sizes` are the shapes of the whole outputs, if parts of them are compared.
    """
    theirs, ours = (list(shape) for shape in sizes or (want.shape, got.shape))
    if theirs != ours:
        raise _differs(name, f"gives {ours} where the model gives {theirs}")
    known = ~want.isnan()
    want, got = want[known], got[known]
    if not near(want, got, close):
        raise _differs(name, f"differs from the model by {largest_gap(want, got):.2e}")


def _differs(name: str, how: str) -> VerificationError:
    return VerificationError(f"the captured model {how}", name, "report this model")


def refused(adapted: AdaptedModel, view: View, error: Exception) -> PeftfxError:
    """Make the error for a model whose own code does not run in a view."""
    what = f"the model does not run in its {view.name} view: {first_line(error)}"
    hint = "call the model itself to see where" if view.name == FORWARD else "export its forward view"
    return PeftfxError(what, type(adapted.base).__name__, hint)
