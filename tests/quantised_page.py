"""Writes the table of formats in `docs/quantised.md`: `python tests/quantised_page.py [WORDS]`.

With words, the rows whose names hold one are made again. Each is a format of `tests/quantised/formats.py` or a
type of GGUF's blocks, on random codes.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import gguf
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from files.gguf_files import packed_as, write
from quantised.formats import FORMATS, IDS, METADATA, on_identity
from support import quantised as q

import peftfx
from peftfx.bases.load import load_base
from peftfx.export.coded.operators import Product, product_for
from peftfx.export.command import export_directory
from peftfx.quantisation.checkpoint import format_of
from peftfx.quantisation.codes import Codes
from peftfx.quantisation.ggml import LAYOUTS, blocks
from peftfx.quantisation.packed import Packed
from peftfx.quantisation.torchao import LAYER

PAGE = Path(__file__).parents[1] / "docs" / "quantised.md"
START, END = "<!-- formats: python tests/quantised_page.py -->\n", "<!-- /formats -->\n"
HEADS = ("format", "operator", "bits a weight", "W", "logits", "time, 1 token", "16 tokens")
SIZE, TOKENS = 1024, (1, 16)
NAMES = (*FORMATS, *(f"GGUF {kind}" for kind in LAYOUTS))


def row(name: str) -> list[str]:
    """A line of the table."""
    codes = _codes(name)
    made = product_for(codes, "w", "w", 23)
    if isinstance(made, str):
        return [name, "float32", "32", "0", _logits(name), "1.0", "1.0"]
    size = sum(8 * value.const_value.nbytes for value in made.initializers) / (codes.rows * codes.columns)
    want = codes.dequantise().T
    off = float((on_identity(made, codes.columns) - want).abs().max() / want.abs().max())
    times = [f"{spent / plain:.1f}" for spent, plain in zip(_times(_fresh(codes)), _times(None), strict=True)]
    return [name, f"`{made.operator}`", f"{size:.2f}", _told(off), _logits(name), *times]


def _codes(name: str) -> Codes:
    """Random codes [SIZE, SIZE]."""
    random = np.random.default_rng(0)
    if name.startswith("GGUF "):
        kind = name.removeprefix("GGUF ")
        weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        raw = packed_as(gguf.GGMLQuantizationType[kind], weight)
        return blocks(kind, torch.from_numpy(raw), SIZE, None)
    said, pack, _ = FORMATS[name]
    tensors, _ = pack(random, SIZE, SIZE)
    config = {**said, LAYER: json.loads(METADATA[name])} if name in METADATA else said
    return format_of(said, Path()).read(Packed("w", tensors, config, "random"))


def _fresh(codes: Codes) -> Product:
    made = product_for(codes, "w", "w", 23)
    assert isinstance(made, Product)
    return made


def _times(made: Product | None) -> list[float]:
    """CPU seconds of a product on one thread; of one in float32 without codes."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", SIZE]))
    if made is None:
        weight = ir.Value(name="w", const_value=ir.tensor(np.ones((SIZE, SIZE), np.float32), name="w"))
        nodes, held = [ir.node("MatMul", [x, weight])], [weight]
    else:
        nodes, held = made.nodes(x, None), made.initializers
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=held)
    graph.opset_imports.update({"": 23, "com.microsoft": 1})
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found = []
    for tokens in TOKENS:
        given, spent = {"x": np.ones((tokens, SIZE), np.float32)}, []
        for _ in range(9):
            start = time.process_time()
            for _ in range(5):
                session.run(None, given)
            spent.append(time.process_time() - start)
        found.append(median(spent))
    return found


def _logits(name: str) -> str:
    """How far the logits of an export are from torch's with the dequantised weights, over the largest of them."""
    with tempfile.TemporaryDirectory() as work:
        base, out = Path(work) / "base", Path(work) / "out"
        if name.startswith("GGUF "):
            base = Path(work) / "tiny.gguf"
            kind = name.removeprefix("GGUF ")
            sizes = {"hidden_size": 256, "intermediate_size": 256} if kind.endswith("_K") else {}
            model = write(base, lambda _: kind, **sizes)
            ids = IDS % model.config.vocab_size
        else:
            said, pack, _ = FORMATS[name]
            model, ids = q.tiny(num_hidden_layers=1), IDS
            q.write(base, model, said, pack, METADATA.get(name, ""))
        export_directory(base, out)
        got = peftfx.runtime.load(out)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        with torch.no_grad():
            want = model(input_ids=ids).logits
        load_base(base)
    return _told(float((got - want).abs().max() / want.abs().max()))


def _told(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def rows_of(text: str) -> dict[str, list[str]]:
    """The lines of the page's table by their formats."""
    lines = text.split(START)[1].split(END)[0].strip().splitlines()[2:]
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    return {line[0]: line for line in cells}


def main() -> None:
    """Write rows of the page, all of them or those that are named."""
    chosen = [name for name in NAMES if len(sys.argv) == 1 or any(word in name for word in sys.argv[1:])]
    made = {}
    for name in chosen:
        made[name] = row(name)
        print(*made[name], sep=" | ", flush=True)
    text = PAGE.read_text(encoding="utf-8")
    known = rows_of(text) | made
    lines = [HEADS, ["---"] * len(HEADS), *(known[name] for name in NAMES if name in known)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
