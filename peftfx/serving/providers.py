"""Execution providers of ONNX Runtime, by full names (`CUDAExecutionProvider`) or short names (`cuda`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime as ort

from peftfx.errors import PeftfxError, nearest, shown

_CPU = "CPUExecutionProvider"
Provider = str | tuple[str, Mapping[str, Any]]
_END = "ExecutionProvider"
_ALIASES = {"directml": "dml", "trt": "tensorrt"}
#: The distributions of onnxruntime that have a provider. Only one distribution can be installed at a time.
_PACKAGES = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "DmlExecutionProvider": "onnxruntime-directml",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
}


def chosen_providers(given: Sequence[Provider] | None) -> list[Provider]:
    """Return ONNX Runtime's names of the asked providers, in order, then the CPU. None means only the CPU.

    Args:
        given: names, or pairs of a name and the provider's options.

    Raises:
        PeftfxError: ONNX Runtime does not know a name, or the installed build lacks the provider.
    """
    if isinstance(given, str):
        raise PeftfxError(f"this is not a list of providers: {shown(given)}", "providers", f"pass [{given!r}]")
    chosen: dict[str, Provider] = {}
    for item in given or ():
        name, options = item if isinstance(item, tuple) else (item, None)
        full = _full(name)
        chosen.setdefault(full, full if options is None else (full, dict(options)))
    chosen.setdefault(_CPU, _CPU)
    return list(chosen.values())


def _full(name: object) -> str:
    known, available = ort.get_all_providers(), ort.get_available_providers()
    short = {full.removesuffix(_END).lower(): full for full in known}
    asked = str(name).lower().removesuffix(_END.lower())
    full = short.get(_ALIASES.get(asked, asked))
    here = ", ".join(available)
    if full is None:
        hint = nearest(asked, [*short, *_ALIASES]) or f"this machine has {here}"
        raise PeftfxError(f"ONNX Runtime has no provider {shown(name)}", "providers", hint)
    if full not in available:
        package = _PACKAGES.get(full)
        hint = f"install {package} in place of onnxruntime" if package else "install an onnxruntime that has it"
        raise PeftfxError(f"the installed onnxruntime was built without {full}: it has {here}", full, hint)
    return full


def refuse_fallback(asked: Sequence[Provider], session: ort.InferenceSession, where: str) -> None:
    """Refuse a session that lacks an asked provider: ONNX Runtime falls back to the CPU without an error.

    Raises:
        PeftfxError: the session lacks one of the asked providers.
    """
    names = [item if isinstance(item, str) else item[0] for item in asked]
    lost = [name for name in names if name not in session.get_providers()]
    if lost:
        what = f"ONNX Runtime could not start {lost[0]}, and would run on the CPU"
        hint = "a library is missing or has another version; ONNX Runtime's own log says which"
        raise PeftfxError(what, where, hint)
