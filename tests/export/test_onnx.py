"""What ONNX Runtime serves is what the graph computes: names, sizes, weights, files, and the checks themselves."""

from __future__ import annotations

import functools
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from support.few import but_for
from support.zoo import ZOO, Captured, Entry
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftfx import LoRA, transform
from peftfx.errors import PeftfxError
from peftfx.export.metadata import ENGINE
from peftfx.export.translation.program import onnx_outputs
from peftfx.export.translation.to_onnx import to_onnx
from peftfx.export.verification.comparison import VerificationError, reference_of
from peftfx.export.verification.verify import verify
from peftfx.export.writing.atomic_directory import publish
from peftfx.export.writing.weights import save
from peftfx.graph.graph import Graph
from peftfx.options import FAST, TORCH
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.capture import capture

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Exported:
    entry: Entry
    base: nn.Module
    graph: Graph
    model: ir.Model
    directory: Path


Export = Callable[[str], Exported]


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, 99, (batch, length))


@pytest.fixture(scope="session")
def export(captured: Callable[[str], Captured], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export(name)`: a model of the zoo, its graph, and the directory that it was exported to."""

    @functools.cache
    def run(name: str) -> Exported:
        c = captured(name)
        model = to_onnx(c.graph)
        directory = tmp_path_factory.mktemp(name)
        save(model, directory)
        return Exported(c.entry, c.model, c.graph, model, directory)

    return run


#: A decoder, an encoder-decoder, an encoder, pictures and a module by hand; the others in `test_peft_lora.py`.
QUICK = frozenset({"gpt2", "t5", "bert", "vit", "custom"})


@pytest.fixture(scope="session", params=but_for({*ZOO} - QUICK, ZOO))
def exported(request: pytest.FixtureRequest, export: Export) -> Exported:
    """Each model of the zoo in turn: a parameter of the session, so that one worker runs all of a model's tests."""
    return export(request.param)


def test_onnx_runtime_computes_what_the_graph_computes_at_sizes_it_never_saw(exported: Exported) -> None:
    e = exported
    feeds = [e.entry.inputs(*sizes, seed=1, model=e.base) for sizes in ((1, 5), (3, 9))]
    comparisons = verify(e.directory, reference_of(e.graph), feeds, atol=1e-6, rtol=1e-4, graph=e.graph)
    assert all(c.ok for c in comparisons)
    assert len(comparisons) == 2 * len(e.graph.outputs)


@pytest.mark.parametrize("exported", but_for({*ZOO} - {"gpt2", "custom"}, ZOO), indirect=True)
def test_the_fast_road_and_torchs_own_road_compute_the_same(exported: Exported, tmp_path: Path) -> None:
    e = exported
    assert e.model.metadata_props[ENGINE] == FAST
    save(to_onnx(e.graph, engine=TORCH), tmp_path)
    feed = e.entry.inputs(3, 9, seed=1, model=e.base)
    fast, torchs = OnnxModel(e.directory)(**feed), OnnxModel(tmp_path)(**feed)
    assert fast.keys() == torchs.keys()
    for name, value in torchs.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("write", "want"),
    [
        (lambda x: (x * 1).view(-1).add_(1), FAST),
        (lambda x: torch.stack([y := x * 1, y.view(-1).add_(1).view_as(y)]), TORCH),
    ],
    ids=["seen under one name", "seen under two"],
)
def test_a_write_that_others_see_goes_torchs_road_and_the_model_says_so(
    write: Callable[[torch.Tensor], torch.Tensor], want: str, tmp_path: Path
) -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return write(x)

    graph = capture(Writes().eval(), {"x": torch.randn(2, 3)})
    model = to_onnx(graph)
    assert model.metadata_props[ENGINE].startswith(want)
    save(model, tmp_path)
    x = torch.randn(5, 4)
    assert torch.equal(OnnxModel(tmp_path)(x=x)["output"], write(x))


def test_pieces_whose_size_is_computed_are_served(tmp_path: Path) -> None:
    """onnxscript cannot fold such a split."""

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([half.sum(1) for half in x.chunk(2, 1)])

    save(to_onnx(capture(Halves().eval(), {"x": torch.randn(2, 6, 4)})), tmp_path)
    x = torch.randn(3, 8, 4)
    torch.testing.assert_close(OnnxModel(tmp_path)(x=x)["output"], Halves()(x))


def test_an_unknown_engine_is_refused(export: Export) -> None:
    with pytest.raises(PeftfxError, match="engine"):
        to_onnx(export("gpt2").graph, engine="slow")


def test_inputs_outputs_sizes_and_weights_have_the_users_names(exported: Exported) -> None:
    e = exported
    saved = ir.load(e.directory / "model.onnx").graph
    assert [value.name for value in saved.inputs] == [spec.name for spec in e.graph.inputs]
    assert [value.name for value in saved.outputs] == list(onnx_outputs(e.graph))
    axes = {axis for spec in e.graph.inputs for axis in spec.shape if isinstance(axis, str)}
    for value, spec in zip(saved.inputs, e.graph.inputs, strict=True):
        assert tuple(getattr(d, "value", d) for d in value.shape) == spec.shape
    symbols = {str(d.value) for v in saved.outputs for d in v.shape if not isinstance(d, int)}
    assert all(any(axis in symbol for axis in axes) for symbol in symbols), symbols
    owned = {n for n, _ in e.base.named_parameters(remove_duplicate=False)} | {n for n, _ in e.base.named_buffers()}
    parameters = {n for n, v in saved.initializers.items() if v.const_value.size > 256}
    assert {n for n in parameters if not n.startswith("_")} <= owned | {n for n in parameters if "lifted" in n}


def test_the_files_hold_each_parameter_once(exported: Exported) -> None:
    e = exported
    saved = ir.load(e.directory / "model.onnx").graph
    weights = sum(v.const_value.nbytes for v in saved.initializers.values())
    owned = sum(t.nbytes for t in (*e.base.parameters(), *e.base.buffers()))
    assert weights <= owned * 1.05 + 8192
    assert (e.directory / "model.onnx.data").stat().st_size <= weights
    assert not any(n.op_type == "Transpose" and n.inputs[0].is_initializer() for n in saved)


def test_a_head_tied_to_the_embedding_is_stored_once_and_read_by_a_gemm(export: Export) -> None:
    graph = export("gpt2").model.graph
    (weight,) = (v for v in graph.initializers.values() if v.name in ("transformer.wte.weight", "lm_head.weight"))
    assert sorted(node.op_type for node in weight.consumers()) == ["Gather", "Gemm"]
    assert list(weight.const_value.shape) == [99, 32]


def test_a_weight_captured_without_memory_is_read_when_the_file_is_written(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    real = entry.build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = entry.make().eval()
    for name, buffer in real.named_buffers():  # no checkpoint has these: they are always real
        owner, _, leaf = name.rpartition(".")
        setattr(fake.get_submodule(owner), leaf, buffer)
    graph = capture(fake, {**entry.inputs(2, 7, model=real), "use_cache": False})
    read: list[str] = []

    def weights(target: str) -> torch.Tensor:
        read.append(target)
        return (real.state_dict() | dict(real.named_buffers()))[target.removeprefix("base.")]

    model = to_onnx(graph, weights=weights)
    assert read == []
    save(model, tmp_path)
    assert len(read) == len(set(read)) > 20
    feed = entry.inputs(3, 9, model=real)
    got = OnnxModel(tmp_path)(**feed)["logits"]
    assert torch.allclose(got, real(**feed, use_cache=False).logits, atol=1e-5)
    with pytest.raises(PeftfxError, match="without a value"):
        save(to_onnx(graph), tmp_path / "no values")


class Outputs(nn.Module):
    """Every kind of output that an exporter can trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(300))

    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x * 2
        same = {"y": y, "again": y, "x": x, "scale": self.scale, "constant": torch.arange(3), "loss": y.mean()}
        return {**same, "half": y[:, ::2], "joined": torch.cat([y, y], 1), "x.scale": x + self.scale[:1]}


def test_outputs_may_be_inputs_weights_constants_scalars_and_one_another(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(2, 6), "unused": torch.randn(2, 6)}
    axes = {"x": ("batch", "width"), "unused": ("batch", "width")}
    graph = capture(Outputs().eval(), inputs, axes=axes)
    model = to_onnx(graph)
    save(model, tmp_path)
    verify(tmp_path, reference_of(graph), [inputs, {"x": torch.randn(1, 9), "unused": torch.randn(1, 9)}])
    runtime = OnnxModel(tmp_path)
    assert runtime.inputs == ("x", "unused")
    assert runtime.outputs == onnx_outputs(graph)
    shapes = {o.name: tuple(getattr(d, "value", d) for d in o.shape) for o in model.graph.outputs}
    assert shapes["y"] == ("batch", "width")
    assert shapes["joined"] == ("batch", "2*width")
    assert shapes["loss"] == ()


def test_an_output_that_has_other_axes_than_it_declares_is_refused(export: Export, tmp_path: Path) -> None:
    e = export("gpt2")
    out = Path(shutil.copytree(e.directory, tmp_path / "out"))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    logits = model.graph.output[0].type.tensor_type.shape.dim
    logits[0].dim_param, logits[1].dim_param = logits[1].dim_param, logits[0].dim_param
    onnx.save(model, out / "model.onnx")
    call = e.entry.inputs(2, 5, model=e.base)
    told = r"declares logits \['sequence', 'batch', \d+\].*gives is \[2, 5, \d+\]"
    with pytest.raises(VerificationError, match=told):
        verify(out, reference_of(e.graph), [call])


def test_a_disagreement_names_the_output_the_error_and_the_tolerance(export: Export) -> None:
    e = export("gpt2")
    wrong = lambda feed: {n: v + 0.25 for n, v in reference_of(e.graph)(feed).items()}  # noqa: E731
    with pytest.raises(VerificationError, match=r"(?s)logits: 0.25 absolute.*input_ids \[1, 5\]") as raised:
        verify(e.directory, wrong, [e.entry.inputs(1, 5)])
    assert "tolerance is 0.0001" in raised.value.hint


def test_padding_is_not_compared_and_a_nan_is_an_error(export: Export) -> None:
    e = export("gpt2")
    feed = {"input_ids": ids(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}

    def reference(spoil: tuple[int, int]) -> list[object]:
        def run(feed: Tensors) -> Tensors:
            logits = reference_of(e.graph)(feed)["logits"].clone()
            logits[spoil] = float("nan")
            return {"logits": logits}

        return verify(e.directory, run, [feed])

    assert reference((1, 5))
    with pytest.raises(VerificationError):
        reference((1, 3))


def test_a_training_graph_and_a_missing_model_are_refused(tmp_path: Path) -> None:
    entry = ZOO["gpt2"]
    with pytest.raises(PeftfxError, match="training mode"):
        to_onnx(capture(entry.build().train(), {**entry.inputs(), "use_cache": False}))
    with pytest.raises(PeftfxError, match="no such directory"):
        OnnxModel(tmp_path / "nowhere")
    with pytest.raises(PeftfxError, match="no ONNX model here"):
        OnnxModel(tmp_path)


def test_the_runtime_names_the_input_you_may_have_meant(export: Export) -> None:
    model = OnnxModel(export("gpt2").directory)
    with pytest.raises(PeftfxError, match="did you mean 'input_ids'"):
        model(input_id=ids(1, 3))
    with pytest.raises(PeftfxError, match="also needs 'attention_mask'"):
        model(input_ids=ids(1, 3))
    with pytest.raises(PeftfxError, match="refuses these inputs"):
        model(input_ids=ids(1, 3).float(), attention_mask=ids(1, 3))


def test_publish_replaces_only_with_force_and_only_after_success(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with publish(target) as directory:
        (directory / "a").write_text("first")
        (directory / "peftfx_report.json").write_text('{"files": ["a", "peftfx_report.json"]}')
    with pytest.raises(PeftfxError, match="--force"), publish(target):
        pass
    with pytest.raises(KeyboardInterrupt), publish(target, force=True) as directory:  # noqa: PT012
        (directory / "a").write_text("half")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "first"
    with publish(target, force=True) as directory:
        (directory / "b").write_text("second")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in target.iterdir()] == ["b"]
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "new" / "deeper" / "out"):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the folders above it are gone too"


@pytest.mark.slow
def test_publish_cleans_up_after_a_run_that_was_killed(tmp_path: Path) -> None:
    code = "import os, sys, pathlib; from peftfx.export.writing.atomic_directory import publish\n"
    code += "with publish(pathlib.Path(sys.argv[1])) as d: (d / 'x').write_text('half'); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with publish(tmp_path / "out") as directory:
        (directory / "x").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_the_users_to_mend_and_leaves_nothing(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = export("gpt2").model

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftfx.export.writing.stream.os.write", full)
    with pytest.raises(PeftfxError, match="No space left") as raised, publish(tmp_path / "out") as directory:
        save(model, directory)
    assert "free some space" in raised.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("raised", [ValueError("no such layer"), OSError("no processor here")])
def test_what_a_models_code_raises_is_no_error_of_the_disk(raised: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(raised), match=str(raised)), publish(tmp_path / "out"):
        raise raised
    assert not list(tmp_path.iterdir())
    with pytest.raises(PeftfxError, match="cannot write"), publish(tmp_path / "o\0ut"):
        pass


class Shifted(nn.Module):
    """A layer of all tokens but the last: of no token, if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.layer(x[:, :-1]), (0, 0, 1, 0))


def test_a_product_of_no_tokens_keeps_its_shape(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4)
    rule = LoRA(target_modules=["layer"], use_dora=True, init_lora_weights=False)
    adapted = transform(Shifted().eval(), rule, inputs={"x": x}).eval()
    adapted.export(tmp_path / "out", merge=False)
    served = OnnxModel(tmp_path / "out")
    torch.testing.assert_close(served(x=x[:, :1])["output"], torch.zeros(2, 1, 4))
