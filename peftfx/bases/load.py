"""Load base models of transformers and diffusers from local directories. Nothing is downloaded or unpickled."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfx.bases.dtypes import dtype_of, dtype_plan, kinds_of
from peftfx.bases.files.folder import read_base_config, weight_files
from peftfx.bases.files.gguf import load_gguf, stood_for
from peftfx.bases.processors.padding import settle_padding
from peftfx.bases.quantised import QUANTISED, blank, load_quantised, outline
from peftfx.bases.tasks import maker_of
from peftfx.bases.transformers_config import read_config, understanding, without_initial_values
from peftfx.errors import PeftfxError, listed, nearest, warn
from peftfx.files import is_file
from peftfx.graph.lazy_weights import store
from peftfx.quantisation.checkpoint import format_of

_ADAPTER = "adapter_config.json"


def load_base(
    directory: str | Path,
    *,
    task: str | None = None,
    num_labels: int | None = None,
    weights: bool = True,
    dtype: torch.dtype | None = None,
    given: Collection[str] = (),
    beside: Collection[Path] = (),
    named: str | None = None,
) -> nn.Module:
    """Load a base model from a local directory in eval mode: of transformers, or one of diffusers (no pipeline).

    Args:
        directory: the directory, with `config.json` and the weights in safetensors; or a GGUF file, see
            `peftfx.bases.files.gguf`. Nothing is downloaded, unpickled or executed.
        task: the task, which decides the head; by default the class named in the config.
        num_labels: the number of labels of a classification head, if the config does not say it.
        weights: whether to read the weights. If not, parameters (but not buffers) stay uninitialised, which is enough
            for a capture.
        dtype: the dtype of the parameters; by default the config's. Parameters that are stored in another dtype stay in
            their files, and each operation that reads them casts them (`peftfx.graph.lazy_weights`). A loaded model is
            memory-mapped.
        given: the names of tensors that an adapter brings. Only these may be missing from the weights.
        beside: directories whose tokenizers come before the base's own: they tell a classifier's padding token.
        named: a class of transformers that counts as the one that the config names.

    Raises:
        PeftfxError: there is no such model, its files are broken or lack a weight, or it cannot do the task.
    """
    directory = Path(directory)
    changes: dict[str, object] = {} if num_labels is None else {"num_labels": num_labels}
    if named is not None:
        changes["architectures"] = [named]
    model = _load(directory, task, changes, weights, dtype, given)
    if weights and is_file(directory / _ADAPTER) and directory.resolve() not in {path.resolve() for path in beside}:
        what = f"the base's directory has an adapter, too ({_ADAPTER}), which does not act"
        warn(f"{directory}: {what}: give the directory as an adapter as well, if it should act")
    settle_padding(model, beside, directory)
    return model


def _load(
    directory: Path,
    task: str | None,
    changes: Mapping[str, Any],
    weights: bool,
    dtype: torch.dtype | None,
    given: Collection[str],
) -> nn.Module:
    file = stood_for(directory)
    if file is not None:
        labels = changes.get("num_labels")
        return load_gguf(file, task=task, num_labels=labels, weights=weights, dtype=dtype, given=given)
    config = read_base_config(directory)
    files = weight_files(directory) if weights else []
    if config.get(QUANTISED) is not None:
        if "_class_name" in config:
            what = "peftfx cannot read quantised models of diffusers"
            raise PeftfxError(what, str(directory), "use the unquantised model")
        format_of(config[QUANTISED], directory)
        with understanding(directory, "cannot load the base model"):
            model, info = load_quantised(directory, files, task=task, changes=changes, dtype=dtype)
            _refuse_random(model, info, given, directory)
            return model.eval()
    with understanding(directory, "cannot load the base model"):
        on_disk = dtype_of(files) if weights else None
        if "_class_name" in config:
            model = _load_diffusers(directory, str(config["_class_name"]), on_disk, dtype)
        else:
            model = _load_transformers(directory, config, task, changes, on_disk, dtype, given)
        _refuse_integers(model, files)
        return model.eval()


def _load_transformers(
    directory: Path,
    raw: Mapping[str, object],
    task: str | None,
    changes: Mapping[str, Any],
    on_disk: torch.dtype | None,
    dtype: torch.dtype | None,
    given: Collection[str],
) -> nn.Module:
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        close = nearest(kind, CONFIG_MAPPING.keys()) if isinstance(kind, str) else ""
        hint = close or "peftfx runs no code from a model's directory: build the model in Python, and pass it"
        where = str(directory / "config.json")
        raise PeftfxError(
            f"transformers has no model type {kind!r}" if kind else "the config has no `model_type`", where, hint
        )
    config = read_config(directory, **changes)
    maker = maker_of(config, task, directory)
    wanted: torch.dtype = dtype or config.dtype or on_disk or torch.float32  # type: ignore[assignment]
    if on_disk is None:
        return outline(maker, config, wanted)
    model, info = maker.from_pretrained(  # type: ignore[attr-defined]
        directory,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        dtype=on_disk,
        adapter_kwargs={"subfolder": "config.json"},  # no folder: transformers would put an adapter into the base
    )
    assert isinstance(model, nn.Module)
    _refuse_random(model, info, given, directory)
    if wanted != on_disk:
        plan = dtype_plan(model, wanted)
        _compute_again(model, plan)
        _present(model, blank(maker, config, wanted), plan)
        model.config.dtype = wanted
    return model


def _present(model: nn.Module, blank: nn.Module, dtype: Callable[[str], torch.dtype]) -> None:
    """Give a model that was loaded in its files' dtypes the wanted dtypes.

    Buffers that no file holds are taken from a blank model of the wanted dtype, in which they were computed.
    """
    store(model, dtype)
    kept = model.state_dict(keep_vars=True).keys()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{path}.{name}" if path else name
            if buffer is not None and full not in kept:
                module._buffers[name] = blank.get_buffer(full)
            elif buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype(full))


def _compute_again(model: Any, dtype: Callable[[str], torch.dtype]) -> None:
    """Compute the parameters that no file has to hold, such as sines of positions, in their wanted dtypes.

    transformers has computed them in the dtype of the files. It marks parameters that it has read, and modules in which
    nothing is to be computed.
    """
    patterns = model._keys_to_ignore_on_load_missing
    unread = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    for name in (name for name in unread if any(re.search(pattern, name) for pattern in patterns)):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module._parameters[leaf]
        made = torch.empty(old.shape, dtype=dtype(name))
        module._parameters[leaf] = nn.Parameter(made, requires_grad=old.requires_grad)
        module._is_hf_initialized = False
    model.initialize_weights()


def _refuse_random(model: nn.Module, info: Mapping[str, Any], given: Collection[str], directory: Path) -> None:
    """Refuse a model with weights that transformers initialised, because the files lack them or differ in shape."""
    other = {
        name: f"{name} ({list(have)} in the file, {list(want)} in the model)"
        for name, have, want in info["mismatched_keys"]
    }
    shown = {**{name: name for name in info["missing_keys"]}, **other}
    random = sorted(shown[name] for name in shown.keys() - set(given))
    if random:
        hint = f"name the model's task, or give an adapter with these weights (this is a {type(model).__name__})"
        what = f"neither the base nor an adapter has the weights of {listed(random, 8)}"
        raise PeftfxError(what, str(directory), hint)


def _refuse_integers(model: nn.Module, files: Sequence[Path]) -> None:
    """Refuse weights that are stored as integers: their scales are not read here."""
    integers = {name: kind for name, kind in kinds_of(files).items() if not kind.startswith(("F", "BF"))}
    ours = {name for name, p in model.named_parameters() if p.is_floating_point()}
    found = [n for n in integers if any(n == p or n.endswith(f".{p}") or p.endswith(f".{n}") for p in ours)]
    if found:
        what = f"the weights of {listed(found, 1)} are stored as {integers[found[0]]}"
        raise PeftfxError(what, str(files[0].parent), "use the unquantised model")


def _load_diffusers(directory: Path, name: str, on_disk: torch.dtype | None, dtype: torch.dtype | None) -> nn.Module:
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        hint = nearest(name, (n for n in dir(diffusers) if "Model" in n)) or "update diffusers"
        raise PeftfxError(f"diffusers has no model class {name!r}", str(directory / "config.json"), hint)
    wanted = dtype or on_disk or torch.float32

    def fresh() -> nn.Module:
        with without_initial_values():
            made = kind.from_config(kind.load_config(directory, local_files_only=True))
        return made.to(wanted)

    if on_disk is None:
        return fresh()
    model = kind.from_pretrained(directory, local_files_only=True, use_safetensors=True, torch_dtype=on_disk)
    if wanted != on_disk:
        _present(model, fresh(), lambda _: wanted)
    assert isinstance(model, nn.Module)
    return model
