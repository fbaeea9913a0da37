"""Exported models that generate in ONNX Runtime, by transformers' own `generate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin

from peftfx.bases.tasks import maker_of
from peftfx.bases.transformers_config import understanding, without_initial_values
from peftfx.caches.held import Held, KeptTensor
from peftfx.errors import PeftfxError
from peftfx.formats import POSITIONS_KEY
from peftfx.generation.anew import OwnPreparation
from peftfx.generation.invocation import INVOCATION_KEY, OFFSETS, under_invocations
from peftfx.generation.over_graphs import over_graphs
from peftfx.generation.saved_config import saved_config
from peftfx.generation.step import Generates
from peftfx.generation.step_encoder_decoder import GeneratesFromSource, SourceEncoder
from peftfx.serving.cache_buffers import BufferedCache, Buffers
from peftfx.serving.call_inputs import ONNX_DTYPES, counted_positions, fitted, taken
from peftfx.serving.call_rows import CallRows
from peftfx.serving.made_for import task_of_directory
from peftfx.serving.onnx_model import OnnxModel
from peftfx.serving.served import Served, under_one_adapter
from peftfx.views.decode import PAST, PRESENT, Decode
from peftfx.views.encoder_decoder import DECODED, ENCODED, TEXT_INPUT, Decoder, EncoderDecoderLayers
from peftfx.views.images.encoded import IMAGE_FEATURES
from peftfx.views.row_adapters import IDS


class Buffered:
    """A mixin for a model in ONNX Runtime, whose caches reuse memory. It comes before `Generates` in the bases."""

    def new_cache(self) -> BufferedCache:
        """Make an empty cache."""
        return BufferedCache()

    @property
    def device(self) -> torch.device:
        """The device of the graphs' tensors: the CPU."""
        return torch.device("cpu")


class _Serves(Served, GenerationMixin):
    """What `GenerationMixin` needs from a model, with a step in ONNX Runtime."""

    _is_stateful = False
    main_input_name = "input_ids"
    part = ""

    def __init__(self, directory: Path, model: OnnxModel) -> None:
        Served.__init__(self, directory, model)
        if self.config is None:
            where = str(directory / "config.json")
            raise PeftfxError("the model's config is missing", where, "put the base model's config there")
        self.generation_config = saved_config(directory, self.config)

    def can_generate(self) -> bool:
        """Say that the model can generate."""
        return True

    def is_remote_code(self) -> bool:
        """Say that the model has no remote code: its code is transformers' and peftfx's."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return no choices: the implementation was fixed when the graph was made."""
        return {}

    @under_one_adapter
    def generate(self, *args: Any, **options: Any) -> Any:
        """Generate by transformers' `generate`. `adapter_ids` may be the adapters' names, one for each row.

        What the graphs take may be arrays and lists, too.
        """
        args, options = self.as_tensors(args, options)
        return super().generate(*args, **options)

    def as_tensors(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of `generate`, with tensors in place of the arrays and lists that graphs take."""
        made = {name: taken(name, value) if name in self.tensors else value for name, value in options.items()}
        return tuple(taken(self.main_input_name, one) for one in args), made

    @property
    def tensors(self) -> frozenset[str]:
        """The names of the arguments that are tensors."""
        return frozenset(name for graph in self.graphs.values() for name in graph.inputs)

    def _fitted(self, graph: OnnxModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a graph in its dtypes, with the adapters' numbers."""
        return {name: fitted(value, graph.types.get(name, "")) for name, value in self.with_ids(inputs).items()}

    def step(self, inputs: dict[str, Tensor], cache: Cache | None) -> Mapping[str, Tensor]:
        """Run the graph. The past is read in place, and the results are written into the cache's other memory."""
        buffers = cache.buffers if isinstance(cache, BufferedCache) else Buffers()
        given = {name: value.contiguous() for name, value in self.with_ids(inputs).items()}
        batch, length = given["input_ids"].shape
        vocabulary = int(self.model.axes["logits"][-1])
        kind = ONNX_DTYPES[self.model.types["logits"]]  # some code gives float32 in every dtype
        outputs = {"logits": torch.empty(batch, length, vocabulary, dtype=kind)}
        for present in (name for name in self.model.outputs if name.startswith(f"{PRESENT}.")):
            past = PAST + present.removeprefix(PRESENT)
            axes, before = self.model.axes[past], given[past]
            shape = tuple(s + length if axis == _PAST_AXIS else s for s, axis in zip(before.shape, axes, strict=True))
            outputs[present] = buffers.room(present, shape, before)
        self.model.run_into(given, outputs)
        return outputs


class ServedGenerator(Buffered, Generates, _Serves):  # type: ignore[misc]
    """A causal language model in ONNX Runtime."""

    pads_left = True

    def __init__(self, directory: Path, model: OnnxModel) -> None:
        super().__init__(directory, model)
        view = Decode(_layers_of(model), "position_ids" in model.inputs)
        tokens = tuple(map(int, model.metadata.get(INVOCATION_KEY, "").split()))
        self.view = under_invocations(view, (tokens,) if tokens and OFFSETS in model.inputs else ())

    @functools.wraps(Generates.forward)
    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        *rest: Any,
        **given: Any,
    ) -> Any:
        """Run the graph. Positions that a call leaves out are counted as the model's own code counts them."""
        told = self.model.metadata.get(POSITIONS_KEY) if position_ids is None else None
        if told is not None and isinstance(input_ids, Tensor):
            before = 0 if cache is None else cache.get_seq_length()
            position_ids = counted_positions(told, input_ids, attention_mask, before, self.directory)
        return super().forward(input_ids, attention_mask, position_ids, cache, *rest, **given)

    def prepare_inputs_for_generation(self, input_ids: Tensor, cache: Cache | None = None, **kwargs: Any) -> Any:
        """Prepare a step as transformers does. The cache is computed anew where the model's own class does so."""
        own = self._own if cache is not None and cache.get_seq_length() else None
        if cache is not None and own is not None and own.drops(input_ids, cache, **kwargs):
            cache, kwargs = None, {**kwargs, "next_sequence_length": None}
        return super().prepare_inputs_for_generation(input_ids, cache=cache, **kwargs)

    @cached_property
    def _own(self) -> OwnPreparation | None:
        assert self.config is not None
        try:
            return OwnPreparation(class_of(self), self.config)
        except PeftfxError:  # a class of the model's own code, which the directory does not have
            return None


class ServedSeq2Seq(Buffered, GeneratesFromSource, _Serves):  # type: ignore[misc]
    """An encoder-decoder in ONNX Runtime, as two graphs that share one file of weights."""

    part = DECODED

    def __init__(self, directory: Path, model: OnnxModel, encoder: OnnxModel) -> None:
        super().__init__(directory, model)
        self.graphs = {"encoder_model": encoder, "decoder_model": model}
        width = int(encoder.axes["last_hidden_state"][-1])
        source = next(name for name in encoder.inputs if name not in ("attention_mask", IMAGE_FEATURES, IDS))
        layers = EncoderDecoderLayers(_layers_of(model, DECODED), _layers_of(model, ENCODED), width, source=source)
        self.view, self.main_input_name = Decoder(layers), source
        self.source_encoder = SourceEncoder(lambda inputs, _: encoder(**self._fitted(encoder, inputs)), source)

    def generate(self, *args: object, **options: object) -> object:
        """Generate by transformers' `generate`; for sound or images, by that of the model's own class."""
        if self.view.layers.source == TEXT_INPUT and self.way is _Sourced:
            return super().generate(*args, **options)
        return self._by_own_class("generate", *args, **options)

    def __getattr__(self, name: str) -> Any:
        """Return a method that the model's own class has beside its `generate`, such as one that tells a language."""
        if not name.startswith("_") and "view" in vars(self) and self.view.layers.source != TEXT_INPUT:
            beside = (vars(cls) for cls in type(self._stand_in).__mro__ if _has_own_generate(cls))
            if any(inspect.isfunction(members.get(name)) for members in beside):
                return functools.partial(self._by_own_class, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @under_one_adapter
    def _by_own_class(self, name: str, *args: Any, **options: Any) -> object:
        """Call a method of the stand-in; rows have the adapters of `adapter_ids`."""
        args, options = self.as_tensors(args, options)
        ids: Any = options.pop(IDS, None)
        stand_in = self._stand_in if ids is None else self._numbered_stand_in(ids)
        return getattr(stand_in, name)(*args, **options)

    @property
    def way(self) -> type[Generates]:
        """The mixin with the forward of the stand-in for the model's own class."""
        return _Sourced

    @property
    def parts(self) -> dict[str, Any]:
        """The attributes that the mixin needs."""
        return {"view": self.view, "step": self.step, "source_encoder": self.source_encoder}

    @property
    def options(self) -> frozenset[str]:
        """The arguments, such as `language`, that only the `generate` of this model's class takes."""
        _, own = type(self._stand_in).__bases__  # the class that calls the graphs, and the model's own class
        given = inspect.signature(own.generate).parameters  # type: ignore[attr-defined]
        return frozenset(given) - set(inspect.signature(GenerationMixin.generate).parameters)

    @cached_property
    def _skeleton(self) -> Any:
        return skeleton(self)

    @cached_property
    def _stand_in(self) -> Any:
        return over_graphs(self._skeleton, self.way, **self.parts, generation_config=self.generation_config)

    def _numbered_stand_in(self, ids: Tensor) -> Any:
        """Return a stand-in for one call, whose rows have adapters of these numbers."""
        rows, source = CallRows(ids), self.source_encoder
        parts = {
            **self.parts,
            "step": rows.beside(self.step),
            "source_encoder": SourceEncoder(rows.beside(source.encode), source.main_input_name),
        }
        return over_graphs(self._skeleton, self.way, **parts, generation_config=self.generation_config)


def _has_own_generate(cls: type) -> bool:
    """Return whether a class has a `generate` other than transformers' common one."""
    return "generate" in vars(cls) and cls is not GenerationMixin


class _Sourced(Buffered, GeneratesFromSource):
    """The forward of a stand-in for a model in ONNX Runtime. The stand-in's own tensors are empty."""


def skeleton(served: Served) -> Any:
    """Build the model's class from its config on torch's meta device, without weights.

    Raises:
        PeftfxError: the config names no class that can generate.
    """
    where, config = str(served.directory / "config.json"), served.config
    assert config is not None
    with understanding(where, "the model's class cannot be built"), torch.device("meta"), without_initial_values():
        made = class_of(served)(config).eval()
    if not made.can_generate():
        raise PeftfxError("this model's class cannot generate", where, "export the model in the forward view")
    return made


def class_of(served: Served) -> type:
    """Return the model's own class, which its config names."""
    assert served.config is not None
    return maker_of(served.config, task_of_directory(served.directory), served.directory)


_PAST_AXIS = "past"  #: the name of the axis that has an entry for each token


def _layers_of(model: OnnxModel, part: str = "") -> tuple[Held, ...]:
    """Return what the layers of a model's cache hold, as its inputs tell."""
    found: dict[int, list[KeptTensor]] = {}
    for name in model.inputs:
        kind, *inner = name.split(".")
        if kind == PAST and inner[1:-1] == ([part] if part else []):
            shape = tuple(size if isinstance(size, int) else None for size in model.axes[name][1:])
            found.setdefault(int(inner[0]), []).append(KeptTensor(inner[-1], shape, ONNX_DTYPES[model.types[name]]))
    return tuple(Held(tuple(found.get(i, ()))) for i in range(max(found, default=-1) + 1))
