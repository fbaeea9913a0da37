"""Rewrite graphs by passes, one pass in each file: `Graph -> PassResult`, run and checked by `PassManager`."""

if __name__ != "peftfx.passes":
    raise ImportError("import this package as peftfx.passes: a second copy under another name would not know the first")

from peftfx.passes.adaptation.evaluate import Evaluate
from peftfx.passes.adaptation.insert import Insert
from peftfx.passes.adaptation.merge import Merge
from peftfx.passes.adaptation.remove import Remove
from peftfx.passes.base import Pass, PassResult, Region
from peftfx.passes.manager import PassManager
from peftfx.passes.optimization.cleanup import Cleanup
from peftfx.passes.optimization.dead_code import Sweep
from peftfx.passes.optimization.fuse import Fuse
from peftfx.passes.patterns.probe import Probe
from peftfx.passes.patterns.rewrite import Rewrite
from peftfx.passes.text import parse_pass

__all__ = [
    "Cleanup",
    "Evaluate",
    "Fuse",
    "Insert",
    "Merge",
    "Pass",
    "PassManager",
    "PassResult",
    "Probe",
    "Region",
    "Remove",
    "Rewrite",
    "Sweep",
    "parse_pass",
]
