"""The decoder's graph in the form that optimum reads: it computes the encoder's keys and values in its first step.

    input_ids, encoder_hidden_states, encoder_attention_mask, past_key_values.N.decoder/encoder.key/value
        -> logits, present.N.decoder/encoder.key/value

peftfx's encoder gives the keys and values of what is encoded, and its decoder takes them. optimum's classes
(`ORTModelForSeq2SeqLM`, `ORTModelForSpeechSeq2Seq`) expect them from the decoder, after a first step with a past of no
tokens. This graph is the decoder's with one `If` ahead: without encoded keys and values in the past it computes them by
the encoder's own operators, over the same file of weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from peftfx.errors import PeftfxError, first_line
from peftfx.export.verification.comparison import VerificationError
from peftfx.files import is_file, write_file
from peftfx.serving.load import DECODER, ENCODER
from peftfx.views.capturing.settling import largest_gap, near
from peftfx.views.decode import PAST, PRESENT
from peftfx.views.encoder_decoder import ENCODED
from peftfx.views.images.encoded import IMAGE_TOKENS

MERGED_DECODER = "decoder_model_merged.onnx"
_HIDDEN, _GIVEN = "last_hidden_state", "encoder_hidden_states"
_SIZES = {"batch": 2, "encoder_sequence": 5, "sequence": 3, "past": 4, "encoder_total": 5, IMAGE_TOKENS: 0}
_TOLERANCE = {"float16": 1e-2}  #: of an output's largest magnitude, by dtype; both sides are ONNX Runtime's
Arrays = Mapping[str, np.ndarray]


def refuse_no_decoder(files: Collection[str]) -> None:
    """Refuse an export whose graphs, by the names of their files, are not an encoder and a decoder."""
    if not {ENCODER, DECODER} <= {*files}:
        what = "merged_decoder is for an encoder-decoder in its decode view"
        raise PeftfxError(what, "merged_decoder", "leave it out, or export with --view decode")


def write_merged_decoder(directory: Path) -> Path:
    """Write `decoder_model_merged.onnx` beside the graphs of an encoder and a decoder, and check it against them.

    Args:
        directory: the directory of an export of an encoder-decoder in its decode view.

    Returns:
        The path of the new file. Its weights are those in `model.onnx.data`.

    Raises:
        PeftfxError: the directory has no such graphs, or the keys and values depend on more than the encoder's output.
        VerificationError: ONNX Runtime computes something else with the new graph.
    """
    refuse_no_decoder([name for name in (ENCODER, DECODER) if is_file(directory / name)])
    merged = _merged(ir.load(directory / ENCODER), ir.load(directory / DECODER))

    def write(path: Path) -> None:
        ir.save(merged, path)
        _check(directory, path)

    write_file(directory / MERGED_DECODER, write)
    return directory / MERGED_DECODER


def _merged(encoder: ir.Model, decoder: ir.Model) -> ir.Model:
    graph, hidden = decoder.graph, _output(encoder, _HIDDEN)
    past = {value.name: value for value in graph.inputs if _encoded(value.name, PAST)}
    sources = [_output(encoder, f"{PRESENT}{name.removeprefix(PAST)}") for name in past]  # type: ignore[union-attr]
    given = ir.Value(name=_GIVEN, shape=hidden.shape, type=hidden.type)
    copied = _Copy(encoder, hidden, given)
    results = [copied.of(source) for source in sources]
    first = next(iter(past.values()))
    length = _node("Shape", first, "cross.length", start=2, end=3)
    number = _node("Squeeze", length.outputs[0], "cross.number")
    some = _node("Cast", number.outputs[0], "cross.some", to=ir.DataType.BOOL.value)
    none = _node("Not", some.outputs[0], "cross.none")  # a bool of rank 0: the past has no encoded tokens
    computed = ir.Graph([], results, nodes=copied.nodes, name="computed")
    kept = [_node("Identity", value, f"kept.{name}") for name, value in past.items()]
    read = ir.Graph([], [node.outputs[0] for node in kept], nodes=kept, name="kept")
    for branch in (computed, read):
        for value in branch.outputs:
            value.type = first.type
    branches = {"then_branch": computed, "else_branch": read}
    choice = ir.node("If", [none.outputs[0]], branches, num_outputs=len(past))
    for value, chosen in zip(past.values(), choice.outputs, strict=True):
        chosen.name, chosen.type, chosen.shape = f"cross.{value.name}", value.type, value.shape
        own = [(use.node, use.idx) for use in value.uses() if use.node not in (*kept, length)]
        for node, place in own:
            node.replace_input_with(place, chosen)
    for initializer in copied.initializers.values():
        graph.register_initializer(initializer)
    graph.insert_before(graph[0], [length, number, some, none, choice])
    outputs = []
    for value, chosen in zip(past.values(), choice.outputs, strict=True):
        present = _node("Identity", chosen, f"{PRESENT}{str(value.name).removeprefix(PAST)}")
        result = present.outputs[0]
        result.type, result.shape = value.type, value.shape
        graph.append(present)
        outputs.append(result)
    graph.outputs.extend(outputs)
    _in_order(graph, given)
    decoder.opset_imports.update({**encoder.opset_imports, **decoder.opset_imports})
    return decoder


def _node(kind: str, operand: ir.Value, name: str, **attributes: int) -> ir.Node:
    """Make a node of one operand, whose result has this name."""
    made = ir.node(kind, [operand], attributes)
    made.outputs[0].name = name
    return made


def _in_order(graph: ir.Graph, given: ir.Value) -> None:
    """Order inputs and outputs as optimum reads them: by layers, the decoder's keys and values first in each."""
    names = [str(value.name) for value in graph.inputs]
    plain = [value for value in graph.inputs if not str(value.name).startswith(f"{PAST}.")]
    cached = [value for value in graph.inputs if str(value.name).startswith(f"{PAST}.")]
    cached.sort(key=lambda value: (int(str(value.name).split(".")[1]), names.index(str(value.name))))
    graph.inputs[:] = [*plain, given, *cached]


def _encoded(name: str | None, ahead: str) -> bool:
    parts = str(name).split(".")
    return parts[0] == ahead and parts[2:3] == [ENCODED]


def _output(model: ir.Model, name: str) -> ir.Value:
    found = next((value for value in model.graph.outputs if value.name == name), None)
    if found is None:
        raise PeftfxError(f"the encoder's graph has no output {name}", ENCODER, "leave merged_decoder out")
    return found


class _Copy:
    """Copies of the encoder's operators behind its last hidden state.

    Attributes:
        nodes: the copies, in order.
        initializers: the constants that they read, by their new names.
    """

    def __init__(self, encoder: ir.Model, hidden: ir.Value, given: ir.Value) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._inputs = set(encoder.graph.inputs)
        self._made: dict[ir.Value, ir.Value] = {hidden: given}
        self._hidden, self._given = hidden, given

    def of(self, value: ir.Value) -> ir.Value:
        """Return the copy of a value of the encoder's graph."""
        if value not in self._made:
            self._made[value] = self._copy(value)
        return self._made[value]

    def _copy(self, value: ir.Value) -> ir.Value:
        node = value.producer()
        if value in self._inputs:
            what = f"keys and values of the encoded text depend on {value.name}, not on {_HIDDEN} alone"
            raise PeftfxError(what, ENCODER, "leave merged_decoder out")
        if node is None:
            made = ir.Value(
                name=f"cross.{value.name}", shape=value.shape, type=value.type, const_value=value.const_value
            )
            self.initializers[str(made.name)] = made
            return made
        if node.op_type == "Shape" and node.inputs[0] in self._inputs:
            return self._size(node)
        inputs = [None if given is None else self.of(given) for given in node.inputs]
        copied = ir.Node(
            node.domain, node.op_type, inputs, attributes=node.attributes.values(), num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name, new.type, new.shape = f"cross.{old.name}", old.type, old.shape
            self._made[old] = new
        self.nodes.append(copied)
        return self._made[value]

    def _size(self, node: ir.Node) -> ir.Value:
        """Read a size of the encoder's input from its last hidden state, which has an axis of the same name."""
        source, shape = node.inputs[0], self._hidden.shape
        start = node.attributes.get_int("start", 0)
        wanted = list(source.shape or ())[start : node.attributes.get_int("end", None)]  # type: ignore[union-attr]
        axes = [str(axis) for axis in shape or ()]
        if len(wanted) != 1 or str(wanted[0]) not in axes:
            what = f"keys and values of the encoded text depend on sizes of {source.name}"  # type: ignore[union-attr]
            raise PeftfxError(what, ENCODER, "leave merged_decoder out")
        at = axes.index(str(wanted[0]))
        size = _node("Shape", self._given, f"cross.{node.outputs[0].name}", start=at, end=at + 1)
        self.nodes.append(size)
        return size.outputs[0]


def _check(directory: Path, merged: Path) -> None:
    """Compare a first and a later step with those of the two graphs, in ONNX Runtime, on random inputs."""
    encoder, decoder, whole = (_session(path) for path in (directory / ENCODER, directory / DECODER, merged))
    encoded = _run(encoder, _random(encoder, {}))
    cross = {f"{PAST}{n.removeprefix(PRESENT)}": value for n, value in encoded.items() if n.startswith(f"{PRESENT}.")}
    hidden = {_GIVEN: encoded[_HIDDEN]}
    for past in (0, _SIZES["past"]):
        feed = _random(decoder, cross, past)
        want = _run(decoder, feed) | {f"{PRESENT}{n.removeprefix(PAST)}": value for n, value in cross.items()}
        none = {name: value[:, :, :0] for name, value in cross.items()} if not past else {}
        got = _run(whole, {**feed, **hidden, **none})
        for name, value in want.items():
            _hold(name, value, got[name])


def _hold(name: str, want: np.ndarray, got: np.ndarray) -> None:
    a, b = (torch.from_numpy(value.astype(np.float64)) for value in (want, got))
    if not near(a, b, _TOLERANCE.get(str(want.dtype), 1e-5)):
        how = f"gives {list(b.shape)} where the decoder gives {list(a.shape)}"
        if a.shape == b.shape:
            how = f"differs from the decoder by {largest_gap(a, b):.2e}"
        raise VerificationError(f"the merged decoder {how}", name, "report this model")


def _session(path: Path) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        what = f"ONNX Runtime cannot open the graph: {first_line(error)}"
        raise PeftfxError(what, str(path), "leave merged_decoder out") from error


def _run(session: ort.InferenceSession, feed: Arrays) -> dict[str, np.ndarray]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _random(session: ort.InferenceSession, known: Arrays, past: int = 0) -> dict[str, np.ndarray]:
    return {name: known.get(name, value) for name, value in _values(session, {**_SIZES, "past": past})}


def _values(session: ort.InferenceSession, sizes: Mapping[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(0)
    for given in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes.get(size, 2) for size in given.shape]
        if given.type == "tensor(int64)":  # masks show all, and each text is of tokens that every vocabulary has
            yield given.name, np.ones(shape, np.int64)
        else:
            dtype = {"tensor(float16)": np.float16, "tensor(double)": np.float64}.get(given.type, np.float32)
            yield given.name, random.standard_normal(shape).astype(dtype)
