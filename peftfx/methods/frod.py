"""FRoD: all weights of one name in a common basis, with trained coordinates (HF PEFT's `FrodConfig`).

For the modules of one name in all layers, `V` [in, in] is found once, by a joint decomposition of their weights. Each
weight is `U diag(l) V^T`, where the columns of `U` [out, in] have length 1. Trained are `l` [in], and a few entries of
a sparse `S` [in, in]: `W' = U (S + diag(l)) V^T`. The places of these entries are drawn from a seed, and are the same
for all modules of the name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peftfx.contract.broadcast import adapter_dtype
from peftfx.contract.common.delta import dropped, in_dtype
from peftfx.contract.common.subspaces import in_basis, joint_basis
from peftfx.contract.method import Base, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

V, WHERE, SIZE = "frod_V", "frod_s_indices", "frod_s_size"
U, L, S = "frod_U", "frod_lambda_l", "frod_lambda_s_values"


@dataclass(frozen=True, kw_only=True)
class FRoD(WeightMethod):
    """Linear weights of one name in a common basis, with trained scales and a sparse rotation.

    Args:
        projection_prng_key: the seed of the places of the trained entries of `S`.
        save_projection: whether files have the bases; otherwise these are found again in the base model.
        frod_dropout: dropout on the layer's input in training, only for this weight.
        fan_in_fan_out: whether the weight is stored [in, out]; read from the graph, and kept only for HF PEFT's files.
        bias: which of the base's own biases are trained: none, all, or those of the adapted modules (frod_only).
        init_weights: whether a new adapter starts as the identity, up to the decomposition's error; otherwise it starts
            away from it.
        sparse_rate: the share of the entries of `S` that are trained.
        regularization_alpha: the regularisation of the joint decomposition.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.FRoD(sparse_rate=0.05))
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "frod_only"] = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 0.001

    peft_type: ClassVar[str] = "FROD"
    default_target: ClassVar[str] = "attention.query | attention.value | attention.qkv | attention.kv | attention.qv"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    counted: ClassVar[bool] = True
    ignored: ClassVar[frozenset[str]] = frozenset({"progressbar", "runtime_offload_base_weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise PeftfxError(
                f"sparse_rate must be a share from 0 to 1, not {self.sparse_rate}",
                "sparse_rate",
                "FRoD(sparse_rate=0.01)",
            )

    @property
    def neutral(self) -> bool:
        return self.init_weights

    def is_constant(self, name: str, value: Tensor) -> bool:
        return name not in (L, S)

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        weights: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for i, (site, base) in enumerate(zip(sites, bases, strict=True)):
            weights[_name(site)][_layer(site, i)] = base.weight.detach()  # of two in a layer, HF PEFT takes the last
        own, made = torch.Generator().manual_seed(self.projection_prng_key), {}
        for name, layers in sorted(weights.items()):
            first, each = next(iter(layers.values())), [layers[i].float().cpu() for i in sorted(layers)]
            v = first.new_zeros(first.shape[1:] * 2) if first.is_meta else joint_basis(each, self.regularization_alpha)
            made[f"{V}__{name}"] = v.to(like.device, first.dtype).to(adapter_dtype(first.dtype)).contiguous()
            made[f"{WHERE}__{name}"] = self._places(len(v), own).to(like.device)
            made[f"{SIZE}__{name}"] = torch.tensor([len(v)] * 2, device=like.device)
        return made

    def _places(self, size: int, rng: torch.Generator) -> Tensor:
        """Return the indices of the trained entries of `S`, all off the diagonal."""
        most = size * (size - 1)
        count = min(int(size * size * self.sparse_rate), most)
        count = max(1, count) if self.sparse_rate > 0 and most else count
        if not count:  # then HF PEFT draws nothing
            return torch.empty(2, 0, dtype=torch.long)
        drawn = torch.randperm(most, generator=rng)[:count]
        rows, columns = drawn // (size - 1), drawn % (size - 1)
        return torch.stack([rows, columns + (columns >= rows)])

    def shares(self, sites: Sequence[Site], site: Site) -> dict[str, str]:
        return {name: f"{name}__{_name(site)}" for name in (V, WHERE)}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        names = sorted({_name(site) for site in sites}) if self.save_projection else ()
        return {f"{what}__{name}": f"base_model.{what}.{name}" for name in names for what in (V, WHERE, SIZE)}

    def keys(self, site: Site) -> dict[str, str]:
        return {L: L, S: S}

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {}

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        kind, dtype = base.weight.dtype, adapter_dtype(base.weight.dtype)
        values = shared[V].new_zeros(shared[WHERE].shape[1], dtype=dtype)
        u, scales = in_basis(shared[V], base.weight)
        p = {U: u.to(kind).to(dtype), L: scales.to(kind).to(dtype), S: values}
        if not self.init_weights:
            p[S].normal_(std=0.1, generator=rng)
            p[L] += 0.1 * torch.empty_like(p[L]).normal_(generator=rng)
        return p

    @property
    def replaces(self) -> bool:
        return True

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        read = dropped(x, self.frod_dropout, training).to(p[V].dtype)
        own = F.linear((read @ p[V]) @ self._inner(p).T, p[U])
        if y is None and not (training and self.frod_dropout):  # no product with the base is needed
            return in_dtype(own if base.bias is None else own + base.bias, p[V].dtype, base.weight.dtype)
        y = op(x, *base) if y is None else y
        return (y + own - op(read, base.weight.to(read.dtype))).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return Base(p[U] @ self._inner(p) @ p[V].T, base.bias)

    def fold_over(self, site: Site, base: Base, under: Base, p: Params) -> Base:
        return Base(under.weight + self.fold(site, base, p).weight - base.weight, under.bias)

    def _inner(self, p: Params) -> Tensor:
        """Return `S + diag(l)`."""
        return torch.diag(p[L]).index_put((p[WHERE][0], p[WHERE][1]), p[S])


def _name(site: Site) -> str:
    """Return HF PEFT's name of a kind of modules, from the site's path."""
    parts = site.path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _layer(site: Site, number: int) -> int:
    parts = site.path.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*behind, *parts) if part.isdigit()), number)
