"""Make a GraphModule whose attributes are read from the modules and tensors that other programs read, too."""

from __future__ import annotations

import contextlib
import functools
import keyword
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn


class _Forward:
    """In place of a forward: it generates the forward when it is looked up, by a call or by `torch.compile`."""

    def __get__(self, module: fx.GraphModule | None, owner: type) -> Any:
        if module is None:
            return self
        with _reading_keywords(module.graph):
            fx.GraphModule.recompile(module)  # this replaces the forward
        return module.forward


_PENDING = _Forward()


class _Linked(fx.GraphModule):
    """A GraphModule whose Python code is generated when it is first needed: most are only read and rewritten."""

    def recompile(self) -> None:  # type: ignore[override]
        type(self).forward = _PENDING  # type: ignore[assignment]  # each GraphModule has a class of its own

    @property
    def code(self) -> str:
        if vars(type(self)).get("forward") is _PENDING:
            with _reading_keywords(self.graph):
                super().recompile()
        return super().code

    def __reduce__(self) -> Any:
        return fx.GraphModule(self, self.graph).__reduce__()


def link(graph: fx.Graph, holders: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Return a GraphModule over `graph` whose attributes live in `holders`: looked up at run time, not copied."""
    module = _Linked(nn.Module(), fx.Graph())
    for name, holder in holders.items():
        module.add_module(name, holder)
    module.graph = graph
    return module


def _reading_keywords(graph: fx.Graph) -> contextlib.AbstractContextManager[None]:
    """Have generated code read attributes that are named like Python's keywords, as `in` of a `ModuleDict`."""
    named = {n.name: str(n.target) for n in graph.nodes if n.op == "get_attr" and _has_keyword(str(n.target))}

    def transform(statements: list[str], before: Callable[[list[str]], list[str]] | None) -> list[str]:
        statements = before(statements) if before else statements
        return [_reading(named, statement) for statement in statements] if named else statements

    return graph.on_generate_code(lambda before: functools.partial(transform, before=before))


def _has_keyword(target: str) -> bool:
    return any(map(keyword.iskeyword, target.split(".")))


def _reading(named: Mapping[str, str], statement: str) -> str:
    name, assigned, _ = statement.partition(" = ")
    if not assigned or name not in named:
        return statement
    read = functools.reduce(lambda owner, part: f"getattr({owner}, {part!r})", named[name].split("."), "self")
    return f"{name} = {read}"
