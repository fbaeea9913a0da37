"""Read the tensors of a GGUF file by the names in transformers' model. Weights of layers stay in their blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftfx.quantisation.coded import Coded
from peftfx.quantisation.ggml import LAYOUTS, blocks

_COLUMNS = 2  #: columns of the row numbers that are sent through a weight's processing


def read_tensors(file: Path, model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """Read the file's tensors. Return None for an architecture that transformers reads by special code.

    If transformers reorders the rows of a weight (queries and keys of a LLaMA), the rows of its blocks are reordered in
    the same way. The order is found by sending row numbers through the same processing. A weight that is changed in
    another way is dequantised first.

    Args:
        file: the file to read. Its weights are mapped.
        model: the model that the tensors are for. Its parameters are not read.
        dtype: the dtype that weights are computed in.
    """
    import gguf
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    reader = gguf.GGUFReader(file, "c")  # copy-on-write mapping: torch warns about read-only memory
    architecture = str(reader.fields["general.architecture"].contents())
    if is_gguf_arch_supported(architecture):
        return None
    config = load_gguf_checkpoint(str(file))["config"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    names = get_gguf_hf_weights_map(model, processor)
    beside: dict[str, Any] = {"config": config, "tensors": {}}  # gets the stacked experts
    found: dict[str, Tensor] = {}

    def process(weights: np.ndarray[Any, Any], name: str) -> Any:
        return processor.process(weights=weights, name=name, tensor_key_mapping=names, parsed_parameters=beside)

    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, [int(size) for size in reversed(tensor.shape)]
        if kind in LAYOUTS and len(shape) == 2 and tensor.name in names:
            order = _order(process, tensor.name, shape[0])
            if order is not None:
                data = torch.from_numpy(tensor.data).view(shape[0], -1)
                ordered = None if torch.equal(order, torch.arange(shape[0])) else order
                found[names[tensor.name]] = Coded(blocks(kind, data, shape[1], ordered), dtype)
                continue
        result = process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)
        if result.name in names:
            found[names[result.name]] = torch.from_numpy(np.array(result.weights)).to(dtype)
    return found | {name: torch.as_tensor(value).to(dtype) for name, value in beside["tensors"].items()}


def _order(process: Any, name: str, rows: int) -> Tensor | None:
    """Return, int64 [rows], the file's row for each row of the weight. None if more is done than reordering rows."""
    sent = np.arange(rows * _COLUMNS).reshape(rows, _COLUMNS)
    try:
        result = process(sent.copy(), name)
    except (ValueError, TypeError, IndexError, KeyError):  # processors may fail for another number of columns
        return None
    got = np.asarray(result.weights)
    if result.name != name or got.shape != sent.shape or got.dtype != sent.dtype:
        return None
    order = got[:, 0] // _COLUMNS
    if not (got == sent[order % rows]).all() or len(np.unique(order)) != rows:
        return None
    return torch.from_numpy(order.copy())
