"""The class `AdaptersByName`: adds, loads, activates and removes the adapters of a base, by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.adjustment import adjust
from peftfx.adapters.files.names import name_of_base
from peftfx.analysis.running import LAYERS
from peftfx.bases.guests import own_modules
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.graph.contexts import fake_mode_of
from peftfx.model.hosted.hosted_base import HostedBase
from peftfx.rules.peft_configs import records_of
from peftfx.rules.placements import where
from peftfx.rules.resolution import as_items, as_methods, place
from peftfx.rules.unplaced import is_idle, named_elsewhere
from peftfx.sites.expression import ALL_LINEAR

Rules = object
"""What `transform` takes as rules: a Method, a text, a `peft` config object, or a sequence of them."""


class LoadOptions(TypedDict, total=False):
    """The options of `AdaptersByName.load_adapter`, by name."""

    torch_device: object
    autocast_adapter_dtype: bool
    ephemeral_gpu_offload: bool
    low_cpu_mem_usage: bool
    device_map: object
    max_memory: object
    offload_folder: object
    key_mapping: Mapping[str, str] | None
    ignore_mismatched_sizes: bool
    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    use_safetensors: bool | None


class AdaptersByName(HostedBase):
    """A base, shared and frozen, and its adapters by name: they are added, loaded, activated and removed."""

    def add_adapter(
        self,
        adapter_name: str,
        rules: Rules = None,
        *,
        seed: int | None = None,
        peft_config: Rules = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter and make it the active one. Two adapters may act at one site; their effects add up in order.

        Args:
            adapter_name: any valid name of a directory, without dots; not the name of another adapter.
            rules: see `transform`.
            seed: the seed of the random initial values; by default they come from torch's global generator.
            peft_config: the rules, by HF PEFT's name.
            low_cpu_mem_usage: ignored: no memory is taken twice.
            autocast_adapter_dtype: must be true: an adapter of a base in half precision is made in float32.

        Examples:
            >>> adapted.add_adapter("second", "ia3@mlp")
            >>> adapted.active_adapters
            ['second']
        """
        _refuse_half(autocast_adapter_dtype)
        rules = peft_config if rules is None else rules
        self.named.refuse(adapter_name)
        self.named.apart("an adapter is added")
        own = {} if (name := name_of_base(self.base)) is None else {"base_model_name_or_path": name}
        methods = as_methods(rules, self.source)
        self.widen_for(methods)
        adapter = Adapter(place(self.source, self.sites, methods), records_of(as_items(rules)) | own)
        adapter.ran = self.sites.running
        self._start(adapter, seed)
        self._install(adapter_name, adapter)

    def widen_for(self, methods: Sequence[Method]) -> None:
        """Widen the sites to the layers that rules name and that the example call does not run or use.

        Args:
            methods: the rules.
        """
        named = [m for m in methods if m.targeted and m.target_modules not in (None, ALL_LINEAR)]
        paths = (path for m in named for path in named_elsewhere(self.source, m, self.sites, where(m), ()))
        self.widen_sites(path for path in dict.fromkeys(paths) if is_idle(path, self.source, self.sites))

    def _read(self, directory: Path) -> Adapter:
        """Return the adapter in a directory; first, widen the sites to idle layers that the file has as they were made.

        A file with trained tensors of a layer that the example call does not run is refused.
        """
        from peftfx.adapters.files.reader import read_adapter

        layers = (path for path, module in own_modules(self.source) if isinstance(module, LAYERS))
        if self.wanted != "graph" and any(is_idle(path, self.source, self.sites) for path in layers):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same are told below, at the wider sites
                unread = read_adapter(directory, self.source, self.sites).unread
            self.widen_sites(sorted(unread))
        return read_adapter(directory, self.source, self.sites)

    def reset_parameters(self, adapter_name: str | None = None, *, seed: int | None = None) -> None:
        """Give one adapter, or all, new initial values, for example after a base on the meta device got values.

        Args:
            adapter_name: the adapter's name; by default all adapters get new values.
            seed: see `add_adapter`.
        """
        self.base_changed()
        for name in self.names() if adapter_name is None else (adapter_name,):
            self._start(self.adapter(name), seed)
        self.set_adapter(self.active)

    def _start(self, adapter: Adapter, seed: int | None) -> None:
        device = next((p.device for p in self.source.parameters()), torch.device("cpu"))
        rng = None if seed is None or device.type == "meta" else torch.Generator(device).manual_seed(seed)
        with fake_mode_of(self.base):
            adapter.create(self.source, rng)

    def load_adapter(
        self,
        path: str | Path,
        adapter_name: str,
        is_trainable: bool = True,
        *,
        torch_device: object = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        device_map: object = None,
        max_memory: object = None,
        offload_folder: object = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        use_safetensors: bool | None = None,
    ) -> _IncompatibleKeys:
        """Add an adapter from a HF PEFT directory, and make it the active one.

        If the model has an adapter of this name, as in HF PEFT, its own parameters get the values of the file. It must
        have the file's places and options. Which adapters are active does not change then.

        Args:
            path: a directory that `save_pretrained` of `peft` or of peftfx wrote.
            adapter_name: the adapter's name in this model.
            is_trainable: whether the adapter is trained, until the next `set_adapter`. If not, the model is set to eval
                mode, as in HF PEFT.
            torch_device, ephemeral_gpu_offload, low_cpu_mem_usage, device_map, max_memory, offload_folder: ignored: the
                adapter goes where its modules are.
            autocast_adapter_dtype: must be true: an adapter of a base in half precision is made in float32.
            key_mapping, ignore_mismatched_sizes: refused: each tensor of the file is taken, by its own name.
            subfolder: a folder in `path`, in which the adapter is.
            revision, token, cache_dir, force_download, local_files_only: ignored: they are for downloads, and `path` is
                on this machine.
            use_safetensors: ignored: no other file is read.

        Returns:
            The lists `missing_keys` and `unexpected_keys`, both empty: a file that does not fit is an error.

        Raises:
            PeftfxError: the adapter does not fit this base, or the adapter of this name, or the base has no values
                (fake tensors, the meta device).

        Examples:
            >>> keys = adapted.load_adapter("adapter", "second")
        """
        from peftfx.adapters.files.swap import read_into

        _refuse_half(autocast_adapter_dtype)
        if key_mapping:
            raise PeftfxError("tensors of a file keep their names", "key_mapping", "rename them in the file")
        refuse_left_out_sizes(ignore_mismatched_sizes)
        path = Path(path) / (subfolder or "")
        if adapter_name in self.names():
            self.named.apart("an adapter gets other values")
            read_into(self.adapter(adapter_name), path, self.source, self.sites)
        else:
            self.named.refuse(adapter_name)
            self.named.apart("an adapter is added")
            self._install(adapter_name, self._read(path))
        if not is_trainable:
            self.adapter(adapter_name).requires_grad_(False)
            self.eval()
        return _IncompatibleKeys([], [])

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, in every thread; only they are trained.

        Args:
            adapter_name: one name, or several in the order in which they act.
            inference_mode: whether not even these adapters are trained.

        Examples:
            >>> adapted.add_adapter("second", peftfx.IA3())
            >>> adapted.set_adapter(["default", "second"])  # both act, and their effects add up
        """
        one = isinstance(adapter_name, str) or not isinstance(adapter_name, Sequence | Set)
        self.named.activate((adapter_name,) if one else tuple(adapter_name))  # type: ignore[arg-type]
        if inference_mode:
            for adapter in self.named.acting():
                adapter.requires_grad_(False)

    def update_and_allocate(self, global_step: int) -> None:
        """Reallocate the ranks of the active adapters within their budgets, as AdaLoRA does.

        Call this method in each training step, after `optimizer.step()` and before the gradients are zeroed; see
        `peftfx.contract.common.rank_allocation`.

        Args:
            global_step: the number of the step, from 0.
        """
        adjust(self.named.acting(), global_step)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Let calls run the base without adapters until the `with` block ends, in this thread only.

        Examples:
            >>> with adapted.disable_adapter():
            ...     base_logits = adapted(input_ids=torch.tensor([[3, 5, 8]])).logits
        """
        return self.named.acting_as()

    def remove(self, name: str | None = None) -> nn.Module:
        """Remove an adapter, or all adapters, and return the base, restored when all adapters are removed.

        The base's parameters are trained as before when no other adapted model has adapters on the base either.

        Args:
            name: the name of one adapter; by default all adapters are removed.

        Examples:
            >>> plain = adapted.remove()
        """
        self._drop(self.names() if name is None else (name,))
        if not self.names():
            self._shared.thaw(self.base)
        return self.base

    def _drop(self, names: Sequence[str]) -> None:
        """Remove adapters; the base stays frozen."""
        self.named.apart("an adapter is removed")
        for gone in names:
            self.named.drop(gone)
            self.modules_road.leave(gone)
        self.graphs.forget_derived()
        if not self.names():
            self._twin.plain.restore()


def _refuse_half(autocast_adapter_dtype: bool) -> None:
    if not autocast_adapter_dtype:
        what = "an adapter of a base in half precision is made in float32, and has its own dtype"
        hint = "leave it out, and cast the adapter afterwards: model.adapter(NAME).to(dtype)"
        raise PeftfxError(what, "autocast_adapter_dtype=False", hint)


def refuse_left_out_sizes(asked: bool) -> None:
    """Refuse to leave out the tensors of a file whose sizes differ from the adapter's."""
    if asked:
        what = "a tensor of another size would be left out, and the adapter would not be the file's"
        raise PeftfxError(what, "ignore_mismatched_sizes", "load it on a base of the sizes that it was trained on")
