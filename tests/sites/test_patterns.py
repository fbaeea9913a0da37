"""Patterns of one's own: what matches and what does not, told why; methods and passes at the matches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.zoo import Captured
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.passes import PassManager, Probe, Rewrite
from peftfx.patterns.pattern import Pattern, forget, known_patterns
from peftfx.sites.site import PatternSite

WIDE = {"x": "batch length width"}


@pytest.fixture(autouse=True)
def _alone(swiglu: Pattern) -> Iterator[None]:
    """What a test makes is forgotten behind it."""
    yield
    forget([pattern.name for pattern in known_patterns() if pattern is not swiglu])


@pytest.fixture(scope="module")
def beside(swiglu: Pattern) -> type[peftfx.PatternMethod]:
    """A bottleneck beside every SwiGLU."""

    @peftfx.register
    @dataclass(frozen=True, kw_only=True)
    class Beside(peftfx.PatternMethod):
        """A bottleneck beside a feed-forward."""

        r: int = 4
        peft_type: ClassVar[str] = "BESIDE"
        pattern: ClassVar[Pattern] = swiglu

        def init(self, site: PatternSite, like: Tensor, rng: torch.Generator | None) -> dict[str, Tensor]:
            down = torch.empty(self.r, site.width, dtype=like.dtype, device=like.device).normal_(generator=rng)
            return {"down": down / site.width**0.5, "up": like.new_zeros(site.width, self.r)}

        def forward(self, site: PatternSite, x: Tensor, y: Tensor, p: peftfx.method.Params, training: bool) -> Tensor:
            return y + F.linear(F.relu(F.linear(x, p["down"])), p["up"])

    return Beside


def graph_of(forward: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Graph:
    """The graph of a function of tensors."""

    class Module(nn.Module):
        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return forward(a) if b is None else forward(a, b)

    values = dict(zip("ab", (torch.randn(shape) for shape in shapes), strict=False))
    return peftfx.capture(Module().eval(), values)


def found(pattern: Pattern, graph: Graph) -> int:
    return len(list(pattern.matches(graph)))


def test_one_pattern_of_two_spellings_is_found_in_each_layer(
    captured: Callable[[str], Captured], swiglu: Pattern
) -> None:
    for name, weights in {"llama": 3, "phi3": 2}.items():
        matches = list(swiglu.matches(captured(name).graph))
        assert [match.module for match in matches] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert all(sum(bool(match.weight(own)) for own in match.operands) == weights for match in matches)
    assert found(swiglu, captured("gpt2").graph) == 0


def test_operands_in_either_order_casts_and_copies_match() -> None:
    @peftfx.pattern("test.scaled", x="a b", w="b")
    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return torch.sigmoid(x) * w + 1

    weight = torch.randn(5)
    assert found(scaled, graph_of(lambda x: torch.sigmoid(x) * weight + 1, (3, 5))) == 1
    assert found(scaled, graph_of(lambda x: 1 + weight * torch.sigmoid(x), (2, 3, 5))) == 1
    assert found(scaled, graph_of(lambda x: (torch.sigmoid(x.double()).float().clone() * weight) + 1, (3, 5))) == 1
    assert found(scaled, graph_of(lambda x: torch.sigmoid(x) * weight + 2, (3, 5))) == 0
    assert found(scaled, graph_of(lambda x: torch.sigmoid(x) * weight - 1, (3, 5))) == 0
    assert found(scaled, graph_of(lambda x: torch.add(torch.sigmoid(x) * weight, 1, alpha=3), (3, 5))) == 0


def test_one_argument_is_one_value() -> None:
    @peftfx.pattern("test.square", x="a b")
    def gated(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x

    assert found(gated, graph_of(lambda x: x * torch.sigmoid(x), (3, 5))) == 1
    assert found(gated, graph_of(lambda x, y: y * torch.sigmoid(x), (3, 5), (3, 5))) == 0


def test_numbers_are_told_and_sizes_are_compared() -> None:
    @peftfx.pattern("test.rms", x="b t d", w="d")
    def rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    @peftfx.pattern("test.turned", x="b d")
    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    weight, square = torch.randn(8), torch.randn(8, 8)
    graph = graph_of(lambda x: weight * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + 1e-3)), (2, 3, 8))
    (match,) = rms.matches(graph)
    assert match.numbers == {"eps": 1e-3}
    assert tuple(match.value("x").shape)[-1] == 8
    assert (
        found(rms, graph_of(lambda x: weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-3)), (2, 8, 8)))
        == 0
    )

    def parts(x: Tensor, of: int) -> Tensor:
        cut = x.shape[-1] // of
        return torch.cat((-x[..., cut:], x[..., :cut]), -1)

    assert found(turned, graph_of(lambda x: parts(x, 2), (3, 8))) == 1
    assert found(turned, graph_of(lambda x: parts(F.linear(x, square), 2), (3, 8))) == 1
    assert found(turned, graph_of(lambda x: parts(x, 4), (3, 8))) == 0
    assert found(turned, graph_of(lambda x: parts(F.linear(x, square), 4), (3, 8))) == 0


def test_a_condition_narrows_and_what_did_not_match_is_told(captured: Callable[[str], Captured]) -> None:
    graph = captured("llama").graph

    @peftfx.pattern("test.wide", where=lambda match: match.weight("w").endswith("lm_head.weight"), x="b t d", w="e d")
    def head(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    @peftfx.pattern("test.geglu", **WIDE, gate="inner width", up="inner width", down="width inner")
    def geglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down)

    assert [match.module for match in head.matches(graph)] == ["lm_head"]
    first = geglu.explain(graph)[0]
    assert first.module == "model.layers.0.mlp.down_proj"
    assert first.why == "aten.gelu is expected, and aten.silu is there"
    assert first.node in {node.name for node in graph.nodes()}

    @dataclass(frozen=True, kw_only=True)
    class Nowhere(peftfx.PatternMethod):
        peft_type: ClassVar[str] = "NOWHERE"
        pattern: ClassVar[Pattern] = geglu
        init = forward = lambda self, *given: {}  # type: ignore[assignment]

    with pytest.raises(PeftfxError, match="geglu matches nothing") as error:
        peftfx.transform(captured("llama").model, Nowhere())
    assert "model.layers.0.mlp.down_proj: aten.gelu is expected, and aten.silu is there" in error.value.hint


def test_what_is_inside_a_match_is_no_near_miss(captured: Callable[[str], Captured], swiglu: Pattern) -> None:
    missed = [miss.module for miss in swiglu.explain(captured("llama").graph)]
    assert "lm_head" in missed
    assert not [module for module in missed if ".mlp." in module]


def test_sites_of_a_pattern_are_sites(captured: Callable[[str], Captured], swiglu: Pattern) -> None:
    sites = peftfx.inspect(captured("llama").model, inputs=captured("llama").entry.inputs())
    paths = [site.path for site in sites.filter(kind="pattern", role="mlp.swiglu")]
    assert paths == ["model.layers.0.mlp.swiglu.0", "model.layers.1.mlp.swiglu.0"]
    first = sites.patterns[0]
    assert (first.layer, first.width, first.operand("gate").weight) == (
        0,
        32,
        "base.model.layers.0.mlp.gate_proj.weight",
    )
    assert first.operand("x").shape == (None, None, 32)
    assert "mlp.swiglu" in str(sites)
    assert {tuple(site.to_dict()) for site in sites} == {tuple(first.to_dict())}
    assert not [match for match in sites.select("mlp") if match.site.kind == "pattern"], "LoRA acts at weights"
    assert sites.network().number_of_nodes() == captured("llama").graph.sites.network().number_of_nodes()
    assert "model.layers.1.mlp.up_proj" in {m.site.path for m in sites.select("downstream(mlp) & mlp")}


def by_hand(model: nn.Module, adapted: peftfx.AdaptedModel) -> Callable[..., Tensor]:
    """The base with each bottleneck as a hook on its module."""
    params = dict(adapted.adapters.named_parameters())

    def call(**inputs: Tensor) -> Tensor:
        hooks = []
        for i, layer in enumerate(model.model.layers):
            down, up = (params[f"default.model.layers.{i}.mlp.swiglu.0.{name}"] for name in ("down", "up"))
            add = lambda m, args, y, down=down, up=up: y + F.linear(F.relu(F.linear(args[0], down)), up)  # noqa: E731
            hooks.append(layer.mlp.register_forward_hook(add))
        made = model(**inputs).logits
        for hook in hooks:
            hook.remove()
        return made

    return call


def test_a_method_acts_at_each_match(captured: Callable[[str], Captured], beside: type[peftfx.PatternMethod]) -> None:
    model, inputs = copy.deepcopy(captured("llama").model), captured("llama").entry.inputs()
    plain = model(**inputs).logits
    adapted = peftfx.transform(model, "beside(r=3)", inputs=inputs)
    assert adapted.road == "modules"
    assert torch.equal(adapted(**inputs).logits, plain)
    for p in adapted.adapters.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    want = by_hand(model, adapted)(**inputs)
    assert (want - plain).abs().max() > 0.1
    torch.testing.assert_close(adapted(**inputs).logits, want, atol=1e-5, rtol=1e-5)
    grads = []
    for road in (adapted, adapted.graph(inputs)):
        road(**inputs).logits.square().sum().backward()
        grads.append([p.grad for p in adapted.adapters.parameters()])
        adapted.adapters.zero_grad()
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "rules", ["beside; lora(r=2)@mlp", pytest.param("lora(r=2)@mlp; beside", marks=pytest.mark.slow)]
)
def test_beside_another_method_both_act(
    captured: Callable[[str], Captured], beside: type[peftfx.PatternMethod], rules: str
) -> None:
    model, inputs = copy.deepcopy(captured("llama").model), captured("llama").entry.inputs()
    adapted = peftfx.transform(model, rules, inputs=inputs)
    for p in adapted.adapters.parameters():
        nn.init.uniform_(p, -0.3, 0.3)
    got = adapted(**inputs).logits
    params = {name.partition(".")[2]: p for name, p in adapted.adapters.named_parameters()}
    hand = by_hand(model, adapted)
    with torch.no_grad():
        for path, module in model.named_modules():
            if f"{path}.lora_A" in params:
                module.weight += 8 / 2 * params[f"{path}.lora_B"] @ params[f"{path}.lora_A"]
    torch.testing.assert_close(got, hand(**inputs), atol=1e-4, rtol=1e-4)


class Feed(nn.Module):
    """One SwiGLU of its own, whose layers are run as often as is said."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down, self.times = nn.Linear(12, 8, bias=False), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return x


def test_a_match_that_runs_twice_is_one_site(beside: type[peftfx.PatternMethod], tmp_path: Path) -> None:
    model, x = Feed(times=2).eval(), torch.randn(2, 3, 8)
    adapted = peftfx.transform(model, beside(r=2), inputs={"x": x})
    (site,) = adapted.sites.patterns
    assert (site.path, len(site.calls), adapted.get_nb_trainable_parameters()[0]) == ("swiglu.0", 2, 32)
    for p in adapted.adapters.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    down, up = (p.detach() for p in adapted.adapters.parameters())
    want = x
    for _ in range(2):
        fed = model.down(F.silu(model.gate(want)) * model.up(want))
        want = want + fed + F.linear(F.relu(F.linear(want, down)), up)
    torch.testing.assert_close(adapted(x), want, atol=1e-5, rtol=1e-5)
    report = adapted.export(tmp_path / "onnx", inputs={"x": x})
    assert "compared with: the adapted graph" in str(report)
    assert "2 made constants" in str(report)
    got = peftfx.runtime.load(tmp_path / "onnx")(x=x)
    torch.testing.assert_close(torch.as_tensor(next(iter(got.values()))), want, atol=1e-4, rtol=1e-4)


def test_files_are_read_again_and_what_has_no_place_is_refused(
    beside: type[peftfx.PatternMethod], tmp_path: Path
) -> None:
    model, x = Feed().eval(), torch.randn(2, 3, 8)
    adapted = peftfx.transform(model, "beside(r=2)", inputs={"x": x})
    for p in adapted.adapters.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    want = adapted(x)
    with pytest.warns(UserWarning, match="peft cannot load"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(PeftfxError, match=r"no place in the base's weights: Beside\.folds names no"):
        adapted.merge_adapter()
    with pytest.raises(PeftfxError, match="weights"):
        adapted.convert_to_lora("default", 2)
    adapted.remove()
    assert torch.equal(peftfx.load(model, tmp_path, inputs={"x": x})(x), want)


def test_a_pattern_made_later_is_found_in_what_was_captured_before() -> None:
    adapted = peftfx.transform(Feed().eval(), "lora(r=2)@mlp", inputs={"x": torch.randn(2, 3, 8)})
    assert not [site for site in adapted.sites if site.role == "test.later"]

    @peftfx.pattern("test.later", x="a b", w="c b")
    def later(x: Tensor, w: Tensor) -> Tensor:
        return F.silu(F.linear(x, w))

    assert [site.path for site in adapted.sites if site.role == "test.later"] == ["later.0"]
    forget(["later"])
    assert not [site for site in adapted.sites if site.role == "test.later"]


def test_a_pass_puts_another_function_in_its_place(captured: Callable[[str], Captured]) -> None:
    @peftfx.pattern("test.gelu", x="b t d")
    def gelu(x: Tensor) -> Tensor:
        return F.gelu(x)

    entry = captured("bert")
    inputs = entry.entry.inputs()
    rewrite = Rewrite(gelu, lambda x: F.gelu(x, approximate="tanh"))
    result = PassManager([rewrite])(entry.graph)
    assert result.changed == entry.model.config.num_hidden_layers
    model = copy.deepcopy(entry.model)
    for module in model.modules():
        if hasattr(module, "intermediate_act_fn"):
            module.intermediate_act_fn = nn.GELU(approximate="tanh")
    got, want = result.graph(**inputs), model(**inputs)
    for a, b in zip(got.to_tuple(), want.to_tuple(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert found(gelu, result.graph) == 0
    with pytest.raises(PeftfxError, match="changed an output"):
        PassManager([dataclasses.replace(rewrite, exact=True)], check="numeric", inputs=[*inputs.values()])(entry.graph)


def test_a_probe_gives_an_inner_value(captured: Callable[[str], Captured]) -> None:
    @peftfx.pattern("test.gated", **WIDE, gate="inner width", up="inner width")
    def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    entry, seen = captured("llama"), []
    inputs = entry.entry.inputs()
    result = PassManager([Probe(gated)])(entry.graph)
    hooks = [
        m.mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0])) for m in entry.model.model.layers
    ]
    want = entry.model(**inputs)
    for hook in hooks:
        hook.remove()
    got = result.graph(**inputs)
    assert isinstance(got, dict)
    assert list(got)[-2:] == ["probe.model.layers.0.mlp", "probe.model.layers.1.mlp"]
    torch.testing.assert_close(got["logits"], want.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close([got[f"probe.model.layers.{i}.mlp"] for i in (0, 1)], seen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: peftfx.pattern("mlp.down", x="a")(lambda x: x + 1), "no name for a pattern's role"),
        (lambda: peftfx.pattern("a b", x="a")(lambda x: x + 1), "no name for a pattern's role"),
        (lambda: peftfx.pattern("my.own", x="a")(lambda x, y: x + y), "does not say the axes of y"),
        (lambda: peftfx.pattern("my.own", x="a", z="a")(lambda x: x + 1), "has no argument 'z'"),
        (lambda: peftfx.pattern("my.own", x="a -")(lambda x: x + 1), "cannot read the axis"),
        (lambda: peftfx.pattern("my.own", x="what: a")(lambda x: x + 1), "there is no dtype 'what'"),
        (lambda: peftfx.pattern("my.own", x="a b", y="c")(lambda x, y: x + y), "fails on tensors of"),
        (lambda: peftfx.pattern("my.own", x="a b")(lambda x: (x + 1, x)), "returns no one tensor"),
        (lambda: peftfx.pattern("my.own", x="a b")(lambda x: x), "returns no one tensor"),
        (
            lambda: peftfx.pattern("my.own", x="a b")(lambda x: x + torch.tensor([0.5] * 6)),
            "has a tensor of its own",
        ),
        (lambda: peftfx.pattern("my.own", x="a b", y="a b")(lambda x, y: x + 1), "does not use its argument y"),
    ],
)
def test_what_is_no_pattern_is_told(make: Callable[[], object], said: str) -> None:
    before = known_patterns()
    with pytest.raises(PeftfxError, match=said):
        make()
    assert known_patterns() == before


def test_a_function_that_does_not_fit_is_told() -> None:
    @peftfx.pattern("test.relu", x="a b")
    def relu(x: Tensor) -> Tensor:
        return F.relu(x)

    graph = graph_of(lambda x: F.relu(x) + 1, (3, 5))
    with pytest.raises(PeftfxError, match="has an argument 'z', and this match of relu has not"):
        Rewrite(relu, lambda z: z)(graph)
    with pytest.raises(PeftfxError, match=r"gives torch\.float32.*, and relu gives torch"):
        Rewrite(relu, lambda x: x.sum(-1) * 2)(graph)
    wrong = peftfx.pattern("test.wrong", where=lambda match: match.value("y") is None, x="a b")(lambda x: F.relu(x))
    with pytest.raises(PeftfxError, match="condition of the pattern <lambda> failed"):
        list(wrong.matches(graph))
