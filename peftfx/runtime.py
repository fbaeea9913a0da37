"""Runtime: an exported directory in ONNX Runtime, which answers, generates and classifies. No torch model is built.

model = peftfx.runtime.load("out")
model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.utils.generic import ModelOutput

from peftfx.buffers import BufferedCache, Buffers
from peftfx.caches import Held
from peftfx.decode import PAST, PRESENT, Decode, cache_names
from peftfx.errors import PeftfxError
from peftfx.export.runtime import OnnxModel
from peftfx.stepping import Generates

_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(bfloat16)": torch.bfloat16}


def load(directory: str | Path, *, threads: int = 0) -> Served:
    """Open a directory that `peftfx export` wrote.

    Args:
        directory: has `model.onnx`, and `config.json` beside it.
        threads: how many threads one operator may use; 0 leaves it to ONNX Runtime.

    Returns:
        A `ServedGenerator` if the model has a cache in and out, else a `Served`.

    Raises:
        PeftfxError: there is no such model, or ONNX Runtime cannot open it.
    """
    directory = Path(directory)
    model = OnnxModel(directory, threads=threads)
    kind = ServedGenerator if any(name.startswith(f"{PAST}.") for name in model.inputs) else Served
    return kind(directory, model)


def pipeline(model: str | Path | Served, task: str | None = None) -> Any:
    """A transformers pipeline over an exported directory; see `peftfx.pipelines.pipeline`."""
    from peftfx.pipelines import pipeline as make

    return make(model, task)


class Served:
    """A model in ONNX Runtime on the CPU, called as the torch model is.

    Attributes:
        directory: where it came from.
        model: the ONNX model itself, which takes and returns tensors by their ONNX names.
        config: transformers' config, or None for a model of another kind.
    """

    base_model_prefix = ""

    def __init__(self, directory: Path, model: OnnxModel) -> None:
        self.directory, self.model = directory, model
        self.config = _config(directory)

    @property
    def main_input_name(self) -> str:
        """The input that says how many rows there are."""
        return self.model.inputs[0]

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes: float16 for a model in half precision."""
        return next((_DTYPES[kind] for kind in self.model.types.values() if kind in _DTYPES), torch.float32)

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """Outputs by name, for inputs by name; a mask that is left out shows everything, arguments of None are dropped.

        Raises:
            PeftfxError: an input is unknown or missing, or has a shape or dtype that the model does not take.
        """
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        given = {name: value for name, value in given.items() if name in self.model.inputs or name not in _OPTIONAL}
        first = given.get("input_ids")
        for name in ("attention_mask", "token_type_ids"):
            if name in self.model.inputs and name not in given and first is not None:
                given[name] = torch.ones_like(first) if name == "attention_mask" else torch.zeros_like(first)
        return ModelOutput(self.model(**given))

    def __call__(self, **inputs: Any) -> Any:
        """See `forward`."""
        return self.forward(**inputs)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the directory, which pads on the left where the model generates.

        Raises:
            PeftfxError: there is none.
        """
        from transformers import AutoTokenizer

        names = [path.name for path in self.directory.iterdir()]
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names):
            # transformers would make an empty one from the config
            what, hint = "there is no tokenizer", "put the base model's tokenizer files there"
            raise PeftfxError(what, str(self.directory), hint)
        try:
            found = AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            what = f"the tokenizer cannot be loaded: {str(error).strip().partition(chr(10))[0]}"
            raise PeftfxError(what, str(self.directory), "copy the base model's tokenizer files again") from error
        if isinstance(self, ServedGenerator):
            found.padding_side = "left"
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found


_OPTIONAL = frozenset({"token_type_ids", "attention_mask", "position_ids"})


class ServedGenerator(Generates, Served, GenerationMixin):  # type: ignore[misc]
    """A causal language model in ONNX Runtime: transformers' `generate`, over a cache whose memory is used again."""

    _is_stateful = False

    def __init__(self, directory: Path, model: OnnxModel) -> None:
        Served.__init__(self, directory, model)
        if self.config is None:
            raise PeftfxError("there is no config", str(directory / "config.json"), "put the base model's config there")
        self.view = _view(model)
        self.generation_config = _generation_config(directory, self.config)
        self._logits = model.axes["logits"][-1]

    def can_generate(self) -> bool:
        """It can."""
        return True

    def is_remote_code(self) -> bool:
        """Its code is transformers' and peftfx's."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Fixed when the graph was made."""
        return {}

    def new_cache(self) -> BufferedCache:
        """An empty cache with memory of its own."""
        return BufferedCache()

    def step(self, inputs: dict[str, Tensor], cache: Any) -> Mapping[str, Tensor]:
        """Run the graph: the past is read where it is, and what comes out is written into the cache's other memory."""
        buffers = cache.buffers if isinstance(cache, BufferedCache) else Buffers()
        given = {name: value.contiguous() for name, value in inputs.items()}
        batch, length = given["input_ids"].shape
        outputs = {"logits": torch.empty(batch, length, int(self._logits), dtype=self.dtype)}
        count = len(self.view.layers)
        for past, present in zip(cache_names(PAST, count), cache_names(PRESENT, count), strict=True):
            before = given[past]
            shape = (*before.shape[:2], before.shape[2] + length, before.shape[3])
            outputs[present] = buffers.room(present, shape, before)
        self.model.run_into(given, outputs)
        return outputs


def _view(model: OnnxModel) -> Decode:
    """The decode view that the model was exported in, told by its inputs."""
    count = sum(name.startswith(f"{PAST}.") for name in model.inputs) // 2
    layers = []
    for i in range(count):
        key, value = cache_names(PAST, 1, i)
        (_, heads, _, width), (*_, other) = model.axes[key], model.axes[value]
        layers.append(Held(int(heads), int(width), int(other), _DTYPES[model.types[key]]))
    return Decode(tuple(layers), "position_ids" in model.inputs)


def _config(directory: Path) -> PreTrainedConfig | None:
    path = directory / "config.json"
    if not path.is_file() or "model_type" not in json.loads(path.read_text(encoding="utf-8")):
        return None
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _generation_config(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig.from_model_config(config)
