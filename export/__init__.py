"""Turn a graph into a directory that ONNX Runtime serves: translate it, write it, verify it, publish it."""

if __name__ != "peftfx.export":
    raise ImportError("import this package as peftfx.export: a second copy under another name would not know the first")

from peftfx.export.onnx_directory import export_onnx
from peftfx.export.reports.report import Report
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export.translation.to_onnx import to_onnx
from peftfx.export.verification.comparison import Comparison, VerificationError
from peftfx.export.verification.verify import verify
from peftfx.serving.onnx_model import OnnxModel

__all__ = [
    "Comparison",
    "OnnxModel",
    "Report",
    "VerificationError",
    "export_adapter",
    "export_onnx",
    "to_onnx",
    "verify",
]
