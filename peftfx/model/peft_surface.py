"""The class `PeftSurface`: the methods by which trainers and users of HF PEFT call a model, as HF PEFT names them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.peft_status import LayerStatus, ModelStatus, layer_status, model_status
from peftfx.errors import PeftfxError, warn
from peftfx.graph.contexts import evaluating
from peftfx.hosting.checkpointing import checkpoint_base, is_checkpointed, stop_checkpointing
from peftfx.model.graphs.runs import Checkpoints
from peftfx.model.merging import Merging
from peftfx.model.trainers.config_of_peft import NoPeftConfig, PeftConfig, PeftConfigs, refuse_function_of_peft, wrapped
from peftfx.model.trainers.hub import upload
from peftfx.model.trainers.reference import ReferenceModel
from peftfx.model.trainers.refused import refuse_options, warn_of_second_base
from peftfx.model.trainers.tuner_of_peft import TunerOfPeft


class PeftSurface(Merging):
    """An adapted model by HF PEFT's names. Names that differ from HF PEFT's: `docs/coming-from-peft.md`."""

    def __getattr__(self, name: str) -> object:  # type: ignore[override]
        """Refuse to be wrapped: `peft` asks the model around which it has put an adapter for this method."""
        if name == "_cast_adapter_dtype":
            self.set_adapter(self.active)  # peft has frozen all parameters
            raise wrapped()
        return super().__getattr__(name)

    def get_base_model(self) -> nn.Module:
        """Return the base; its own calls run without adapters, although its modules hold the adapters' tensors.

        Examples:
            >>> adapted.get_base_model() is model
            True
        """
        return self.base

    @property
    def base_model(self) -> nn.Module:
        """The base's own inner model, with what HF PEFT's users call on it: `set_adapter`, `delete_adapter` and so on.

        As in HF PEFT, it has `update_and_allocate` if that changes an adapter, as of AdaLoRA.
        """
        inner: nn.Module = getattr(self.base, "base_model", self.base)  # type: ignore[assignment]
        if torch.compiler.is_compiling():  # a forward only calls it, and dynamo cannot read a `TunerOfPeft`
            return inner
        allocates = any(rule.adjusts for name in self.names() for rule in self.adapter(name).rules)
        return TunerOfPeft(inner, self, allocates=allocates)  # type: ignore[return-value]

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The config of each adapter, as `save_pretrained` writes it; `add_adapter` takes one as a rule.

        An adapter that was made from several rules has none: its name is not listed, and asking for it raises a
        `PeftfxError`.
        """
        trained, made, without = set(self.active), {}, {}
        with self.plain():
            for name in self.names():
                try:
                    made[name] = PeftConfig.of(self.source, self.adapter(name), name in trained)
                except PeftfxError as error:
                    without[name] = NoPeftConfig(error.what, error.where, error.hint)
        return PeftConfigs(made, without)

    @peft_config.setter
    def peft_config(self, configs: object) -> None:
        raise wrapped()

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in their order."""
        return list(self.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter; a list of names unless exactly one is active."""
        return self.active[0] if len(self.active) == 1 else self.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the adapter that acts.

        Raises:
            PeftfxError: it is not one adapter, or it was made from several rules.
        """
        refuse_function_of_peft(sys._getframe(1))
        if len(self.active) != 1:
            what = f"{len(self.active)} adapters are active, and each has a config of its own"
            raise PeftfxError(what, "active_peft_config", "take it from peft_config, by the adapter's name")
        return self.peft_config[self.active[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts: not inside `disable_adapter`, in its thread."""
        return bool(self.active)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base's dtype, where it says one."""
        return getattr(self.base, "dtype", None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If none is active then, the first of the rest by name becomes active, as in HF PEFT.

        Without any adapter the base stays frozen, as in HF PEFT: `unload` lets it be trained as before.

        Args:
            adapter_name: the name of the adapter to remove.

        Examples:
            >>> adapted.add_adapter("second", peftfx.LoRA(r=4))
            >>> adapted.delete_adapter("second")
        """
        self._drop((adapter_name,))
        left = sorted(self.names())
        if left and not self.active:
            warn(f"no adapter was active without {adapter_name!r}: {left[0]!r} is now")
            self.set_adapter(left[0])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether adapters are trained, until the next `set_adapter`.

        Args:
            adapter_names: one name, or several.
            requires_grad: whether their parameters get gradients.

        Examples:
            >>> adapted.set_requires_grad("default", False)
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.adapter(name).requires_grad_(requires_grad)

    def unload(self) -> nn.Module:
        """Remove all adapters, and return the base as it was before: its parameters are trained again, too."""
        return self.remove()

    def get_layer_status(self) -> list[LayerStatus]:
        """Return the adapters in each module, in HF PEFT's words.

        Examples:
            >>> adapted.get_layer_status()[0].active_adapters
            ['default']
        """
        return layer_status(self.base, self._by_name(), self.active, self.named.folded)

    def get_model_status(self) -> ModelStatus:
        """Return the adapters of the model, in HF PEFT's words."""
        return model_status(
            self.base, self._by_name(), self.active, self.get_nb_trainable_parameters(), self.named.folded
        )

    def _by_name(self) -> dict[str, Adapter]:
        return {name: self.adapter(name) for name in self.names()}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
    ) -> str:
        """Save the adapters, upload the files to a repository of the Hugging Face Hub, and return its address.

        Args:
            repo_id: the repository, such as `name/repository`; it is created if it does not exist.
            token: the Hub's access token; by default the one that `hf auth login` stored.
            private: whether a new repository is private.
            revision: the branch to upload to.
            commit_message: the message of the upload's commit.

        Raises:
            PeftfxError: the Hub cannot be reached, or refuses the upload.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(folder, repo_id, token, private, revision, commit_message)

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's input embeddings."""
        return self.base.get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the base's output embeddings, or None if the base has none."""
        return self.base.get_output_embeddings()  # type: ignore[operator]

    def tie_weights(self, *args: object, **kwargs: object) -> None:
        """Tie the base's weights again, for example after some of its parameters were replaced."""
        self.base.tie_weights(*args, **kwargs)  # type: ignore[operator]

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Add tags for the model card; see `save_pretrained`. Trainers of TRL do so when they are made.

        Args:
            tags: one tag, or several.

        Raises:
            PeftfxError: a trainer that has options which do not work with this model.
        """
        making = sys._getframe(1).f_locals
        refuse_options(self, making.get("args"))
        warn_of_second_base(making)
        self.base.add_model_tags(tags)  # type: ignore[operator]

    def reference(self, names: str | Sequence[str] = ()) -> ReferenceModel:
        """Return the base, or the base with these adapters, as a separate model over the same tensors.

        For trainers that compare a model with a second one: TRL's `DPOTrainer(adapted, adapted.reference())`.

        Args:
            names: the names of the adapters that act in the reference model; without names it is the base. A warning
                says so if an active adapter was loaded: it may have been trained before.

        Examples:
            >>> reference = adapted.reference()  # for `DPOTrainer(adapted, reference, ...)`
        """
        loaded = [name for name in self.active if self.adapter(name).accounts]
        if not names and loaded:
            warn(
                f"the reference is the base without the loaded adapter {loaded[0]!r}. TRL compares a PeftModel with "
                "its adapter at the start of training: load the adapter again as 'ref', and use reference('ref')"
            )
        return ReferenceModel(self, (names,) if isinstance(names, str) else names)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None, **options: object
    ) -> None:
        """Keep only the inputs of the base's layers, and compute the rest again in the backward.

        If calls run a graph, the graph is cut where the layers end.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`, such as
                `{"use_reentrant": False}`.
            options: options of the base's own `activation_checkpointing_enable`.

        Raises:
            PeftfxError: the base's layers cannot be checkpointed, or an option is not known.

        Examples:
            >>> adapted.gradient_checkpointing_enable({"use_reentrant": False})
        """
        asked = Checkpoints(dict(gradient_checkpointing_kwargs or {}), options, in_modules=self.road == "modules")
        if not asked.in_modules:
            with evaluating(self.base):
                asked.refuse_for(self.graph(adapted=False))
        else:
            checkpoint_base(self.base, gradient_checkpointing_kwargs, options)
        self.checkpoints = asked

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, object] | None = None, **options: object
    ) -> None:
        """Enable gradient checkpointing, by transformers' new name.

        Args:
            activation_checkpointing_kwargs, options: see `gradient_checkpointing_enable`.
        """
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are checkpointed in training: by the base's own code, or in the graph that calls run."""
        return is_checkpointed(self.base) or (self.checkpoints is not None and not self.checkpoints.in_modules)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same as `is_activation_checkpointing`, by transformers' old name."""
        return self.is_activation_checkpointing

    def gradient_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing: keep all activations again."""
        self.checkpoints = None
        stop_checkpointing(self.base)

    def activation_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing, by transformers' new name."""
        self.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Make the embeddings' outputs require gradients, as reentrant checkpoints need."""
        self.base.enable_input_require_grads()  # type: ignore[operator]

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        self.base.disable_input_require_grads()  # type: ignore[operator]
