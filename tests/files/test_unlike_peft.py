"""Where HF PEFT computes something else than peftfx, a warning says so when files are read and written."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from every_model.checks import build
from safetensors.torch import load_file, save_file
from support.adapted import CONVS, Convs, randomise
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxWarning
from peftfx.views.entry import VirtualTokens

pytestmark = pytest.mark.further

X = torch.randn(2, 8, 12, 10)
REASONS = {
    "grouped": ("grouped conv", {"use_dora": True}),
    "dilated": ("dilation", {}),
    "reflected": ("pads with zeros", {}),
}


class Alone(nn.Module):
    """One of the convolutions of `Convs`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, getattr(Convs(), name))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize("name", CONVS)
def test_a_conv_that_peft_computes_otherwise_is_named_on_reading_and_on_writing(name: str, tmp_path: Path) -> None:
    said, options = REASONS[name]
    torch.manual_seed(0)
    base = Alone(name).eval()
    x = torch.randn(2, base.get_submodule(name).in_channels, 12, 10)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=[name], **options)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.warns(PeftfxWarning, match=f"HF PEFT gives other outputs at {name}: .*{said}") as caught:
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs", inputs={"x": x})
    assert caught[0].filename == __file__, "the warning points at the caller's line"
    with pytest.warns(PeftfxWarning, match=f"ours: .* {name}: .*{said}"):
        ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        apart = (ours(x) - theirs(x)).abs().max() / theirs(x).abs().max()
        assert apart > 1e-3, "there is nothing to say"
        if name != "grouped":  # peft cannot merge it
            torch.testing.assert_close(theirs.merge_and_unload()(x), ours(x), atol=1e-5, rtol=1e-5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(ids)))


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"kasa_config": peft.KasaConfig()}])
def test_a_start_that_changes_a_tied_weight_is_told(options: dict[str, object], tmp_path: Path) -> None:
    base, ids = Tied().eval(), torch.randint(12, (2, 5))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["head"], **options)).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.warns(PeftfxWarning, match="HF PEFT gives other outputs at head: .* the other layer that shares it"):
        ours = peftfx.load(base, tmp_path / "theirs", inputs={"ids": ids}).eval()
    with pytest.warns(PeftfxWarning, match="ours: .* head: .* shares it"):
        ours.save_pretrained(tmp_path / "ours")
    assert not torch.allclose(ours(ids), theirs(ids), atol=1e-3), "there is nothing to say"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_nothing_is_said_where_peft_computes_the_same(options: dict[str, object], tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.Conv2d(8, 4, 3, padding_mode="circular"))
    ours = peftfx.transform(base, peftfx.LoRA(r=4, target_modules=["0", "1"], **options), inputs={"input": X[:, :4]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        ours.save_pretrained(tmp_path)
        peftfx.load(base, tmp_path, inputs={"input": X[:, :4]})


@pytest.mark.parametrize("factors", [2, 3])
def test_a_butterfly_that_peft_trained_with_one_factor_is_read_with_one(
    factors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)  # other tests may have given it one
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(ZOO["llama"].build(), config).eval()  # on a CPU peft says that it takes one
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(PeftfxWarning, match=f"boft_n_butterfly_factor={factors}, and the tensors have 1"):
        ours = peftfx.load(ZOO["llama"].build(), tmp_path / "theirs").eval()
    for shape in ((3, 5), (1, 1)):
        ids = torch.randint(3, 20, shape)
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = peftfx.load(ZOO["llama"].build(), tmp_path / "ours")
    assert again.adapter("default").rules[0].boft_n_butterfly_factor == 1
    both = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "ours").eval()
    torch.testing.assert_close(both(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)


def test_inputs_that_pefts_class_does_not_give_are_told(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    base = transformers.BertForQuestionAnswering(config).eval()
    rule = peft.LoraConfig(r=2, target_modules=["query"], task_type="QUESTION_ANS")
    theirs = peft.get_peft_model(copy.deepcopy(base), rule).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.warns(PeftfxWarning, match="peft gives the model no token_type_ids and no position_ids"):
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
    ids = torch.randint(60, (2, 7))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        want = theirs(**call, token_type_ids=torch.ones_like(ids)).start_logits
        torch.testing.assert_close(ours(**call).start_logits, want, rtol=1e-4, atol=1e-5)


def test_the_half_of_a_prompt_of_tasks_that_peft_has_in_training_alone_is_told(tmp_path: Path) -> None:
    base = ZOO["t5"].build().eval()
    rule = peft.MultitaskPromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_tasks=2, num_ranks=2, num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), rule).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.warns(PeftfxWarning, match="half of this prompt before the decoder's text in calls with labels"):
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
    ids, tasks = torch.randint(2, 50, (2, 6)), torch.tensor([1, 0])
    prompts = theirs.get_prompt(batch_size=2, task_ids=tasks)[:, :3]  # as its `generate`
    embedded = torch.cat([prompts, base.get_input_embeddings()(ids)], 1)
    decoder = torch.randint(2, 50, (2, 4))
    with torch.no_grad():
        want = base(inputs_embeds=embedded, decoder_input_ids=decoder).logits
        got = ours(input_ids=ids, decoder_input_ids=decoder, task_ids=tasks).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_prefix_that_peft_lets_the_cross_attention_see_is_told(name: str, tmp_path: Path) -> None:
    """With two submodules `peft` keeps the caches apart: what it gives then is what a prefix gives here."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(ZOO[name].build().config).eval()
    options = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 3}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.PrefixTuningConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.warns(PeftfxWarning, match="HF PEFT gives other outputs under PrefixTuning: .*num_transformer_submod"):
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
    with pytest.warns(PeftfxWarning, match="other outputs under PrefixTuning"):
        ours.save_pretrained(tmp_path / "ours")
    for batch, length in ((2, 6), (1, 4)):
        rng = torch.Generator().manual_seed(batch)
        ids = {n: torch.randint(5, 30, (batch, length), generator=rng) for n in ("input_ids", "decoder_input_ids")}
        with torch.no_grad():
            prefix = transformers.EncoderDecoderCache(theirs.get_prompt(batch), transformers.DynamicCache())
            want = base(**ids, past_key_values=prefix).last_hidden_state
            got, own = ours(**ids).last_hidden_state, theirs(**ids).last_hidden_state
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert float((got - own).norm() / own.norm()) > 1e-3, "there is nothing to say"
    config = peft.PrefixTuningConfig(**options, num_transformer_submodules=2)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "two"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", PeftfxWarning)
        got = peftfx.load(copy.deepcopy(base), tmp_path / "two")(**ids).last_hidden_state
        torch.testing.assert_close(got, theirs(**ids).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        peft.VeraConfig(r=2, target_modules=["0"]),
        peft.RandLoraConfig(r=2, target_modules=["0"]),
        peft.VBLoRAConfig(r=2, num_vectors=4, vector_length=4, topk=2, target_modules=["0"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_tensors_that_layers_share_have_no_layer_in_their_keys(config: peft.PeftConfig, tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(8, 8)), X[0, :, 0, :8]
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        ours = peftfx.load(copy.deepcopy(base), tmp_path, inputs={"input": x})
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_keys_without_the_prefix_of_peft_are_told(tmp_path: Path) -> None:
    """`peft` loads none of them, and computes the base."""
    base, x = nn.Sequential(nn.Linear(8, 8)), X[0, :, 0, :8]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in load_file(file).items()}, file)
    with pytest.warns(PeftfxWarning, match=r"do not begin with 'base_model\.model\.': 0\.lora_A\.weight and 1 more"):
        ours = peftfx.load(copy.deepcopy(base), tmp_path, inputs={"input": x})
    with pytest.warns(UserWarning, match="missing adapter keys"):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x), base(x))
        torch.testing.assert_close(ours(x), theirs(x))


def test_tables_that_pefts_prompt_leaves_out_are_told(tmp_path: Path) -> None:
    """Given embedded tokens, Gemma 3n's code leaves out the rows that each layer has of the tokens."""
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    own = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_hidden_layers": 2}
    config = transformers.Gemma3nTextConfig(
        vocab_size=64, **size, **own, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0]
    )
    torch.manual_seed(0)
    base = transformers.Gemma3nForCausalLM(config).eval()
    randomise(base)  # new, some of its scales are 0
    rule = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), rule).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    said = "HF PEFT gives other outputs under PromptTuning: .* model.embed_tokens_per_layer adds nothing"
    with pytest.warns(PeftfxWarning, match=said):
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
    with pytest.warns(PeftfxWarning, match=said):
        ours.save_pretrained(tmp_path / "ours")
    ids = torch.randint(5, 64, (2, 6))
    entry = ours.entry()
    assert isinstance(entry, VirtualTokens)
    with torch.no_grad():
        embedded = torch.cat([theirs.get_prompt(batch_size=2), base.get_input_embeddings()(ids)], 1)
        tokens = torch.cat([torch.full((2, 3), entry.filler), ids], 1)
        rows = base.model.get_per_layer_inputs(tokens)
        want = base(inputs_embeds=embedded, per_layer_inputs=rows).logits
        got = ours(input_ids=ids).logits
        assert (theirs(input_ids=ids).logits - got).abs().max() > 1e-2, (
            "peft computes the same: there is nothing to say"
        )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_table_that_peft_takes_for_the_models_is_told(tied: bool, tmp_path: Path) -> None:
    """HF PEFT takes the first table with as many rows as the vocabulary. BART with tables apart does not read it."""
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    wide = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = transformers.BartConfig(
        vocab_size=97, encoder_layers=1, decoder_layers=1, **heads, **wide, tie_word_embeddings=tied
    )
    base = transformers.BartForConditionalGeneration(config).eval()
    randomise(base)
    rule = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), rule).eval()
    theirs.save_pretrained(str(tmp_path))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", PeftfxWarning)
        ours = peftfx.load(copy.deepcopy(base), tmp_path)
    told_of = [str(w.message) for w in told if "it embeds the text by model.shared, and the model by" in str(w.message)]
    call = {"input_ids": torch.randint(5, 97, (2, 6)), "decoder_input_ids": torch.randint(5, 97, (2, 4))}
    with torch.no_grad():
        want, got = theirs(**call).logits, ours(**call).logits
    assert torch.allclose(got, want, atol=1e-5) is tied
    assert bool(told_of) is not tied


@pytest.mark.filterwarnings("ignore")
def test_shared_experts_whose_keys_peft_renames_are_read_as_they_were_trained(tmp_path: Path) -> None:
    base = build("text-generation", "laguna")
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["up_proj"])).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    ours = peftfx.load(copy.deepcopy(base), tmp_path)
    ids = torch.tensor([[5, 9, 11, 4]])
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(again(input_ids=ids).logits, want, atol=1e-3), "HF PEFT leaves them out no more"
