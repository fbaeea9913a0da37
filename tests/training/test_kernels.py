"""What transformers does to a model where the package `kernels` is installed: neither sites nor roads change by it."""

from __future__ import annotations

import copy
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from support.adapted import randomise
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer
from transformers.models.mamba import modeling_mamba

import peftfx
from peftfx.caches.states import StateAndAttentionLayer, StateCache, StateLayer
from peftfx.graph.capturing.loops.recurrences import _selective_scan, recurrences
from peftfx.testing.models import Causal

IDS = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(0))


def build(*, kernels: bool) -> nn.Module:
    """A base; with `kernels`, each module's own forward is set on it, as where the package has no kernel for it."""
    base = Causal((), layers=2).build()
    for module in base.modules() if kernels else ():
        if not [*module.children()]:
            module.forward = MethodType(type(module).forward, module)
    return base


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("rule", [peftfx.LNTuning(), peftfx.LoRA(r=2, target="all-linear")], ids=["norms", "linears"])
def test_a_forward_that_is_set_on_its_own_module_is_adapted_in_the_modules(rule: Any) -> None:
    base, plain = build(kernels=True), build(kernels=False)
    adapted, want = (peftfx.transform(each, rule, seed=0) for each in (base, plain))
    for each in (adapted, want):
        randomise(each)
    assert adapted.road == want.road == "modules"
    assert torch.equal(logits(adapted), logits(want))
    assert not torch.equal(logits(adapted), logits(plain))
    copied = copy.deepcopy(base)
    assert torch.equal(logits(copied), logits(plain))
    for module in (*held(copied), *(pickle.loads(pickle.dumps(m)) for m in held(base))):
        assert module.forward.__func__ is type(module).forward
        assert module.forward.__self__ is module
    unloaded = adapted.unload()
    assert all(m.forward.__func__ is type(m).forward for m in held(unloaded))
    assert torch.equal(logits(unloaded), logits(plain))


def held(model: nn.Module) -> list[nn.Module]:
    found = [module for module in model.modules() if "forward" in vars(module)]
    assert found
    return found


def test_a_kernel_that_is_a_module_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package makes modules of the functions that transformers' code calls."""
    own = modeling_mamba.mamba_selective_scan

    class Func(nn.Module):
        kernel_layer_name = "selective_scan_fn"

        def forward(self, *args: object, **kwargs: object) -> object:
            return own(*args, **kwargs)

    made = Func()
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", made)
    config = modeling_mamba.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=11)
    with recurrences(modeling_mamba.MambaForCausalLM(config)):
        assert modeling_mamba.mamba_selective_scan is _selective_scan
    assert modeling_mamba.mamba_selective_scan is made


def test_a_cache_has_the_tokens_of_its_keys() -> None:
    """Layers of states do not count the tokens, whatever transformers' own do."""
    cache = StateCache()
    cache.layers.extend([StateLayer(), DynamicLayer(), StateAndAttentionLayer()])  # type: ignore[list-item]
    assert cache.get_seq_length() == 0
    for layer in (1, 2):
        cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), layer)
    assert [cache.get_seq_length(layer) for layer in (0, 1, 2, 3)] == [3, 3, 3, 0]
    cache.layers[1:] = []
    with pytest.raises(RuntimeError, match="states alone do not tell"):
        cache.get_seq_length()
