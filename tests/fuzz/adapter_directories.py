"""Adapter directories, spoiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fuzz.twins import CONFIGS, Twin
from fuzz.values import Change, changed, changes, raw_texts, write_json
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
FILES = ("whole", "half", "header", "empty", "none", "text")


@dataclass(frozen=True)
class Spoil:
    """What is done to one tensor of the file: the key by its number, since each twin has keys of its own."""

    what: str
    key: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Adapter:
    """A twin and what is done to its files."""

    twin: str
    config: tuple[Change, ...] = ()
    text: str | None = None
    tensors: tuple[Spoil, ...] = ()
    file: str = "whole"

    def write(self, twins: Mapping[str, Twin], directory: Path) -> None:
        """Into a directory, over what was there."""
        twin, path = twins[self.twin], directory / "adapter_model.safetensors"
        directory.mkdir(exist_ok=True)
        config = directory / "adapter_config.json"
        if self.text is None:
            write_json(config, changed(twin.config, self.config))
        else:
            config.write_text(self.text, encoding="utf-8", errors="replace")
        path.unlink(missing_ok=True)
        if self.file != "none":
            save_file(spoiled(twin.tensors, self.tensors), path)
            whole = path.read_bytes()
            cut = {"half": whole[: len(whole) // 2], "header": whole[:100], "empty": b"", "text": b"not tensors"}
            path.write_bytes(cut.get(self.file, whole))


def spoiled(tensors: Mapping[str, Tensor], spoils: tuple[Spoil, ...]) -> dict[str, Tensor]:
    """The tensors of a file after each spoil."""
    made = dict(tensors)
    for spoil in spoils:
        if not made:
            break
        name = sorted(made)[spoil.key % len(made)]
        value = made.pop(name)
        match spoil.what:
            case "extra":
                made |= {name: value, f"{name}.more": torch.ones(2)}
            case "stray":
                made |= {name: value, name.replace("layers.0", "layers.9"): torch.ones(2)}
            case "renamed":
                made[name.replace("self_attn", "attn") if "self_attn" in name else f"x{name}"] = value
            case "larger":
                made[name] = torch.stack([value, value]) if value.ndim == 0 else torch.cat([value, value])
            case "flat":
                made[name] = value.flatten()
            case "none of it":
                made[name] = value.new_empty(0)
            case "scalar":
                made[name] = value.new_ones(())
            case "dtype":
                made[name] = value.to(spoil.dtype)
            case "only":
                made = {name: value}
            case "no key":
                made = {}
    return made


SPOILS = ("gone", "extra", "stray", "renamed", "larger", "flat", "none of it", "scalar", "dtype", "only", "no key")
_twins = st.sampled_from(sorted(CONFIGS))
_FIELDS = {name: sorted(config().to_dict()) for name, config in CONFIGS.items()}
_tensors = st.lists(
    st.builds(Spoil, st.sampled_from(SPOILS), st.integers(0, 30), st.sampled_from(DTYPES)), min_size=1, max_size=2
).map(tuple)


def _with_config(tensors: st.SearchStrategy[tuple[Spoil, ...]]) -> st.SearchStrategy[Adapter]:
    """Adapters of every method with fields of their own configs changed."""
    return _twins.flatmap(lambda name: st.builds(Adapter, st.just(name), _changes(name), tensors=tensors))


def _changes(name: str) -> st.SearchStrategy[tuple[Change, ...]]:
    return changes(_FIELDS[name]).map(tuple)


adapters = st.one_of(  # most with one thing wrong: what is wrong twice is refused for the first
    _with_config(st.just(())),
    _with_config(st.just(())),
    st.builds(Adapter, _twins, tensors=_tensors),
    _with_config(_tensors),
    st.builds(Adapter, _twins, text=raw_texts),
    st.builds(Adapter, _twins, file=st.sampled_from(FILES)),
)
