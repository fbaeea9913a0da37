"""Words of a command line that are more than a choice, checked before anything large is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from peftfx.bases.tasks import check_task
from peftfx.errors import PeftfxError
from peftfx.export_options.values import DEFAULT_SLOTS, Slots
from peftfx.sites.expression import parse

_HUB = re.compile(r"[\w.-]+/[\w.-]+")  #: a name on the Hub
_HOME = "~/.cache/huggingface"
_DTYPES = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}


def check_looks(task: str | None, target: str | None, rules: str | None, *, drawn: bool = False) -> None:
    """Refuse an unknown task, a target that cannot be read, and what does not go together."""
    if task is not None:
        check_task(task)
    if target is not None:
        parse(target)
    if target is not None and rules is not None:
        raise PeftfxError(
            "--target and --rules are both given", "inspect", "put the target into the rule, as in lora@mlp"
        )
    if drawn and (target is not None or rules is not None):
        what = "--network and --graphml always show all sites"
        raise PeftfxError(what, "inspect", "leave out --target and --rules")


def check_page(html: Path | None, adapters: Sequence[Path], *, others: bool, rules: str | None) -> None:
    """Refuse what does not go together with a page, and an adapter to show without one."""
    if html is None and adapters:
        raise PeftfxError("--adapter is shown on a page only", "inspect", "say where to: --html page.html")
    if html is not None and others:
        raise PeftfxError(
            "a page always shows the whole model", "inspect", "leave out --target, --network and --graphml"
        )
    if adapters and rules is not None:
        raise PeftfxError("--rules and --adapter are both given", "inspect", "show one of them")


def dtype_named(text: str | None) -> str | None:
    """The name that options have for a dtype: torch's names are known too."""
    return text if text is None else _DTYPES.get(text.lower().removeprefix("torch."), text)


Download = Annotated[
    bool, typer.Option("--download", help="Fetch a base org/name that is not in the local Hugging Face cache.")
]


def found_base(base: Path, *, download: bool = False) -> Path:
    """A base's directory or file; `org/name` that is none is a model in the local Hugging Face cache.

    With `download` it is fetched from the Hub where it is not in the cache; nothing else asks the network.

    Raises:
        PeftfxError: it is none of these, or the Hub does not give it.
    """
    if os.path.exists(base) or not _HUB.fullmatch(base.as_posix()):
        return base
    found = _cached(base.as_posix())
    if found is not None:
        return found
    if download:
        from peftfx.cli.hub import from_hub

        return from_hub(base.as_posix(), _cache())
    what = "there is no such directory, and no model of this name in the local Hugging Face cache"
    hint = "pass --download to fetch it, or give a directory"
    raise PeftfxError(what, f"{base}, {_cache()}", hint)


def _cache() -> Path:
    home = os.environ.get("HF_HOME") or _HOME
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _cached(name: str) -> Path | None:
    model = _cache() / f"models--{name.replace('/', '--')}"
    revision = model / "refs" / "main"
    if os.path.isfile(revision):
        found = model / "snapshots" / revision.read_text(encoding="utf-8").strip()
        if os.path.isdir(found):
            return found
    return None


def chosen_slots(target: str | None, *, swappable: bool, prefix: bool) -> Slots | None:
    """The slots of `--slots`, by default of all linear layers; None without `--swappable`.

    Raises:
        PeftfxError: the target cannot be read, or is given without `--swappable`, where it would do nothing.
    """
    if swappable:
        return Slots(DEFAULT_SLOTS if target is None else target, prefix)
    lost = "--slots" if target is not None else "" if prefix else "--no-prefix"
    if lost:
        raise PeftfxError(f"{lost} is an option of --swappable", lost, "pass --swappable too")
    return None


def named_directories(texts: Iterable[str]) -> dict[str, Path]:
    """Names and directories: each `NAME=DIR`.

    Raises:
        PeftfxError: a text is none, or names what another names, too.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise PeftfxError("not an adapter with a name", text, "as in --batched french=adapters/french")
        if name in found:
            raise PeftfxError(f"two adapters are named {name!r}", text, f"the other is {found[name]}")
        found[name] = Path(folder)
    return found
