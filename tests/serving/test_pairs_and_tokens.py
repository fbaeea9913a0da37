"""Re-rankers, models that classify pairs of texts, and labels of tokens, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tokenizers
import torch
import transformers as hf
from support.adapted import randomise
from support.command import Result, assert_refused
from torch import nn

from peftfx.serving.sentences import ServedSentences

Run = Callable[..., Result]
TINY = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXTS = ["w50 w51 w52", "w20 w21", "w70 w71 w72 w73"]


def made(model: nn.Module, root: Path, kind: str, peftfx: Run) -> tuple[nn.Module, Path]:
    """A base with a tokenizer, an adapter of HF PEFT's, and both exported; returns them in torch, too."""
    model.save_pretrained(root / "base")
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 99)}}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="w2 $A w3", pair="w2 $A w3 $B:1 w3:1", special_tokens=[("w2", 2), ("w3", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=own, model_input_names=names, **special)
    fast.save_pretrained(root / "base")
    eager = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["query", "dense"], task_type=kind))
    randomise(eager)
    eager.save_pretrained(str(root / "adapter"))
    result = peftfx("export", "--base", root / "base", "--adapter", root / "adapter", "--output", root / "out")
    assert result.code == 0, result.err
    return eager.eval(), root / "out"


def inputs_of(query: str, text: str) -> dict[str, torch.Tensor]:
    a, b = ([int(word[1:]) for word in t.split()] for t in (query, text))
    ids = torch.tensor([[2, *a, 3, *b, 3]])
    kinds = torch.tensor([[0] * (len(a) + 2) + [1] * (len(b) + 1)])
    return {"input_ids": ids, "token_type_ids": kinds}


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_a_reranker_ranks_texts_by_a_query(activation: str | None, tmp_path: Path, peftfx: Run) -> None:
    torch.manual_seed(0)
    config = hf.BertConfig(**TINY, num_labels=1)
    if activation is not None:  # where sentence-transformers' CrossEncoder keeps it
        config.sentence_transformers = {"activation_fn": activation, "version": "5.0.0"}
    eager, out = made(hf.BertForSequenceClassification(config), tmp_path, "SEQ_CLS", peftfx)
    result = peftfx("run", out, "--query", "w7 w8", *(part for text in TEXTS for part in ("--text", text)))
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in result.out.splitlines()]
    with torch.no_grad():
        want = torch.cat([eager(**inputs_of("w7 w8", text)).logits[:, 0] for text in TEXTS])
    want = want.sigmoid() if activation is None else want
    assert [line["index"] for line in lines] == want.argsort(descending=True).tolist()
    for line in lines:
        assert line["text"] == TEXTS[line["index"]]
        assert line["score"] == pytest.approx(float(want[line["index"]]), abs=1e-5)


def test_a_long_pair_is_cut_where_the_config_ends(tmp_path: Path, peftfx: Run) -> None:
    """As sentence-transformers cuts it, where the tokenizer tells no length."""
    torch.manual_seed(0)
    config = hf.BertConfig(**TINY, num_labels=1, max_position_embeddings=12)
    eager, out = made(hf.BertForSequenceClassification(config), tmp_path, "SEQ_CLS", peftfx)
    words = [f"w{i}" for i in range(10, 40)]
    result = peftfx("run", out, "--query", "w7 w8", "--text", " ".join(words))
    assert result.code == 0, result.err
    with torch.no_grad():
        want = float(eager(**inputs_of("w7 w8", " ".join(words[:7]))).logits.sigmoid())
    assert json.loads(result.out)["score"] == pytest.approx(want, abs=1e-5)


def test_labels_of_tokens_and_of_pairs(tmp_path: Path, peftfx: Run) -> None:
    torch.manual_seed(0)
    names = {0: "O", 1: "B-PER", 2: "I-PER"}
    (tmp_path / "tokens").mkdir()
    config = hf.BertConfig(**TINY, num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    eager, out = made(hf.BertForTokenClassification(config), tmp_path / "tokens", "TOKEN_CLS", peftfx)
    result = peftfx("run", out, "--text", TEXTS[2])
    assert result.code == 0, result.err
    theirs = hf.pipeline(
        "token-classification", model=eager.base_model.model, tokenizer=hf.AutoTokenizer.from_pretrained(out)
    )
    want = theirs(TEXTS[2], aggregation_strategy="simple")
    (found,) = (json.loads(line) for line in result.out.splitlines())
    assert found
    assert [(x["entity_group"], x["word"], x["start"]) for x in found] == [
        (x["entity_group"], x["word"], x["start"]) for x in want
    ]
    assert found[0]["score"] == pytest.approx(float(want[0]["score"]), abs=1e-5)
    assert_refused(peftfx("run", out, "--query", "w5", "--text", "w6"), "neither embeds sentences nor classifies")


def test_a_question_is_answered_by_each_text(tmp_path: Path, peftfx: Run) -> None:
    torch.manual_seed(0)
    eager, out = made(hf.BertForQuestionAnswering(hf.BertConfig(**TINY)), tmp_path, "QUESTION_ANS", peftfx)
    asked = ("run", out, "--query", "w7 w8", *(part for text in TEXTS for part in ("--text", text)))
    lines = [json.loads(line) for line in peftfx(*asked, "--top", 3).out.splitlines()]
    for text, line in zip(TEXTS, lines, strict=True):
        inputs, words = inputs_of("w7 w8", text), text.split()
        with torch.no_grad():
            said = eager.base_model(**inputs)  # `peft` itself gives a model for questions no types of tokens
        start, end = (logits[0, 4 : 4 + len(words)].softmax(0) for logits in (said.start_logits, said.end_logits))
        scores = {(i, j): float(start[i] * end[j]) for i in range(len(words)) for j in range(i, len(words))}
        best = sorted(scores, key=lambda place: -scores[place])[:3]
        assert [one["answer"] for one in line["answers"]] == [" ".join(words[i : j + 1]) for i, j in best]
        torch.testing.assert_close([one["score"] for one in line["answers"]], [scores[place] for place in best])
        assert all(text[one["start"] : one["end"]] == one["answer"] for one in line["answers"])
    assert_refused(peftfx("run", out, "--text", "w5"), "answers a question by a text", "--query QUESTION")


def test_a_long_text_is_read_in_pieces_for_an_answer(tmp_path: Path, peftfx: Run) -> None:
    """An answer near the end of a text is found, with its place in the whole text."""
    torch.manual_seed(0)
    _, out = made(hf.BertForQuestionAnswering(hf.BertConfig(**TINY)), tmp_path, "QUESTION_ANS", peftfx)
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    tokenizer.model_max_length = 12
    tokenizer.save_pretrained(out)
    words = [f"w{i}" for i in range(10, 60)]
    (line,) = peftfx("run", out, "--query", "w7", "--text", " ".join(words), "--top", 400).out.splitlines()
    told = json.loads(line)
    assert {one["answer"] for one in told["answers"]} >= set(words)
    assert all(told["text"][one["start"] : one["end"]] == one["answer"] for one in told["answers"])
    long = peftfx("run", out, "--query", " ".join(words), "--text", "w9")
    assert_refused(long, "the question has 50 tokens, and the model takes 12")


def test_a_reranker_of_sentence_transformers_6_has_its_settings(tmp_path: Path, peftfx: Run) -> None:
    """They have the activation, the prompt that is put before a query, and whether pairs are messages."""
    torch.manual_seed(0)
    config = hf.BertConfig(**TINY, num_labels=1)
    eager, out = made(hf.BertForSequenceClassification(config), tmp_path, "SEQ_CLS", peftfx)
    told = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    told |= {"prompts": {"query": "w9 "}, "default_prompt_name": "query"}
    (out / "config_sentence_transformers.json").write_text(json.dumps(told), encoding="utf-8")

    def scores() -> list[float]:
        result = peftfx("run", out, "--query", "w7 w8", *(part for text in TEXTS for part in ("--text", text)))
        assert result.code == 0, result.err
        lines = sorted((json.loads(line) for line in result.out.splitlines()), key=lambda line: line["index"])
        return [line["score"] for line in lines]

    with torch.no_grad():
        want = [float(eager(**inputs_of("w9 w7 w8", text)).logits) for text in TEXTS]
    torch.testing.assert_close(scores(), want, atol=1e-5, rtol=1e-4)
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    roles = {"system": "w81", "query": "w82", "document": "w83"}
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {roles}[m.role] }}}} {{{{ m.content }}}} {{% endfor %}}"
    tokenizer.save_pretrained(out)
    message = {"modality_config": {"message": {"format": "flat"}}}
    (out / "sentence_bert_config.json").write_text(json.dumps(message), encoding="utf-8")
    with torch.no_grad():
        ids = [torch.tensor([[81, 9, 82, 7, 8, 83, *(int(word[1:]) for word in text.split())]]) for text in TEXTS]
        want = [float(eager(input_ids=row).logits) for row in ids]
    torch.testing.assert_close(scores(), want, atol=1e-5, rtol=1e-4)


def test_each_measure_of_similarity_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    served, (a, b) = ServedSentences.__new__(ServedSentences), torch.randn(2, 6)
    dot, off = a @ b, (a - b).abs()
    told = {"cosine": dot / a.norm() / b.norm(), "dot": dot, "euclidean": -off.norm(), "manhattan": -off.sum()}
    for name, want in told.items():
        monkeypatch.setattr(ServedSentences, "_settings", {"similarity_fn_name": name})
        torch.testing.assert_close(served.similarity(a, b).squeeze(), want, atol=1e-5, rtol=1e-5)
