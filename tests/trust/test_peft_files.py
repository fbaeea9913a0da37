"""What `peft` writes is read, whatever its keys: the outputs are those of `peft`'s own forward, both ways."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.adapter_files import first, load_peft, same
from support.zoo import TOKENS, ZOO
from tokenizers import Tokenizer, models
from torch import Tensor, nn

import peftfx
from peftfx import LoRA, PeftfxError
from peftfx.export.directories import load_directories
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare


def distilbert() -> nn.Module:
    """A classifier whose two last layers are `pre_classifier` and `classifier`."""
    torch.manual_seed(0)
    sizes = {**TOKENS, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes, num_labels=3)).eval()


def masked(ids: Tensor) -> dict[str, Tensor]:
    """A call with the arguments that the example has which a model is captured with: no other capture is needed."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokens(batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    return masked(torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(batch)))


class TestModulesToSave:
    """`classifier` names every module whose path ends so: DistilBERT's `pre_classifier` is one."""

    @pytest.mark.parametrize("task", [None, "SEQ_CLS"])
    def test_a_distilbert_classifier_crosses_both_ways(self, task: str | None, tmp_path: Path) -> None:
        base, inputs = distilbert(), tokens()
        saved = None if task else ["classifier"]
        config = peft.LoraConfig(task_type=task, r=4, target_modules=["q_lin", "v_lin"], modules_to_save=saved)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "theirs")
        ours = peftfx.load(base, tmp_path / "theirs")
        same(first(ours, inputs), first(theirs, inputs))
        ours.save_pretrained(tmp_path / "ours")
        same(first(load_peft(copy.deepcopy(base), tmp_path / "ours"), inputs), first(theirs, inputs))
        ours.merge()
        same(first(ours.remove(), inputs), first(theirs, inputs))

    def test_names_of_heads_that_the_model_does_not_have_are_passed_over(self, tmp_path: Path) -> None:
        entry = ZOO["llama"]
        base, inputs = entry.build(), entry.inputs(3, 5)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["classifier", "score"])
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path)
        same(first(peftfx.load(base, tmp_path), inputs), first(theirs, inputs))


def llama(**options: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=2, **options)).eval()


@pytest.fixture(scope="module")
def _captured() -> AdaptedModel:
    return bare(llama())


@pytest.fixture
def plain(_captured: AdaptedModel) -> Iterator[AdaptedModel]:
    """`llama()` captured once, without adapters."""
    yield _captured
    _captured.remove()


class TestEmbeddingLayers:
    """`save_embedding_layers=True` writes the base's own embeddings, as `peft` does after a vocabulary was resized."""

    @pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
    @pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
    def test_the_files_embeddings_take_the_bases_place(self, tied: bool, targets: list[str], tmp_path: Path) -> None:
        base, inputs = llama(tie_word_embeddings=tied), masked(torch.tensor([[3, 102, 99, 7, 101]]))
        resized = copy.deepcopy(base)
        resized.resize_token_embeddings(103)
        theirs = peft.get_peft_model(copy.deepcopy(resized), peft.LoraConfig(r=4, target_modules=targets))
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
        with torch.no_grad():  # what a user has: the base with new rows of its own
            resized.get_input_embeddings().weight[99:] = 0
            resized.get_output_embeddings().weight[99:] = 0
        oracle = load_peft(copy.deepcopy(resized), tmp_path / "theirs")
        ours = peftfx.load(resized, tmp_path / "theirs")
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
        same(first(ours, inputs), first(oracle, inputs))
        ours.save_pretrained(tmp_path / "ours")
        same(first(load_peft(copy.deepcopy(resized), tmp_path / "ours"), inputs), first(oracle, inputs))
        ours.merge()
        same(first(ours.remove(), inputs), first(oracle, inputs))

    @pytest.mark.parametrize(
        ("tied", "saved"),
        [
            (False, ["embed_tokens"]),
            (False, ["lm_head"]),
            *((tied, ["embed_tokens", "lm_head"]) for tied in (False, True)),
        ],
        ids=str,
    )
    def test_what_a_trained_copy_was_before_may_be_other_than_the_base(
        self, saved: list[str], tied: bool, tmp_path: Path
    ) -> None:
        """`peft` writes the copy, and what is under it: the rows of new tokens, which no base of a user's has."""
        base, inputs = llama(tie_word_embeddings=tied), masked(torch.tensor([[3, 102, 99, 7, 101]]))
        base.resize_token_embeddings(103)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
        with torch.no_grad():
            base.get_input_embeddings().weight[99:] = 0
            base.get_output_embeddings().weight[99:] = 0
        ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
        same(first(ours, inputs), first(theirs, inputs))
        ours.save_pretrained(tmp_path / "ours")
        same(first(load_peft(base, tmp_path / "ours"), inputs), first(theirs, inputs))

    @pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            {"modules_to_save": ["embed_tokens"]},
            {"trainable_token_indices": [3, 99, 101]},
        ],
        ids=["plain", "both", "one", "rows"],
    )
    def test_a_base_directory_gets_the_tokens_that_the_file_has(
        self, options: dict[str, list[str] | list[int]], tied: bool, tmp_path: Path
    ) -> None:
        base, inputs = llama(tie_word_embeddings=tied), masked(torch.tensor([[3, 102, 99, 7, 101]]))
        base.save_pretrained(tmp_path / "base")
        base.resize_token_embeddings(103)
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        ours = load_directories(tmp_path / "base", {"default": tmp_path / "adapter"})
        same(first(ours, inputs), first(theirs, inputs))

    @pytest.mark.parametrize(
        "options",
        [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}],
        ids=["embedding", "head", "rows"],
    )
    def test_an_embedding_of_the_file_counts_beside_what_is_trained_of_it(
        self, options: dict[str, list[str] | list[int]], tmp_path: Path
    ) -> None:
        base, inputs = llama(tie_word_embeddings=True), masked(tokens()["input_ids"])
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
        randomise(theirs)
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
        with torch.no_grad():
            base.get_input_embeddings().weight.add_(1)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        same(first(peftfx.load(base, tmp_path), inputs), first(theirs.eval(), inputs))

    @pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
    def test_a_base_whose_weights_stay_in_its_files_gets_them_too(self, tied: bool, tmp_path: Path) -> None:
        """A base in bfloat16, computed in float32, is read operator by operator; new rows need a table in memory."""
        base, inputs = llama(tie_word_embeddings=tied).bfloat16(), masked(torch.tensor([[3, 102, 99, 7, 101]]))
        base.save_pretrained(tmp_path / "base")
        base.float().resize_token_embeddings(103)
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        ours = load_directories(tmp_path / "base", {"default": tmp_path / "adapter"}, dtype=torch.float32)
        same(first(ours, inputs), first(theirs, inputs))

    def test_a_file_without_rows_of_the_output_for_new_tokens_is_refused(self, tmp_path: Path) -> None:
        base = llama()
        base.save_pretrained(tmp_path / "base")
        base.resize_token_embeddings(103)
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
        theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        with pytest.raises(PeftfxError, match=r"no rows of the output(.|\n)*save the base that has the new tokens"):
            load_directories(tmp_path / "base", {"default": tmp_path / "adapter"})

    def test_tokens_without_rows_are_told(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        """`peft` leaves new rows out of a file if it does not know the base's own config."""
        base = llama()
        base.save_pretrained(tmp_path / "base")
        peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        for content, token in (("<old>", 98), ("<new>", 99)):
            made = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
            told = {**json.loads(made), "added_tokens": [{"id": token, "content": content}]}
            (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(told))
            load_directories(tmp_path / "base", {"default": tmp_path / "adapter"})
        found = [str(w.message) for w in recwarn if "texts with it fail" in str(w.message)]
        assert len(found) == 1
        assert "'<new>', the token 99, and the embedding has 99 rows" in found[0]

    def test_embeddings_that_are_the_bases_own_are_passed_over(self, plain: AdaptedModel, tmp_path: Path) -> None:
        ours, inputs = plain, tokens()
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, trainable_token_indices=[3, 5]))
        randomise(theirs)
        theirs.eval().save_pretrained(tmp_path, save_embedding_layers=True)
        ours.load_adapter(tmp_path, "default")
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
        same(first(ours, inputs), first(theirs, inputs))

    def test_beside_a_soft_prompt_they_count_too(self, plain: AdaptedModel, tmp_path: Path) -> None:
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(llama(), config)
        randomise(theirs)
        with torch.no_grad():
            theirs.get_output_embeddings().weight.mul_(2)
        theirs.eval().save_pretrained(tmp_path, save_embedding_layers=True)
        plain.load_adapter(tmp_path, "default")
        same(first(plain, tokens()), first(theirs, tokens()))


class TestStarts:
    """How a LoRA began changes nothing of what its file says, but where the base began elsewhere."""

    @pytest.mark.parametrize("how", ["orthogonal", "gaussian", "Gaussian", "eva", "mica", "lora_ga", "pissa_niter_4"])
    def test_a_file_is_read_and_gives_what_peft_gives_with_it(
        self, how: str, plain: AdaptedModel, tmp_path: Path
    ) -> None:
        ours, inputs = plain, tokens()
        started = how if how not in ("eva", "lora_ga") else True  # their start wants data; the config is what differs
        theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, init_lora_weights=started))
        randomise(theirs)
        theirs.peft_config["default"].init_lora_weights = how
        theirs.eval().save_pretrained(tmp_path / "theirs")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.load_adapter(tmp_path / "theirs", "default")
        assert any(how in str(w.message) for w in caught) == (how in ("lora_ga", "pissa_niter_4"))
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
        if how != "pissa_niter_4":  # two runs of its random approximation differ: it is what the warning says
            same(first(ours, inputs), first(theirs, inputs))
        ours.save_pretrained(tmp_path / "ours")
        same(first(load_peft(llama(), tmp_path / "ours"), inputs), first(ours, inputs))

    @pytest.mark.parametrize("how", ["orthogonal", "mica", "pissa_niter_4"])
    def test_a_new_adapter_begins_as_the_base_and_its_file_is_exact(
        self, how: str, plain: AdaptedModel, tmp_path: Path
    ) -> None:
        ours, inputs = plain, tokens()
        ours.add_adapter("default", LoRA(r=4, init_lora_weights=how))
        same(first(ours, inputs), first(ours.base, inputs))
        count = peft.get_peft_model(llama(), peft.LoraConfig(r=4, init_lora_weights=how)).get_nb_trainable_parameters()
        assert ours.get_nb_trainable_parameters()[0] == count[0]
        randomise(ours.adapter("default"))
        ours.save_pretrained(tmp_path)
        want = first(ours, inputs)
        same(first(load_peft(llama(), tmp_path), inputs), want)
        ours.remove()
        ours.load_adapter(tmp_path, "default")
        same(first(ours, inputs), want)

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("eva", "eva starts from activations"),
            ("lora_ga", "lora_ga starts from gradients"),
            ("corda", "corda moves the base's weights"),
            ("loftq", "loftq moves the base's weights"),
            ("orthogonal", "needs an even rank"),
        ],
    )
    def test_what_cannot_begin_here_is_refused_by_name(self, how: str, message: str, plain: AdaptedModel) -> None:
        with pytest.raises(PeftfxError, match=message):
            plain.add_adapter("default", LoRA(r=3, init_lora_weights=how))
