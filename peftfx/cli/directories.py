"""Look at a model in a directory: its sites, what rules would do to it, and a page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftfx.bases.load import load_base
from peftfx.model.api import bare, plan
from peftfx.model.plan import Plan, shapes_of
from peftfx.pages.page import Page
from peftfx.pictures.adapted import show
from peftfx.rules.resolution import place
from peftfx.sites.sites import Sites


def inspect_directory(directory: str | Path, *, task: str | None = None, target: str | None = None) -> Sites:
    """Return the sites of a model in a directory, or those that `target` picks. The weights are not read."""
    sites = bare(load_base(Path(directory), task=task, weights=False)).sites
    return sites if target is None else Sites(tuple(match.site for match in sites.select(target)))


def page_directory(
    directory: str | Path, *, rules: str | None = None, adapters: Sequence[Path] = (), task: str | None = None
) -> Page:
    """Show a model in a directory as a page, with `rules` or with `adapters`. Weights are read only for adapters."""
    if not adapters:
        adapted = bare(load_base(Path(directory), task=task, weights=False))
        made = {} if rules is None else {"": shapes_of(adapted.source, place(adapted.source, adapted.sites, rules))}
        return show(adapted.base, adapted.sites, made, values=False)
    adapted = bare(load_base(Path(directory), task=task))
    for path in adapters:
        name = path.name.replace(".", "_") or "adapter"
        adapted.named.refuse(name)
        adapted.load_adapter(path, name)
    return adapted.show()


def plan_directory(directory: str | Path, rules: str, *, task: str | None = None) -> Plan:
    """Return what `rules` would do to a model in a directory. The weights are not read."""
    return plan(load_base(Path(directory), task=task, weights=False), rules)
