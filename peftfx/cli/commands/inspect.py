"""The command `peftfx inspect`: show where adapters can act, and what rules would do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftfx.cli.garbage import kept_to_the_end
from peftfx.cli.speech import quiet
from peftfx.cli.voice import VOICE, tell
from peftfx.cli.words import Download, check_looks, check_page, found_base, task_choice


def inspect(
    model: Annotated[Path, typer.Argument(help="Directory of a model (config.json is enough), or org/name.")],
    task: Annotated[str | None, task_choice("the model's own")] = None,
    target: Annotated[
        str | None, typer.Option(help="Show only what this target picks, as 'attention.query | mlp'.")
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(help="Show what these would do, as 'lora(r=8)@attention.query; ia3@mlp'; see `peftfx methods`."),
    ] = None,
    network: Annotated[
        bool, typer.Option("--network", help="Print the dataflow between sites as JSON (node-link format).")
    ] = False,
    graphml: Annotated[
        Path | None, typer.Option(help="File to write the dataflow between sites to, as GraphML.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="HTML file to write: the layers, and where --rules or each --adapter act."),
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="With --html: a HF PEFT directory to show; repeat it for more.")
    ] = None,
    download: Download = False,
) -> None:
    """Print where adapters can act (each site's module path, kind, role, layer and shape), or what rules would do."""
    import json

    check_looks(task, target, rules, drawn=network or graphml is not None)
    model = found_base(model, download=download)
    check_page(html, adapter or (), others=target is not None or network or graphml is not None, rules=rules)
    with kept_to_the_end():
        from rich.console import Console

        from peftfx.cli.directories import inspect_directory, page_directory, plan_directory
        from peftfx.cli.progress import Progress
        from peftfx.sites.network import to_json, write_graphml

    if html is not None:
        with quiet(), Progress():
            page_directory(model, rules=rules, adapters=adapter or (), task=task).save(html)
        size = html.stat().st_size
        tell({"output": str(html), "bytes": size}, f"{html}: {size:,} B")
        return
    if rules is not None:
        with quiet(), Progress():
            plan = plan_directory(model, rules, task=task)
        tell(plan.to_dict(), plan)
        return
    with quiet(), Progress():
        sites = inspect_directory(model, task=task, target=target)
    if graphml is not None:
        write_graphml(sites.network(), graphml)
    if network:
        print(json.dumps(to_json(sites.network()), indent=2))
    elif VOICE.as_json:
        tell([site.to_dict() for site in sites])
    elif not VOICE.quiet:
        Console(width=None if sys.stdout.isatty() else 160).print(sites.table())
