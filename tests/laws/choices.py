"""Options of the package's methods whose values their type does not tell, by HF PEFT type: what the laws draw from."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import settings

from peftfx.testing.cases import Choices

WHOLE = "whole"  #: the profile of hypothesis in which laws have all of their examples

CHOICES: Mapping[str, Choices] = {
    "LORA": {
        "init_lora_weights": (True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica"),
        "alora_invocation_tokens": (None,),  # of text; tests/method_table/test_alora.py
        **dict.fromkeys(("use_bdlora", "kasa_config"), (None,)),  # of linear layers; tests/method_table/variants.py
        "rank_pattern": ({}, {"words": 4, "head": 4, r"blocks\.0\.\w+": 4}),
        "alpha_pattern": ({}, {"0": 5.0, "o|up|conv": 3.0}),
    },
    "ADALORA": {
        "rank_pattern": ({}, {f"{path}.lora_E": (True, False) * 6 for path in ("blocks.0", "head")}),
        "total_step": (None, 20),
        **dict.fromkeys(("beta1", "beta2"), (0.5, 0.85)),
    },
    "IA3": {"feedforward_modules": (None, (), ".*", ("o", "0", "head"))},
    "ADAPTION_PROMPT": {"adapter_layers": (None,)},
    "TRAINABLE_TOKENS": {"token_indices": ((0, 2), (1,))},
    "LOHA": {"rank_pattern": ({}, {"words|head": 4}), "alpha_pattern": ({}, {"0": 5.0})},
    "MISS": {"r": (2, 4), "init_weights": (True, False, "mini", "bat")},
    "FOURIERFT": {"n_frequency": (5, 12), "random_loc_seed": (777, 3), "n_frequency_pattern": ({}, {"head|0": 7})},
    "C3A": {"block_size": (4, 2, 1), "block_size_pattern": ({}, {"head|0": 1})},
    "HIRA": {"rank_pattern": ({}, {"words|head": 4})},
    "LOKR": {
        "init_weights": (True, False, "lycoris"),
        "decompose_factor": (-1, 2, 4),
        "rank_pattern": ({}, {"words|head": 4}),
        "alpha_pattern": ({}, {"0": 5.0}),
    },
    "OFT": {"r": (0,), "oft_block_size": (4, 2), "coft": (False,)},
    "BOFT": {"boft_block_size": (4, 2), "boft_block_num": (0,), "boft_n_butterfly_factor": (1, 2, 3)},
    "ROAD": {"group_size": (2, 4)},
    "SHIRA": {"r": (1,), "mask_type": ("random",), "random_seed": (None, 3)},
    "DEFT": {"alpha": (None, 5), "init_scale": (1.0,)},
    "SUPERTUNING": {"sparsity": (0.5, 0.8), "r": (None, 2), "lora_alpha": (None,)},
    "VBLORA": {"vector_length": (1, 2, 4), "num_vectors": (5, 9)},
    "UNILORA": {"theta_d_length": (7, 40)},
    "TINYLORA": {"weight_tying": (0.0, 0.5), "u": (3,), "init_weights": (True, False, "uniform")},
    "FROD": {"sparse_rate": (0.0, 0.1), "regularization_alpha": (0.001,)},
    "CPT": {"num_virtual_tokens": (0,), "cpt_token_ids": ((3,), (3, 4)), "opt_loss_decay_factor": (0.9,)},
    "DELORA": {"rank_pattern": ({}, {"words|head": 4}), "lambda_pattern": ({}, {"0": 5.0})},
    "GRALORA": {"r": (2, 4), "gralora_k": (1, 2)},
    "RANDLORA": {"r": (2, 3), "randlora_alpha": (3.0, 4.0), "projection_prng_key": (0, 3)},
    "PEANUT": {"act_fn": ("relu", "gelu", "silu"), "depth": (0, 2)},
    "OSF": {"effective_rank": (None, 2, 0.25), "rank_pattern": (None, {"0": 3})},
    "WAVEFT": {
        "n_frequency": (5, 12),
        "wavelet_family": ("db1", "db3"),
        "n_frequency_pattern": ({}, {"head|0": 7}),
    },
    "PSOFT": {"r": (1, 2, 3), "random_seed": (0, 3), "cayley_neumann_eps": (None, 0.5)},
    "ADAMSS": {
        "r": (3, 100),
        "init_weights": ("orthogonal", None),
        "use_asa": (False,),
        **dict.fromkeys(("init_warmup", "final_warmup", "mask_interval", "asa_target_subspaces"), (5,)),
    },
    "POLY": {"n_tasks": (1,), "n_splits": (1, 2), "poly_type": ("poly",)},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": (1,), "prompt_tuning_init": ("RANDOM", "SAMPLE_VOCAB")},
    "LILY": {"num_B": (2, 3), "stride_A": (1, 2)},
    "PROMPT_TUNING": {"prompt_tuning_init": ("RANDOM", "SAMPLE_VOCAB")},
}


def whole() -> bool:
    """Whether this run is one of all examples."""
    return settings.get_current_profile_name() == WHOLE
