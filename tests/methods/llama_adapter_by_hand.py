"""LLaMA-Adapter by hand: a model's own eager code, with the second term added wherever it computes an attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftfx.model.adapted import AdaptedModel

_PRODUCTS = {getattr(home, name) for home in (torch, Tensor) for name in ("matmul", "bmm", "baddbmm")}
_PRODUCTS |= {Tensor.__matmul__}
_SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}

#: The key's and the value's layer in each attention, by architecture.
LAYERS: Mapping[str, tuple[str, str]] = {
    "bloom": ("query_key_value", "query_key_value"),
    "gpt_neox": ("query_key_value", "query_key_value"),
    "falcon": ("query_key_value", "query_key_value"),
    "phi3": ("qkv_proj", "qkv_proj"),
    "mpt": ("Wqkv", "Wqkv"),
    "bert": ("key", "value"),
    "albert": ("key", "value"),
    "deberta_v2": ("key_proj", "value_proj"),
    "t5": ("k", "v"),
    "unet": ("to_k", "to_v"),
}
#: What scores are multiplied by where the softmax is written out; SDPA is told.
SCALES: Mapping[str, float] = {
    "bloom": 8**-0.5,
    "gpt_neo": 1.0,
    "gemma2": 256**-0.5,
    "deberta_v2": 24**-0.5,
    "mpt": 8**-0.5,
}


def keys_and_values(name: str, attention: nn.Module, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """What an attention's layers make of a prompt [n, width]: [heads that are kept, n, 8] each."""
    key, value = (attention.get_submodule(layer)(prompt) for layer in LAYERS.get(name, ("k_proj", "v_proj")))
    if name in ("bloom", "gpt_neox"):  # by head: query, key, value
        _, key, value = key.unflatten(-1, (-1, 3, 8)).unbind(-2)
        return key.transpose(0, 1), value.transpose(0, 1)
    if name in ("phi3", "falcon", "mpt"):  # the query's 4 heads, the key's, the value's
        kept = (key.shape[-1] - 32) // 2
        key, value = key.split([32, kept, kept], -1)[1:]
    width = 4 if name == "unet" and key.shape[-1] == 16 else 8
    return tuple(t.unflatten(-1, (-1, width)).transpose(0, 1) for t in (key, value))  # type: ignore[return-value]


class ByHand(TorchFunctionMode):
    """Adds the second term of LLaMA-Adapter to every attention that runs in an adapted module."""

    def __init__(self, name: str, adapted: AdaptedModel) -> None:
        super().__init__()
        self.name, self.base, self.adapter = name, adapted.base, adapted.adapter("default")
        self.paths = [p.site.path for p in self.adapter.placements]
        self.module = ""
        self.products: list[tuple[Tensor, Tensor]] = []
        self.query: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, the mode is on and knows which adapted module runs."""
        hooks = []
        for path in self.paths:
            module = self.base.get_submodule(path)
            hooks.append(module.register_forward_pre_hook(functools.partial(self._enter, path)))
            hooks.append(module.register_forward_hook(lambda *_: self._enter("")))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, path: str, *_: object) -> None:
        self.module, self.query = path, None
        self.products.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.module:
            return out
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            query, scale = given["query"], given.get("scale")
            return out + self._term(query, query.shape[-1] ** -0.5 if scale is None else scale)
        if func in _SOFTMAXES:
            self.query = next(left for left, scores in self.products if scores.numel() == args[0].numel())
        elif func in _PRODUCTS and self.query is not None:
            query, self.query = self.query, None
            return out + self._term(query, SCALES[self.name])
        elif func in _PRODUCTS:
            self.products.append((kwargs["batch1"] if kwargs and "batch1" in kwargs else args[-2], out))
        return out

    def _term(self, query: Tensor, scale: float) -> Tensor:
        prompt = self.adapter.get(f"{self.module}.adaption_prompt")[0]
        gate = self.adapter.get(f"{self.module}.adaption_gate")
        key, value = keys_and_values(self.name, self.base.get_submodule(self.module), prompt)
        heads = query.shape[1] if query.ndim == 4 else 4
        key, value = (t.repeat_interleave(heads // len(t), 0) for t in (key, value))
        if query.ndim == 3:  # batch and heads in one
            key, value = (t.repeat(len(query) // heads, 1, 1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * scale
        return gate * scores.softmax(-1) @ value
