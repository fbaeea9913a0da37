"""The command `convert`: turn an adapter, a checkpoint or a single file into a LoRA or a single file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import save_file

from peftfx.adapters.files.writer import write_rule_directory
from peftfx.adapters.lora_conversion import difference, lora_of
from peftfx.adapters.single_file import DIFFUSERS, KOHYA, as_peft, as_single_file
from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError
from peftfx.export.command import load_directories
from peftfx.files import write_file, writing
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.options import check_choice
from peftfx.rules.peft_files import WEIGHTS

PEFT = "peft"
FORMATS = (PEFT, KOHYA, DIFFUSERS)
_LORA = "lora"


def convert_directory(
    base: str | Path,
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    tuned: str | Path | None = None,
    file: str | Path | None = None,
    rank: float | None = None,
    to: str = PEFT,
    prefix: str = "lora_unet",
    force: bool = False,
) -> str:
    """Convert an adapter, a tuned checkpoint or a single file to a LoRA, and write the LoRA.

    Args:
        base: the model's directory.
        output: where to write: a directory in HF PEFT's format, or a safetensors file if `to` is another format.
        adapter: a HF PEFT directory of any method that acts on weights.
        tuned: the directory of another checkpoint of the model. The LoRA approximates its difference from the base.
        file: a single LoRA file of kohya's or diffusers' format. Exactly one of `adapter`, `tuned` and `file` is given.
        rank: the rank of the LoRA, or the share of the energy that is kept (below 1). Without a rank, an adapter that
            is a LoRA already is not changed.
        to: `peft`, `kohya` or `diffusers`.
        prefix: how the keys of a single file begin.
        force: replace what is at `output`.

    Returns:
        A line that says what was written.

    Raises:
        PeftfxError: bad input, or a change that no LoRA can express.
    """
    check_choice(to, FORMATS, "to", "unknown format")
    target = Path(output)
    if sum(source is not None for source in (adapter, tuned, file)) != 1:
        raise PeftfxError("give one thing to convert: --adapter, --tuned or --file", "adapter", "give exactly one")
    if target.exists() and not force:
        raise PeftfxError(
            "the output exists already", str(target), "choose another path, or pass --force to replace it"
        )
    if to == PEFT and target.is_file():
        raise PeftfxError("the output is a file, and a directory is to be made", str(target), "choose another path")
    if adapter is not None:
        adapted = load_directories(Path(base), {_LORA: Path(adapter)})
    else:
        adapted = _changed(Path(base), tuned, file, rank)
    name = _LORA
    if rank is not None and tuned is None:
        adapted.convert_to_lora(_LORA, rank, "converted")
        name = "converted"
    made = adapted.adapter(name)
    if to == PEFT:
        adapted.save_pretrained(target, name)
    else:
        tensors = {key: t.cpu() for key, t in as_single_file(made, to, prefix).items()}
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return f"{target}: {len(made.placements)} modules, as {to} has them"


def _changed(base: Path, tuned: str | Path | None, file: str | Path | None, rank: float | None) -> AdaptedModel:
    """Return the base with a LoRA from a single file, or from the difference of another checkpoint."""
    adapted = bare(load_base(base))
    if tuned is not None:
        if rank is None:
            raise PeftfxError(
                "the difference of two checkpoints needs a rank", "rank", "rank=16, or rank=0.95 of its energy"
            )
        made = lora_of(difference(adapted.source, load_base(Path(tuned)), adapted.sites.weights), rank)
        adapted._install(_LORA, made)
        return adapted
    assert file is not None
    config, tensors = as_peft(Path(file), adapted.source)
    with tempfile.TemporaryDirectory() as folder:
        write_rule_directory(Path(folder), config, {WEIGHTS: tensors})
        adapted.load_adapter(folder, _LORA)
    return adapted
