"""Batched adapters: in one graph each row of a batch has an adapter of its own, and is what it is with it alone."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from support.command import Result
from support.decoding import prompts
from support.slots import GREEDY, adapted_by, stirred
from support.zoo import ZOO
from torch import Tensor, nn

from peftfx import (
    IA3,
    BitFit,
    LlamaAdapter,
    LNTuning,
    LoRA,
    PeftfxError,
    PrefixTuning,
    PromptTuning,
    export_onnx,
    load,
    runtime,
    transform,
)
from peftfx.export.command import export_directory
from peftfx.model.adapted import AdaptedModel
from peftfx.views.row_adapters import IDS

Run = Callable[..., Result]
#: A norm that is an operator, one that is `1 + weight`, norms of heads, a packed projection, no cache, listed tokens.
OTHERS = ("gpt2", "gemma2", "qwen3", "bloom", "bert", "opt")
RULES = {
    "low": LoRA(r=2, lora_alpha=5, target="all-linear"),
    "scales": IA3(),
    "prompt": [PromptTuning(num_virtual_tokens=5), LoRA(r=4, target="mlp.down")],
    "prefix": PrefixTuning(num_virtual_tokens=3),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdaptedModel, Path]:
    """A LLaMA with four adapters, and the directory that it was exported to, from directories."""
    root = tmp_path_factory.mktemp("llama")
    adapted = adapted_by("llama", RULES)
    adapted.base.save_pretrained(root / "base")
    for name in RULES:
        adapted.set_adapter(name)
        adapted.save_pretrained(root / name, adapter_name=name)
    folders = {name: root / name for name in RULES}
    report = export_directory(root / "base", root / "out", batched=folders, view="auto")
    assert [a["name"] for a in report.adapters] == list(RULES)
    assert report.inputs[IDS] == ["batch"]
    files = (load_file(path) for name in RULES for path in (root / name).rglob("*.safetensors"))
    assert sum(report.tensors.values()) == sum(map(len, files))
    assert report.tensors["in the rows' stacks"] > report.tensors["prompts"] > 0
    return adapted, root / "out"


def test_four_adapters_and_a_base_row_are_five_single_runs(llama: tuple[AdaptedModel, Path]) -> None:
    adapted, directory = llama
    served, given = runtime.load(directory), prompts(5)
    names = ["prefix", None, "low", "prompt", "scales"]
    ids = served.adapter_ids(names)
    got = served.generate(**given, **GREEDY, adapter_ids=ids)
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = served(**given, adapter_ids=ids).logits
    for row, name in enumerate(names):
        adapted.set_adapter(name or ())
        alone = {key: value[row : row + 1] for key, value in given.items()}
        single, shown = logits_of(adapted, alone), alone["attention_mask"].bool()
        alone.pop("position_ids")
        assert torch.equal(got[row : row + 1], adapted.generate(**alone, **GREEDY))
        torch.testing.assert_close(logits[row : row + 1][shown], single[shown], atol=1e-4, rtol=1e-4)
    assert len({tuple(row[7:].tolist()) for row in got}) == len(names)


@torch.no_grad()
def logits_of(adapted: AdaptedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the decode view gives for one text behind no past."""
    view, graph = adapted.view("decode"), adapted.graph(view="decode")
    assert view is not None
    case = view.inputs(adapted.base, sizes={"batch": 1, "sequence": given["input_ids"].shape[1], "past": 0})
    case |= given
    return graph.run(*(case[spec.name] for spec in graph.inputs))[0]


def test_rows_without_a_number_are_the_bases_and_beams_keep_theirs(llama: tuple[AdaptedModel, Path]) -> None:
    adapted, directory = llama
    served, given = runtime.load(directory), prompts(2)
    adapted.set_adapter(())
    assert torch.equal(served.generate(**given, **GREEDY), adapted.generate(**given, **GREEDY))
    adapted.set_adapter("low")
    beams = {**GREEDY, "num_beams": 3}
    got = served.generate(**given, **beams, adapter_ids=served.adapter_ids(["low", "low"]))
    assert torch.equal(got, adapted.generate(**given, **beams))
    assert torch.equal(served.generate(**given, **beams, adapter_ids=["low", "low"]), got)
    both = served.generate(**given, **beams, adapter_names=["__base__", "low"])  # HF PEFT's argument
    assert torch.equal(both, served.generate(**given, **beams, adapter_ids=[None, "low"]))
    assert torch.equal(both[1], got[1])
    assert not torch.equal(both[0], got[0])
    with pytest.raises(PeftfxError, match="no adapter 'lwo'") as raised:
        served.adapter_ids(["lwo"])
    assert "low" in raised.value.hint
    with pytest.raises(PeftfxError, match="one name is no list of names: 'low'"):
        served.generate(**given, adapter_ids="low")
    with pytest.raises(PeftfxError, match="not a list of names: 'low'"):
        served(**given, adapter_names="low")
    with pytest.raises(PeftfxError, match="both adapter_names and adapter_ids"):
        served(**given, adapter_names=["low", "low"], adapter_ids=[0, 0])


def test_a_row_is_guided_by_its_own_adapter(llama: tuple[AdaptedModel, Path]) -> None:
    """transformers guides a text by one without its prompt, in calls of its own that lack the numbers."""
    adapted, directory = llama
    served, given = runtime.load(directory), prompts(2)
    adapted.set_adapter("low")
    guided = {**GREEDY, "guidance_scale": 1.8}
    want = adapted.generate(**given, **guided)
    assert torch.equal(served.generate(**given, **guided, adapter_ids=["low", "low"]), want)
    assert torch.equal(runtime.load(directory, adapter="low").generate(**given, **guided), want)


def test_one_adapter_acts_in_all_rows_that_choose_none(llama: tuple[AdaptedModel, Path]) -> None:
    adapted, directory = llama
    served, given = runtime.load(directory, adapter="scales"), prompts(3)
    for name in ("scales", "prefix", None):
        served.set_adapter(name)
        adapted.set_adapter(name or ())
        want = adapted.generate(**given, **GREEDY)
        assert torch.equal(served.generate(**given, **GREEDY), want)
        adapted.set_adapter("low")
        rows = served.generate(**given, **GREEDY, adapter_ids=["low", None, "low"])
        assert torch.equal(rows[[0, 2]], adapted.generate(**given, **GREEDY)[[0, 2]])
    with pytest.raises(PeftfxError, match="no adapter named 'lwo'"):
        runtime.load(directory, adapter="lwo")


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([0, -2], "no adapter has the number -2: the numbers are 0 to 3, or -1 for no adapter"),
        ([4, 0], "no adapter has the number 4"),
        ([0.0, 1.5], "2 rows need 2 whole numbers, not float32 [2]"),
        ([True, False], "2 rows need 2 whole numbers, not bool [2]"),
        ([0], "2 rows need 2 adapters, not 1 [adapter_names or adapter_ids]"),
        ([[0], [1]], "2 rows need 2 whole numbers, not int64 [2, 1]"),
    ],
    ids=str,
)
def test_what_is_no_adapters_number_is_refused(ids: list[object], text: str, llama: tuple[AdaptedModel, Path]) -> None:
    served, given = runtime.load(llama[1]), {**prompts(2), IDS: torch.tensor(ids)}
    for call in (lambda: served(**given), lambda: served.generate(**given, **GREEDY)):
        with pytest.raises(PeftfxError, match=re.escape(text)):
            call()


def test_the_graph_itself_refuses_it_too(llama: tuple[AdaptedModel, Path]) -> None:
    """ONNX counts a negative index from the end: -2 would be the last adapter for whoever runs the graph alone."""
    served = runtime.load(llama[1])
    feed = {**prompts(2), "position_ids": torch.arange(7).repeat(2, 1)}
    sizes = {"batch": 2, "past": 0}
    for name in served.model.inputs[len(feed) :]:
        shape = [sizes.get(size, size) for size in served.model.axes[name]]
        feed[name] = torch.zeros(shape) if name != IDS else torch.tensor([0, -1])
    feed["attention_mask"] = feed["attention_mask"][:, :7]
    served.model(**feed)
    for wrong in (-2, -(2**31) - 1, -(2**63), 4, 2**63 - 1):
        with pytest.raises(PeftfxError, match=r"row -?\d+ of a table of 5 rows"):
            served.model(**{**feed, IDS: torch.tensor([0, wrong])})


def test_classifiers_of_peft_have_heads_of_their_own(tmp_path: Path, peftfx: Run) -> None:
    base = ZOO["bert"].build()
    base.save_pretrained(tmp_path / "base")
    theirs = {}
    for seed, (name, r) in enumerate({"first": 2, "second": 4}.items()):
        config = peft.LoraConfig(task_type="SEQ_CLS", r=r, target_modules=["query", "value"], bias="lora_only")
        theirs[name] = peft.get_peft_model(copy.deepcopy(base), config).eval()
        torch.manual_seed(seed)
        randomise(theirs[name])
        with torch.no_grad():
            theirs[name].base_model.model.classifier.modules_to_save["default"].weight.mul_(seed + 1)
        theirs[name].save_pretrained(str(tmp_path / name))
    given = [part for name in theirs for part in ("--batched", f"{name}={tmp_path / name}")]
    result = peftfx("export", "--base", tmp_path / "base", *given, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    served, inputs = runtime.load(tmp_path / "out"), ZOO["bert"].inputs(3, 6, model=base)
    names = ["second", None, "first"]
    got = served(**inputs, adapter_ids=served.adapter_ids(names)).logits
    with torch.no_grad():
        for row, name in enumerate(names):
            model = base if name is None else theirs[name]
            want = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
            torch.testing.assert_close(got[row : row + 1], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_norms_and_what_stands_beside_attentions_are_the_rows_own(name: str, tmp_path: Path) -> None:
    rules = {
        "norms": LNTuning(),
        "beside": LlamaAdapter(adapter_len=4),
        "short": [LlamaAdapter(adapter_len=2), LoRA(r=2, target="attention.key | mlp.down")],
    }
    if name not in ("llama", "gemma2", "qwen3"):
        rules["biases"] = BitFit()
    report = adapted_by(name, rules).export(tmp_path / "out", view="auto", batched=list(rules))
    assert report.max_abs < 1e-4  # each row was held against its adapter alone


class Written(nn.Module):
    """A norm over channels that is written out, with axes behind its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * self.weight[:, None, None]


class OfTokens(nn.Module):
    """A norm over features that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Listed(nn.Module):
    """Norms over a list of the tokens of all rows, and a product behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.own, self.out = nn.LayerNorm(8), OfTokens(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.own(self.norm(x.reshape(-1, x.shape[-1])))).reshape(x.shape[0], -1, 3)


def test_norms_of_listed_tokens_are_each_rows_own(tmp_path: Path) -> None:
    """As the last norm in OPT's layers."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 5, 8)}
    adapted = transform(Listed().eval(), LNTuning(), "norms", inputs=inputs)
    adapted.add_adapter("others", LNTuning())
    adapted.add_adapter("low", LoRA(r=2, target="out"), seed=0)
    stirred(adapted, "norms", "others", "low")
    adapted.export(tmp_path / "out", inputs=inputs, batched=["norms", "others", "low"])  # held against each alone
    got = runtime.load(tmp_path / "out")(**inputs, adapter_ids=["others", None, "norms"])["output"]
    for row, name in enumerate(("others", (), "norms")):
        adapted.set_adapter(name)
        torch.testing.assert_close(got[row], adapted(**inputs).detach()[row], atol=1e-5, rtol=1e-5)


def test_a_norm_of_any_kind_is_each_rows_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"input": torch.randn(3, 8, 6, 5)}
    norms = (
        nn.GroupNorm(2, 8),
        nn.BatchNorm2d(8),
        nn.InstanceNorm2d(8, affine=True),
        nn.LayerNorm((6, 5)),
        nn.RMSNorm(5),
    )
    model = nn.Sequential(OrderedDict(zip("abcdefg", (*norms, Written(), nn.Linear(5, 3)), strict=True)))
    adapted = transform(model.eval(), LNTuning(), "norms", inputs=inputs)
    assert len([site for site in adapted.sites if site.kind == "norm"]) == 6
    adapted.add_adapter("biases", BitFit())
    adapted.add_adapter("low", LoRA(r=2, target="g"), seed=0)
    stirred(adapted, "norms", "biases", "low")
    adapted.export(tmp_path / "out", inputs=inputs, batched=["norms", "biases", "low"])  # held against each alone


def test_rows_of_a_forward_view_name_their_adapters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(3, 6)
    adapted = transform(base, LoRA(r=2, target="0", init_lora_weights=False), "one", inputs={"input": x[:2]})
    adapted.add_adapter("two", IA3(target_modules=["2"], feedforward_modules=[], init_ia3_weights=False))
    export_onnx(adapted, tmp_path / "out", batched=["one", "two"])
    got = runtime.load(tmp_path / "out")(input=x, adapter_ids=[None, "two", "one"])["output"]
    for row, name in ((1, "two"), (2, "one")):
        adapted.set_adapter(name)
        torch.testing.assert_close(got[row], adapted(x).detach()[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0], base(x).detach()[0], atol=1e-5, rtol=1e-5)


class Idle(nn.Module):
    """One layer, and another that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle = nn.Linear(6, 5), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_copies_in_modules_that_do_not_run_hold_up_no_rows(tmp_path: Path) -> None:
    """`bias="all"` copies the biases of the idle head of SigLIP in Gemma 3, too: this was refused."""
    torch.manual_seed(0)
    base, x = Idle().eval(), torch.randn(2, 6)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["first"], bias="all"))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    load(base, tmp_path / "adapter", inputs={"x": x}).export(tmp_path / "out", inputs={"x": x}, batched=["default"])
    got = runtime.load(tmp_path / "out")(x=x, adapter_ids=["default", None])["output"]
    with torch.no_grad():
        want = torch.stack([theirs.eval()(x)[0], base(x)[1]])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.further
def test_windows_of_images_are_their_rows(tmp_path: Path) -> None:
    """Swin's attentions have the windows of all images on one axis, one image's behind the other's."""
    low = LoRA(r=2, target="all-linear", init_lora_weights=False)
    adapted = adapted_by("swin", {"low": low, "scales": IA3()})
    adapted.export(tmp_path / "out", batched=["low", "scales"])
    rows = ["scales", None, "low", "scales", "low"]
    given = ZOO["swin"].inputs(len(rows), seed=5)
    got = runtime.load(tmp_path / "out")(**given, adapter_ids=rows)["logits"]
    for row, name in enumerate(rows):
        adapted.set_adapter(name or "low")
        with torch.no_grad(), adapted.disable_adapter() if name is None else contextlib.nullcontext():
            want = adapted(**{key: value[row : row + 1] for key, value in given.items()}).logits[0]
        torch.testing.assert_close(got[row], want, atol=1e-4, rtol=1e-4)


def test_what_rows_cannot_have_apart_is_refused(tmp_path: Path, peftfx: Run) -> None:
    pictures = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), flat=nn.Flatten(), head=nn.Linear(144, 5))).eval()
    model = transform(pictures, LoRA(r=2, target="head"), "low", inputs={"input": torch.ones(2, 3, 8, 8)})
    model.add_adapter("eyes", LoRA(r=2, target="head", modules_to_save=["conv"]))
    with pytest.raises(PeftfxError, match=r"rows cannot each have a trained copy of conv\.weight"):
        stirred(model, "low", "eyes").export(tmp_path / "out", batched=["low", "eyes"])
    assert model.active == ("eyes",)
    prompted = adapted_by("llama", {"low": LoRA(r=2), "prompt": PromptTuning(num_virtual_tokens=2)})
    with pytest.raises(PeftfxError, match="names an adapter twice"):
        prompted.export(tmp_path / "out", batched=["low", "low"])
    with pytest.raises(PeftfxError, match="batched and swappable are both given"):
        prompted.export(tmp_path / "out", batched=["low"], slots="all-linear")
    assert not list(tmp_path.iterdir())
    given = ("export", "--base", tmp_path, "--output", tmp_path / "out", "--batched")
    assert "not of the form NAME=DIR" in peftfx(*given, "adapters").err
    plain = export_onnx(ZOO["bert"].build(), tmp_path / "plain")
    assert plain.slots == 0
    with pytest.raises(PeftfxError, match="no adapters to choose from"):
        runtime.load(tmp_path / "plain")(**ZOO["bert"].inputs(), adapter_ids=torch.zeros(2))


class Mixing(nn.Module):
    """A model that takes the mean of a batch from each row, or compares each row with all rows."""

    def __init__(self, similar: bool) -> None:
        super().__init__()
        self.one, self.two, self.similar = nn.Linear(8, 8), nn.Linear(8, 5), similar

    def forward(self, x: Tensor) -> Tensor:
        states = torch.tanh(self.one(x))
        if self.similar:
            return self.two(states) @ self.two(x).mT
        return self.two(states - states.mean(0, keepdim=True))


@pytest.mark.parametrize("similar", [False, pytest.param(True, marks=pytest.mark.further)])
def test_a_model_that_mixes_the_rows_is_refused_with_the_cause(similar: bool, tmp_path: Path) -> None:
    """It was a difference of numbers."""
    rule = LoRA(r=2, target="all-linear", init_lora_weights=False)
    adapted = transform(Mixing(similar).eval(), rule, "one", inputs={"x": torch.randn(4, 8)})
    with pytest.raises(PeftfxError, match="mixes the rows of a batch"):
        adapted.export(tmp_path / "out", batched=["one"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "gpt_neox", "qwen2"])
def test_other_decoders_go_the_same_way(name: str, tmp_path: Path) -> None:
    adapted = adapted_by(name, RULES)
    report = adapted.export(tmp_path / "out", view="decode", batched=list(RULES))
    assert report.max_abs < 1e-4  # each row was held against its adapter alone, at sizes that no capture saw
