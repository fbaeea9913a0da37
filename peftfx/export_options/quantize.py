"""Read how weights are rounded from a text, such as `"int4(block=64, symmetric=False); int8@head | attention.value"`.

    schemes := scheme (';' scheme)*
    scheme  := ('int4' | 'int8' | 'nf4' | 'none') ['(' options ')'] ['@' target]

A target is an expression of `peftfx.sites.expression`. If several schemes pick a weight, the last one counts. The
options are `block`, `symmetric`, `search` and `gptq`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftfx.errors import PeftfxError, shown
from peftfx.field_types import refuse_misfit_fields
from peftfx.options import QUANTIZATIONS, check_choice
from peftfx.sites.expression import parse

BITS = {"int8": 8, "int4": 4}
BLOCKS = (16, 32, 64, 128, 256)  #: the block sizes that ONNX Runtime's operators support
DEFAULT_BLOCKS = {"nf4": 64}  #: the block size of bitsandbytes; other kinds have 32
_LEAST_TABLE_BLOCK = 64  #: the smallest block of bitsandbytes
_SCHEME = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\)\s*)?(?:@((?:/(?:[^/\\]|\\.)+/|[^/;])*))?(;|$)")
_OPTIONS = ("block", "symmetric", "search", "gptq")
_HINT = "pass, for example, int4, int4(block=64, symmetric=False), or int4; int8@head | attention.value"


@dataclass(frozen=True)
class Scheme:
    """A way of rounding weights, and the weights that it is for.

    Attributes:
        kind: `int4` or `int8` are integers on a grid for each block; `nf4` is bitsandbytes' table; `none` does not
            round.
        block: how many numbers share a grid; 0 means 64 for `nf4` and 32 for other kinds.
        symmetric: whether the grid has its zero in the middle. Otherwise each block has its own zero.
        search: whether to search the grid with the least squared error for each block.
        gptq: whether GPTQ chooses the integers by the outputs on a text. Otherwise they are the nearest integers.
        target: the weights to round, as an expression of roles and paths; empty means all.
    """

    kind: str
    block: int = 0
    symmetric: bool = True
    search: bool = True
    gptq: bool = False
    target: str = ""

    def __post_init__(self) -> None:
        refuse_misfit_fields(self)
        check_choice(self.kind, QUANTIZATIONS, "quantize", "unknown quantisation")
        if self.block == 0:
            object.__setattr__(self, "block", DEFAULT_BLOCKS.get(self.kind, 32))
        if self.block not in BLOCKS:
            hint = f"the sizes are {', '.join(map(str, BLOCKS))}"
            raise PeftfxError(f"ONNX Runtime has no operator with blocks of {self.block}", "quantize", hint)
        if not self.symmetric and self.kind not in BITS:
            raise PeftfxError(f"{self.kind} has no zero points", "quantize", "leave symmetric out")
        if self.gptq and self.kind not in BITS:
            raise PeftfxError(f"GPTQ rounds to integers, not to {self.kind}", "quantize", "leave gptq out")
        if self.target:
            parse(self.target)

    @property
    def bits(self) -> int:
        """The number of bits of a code."""
        return BITS.get(self.kind, 4)

    @property
    def middle(self) -> int:
        """The zero of all blocks of a symmetric grid."""
        return 1 << self.bits - 1

    def __str__(self) -> str:
        told = [f"block={self.block}", *(f"{n}=False" for n in ("symmetric", "search") if not getattr(self, n))]
        told += ["gptq=True"] if self.gptq else []
        return f"{self.kind}({', '.join(told)})" + (f"@{self.target}" if self.target else "")


def parse_schemes(text: str) -> tuple[Scheme, ...]:
    """Read the schemes that a text describes.

    Raises:
        PeftfxError: the text cannot be read, or names an unknown kind or option.
    """
    found: list[Scheme] = []
    position = 0
    while position < len(text) or not found:
        match = _SCHEME.match(text, position)
        if match is None or (match[3] is not None and not match[3].strip()):
            raise PeftfxError(f"cannot read the quantisation: {shown(text[position:])}", "quantize", _HINT)
        check_choice(match[1], QUANTIZATIONS, "quantize", "unknown quantisation")
        found.append(Scheme(match[1], **_options(match[2] or "", text), target=(match[3] or "").strip()))
        position = match.end()
        if not text[position:].strip():
            break
    return tuple(found)


def check_directory_schemes(schemes: Sequence[Scheme]) -> None:
    """Refuse schemes that a transformers directory cannot hold.

    Raises:
        PeftfxError: nf4 is mixed with integers, bitsandbytes has no such blocks, or nothing is rounded.
    """
    kinds = sorted({scheme.kind for scheme in schemes} - {"none"})
    if "nf4" in kinds and len(kinds) > 1:
        others = " and ".join(kinds[:-1])
        what = f"a directory has one format, but nf4 needs that of bitsandbytes and {others} that of compressed-tensors"
        raise PeftfxError(what, "quantize", "round all to nf4, or all to int4 and int8")
    if not kinds:
        raise PeftfxError("quantize rounds no weight", "quantize", "leave quantize out")
    small = next((s for s in schemes if s.kind == "nf4" and s.block < _LEAST_TABLE_BLOCK), None)
    if small is not None:
        hint = f"pass block={_LEAST_TABLE_BLOCK} or more"
        raise PeftfxError(f"bitsandbytes has no blocks of {small.block}", "quantize", hint)


def check_calibration(schemes: Sequence[Scheme], calibration: object, batched: Sequence[str] = ()) -> None:
    """Refuse GPTQ without a text, or in a batched export."""
    if not any(scheme.gptq for scheme in schemes):
        return
    if batched:
        what = "GPTQ needs the layers' inputs in one model, but in a batched export each row has its own adapter"
        raise PeftfxError(what, "quantize, batched", "leave gptq out, or export each adapter merged")
    if calibration is None:
        what = "GPTQ needs the layers' inputs on a text, but no text is given"
        raise PeftfxError(what, "quantize", "give a file of plain text: --calibration FILE")


def _options(inner: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"options({inner})", mode="eval").body
        assert isinstance(call, ast.Call)
        found = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError) as error:
        raise PeftfxError(f"cannot read the options ({shown(inner)})", f"quantize: {shown(text)}", _HINT) from error
    wrong = next((name for name in found if name not in _OPTIONS), None)
    if wrong is not None or call.args:
        what = f"a scheme has no option {wrong!r}" if wrong else "a scheme's options are given by name"
        raise PeftfxError(what, f"quantize: {shown(text)}", "the options are block, symmetric, search and gptq")
    return found
