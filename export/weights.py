"""save: an ONNX model becomes `model.onnx` and `model.onnx.data`, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from peftfx.errors import PeftfxError
from peftfx.files import writing

INLINE = 1024  #: bytes up to which an initializer is kept inside `model.onnx`
PAGE = 4096  #: what files are memory-mapped in; large tensors start on a multiple of it
LARGE = 65536  #: bytes from which a tensor is worth the padding


def save(model: ir.Model, directory: Path, name: str = "model.onnx", external_threshold: int = INLINE) -> Path:
    """Write `model` into `directory` and return the path of its `.onnx` file.

    Initializers larger than `external_threshold` bytes go to `<name>.data` beside it, each evaluated when its turn to
    be written comes and released after; the location in the file is relative, so the directory can be moved. The
    model is left as it was. Use it inside `publish`, so that nothing half-written stays behind.

    Raises:
        PeftfxError: the disk refuses, or the model is too large for its inline tensors (2 GB, protobuf's limit).
    """
    path = Path(directory) / name
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            ir.save(
                model,
                path,
                external_data=f"{name}.data",
                size_threshold_bytes=external_threshold,
                alignment=PAGE,
                align_threshold=LARGE - 1,
            )
        except ValueError as error:
            if "2GB" not in str(error).replace(" ", "") and "protobuf" not in str(error).lower():
                raise
            raise PeftfxError(
                "the model's graph is over protobuf's 2 GB", str(path), "lower external_threshold"
            ) from error
    return path
