"""The functions `transform`, `load`, `inspect` and `plan`: from a model and rules or a directory to an AdaptedModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

from torch import nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.peft_models.plain import carries_peft, is_peft_model, plain_base
from peftfx.errors import CaptureError, PeftfxError, shown, warn
from peftfx.graph.contexts import evaluating
from peftfx.memory.garbage import rarely_collected
from peftfx.methods import methods
from peftfx.model.adapted import AdaptedModel
from peftfx.model.by_name import LoadOptions
from peftfx.model.hosted.hosted_base import refuse_other_road
from peftfx.model.plan import Plan, make_plan
from peftfx.model.refusals import refuse_no_base, refuse_unknown_arguments, refuse_unreadable
from peftfx.model.taken_over import taken_over
from peftfx.options import FORWARD
from peftfx.rules.resolution import as_methods, read_rules
from peftfx.sharding.refusals import refuse_other_wrappings, refuse_trained_by_zero3
from peftfx.sites.sites import Sites
from peftfx.twins.twin import Twin
from peftfx.views.capture import capture
from peftfx.views.finding.named_views import find_view, view_of_sites
from peftfx.views.finding.of_sites.image_text import IMAGE_TEXT
from peftfx.views.finding.of_sites.layers import find_lone_layers
from peftfx.views.view import View


def transform(
    model: nn.Module,
    rules: object = None,
    adapter_name: str = "default",
    *,
    inputs: Mapping[str, object] | None = None,
    seed: int | None = None,
    road: str | None = None,
    peft_config: object = None,
    mixed: bool = False,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
) -> AdaptedModel:
    """Adapt a model by rules. The model's parameters are shared and frozen, never copied; only adapters are trained.

    Args:
        model: any module. A transformers model needs no inputs: they are made from its config and task. The adapters of
            a `peft.PeftModel` are taken over with their names, and the same ones are active. The `peft.PeftModel` does
            not change, and shares the base's tensors: train only one of the two.
        rules: a method, a text such as `"lora(r=8)@attention.query"` (see `peftfx.rules.text`), a `peft` config object,
            or a sequence of them; each says where it applies. Only for a `peft.PeftModel` may rules be left out.
        adapter_name: any valid name of a directory, without dots.
        inputs: keyword arguments of a call, for a model that example inputs cannot be made for.
        seed: the seed of the adapter's random initial values; by default they come from torch's global generator.
        road: how calls are run: with `modules`, by the methods inside the model's own modules; with `graph`, by a
            captured graph. By default calls run the modules, or a graph if no module can host the adapter;
            `AdaptedModel.road` says which.
        peft_config: the rules, by the name that HF PEFT's `get_peft_model` has for them.
        mixed, low_cpu_mem_usage: ignored: adapters of several methods may act together, and no memory is taken twice.
        autocast_adapter_dtype: must be true: an adapter of a base in half precision is made in float32.
        revision: the base's revision on the Hub, for the adapter's saved config.

    Raises:
        PeftfxError: the model cannot be captured, and its code does not run either; a rule matches nothing; or an
            adapter cannot be taken over.

    Examples:
        >>> adapted = peftfx.transform(model, peftfx.LoRA(r=8, target="attention.query | attention.value"))
        >>> adapted.print_trainable_parameters()
        trainable params: ...
    """
    rules = peft_config if rules is None else rules
    if rules is not None:
        rules = read_rules(rules)  # a wrong one is told before a capture
    if is_peft_model(model):
        adapted = taken_over(model, lambda: bare(model, inputs, road))
        if rules is None:
            return adapted
    elif rules is None and isinstance(model, nn.Module) and carries_peft(model):
        what = "this model has layers of peft in it, and is no PeftModel whose adapters can be taken over"
        hint = "save its adapter (save_lora_adapter, save_pretrained), and load the file onto the model without it"
        raise PeftfxError(what, type(model).__name__, hint)
    else:
        adapted = bare(model, inputs, road)
    adapted.add_adapter(adapter_name, rules, seed=seed, autocast_adapter_dtype=autocast_adapter_dtype)
    if revision is not None:
        adapted.adapter(adapter_name).records["revision"] = revision
    return adapted


def load(
    model: nn.Module,
    path: str | Path | None = None,
    adapter_name: str = "default",
    is_trainable: bool = True,
    *,
    inputs: Mapping[str, object] | None = None,
    road: str | None = None,
    config: object = None,
    **options: Unpack[LoadOptions],
) -> AdaptedModel:
    """Adapt a model by a HF PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.

    The adapters of a `peft.PeftModel` are taken over, as by `transform`; `path` is a further adapter, and may be left
    out.

    Args:
        model: the base that the adapter was trained on.
        path: a directory that `save_pretrained` of `peft` or of peftfx wrote.
        adapter_name: the adapter's name in the model.
        is_trainable: whether the adapter is trained. If not, the model is set to eval mode, as in HF PEFT.
        inputs: keyword arguments of one call, for a model that example inputs cannot be made for.
        road: see `transform`.
        config: the adapter's config as HF PEFT's `PeftConfig.from_pretrained` returns it; another one is refused.
        options: further arguments of `AdaptedModel.load_adapter`, such as `subfolder`.

    Raises:
        PeftfxError: there is no such adapter, or it does not fit this model. The message lists every key that is
            missing, unexpected or of another shape.

    Examples:
        >>> adapted = peftfx.load(model, "adapter")
        >>> adapted.active_adapters
        ['default']
    """
    refuse_unknown_arguments(options)
    refuse_no_base(model)
    if path is not None:
        refuse_unreadable(Path(path) / (options.get("subfolder") or ""), config)
    elif not is_peft_model(model):
        hint = "pass the directory of an adapter; it may be left out for a peft.PeftModel, which has its own"
        raise PeftfxError("no adapter is named", "path", hint)
    if is_peft_model(model):
        adapted = taken_over(model, lambda: bare(model, inputs, road))
    else:
        adapted = bare(model, inputs, road)
    if path is None:
        return adapted
    adapted.named.refuse(adapter_name)
    adapted.load_adapter(path, adapter_name, is_trainable, **options)
    return adapted


def inspect(model: nn.Module, *, inputs: Mapping[str, object] | None = None) -> Sites:
    """Return the sites of a model: where adapters can act, each with the role that the dataflow gives.

    Args:
        model: any module; a transformers model may have meta or fake tensors.
        inputs: keyword arguments of one call, for a model that example inputs cannot be made for.

    Raises:
        PeftfxError: the model cannot be captured, and its code does not run either; or it needs `inputs`.

    Examples:
        >>> peftfx.inspect(model).by_path("model.layers.0.mlp.up_proj").role
        'mlp.up'
    """
    return bare(model, inputs).sites


def plan(model: nn.Module, rules: object, *, inputs: Mapping[str, object] | None = None) -> Plan:
    """Return what `transform` would do with these rules: sites, numbers of parameters, and why sites are skipped.

    Args:
        model: any module; it is not changed.
        rules: as for `transform`.
        inputs: keyword arguments of one call, for a model that example inputs cannot be made for.

    Examples:
        >>> plan = peftfx.plan(model, "lora(r=4)@attention.query")
        >>> print(plan)
        lora(r=4)@attention.query: 512 parameters
        ...
    """
    rules = read_rules(rules)
    adapted = bare(model, inputs)
    methods = as_methods(rules, adapted.source)
    adapted.widen_for(methods)
    return make_plan(adapted.source, adapted.sites, methods)


@rarely_collected()
def bare(
    model: nn.Module, inputs: Mapping[str, object] | None = None, road: str | None = None, view: str = FORWARD
) -> AdaptedModel:
    """Capture a model and find its sites; return the adapted model, which has no adapters yet.

    If the model's code cannot be captured but runs, each of its layers is captured by itself. Such a model is trained,
    saved and merged by its own modules, and cannot be exported: a warning says so. It is refused on the graph road.

    Args:
        model: any module; of a `peft.PeftModel` the base.
        inputs, road: see `transform`.
        view: the name of the view that is captured. If another view than the forward will be used, its sites are the
            same, and no call of the forward has to be captured.
    """
    refuse_no_base(model)
    refuse_other_road(road)
    model = plain_base(model) if is_peft_model(model) else model
    if inputs is not None and not isinstance(inputs, Mapping):
        raise PeftfxError(f"not the arguments of a call: {shown(inputs)}", "inputs", "pass a dict, by their names")
    refuse_other_wrappings(model)
    refuse_trained_by_zero3(model)
    methods()  # loads the methods of other packages, so that their patterns are searched for
    example = example_inputs(model) if inputs is None else inputs
    twin = Twin(model)
    with evaluating(model):
        name = view_of_sites(model) if view == FORWARD and inputs is None else view
        own = find_view(twin.module, name)
        given = example if own is None else own.inputs(twin.module)
        whole: str | View = IMAGE_TEXT if name == IMAGE_TEXT else FORWARD
        try:
            graph = capture(twin.module, given, axes=None if own is None else own.axes, call=own)
        except CaptureError as error:
            layers = find_lone_layers(model, twin.module, example) if road != "graph" else None
            if layers is None:
                raise
            whole, own, given, road = layers, layers, layers.inputs(twin.module), "modules"
            try:
                graph = capture(twin.module, given, axes=own.axes, call=own)
            except CaptureError:
                raise error from error.__cause__
            warn(f"this model can be trained, saved and merged, but not exported: {error.what}")
    adapted = AdaptedModel.on(model, graph.sites, example, road, twin)
    adapted.whole = whole
    with evaluating(model):
        adapted.graphs.base = twin.module
        adapted.graphs.keep(graph, given, own)
    return adapted
