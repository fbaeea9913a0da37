"""A saved model in ONNX Runtime that takes and returns torch tensors by name."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch

from peftfx.errors import PeftfxError, first_line, nearest
from peftfx.files import is_file, is_folder
from peftfx.formats import SIZES_KEY
from peftfx.serving.call_inputs import why_refused
from peftfx.serving.data_file import refuse_other_data
from peftfx.serving.providers import Provider, chosen_providers, refuse_fallback

_VIEWS = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}  # dtypes that numpy lacks, and what replaces them
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_LONG = 400  #: the longest list of conditions in a message: some models have a number for each piece of an image


class _Kept(threading.local):
    values: Mapping[str, ort.OrtValue] | None = None  #: what the slots hold in this thread; None: what was last put


class OnnxModel:
    """A directory with a `model.onnx`, opened in ONNX Runtime. Tensors are on the CPU.

    Args:
        directory: the directory that `save` wrote, or the path of an `.onnx` file.
        threads: the most threads of one operator; 0 lets ONNX Runtime choose.
        options: the session options, used unchanged. By default, idle threads sleep. ONNX Runtime's own default makes
            them spin between two operators of a call, which takes the cores from other programs.
        mapped: keep the weights in their memory-mapped file, and the graph unchanged. By default, ONNX Runtime copies
            matrices into the layout of its kernels, which is faster and takes the same amount of memory again.
        providers: the execution providers; see `peftfx.serving.providers`. The CPU is the default, and always comes
            last.
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
        options = session_options(threads, mapped) if options is None else options
        self._put: Mapping[str, ort.OrtValue] = {}
        self._kept = _Kept()
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=chosen)
        except Exception as error:
            what = f"ONNX Runtime cannot open the model: {first_line(error)}"
            raise PeftfxError(what, str(self.path), _why_closed(str(error))) from error
        refuse_fallback(chosen, self._session, str(self.path))
        refuse_other_data(self.path, self.metadata)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the required inputs, in the model's order."""
        return tuple(i.name for i in self._session.get_inputs())

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the model, by key."""
        return self._session.get_modelmeta().custom_metadata_map

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the optional inputs. The model has a default value for each."""
        return tuple(i.name for i in self._session.get_overridable_initializers())

    def put(self, values: Mapping[str, ort.OrtValue]) -> None:
        """Put these `values` into the model's slots from now on. All other slots have their defaults.

        Calls of other threads that are inside `keeping` still have what was there before.
        """
        self._put = dict(values)
        if self._kept.values is not None:
            self._kept.values = self._put

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what the slots hold, in this thread, until the `with` block ends, whatever other threads put there."""
        before = self._kept.values
        self._kept.values = self._in_slots
        try:
            yield
        finally:
            self._kept.values = before

    @property
    def _in_slots(self) -> Mapping[str, ort.OrtValue]:
        return self._put if self._kept.values is None else self._kept.values

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, in the model's order."""
        return tuple(o.name for o in self._session.get_outputs())

    @property
    def axes(self) -> dict[str, tuple[int | str, ...]]:
        """The shape of each input and output. An axis whose size is free is a string."""
        return {v.name: tuple(v.shape) for v in (*self._session.get_inputs(), *self._session.get_outputs())}

    @property
    def types(self) -> dict[str, str]:
        """The type of each input and output, as ONNX Runtime writes it, such as `tensor(float)`."""
        return {v.name: v.type for v in (*self._session.get_inputs(), *self._session.get_outputs())}

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the model on inputs by name, and return every output by name.

        Raises:
            PeftfxError: an input is missing or unknown, or ONNX Runtime refuses its shape or dtype.
        """
        feed = self.feed(tensors)
        try:
            values = self._session.run_with_ort_values(list(self.outputs), feed)
        except Exception as error:
            raise self.refused(tensors, error) from error
        return {name: to_torch(value) for name, value in zip(self.outputs, values, strict=True)}

    def feed(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, ort.OrtValue]:
        """Return a call's inputs for ONNX Runtime, with the values that were put into slots.

        Raises:
            PeftfxError: an input is missing or unknown.
        """
        self._check(tensors)
        return {**self._in_slots, **{name: to_ort(value) for name, value in tensors.items()}}

    def run_into(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Run the model on tensors in place, and write the results into other tensors. Nothing is copied.

        Args:
            inputs: all inputs by name. They are contiguous, on the CPU, and of the model's dtypes.
            outputs: all outputs by name, likewise. They have the shapes of the results, and share no memory with the
                inputs.

        Raises:
            PeftfxError: ONNX Runtime refuses a shape or dtype.
        """
        binding = self._session.io_binding()
        for name, value in {**self._in_slots, **{n: _lent(t) for n, t in inputs.items()}}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, _lent(value))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise self.refused(inputs, error) from error

    def refused(self, tensors: Mapping[str, torch.Tensor], error: Exception) -> PeftfxError:
        """Return the error for a call that fails, with the conditions that the export has put on calls."""
        limits = self.metadata.get(SIZES_KEY, "")
        what, hint = why_refused(error, limits, self.axes, tensors)
        told = f"; the export is right where: {limits[:_LONG]}{' ...' * (len(limits) > _LONG)}" if limits else ""
        return PeftfxError(what, str(self.path), hint + told)

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        slots = self.slots
        unknown = [n for n in tensors if n not in self.inputs and n not in slots]
        if unknown:
            hint = nearest(unknown[0], self.inputs) or f"its inputs are {', '.join(self.inputs)}"
            raise PeftfxError(f"the model has no input {', '.join(map(repr, unknown))}", str(self.path), hint)
        missing = [n for n in self.inputs if n not in tensors]
        if missing:
            raise PeftfxError(
                f"the model also needs {', '.join(map(repr, missing))}", str(self.path), "pass each by name"
            )


def _why_closed(error: str) -> str:
    if "NOT_IMPL" in error:
        return "the CPU has no kernel for a dtype of the model (bfloat16, float64): export in float32"
    if "External data path" in error or "External initializer" in error:
        return "a file of weights beside the graph is missing or cut: copy all files of the export again"
    if "INVALID_PROTOBUF" in error:
        return "the file is cut or damaged: copy all files of the export again"
    return ""


def session_options(threads: int = 0, mapped: bool = False) -> ort.SessionOptions:
    """Return the options of a session; see `OnnxModel`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its errors are raised, too; warnings of the graph optimiser do not help a user
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        # Graph optimisations would keep the float32 copies of half-precision weights, and the default order of nodes
        # would make the copies early. In this order, nodes run in the order of the file.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return options


def find(directory: Path) -> Path:
    """Return the `.onnx` file in `directory`, or `directory` itself if it is a file.

    Raises:
        PeftfxError: there is no such file.
    """
    if is_file(directory):
        return directory
    path = directory / "model.onnx"
    if is_file(path):
        return path
    folder = is_folder(directory)
    models = ", ".join(sorted(p.name for p in directory.glob("*.onnx"))) if folder else ""
    hint = f"name one of its models: {models}" if models else "`peftfx export` writes one"
    raise PeftfxError("there is no ONNX model here" if folder else "there is no such directory", str(path), hint)


def to_ort(value: torch.Tensor) -> ort.OrtValue:
    """Convert a tensor for ONNX Runtime. A CPU tensor's own memory is used as long as the result lives."""
    value = value.detach().cpu().contiguous()
    if value.dtype in _VIEWS:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            value.view(torch.int16).numpy().view(np.uint16), _BFLOAT16
        )
    return ort.OrtValue.ortvalue_from_numpy(value.numpy())


def _lent(value: torch.Tensor) -> ort.OrtValue:
    """Wrap the tensor's own memory for ONNX Runtime."""
    return ort.OrtValue.ortvalue_from_numpy(value.detach().numpy())


def to_torch(value: ort.OrtValue) -> torch.Tensor:
    """Convert a result of ONNX Runtime to a tensor."""
    if value.element_type() == _BFLOAT16:
        return torch.utils.dlpack.from_dlpack(value._get_c_value().to_dlpack())
    return torch.from_numpy(np.array(value.numpy()))
