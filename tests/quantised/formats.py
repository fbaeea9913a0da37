"""The formats of quantised bases, by name, and what ONNX Runtime makes of a weight's operator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from support import quantised as q

from peftfx.export.coded.operators import Product
from peftfx.export.coded.rows import CodedRows, row_nodes

BNB4, BNB8 = (
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
)
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
FP8, AO = {"quant_method": "fp8"}, {"quant_method": "torchao"}
METADATA = {
    "torchao-int8": q.torchao_layer("Int8Tensor"),
    "torchao-int4-zeros": q.torchao_layer("IntxUnpackedToInt8Tensor", "int4"),
    "torchao-int2": q.torchao_layer("IntxUnpackedToInt8Tensor", "int2"),
}


def gptq(bits: int = 4, group: int = 32) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group}


FORMATS: dict[str, tuple[dict[str, object], q.Pack, str]] = {
    "nf4": (BNB4, q.table4(), "MatMulBnb4"),
    "nf4-double": (BNB4, q.table4(double=True), "MatMulBnb4"),
    "nf4-blocks-of-512": (BNB4, q.table4(block=512), "MatMulBnb4"),
    "bnb-int8": (BNB8, q.int8(), "MatMulNBits"),
    "gptq": (gptq(), q.gptq(), "MatMulNBits"),
    "gptq-zeros": (gptq(), q.gptq(symmetric=False), "MatMulNBits"),
    "gptq-zero-of-16": (gptq(), q.gptq(symmetric=False, top=True), "MatMulNBits"),
    "gptq-act": (gptq(), q.gptq(act=True), "MatMulNBits"),
    "gptq-whole-rows": (gptq(group=-1), q.gptq(group=-1), "MatMulNBits"),
    "gptq-8": (gptq(8), q.gptq(8), "MatMulNBits"),
    "gptq-8-zero-of-256": (gptq(8), q.gptq(8, symmetric=False, top=True), "MatMulNBits"),
    "gptq-3": (gptq(3), q.gptq(3), "MatMulNBits"),
    "gptq-2": (gptq(2), q.gptq(2), "MatMulNBits"),
    "gptq-groups-of-8": (gptq(group=8), q.gptq(group=8), "float32"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, q.awq(), "MatMulNBits"),
    "compressed": (PACKED, q.compressed(), "MatMulNBits"),
    "compressed-zeros": (PACKED, q.compressed(symmetric=False), "MatMulNBits"),
    "compressed-8": (PACKED, q.compressed(8), "MatMulNBits"),
    "compressed-6": (PACKED, q.compressed(6, symmetric=False), "MatMulNBits"),
    "compressed-int8": ({**PACKED, "format": "int-quantized"}, q.int8("weight_scale"), "MatMulNBits"),
    "torchao-int8": (AO, q.torchao(), "MatMulNBits"),
    "torchao-int4-zeros": (AO, q.torchao(4, 32, symmetric=False), "MatMulNBits"),
    "torchao-int2": (AO, q.torchao(2, 32), "MatMulNBits"),
    "fp8": (FP8, q.fp8(), "DequantizeLinear"),
    "fp8-rows": ({"quant_method": "fbgemm_fp8"}, q.fp8(by_row=True, name="weight_scale"), "DequantizeLinear"),
    "fp8-blocks": ({**FP8, "weight_block_size": [48, 32]}, q.fp8((48, 32)), "DequantizeLinear"),
}
IDS = torch.tensor([[1, 5, 9, 30, 4, 77, 8], [1, 7, 7, 12, 3, 0, 2]])


def picked(made: Product, rows: CodedRows, ids: torch.Tensor) -> torch.Tensor:
    """The rows that ONNX Runtime picks of the weight."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n", "m"]))
    return run(row_nodes(rows, x), x, made, ids.numpy())


def on_identity(made: Product, columns: int) -> torch.Tensor:
    """What ONNX Runtime computes of the identity: the weight, transposed."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", columns]))
    return run(made.nodes(x, None), x, made, np.eye(columns, dtype=np.float32))


def run(nodes: Sequence[ir.Node], x: ir.Value, made: Product, given: np.ndarray) -> torch.Tensor:
    """What the last of these nodes gives."""
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=made.initializers)
    graph.opset_imports.update({"": 23, "com.microsoft": 1})
    nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": given})[0])
