"""The laws of methods, for any method: `peftfx.testing.check(MyMethod)` runs them, and compares with HF PEFT's.

hypothesis draws the cases, and `peft` is what is compared with: the extra `peftfx[testing]` has both.
"""

from peftfx.testing.check import CheckReport, check

__all__ = ["CheckReport", "check"]
