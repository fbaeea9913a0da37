"""A captured graph is the model: the same numbers at other sizes, in training too, wherever capture was called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from support.few import but_for, few
from support.zoo import ZOO, Captured
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.model.api import bare
from peftfx.views.capture import capture
from peftfx.views.finding.decode_view import decode_view
from peftfx.views.view import name_axes, without_cache

Get = Callable[[str], Captured]

#: One of each way to compute attention, to share weights and to be random in training.
VARIED = ("gpt2", "bloom", "llama", "t5", "bert", "deberta", "swin", "custom")
#: One of each way to compute a loss.
LABELLED = ("gpt2", "llama", "t5", "deberta_v2", "segformer", "blip2", "electra", "distilbert")


def leaves(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def eager(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with without_cache(model):
        return leaves(model(**inputs))


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-6) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


#: What `name_axes` calls the axes that no model of the zoo may fix.
FREE = {"batch", "sequence", "decoder_sequence", "ids.1", "mask.1", "encoder_hidden_states.1"}


@pytest.mark.parametrize("name", few(ZOO))
@torch.no_grad()
def test_a_graph_equals_its_model_and_batch_and_sequence_stay_free(captured: Get, name: str) -> None:
    case = captured(name)
    axes = name_axes(case.entry.inputs(model=case.model))
    for spec in case.graph.inputs:
        free = {"batch" if axis in ("image_batch", "images") else axis for axis in spec.shape}  # images beside texts
        assert set(axes[spec.name]) & FREE == free & FREE, spec
    assert not [output for output in case.graph.outputs if "cache" in output or "past" in output]
    for batch, sequence in ((3, 9), (1, 6), (1, 1)):
        inputs = case.entry.inputs(batch, sequence, seed=1, model=case.model)
        assert_same(leaves(case.graph(**inputs)), eager(case.model, inputs))


@pytest.mark.parametrize("name", but_for({"bloom", "swin", "t5", "deberta"}, VARIED))
def test_training_draws_the_same_dropout_as_the_model(name: str) -> None:
    model = ZOO[name].build().train()
    graph = capture(model, ZOO[name].inputs(model=model))
    inputs = ZOO[name].inputs(3, 9, seed=1, model=model)
    outputs = []
    for run in (lambda: leaves(graph(**inputs)), lambda: eager(model, inputs)):
        torch.manual_seed(7)
        outputs.append(run())
    assert graph.training
    assert_same(*outputs)


@pytest.mark.parametrize("name", but_for({"gpt2", "deberta_v2", "blip2", "segformer", "electra"}, LABELLED))
def test_labels_give_the_same_loss_and_gradients(name: str) -> None:
    entry, model = ZOO[name], ZOO[name].build()
    graph = capture(model, entry.inputs(model=model, labels=True))
    inputs = entry.inputs(3, 9, seed=1, model=model, labels=True)
    gradients = []
    for run in (lambda: leaves(graph(**inputs)), lambda: eager(model, inputs)):
        model.zero_grad()
        loss = run()[0]
        assert loss.ndim == 0
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    assert_same(list(gradients[0].values()), list(gradients[1].values()))


def test_parameters_are_shared_and_tied_weights_stay_tied(captured: Get) -> None:
    case = captured("gpt2")
    read = {id(case.graph.get(str(n.target))) for n in case.graph.nodes() if n.op == "get_attr"}
    assert {id(p) for p in case.model.parameters()} <= read
    assert case.model.lm_head.weight is case.model.transformer.wte.weight


def test_a_model_of_fake_tensors_is_captured_without_its_weights(captured: Get) -> None:
    real = captured("llama")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ZOO["llama"].make().eval()
    inputs = example_inputs(fake)
    assert type(inputs["input_ids"]) is Tensor
    graph = capture(fake, inputs)
    assert [str(spec) for spec in graph.inputs] == [str(spec) for spec in real.graph.inputs]
    assert graph.text() == real.graph.text()
    assert graph.sites.to_dict() == real.graph.sites.to_dict()


@contextlib.contextmanager
def no_grad_and_autocast() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


CONTEXTS = [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), no_grad_and_autocast]


@pytest.mark.parametrize("context", CONTEXTS, ids=["no_grad", "inference_mode", "autocast", "both"])
@pytest.mark.parametrize("name", ["llama", "custom"])
def test_where_capture_is_called_does_not_matter(
    captured: Get, name: str, context: Callable[[], contextlib.AbstractContextManager[object]]
) -> None:
    case = captured(name)
    with context():
        graph: Graph = capture(case.model, case.entry.inputs(model=case.model))
    assert graph.text() == case.graph.text()


def test_capture_leaves_the_configs_as_they_were(captured: Get) -> None:
    model = captured("blip2").model
    config = model.config.text_config
    assert config.use_cache is True
    with contextlib.suppress(ZeroDivisionError), without_cache(model):
        assert config.use_cache is False
        raise ZeroDivisionError
    assert config.use_cache is True


def test_code_that_branches_on_values_is_explained() -> None:
    class Branches(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum() > 0 else x

    said = r"branches on the values of a tensor, at test_capture\.py:\d+ \(`return y if y\.sum\(\) > 0 else x`\)"
    with pytest.raises(PeftfxError, match=said):
        capture(Branches(4, 4), {"x": torch.ones(2, 4)})


def test_an_axis_keeps_its_size_unless_it_is_named() -> None:
    model = ZOO["segformer"].build()
    inputs = ZOO["segformer"].inputs(model=model)
    fixed = capture(model, inputs)
    assert fixed.inputs[0].shape == ("batch", 3, 32, 32)
    with pytest.raises(PeftfxError, match="the graph takes"):
        fixed(**example_inputs(model, sizes={"height": 64}))
    free = capture(model, inputs, axes={"pixel_values": ("batch", None, "height", "width")})
    larger = example_inputs(model, sizes={"height": 64, "width": 96})
    assert_same(leaves(free(**larger)), eager(model, larger))


def test_a_free_axis_that_the_code_fixes_is_reported_as_fixed() -> None:
    graph = capture(nn.Linear(6, 4).eval(), {"input": torch.zeros(2, 6)})
    assert graph.inputs[0].shape == ("batch", 6)


class Rows(nn.Module):
    """Reads how many rows there are from one input, and adds those of the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(y.shape[0], 3) + x.reshape(x.shape[0], 3) + y.expand(x.shape[0], 3)


def test_axes_of_one_name_are_one_size() -> None:
    graph = capture(Rows(), {"x": torch.ones(2, 3), "y": torch.ones(2, 3)})
    sizes = {str(n.meta["val"].shape[0]) for n in graph.nodes() if n.op == "placeholder"}
    assert len(sizes) == 1
    assert graph.conditions == ()
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    assert_same(leaves(graph(x=x, y=y)), [Rows()(x, y)])
    with pytest.raises(PeftfxError, match="different sizes along batch"):
        graph(x=x, y=y[:1])


class Viewed(nn.Module):
    """Views and reshapes of a contiguous tensor, and of one that is not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n, m = x.shape[0], x.shape[1]
        across = x.transpose(0, 1)
        seen = x.view(n, m * 2, 3), x.view(m, -1), x.view(1, n, 1, m, 6, 1), x.view(n * m * 6)
        return *seen, across.reshape(-1, 6), across.view(m, n, 2, 3), x[:, :1].reshape(n, 6)


@pytest.mark.parametrize("sizes", [(4, 7), (1, 5), (3, 1), (1, 1)])
def test_views_have_the_values_that_torch_gives_them(sizes: tuple[int, int]) -> None:
    graph = capture(Viewed(), {"x": torch.randn(4, 7, 6)}, axes={"x": ("n", "m", None)})
    assert not [condition for condition in graph.conditions if condition.relation]
    x = torch.randn(*sizes, 6)
    assert_same(leaves(graph(x=x)), list(Viewed()(x)))


class AsksToo(nn.Module):
    """Asks what torch's operators ask of the same sizes, before and after."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.ones(1, 3)
        if x.shape[0] != 1 and x.shape[0] > 1:
            y = (y * 2).reshape(-1, 3)
        return y.transpose(0, 1).contiguous()


def test_a_question_of_the_model_is_noted_though_torch_asks_the_same() -> None:
    graph = capture(AsksToo(), {"x": torch.ones(2, 3)}, axes={"x": ("batch", None)})
    asked = {str(condition.holds) for condition in graph.conditions if condition.code and condition.edge}
    assert asked == {"Ne(batch, 1)", "batch > 1"}
    x = torch.randn(5, 3)
    assert_same(leaves(graph(x=x)), [AsksToo()(x)])


def test_axes_of_one_name_are_apart_where_a_call_has_two_sizes() -> None:
    adapted = bare(Rows(), {"x": torch.ones(2, 3), "y": torch.ones(2, 3)})
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    for call in ({"x": x, "y": y}, {"x": x, "y": y[:1]}, {"x": x[:3], "y": y[:3]}):
        assert_same(leaves(adapted(**call)), [Rows()(**call)])


def test_a_capture_has_a_symbol_for_each_name(captured: Get) -> None:
    model = captured("llama").model
    view = decode_view(model)
    graph = capture(model, view.inputs(model), axes=view.axes, call=view)
    shapes = [node.meta["val"].shape for node in graph.nodes() if node.op == "placeholder"]
    assert len({size for shape in shapes for size in map(str, shape) if not size.isdigit()}) == len(graph.sizes) == 4


def test_axes_are_named_by_what_inputs_mean() -> None:
    ids = torch.zeros(2, 7, dtype=torch.long)
    assert name_axes({"input_ids": ids, "labels": ids}) == dict.fromkeys(("input_ids", "labels"), ("batch", "sequence"))
    decoder = name_axes({"input_ids": ids, "decoder_input_ids": ids[:, :5], "labels": ids[:, :5]})
    assert decoder["labels"] == decoder["decoder_input_ids"] == ("batch", "decoder_sequence")
    assert name_axes({"input_ids": ids, "labels": ids[:, 0]})["labels"] == ("batch",)
    assert name_axes({"input_ids": ids, "attention_mask": ids[:, :3]})["attention_mask"] == (
        "batch",
        "attention_mask.1",
    )
    assert name_axes({"input_ids": ids, "position_ids": ids[:1]})["position_ids"] == ("position_ids.0", "sequence")
    assert name_axes({"x": torch.zeros(4, 3), "t": torch.tensor(1)}) == {"x": ("batch", "x.1"), "t": ()}


def test_example_inputs_are_valid_and_repeatable() -> None:
    model = ZOO["blip2"].build()
    first, second = (example_inputs(model, labels=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["input_ids"] == 98).sum(1).tolist() == [4, 4]
    assert (first["attention_mask"].sum(1) > 0).all()
    assert (first["labels"][first["input_ids"] == 98] == -100).all()
    assert (first["labels"][first["attention_mask"] == 0] == -100).all()


def test_a_node_is_described_by_its_value_alone_and_torchs_own_traces_as_before() -> None:
    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    nodes = list(capture(model, {"input": x}).nodes())
    assert [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    assert not any(node.meta.get("tensor_meta") for node in nodes)
    traced = make_fx(lambda value: value + 1, tracing_mode="fake")(x)
    assert all(node.meta["tensor_meta"] for node in traced.graph.nodes if node.op == "call_function")


def test_inputs_that_nothing_tells_are_asked_for() -> None:
    with pytest.raises(PeftfxError, match="pass `inputs`"):
        example_inputs(ZOO["custom"].make())
    with pytest.raises(PeftfxError, match="did you mean 'sequence'"):
        example_inputs(ZOO["gpt2"].make(), sizes={"sequences": 3})
