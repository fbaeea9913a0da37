"""OnnxModel: a saved model in ONNX Runtime that takes and returns torch tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch

from peftfx.errors import PeftfxError, first_line, nearest
from peftfx.files import is_file, is_folder
from peftfx.serving.providers import Provider, chosen_providers, refuse_fallback

_VIEWS = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}  # dtypes that numpy does not have, and their stand-ins
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


class OnnxModel:
    """A directory that holds `model.onnx`, opened in ONNX Runtime; tensors are on the CPU.

    Args:
        directory: where `save` wrote the model; a path to an `.onnx` file works too.
        threads: how many threads one operator may use; 0 leaves it to ONNX Runtime.
        options: the session's own, taken as they are. By default threads that have nothing to do sleep: between two
            operators of one call ONNX Runtime would have them spin, which takes the cores from whatever else runs.
        mapped: leave the weights in their file, memory-mapped, and the graph as it is. By default ONNX Runtime copies
            matrices into the layout of its kernels, which runs faster and takes as much memory again.
        providers: where ONNX Runtime computes; see `peftfx.serving.providers`. By default, and last, the CPU.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        threads: int = 0,
        options: ort.SessionOptions | None = None,
        mapped: bool = False,
        providers: Sequence[Provider] = (),
    ) -> None:
        self.path = find(Path(directory))
        chosen = chosen_providers(providers)
        options = _options(threads, mapped) if options is None else options
        self._put: Mapping[str, ort.OrtValue] = {}
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=chosen)
        except Exception as error:
            hint = (
                "a type without a CPU kernel (bfloat16?) needs a model in float32" if "NOT_IMPL" in str(error) else ""
            )
            raise PeftfxError(
                f"ONNX Runtime cannot open the model: {first_line(error)}", str(self.path), hint
            ) from error
        refuse_fallback(chosen, self._session, str(self.path))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that have to be given, in the model's order."""
        return tuple(i.name for i in self._session.get_inputs())

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the model says of itself."""
        return self._session.get_modelmeta().custom_metadata_map

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the inputs that may be left out: the model has a value for each."""
        return tuple(i.name for i in self._session.get_overridable_initializers())

    def put(self, values: Mapping[str, ort.OrtValue]) -> None:
        """Put these into the model's slots, from here on; what is in none of them is what the model has itself."""
        self._put = dict(values)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in the model's order."""
        return tuple(o.name for o in self._session.get_outputs())

    @property
    def axes(self) -> dict[str, tuple[int | str, ...]]:
        """The shape of each input and output, with a string for each axis whose size is free."""
        return {v.name: tuple(v.shape) for v in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def types(self) -> dict[str, str]:
        """The type of each input and output, as ONNX Runtime writes it: `tensor(float)`."""
        return {v.name: v.type for v in (*self._session.get_inputs(), *self._session.get_outputs())}

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run on inputs by name; returns every output by name.

        Raises:
            PeftfxError: an input is missing or unknown, or ONNX Runtime refuses its shape or dtype.
        """
        self._check(tensors)
        feed = {**self._put, **{name: to_ort(value) for name, value in tensors.items()}}
        try:
            values = self._session.run_with_ort_values(list(self.outputs), feed)
        except Exception as error:
            shapes = ", ".join(f"{n}: {str(t.dtype)[6:]}{list(t.shape)}" for n, t in tensors.items())
            raise PeftfxError(
                f"ONNX Runtime refuses these inputs: {first_line(error)}", str(self.path), shapes
            ) from error
        return {name: to_torch(value) for name, value in zip(self.outputs, values, strict=True)}

    def run_into(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run on tensors where they are and write into others: nothing is copied.

        Args:
            inputs: contiguous, on the CPU, of the model's dtypes; every one by name.
            outputs: likewise; of the shapes that the model gives for these inputs, sharing no memory with them.

        Raises:
            PeftfxError: ONNX Runtime refuses a shape or dtype.
        """
        binding = self._session.io_binding()
        for name, value in {**self._put, **{n: _lent(t) for n, t in inputs.items()}}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, _lent(value))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            shapes = ", ".join(f"{n}: {str(t.dtype)[6:]}{list(t.shape)}" for n, t in inputs.items())
            raise PeftfxError(
                f"ONNX Runtime refuses these inputs: {first_line(error)}", str(self.path), shapes
            ) from error

    def _check(self, tensors: dict[str, torch.Tensor]) -> None:
        slots = self.slots
        unknown = [n for n in tensors if n not in self.inputs and n not in slots]
        if unknown:
            hint = nearest(unknown[0], self.inputs) or f"its inputs are {', '.join(self.inputs)}"
            raise PeftfxError(f"the model has no input {', '.join(map(repr, unknown))}", str(self.path), hint)
        missing = [n for n in self.inputs if n not in tensors]
        if missing:
            raise PeftfxError(
                f"the model also needs {', '.join(map(repr, missing))}", str(self.path), "pass it by name"
            )


def _options(threads: int, mapped: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: warnings of its graph optimiser tell a user nothing
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        # What a weight in half precision is cast to is kept by graph optimisations, and cast early by the usual
        # order of nodes; in this one they run as they are written.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return options


def find(directory: Path) -> Path:
    """The `.onnx` file in `directory` (or `directory` itself, where it is one).

    Raises:
        PeftfxError: there is none.
    """
    if is_file(directory):
        return directory
    path = directory / "model.onnx"
    if is_file(path):
        return path
    folder = is_folder(directory)
    models = ", ".join(sorted(p.name for p in directory.glob("*.onnx"))) if folder else ""
    hint = f"name one of its models: {models}" if models else "peftfx's export writes one"
    raise PeftfxError("there is no ONNX model here" if folder else "no such directory", str(path), hint)


def to_ort(value: torch.Tensor) -> ort.OrtValue:
    """A tensor for ONNX Runtime: on the CPU its own memory, for as long as the result lives."""
    value = value.detach().cpu().contiguous()
    if value.dtype in _VIEWS:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            value.view(torch.int16).numpy().view(np.uint16), _BFLOAT16
        )
    return ort.OrtValue.ortvalue_from_numpy(value.numpy())


def _lent(value: torch.Tensor) -> ort.OrtValue:
    """The tensor's own memory, seen by ONNX Runtime."""
    return ort.OrtValue.ortvalue_from_numpy(value.detach().numpy())


def to_torch(value: ort.OrtValue) -> torch.Tensor:
    """What ONNX Runtime gave, as a tensor."""
    if value.element_type() == _BFLOAT16:
        return torch.utils.dlpack.from_dlpack(value._get_c_value().to_dlpack())
    return torch.from_numpy(np.array(value.numpy()))
