"""The configs of adapters by HF PEFT's names, and the refusal of an adapter that `peft` would put around the model."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.files.writer import config_and_tensors
from peftfx.errors import PeftfxError


def wrapped() -> PeftfxError:
    """Return the error for an adapted model that `peft` is asked to adapt again."""
    what = "the model is adapted by peftfx, and peft cannot put an adapter around it"
    hint = (
        "leave peft_config out of the trainer: it trains the adapters that the model has. "
        "model.add_adapter(NAME, config) adds one, and model.remove() returns the base"
    )
    return PeftfxError(what, "peft_config", hint)


class PeftConfig(SimpleNamespace):
    """An adapter's config; its fields are HF PEFT's, and `to_dict` returns them."""

    @classmethod
    def of(cls, base: nn.Module, adapter: Adapter, trained: bool) -> PeftConfig:
        """Return the config of an adapter, as its file would have it."""
        config, _ = config_and_tensors(base, adapter)
        return cls(**{**config, "inference_mode": not trained})

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the adapter is a soft prompt, which comes before the text's tokens."""
        return hasattr(self, "num_virtual_tokens")

    def to_dict(self) -> dict[str, object]:
        """Return the config's fields, by name."""
        return dict(vars(self))


class NoPeftConfig(PeftfxError, AttributeError):
    """The error for an adapter that has no config of HF PEFT. Code that asks by `hasattr` first goes on without."""


class PeftConfigs(dict[str, PeftConfig]):
    """The configs of adapters, by name. They are read: `peft` writes there, if it is asked to adapt the model again."""

    def update(self, *args: object, **kwargs: object) -> None:
        """Refuse a config of another adapter.

        Raises:
            PeftfxError: always.
        """
        raise wrapped()

    def __setitem__(self, name: str, config: object) -> None:
        self.update({name: config})
