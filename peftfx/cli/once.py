"""Commands whose options are given once, unless they take several values."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperOption

from peftfx.cli.voice import VOICE
from peftfx.errors import PeftfxError


class GivenOnce(TyperCommand):
    """A command that refuses an option that is given again: only its last value would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments of a command.

        Raises:
            PeftfxError: an option that takes one value has several.
        """
        values, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for one in given:
            single = isinstance(one, TyperOption) and not (one.multiple or one.is_flag or one.count)
            if single and (times := given.count(one)) > 1:
                flag = max(one.opts, key=len)
                VOICE.as_json = bool(values.get("as_json"))  # the command, which sets it, does not begin
                raise PeftfxError(f"{flag} is given {times} times, and takes one value", flag, "give it once")
        return super().parse_args(ctx, args)
