"""The reader of `adapter_config.json` and `adapter_model.safetensors` in a HF PEFT directory; no file is unpickled."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftfx.bases.files.folder import adapters_below
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError, shown
from peftfx.files import is_file, is_folder, read_json, require_readable
from peftfx.formats import RULES, read_stamped
from peftfx.methods import method_named

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STATE = "peftfx_state.safetensors"  #: peftfx's own file: the encoder of a saved prompt, so that training can go on
RECORDS = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "inference_mode"),
        *("base_model_name_or_path", "revision", "runtime_config"),
    }
)
"""Fields of a HF PEFT config that describe the adapter and change no number."""
INERT = {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}, "ensure_weight_tying": False}
"""Fields that do nothing at these values; every other field that peftfx does not know must be null or false.

An empty object counts as a value, because HF PEFT compares many fields with None: `kasa_config: {}` enables KaSA.
"""

_CONVERT = "make a folder of the file, if it is a LoRA: peftfx convert --base BASE --file {file} --output DIR"
_LENGTHS = ("num_virtual_tokens", "adapter_len")


def read_adapter_config(directory: Path) -> dict[str, object]:
    """Return the adapter config of a HF PEFT directory."""
    if is_file(directory):
        hint = _CONVERT.format(file="FILE")
        if is_file(directory.parent / CONFIG):
            hint = "give the folder that it is in"
        raise PeftfxError("an adapter is a folder, and this is a file", str(directory), hint)
    if not is_folder(directory):
        hint = "give the folder that holds adapter_config.json"
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(directory)):
            download = f'huggingface_hub.snapshot_download("{directory}")'
            hint = f"{hint}; of an adapter on the Hugging Face Hub it is what {download} returns"
        raise PeftfxError("there is no such directory", str(directory), hint)
    path = directory / CONFIG
    if not is_file(path):
        hint = "give the folder that an adapter's save_pretrained wrote"
        if below := adapters_below(directory):
            hint = below
        elif is_file(directory / "config.json"):
            hint = f"this is a model, or an export; {hint}"
        elif single := sorted({*directory.glob("*.safetensors")} - {directory / "model.safetensors"}):
            hint = _CONVERT.format(file=single[0])  # diffusers' save_lora_adapter writes such a folder
        elif is_file(directory / "model.safetensors"):  # `Trainer` writes the state of a model that it does not know
            hint = (
                "this is what Trainer saves of an adapted model, its tensors without its rules: adapt the base as for "
                "the training, model.load_state_dict(safetensors.torch.load_file(DIR + '/model.safetensors')), and "
                "model.save_pretrained(DIR); after a training, trainer.model.save_pretrained(DIR) is enough"
            )
        raise PeftfxError(f"there is no {CONFIG}", str(directory), hint)
    config = read_json(path, "save the adapter again")
    if "peft_type" not in config:
        raise PeftfxError(
            "the config names no peft_type",
            str(path),
            "give the directory of a HF PEFT adapter, or save the adapter again",
        )
    return config


def refuse_other_config(config: Any, directory: Path) -> None:
    """Refuse a config object of HF PEFT that is not the config in a directory.

    Raises:
        PeftfxError: a field differs, other than those that change no number.
    """
    known, given = read_adapter_config(directory), dict(config.to_dict())
    for name in sorted(known.keys() & given.keys() - RECORDS):
        if _plain(known[name]) != _plain(given[name]):
            what = f"the config that is given has other values than {CONFIG}: {name} is {shown(given[name])} there"
            raise PeftfxError(what, f"{directory / CONFIG}: {name}", "leave config out, or change the file")


def _plain(value: object) -> object:
    """Return a field's value as a JSON file has it, and names in one order."""
    if isinstance(value, (list, tuple, set)):
        return sorted(map(str, value))
    return getattr(value, "value", value)


def rule_folders(directory: Path) -> tuple[Path, ...]:
    """Return the HF PEFT directories of an adapter: `directory` itself, or one for each of several rules."""
    path = directory / RULES
    if not is_file(path):
        return (directory,)
    names = read_stamped(path, "save the adapter again").get("rules")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PeftfxError("not a list of an adapter's rules", str(path), "save the adapter again")
    folders = tuple(directory / name for name in names)
    if not folders or any(folder.parent != directory or folder.name == ".." for folder in folders):
        raise PeftfxError("its rules are not folders beside it", str(path), "save the adapter again")
    return folders


def method_from_config(config: Mapping[str, object], where: str) -> Method:
    """Return the method of a HF PEFT config. Unknown options that change numbers are refused."""
    cls = method_named(str(getattr(config["peft_type"], "value", config["peft_type"])))
    read = {k: v for k, v in config.items() if k in cls.options() and k not in cls.ignored}
    options = {k: v for k, v in read.items() if v is not None} | _empty(cls, read, where)
    known = {*cls.options(), *cls.ignored, *RECORDS}
    unknown = {k: v for k, v in config.items() if k not in known}
    active = {k: v for k, v in unknown.items() if v not in (None, False) and INERT.get(k) != v}
    if active:
        names = ", ".join(f"{k}={shown(v)}" for k, v in active.items())
        why, _, hint = next((cls.refused[k] for k in active if k in cls.refused), "").partition("; ")
        what = f"{cls.__name__} does not support {names}{': ' if why else ''}{why}"
        raise PeftfxError(what, where, hint or "train the adapter without, or merge it with peft")
    return cls.from_options(options)


def _empty(cls: type[Method], config: Mapping[str, object], where: str) -> dict[str, object]:
    """Return the options that are null in a config and do not mean the default: HF PEFT takes null for false.

    Raises:
        PeftfxError: a number is null. HF PEFT finds the length of a prompt by itself, but no other number.
    """
    empty = {f.name: f.default for f in dataclasses.fields(cls) if f.name in config and config[f.name] is None}
    for name, default in empty.items():
        if type(default) in (int, float) and name not in _LENGTHS:
            raise PeftfxError(f"{name} is null, and must be a number", where, f"write the adapter's own {name}")
    return {name: False for name, default in empty.items() if default is True}


def modules_in(directory: Path) -> set[str]:
    """Return the paths of all modules that the tensors of an adapter's files may belong to."""
    names = [name.split(".") for folder in rule_folders(directory) for name in Weights(folder).names]
    return {".".join(name[:end]) for name in names for end in range(1, len(name))}


class Weights:
    """The tensors of an adapter file, read one at a time, by their names without HF PEFT's prefix."""

    def __init__(self, directory: Path, prefix: str = Method.prefix, file: str = WEIGHTS) -> None:
        self.path, self._prefix = directory / file, prefix
        self._instead: dict[str, Tensor] = {}
        if not is_file(self.path):
            if is_file(directory / PICKLE):
                hint = "load it once with peft and save it again: save_pretrained writes safetensors"
                raise PeftfxError(f"only a pickle, {PICKLE}: peftfx does not unpickle", str(directory), hint)
            raise PeftfxError(
                f"there is no {self.path.name}", str(directory), "give the folder that save_pretrained wrote"
            )
        require_readable(self.path)
        try:
            self._file = safe_open(self.path, framework="pt")
            keys = list(self._file.keys())
            self.names = {self._strip(k): k for k in keys}
            slices = {n: self._file.get_slice(k) for n, k in self.names.items()}
            self.shapes = {n: tuple(read.get_shape()) for n, read in slices.items()}
        except (SafetensorError, OSError) as error:
            hint = "the file is truncated or damaged; copy or save it again"
            raise PeftfxError(f"cannot be read as safetensors: {error}", str(self.path), hint) from error
        lost = next((k for k in keys if self.names[self._strip(k)] != k), None)
        if lost is not None:
            what = f"two keys are one tensor: {lost} and {self.names[self._strip(lost)]}"
            raise PeftfxError(what, str(self.path), "keep the one that was trained, and save the file again")
        complex_names = [self.names[n] for n, read in slices.items() if read.get_dtype().startswith("C")]
        if complex_names:
            what = f"complex numbers, whose imaginary part would be lost: {shown(complex_names[0])}"
            raise PeftfxError(what, str(self.path), "save the adapter again with real tensors")

    def replace(self, values: Mapping[str, Tensor]) -> None:
        """Give these values from now on, instead of those that the file has under these names."""
        self._instead |= values
        self.shapes |= {name: tuple(value.shape) for name, value in values.items()}

    def repeat(self, name: str, others: Iterable[str]) -> None:
        """Have a tensor of the file under other names, too, unless the file has them."""
        for other in others:
            self.names.setdefault(other, self.names[name])
            self.shapes.setdefault(other, self.shapes[name])

    def __getitem__(self, name: str) -> Tensor:
        if name in self._instead:
            return self._instead[name]
        try:
            return self._file.get_tensor(self.names[name])
        except (SafetensorError, OSError) as error:
            raise PeftfxError(
                f"cannot be read: {error}", f"{self.path}: {self.names[name]}", "save it again"
            ) from error

    def _strip(self, key: str) -> str:
        return key.removeprefix(self._prefix)
