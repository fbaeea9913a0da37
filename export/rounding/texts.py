"""Read texts as rows of tokens: GPTQ rounds weights on them, and quantised models are compared on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftfx.contract.sequence import encodes_and_decodes
from peftfx.errors import PeftfxError, first_line
from peftfx.export.verification.agreement import decoded
from peftfx.export.verification.eager.reference import EagerReference
from peftfx.export.verification.tolerances.tolerance import Tensors
from peftfx.export_options.quantize import Scheme
from peftfx.export_options.values import check_text
from peftfx.model.adapted import AdaptedModel
from peftfx.views.encoder_decoder import Decoder

_LONGEST, _MOST = 128, 2048  #: most tokens of a row of a given text; most tokens of a text to compare on
_FITTED = 8192  #: the most tokens that GPTQ uses
_LEAST = 128  #: the fewest tokens of a text for GPTQ
_INSTEAD = "leave --calibration out: the model's own text is used"
_INSTEAD_OF_FIT = "leave gptq and --calibration out: weights are rounded without a text"


def compared_text(path: Path, source: str | Path, schemes: Sequence[Scheme] = ()) -> Tensor:
    """Return the ids [rows, tokens] on which a rounded model is compared. With GPTQ, the end of its text.

    Raises:
        PeftfxError: the file or the tokenizer is missing, or the text has fewer than two tokens.
    """
    if any(scheme.gptq for scheme in schemes):
        return split_text(path, source)[1]
    ids = _ids(path, source, _INSTEAD)[:_MOST]
    if len(ids) < 2:
        raise PeftfxError("the text has fewer than 2 tokens", str(path), "give a longer one")
    return _in_rows(ids)


def refuse_text(path: str | Path | None, source: str | Path, schemes: Sequence[Scheme]) -> None:
    """Refuse an unusable text before anything is computed. No text (None) is accepted.

    Raises:
        PeftfxError: for the same reasons as `compared_text`.
    """
    if path is not None:
        compared_text(Path(path), source, schemes)


def split_text(path: Path, source: str | Path) -> tuple[Tensor, Tensor]:
    """Split a text into the ids [rows, tokens] that GPTQ uses and its last fifth, which tests GPTQ's result.

    Raises:
        PeftfxError: the file or the tokenizer is missing, or the text is too short.
    """
    ids = _ids(path, source, _INSTEAD_OF_FIT)
    if len(ids) < _LEAST:
        what = f"GPTQ rounds by a text of {_LEAST} tokens or more, and this one has {len(ids)}"
        raise PeftfxError(what, str(path), f"give some {_FITTED:,} tokens of the kind that the model will read")
    cut = len(ids) - min(_MOST, len(ids) // 5)
    return _in_rows(ids[:cut][:_FITTED]), _in_rows(ids[cut:])


def _ids(path: Path, source: str | Path, instead: str) -> list[int]:
    """Return the token ids of a text file, by the tokenizer in the base model's directory."""
    from transformers import AutoTokenizer

    check_text(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except Exception as error:  # libraries raise various errors if the directory has no tokenizer
        what = f"the base has no tokenizer that can be read: {first_line(error)}"
        raise PeftfxError(what, str(source), instead) from error
    text = path.read_text(encoding="utf-8", errors="replace")
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _in_rows(ids: Sequence[int]) -> Tensor:
    length = min(_LONGEST, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def whole_call(adapted: AdaptedModel, ids: Tensor, named: str) -> Tensors:
    """Make the arguments of a forward call on a text. A decoder reads the tokens that the model itself generates.

    Raises:
        PeftfxError: the model reads no text.
    """
    if "input_ids" not in adapted.example:
        raise PeftfxError("the model reads no text", named, "leave gptq and --calibration out")
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if encodes_and_decodes(adapted.base):
        view = adapted.view("decoder")
        assert isinstance(view, Decoder)
        made = decoded(adapted, view, EagerReference(adapted, view), ids, len(ids))
        feed["decoder_input_ids"] = made["input_ids"]
    return {name: value for name, value in feed.items() if name in adapted.example}
