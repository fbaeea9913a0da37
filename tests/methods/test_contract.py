"""The contract: methods from outside the package, what rules' places share, and errors that name the member."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from laws.breakers import Scale
from torch import Tensor, nn

import peftfx
from peftfx.contract.method import Base, Method, Op, Params
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.methods import forgetting_registered, methods
from peftfx.sites.site import Site
from peftfx.testing import check
from peftfx.testing.check import known
from peftfx.testing.laws import LAWS

X = torch.randn(3, 4)


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """What a test registers is gone behind it."""
    with forgetting_registered():
        yield


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).eval()


def adapted(method: Method) -> Tensor:
    return peftfx.transform(model(), method, inputs={"input": X})(X)


class Bank(Scale):
    """A scale by a mixture of trained numbers that all places share, as VB-LoRA's vectors are; drawn from the base."""

    peft_type: ClassVar[str] = "BANK"

    def shared(
        self, sites: Sequence[Site], bases: Iterable[Base], like: Tensor, rng: torch.Generator | None
    ) -> dict[str, Tensor]:
        sizes = [float(base.weight.float().norm()) for base in bases]
        assert len(sizes) == len(sites)
        return {"bank": torch.rand(3, generator=rng) * sum(sizes)}

    def shared_keys(self, sites: Sequence[Site]) -> dict[str, str]:
        return {"bank": "base_model.bank"}

    def frozen(self) -> frozenset[str]:
        return frozenset()

    def init(self, site: Site, base: Base, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"l": torch.zeros(base.weight.shape[0])}

    def start(self, site: Site, base: Base, shared: Params, rng: torch.Generator | None) -> dict[str, Tensor]:
        return {"mix": torch.ones(len(shared["bank"]))}

    def forward(self, site: Site, op: Op, x: Tensor, y: Tensor, base: Base, p: Params, training: bool) -> Tensor:
        return (y * (1 + p["l"] * (p["mix"] @ p["bank"]))).to(y.dtype)

    def fold(self, site: Site, base: Base, p: Params) -> Base:
        return super().fold(site, base, {"l": p["l"] * (p["mix"] @ p["bank"])})

    def keys(self, site: Site) -> dict[str, str]:
        return {"l": "bank_l", "mix": "bank_mix"}

    whole = WeightMethod.whole


def test_trained_tensors_that_places_share_are_kept_once_trained_and_saved(tmp_path: Path) -> None:
    peftfx.register(Bank)
    ours = peftfx.transform(model(), Bank(), inputs={"input": X}, seed=0)
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert [n for n in names if n.endswith("bank")] == ["adapters.default.shared_by_rule.0.bank"]
    with torch.no_grad():
        for p in ours.adapters.parameters():
            p.add_(0.1)
    ours(X).sum().backward()
    assert ours.adapter("default").get("shared_by_rule.0.bank").grad is not None
    ours.save_pretrained(tmp_path)
    assert torch.equal(peftfx.load(model(), tmp_path, inputs={"input": X})(X), ours(X))


@pytest.mark.parametrize("law", [law for law in LAWS if law.is_about(Bank)], ids=lambda law: law.name)
def test_the_laws_hold_for_a_method_whose_places_share_trained_tensors(law: object) -> None:
    with known(Bank):
        law.hold(Bank)  # type: ignore[attr-defined]


def test_a_registered_method_is_a_rule_and_a_file_of_its_name(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=r"unknown method 'scale'(?s:.*)peftfx.register"):
        adapted("scale")  # type: ignore[arg-type]
    assert peftfx.register(Scale) is Scale
    ours = peftfx.transform(model(), "scale@all-linear", inputs={"input": X})
    ours.save_pretrained(tmp_path)
    assert isinstance(peftfx.load(model(), tmp_path, inputs={"input": X}).adapter("default").rules[0], Scale)


def test_a_name_that_is_taken_is_refused() -> None:
    class Another(Scale):
        peft_type: ClassVar[str] = "LORA"

    with pytest.raises(
        PeftfxError, match=r"Another has a peft_type that is taken: LORA is peftfx\.methods\.lora\.LoRA"
    ):
        peftfx.register(Another)


def test_a_method_of_hf_peft_that_is_not_here_is_told_as_such() -> None:
    with pytest.raises(PeftfxError, match="refuses HF PEFT's method XLORA: it mixes"):
        adapted("xlora")  # type: ignore[arg-type]


class Half(WeightMethod):
    """Has a name, and nothing else."""

    peft_type: ClassVar[str] = "HALF"


@dataclasses.dataclass(frozen=True)
class Nameless(Scale):
    """Has all but a name."""

    peft_type: ClassVar[str] = ""


class Optional(Scale):
    """Has an option, and is no dataclass."""

    size: int = 3


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (
            Half,
            r"Half is not a complete method(?s:.*)fold: Base: the adapted weight(?s:.*)default_target: where it acts",
        ),
        (Nameless, r"Nameless is not a complete method(?s:.*)peft_type: its name in files"),
        (Optional, r"Optional has options \(size\) but is not a dataclass"),
    ],
)
def test_a_class_that_is_half_done_is_refused_with_what_it_lacks(cls: type[Method], words: str) -> None:
    for use in (cls, lambda: peftfx.register(cls)):
        with pytest.raises(PeftfxError, match=words):
            use()


Members = Mapping[str, object]
WRONG: Mapping[str, tuple[Members, str]] = {
    "init gives nothing": (
        {"init": lambda *_: None},
        r"Wrong\.init gave None(?s:.*)init must give dict\[str, Tensor\]",
    ),
    "init takes a name": (
        {"init": lambda *_: {"double": torch.ones(2)}},
        r"calls a tensor 'double', which every torch",
    ),
    "init needs a name": ({"init": lambda *_: {}["x"]}, r"Wrong\.init failed with KeyError(?s:.*)new parameters"),
    "keys gives a list": (
        {"keys": lambda *_: ["l"]},
        r"Wrong\.keys gave \['l'\](?s:.*)keys must give dict\[str, str\]",
    ),
    "keys of nothing": ({"keys": lambda *_: {"l": "l", "m": "m"}}, r"Wrong\.keys names m, and there is no such tensor"),
    "keys are one": ({"keys": lambda *_: {"l": "l", "seen": "l"}}, r"Wrong\.keys gives two tensors one key"),
    "forward gives nothing": ({"forward": lambda *_: None}, r"Wrong\.forward gave None(?s:.*)must give Tensor"),
    "forward of a shape": ({"forward": lambda s, *a: a[3].sum()}, r"Wrong\.forward gave \[\] where y is \[3, 6\]"),
    "forward of a shape, without y": (
        {"reruns": True, "forward": lambda s, *a: a[2].new_zeros(2, 3)},
        r"Wrong\.forward gave \[2, 3\] where y is",
    ),
    "forward needs a name": ({"forward": lambda s, *a: a[5]["z"]}, r"Wrong\.forward failed with KeyError: 'z'"),
}


@pytest.mark.parametrize(("members", "words"), WRONG.values(), ids=WRONG)
def test_what_a_member_gives_is_told_by_its_name(members: Members, words: str) -> None:
    cls = type("Wrong", (Scale,), dict(members))
    with pytest.raises(PeftfxError, match=words):
        adapted(cls())


def test_a_fold_that_gives_no_weight_is_told_by_its_name() -> None:
    cls = type("Wrong", (Scale,), {"fold": lambda s, site, base, p: base.weight})
    ours = peftfx.transform(model(), cls(), inputs={"input": X})
    with pytest.raises(PeftfxError, match=r"Wrong\.fold gave(?s:.*)fold must give Base: the adapted weight and bias"):
        ours.merge()


def test_a_fold_of_another_shape_is_told_by_its_name() -> None:
    cls = type("Wrong", (Scale,), {"fold": lambda s, site, base, p: Base(base.weight[:, :1], base.bias)})
    ours = peftfx.transform(model(), cls(), inputs={"input": X})
    with pytest.raises(PeftfxError, match=r"Wrong\.fold gave a weight \[\d+, 1\] where it was"):
        ours.merge()


def test_a_method_that_no_weight_can_do_needs_no_fold_and_its_laws_are_skipped() -> None:
    class Beside(Scale):
        fold = WeightMethod.fold
        update = WeightMethod.update

    with pytest.raises(PeftfxError, match=r"lacks\n  fold: Base: (?s:.*)or unfoldable: str"):
        check(Beside)
    Beside.unfoldable = "it depends on the input"  # type: ignore[assignment]
    report = {finding.name: finding for finding in check(Beside).findings}
    assert {name for name, finding in report.items() if finding.skipped} == {
        "fold",
        "update",
        "slots",
        "rows",
        "parity",
    }
    assert report["slots"].skipped == "Beside has no update of its own"


def test_a_report_says_which_law_is_broken_and_by_what() -> None:
    class Forgets(Scale):
        def fold(self, site: Site, base: Base, p: Params) -> Base:
            return Base(super().fold(site, base, p).weight, base.bias)

    with pytest.raises(AssertionError) as caught:
        check(Forgets)
    text = str(caught.value)
    assert "broken  fold: `forward` on activations equals the operation on folded weights" in text
    assert "Case(" in text
    assert "holds   frame:" in text
    assert "skipped parity" in text


def required(cls: type[Method]) -> dict[str, object]:
    """The options that a method cannot do without."""
    return {"token_indices": (1,)} if "token_indices" in cls.options() else {}


@pytest.mark.parametrize("cls", methods().values(), ids=lambda cls: cls.peft_type)
def test_a_choice_that_there_is_not_and_a_dropout_that_is_no_probability_are_refused(cls: type[Method]) -> None:
    kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for name in (name for name, kind in kinds.items() if "Literal" in kind):
        with pytest.raises(PeftfxError, match=f"unknown choice 'none at all' .{name}"):
            cls(**{**required(cls), name: "none at all"})
    for name in (name for name in kinds if name.endswith("dropout")):
        with pytest.raises(PeftfxError, match=f"{name} must be a probability, from 0 to 1, not 1.5 .{name}"):
            cls(**{**required(cls), name: 1.5})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda: peftfx.VBLoRA(topk=0), r"topk must be 1 or more, not 0 \[topk\]\n  hint: VBLoRA\(topk=2\)"),
        (lambda: peftfx.Lily(num_B=1), "num_B must be 2 or more, not 1"),
        (lambda: peftfx.PEANuT(depth=-1), "depth must be 0 or more, not -1"),
        (lambda: peftfx.C3A(block_size_pattern={"q_proj": 0}), r"block size must be 1 or more, not 0 .*q_proj"),
    ],
)
def test_a_number_below_the_least_is_named_with_its_value(rule: Callable[[], object], expected: str) -> None:
    with pytest.raises(PeftfxError, match=expected):
        rule()
