"""VeRA: the random pair of `peft`, number for number, once for a whole rule: in training, files, merged, in ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import peft
import pytest
import torch
from support.adapted import randomise
from support.parity import farthest, outputs
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel
from peftfx.model.adapted import AdaptedModel

#: Linear layers of several sizes, and GPT-2's, stored [in, out] and fused.
TARGETS = {
    "llama": ["q_proj", "k_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "output.dense"],
    "vit": ["q_proj", "fc1"],
}


def adapted(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A base, and `peft`'s model on a copy of it, its vectors off their start."""
    base = ZOO[name].build()
    config = peft.VeraConfig(r=6, target_modules=TARGETS[name], projection_prng_key=3, **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    return base, theirs.eval()


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in TARGETS), ("bert", {"bias": "vera_only"}), ("bert", {"bias": "all"})]
)
def test_an_adapter_of_peft_computes_the_same_and_goes_back(
    name: str, options: dict[str, object], bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    base, theirs = adapted(name, **options)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = bare(name)
    ours.load_adapter(tmp_path / "theirs", "default")
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    for batch, sequence in ((1, 1), (3, 7)):
        given = ZOO[name].inputs(batch, sequence, 5, model=base)
        want = outputs(theirs, given)
        assert farthest(outputs(ours, given), want, given) <= 1e-5
        assert farthest(outputs(again, given), want, given) <= 1e-5
    ours.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pair_is_drawn_as_peft_draws_it(dtype: torch.dtype) -> None:
    base = ZOO["llama"].build().to(dtype)
    config = peft.VeraConfig(r=6, target_modules=TARGETS["llama"], projection_prng_key=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapted = peftfx.transform(base, config)
    assert adapted.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    ours = adapted.adapter("default").shared(0)
    for name in ("vera_A", "vera_B"):
        want = getattr(theirs.base_model, name)["default"]
        assert ours[name].dtype == want.dtype
        assert torch.equal(ours[name], want)


@pytest.mark.filterwarnings("ignore:Specified to not")
def test_a_pair_that_is_not_saved_is_drawn_again(bare: Callable[[str], AdaptedModel], tmp_path: Path) -> None:
    base, theirs = adapted("bert", save_projection=False)
    theirs.save_pretrained(str(tmp_path))
    given = ZOO["bert"].inputs(2, 5, 1, model=base)
    ours = bare("bert")
    ours.load_adapter(tmp_path, "default")
    assert farthest(outputs(ours, given), outputs(theirs, given), given) <= 1e-5
    ours.remove()


class Idle(nn.Module):
    """The largest layer never runs, and the results of another reach no output."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.last, self.unread = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(5, 10)
        self.large = nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.small(x))
        self.unread(hidden)
        return self.last(hidden)


PAIRS = [(c, save) for c in (peft.VeraConfig, peft.PveraConfig, peft.RandLoraConfig) for save in (True, False)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("config", "save"), PAIRS)
def test_the_pair_is_as_large_as_modules_need_that_reach_no_output(
    config: type[peft.PeftConfig], save: bool, tmp_path: Path
) -> None:
    """Without the pair in the file it is drawn again: this was refused."""
    base, x = Idle(), torch.randn(3, 4)
    options = {"r": 6, "target_modules": ["small", "last", "unread", "large"], "save_projection": save}
    theirs = peft.get_peft_model(copy.deepcopy(base), config(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs", inputs={"x": x}).eval()
    torch.testing.assert_close(ours(x=x), theirs(x))
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(x), theirs(x))
    ours.export(tmp_path / "onnx", inputs={"x": x})


def test_a_pair_is_not_drawn_for_a_module_that_is_no_linear_layer(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Idle(), peft.VeraConfig(r=6, target_modules=["small", "large"], save_projection=False))
    theirs.save_pretrained(str(tmp_path))
    base = Idle()
    base.large = nn.Bilinear(9, 9, 8)
    with pytest.raises(PeftfxError, match="vera_B are not in the file, and depend on modules that this call does not"):
        peftfx.load(base, tmp_path, inputs={"x": torch.randn(3, 4)})


def test_the_graph_and_its_export_have_the_pair_once(tmp_path: Path) -> None:
    base, theirs = adapted("gpt2")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = peftfx.load(base, tmp_path / "theirs")
    read = [str(n.target) for n in ours.graph().nodes() if n.op == "get_attr"]
    assert sum(target.endswith(("vera_A", "vera_B")) for target in read) == 2
    ours.export(tmp_path / "apart", merge=False, view="forward")
    tensors = onnx.load(str(tmp_path / "apart" / "model.onnx"), load_external_data=False).graph.initializer
    assert sum(t.name.endswith(("vera_A", "vera_B")) for t in tensors) == 2
    ours.export(tmp_path / "merged", view="forward")
    given = ZOO["gpt2"].inputs(3, 6, 2, model=base)
    want = outputs(theirs, given)
    for folder in ("apart", "merged"):
        assert farthest(OnnxModel(tmp_path / folder)(**given), want, given) <= 1e-4
    ours.merge()
    assert farthest(outputs(ours.remove(), given), want, given) <= 1e-5


def test_by_default_fused_projections_are_adapted_whole(bare: Callable[[str], AdaptedModel], tmp_path: Path) -> None:
    adapted = bare("gpt2")
    adapted.add_adapter("default", "vera(r=4)")
    assert {p.part for p in adapted.adapter("default").placements} == {None}
    adapted.remove()
    adapted.add_adapter("rows", peftfx.VeRA(r=4, target="attention.query"))
    with pytest.raises(PeftfxError, match="VeRA for whole weights"):
        adapted.save_pretrained(tmp_path)
    adapted.remove()


def test_rules_of_two_keys_are_saved_and_loaded_each_with_its_own_pair(
    bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    rules = [peftfx.VeRA(r=4, target="mlp.up"), peftfx.VeRA(r=3, target="mlp.down", projection_prng_key=1)]
    first = bare("llama")
    first.add_adapter("default", rules)
    randomise(first)
    first.save_pretrained(tmp_path)
    given = ZOO["llama"].inputs(2, 5, 1, model=first.base)
    want = outputs(first, given)
    first.remove()
    first.load_adapter(tmp_path, "default")
    assert farthest(outputs(first, given), want, given) == 0
    first.remove()
