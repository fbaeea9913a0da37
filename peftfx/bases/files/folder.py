"""A base's folder: its config, and the files of its weights, each refused early if it is missing or broken."""

from __future__ import annotations

from pathlib import Path

from peftfx.errors import PeftfxError, shown
from peftfx.files import is_file, is_folder, read_json, require_readable

_WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_MOST = {"labels": 10**7, "layer": 10**4, "layers": 10**4}
"""The largest counts that a config may have, by the ends of field names. Otherwise transformers would build modules
without end."""
_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_base_config(directory: Path) -> dict[str, object]:
    """Read the config of a local model directory, as JSON. A missing or broken config is a PeftfxError."""
    if is_file(directory):
        what = "a base is a folder or a .gguf file, and this is another file"
        raise PeftfxError(what, str(directory), "give the folder that it is in")
    if not is_folder(directory):
        raise PeftfxError("there is no such directory", str(directory), "download the base model and pass its folder")
    path = directory / "config.json"
    if not is_file(path):
        if is_file(directory / _ADAPTER):
            hint = "give it with --adapter, and the folder of its base with --base (in Python: load(base, adapter))"
            raise PeftfxError("this is an adapter, and not a base", str(directory), hint)
        if is_file(directory / "training_args.bin"):  # `Trainer` writes no config of a model that it does not know
            what = "this is what Trainer saves of an adapted model, its tensors alone, and no model or adapter"
            raise PeftfxError(what, str(directory), "after the training, trainer.model.save_pretrained(DIR) writes one")
        below = (p.parent for depth in ("*", "snapshots/*") for p in directory.glob(f"{depth}/config.json"))
        parts = sorted(p.relative_to(directory).as_posix() for p in below)
        hint = adapters_below(directory) or "pass the folder of a base model"
        hint = f"pass one of its folders: {', '.join(parts)}" if parts else hint
        raise PeftfxError("the directory has no config.json", str(directory), hint)
    config = read_json(path)
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise PeftfxError(f"architectures is not a list of names: {shown(named)}", str(path), "download the file again")
    for name, value in config.items():
        most = next((count for end, count in _MOST.items() if name.endswith(end)), None)
        if most is not None and isinstance(value, int) and value > most:
            raise PeftfxError(f"{name} is {shown(value)}, which cannot be right", str(path), "download the file again")
    return config


def adapters_below(directory: Path) -> str:
    """Return a hint that names the folders of adapters in a directory; empty if it has none."""
    found = sorted(p.parent.name for p in directory.glob(f"*/{_ADAPTER}"))
    return f"adapters below it: {', '.join(found)}" if found else ""


def weight_files(directory: Path) -> list[Path]:
    """Return the files of a base's weights. Missing, pickled, incomplete and truncated files are refused early."""
    from safetensors import SafetensorError, safe_open

    files = [directory / name for name in _WEIGHTS if is_file(directory / name)]
    for index in [] if files else directory.glob("*.safetensors.index.json"):
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
            raise PeftfxError("this is not an index of safetensors files", str(index), "download the file again")
        files += [directory / name for name in sorted(set(placed.values()))]
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            what = f"the weights are pickled ({', '.join(pickles)}), and pickle is never loaded"
            hint = "load the model once with transformers and save it again: save_pretrained writes safetensors"
            raise PeftfxError(what, str(directory), hint)
        raise PeftfxError("the directory has no weights", str(directory), f"peftfx looks for {_WEIGHTS[0]}")
    for file in files:
        if not is_file(file):
            raise PeftfxError("a file named in the index is missing", str(file), "download the file")
        require_readable(file)
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise PeftfxError(f"this safetensors file is broken: {error}", str(file), "download it again") from error
    return files
