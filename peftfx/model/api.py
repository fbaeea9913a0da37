"""transform, load, inspect, plan: a model and rules, or a model and a HF PEFT directory, become an AdaptedModel."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from peftfx.adapters.files.swap import swap_file, swap_state
from peftfx.adapters.files.writer import config_and_tensors
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.peft_model import active_adapters, is_peft_model, plain_base, save_peft_adapters
from peftfx.errors import PeftfxError, shown
from peftfx.graph.contexts import evaluating
from peftfx.methods import methods
from peftfx.model.adapted import AdaptedModel
from peftfx.model.plan import Plan, make_plan
from peftfx.sharding import refuse_other_wrappings, refuse_zero3
from peftfx.sites.sites import Sites
from peftfx.twins.twin import Twin
from peftfx.views.capture import capture


def transform(
    model: nn.Module,
    rules: object = None,
    adapter_name: str = "default",
    *,
    inputs: Mapping[str, object] | None = None,
    seed: int | None = None,
    road: str | None = None,
) -> AdaptedModel:
    """Adapt a model by rules. Its parameters are shared and frozen, never copied; only the adapter's are trained.

        adapted = peftfx.transform(model, peftfx.LoRA(r=8, target="attention.query | attention.value"))

    Args:
        model: any module. A transformers model needs no inputs: they are made from its config and task. Of a
            `peft.PeftModel` the adapters are taken over, by their names, and those that are active are so here. It
            stays what it is, and shares the base's tensors: train one of the two.
        rules: a method, a text as `"lora(r=8)@attention.query"` (see `peftfx.rules.text`), a `peft` config object, or
            a sequence of them; each says where it applies. May be left out for a `peft.PeftModel` alone.
        adapter_name: any valid name of a directory, without dots.
        inputs: keyword arguments of a call, for a model that example inputs cannot be made for.
        seed: of the adapter's random initial values; by default they come from torch's global generator.
        road: how calls are run: `modules`, by the methods inside the model's own modules, or `graph`, by a captured
            graph. By default the modules, and a graph where no module can host the adapter; `AdaptedModel.road` says
            which.

    Raises:
        PeftfxError: the model cannot be captured, a rule matches nothing, or an adapter cannot be taken over.
    """
    if is_peft_model(model):
        adapted = _taken_over(model, inputs, road)
        if rules is None:
            return adapted
    else:
        adapted = bare(model, inputs, road)
    adapted.add_adapter(adapter_name, rules, seed=seed)
    return adapted


def load(
    model: nn.Module,
    path: str | Path | None = None,
    adapter_name: str = "default",
    *,
    inputs: Mapping[str, object] | None = None,
    road: str | None = None,
) -> AdaptedModel:
    """Adapt a model by a HF PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.

    `road` says how calls are run, as in `transform`. Of a `peft.PeftModel` the adapters are taken over, as there;
    `path` is one more, and may be left out.

    Args:
        model: the base that the adapter was trained on.
        path: a directory that `save_pretrained` wrote, of `peft` or of peftfx.
        adapter_name: what it is called here.
        inputs: keyword arguments of one call, for a model that example inputs cannot be made for.
        road: see `transform`.

    Raises:
        PeftfxError: there is no such adapter, or it is not for this model: every key that is missing, unexpected or of
            another shape is listed.
    """
    if is_peft_model(model):
        adapted = _taken_over(model, inputs, road)
        if path is None:
            return adapted
    elif path is None:
        hint = "pass the directory of an adapter; it may be left out for a peft.PeftModel, which has its own"
        raise PeftfxError("no adapter is named", "path", hint)
    else:
        adapted = bare(model, inputs, road)
    adapted.load_adapter(path, adapter_name)
    return adapted


def _taken_over(model: nn.Module, inputs: Mapping[str, object] | None, road: str | None) -> AdaptedModel:
    """A HF PEFT model's base and adapters."""
    with tempfile.TemporaryDirectory(prefix="peftfx-taken-over-") as folder:
        folders = save_peft_adapters(model, Path(folder))
        adapted = bare(plain_base(model), inputs, road)
        for name, own in folders.items():
            adapted.load_adapter(own, name)
    adapted.set_adapter(active_adapters(model))
    return adapted


def inspect(model: nn.Module, *, inputs: Mapping[str, object] | None = None) -> Sites:
    """The sites of a model: where adapters can act, with the role that the dataflow gives each.

    Args:
        model: any module; of a transformers model, meta and fake tensors will do.
        inputs: keyword arguments of one call, for a model that example inputs cannot be made for.

    Raises:
        PeftfxError: the model cannot be captured, or needs `inputs`.
    """
    return bare(model, inputs).sites


def plan(model: nn.Module, rules: object, *, inputs: Mapping[str, object] | None = None) -> Plan:
    """What `transform` would do with these rules: where each acts, how many parameters, why a site is skipped.

    Args:
        model: any module; it is not changed.
        rules: as for `transform`.
        inputs: keyword arguments of one call, for a model that example inputs cannot be made for.
    """
    adapted = bare(model, inputs)
    return make_plan(adapted.source, adapted.sites, rules)


def bare(model: nn.Module, inputs: Mapping[str, object] | None = None, road: str | None = None) -> AdaptedModel:
    """A model captured, its sites found, without adapters yet."""
    if not isinstance(model, nn.Module):
        raise PeftfxError(f"not a model: {shown(model)}", "model", "pass a torch module, as from_pretrained gives")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise PeftfxError(f"not the arguments of a call: {shown(inputs)}", "inputs", "pass a dict, by their names")
    refuse_other_wrappings(model)
    refuse_zero3(model, "its sites can be found no more", "adapt it ahead of deepspeed.initialize and of zero.Init")
    methods()  # of other packages, whose patterns are searched for
    example = example_inputs(model) if inputs is None else inputs
    twin = Twin(model)
    with evaluating(model):
        graph = capture(twin.module, example)
    adapted = AdaptedModel.on(model, graph.sites, example, road, twin)
    with evaluating(model):
        adapted.graphs.base = twin.module
        adapted.graphs.keep(graph, example)
    return adapted


def get_peft_model_state_dict(model: AdaptedModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """The tensors of an adapter by their names in HF PEFT's file, as `peft.get_peft_model_state_dict` gives them.

    Args:
        model: the adapted model.
        adapter_name: the adapter's.
    """
    with model.plain():
        return config_and_tensors(model.source, model.adapter(adapter_name))[1]


def set_peft_model_state_dict(
    model: AdaptedModel, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Give an adapter the tensors of such a state, in place.

    Args:
        model: the adapted model.
        peft_model_state_dict: tensors by their names in HF PEFT's file, as `get_peft_model_state_dict` gives them.
        adapter_name: the adapter that gets them.

    Raises:
        PeftfxError: the state is not of this adapter: keys are missing or unexpected, or of another shape.
    """
    model.named.apart("an adapter gets other values")
    swap_state(model.source, model.sites, model.adapter(adapter_name), peft_model_state_dict)


def hotswap_adapter(model: AdaptedModel, path: str | Path, adapter_name: str = "default") -> None:
    """Give an adapter the tensors of a HF PEFT directory, in place: a compiled model is not compiled again.

    Args:
        model: the adapted model.
        path: a HF PEFT directory, of an adapter with the same places, ranks and options.
        adapter_name: the adapter that gets its tensors.

    Raises:
        PeftfxError: that adapter differs from this one in places, ranks or options, or is not for this model.
    """
    model.named.apart("an adapter gets other values")
    swap_file(model.source, model.sites, model.adapter(adapter_name), Path(path))
