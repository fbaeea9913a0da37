"""The modules road: methods inside the base's own modules, checkpointed, compiled, copied, and gone without a trace."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.adapted import adapt, both, gradients, our_name, step
from support.zoo import ZOO
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from transformers.utils import is_kernels_available

import peftfx
from peftfx.bases.guests import GUESTS
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.graph.capturing.trace_lock import TraceLock
from peftfx.hosting.checkpointing import is_checkpointed
from peftfx.model.adapted import AdaptedModel

EVERYWHERE = peftfx.LoRA(target="all-linear", lora_dropout=0.2, modules_to_save=["lm_head"])
REENTRANT = [None, {"use_reentrant": False}, {"use_reentrant": True}]


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return adapt("llama", EVERYWHERE).train()


def example(model: AdaptedModel) -> dict[str, Tensor]:
    return ZOO["llama"].inputs(model=model.base, labels=True)


SOFT = [peftfx.PromptTuning(num_virtual_tokens=3), peftfx.PTuning(num_virtual_tokens=3, encoder_hidden_size=8)]
METHODS = [EVERYWHERE, *SOFT, peftfx.PrefixTuning(num_virtual_tokens=3), peftfx.LlamaAdapter(), peftfx.LNTuning()]


@pytest.mark.parametrize("rule", METHODS, ids=lambda rule: type(rule).__name__)
def test_a_step_is_that_of_the_graph(rule: object) -> None:
    model = adapt("llama", rule).train()
    assert (model.road, model.obstacle) == ("modules", "")
    got = step(model, example(model))
    model.wanted = "graph"
    assert model.road == "graph"
    want = step(model, example(model))
    assert got.keys() == want.keys()
    for name, value in want.items():  # products through few ranks are rounded otherwise in modules
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6 + 5e-6 * float(value.abs().max()))


def test_the_trained_parameters_are_children_of_the_bases_modules(adapted: AdaptedModel) -> None:
    layer = adapted.base.model.layers[0].self_attn.q_proj
    own = {id(p) for p in layer._modules[GUESTS].parameters()}
    assert own == {id(p) for n, p in adapted.named_parameters() if "layers.0.self_attn.q_proj" in n and "lora" in n}
    assert isinstance(layer, nn.Linear)
    assert not any("lora" in name for name in adapted.base.state_dict())
    assert all(name.startswith("adapters.") for name in adapted.state_dict())


def test_the_base_is_saved_and_loaded_as_if_it_had_no_guests(adapted: AdaptedModel) -> None:
    plain = ZOO["llama"].build()
    assert adapted.base.state_dict().keys() == plain.state_dict().keys()
    adapted.base.load_state_dict(adapted.base.state_dict(), strict=True)
    lacking = {name: t for name, t in plain.state_dict().items() if "q_proj" not in name}
    with pytest.raises(RuntimeError, match="q_proj") as refused:
        adapted.base.load_state_dict(lacking, strict=True)
    assert GUESTS not in str(refused.value)


def test_what_reads_no_output_has_none_computed() -> None:
    class Products(TorchFunctionMode):
        count = 0

        def __torch_function__(
            self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: object = None
        ) -> object:
            self.count += func is nn.functional.linear
            return func(*args, **(kwargs or {}))  # type: ignore[dict-item]

    model, counts = adapt("llama", peftfx.IA3(init_ia3_weights=False)), []
    for name in ("with", "without"):
        with Products() as products, torch.no_grad():
            (model if name == "with" else model.base)(**example(model))
        counts.append(products.count)
    assert model.road == "modules"
    assert counts[0] == counts[1]


class TestCheckpointing:
    @pytest.mark.parametrize("options", REENTRANT, ids=str)
    def test_a_step_is_the_same(self, adapted: AdaptedModel, options: dict[str, bool] | None) -> None:
        want = step(adapted, example(adapted))
        adapted.gradient_checkpointing_enable(options)
        got = step(adapted, example(adapted))
        adapted.gradient_checkpointing_disable()
        torch.testing.assert_close(got, want, rtol=0, atol=0)

    def test_layers_are_computed_again_with_the_calls_own_inputs(self) -> None:
        model = adapt("llama", peftfx.LoRA(r=2, alora_invocation_tokens=[5, 7])).train()
        given = example(model)
        given["input_ids"][:, 2:4] = torch.tensor([5, 7])
        want = step(model, given)
        assert any(grad.any() for grad in want.values())
        model.gradient_checkpointing_enable()
        torch.testing.assert_close(step(model, given), want, rtol=0, atol=0)

    def test_layers_are_computed_again_by_the_adapters_that_acted(self, adapted: AdaptedModel) -> None:
        want = step(adapted, example(adapted))
        adapted.gradient_checkpointing_enable()
        adapted.zero_grad()
        torch.manual_seed(3)
        loss = adapted(**example(adapted)).loss
        with adapted.disable_adapter():
            adapted(**example(adapted)).loss  # noqa: B018
            loss.backward()
        adapted.gradient_checkpointing_disable()
        for name, grad in gradients(adapted).items():
            torch.testing.assert_close(grad, want[name], rtol=0, atol=0)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_checkpoint_in_the_models_own_code_computes_the_same(self, reentrant: bool) -> None:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.block, self.checkpoints = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), False

            def forward(self, x: Tensor) -> Tensor:
                x = torch.tanh(self.first(x))
                return checkpoint(self.block, x, use_reentrant=reentrant) if self.checkpoints else self.block(x)

        x = torch.randn(3, 5, 4)
        rule = peftfx.LoRA(r=2, target="all-linear | head", lora_dropout=0.3, init_lora_weights=False)
        model = peftfx.transform(Own(), rule, inputs={"x": torch.randn(2, 7, 4)}).train()
        found = []
        for model.base.checkpoints in (False, True):
            model.zero_grad()
            torch.manual_seed(2)
            model(x=x).sin().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert len(found[0]) == 4
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)

    def test_a_checkpoint_that_nobody_told_us_of_is_refused_behind_calls_with_other_adapters(self) -> None:
        model = adapt("custom", peftfx.LoRA())
        real = model.base.forward
        model.base.forward = lambda *ids, **given: checkpoint(real, *ids, use_reentrant=False, **given)
        with model.disable_adapter():
            model(**ZOO["custom"].inputs())
        with pytest.raises(PeftfxError, match="computed again in the backward"):
            model(**ZOO["custom"].inputs()).sum().backward()

    def test_a_prefix_is_refused_with_it_as_in_peft(self) -> None:
        model = adapt("llama", peftfx.PrefixTuning(num_virtual_tokens=3))
        want = model(**example(model)).logits
        model.gradient_checkpointing_enable()
        assert torch.equal(model(**example(model)).logits, want)  # evaluated, layers keep the cache
        with pytest.raises(PeftfxError, match="prefix does not work with gradient checkpointing"):
            model.train()(**example(model))

    @pytest.mark.filterwarnings("error::FutureWarning")
    @pytest.mark.parametrize("road", ["modules", "graph"])
    def test_the_model_says_whether_it_does(self, road: str) -> None:
        """On the graph road transformers' own property said no: there the graph is cut, and no module is asked."""
        model = adapt("llama", peftfx.LoRA(), road=road)
        for on in (False, True, False):
            if on:
                model.gradient_checkpointing_enable()
            else:
                model.gradient_checkpointing_disable()
            assert (model.is_activation_checkpointing, model.is_gradient_checkpointing) == (on, on)

    def test_a_graph_in_which_no_layer_ends_is_refused(self) -> None:
        with pytest.raises(PeftfxError, match="no place was found in it where a layer of the model ends"):
            adapt("custom", peftfx.LoRA(), road="graph").gradient_checkpointing_enable()

    def test_what_is_asked_of_a_graph_holds_where_a_call_takes_the_modules(self) -> None:
        model = adapt("llama", peftfx.LoRA(), road="graph").train()
        model.gradient_checkpointing_enable()
        model.wanted = None
        model.remove("default")
        model.add_adapter("second", peftfx.LoRA())
        assert (model.road, is_checkpointed(model.base)) == ("modules", False)
        model(**example(model)).loss.backward()
        assert is_checkpointed(model.base)
        model.gradient_checkpointing_disable()
        model(**example(model))
        assert not is_checkpointed(model.base)

    def test_trainer_trains_with_it(self, tmp_path: Path) -> None:
        rows = [{name: t[0] for name, t in ZOO["llama"].inputs(1, 6, labels=True).items()}] * 4
        seen = []
        for kept in (False, True):
            model = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(), seed=1)
            options = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
            arguments = hf.TrainingArguments(str(tmp_path), activation_checkpointing=kept, **options)
            seen.append(hf.Trainer(model, arguments, train_dataset=rows).train().training_loss)
        assert seen[0] == seen[1]


def test_compiled_it_is_one_graph_without_breaks(adapted: AdaptedModel) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(adapted, backend=counter, fullgraph=True)
    torch.manual_seed(0)
    want = adapted(**example(adapted)).loss
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(**example(adapted)).loss, want)
    assert counter.frame_count == 1


no_functions = pytest.mark.skipif(is_kernels_available(), reason="the functions that `kernels` wraps are not pickled")
PICKLE = pytest.param(lambda m: pickle.loads(pickle.dumps(m)), id="pickle", marks=no_functions)


@pytest.mark.parametrize("how", [copy.deepcopy, PICKLE])
def test_a_copy_acts_by_itself_and_a_copy_of_the_base_is_plain(how: Callable[[nn.Module], nn.Module]) -> None:
    model = adapt("llama", [EVERYWHERE, SOFT[0]])
    other, plain = how(model), how(model.base)
    assert other.road == "modules"
    torch.testing.assert_close(step(other, example(model)), step(model, example(model)), rtol=0, atol=0)
    assert not any(GUESTS in name for name, _ in plain.named_modules())
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert type(plain.model.embed_tokens) is nn.Embedding


def test_the_last_adapter_leaves_each_module_as_it_was() -> None:
    base = ZOO["llama"].build()
    before = {path: (type(m), dict(vars(m)), set(m._modules)) for path, m in base.named_modules()}
    model = peftfx.transform(base, EVERYWHERE)
    model.add_adapter("second", peftfx.LNTuning())
    model.add_adapter("third", SOFT[0])
    model.train()
    step(model, example(model))
    model.set_adapter("third")
    step(model, example(model))
    model.eval().remove()
    after = {path: (type(m), dict(vars(m)), set(m._modules)) for path, m in base.named_modules()}
    assert after.keys() == before.keys()
    for path, (kind, attributes, children) in after.items():
        assert (kind, children) == (before[path][0], before[path][2])
        assert attributes.keys() == before[path][1].keys()


@pytest.mark.parametrize("rule", [peftfx.LoRA(init_lora_weights=False), SOFT[0]], ids=lambda rule: type(rule).__name__)
def test_two_models_over_one_base_in_two_threads(rule: Method) -> None:
    base = ZOO["llama"].build()
    models = [peftfx.transform(base, rule, seed=seed) for seed in (0, 1)]
    inputs = ZOO["llama"].inputs(model=base)
    with torch.no_grad():
        want = [model(**inputs).logits for model in models]
        plain = base(**inputs).logits
    assert not torch.allclose(want[0], want[1])
    assert not torch.allclose(want[0][:, -1], plain[:, -1])
    both_in = threading.Barrier(2, timeout=20)

    def meet(*_: object) -> None:
        both_in.wait()

    base.model.embed_tokens.register_forward_pre_hook(meet)

    def run(which: int) -> list[Tensor]:
        with torch.no_grad():
            return [models[which](**inputs).logits for _ in range(5)]

    with ThreadPoolExecutor(2) as threads:
        for found, wanted in zip(threads.map(run, (0, 1)), want, strict=True):
            assert all(each.equal(wanted) for each in found)


def test_a_soft_prompt_leaves_a_base_whose_embedding_another_thread_has_begun_to_call() -> None:
    """torch reads all hooks of a module before it calls the first."""
    base, racing = ZOO["llama"].build(), threading.Event()
    entered, begun, left = threading.Event(), threading.Event(), threading.Event()

    def meet(module: nn.Module, _: object) -> None:
        if module is base.model.embed_tokens and racing.is_set():
            main = threading.current_thread() is threading.main_thread()
            (begun if main else entered).set()
            assert (left if main else begun).wait(20)

    hook = register_module_forward_pre_hook(meet)  # torch calls it before the hooks of the module itself
    try:
        models = [peftfx.transform(base, SOFT[0], seed=seed) for seed in (0, 1)]
        inputs = ZOO["llama"].inputs(model=base)
        want = [model(**inputs).logits for model in models]
        racing.set()
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(lambda: models[1](**inputs).logits)
            other.add_done_callback(lambda _: left.set())
            assert entered.wait(20)
            found = models[0](**inputs).logits
        assert found.equal(want[0])
        assert other.result().equal(want[1])
    finally:
        hook.remove()


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_capture_waits_for_the_calls_of_other_threads(call: str) -> None:
    base = ZOO["llama"].build()
    models = [peftfx.transform(base, peftfx.LoRA(init_lora_weights=False), seed=seed) for seed in (0, 1)]
    inputs = ZOO["llama"].inputs(model=base)
    captured: list[bool] = []

    def run() -> Tensor:
        with torch.no_grad():
            if call == "forward":
                return models[0](**inputs).logits
            return models[0].generate(inputs["input_ids"], max_new_tokens=4, output_logits=True, do_sample=False)

    want = run()
    other = threading.Thread(target=lambda: captured.append(bool(models[1].graph(view="decode").nodes)))

    def start(*_: object) -> None:
        if threading.current_thread() is threading.main_thread() and not other.ident:
            other.start()
            other.join(1.0)

    base.model.layers[0].register_forward_pre_hook(start)
    assert run().equal(want)
    other.join()
    assert captured == [True]


def test_a_thread_that_runs_a_model_may_trace_another_inside_while_a_third_runs() -> None:
    lock, running, done = TraceLock(), threading.Barrier(2, timeout=20), threading.Event()

    def third() -> None:
        with lock.running():
            running.wait()
            done.wait(20)

    other = threading.Thread(target=third)
    other.start()
    with lock.running():
        running.wait()
        with lock, lock, lock.running():
            done.set()
    other.join(20)
    assert not other.is_alive()
    with lock:
        pass


def test_dropout_draws_what_it_draws_in_peft(tmp_path: Path) -> None:
    ours, theirs = both("bert", tmp_path, lora_dropout=0.3)
    inputs = ZOO["bert"].inputs(model=ours.base, labels=True)
    got, want = step(ours.train(), inputs), step(theirs.train(), inputs)
    assert ours.road == "modules"
    named = {name if name == "loss" else f"adapters.default.{our_name(name)}": t for name, t in want.items()}
    torch.testing.assert_close(got, named, rtol=0, atol=1e-5)


def test_what_no_module_can_host_runs_as_a_graph_and_says_why() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.linear(x, self.one.weight, self.one.bias))

    inputs = {"x": torch.randn(2, 4)}
    model = peftfx.transform(Tied(), peftfx.LoRA(target_modules=["one"]), inputs=inputs)
    assert model.road == "graph"
    assert "one" in model.obstacle
    with pytest.raises(PeftfxError, match="no module of the base can run"):
        peftfx.transform(Tied(), peftfx.LoRA(target_modules=["one"]), inputs=inputs, road="modules")
    with pytest.raises(PeftfxError, match="unknown road"):
        peftfx.transform(Tied(), peftfx.LoRA(), inputs=inputs, road="rail")
