"""`peftfx methods`: what a rule can say."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Of one method, as lora: print its options.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the methods, or one method's options: what a rule can say."""
    import json

    from peftfx.rules.catalogue import catalogue, describe
    from peftfx.rules.text import method_by_name

    found = catalogue() if name is None else (describe(method_by_name(name)),)
    if as_json:
        print(json.dumps([method.to_dict() for method in found], indent=2))
    elif name is None:
        width = max(len(method.name) for method in found)
        print("\n".join(f"{method.name:{width}}  {method.title}" for method in found))
    else:
        print(found[0])
