"""An exported directory in ONNX Runtime, called as the torch model is. No torch model is built."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from peftfx.bases.transformers_config import read_config
from peftfx.errors import PeftfxError, first_line, nearest, shown
from peftfx.files import is_file, read_json
from peftfx.generation.step import LOGITS_KEPT, as_mask, kept_logits, refuse_arguments
from peftfx.graph.slots import MODEL
from peftfx.serving.call_inputs import ONNX_DTYPES, fitted, is_default, taken, taken_apart, tell_padding
from peftfx.serving.call_rows import KeptRows, RowAdapters
from peftfx.serving.onnx_model import OnnxModel
from peftfx.views.row_adapters import IDS

_Method = TypeVar("_Method", bound=Callable[..., Any])


def under_one_adapter(method: _Method) -> _Method:
    """Wrap a method of a served model that calls its graphs often: an adapter that another thread makes active in the
    meantime does not act in it. The cache would have keys and values of two adapters.
    """

    @functools.wraps(method)
    def whole(self: Served, *args: Any, **options: Any) -> Any:
        given = self.numbered(options)
        with ExitStack() as kept:
            with self.switching:
                for graph in self.graphs.values():
                    kept.enter_context(graph.keeping())
                kept.enter_context(self._numbering(given.get(IDS)))
            return method(self, *args, **given)

    return cast("_Method", whole)


class Served(RowAdapters):
    """A model in ONNX Runtime on the CPU, called as the torch model is.

    Attributes:
        directory: the exported directory.
        model: the ONNX model itself, which takes and returns tensors by their ONNX names.
        config: transformers' config, or None for a model of another kind.
        graphs: all its ONNX models, by the names of their files.
        switching: is held while an adapter is put into the graphs.
    """

    base_model_prefix = ""
    pads_left = False  #: whether the texts of a batch are padded on the left, as for generation

    def __init__(self, directory: Path, model: OnnxModel) -> None:
        self.directory, self.model = directory, model
        self.config = _config(directory)
        self.graphs: Mapping[str, OnnxModel] = {MODEL: model}
        self.adapters: dict[str, Mapping[str, Mapping[str, Any]]] = {}
        self.active: str | None = None
        self.switching = threading.Lock()
        self._rows = KeptRows()

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Read an `.onnx_adapter` at `path`, and make it active. Return its `name`, by default the file's.

        Raises:
            PeftfxError: the model has no slots, or the adapter is for another base or other slots.
        """
        from peftfx.serving.adapter_file import read_for

        path = Path(path)
        name = path.stem if name is None else name
        self.adapters[name] = read_for(path, self.directory, tuple(self.graphs))
        self.set_adapter(name)
        return name

    def set_adapter(self, name: str | None) -> None:
        """Make the loaded adapter `name` active, in all threads; None means the base. Switching costs nothing.

        In a batched export the adapters are in the graph: this one acts in all rows of calls without `adapter_ids`.

        A text that another thread is writing is written to its end with the adapter that it began with.

        Raises:
            PeftfxError: no adapter of this name is loaded, or several names are given.
        """
        if not isinstance(name, str | None):
            hint = "add up several adapters in one file: peftfx export-adapter --adapter A --adapter B"
            raise PeftfxError(f"a graph has one adapter at a time, not {shown(name)}", "name", hint)
        known = [*self.adapters, *self.row_adapters]
        if name is not None and name not in known:
            hint = nearest(name, known) or f"adapters here: {', '.join(known) or 'none'}"
            raise PeftfxError(f"there is no adapter named {name!r}", name, hint)
        with self.switching:
            for graph, model in self.graphs.items():
                model.put(self.adapters[name][graph] if name in self.adapters else {})
            self.active = name

    if TYPE_CHECKING:

        def generate(self, *args: Any, **options: Any) -> Any:
            """Generate by transformers' own code if the model has a cache. Other models refuse (`ServedForward`)."""

    def can_generate(self) -> bool:
        """Say whether the model writes text token by token. A model without a cache does not."""
        return False

    @property
    def main_input_name(self) -> str:
        """The name of the input whose first axis is the number of rows."""
        return self.model.inputs[0]

    @property
    def device(self) -> torch.device:
        """The device of the model's tensors: the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of the model's inputs and outputs: float16 for a model in half precision."""
        return next((ONNX_DTYPES[kind] for kind in self.model.types.values() if kind in ONNX_DTYPES), torch.float32)

    def __repr__(self) -> str:
        names = ", ".join([*self.adapters, *self.row_adapters])
        return f"{type(self).__name__}({str(self.directory)!r}, adapters: {names or 'none'})"

    def forward(self, **inputs: Tensor) -> ModelOutput:
        """Run the model on `inputs` by name, and return the outputs by name. Inputs that are None are dropped.

        Logits of some tokens alone (`logits_to_keep`) are cut out of those of all tokens.

        Raises:
            PeftfxError: an input is unknown or missing, or has a shape or dtype that the model does not take.
        """
        cuts = self._gives_all_logits and LOGITS_KEPT not in self.model.inputs
        kept = inputs.pop(LOGITS_KEPT, None) if cuts else None
        inputs = self.numbered(inputs)
        wrong = next((n for n in self.model.inputs if not isinstance(inputs.get(n), Tensor | None)), None)
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if wrong is not None or not given:
            what = f"{wrong} is not a tensor: {shown(inputs[wrong])}" if wrong else "the call gives no tensors"
            raise PeftfxError(what, str(self.directory), f"pass torch tensors by name: {', '.join(self.model.inputs)}")
        refuse_arguments({n: v for n, v in inputs.items() if not isinstance(v, Tensor)}, "the graph")
        given = {n: v for n, v in given.items() if n in self.model.inputs or not is_default(n, v, self.directory)}
        mask = given.get(_MASK)
        if mask is not None and mask.is_floating_point() and self.model.types.get(_MASK) == "tensor(int64)":
            given[_MASK] = as_mask(mask)
        given = {n: fitted(v, self.model.types.get(n, "")) for n, v in given.items()}
        made = ModelOutput(self.model(**self.with_ids(self._completed(given))))
        if kept is not None:
            made[_LOGITS] = kept_logits(made[_LOGITS], kept)
        return made

    def _completed(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs of a text with the mask and the types of its tokens that the model takes, if they are missing.

        The mask shows all tokens, and the types are 0.
        """
        text = given.get("input_ids")
        if text is None:
            return given
        missing = [name for name in (_MASK, _TYPES) if name in self.model.inputs and name not in given]
        if _MASK in missing:
            tell_padding(text, self.config)
        return given | {name: torch.full_like(text, int(name == _MASK)) for name in missing}

    @property
    def _gives_all_logits(self) -> bool:
        """Whether the graph gives logits of each token of the text."""
        tokens, logits = (self.model.axes.get(name, ()) for name in ("input_ids", _LOGITS))
        return len(logits) == 3 and logits[:2] == tokens and isinstance(tokens[1], str)

    @under_one_adapter
    def __call__(self, main: Any = None, /, **inputs: Any) -> Any:
        """Run `forward` on the `inputs`: tensors, NumPy arrays or lists. The main one, `input_ids` say, needs no name.

        Raises:
            PeftfxError: as for `forward`; or tokens are no rows of whole numbers of 0 or more.
        """
        inputs = inputs if main is None else {self.main_input_name: main, **inputs}
        given = taken_apart(inputs, self.model.inputs)
        return self.forward(**{name: taken(name, value, self.model.axes) for name, value in given.items()})

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the directory. It pads on the left if the model generates.

        Raises:
            PeftfxError: the directory has no tokenizer.
        """
        from transformers import AutoTokenizer

        names = [path.name for path in self.directory.iterdir()]
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names):
            # transformers would make an empty tokenizer from the config
            what, hint = "the directory has no tokenizer", "put the base model's tokenizer files there"
            raise PeftfxError(what, str(self.directory), hint)
        try:
            found = AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            what = f"the tokenizer cannot be loaded: {first_line(error)}"
            raise PeftfxError(what, str(self.directory), "copy the base model's tokenizer files again") from error
        if self.pads_left:
            found.padding_side = "left"
        if found.pad_token is None:
            found.pad_token = found.eos_token
        return found


class ServedForward(Served):
    """A model without a cache. It answers calls, but writes no text."""

    def generate(self, *args: Any, **options: Any) -> object:
        """Refuse to generate: a model without a cache writes no text. All `args` and `options` are ignored.

        Raises:
            PeftfxError: always. Models with a cache have another `generate`.
        """
        hint = "export a model that generates text with --view decode; in Python, view='decode'"
        raise PeftfxError("this model has no cache, so it cannot generate", str(self.directory), hint)


_LOGITS, _MASK, _TYPES = "logits", "attention_mask", "token_type_ids"


def _config(directory: Path) -> PreTrainedConfig | None:
    path = directory / "config.json"
    if not is_file(path) or "model_type" not in read_json(path, "copy the base model's config again"):
        return None
    return read_config(directory)
