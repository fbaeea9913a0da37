"""`ensure_weight_tying` in a file of HF PEFT: the adapter is at all modules that share the embedding's tensor.

HF PEFT trains one copy for all these modules, and its file has the copy under each module's name. So the file says
all that a call needs: the names of all these modules are put into the config, and the option is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from peftfx.contract.method import Method
from peftfx.contract.override import tied_paths
from peftfx.contract.sequence import embedding_path
from peftfx.errors import warn
from peftfx.rules.peft_files import method_from_config
from peftfx.sites.expression import ends_with_any

TYING = "ensure_weight_tying"


def method_of_file(config: Mapping[str, object], where: str) -> Method:
    """Return the method of a file's config; see `peftfx.rules.peft_files.method_from_config`."""
    return method_from_config(_without_tying(config), where)


def with_tied_names(config: Mapping[str, object], base: nn.Module) -> dict[str, object]:
    """Return the config with the names of all modules that share the embedding's tensor, where it names one of them."""
    found = _without_tying(config)
    tied = _tied(base) if config.get(TYING) else []
    for option in ("target_modules", "modules_to_save"):
        asked = found.get(option)
        named = [name for name in tied if _names(asked, name)]
        if named and isinstance(asked, list):
            found[option] = [*asked, *(name for name in tied if name not in named)]
        elif named and isinstance(asked, str) and option == "target_modules":
            found[option] = "|".join((f"(?:{asked})", *map(re.escape, tied)))
    return found


def without_idle_tying(options: Mapping[str, object], base: nn.Module) -> dict[str, object]:
    """Return a config's options without `ensure_weight_tying`, with a warning, if it ties nothing of this base."""
    asked = (options.get("target_modules"), options.get("modules_to_save"))
    tied = _tied(base) if options.get(TYING) else []
    named = any(_names(one, path) for one in asked for path in tied)
    if not options.get(TYING) or (named and len(tied) > 1):
        return dict(options)
    why = "the base ties no modules" if len(tied) < 2 else f"neither {' nor '.join(tied)} is named"
    warn(f"{TYING} changes nothing, as in HF PEFT: {why}")
    return _without_tying(options)


def _tied(base: nn.Module) -> list[str]:
    """Return the paths of the modules that share the tensor of the embedding."""
    path = embedding_path(base)
    return [] if path is None else tied_paths(base, path)


def _names(asked: object, path: str) -> bool:
    """Return whether what a config targets, or trains copies of, is the module at a path: an expression, or names."""
    if isinstance(asked, str):
        return re.fullmatch(asked, path) is not None
    return isinstance(asked, list | tuple | set) and ends_with_any(path, asked)


def _without_tying(config: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if name != TYING}
