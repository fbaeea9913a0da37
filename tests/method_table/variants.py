"""LoRA's variants in HF PEFT: what each is here. `test_variants.py` holds each to what is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A variant.

    Attributes:
        name: HF PEFT's.
        options: of `peft.LoraConfig`.
        said: what it is here: the whole sentence of the page.
        how: `works` from a new start, as HF PEFT's; `read` from HF PEFT's files alone; `text`, works in models of text
            (`tests/method_table/test_alora.py`); `files`, only its files are taken (`tests/files/test_tied_copies.py`);
            or `refused`.
        told: what the refusal says.
    """

    name: str
    options: Mapping[str, object]
    how: str
    said: str
    told: str = ""

    @property
    def shown(self) -> str:
        """The options in short."""
        return ", ".join(f"`{name}={value!r}`" for name, value in self.options.items())


_EQUAL = "works: HF PEFT's numbers, gradients and files both ways"
_MOVES = "refused: it moves the base's weights, and its file does not say how; HF PEFT's conversion to a LoRA is read"
_FILES = "its files are read, as HF PEFT reads them"
VARIANTS = (
    Variant("DoRA", {"use_dora": True}, "works", _EQUAL),
    Variant("rsLoRA", {"use_rslora": True}, "works", _EQUAL),
    Variant("LoRA+ (an optimizer's), plain start", {"init_lora_weights": True}, "works", _EQUAL),
    Variant("Gaussian", {"init_lora_weights": "gaussian"}, "works", _EQUAL),
    Variant("orthogonal", {"init_lora_weights": "orthogonal"}, "works", _EQUAL),
    Variant("PiSSA", {"init_lora_weights": "pissa"}, "works", _EQUAL),
    Variant(
        "OLoRA", {"init_lora_weights": "olora"}, "works", f"{_EQUAL}; at a Conv1D HF PEFT has the weight's transpose"
    ),
    Variant("MiCA", {"init_lora_weights": "mica"}, "works", _EQUAL),
    Variant(
        "EVA",
        {"init_lora_weights": "eva"},
        "read",
        f"{_FILES}; HF PEFT starts a new one ([how](coming-from-peft.md))",
    ),
    Variant(
        "LoRA-GA",
        {"init_lora_weights": "lora_ga"},
        "read",
        f"{_FILES}; HF PEFT starts a new one ([how](coming-from-peft.md))",
    ),
    Variant(
        *("CorDA", {"init_lora_weights": "corda"}, "refused"),
        _MOVES,
        "moves the base's weights",
    ),
    Variant(
        *("LoftQ", {"init_lora_weights": "loftq"}, "refused"),
        _MOVES,
        "moves the base's weights",
    ),
    Variant(
        *("aLoRA", {"alora_invocation_tokens": [4, 5]}, "text"),
        f"{_EQUAL}, in causal models; exported beside the weights, and merged into none, as in HF PEFT",
    ),
    Variant(
        *("QALoRA", {"use_qalora": True, "qalora_group_size": 8}, "refused"),
        "refused: it is of GPTQ layers alone; a LoRA trains over them (docs/training.md)",
        "GPTQ layers",
    ),
    Variant(
        *("KaSA", {"kasa_config": {}}, "works"),
        f"{_EQUAL}; what it leaves out of the weights is found again",
    ),
    Variant(
        *("VeLoRA", {"velora_config": {"num_groups": 2, "init_type": "random"}}, "refused"),
        "refused: its gradients are approximations; without `velora_config` its file is read as the LoRA that it is",
        "compressed activations",
    ),
    Variant(
        *("MonteCLoRA", {"monteclora_config": {"num_samples": 2}}, "refused"),
        "refused: it draws its factors in training",
        "draws its factors",
    ),
    Variant(
        *("BD-LoRA", {"use_bdlora": {"target_modules_bd_a": [".q"], "match_strict": False, "nblocks": 2}}, "works"),
        _EQUAL,
    ),
    Variant(
        *("layer replication", {"layer_replication": [[0, 1], [0, 2]]}, "refused"),
        "refused: it makes another model; build that, and adapt it",
        "more layers",
    ),
    Variant(
        *("tied copies", {"ensure_weight_tying": True}, "files"),
        "a copy in `modules_to_save` is one for all tied modules: HF PEFT's numbers, training and files both ways. "
        "LoRAs at tied modules are read, exported and saved as HF PEFT's; training them is refused: HF PEFT trains two "
        "over one memory",
    ),
    Variant(
        *("Megatron", {"megatron_config": {"tensor_model_parallel_size": 1}}, "refused"),
        "refused: it is for Megatron's own layers",
        "Megatron's own",
    ),
)
