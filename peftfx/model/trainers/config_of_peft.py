"""The configs of adapters by HF PEFT's names, and the refusal of an adapter that `peft` would put around the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType, SimpleNamespace

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.writer import config_and_tensors
from peftfx.errors import PeftfxError

_SET = frozenset({"base_model_name_or_path", "task_type", "revision"})
"""The fields that a user can set: they are saved with the adapter, and change no number."""


def wrapped() -> PeftfxError:
    """Return the error for an adapted model that `peft` is asked to adapt again."""
    what = "the model is adapted by peftfx, and peft cannot put an adapter around it"
    hint = (
        "leave peft_config out of the trainer: it trains the adapters that the model has. "
        "model.add_adapter(NAME, config) adds one, and model.remove() returns the base"
    )
    return PeftfxError(what, "peft_config", hint)


def refuse_function_of_peft(frame: FrameType) -> None:
    """Refuse a config to `peft`'s functions for states: they look for layers of `peft`, and would find no tensor.

    Args:
        frame: where the config is asked for.

    Raises:
        PeftfxError: that is a function of `peft.utils`.
    """
    if str(frame.f_globals.get("__name__")).startswith("peft.utils."):
        name = frame.f_code.co_name
        what = "this function of peft works on peft's own layers, and the model is adapted by peftfx"
        raise PeftfxError(what, f"peft.{name}", f"call peftfx.{name}: it does the same for adapted models")


class _Name(str):
    """A name that has a `value`, as the members of HF PEFT's enumerations have."""

    @property
    def value(self) -> str:
        """The name as plain text."""
        return str(self)


class PeftConfig(SimpleNamespace):
    """An adapter's config; its fields are HF PEFT's, and `to_dict` returns them.

    `base_model_name_or_path`, `task_type` and `revision` can be set, and are saved so; so can the options of a budget
    of ranks, such as AdaLoRA's `total_step`. The others are read: an adapter does not change with them. A copy
    (`copy.deepcopy`) can be changed, and is a rule.
    """

    __slots__ = ("_adapter",)  # beside the fields

    @classmethod
    def of(cls, base: nn.Module, adapter: Adapter, trained: bool) -> PeftConfig:
        """Return the config of an adapter, as its file would have it; options that it does not have are None."""
        config, _ = config_and_tensors(base, adapter)
        method = adapter.rules[0]
        names = (*method.options(), *method.ignored, *method.refused)
        kinds = {name: _Name(config[name]) for name in ("peft_type", "task_type") if config.get(name)}
        made = cls(**{**dict.fromkeys(names), **config, **kinds, "inference_mode": not trained})
        object.__setattr__(made, "_adapter", adapter)
        return made

    def __setattr__(self, name: str, value: object) -> None:
        adapter: Adapter | None = getattr(self, "_adapter", None)
        if adapter is not None and name in _SET:
            adapter.records[name] = getattr(value, "value", value)
        elif adapter is not None and name in adapter.rules[0].schedule:
            adapter.reschedule(name, value)
        elif adapter is not None and value != getattr(self, name, None):
            what = "the config tells what the adapter is, and the adapter would not change with it"
            hint = "make an adapter of a copy of the config: copy.deepcopy(config), then add_adapter(name, copy)"
            raise PeftfxError(what, name, hint)
        super().__setattr__(name, value)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is a soft prompt, which comes before the text's tokens."""
        return hasattr(self, "num_virtual_tokens")

    def to_dict(self) -> dict[str, object]:
        """Return the config's fields, by name."""
        return dict(vars(self))


class NoPeftConfig(PeftfxError, AttributeError):
    """The error for an adapter without a config of HF PEFT. Code that asks for the active one by `hasattr` goes on."""


class PeftConfigs(dict[str, PeftConfig]):
    """The configs of adapters, by name. They are read: `peft` writes there, if it is asked to adapt the model again.

    Args:
        made: the configs.
        without: the errors of adapters that have no config, by name.
    """

    def __init__(self, made: Mapping[str, PeftConfig], without: Mapping[str, NoPeftConfig]) -> None:
        super().__init__(made)
        self._without = dict(without)

    def __missing__(self, name: str) -> PeftConfig:
        raise self._without.get(name) or KeyError(name)

    def __getitem__(self, name: str) -> PeftConfig:
        refuse_function_of_peft(sys._getframe(1))
        return super().__getitem__(name)

    def update(self, *args: object, **kwargs: object) -> None:
        """Refuse a config of another adapter.

        Raises:
            PeftfxError: always.
        """
        raise wrapped()

    def __setitem__(self, name: str, config: object) -> None:
        self.update({name: config})
