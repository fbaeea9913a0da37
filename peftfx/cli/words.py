"""Check values of the command line that are more than a choice, before large libraries are imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftfx.bases.tasks import TASKS, check_task
from peftfx.errors import PeftfxError
from peftfx.export_options.values import DEFAULT_SLOTS, Slots
from peftfx.options import DTYPES
from peftfx.sites.expression import parse

_HUB = re.compile(r"[\w.-]+/[\w.-]+")  #: the form of a model's name on the Hub
_HOME = "~/.cache/huggingface"
_DTYPES = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
}


def check_looks(task: str | None, target: str | None, rules: str | None, *, drawn: bool = False) -> None:
    """Refuse an unknown task, a target that cannot be read, and options of `inspect` that exclude each other."""
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
    """Refuse options that exclude a page, and an adapter to show without a page."""
    if html is None and adapters:
        raise PeftfxError("inspect shows an adapter only on a page", "inspect", "pass --html page.html too")
    if html is not None and others:
        raise PeftfxError(
            "a page always shows the whole model", "inspect", "leave out --target, --network and --graphml"
        )
    if adapters and rules is not None:
        raise PeftfxError("--rules and --adapter are both given", "inspect", "pass one of them")


def dtype_named(text: str | None) -> str | None:
    """Return an option's name of a dtype. torch's names of dtypes are also known, and capitals."""
    if text is None:
        return None
    name = text.lower().removeprefix("torch.")
    return _DTYPES.get(name, name if name in DTYPES else text)


def choice(choices: Sequence[str], help: str, *, shown: str = "") -> Any:
    """An option of a few words: the help shows them, and the shell completes them.

    The command itself refuses another word, and tells the nearest of them.

    Args:
        choices: the words.
        help: what they are for.
        shown: what stands in the help for all of them, where they are many.
    """

    def begun(incomplete: str) -> list[str]:
        return [word for word in choices if word.startswith(incomplete)]

    return typer.Option(help=help, metavar=shown or "|".join(choices), autocompletion=begun)


def task_choice(default: str) -> Any:
    """An option for the name of a pipeline; what it is by default is told behind it."""
    return choice(tuple(TASKS), f"Pipeline name, as text-classification; by default {default}.", shown="<task>")


Download = Annotated[
    bool, typer.Option("--download", help="Fetch a base org/name that is not in the local Hugging Face cache.")
]


def found_base(base: Path, *, download: bool = False) -> Path:
    """Return a base's directory or file. `org/name` can also be a model in the local Hugging Face cache.

    With `download`, a model that is not in the cache is downloaded from the Hub. Nothing else uses the network.

    Raises:
        PeftfxError: there is no such directory or model, or the download fails.
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
    """Return the slots for `--slots`, by default of all linear layers; None without `--swappable`.

    Raises:
        PeftfxError: the target cannot be read, or is given without `--swappable`, and would have no effect.
    """
    if swappable:
        return Slots(DEFAULT_SLOTS if target is None else target, prefix)
    lost = "--slots" if target is not None else "" if prefix else "--no-prefix"
    if lost:
        raise PeftfxError(f"{lost} has no effect without --swappable", lost, "pass --swappable too")
    return None


def named_directories(texts: Iterable[str]) -> dict[str, Path]:
    """Read texts `NAME=DIR` as names and directories.

    Raises:
        PeftfxError: a text has another form, or two texts have one name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            hint = "give each adapter a name, as in --batched french=adapters/french"
            raise PeftfxError("this is not of the form NAME=DIR", text, hint)
        if name in found:
            raise PeftfxError(
                f"two adapters are named {name!r}", text, f"the other adapter of this name is {found[name]}"
            )
        found[name] = Path(folder)
    return found
