"""The laws by name: each law's statement, the methods that it applies to, and the number of its examples."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import given, seed
from hypothesis import strategies as st

from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Method
from peftfx.contract.override import OverrideMethod
from peftfx.contract.pattern import PatternMethod
from peftfx.contract.sequence import SequenceMethod
from peftfx.contract.weight import WeightMethod
from peftfx.testing import arithmetic, frame, prompts, slots, statements
from peftfx.testing.cases import Choices, cases, examples
from peftfx.testing.models import Spec
from peftfx.testing.pool import POOL

_ACTS = (WeightMethod, AttentionMethod, OverrideMethod, PatternMethod)
_ALL = (*_ACTS, SequenceMethod)
_QUICK = 2  #: the number of examples by default: the simplest case, with which hypothesis begins, and a random one


@dataclass(frozen=True)
class Law:
    """A law of methods: a statement, and the cases that it is tested on.

    Attributes:
        statement: a function of a case and a method, which raises if the law does not hold.
        examples: the number of examples of a whole test.
        of: the families of methods that the law applies to.
        least: the least number of places where the method must act.
        dtypes: the dtypes of the models.
        needs: the optional member that the law is about. It says nothing of a method without one of its own.
    """

    statement: Callable[..., None]
    examples: int
    of: tuple[type[Method], ...] = _ACTS
    least: int = 1
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    needs: str = ""

    @property
    def name(self) -> str:
        """The law's name: that of its function."""
        return self.statement.__name__

    @property
    def text(self) -> str:
        """The law's statement in words: the first line of its function's docstring."""
        return (self.statement.__doc__ or "").partition("\n")[0]

    def is_about(self, cls: type[Method]) -> bool:
        """Return whether the law applies to this class of methods."""
        return issubclass(cls, self.of)

    def untested(self, cls: type[Method]) -> str:
        """Return why the law says nothing of this class of methods; empty if it does."""
        if self.needs and getattr(cls, self.needs) is getattr(WeightMethod, self.needs):
            return f"{cls.__name__} has no {self.needs} of its own"
        return ""

    def hold(
        self,
        cls: type[Method],
        choices: Choices | None = None,
        *,
        whole: bool = False,
        quick: int = _QUICK,
        spec: Spec | None = None,
    ) -> None:
        """Test the law on random cases of a method: on all of its examples, or on a few that include the simplest.

        Args:
            cls: the method's class.
            choices: the values to draw for some options; see `Choices`.
            whole: whether to test all of the law's examples.
            quick: the number of examples otherwise.
            spec: the model to test on, in place of random models.

        Raises:
            Exception: the error that the statement raised, with the case and the method in its notes.
        """
        pool = [one for one in POOL if one.dtype in self.dtypes] if spec is None else [spec]
        count = self.examples if whole else quick

        @seed(zlib.crc32(f"{self.name} {cls.peft_type}".encode()))
        @examples(count, shrink=whole)
        @given(data=st.data())
        def held(data: Any) -> None:
            self.statement(*data.draw(cases(cls, choices, pool, self.least)))

        held()


LAWS = (
    Law(statements.neutral, 20),
    Law(arithmetic.fold, 60, (WeightMethod,), needs="fold"),
    Law(arithmetic.by_row, 30, (WeightMethod,), needs="by_row"),
    Law(arithmetic.update, 30, (WeightMethod,), needs="update"),
    Law(prompts.saved, 15, (SequenceMethod,)),
    Law(statements.merge, 30, _ALL),
    Law(statements.merge_in_place, 12, _ALL),
    Law(statements.remove, 20, _ALL),
    Law(statements.remove_one, 12),
    Law(statements.idempotence, 15, _ALL),
    Law(statements.commute, 12, least=2),
    Law(frame.frame, 12),
    Law(frame.gradients, 15, _ALL),
    Law(statements.save_and_load, 25, _ALL),
    Law(statements.sizes, 15, _ALL),
    Law(statements.roads, 15),
    Law(slots.slots, 8, (WeightMethod,), dtypes=("float32",), needs="update"),
    Law(slots.rows, 8, (WeightMethod,), dtypes=("float32",), needs="update"),
    Law(statements.onnx, 6, _ALL, dtypes=("float32",)),
)
