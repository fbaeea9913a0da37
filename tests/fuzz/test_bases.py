"""Base directories: a spoiled one loads or is refused in one message."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz.settle import cases, settle
from fuzz.twins import SIZES, Base
from fuzz.values import Change, changed, changes, raw_texts, scalars, values, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftfx.bases.load import load_base
from peftfx.bases.tasks import TASKS

FIELDS = (
    *("model_type", "architectures", "dtype", "torch_dtype", "quantization_config", "_class_name", "auto_map"),
    *("rope_parameters", "rope_scaling", "hidden_act", "tie_word_embeddings", "use_cache", "num_labels", "id2label"),
    *(
        "attention_bias",
        "rms_norm_eps",
        "head_dim",
        "layer_types",
        "sliding_window",
        "problem_type",
        "transformers_version",
    ),
    *("is_encoder_decoder", "attn_implementation", "text_config", "pad_token_id", "initializer_range", *SIZES),
)
#: Of names, what other models have; of sizes, nothing that would have a layer take a machine's memory.
meant = st.one_of(
    values,
    values,
    st.sampled_from(["bert", "gpt2", "llama", "brt", "bfloat16", "float8_e4m3fn", "fp64", "silu", "UNet2DModel"]),
    st.lists(
        st.sampled_from(
            ["BertModel", "LlamaForCausalLM", "GPT2LMHeadModel", "PreTrainedModel", "Trainer", "", 5, None]
        ),
        max_size=2,
    ),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "quant_method", "0"]), scalars, max_size=2),
)
INDEXES = st.one_of(
    raw_texts,
    values.map(lambda value: json.dumps({"weight_map": value})),
    st.dictionaries(st.text(max_size=3), values, max_size=2).map(lambda v: json.dumps({"weight_map": v})),
    st.sampled_from(["model.safetensors", "../x", "x" * 400, "\u0000"]).map(
        lambda name: json.dumps({"weight_map": {"lm_head.weight": name}})
    ),
)


@dataclass(frozen=True)
class Model:
    """The base's directory and what is done to it."""

    config: tuple[Change, ...] = ()
    text: str | None = None
    index: str | None = None
    weights: str = "whole"
    task: str | None = None
    reads: bool = True

    def write(self, twin: Path, directory: Path) -> None:
        """Into a directory, in place of what was there."""
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(twin, directory)
        path, weights = directory / "config.json", directory / "model.safetensors"
        if self.text is None:
            write_json(path, changed(json.loads(path.read_text(encoding="utf-8")), self.config))
        else:
            path.write_text(self.text, encoding="utf-8", errors="replace")
        if self.index is not None:
            (directory / "model.safetensors.index.json").write_text(self.index, encoding="utf-8")
            weights.rename(directory / "other.safetensors")
        elif self.weights != "whole":
            self._spoil(weights)

    def _spoil(self, path: Path) -> None:
        tensors, whole = load_file(path), path.read_bytes()
        name = sorted(tensors)[0]
        match self.weights:
            case "half":
                path.write_bytes(whole[: len(whole) // 2])
            case "empty":
                path.write_bytes(b"")
            case "folder":
                path.unlink()
                path.mkdir()
            case "lacks":
                save_file({n: t for n, t in tensors.items() if n != name}, path)
            case "flat":
                save_file({**tensors, name: tensors[name].flatten()}, path)
            case "integers":
                save_file({n: t.int() for n, t in tensors.items()}, path)
            case "no tensors":
                save_file({}, path)


WEIGHTS = ("half", "empty", "folder", "lacks", "flat", "integers", "no tensors")
tasks = st.sampled_from([None, None, *TASKS, "", "text"])
models = st.one_of(
    st.builds(Model, changes(FIELDS, meant).map(tuple), reads=st.booleans()),
    st.builds(Model, changes(FIELDS, meant).map(tuple), task=tasks, reads=st.booleans()),
    st.builds(Model, text=raw_texts),
    st.builds(Model, index=INDEXES),
    st.builds(Model, weights=st.sampled_from(WEIGHTS), task=tasks),
)


@cases(quick=30, many=1500)
def test_a_spoiled_base_loads_or_is_refused(cases: settings, base: Base, tmp_path: Path) -> None:
    @cases
    @given(models)
    def check(model: Model) -> None:
        load(model, base, tmp_path / "base")

    check()


@pytest.mark.parametrize("name", ["x" * 300, "nowhere", "base/config.json", "\u0000"])
def test_a_path_that_is_no_base(name: str, base: Base) -> None:
    assert settle(lambda: load_base(base.root / name)).message


def load(model: Model, base: Base, directory: Path) -> None:
    """One case."""
    model.write(base.root / "base", directory)
    settle(lambda: load_base(directory, task=model.task, weights=model.reads))
