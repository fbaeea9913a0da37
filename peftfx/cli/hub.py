"""Download models from the Hugging Face Hub, only if the user asks. No other code of the commands uses the network."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from peftfx.errors import PeftfxError, first_line

#: Files in transformers' directories for other frameworks, and original checkpoints.
_OTHERS = [
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.onnx",
    "*.onnx_data",
    "*.tflite",
    "onnx/*",
    "original/*",
    "coreml/*",
]
_PICKLED = ["*.bin", "*.pt", "*.pth", "*.ckpt"]


def from_hub(name: str, cache: Path) -> Path:
    """Download a model from the Hub at its `main`, and return its directory in the local cache.

    If the weights exist in several formats, safetensors are downloaded. Tokens and mirrors are those of
    `huggingface_hub`.

    Raises:
        PeftfxError: the network is switched off, the model does not exist or is gated, or the Hub cannot be reached.
    """
    if constants.HF_HUB_OFFLINE:
        what = "the model is not in the local cache, and HF_HUB_OFFLINE switches the network off"
        raise PeftfxError(what, name, "unset HF_HUB_OFFLINE, or give a directory")
    try:
        endpoint = os.environ.get("HF_ENDPOINT")
        files = [own.rfilename for own in HfApi(endpoint).model_info(name).siblings or ()]
        ignored = _OTHERS + (_PICKLED if any(file.endswith(".safetensors") for file in files) else [])
        return Path(snapshot_download(name, cache_dir=cache, endpoint=endpoint, ignore_patterns=ignored))
    except Exception as error:  # the client raises various errors: names, rights, the network
        hint = "check the name; for a gated model log in (hf auth login); or give a directory"
        raise PeftfxError(f"cannot download this model from the Hub: {first_line(error)}", name, hint) from error
