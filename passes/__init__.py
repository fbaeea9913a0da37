"""How graphs are rewritten: one pass a file, each `Graph -> PassResult`, run and checked by `PassManager`."""

if __name__ != "peftfx.passes":
    raise ImportError("import this package as peftfx.passes: a second copy under another name would not know the first")

from peftfx.passes.base import Pass, PassManager, PassResult, Region
from peftfx.passes.cleanup import Cleanup
from peftfx.passes.fold import Evaluate
from peftfx.passes.fuse import Fuse
from peftfx.passes.insert import Insert
from peftfx.passes.merge import Merge
from peftfx.passes.remove import Remove
from peftfx.passes.sweep import Sweep

__all__ = [
    "Cleanup",
    "Evaluate",
    "Fuse",
    "Insert",
    "Merge",
    "Pass",
    "PassManager",
    "PassResult",
    "Region",
    "Remove",
    "Sweep",
]
