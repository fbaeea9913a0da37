"""The class `SavedAdapters`: adapters in HF PEFT's files, in state dicts, in pickles and in copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from peftfx.adapters.state import refuse_other_state
from peftfx.errors import PeftfxError
from peftfx.graph.graph import ADAPTERS, BASE
from peftfx.hosting.road import ModulesRoad
from peftfx.model.adapter_sums import AdapterSums
from peftfx.model.graphs.graph_cache import Graphs
from peftfx.model.hosted.shared_base import shared
from peftfx.model.processes.gathered import gathering
from peftfx.model.processes.handed_out import hold_buffers, send_buffers
from peftfx.model.trainers.hashed import hash_of, is_hashed
from peftfx.sharding.models import is_handed_out
from peftfx.sharding.processes import rank
from peftfx.twins.twin import Twin

_LEFT_OUT = "_left_out"  #: attribute of a model that is loaded: how the names of the base's tensors begin in the state


class SavedAdapters(AdapterSums):
    """Adapters by name, with methods that save and load them: only their own tensors, never the base's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_without_base)

    def save_pretrained(
        self,
        save_directory: str | Path,
        adapter_name: str | None = None,
        *,
        selected_adapters: Sequence[str] | None = None,
        safe_serialization: bool = True,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: str | bool = "auto",
        save_function: object = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        path_initial_model_for_weight_conversion: object = None,
    ) -> None:
        """Write HF PEFT directories: one adapter in `save_directory`, others in folders of their names below it.

        Args:
            save_directory: the directory to write.
            adapter_name: the name of the adapter to write, to the directory itself; by default all are written.
            selected_adapters: the names of the adapters to write. As in HF PEFT, each but "default" is written to
                a folder of its name, also if it is the only one.
            safe_serialization: must be true: peftfx writes safetensors, and no pickles.
            is_main_process: if false, nothing is written.
            state_dict: this model's own state, as `Accelerator.get_state_dict` returns it; another state is refused.
            save_embedding_layers: whether the files have the base's embeddings, too. By default they do, as in HF PEFT,
                if the base was resized (`resize_token_embeddings`) after loading: its own files lack the new tokens.
            save_function: ignored: the files are always safetensors.
            max_shard_size: ignored, as in HF PEFT: an adapter has one file.
            push_to_hub: refused, because it names no repository: there is a method of this name.
            path_initial_model_for_weight_conversion: refused, because no start changes the base.

        Raises:
            PeftfxError: there is no such adapter, or an argument asks for what peftfx does not write.

        Examples:
            >>> adapted.save_pretrained("saved")  # adapter_config.json and adapter_model.safetensors
        """
        from peftfx.adapters.files.writer import refuse_save_arguments, save_adapters

        other = is_main_process and state_dict is not None and not self.is_own(state_dict)
        if not str(save_directory):
            what = "the directory's name is empty, and would be the working directory"
            raise PeftfxError(what, "save_directory", "name a directory; the working directory is '.'")
        refuse_save_arguments(
            safe_serialization, other, save_embedding_layers, path_initial_model_for_weight_conversion, push_to_hub
        )
        if adapter_name is not None and selected_adapters is not None:
            raise PeftfxError(
                "adapter_name and selected_adapters are both given",
                "adapter_name, selected_adapters",
                "give one of them",
            )
        chosen = self.names() if adapter_name is None else (adapter_name,)
        chosen = chosen if selected_adapters is None else tuple(selected_adapters)
        adapters = {name: self.adapter(name) for name in chosen}
        if gathering(self, "save_pretrained"):
            adapters = {name: adapter.gathered() for name, adapter in adapters.items()}
            is_main_process = is_main_process and rank() == 0
        if is_main_process:
            with self.plain():
                save_adapters(
                    self.source,
                    adapters,
                    Path(save_directory),
                    in_folders=selected_adapters is not None,
                    embeddings=save_embedding_layers,
                )

    def is_own(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether a state is that which this model has, wherever its tensors are."""
        own = self.state_dict()
        return own.keys() == state.keys() and all(
            type(t) is type(state[name]) and t.shape == state[name].shape and torch.equal(t, state[name].to(t))
            for name, t in own.items()
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters; a trained bias replaces the base's, as in HF PEFT.

        Examples:
            >>> trained, in_all = adapted.get_nb_trainable_parameters()
        """
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        own = {o.key: self.adapter(n).get(o.key) for n in self.names() for o in self.adapter(n).overrides if o.stands}
        every = {id(p): p.numel() for p in (*self.adapters.parameters(), *self.source.parameters())}
        return trained, sum(every.values()) - sum(t.numel() for t in own.values())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, in HF PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the adapters' tensors, as `adapters.<name>.<path>.<parameter>`, without the base's tensors.

        While Accelerate distributes the model to processes (`peftfx.sharding.models.is_handed_out`), the base's tensors
        are included. Where TRL hashes a model, to keep a reference's results in files, the base and the adapters that
        act are one tensor, a hash.
        """
        if is_hashed(sys._getframe(1)):
            return {"hash": hash_of(self)}
        if not is_handed_out(self):
            with self._apart_from_base():
                return super().state_dict(*args, **kwargs)  # type: ignore[call-overload,no-any-return]
        own: dict[str, Tensor] = super().state_dict(*args, **kwargs)  # type: ignore[call-overload]
        hold_buffers(self, own)
        return own

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> object:
        """Load the tensors that `state_dict` returned.

        Args:
            state_dict: the adapters' tensors.
            strict: whether every key must fit and no key may be missing.
            assign: whether these tensors themselves become the parameters; otherwise their values are copied.
        """
        state_dict = send_buffers(self, state_dict)
        has_base = any(str(name).startswith(f"{BASE}.") for name in state_dict)
        own: dict[str, Tensor] = super().state_dict() if has_base else self.state_dict()
        refuse_other_state(own, state_dict, {name: self.adapter(name) for name in self.names()}, strict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    @contextmanager
    def _apart_from_base(self) -> Iterator[None]:
        """Let the model's state be read without asking the base's layers: bitsandbytes' may round their scales then."""
        modules = self._modules
        self.__dict__["_modules"] = {name: module for name, module in modules.items() if name != BASE}
        try:
            yield
        finally:
            self.__dict__["_modules"] = modules

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Prepare for a state of the adapters alone, of this model or of a module around it."""
        self.named.apart("adapters get other values")
        for name in self.names():
            start = f"{prefix}{ADAPTERS}.{name}."
            self.adapter(name).recall({k.removeprefix(start): t for k, t in state_dict.items() if k.startswith(start)})
        self.__dict__[_LEFT_OUT] = f"{prefix}{BASE}."
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, object]:
        """Return the state for copies and pickles, without graphs: a copy makes its own, over its own tensors."""
        self.named.apart("the model is copied")
        self._twin.plain.restore()
        left = ("graphs", "_shared", "modules_road", "_twin")
        own = {key: value for key, value in self.__dict__.items() if key not in left}
        return {**own, "_trained": dict(self._shared.trained), "_seatings": dict(self.modules_road.seatings)}

    def __setstate__(self, state: dict[str, object]) -> None:
        trained, seatings = state.pop("_trained"), state.pop("_seatings")
        super().__setstate__(state)
        self._twin = Twin(self.base)
        self.graphs = Graphs(self.source, self.named)
        self.modules_road = ModulesRoad(self.base, self.named)
        for name, seating in seatings.items():  # type: ignore[attr-defined]
            self.modules_road.enter(name, self.named[name], seating)
        self._shared = shared(self.base, self, trained)  # type: ignore[arg-type]


def _without_base(model: nn.Module, keys: _IncompatibleKeys) -> None:
    start = model.__dict__.pop(_LEFT_OUT)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith(start)]
