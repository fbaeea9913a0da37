"""PeftSurface: what trainers and users of HF PEFT call a model by, with HF PEFT's names and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from peftfx.errors import PeftfxError
from peftfx.hosting.checkpointing import checkpoint_base, stop_checkpointing
from peftfx.model.by_name import AdaptersByName
from peftfx.model.reference import Reference


class PeftSurface(AdaptersByName):
    """An adapted model by HF PEFT's names. What is named otherwise, or differs: `docs/coming-from-peft.md`."""

    def get_base_model(self) -> nn.Module:
        """The base, with the adapters' parameters in its modules: called by itself it is without adapters."""
        return self.base

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        return list(self.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter that acts; a list where it is not one."""
        return self.active[0] if len(self.active) == 1 else self.active_adapters

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()  # type: ignore[operator, no-any-return]

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's: None where it has no head of that kind."""
        return self.base.get_output_embeddings()  # type: ignore[operator, no-any-return]

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Note what a model card is to say; see `save_pretrained`."""
        self.base.add_model_tags(tags)  # type: ignore[operator]

    def reference(self, names: str | Sequence[str] = ()) -> Reference:
        """The base, or the base with these adapters, as a model of its own over the same tensors.

        For trainers that hold a model against another one: TRL's `DPOTrainer(adapted, adapted.reference())`.
        """
        return Reference(self, (names,) if isinstance(names, str) else names)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None, **options: object
    ) -> None:
        """Keep the inputs of the base's layers alone, and compute the rest again in the backward.

        Args:
            gradient_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`, as `{"use_reentrant": False}`.
            options: of the base's own `activation_checkpointing_enable`.

        Raises:
            PeftfxError: the base's layers cannot be checkpointed, or calls run a graph, which keeps its activations.
        """
        if self.road == "graph":
            what = f"a graph keeps its activations, and calls run one: {self.obstacle}"
            raise PeftfxError(what, "road", 'adapt with road="modules", or train with a smaller batch')
        checkpoint_base(self.base, gradient_checkpointing_kwargs, options)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, object] | None = None, **options: object
    ) -> None:
        """The same by transformers' new name: see `gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        stop_checkpointing(self.base)

    def activation_checkpointing_disable(self) -> None:
        """The same by transformers' new name."""
        stop_checkpointing(self.base)

    def enable_input_require_grads(self) -> None:
        """Have what the base embeds require gradients, as checkpoints need that take them through their inputs."""
        self.base.enable_input_require_grads()  # type: ignore[operator]

    def disable_input_require_grads(self) -> None:
        """What the base embeds is again what it was."""
        self.base.disable_input_require_grads()  # type: ignore[operator]
