"""The options of HF PEFT's LoRA that are refused, with the reasons."""

from __future__ import annotations

from peftfx.contract.common.lora.starts import Start
from peftfx.contract.method import Method
from peftfx.errors import PeftfxError
from peftfx.sites.site import Site

_AT_LAYERS = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora", "use_bdlora", "kasa_config")
#: Fields of HF PEFT's config that make a LoRA which peftfx refuses: why, and what to do.
REFUSED = {
    "arrow_config": "Arrow mixes several LoRAs by each token, and no weight does that; make one LoRA active at a time",
    "layer_replication": "it makes a model of more layers than the base has; build that model, and adapt it",
    "megatron_config": "it is for Megatron's own parallel layers; merge it with peft",
    "monteclora_config": "MonteCLoRA draws its factors in training from distributions that its file has beside them; "
    "merge it with peft",
    "use_qalora": "QALoRA reads means of groups of inputs of GPTQ layers, and of other layers HF PEFT makes a LoRA; "
    "train a LoRA over the quantised base in its place (docs/training.md)",
    "velora_config": "VeLoRA trains by gradients of compressed activations, and its file is a LoRA's; "
    "take velora_config out of adapter_config.json: it is that LoRA, and goes on by exact gradients",
}


def refuse_together(dora: bool, invocation: object, blocks: object, kasa: object) -> None:
    """Refuse several variants of LoRA in one rule, as HF PEFT does."""
    given = {"use_dora": dora or None, "alora_invocation_tokens": invocation, "use_bdlora": blocks, "kasa_config": kasa}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        what = f"{' and '.join(names)} are variants of LoRA of which a rule has one"
        raise PeftfxError(what, names[0], "leave all but one out")


def for_layers_alone(rule: Method, start: Start) -> list[str]:
    """Return the options of a rule that HF PEFT has only for layers."""
    wrong = [name for name in _AT_LAYERS if getattr(rule, name)]
    return wrong if start in (True, False, "gaussian", "eva") else [*wrong, f"init_lora_weights={start!r}"]


def refuse_on_parameters(site: Site, rule: Method, start: Start) -> None:
    """Refuse options that HF PEFT has only for layers, where a rule names a bare parameter."""
    if wrong := for_layers_alone(rule, start):
        hint = "leave it out, or give the parameters a rule of their own"
        what = f"a LoRA on a bare parameter (target_parameters) cannot have {', '.join(wrong)}"
        raise PeftfxError(what, site.path, hint)
