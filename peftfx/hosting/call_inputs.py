"""Inputs of a call besides the model's own, such as `task_ids`: taken from its arguments, checked, read by methods."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from peftfx.contract.method import Method
from peftfx.errors import PeftfxError, shown
from peftfx.generation.invocation import ACTIVE, active, as_offsets
from peftfx.hosting.call import CURRENT


def take(
    known: Iterable[Method], acting: Iterable[Method], kwargs: Mapping[str, object], *, whole: bool = True
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Split a call's arguments into the model's own and the inputs that methods read.

    Args:
        known: the methods of all adapters. The inputs of a method that does not act are not the model's either.
        acting: the methods that act.
        kwargs: the arguments of the call.
        whole: whether the call has all inputs; otherwise one that is missing is refused where a layer reads it.

    Raises:
        PeftfxError: an input of a method that acts is missing, or is not one valid whole number for each row.
    """
    names = {name for method in known for name in method.inputs}
    given = {}
    for method in acting:
        for name, count in method.inputs.items():
            if kwargs.get(name) is not None:
                given[name] = _checked(name, kwargs[name], count)
            elif count > 1 and whole:
                raise _missing(method, name, count)
    return {name: value for name, value in kwargs.items() if name not in names}, given


def invocations(acting: Iterable[Method], ids: object, offsets: object) -> dict[str, Tensor]:
    """Return where methods act that invocation tokens of the text call, by the names that `read_call_inputs` reads.

    Args:
        acting: the methods that act.
        ids: the tokens of the call, if there are any.
        offsets: HF PEFT's `alora_offsets`: for each row, how many of its last tokens are from the invocation's first
            token on; None if the call has no offsets.

    Raises:
        PeftfxError: the call has no tokens, or `offsets` are not such numbers.
    """
    wanted = {method.invoked_by for method in acting} - {()}
    if wanted and not (isinstance(ids, Tensor) and ids.ndim == 2):
        what = "an aLoRA acts behind its invocation tokens, and no input_ids reach the model"
        raise PeftfxError(what, "input_ids", "pass input_ids, [batch, length], in place of embeddings")
    found: dict[str, Tensor] = {}
    for tokens in wanted:
        assert isinstance(ids, Tensor)
        given = None if offsets is None else as_offsets(offsets, ids)
        found[_named(tokens)] = active(ids, given, tokens)
    return found


def _named(tokens: tuple[int, ...]) -> str:
    return f"{ACTIVE}:{','.join(map(str, tokens))}"


def read_call_inputs(method: Method, x: Tensor | None = None) -> dict[str, Tensor]:
    """Return the inputs that a method reads in this thread's present call, by name.

    Args:
        method: the method.
        x: the input of the layer, whose first axis must be the batch.
    """
    found = {}
    for name, count in method.inputs.items():
        if count < 2:
            continue
        if name not in CURRENT.given:
            raise _missing(method, name, count)
        value = CURRENT.given[name]
        if x is not None and len(x) != len(value):
            what = f"{type(method).__name__} acts by row, and a layer reads {len(x)} rows where {name} has {len(value)}"
            raise PeftfxError(what, name, "pass one for each row of the batch; leave out layers that mix its rows")
        found[name] = value if x is None else value.to(x.device)
    if method.invoked_by:
        value = CURRENT.given[_named(method.invoked_by)]
        found[ACTIVE] = value if x is None else value.to(x.device)
    return found


def refuse_unsettled(adapters: Mapping[str, Collection[Method]]) -> None:
    """Refuse methods that act by an input of the call, because an exported graph has no such input."""
    for name, methods in adapters.items():
        for method in methods:
            for asked in (asked for asked, count in method.inputs.items() if count > 1):
                what = f"{type(method).__name__} acts by {asked}, and an exported graph has no such input"
                hint = (
                    f"take one task (--task-id N; take_task({name!r}, N)), or serve all by row (--batched; split_tasks)"
                )
                raise PeftfxError(what, asked, hint)


def _checked(name: str, value: object, count: int) -> Tensor:
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PeftfxError(f"not whole numbers: {shown(value)}", name, "one for each row of the batch") from error
    if numbers.ndim == 2 and numbers.shape[1] == 1:  # as data collators make them of a column of lists
        numbers = numbers[:, 0]
    if numbers.ndim != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        what = f"not one whole number for each row, but {str(numbers.dtype)[6:]}{list(numbers.shape)}"
        raise PeftfxError(what, name, "pass [batch] whole numbers")
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < count:
        what = f"the numbers must be from 0 to {count - 1}, not from {int(numbers.min())} to {int(numbers.max())}"
        raise PeftfxError(what, name, "pass one number for each row of the batch")
    return numbers.long()


def _missing(method: Method, name: str, count: int) -> PeftfxError:
    what = f"{type(method).__name__} reads {name}, and the call has none"
    return PeftfxError(what, name, f"pass {name}=, a number from 0 to {count - 1} for each row of the batch")
