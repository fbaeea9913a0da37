"""The laws of methods: `peftfx.testing.check(MyMethod)` tests a method of any class, and compares it with HF PEFT's.

The extra `peftfx[testing]` installs hypothesis, which draws the cases, and `peft`, which is the reference.
"""

from peftfx.testing.check import CheckReport, check

__all__ = ["CheckReport", "check"]
