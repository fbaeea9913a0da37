"""`ensure_weight_tying`: what a rule has at the embedding is at all modules that share the embedding's tensor.

In `modules_to_save` it is one trained copy for all of them. Of LoRAs at these modules HF PEFT has two, over one memory,
which an optimizer changes one after the other. Such a rule is refused. Its file has the LoRA of each module, and so
says all that a call needs: the names of all these modules are put into the config, and the option is taken out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from peftfx.bases.embeddings import embedding_path
from peftfx.contract.method import Method
from peftfx.contract.override import tied_paths
from peftfx.errors import PeftfxError, warn
from peftfx.rules.peft_files import method_from_config
from peftfx.sites.expression import ends_with_any

TYING = "ensure_weight_tying"
_KNOWN = ("embed_tokens", "lm_head")


def method_of_file(config: Mapping[str, object], where: str) -> Method:
    """Return the method of a file's config; see `peftfx.rules.peft_files.method_from_config`."""
    return method_from_config(_without_tying(config), where)


def with_tied_names(config: Mapping[str, object], base: nn.Module, has: Collection[str] = ()) -> dict[str, object]:
    """Return a file's config whose `target_modules` name all tied modules, where HF PEFT has tied those of one of them.

    Args:
        config: the file's config.
        base: the base.
        has: paths of modules that the file has tensors for. If all tied modules are among them, HF PEFT has tied them,
            though the config may name only the embedding, by a name that HF PEFT itself does not know on loading.
    """
    tied = _tied(base) if config.get(TYING) else []
    if tied and _are_saved(config.get("modules_to_save")):
        return dict(config)
    found, asked = _without_tying(config), config.get("target_modules")
    named = [name for name in tied if _names(asked, name)] if _are_targeted(asked) or {*tied} <= {*has} else []
    if named and isinstance(asked, list):
        found["target_modules"] = [*asked, *(name for name in tied if name not in named)]
    elif named and isinstance(asked, str):
        found["target_modules"] = "|".join((f"(?:{asked})", *map(re.escape, tied)))
    return found


def tied_in_rule(base: nn.Module, method: Method) -> list[str]:
    """Return the paths of the modules for which a rule has one trained copy, the embedding first; none without such."""
    tied = _tied(base) if getattr(method, TYING, False) and _are_saved(method.modules_to_save) else []
    return tied if len(tied) > 1 else []


def refuse_tied_targets(base: nn.Module, method: Method, paths: Collection[str]) -> None:
    """Refuse a rule that ties, and has a LoRA at one of the tied modules; warn of one that ties nothing.

    Args:
        base: the base.
        method: the rule.
        paths: where the rule acts.
    """
    if not getattr(method, TYING, False) or tied_in_rule(base, method):
        return
    tied = _tied(base)
    asked = method.target_modules is None or _are_targeted(method.target_modules)
    if asked and len(tied) > 1 and (found := set(tied) & set(paths)):
        what = "HF PEFT trains two LoRAs over one memory there, and here each module has its own"
        hint = (
            f"leave {TYING} out; or train one copy, by modules_to_save; for new tokens, take trainable_token_indices, "
            "whose rows tied modules share; or train with peft and load the file"
        )
        raise PeftfxError(what, f"{TYING}=True: {min(found)}", hint)
    _tell_idle(tied)


def without_idle_tying(options: Mapping[str, object], base: nn.Module) -> dict[str, object]:
    """Return a config's options without `ensure_weight_tying`, with a warning, if it ties nothing of this base."""
    tied = _tied(base) if options.get(TYING) else []
    asked = options.get("target_modules")
    named = _are_saved(options.get("modules_to_save")) or (_are_targeted(asked) and any(_names(asked, p) for p in tied))
    if not options.get(TYING) or (named and len(tied) > 1):
        return dict(options)
    _tell_idle(tied)
    return _without_tying(options)


def _tell_idle(tied: Sequence[str]) -> None:
    why = "the base ties no modules" if len(tied) < 2 else f"the rule names neither {' nor '.join(_KNOWN)}"
    warn(f"{TYING} changes nothing, as in HF PEFT: {why}")


def _tied(base: nn.Module) -> list[str]:
    """Return the paths of the modules that share the tensor of the embedding."""
    path = embedding_path(base)
    return [] if path is None else sorted(tied_paths(base, path), key=lambda other: other != path)


def _are_saved(names: object) -> bool:
    """Return whether names in `modules_to_save` are of an embedding, or of a head, by the names that HF PEFT knows."""
    given = [names] if isinstance(names, str) else names
    return isinstance(given, list | tuple | set) and any(str(n).rpartition(".")[2] in _KNOWN for n in given)


def _are_targeted(asked: object) -> bool:
    """Return whether targets are of an embedding, or of a head, by the names that HF PEFT knows."""
    if isinstance(asked, str):
        return any(re.fullmatch(asked, name) for name in _KNOWN)
    return _are_saved(asked)


def _names(asked: object, path: str) -> bool:
    """Return whether what a config targets, or trains copies of, is the module at a path: an expression, or names."""
    if isinstance(asked, str):
        return re.fullmatch(asked, path) is not None
    return isinstance(asked, list | tuple | set) and ends_with_any(path, asked)


def _without_tying(config: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in config.items() if name != TYING}
