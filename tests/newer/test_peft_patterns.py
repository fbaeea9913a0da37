"""Options by module path (`rank_pattern` and others) act where they do in `peft`: live, from files, in new adapters."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from _pytest.mark.structures import ParameterSet
from safetensors.torch import load_file, save_file
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.adapters.single_files.reading import as_peft
from peftfx.errors import PeftfxWarning
from peftfx.testing.setup import assert_close

NAMES = ["first", "up", "down", "xfirst"]
#: Keys of one path, of the end of paths, of a part of a name, of two names, and an expression.
KEYS = ({"first": 2}, {"blocks.0.up": 2}, {"up|down": 2}, {"blocks.0": 2, "irst": 2}, {r".*0\.up": 2, "up": 3})
CASES: tuple[tuple[type[peft.PeftConfig], Mapping[str, object], str], ...] = (
    (peft.LoraConfig, {"r": 4}, "rank_pattern"),
    (peft.LoraConfig, {"r": 4}, "alpha_pattern"),
    (peft.LoHaConfig, {"r": 4}, "rank_pattern"),
    (peft.LoHaConfig, {"r": 4}, "alpha_pattern"),
    (peft.LoKrConfig, {"r": 1, "decompose_both": True}, "rank_pattern"),
    (peft.LoKrConfig, {"r": 1, "decompose_both": True}, "alpha_pattern"),
    (peft.HiraConfig, {"r": 4}, "rank_pattern"),
    (peft.DeloraConfig, {"r": 4}, "rank_pattern"),
    (peft.DeloraConfig, {"r": 4}, "lambda_pattern"),
    (peft.OSFConfig, {"effective_rank": 4}, "rank_pattern"),
    (peft.C3AConfig, {"block_size": 4}, "block_size_pattern"),
    (peft.FourierFTConfig, {"n_frequency": 20}, "n_frequency_pattern"),
    (peft.WaveFTConfig, {"n_frequency": 20}, "n_frequency_pattern"),
)


def _cases() -> Iterator[ParameterSet]:
    """All keys with the first option, and with each those that meet in one module."""
    for config, options, name in CASES:
        for keys in KEYS:
            marks = () if (name == CASES[0][2] and config is CASES[0][0]) or len(keys) > 1 else pytest.mark.further
            own = f"{config.__name__}-{name}-{' '.join(keys)}"
            yield pytest.param(config, options, name, keys, id=own, marks=marks)


class Nested(nn.Module):
    """Layers at the top and in blocks, some with names that end alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.xfirst = nn.Linear(12, 12), nn.Linear(12, 12)
        parts = ({"up": nn.Linear(12, 12), "down": nn.Linear(12, 12)} for _ in range(2))
        self.blocks = nn.ModuleList(map(nn.ModuleDict, parts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))  # type: ignore[index]
        return self.xfirst(x)


class Ended(nn.Module):
    """Layers whose paths are the ends of other layers' paths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(12, 12)
        self.a, self.zed = (nn.ModuleDict({"up": nn.Linear(12, 12), "down": nn.Linear(12, 12)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.a, self.zed):
            x = x + block["down"](torch.tanh(block["up"](self.up(x))))
        return x


X = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
INPUTS = {"x": X}


@torch.no_grad()
def stir(model: nn.Module) -> None:
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=rng))


def trained(model: nn.Module) -> list[int]:
    return sorted(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "options", "name", "keys"), _cases())
def test_a_pattern_acts_where_it_acts_in_peft(
    config: type[peft.PeftConfig], options: dict[str, object], name: str, keys: dict[str, int], tmp_path: Path
) -> None:
    asked = config(target_modules=NAMES, **options, **{name: keys})  # type: ignore[arg-type]
    theirs = peft.get_peft_model(Nested(), asked).eval()
    stir(theirs)
    want = theirs(X)
    theirs.save_pretrained(tmp_path)
    for ours in (
        peftfx.transform(copy.deepcopy(theirs), inputs=INPUTS),
        peftfx.load(Nested(), tmp_path, inputs=INPUTS),
    ):
        assert_close(ours.eval()(X), want, 1e-4, type(asked).__name__)
    asked = config(target_modules=NAMES, **options, **{name: keys})  # type: ignore[arg-type]
    assert trained(peftfx.transform(Nested(), asked, inputs=INPUTS)) == trained(theirs)


#: Keys in an order that a file does not keep, and keys of one path that is the end of others.
ENDS = ({"zed.up": 3, "up": 2}, {"up": 2, ".*up": 3}, {"^up": 2}, {"a.up": 1, "up": 2})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", ENDS, ids=" ".join)
@pytest.mark.parametrize(("config", "options", "name"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_of_keys_that_match_one_layer_the_first_counts(
    config: type[peft.PeftConfig], options: dict[str, object], name: str, keys: dict[str, int], tmp_path: Path
) -> None:
    asked = config(target_modules=["up", "down"], **options, **{name: keys})  # type: ignore[arg-type]
    theirs = peft.get_peft_model(Ended(), asked).eval()
    asked = config(target_modules=["up", "down"], **options, **{name: keys})  # type: ignore[arg-type]
    assert trained(peftfx.transform(Ended(), asked, inputs=INPUTS)) == trained(theirs)
    stir(theirs)
    ours = peftfx.transform(copy.deepcopy(theirs), inputs=INPUTS).eval()
    assert_close(ours(X), theirs(X), 1e-4, type(asked).__name__)
    ours.save_pretrained(tmp_path)
    assert_close(peftfx.load(Ended(), tmp_path, inputs=INPUTS).eval()(X), ours(X), 1e-4, "loaded")
    if config is not peft.HiraConfig:  # peft gives a first HiRA one rank
        assert_close(peft.PeftModel.from_pretrained(Ended(), tmp_path).eval()(X), ours(X), 1e-4, "loaded by peft")


class WithIdle(Ended):
    """A layer that no call runs, too."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(12, 12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "options", "name"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_a_layer_that_does_not_run_keeps_its_key(
    config: type[peft.PeftConfig], options: dict[str, object], name: str, tmp_path: Path
) -> None:
    asked = config(target_modules=["up", "idle"], **options, **{name: {"idle": 2}})  # type: ignore[arg-type]
    theirs = peft.get_peft_model(WithIdle(), asked).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    peftfx.load(WithIdle(), tmp_path / "theirs", inputs=INPUTS).save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(WithIdle(), tmp_path / "ours").eval()
    assert_close(again(X), theirs(X), 1e-4, "all")
    inner = [model.base_model.model.get_submodule("idle") for model in (again, theirs)]
    assert_close(inner[0](X), inner[1](X), 1e-4, "idle")


def test_a_single_file_gives_each_layer_its_own_alpha(tmp_path: Path) -> None:
    tensors = {}
    for path, alpha in (("up", 2.0), ("a.up", 4.0), ("zed.up", 4.0)):
        tensors |= {f"{path}.lora_down.weight": torch.randn(4, 12), f"{path}.lora_up.weight": torch.randn(12, 4)}
        tensors[f"{path}.alpha"] = torch.tensor(alpha)
    order = sorted(tensors, key=lambda name: name.startswith("up."))
    save_file({name: tensors[name] for name in order}, tmp_path / "own.safetensors")
    config, own = as_peft(tmp_path / "own.safetensors", Ended())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(own, tmp_path / "adapter" / "adapter_model.safetensors")
    ours, want = peftfx.load(Ended(), tmp_path / "adapter", inputs=INPUTS).eval(), Ended()
    with torch.no_grad():
        for path, alpha in (("up", 2.0), ("a.up", 4.0), ("zed.up", 4.0)):
            product = tensors[f"{path}.lora_up.weight"] @ tensors[f"{path}.lora_down.weight"]
            want.get_parameter(f"{path}.weight").add_(alpha / 4 * product)
    assert_close(ours(X), want(X), 1e-4, "scales")


def test_a_second_hira_of_peft_has_the_ranks_of_its_pattern(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Nested(), peft.HiraConfig(r=4, target_modules=NAMES)).eval()
    theirs.add_adapter("second", peft.HiraConfig(r=4, target_modules=NAMES, rank_pattern={"up": 2, "down": 5}))
    theirs.set_adapter("second")
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    assert theirs.base_model.model.blocks[0]["up"].hira_A["second"].shape == (2, 12)
    for ours in (
        peftfx.transform(copy.deepcopy(theirs), inputs=INPUTS),
        peftfx.load(Nested(), tmp_path / "second", inputs=INPUTS),
    ):
        torch.testing.assert_close(ours.eval()(X), theirs(X), atol=1e-5, rtol=1e-5)


def test_hira_at_parts_is_loaded_by_peft_if_all_have_one_rank(tmp_path: Path) -> None:
    config = hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    base, ids = hf.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 4, 5]])
    ours = peftfx.transform(copy.deepcopy(base), peftfx.HiRA(r=2, target="attention.query | attention.value")).eval()
    stir(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    again = peftfx.load(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_hira_of_several_ranks_is_told(tmp_path: Path) -> None:
    ours = peftfx.transform(
        Nested(), peftfx.HiRA(r=4, target_modules=NAMES, rank_pattern={"up": 2}), inputs=INPUTS
    ).eval()
    stir(ours)
    with pytest.warns(PeftfxWarning, match="HF PEFT cannot load these files of HiRA: it gives each module the rank r"):
        ours.save_pretrained(tmp_path)
    torch.testing.assert_close(peftfx.load(Nested(), tmp_path, inputs=INPUTS).eval()(X), ours(X))


@pytest.mark.parametrize("config", [peft.HiraConfig(r=4), peft.OSFConfig(effective_rank=4)], ids=["hira", "osf"])
def test_default_targets_are_those_of_every_table_of_peft(config: peft.PeftConfig, tmp_path: Path) -> None:
    """`peft.utils` passes on some of the tables, and not these two."""
    base = ZOO["gpt_neox"].build()
    peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).save_pretrained(tmp_path / "theirs")
    peftfx.transform(base, config).save_pretrained(tmp_path / "ours")
    found, want = (
        {key: tuple(t.shape) for key, t in load_file(tmp_path / whose / "adapter_model.safetensors").items()}
        for whose in ("ours", "theirs")
    )
    assert found == want
