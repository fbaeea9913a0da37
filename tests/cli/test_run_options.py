"""`peftfx run` respects what it is asked for, and refuses options that this run would ignore."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.command import Result, assert_refused
from support.words import word_tokenizer

from peftfx.export.command import export_directory

Run = Callable[..., Result]
WORDS = ["[UNK]", "[PAD]", "</s>", "abcdef", *(f"w{i}" for i in range(4, 40))]
SIZES = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 20,
}


def with_tokenizer(model: hf.PreTrainedModel, root: Path, template: str | None = None) -> Path:
    """Save a model of random weights with a tokenizer of a few words."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.7 * torch.randn(value.shape))
    model.eval().save_pretrained(root)
    fast = word_tokenizer(WORDS, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[hf.PreTrainedModel, Path, Path]:
    """A LLaMA, and its exports in the decode view and in the forward view."""
    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, **SIZES, max_position_embeddings=64))
    base = with_tokenizer(model, root / "base")
    for view in ("decode", "forward"):
        export_directory(base, root / view, view=view)
    return model, root / "decode", root / "forward"


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[hf.PreTrainedModel, Path]:
    """A BART with 20 learned positions, and its export."""
    root = tmp_path_factory.mktemp("bart")
    torch.manual_seed(0)
    model = hf.BartForConditionalGeneration(
        hf.BartConfig(**BART, **SIZES, decoder_start_token_id=2, forced_eos_token_id=None)
    )
    base = with_tokenizer(model, root / "base")
    export_directory(base, root / "out", view="decode")
    return model, root / "out"


def configured(directory: Path, target: Path, **fields: object) -> Path:
    """A copy of an export whose generation config has these fields."""
    target.mkdir()
    for path in directory.iterdir():
        if path.name != "generation_config.json":
            (target / path.name).symlink_to(path)
    source = directory / "generation_config.json"
    own = json.loads(source.read_text(encoding="utf-8"))
    (target / source.name).write_text(json.dumps({**own, **fields}), encoding="utf-8")
    return target


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


def said(model: Any, text: str, **options: object) -> str:
    """What transformers' `generate` continues a text with."""
    begins = ids(text)
    tokens = model.generate(begins, attention_mask=torch.ones_like(begins), do_sample=False, **options)[0]
    new = tokens[1 if model.config.is_encoder_decoder else begins.shape[1] :]
    return " ".join(WORDS[i] for i in new.tolist() if i not in (0, 1, 2))


class TestTextsAreContinued:
    def test_as_prompts_are(self, llama: tuple[hf.PreTrainedModel, Path, Path], peftfx: Run) -> None:
        model, directory, _ = llama
        result = peftfx("run", directory, "--text", "w5 w6", "--text", "w7", "--max-new-tokens", 5)
        assert result.code == 0, result.err
        assert result.out.splitlines() == [said(model, text, max_new_tokens=5) for text in ("w5 w6", "w7")]
        sampling = ("--temperature", "2", "--max-new-tokens", "9", "--seed")
        outs = [
            peftfx("run", directory, kind, "w5 w6", *sampling, seed).out
            for kind, seed in (("--text", "3"), ("--prompt", "3"), ("--text", "4"))
        ]
        assert outs[0] == outs[1] != outs[2]

    def test_of_an_encoder_decoder(self, bart: tuple[hf.PreTrainedModel, Path], peftfx: Run) -> None:
        model, directory = bart
        result = peftfx("run", directory, "--text", "w5 w6", "--max-new-tokens", 5, "--json")
        want = said(model, "w5 w6", max_new_tokens=5)
        assert json.loads(result.out) == {"prompt": "w5 w6", "text": want}

    def test_not_in_the_forward_view(self, llama: tuple[hf.PreTrainedModel, Path, Path], peftfx: Run) -> None:
        assert_refused(peftfx("run", llama[2], "--text", "w5"), "has no cache", "--view decode", "--prompt")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--prompt", "w5", "--task", "text-classification"), ("not the task text-classification", "--text")),
        (("--prompt", "w5", "--task", "ner"), ("not the task ner",)),
        (("--prompt", "w5", "--language", "de"), ("--language has no effect",)),
        (("--prompt", "w5", "--timestamps"), ("--timestamps has no effect",)),
        (("--prompt", "w5", "--top", "5"), ("--top has no effect",)),
        (("--text", "w5", "--translate"), ("--translate has no effect",)),
        (("--text", "w5", "--task", "feature-extraction"), ("logits, and no features", "--task feature-extraction")),
        (("--text", "w5", "--task", "fill-mask"), ("no pipeline for this", "mask_token")),
        (("--text", "w5", "--output", "a.png"), ("--output is only for the segments",)),
        (("--prompt", "w5", "--seed", "9" * 30), ("--seed is 9", "too large for torch")),
        (("--prompt", "w5", "--seed", "3"), ("--seed has no effect", "--temperature")),
        (("--prompt", "w5", "--chat"), ("the tokenizer has no chat template",)),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_what_has_no_effect_is_refused(
    given: tuple[str, ...], told: tuple[str, ...], llama: tuple[hf.PreTrainedModel, Path, Path], peftfx: Run
) -> None:
    assert_refused(peftfx("run", llama[1], *given), *told)


def test_a_task_that_continues_a_prompt_may_be_named(llama: tuple[hf.PreTrainedModel, Path, Path], peftfx: Run) -> None:
    result = peftfx("run", llama[1], "--prompt", "w5", "--task", "text-generation", "--max-new-tokens", 3)
    assert (result.code, result.out.strip()) == (0, said(llama[0], "w5", max_new_tokens=3))


class TestGenerationConfigs:
    def test_beams_are_written_at_the_end(
        self, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run
    ) -> None:
        model, directory, _ = llama
        out = configured(directory, tmp_path / "out", num_beams=3)
        want = said(model, "w5 w6", max_new_tokens=8, num_beams=3)
        assert peftfx("run", out, "--prompt", "w5 w6", "--max-new-tokens", 8).out.strip() == want
        told = json.loads(peftfx("run", out, "--prompt", "w5 w6", "--max-new-tokens", 8, "--json").out)
        assert told["text"] == want
        sampled = configured(directory, tmp_path / "sampled", num_return_sequences=2, do_sample=True)
        result = peftfx("run", sampled, "--prompt", "w5 w6", "--max-new-tokens", 8, "--temperature", 1)
        assert (result.code, len(result.out.splitlines())) == (0, 1)

    def test_a_string_stops(self, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run) -> None:
        model, directory, _ = llama
        words = said(model, "w5 w6", max_new_tokens=12).split()
        stop = next(word for word in words[2:] if word not in words[:2])
        out = configured(directory, tmp_path / "out", stop_strings=[f" {stop}"])
        result = peftfx("run", out, "--prompt", "w5 w6", "--max-new-tokens", 12)
        assert result.out.split() == words[: words.index(stop) + 1], result.err

    def test_what_transformers_left_is_refused(
        self, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run
    ) -> None:
        out = configured(llama[1], tmp_path / "out", penalty_alpha=0.6, top_k=4)
        refused = peftfx("run", out, "--prompt", "w5 w6")
        assert_refused(refused, "cannot generate with this generation config", "Contrastive Search", "change the file")

    @pytest.mark.parametrize("kind", ["static", "offloaded"])
    def test_a_kind_of_cache_is_ignored_and_told(
        self, kind: str, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run
    ) -> None:
        out = configured(llama[1], tmp_path / "out", cache_implementation=kind)
        result = peftfx("run", out, "--prompt", "w5 w6", "--max-new-tokens", 5)
        assert (result.code, result.out.strip()) == (0, said(llama[0], "w5 w6", max_new_tokens=5))
        assert f"a cache of the kind '{kind}': it is ignored" in result.err
        usual = configured(llama[1], tmp_path / "usual", cache_implementation="hybrid")
        assert "cache" not in peftfx("run", usual, "--prompt", "w5 w6", "--max-new-tokens", 5).err

    @pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "return_dict_in_generate"])
    def test_outputs_that_graphs_do_not_give_are_ignored_and_told(
        self, asked: str, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run
    ) -> None:
        """A config with `output_hidden_states` puts both into what is saved: each call was refused."""
        out = configured(llama[1], tmp_path / "out", **{asked: True, "return_dict_in_generate": True})
        result = peftfx("run", out, "--prompt", "w5 w6", "--max-new-tokens", 5)
        assert (result.code, result.out.strip()) == (0, said(llama[0], "w5 w6", max_new_tokens=5)), result.err
        assert (f"asks for {asked}: it is ignored" in result.err) == asked.startswith("output_")

    def test_its_limits_hold_if_no_number_is_given(
        self, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run
    ) -> None:
        model, directory, _ = llama
        for name, fields in (("new", {"max_new_tokens": 5}), ("whole", {"max_length": 7})):
            out = configured(directory, tmp_path / name, **fields)
            assert peftfx("run", out, "--prompt", "w5 w6").out.strip() == said(model, "w5 w6", max_new_tokens=5)
            longer = peftfx("run", out, "--prompt", "w5 w6", "--max-new-tokens", 9)
            assert longer.out.strip() == said(model, "w5 w6", max_new_tokens=9)


def test_a_text_ends_where_learned_positions_do(
    bart: tuple[hf.PreTrainedModel, Path], tmp_path: Path, peftfx: Run
) -> None:
    model, directory = bart
    result = peftfx("run", directory, "--prompt", "w5 w6")
    assert result.code == 0, result.err
    assert result.out.strip() == said(model, "w5 w6", max_length=20)
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, **SIZES)
    decoder = hf.GPT2LMHeadModel(config)
    export_directory(with_tokenizer(decoder, tmp_path / "base"), tmp_path / "out", view="decode")
    result = peftfx("run", tmp_path / "out", "--prompt", "w5 w6 w7")
    assert result.code == 0, result.err
    assert result.out.strip() == said(decoder, "w5 w6 w7", max_length=16)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
    ],
    ids=["raises", "spelled"],
)
def test_a_chat_template_that_fails_is_told(
    template: str, told: str, llama: tuple[hf.PreTrainedModel, Path, Path], tmp_path: Path, peftfx: Run
) -> None:
    out = configured(llama[1], tmp_path / "out")
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    refused = peftfx("run", out, "--prompt", "w5", "--chat")
    assert_refused(refused, "the chat template cannot be filled", told, "leave --chat out")
