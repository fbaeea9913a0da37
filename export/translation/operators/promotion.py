"""Make torch's type promotion read what it knows of each node, instead of computing all nodes again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch.onnx._internal.fx.passes import type_promotion

_Computing = type_promotion._TypePromotionInterpreter


class _Reading(_Computing):
    """Type promotion that takes nodes' values from their metadata. Nodes that it makes or changes have theirs too."""

    def run_node(self, n: fx.Node) -> Any:
        with self._set_current_node(n):
            rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(n, rule)
        return n.meta["val"] if n.op == "call_function" and "val" in n.meta else fx.Interpreter.run_node(self, n)


@contextmanager
def promoted_by_reading() -> Iterator[None]:
    """Make torch's exporter promote types without computing values while this context lasts."""
    type_promotion._TypePromotionInterpreter = _Reading  # type: ignore[misc]
    try:
        yield
    finally:
        type_promotion._TypePromotionInterpreter = _Computing  # type: ignore[misc]
