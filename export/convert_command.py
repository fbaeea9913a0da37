"""The command `convert`: turn an adapter, a checkpoint or a single file into a LoRA or a single file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.checkpoint_difference import CheckpointDifference
from peftfx.adapters.files.reader import read_adapter
from peftfx.adapters.files.writer import write_rule_directory
from peftfx.adapters.lora_conversion import lora_of
from peftfx.adapters.single_files.reading import as_peft
from peftfx.adapters.single_files.writing import DIFFUSERS, KOHYA, as_single_file
from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError, how_many
from peftfx.export.directories import load_directories
from peftfx.export.writing.earlier_output import is_empty, refuse_inputs
from peftfx.files import folder_of, is_file, is_folder, write_file, writing
from peftfx.formats import RULES
from peftfx.methods.lora import LoRA
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.options import check_choice
from peftfx.rules.peft_files import CONFIG, WEIGHTS

PEFT = "peft"
FORMATS = (PEFT, KOHYA, DIFFUSERS)
_PREFIXES = {KOHYA: "lora_unet", DIFFUSERS: "unet"}  #: how the keys of an image model begin
_PICKLES = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth"})
_LORA = "lora"
_ROUNDING = 1e-6  #: of a share of the energy


def convert_directory(
    base: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    tuned: str | Path | None = None,
    file: str | Path | None = None,
    rank: float | None = None,
    to: str = PEFT,
    prefix: str | None = None,
    force: bool = False,
) -> str:
    """Convert an adapter, a tuned checkpoint or a single file to a LoRA, and write the LoRA.

    Args:
        base: the model's directory.
        output: where to write: a directory in HF PEFT's format, or a safetensors file if `to` is another format.
        adapter: a HF PEFT directory of any method that acts on weights.
        tuned: the directory of another checkpoint of the model. The LoRA approximates its difference from the base.
        file: a LoRA, DoRA, LoHa or LoKr in one file, of kohya's or diffusers' format. Exactly one of `adapter`, `tuned`
            and `file` is given.
        rank: the rank of the LoRA, or the share of the energy that is kept (below 1). Only an adapter that is a LoRA
            already, or a single file, may have none: it is not changed.
        to: `peft`, `kohya` or `diffusers`.
        prefix: how the keys of the written file begin; by default `lora_unet` in kohya's format, `unet` in diffusers'.
        force: replace the adapter, or the safetensors file, at `output`.

    Returns:
        A line that says what was written, of which ranks, and which share of the energy is kept if some was cut.

    Raises:
        PeftfxError: bad input, or a change that no LoRA can express.
    """
    target = Path(output)
    _refuse_target(target, to, prefix, force=force)
    if sum(source is not None for source in (adapter, tuned, file)) != 1:
        raise PeftfxError("give one thing to convert: --adapter, --tuned or --file", "adapter", "give exactly one")
    refuse_inputs(target, [Path(source) for source in (base, adapter, tuned, file) if source is not None])
    if to == PEFT:
        _refuse_other_folder(target)
    kept, change = 1.0, None
    if adapter is not None:
        adapted = load_directories(Path(base), {_LORA: Path(adapter)})
    elif tuned is not None:
        adapted, change, kept = _of_difference(Path(base), Path(tuned), rank)
    else:
        assert file is not None
        adapted = _of_single_file(Path(base), Path(file))
    name = _LORA
    if rank is not None and tuned is None:
        kept = adapted.convert_to_lora(_LORA, rank, name := "converted")
    made = adapted.adapter(name)
    if file is None or to != PEFT:
        _refuse_other_methods(made)

    def write(target: Path) -> None:
        if to == PEFT:
            adapted.save_pretrained(target, name)
            return
        tensors = {key: t.cpu() for key, t in as_single_file(made, to, prefix or _PREFIXES[to]).items()}
        with writing(target), folder_of(target):
            write_file(target, lambda path: save_file(tensors, path, metadata={"format": "pt"}))

    if change is not None:  # files that do not hold what they should are not left behind
        with tempfile.TemporaryDirectory() as directory:
            write(tried := Path(directory, target.name))
            kept = change.kept_by(_read_back(adapted, Path(base), tried, to), kept)
    write(target)
    cut = "" if kept > 1 - _ROUNDING else f"; it keeps {100 * kept:.2f}% of the energy"
    kind = type(made.rules[0]).__name__
    modules = how_many(len(made.placements), "module")
    return f"{target}: a {kind} of {modules} in the format of {to}, {_ranks(made)}{cut}"


def _refuse_target(target: Path, to: str, prefix: str | None, *, force: bool) -> None:
    """Refuse a format that does not exist, and a target that is not of it or may not be replaced."""
    check_choice(to, FORMATS, "to", "unknown format")
    if to == PEFT and prefix is not None:
        what = "only the keys of a single file have a prefix, and a directory is to be written"
        raise PeftfxError(what, "prefix", "leave it out, or write a file: --to kohya, or --to diffusers")
    if to != PEFT and target.suffix.lower() in _PICKLES:
        what = f"the file would be safetensors, and programs take a file of this name for a pickle ({target.suffix})"
        raise PeftfxError(what, str(target), f"name it {target.with_suffix('.safetensors').name}")
    if os.path.exists(target) and not force:
        raise PeftfxError(
            "the output exists already", str(target), "choose another path, or pass --force to replace it"
        )
    if to == PEFT and is_file(target):
        raise PeftfxError("the output is a file, and a directory is to be made", str(target), "choose another path")
    if to != PEFT and is_file(target) and not _has_tensors(target):
        what = "the file there is not a safetensors file, so it is not replaced"
        raise PeftfxError(what, str(target), "delete it yourself, or choose another output")


def _refuse_other_folder(target: Path) -> None:
    """Refuse a directory with files but no adapter."""
    if is_folder(target) and not is_empty(target) and not any(is_file(target / name) for name in (CONFIG, RULES)):
        what = "there is no adapter in the directory, so nothing in it is replaced"
        raise PeftfxError(what, str(target), "choose another output")


def _has_tensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _ranks(made: Adapter) -> str:
    ranks = sorted({int(vars(placement.method)["r"]) for placement in made.placements.weights})
    return f"of rank {ranks[0]}" if len(ranks) == 1 else f"of ranks {ranks[0]} to {ranks[-1]}"


def _refuse_other_methods(adapter: Adapter) -> None:
    """Refuse an adapter with a rule that is no LoRA: to be one, it needs a rank."""
    on_weights = set(map(id, adapter.placements.weights))
    beside = next((placement for placement in adapter.placements if id(placement) not in on_weights), None)
    if beside is not None:
        what = f"{type(beside.method).__name__} does not update weights, so no LoRA has its effect"
        raise PeftfxError(what, "adapter", "convert adapters that act on weights")
    other = next((rule for rule in adapter.rules if rule.peft_type != LoRA.peft_type), None)
    if other is not None:
        what = f"the adapter is {type(other).__name__}, and a LoRA of it needs a rank"
        raise PeftfxError(what, "rank", "rank=16, or rank=0.95 of its energy")


def _of_difference(base: Path, tuned: Path, rank: float | None) -> tuple[AdaptedModel, CheckpointDifference, float]:
    """Return the base with a LoRA of another checkpoint's difference, the difference, and the share that it keeps."""
    if rank is None:
        what = "the difference of two checkpoints needs a rank"
        raise PeftfxError(what, "rank", "rank=16, or rank=0.95 of its energy")
    adapted = bare(load_base(base))
    change = CheckpointDifference(adapted.source, load_base(tuned), adapted.sites.weights)
    change.tell_left()
    made, kept = lora_of(change.updates(), rank)
    adapted._install(_LORA, made)
    return adapted, change, kept


def _read_back(adapted: AdaptedModel, base: Path, written: Path, to: str) -> Adapter:
    """Return the adapter that was written, as its files are read."""
    if to == PEFT:
        return read_adapter(written, adapted.source, adapted.sites)
    return _of_single_file(base, written).adapter(_LORA)


def _of_single_file(base: Path, file: Path) -> AdaptedModel:
    """Return the base with the LoRA of a single file."""
    adapted = bare(load_base(base))
    config, tensors = as_peft(file, adapted.source)
    with tempfile.TemporaryDirectory() as folder:
        write_rule_directory(Path(folder), config, {WEIGHTS: tensors})
        adapted.load_adapter(folder, _LORA)
    return adapted
