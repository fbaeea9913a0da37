"""Run a large saved model in parts: the nodes of one part for all calls, and then those of the next part.

ONNX Runtime maps the weights of a large model. Its first call then takes a page fault for each page of the file, and a
model that is larger than the memory is read again by each call. Here the weights of a part are read into memory that
the next part uses again. So each weight is read once for all calls, past the page cache.

In a model whose weights are mapped, ONNX Runtime optimises nothing and runs the nodes in the order of the file (see
`peftfx.serving.onnx_model`). The parts do the same, so they give the very bits that the whole model gives. Half
precision is the exception, because ONNX Runtime computes it in float32: values are rounded between two parts and after
a product, where the whole model may keep them in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack

import onnx
import onnxruntime as ort
import torch
from onnx import ValueInfoProto, helper, numpy_helper
from torch import Tensor

from peftfx.export.verification.graph_parts import WIDENED, ModelPart, cut, stored_weights
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export.verification.wide_weights import with_wide_weights
from peftfx.export.writing.direct_read import DirectFile, span_of
from peftfx.export.writing.weights import LARGE
from peftfx.memory.pages import PAGE, page_memory
from peftfx.serving.onnx_model import OnnxModel, session_options, to_ort, to_torch
from peftfx.telling import tell_share

PART = 64 << 20  #: bytes that the weights of a part take; a larger weight has a part of its own
_FOLDER = "session.model_external_initializers_file_folder_path"

Values = dict[str, ort.OrtValue]


class InParts:
    """A saved model that is run in parts.

    Args:
        model: the model, opened with mapped weights.
        limit: the bytes that the weights of a part may take.
        least: the bytes from which a weight is read. Smaller weights stay mapped.

    Attributes:
        parts: the parts.
    """

    def __init__(self, model: OnnxModel, limit: int = PART, least: int = LARGE) -> None:
        self.model = model
        self._proto = onnx.load(model.path, load_external_data=False)
        graph = self._proto.graph
        self._types = {value.name: value for value in graph.value_info}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        constants = [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in model.outputs]
        self._constants = {node.output[0]: node for node in constants}
        nodes = (node for node in graph.node if node.output[0] not in self._constants)
        parts = cut(nodes, stored_weights(graph, least), model.outputs, limit)
        self.parts = [with_wide_weights(part, model.slots) for part in parts]

    def __call__(self, calls: Sequence[Tensors]) -> list[Tensors]:
        """Run the model on the inputs of each call, and return the outputs of each call by name.

        Raises:
            PeftfxError: an input is missing or unknown, or ONNX Runtime refuses its shape or dtype.
            OSError: the weights cannot be read.
        """
        held = [self.model.feed(call) for call in calls]
        for name in {name for values in held for name in values}:  # a part is opened once, for all calls
            for values in held:
                if name not in values:
                    values[name] = to_ort(self._default(name))
        memory, wider = (memoryview(page_memory(size)) for size in _room(self.parts))
        with ExitStack() as opened:
            names = {weight.file for part in self.parts for weight in part.weights}
            files = {name: opened.enter_context(DirectFile(self.model.path.with_name(name))) for name in names}
            for number, part in enumerate(self.parts):
                tell_share(f"part {number} of {len(self.parts)} in ONNX Runtime", 0.5 + number / len(self.parts) / 4)
                self._run(part, _read(part, held[0], files, memory, wider), calls, held)
                for values in held:
                    for name in part.done & values.keys():
                        del values[name]
        return [{name: self._output(name, values) for name in self.model.outputs} for values in held]

    def _run(self, part: ModelPart, weights: Values, calls: Sequence[Tensors], held: Sequence[Values]) -> None:
        """Run the nodes of a part for all calls, and add the wanted values to those that are held for each call."""
        if not part.wanted:
            return
        inputs, wanted = [name for name in part.reads if name in held[0]], list(part.wanted)
        session = self._session(part, weights, {name: held[0][name] for name in inputs})
        for call, values in zip(calls, held, strict=True):
            try:
                made = session.run_with_ort_values(wanted, weights | {name: values[name] for name in inputs})
            except Exception as error:
                raise self.model.refused(call, error) from error
            values.update(zip(wanted, made, strict=True))

    def _session(self, part: ModelPart, weights: Values, inputs: Values) -> ort.InferenceSession:
        """Open the nodes of a part as a model. Its inputs are the weights that were read, and values of the calls."""
        inner = [name for name in part.reads if name not in weights and name not in inputs]
        graph = helper.make_graph(
            [*(self._constants[name] for name in inner if name in self._constants), *part.nodes],
            "part",
            [self._described(name, value) for name, value in (weights | inputs).items()],
            [ValueInfoProto(name=name) for name in part.wanted],
            [self._stored[name] for name in inner if name in self._stored],
        )
        whole, options = self._proto, session_options(mapped=True)
        options.add_session_config_entry(_FOLDER, str(self.model.path.parent))
        proto = helper.make_model(
            graph, opset_imports=whole.opset_import, functions=whole.functions, ir_version=whole.ir_version
        )
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _described(self, name: str, value: ort.OrtValue) -> ValueInfoProto:
        """Return the type of an input. Its sizes are left open, because they differ between the calls."""
        if not value.is_tensor():
            return self._types[name]
        return helper.make_tensor_value_info(name, value.element_type(), [None] * len(value.shape()))

    def _output(self, name: str, values: Values) -> Tensor:
        if name in values:
            return to_torch(values[name])
        return self._default(name)

    def _default(self, name: str) -> Tensor:
        """Return what the file has under this name, such as what a slot holds in a call that leaves it out."""
        return torch.tensor(numpy_helper.to_array(self._stored[name], str(self.model.path.parent)))


def _room(parts: Sequence[ModelPart]) -> tuple[int, int]:
    """Return the bytes of memory for the weights of any part: of those that stay as they are, and of those cast."""
    own = [sum(w.span for w in part.weights if w.tensor.name not in part.wide) for part in parts]
    cast = [sum(2 * w.length for w in part.weights if w.tensor.name in part.wide) for part in parts]
    return max(own, default=0) + span_of(PAGE - 1, WIDENED), max(cast, default=0)


def _read(
    part: ModelPart, put: Collection[str], files: Mapping[str, DirectFile], memory: memoryview, wider: memoryview
) -> Values:
    """Read the weights of a part, except those that are `put`, into `memory`, or cast to float32 into `wider`."""
    found, at, end = {}, 0, 0
    for weight in part.weights:
        name, file = weight.tensor.name, files[weight.file]
        if name in put:
            continue
        if name in part.wide:
            value = weight.read_wide(file, memory[at:], wider[end:])
            end += value.nbytes
        else:
            value = weight.read(file, memory[at:])
            at += weight.span
        found[name] = to_ort(value)
    return found
