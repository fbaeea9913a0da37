"""The steps that sentence-transformers runs after the transformer: pooling, dense layers, norms.

A step takes and returns a dict of tensors by sentence-transformers' names: `token_embeddings` [batch, sequence, width]
and `attention_mask` [batch, sequence], int64; from the pooling on, `sentence_embedding` [batch, width].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftfx.bases.transformers_config import understanding
from peftfx.errors import PeftfxError, nearest, shown
from peftfx.files import is_file, read_json, require_readable

TOKEN_OUTPUT, SENTENCE, MASK = "token_embeddings", "sentence_embedding", "attention_mask"
Features = dict[str, Tensor]

#: The flags of `1_Pooling/config.json` before sentence-transformers 6, in the order in which the results are
#: concatenated.
_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WEIGHTS = "model.safetensors"
#: How names of the steps' layers begin, beside those of the files: no adapter of the transformer targets such a name.
_APART = "sentence_"


class Pooling(nn.Module):
    """Pool the vectors of tokens into one vector for each row, over the tokens that the mask shows.

    The modes are those of sentence-transformers, computed in the same way (`sentence_transformer/modules/pooling.py`).
    The results of several modes are concatenated.
    """

    def __init__(self, modes: Sequence[str]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, features: Features) -> Features:
        """Return the features with `sentence_embedding` added."""
        pooled = [POOLINGS[mode](features[TOKEN_OUTPUT], features[MASK]) for mode in self.modes]
        return {**features, SENTENCE: torch.cat(pooled, -1)}


def _first(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the vector of the first unmasked token."""
    return _at(tokens, mask.int().argmax(1))


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the vector of the last unmasked token."""
    return _at(tokens, mask.shape[1] - 1 - mask.int().flip(1).argmax(1))


def _at(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.gather(1, index[:, None, None].expand(-1, 1, tokens.shape[-1])).squeeze(1)


def _max(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(mask[..., None] == 0, float("-inf")).amax(1)


def _sums(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the unmasked tokens, and their number, in float32."""
    seen = mask[..., None].float()
    return (tokens.float() * seen).sum(1), seen.sum(1).clamp(min=1e-9)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    total, count = _sums(tokens, mask)
    return (total / count).to(tokens.dtype)


def _mean_sqrt(tokens: Tensor, mask: Tensor) -> Tensor:
    total, count = _sums(tokens, mask)
    return (total / count.sqrt()).to(tokens.dtype)


def _weighted(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return a mean in which the first unmasked token has the weight 1, the next 2, and so on."""
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=torch.float32)
    weight = (mask.float() * (place[None] - mask.int().argmax(1, keepdim=True)))[..., None]
    return ((tokens.float() * weight).sum(1) / weight.sum(1).clamp(min=1e-9)).to(tokens.dtype)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
    "lasttoken": _last,
}


class Normalize(nn.Module):
    """Divide a vector by its norm."""

    def __init__(self, read: str, written: str) -> None:
        super().__init__()
        self.read, self.written = read, written

    def forward(self, features: Features) -> Features:
        """Return the features with the normalised vector, in place of the old vector or under a name of its own."""
        return {**features, self.written: functional.normalize(features[self.read], p=2.0, dim=-1)}


class Dense(nn.Module):
    """A linear layer and an activation. The input is added if the config says so."""

    def __init__(self, sizes: tuple[int, int], bias: bool, activation: nn.Module, names: tuple[str, str]) -> None:
        super().__init__()
        self.sentence_linear, self.activation = nn.Linear(*sizes, bias=bias), activation
        self.sentence_residual: nn.Module | None = None
        self.read, self.written = names

    def forward(self, features: Features) -> Features:
        """Return the features with the layer's output added."""
        given = features[self.read]
        made = self.activation(self.sentence_linear(given))
        if self.sentence_residual is not None:
            made = made + self.sentence_residual(given)
        return {**features, self.written: made}


class LayerNorm(nn.Module):
    """A layer norm of the sentence's vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sentence_norm = nn.LayerNorm(width)

    def forward(self, features: Features) -> Features:
        """Return the features with the normed vector in place of the old vector."""
        return {**features, SENTENCE: self.sentence_norm(features[SENTENCE])}


def make_step(kind: str, folder: Path) -> nn.Module | None:
    """Make the step that a folder of sentence-transformers describes. Return None for a step without effect in eval.

    Args:
        kind: the name of the step's class.
        folder: the step's folder, with `config.json` and, if the step has weights, `model.safetensors`.

    Raises:
        PeftfxError: the kind or an option is unknown, or a file is missing or broken.
    """
    if kind not in _MAKERS:
        hint = nearest(kind, _MAKERS) or f"the known modules are Transformer, {', '.join(_MAKERS)}"
        raise PeftfxError(f"peftfx cannot export this module of sentence-transformers: {kind}", str(folder), hint)
    path = folder / "config.json"
    config = read_json(path) if is_file(path) else {}
    with understanding(path, f"cannot read the config of {kind}"):
        return _MAKERS[kind](config, folder)


def _pooling(config: Mapping[str, object], folder: Path) -> nn.Module:
    named = config.get("pooling_mode", [mode for flag, mode in _FLAGS.items() if config.get(flag)] or ["mean"])
    modes = [named] if isinstance(named, str) else named
    if not isinstance(modes, list) or not modes or not all(mode in POOLINGS for mode in modes):
        hint = f"the known ways are {', '.join(POOLINGS)}"
        raise PeftfxError(f"unknown way of pooling: {shown(named)}", str(folder / "config.json"), hint)
    if config.get("include_prompt") is False:
        what = (
            "include_prompt is false: the pooling leaves out the prompt's tokens, but a graph does not "
            "know how many these are"
        )
        hint = "set include_prompt to true if you give texts without a prompt"
        raise PeftfxError(what, str(folder / "config.json"), hint)
    return Pooling(modes)


def _names(config: Mapping[str, object]) -> tuple[str, str]:
    read = str(config.get("module_input_name") or SENTENCE)
    written = str(config.get("module_output_name") or read)
    if not {read, written} <= {SENTENCE, TOKEN_OUTPUT}:
        raise ValueError(f"peftfx has no module that reads {read} and writes {written}")
    return read, written


def _normalize(config: Mapping[str, object], folder: Path) -> nn.Module:
    return Normalize(*_names(config))


def _dense(config: Mapping[str, object], folder: Path) -> nn.Module:
    sizes = int(str(config["in_features"])), int(str(config["out_features"]))
    made = Dense(sizes, bool(config.get("bias", True)), _activation(config), _names(config))
    if config.get("use_residual"):
        made.sentence_residual = nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes, bias=False)
    return _filled(made, folder)


def _activation(config: Mapping[str, object]) -> nn.Module:
    """Make one of torch's own activations, by its name. Nothing else is imported."""
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    found = getattr(nn, name.rpartition(".")[2], None)
    if not name.startswith("torch.nn.") or not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"the activation is {name}, which torch does not have")
    return found()


def _layer_norm(config: Mapping[str, object], folder: Path) -> nn.Module:
    return _filled(LayerNorm(int(str(config["dimension"]))), folder)


def _filled(step: nn.Module, folder: Path) -> nn.Module:
    """Load the weights in its folder into a step, and return the step.

    Raises:
        PeftfxError: the weights are missing or pickled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _WEIGHTS
    if not is_file(path):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        if pickled:
            what = f"the weights are pickled ({pickled[0]}), and pickle is never loaded"
            hint = "save the model again with sentence-transformers: save_pretrained(DIR)"
            raise PeftfxError(what, str(folder), hint)
        raise PeftfxError("the module has no weights", str(folder), f"peftfx looks for {_WEIGHTS}")
    require_readable(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PeftfxError(f"this safetensors file is broken: {error}", str(path), "download it again") from error
    step.load_state_dict({f"{_APART}{name}": value for name, value in tensors.items()})
    return step


_MAKERS: Mapping[str, Callable[[Mapping[str, object], Path], nn.Module | None]] = {
    "Pooling": _pooling,
    "Normalize": _normalize,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Dropout": lambda config, folder: None,
}
