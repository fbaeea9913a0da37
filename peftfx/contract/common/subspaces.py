"""Subspaces of weights: AdaMSS's clusters of rows, ASA's choice of the clusters to train, and FRoD's joint basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from peftfx.contract.kept import Kept
from peftfx.errors import PeftfxError

_IMPORTANCE, _UNCERTAINTY = "importance", "uncertainty"


def clusters(rows: Tensor, count: int, where: str) -> tuple[Tensor, ...]:
    """Return the row numbers of each of `count` clusters, by scikit-learn's k-means with HF PEFT's seed.

    Raises:
        PeftfxError: scikit-learn is not installed, or the rows do not make `count` clusters.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        what = "AdaMSS finds its clusters by scikit-learn, which is not installed"
        raise PeftfxError(what, where, "pip install 'peftfx[adamss]'") from error
    means = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    found = torch.from_numpy(means.fit_predict(rows.float().cpu().numpy())).long().to(rows.device)
    made = tuple(torch.where(found == i)[0] for i in range(count))
    if not all(map(len, made)):
        what = f"the weight's rows make {sum(map(bool, map(len, made)))} clusters, not {count}"
        raise PeftfxError(what, where, "give a smaller num_subspaces")
    return made


class _Schedule(Protocol):
    """The options of ASA, by HF PEFT's names."""

    @property
    def asa_target_subspaces(self) -> int: ...
    @property
    def init_warmup(self) -> int: ...
    @property
    def final_warmup(self) -> int: ...
    @property
    def mask_interval(self) -> int: ...
    @property
    def asa_importance_beta(self) -> float: ...
    @property
    def asa_uncertainty_beta(self) -> float: ...
    @property
    def asa_schedule_exponent(self) -> float: ...


def remembered(*factors: str, count: int) -> frozenset[str]:
    """Return the names of the tensors that training remembers for the factors of `count` clusters."""
    return frozenset(f"{f}_{i}_{what}" for f in factors for i in range(count) for what in (_IMPORTANCE, _UNCERTAINTY))


def freeze_clusters(rule: _Schedule, places: Sequence[Kept], step: int, a: str, b: str) -> None:
    """Note how much each cluster matters. At each interval, freeze those that matter least, over all places.

    A frozen cluster stays frozen. As in HF PEFT, the clusters whose score equals the limit are frozen too.
    """
    if not rule.init_warmup <= step <= rule.final_warmup:
        return
    for place in places:
        _note(rule, place)
    if step % rule.mask_interval:
        return
    known = [(place, i, score) for place in places for i, score in _scores(place, a, b).items()]
    total = sum(f"{a}_{i}" in place.params() for place in places for i in range(len(place.params())))
    left = 1 - (step - rule.init_warmup) / (rule.final_warmup - rule.init_warmup)
    target = rule.asa_target_subspaces
    count = int(target + (total - target) * left**rule.asa_schedule_exponent)
    if known and count < len(known):
        least = torch.stack([score for *_, score in known]).topk(count).values[-1]
        for place, i, score in known:
            for factor in (a, b) if score <= least else ():
                parameter = place.params()[f"{factor}_{i}"]
                parameter.requires_grad_(False)
                parameter.grad = None
    for place in places:
        place.forget(place.remembered().keys())


def _note(rule: _Schedule, place: Kept) -> None:
    before = place.remembered()
    for name, p in place.params().items():
        if p.grad is None:
            continue
        now = (p * p.grad).abs()
        importance = before.get(f"{name}_{_IMPORTANCE}", torch.zeros_like(p))
        varied = before.get(f"{name}_{_UNCERTAINTY}", torch.zeros_like(p))
        changes = {
            _UNCERTAINTY: torch.lerp((now - importance).abs(), varied, rule.asa_uncertainty_beta),
            _IMPORTANCE: torch.lerp(now, importance, rule.asa_importance_beta),
        }
        for what, value in changes.items():
            place.remember(f"{name}_{what}", value.detach())


def _scores(place: Kept, a: str, b: str) -> dict[int, Tensor]:
    seen, scores = place.remembered(), {}
    for i in range(len(place.params())):
        names = [f"{factor}_{i}" for factor in (a, b)]
        if all(f"{name}_{_IMPORTANCE}" in seen for name in names):
            parts = [(seen[f"{n}_{_IMPORTANCE}"] * seen[f"{n}_{_UNCERTAINTY}"]).mean() for n in names]
            scores[i] = parts[0] + parts[1]
    return scores


def joint_basis(weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return `V` [in, in], a basis of several weights [out, in], as HF PEFT's FRoD finds it."""
    stacked = torch.cat(list(weights))
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].T
    q, r = torch.linalg.qr(stacked)
    eye = alpha * torch.eye(r.shape[1])
    terms = torch.stack([torch.linalg.inv(part.T @ part + eye) for part in q.split([len(w) for w in weights])])
    return r.T @ torch.linalg.eigh(terms.mean(0))[1]


def in_basis(v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `U` and `l` such that `U diag(l) V^T` is the weight, computed in float64."""
    if v.is_meta:
        return v.new_empty(weight.shape), v.new_empty(weight.shape[1])
    wide, basis = weight.detach().double().cpu(), v.double().cpu()
    try:
        inner = torch.linalg.solve(basis, wide.T).T
    except RuntimeError:  # what HF PEFT does where the basis is singular
        inner = wide @ torch.linalg.pinv(basis, rtol=1e-6).T
    lengths = inner.norm(dim=0)
    u = torch.where(lengths > 1e-12, inner / lengths.clamp_min(1e-12), 0)
    return u.float().to(v.device), lengths.float().to(v.device)
