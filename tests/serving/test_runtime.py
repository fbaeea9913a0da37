"""The runtime: what an exported directory answers in ONNX Runtime, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
import transformers as hf
from support.command import Result
from support.decoding import Pair, make_pair, prompts
from support.words import word_tokenizer
from support.zoo import ZOO
from torch import nn

from peftfx import PeftfxError, export_onnx, runtime
from peftfx.errors import PeftfxWarning
from peftfx.export import OnnxModel
from peftfx.formats import FROM_MASK, FROM_ONE
from peftfx.serving.call_inputs import counted_positions, fitted, is_default, unfit_size

Run = Callable[..., Result]


def write_tokenizer(directory: Path) -> None:
    words = {"[UNK]": 0, "[PAD]": 1, **{f"w{i}": i for i in range(2, 99)}}
    fast = word_tokenizer(words, unk_token="[UNK]", pad_token="[PAD]", eos_token="w3")
    fast.chat_template = "{% for m in messages %}w9 {{ m['content'] }}{% endfor %}"
    fast.save_pretrained(directory)


def words(tokens: torch.Tensor) -> list[str]:
    """Those that are not special."""
    return [f"w{i}" for i in tokens.tolist() if i > 3]


def exported(model: nn.Module, directory: Path) -> Path:
    def assets(target: Path) -> None:
        model.config.save_pretrained(target)
        write_tokenizer(target)

    export_onnx(model, directory, assets=assets)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    """A LLaMA with an adapter, and the directory that it was exported to."""
    root = tmp_path_factory.mktemp("llama")
    pair = make_pair("llama", root / "adapter")
    pair.ours.export(root / "out", view="decode", assets=pair.ours.base.config.save_pretrained)
    write_tokenizer(root / "out")
    return pair, root / "out"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = ZOO["bert"].build()
    return model, exported(model, tmp_path_factory.mktemp("bert") / "out")


def test_positions_that_a_call_leaves_out_go_on_from_its_past() -> None:
    tokens, mask = torch.zeros(2, 2, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert counted_positions(FROM_ONE, tokens, mask, 3, "here").tolist() == [[4, 5], [4, 5]]
    assert counted_positions(FROM_MASK, tokens, mask, 3, "here").tolist() == [[3, 4], [1, 2]]
    assert counted_positions(FROM_MASK, tokens, None, 3, "here").tolist() == [[3, 4], [3, 4]]


def test_a_tensor_gets_the_dtype_that_a_graph_takes() -> None:
    numbers = torch.tensor([0, 1, 2], dtype=torch.int32)
    assert fitted(numbers, "tensor(bool)").tolist() == [False, True, True]
    assert torch.equal(fitted(numbers, "tensor(int64)"), numbers.long())
    assert fitted(numbers, "tensor(float)") is numbers, "no numbers are made of whole ones"
    assert fitted(numbers.float(), "tensor(float16)").dtype == torch.float16
    assert fitted(numbers.float(), "tensor(bool)").dtype == torch.float32


def test_padding_without_a_mask_is_told(classifier: tuple[nn.Module, Path]) -> None:
    model, directory = classifier
    served = runtime.load(directory)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, model.config.pad_token_id, model.config.pad_token_id]])
    with pytest.warns(PeftfxWarning, match="the text has padding .* and the call has no attention_mask"):
        served(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        served(ids[:1])
        served(ids, attention_mask=(ids != model.config.pad_token_id).long())


def test_a_size_that_a_graph_does_not_take_is_told() -> None:
    axes = {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence"), "pixels": ("batch", 3)}
    limits = "sequence <= 4 (the model takes no other); batch*sequence > 2 (as well)"

    def told(**shapes: tuple[int, ...]) -> str:
        return unfit_size(limits, axes, {name: torch.zeros(shape) for name, shape in shapes.items()})

    assert told(input_ids=(2, 5)) == "sequence is 5, and the graph takes sequence <= 4"
    assert told(input_ids=(2, 4), attention_mask=(2, 3)) == "sequence is 4 in one input, and 3 in attention_mask"
    assert told(pixels=(2, 4)) == "axis 1 of pixels is 4, and the graph takes 3"
    assert told(pixels=(3,)) == "pixels has 1 axes, and the graph takes ['batch', 3]"
    assert told(input_ids=(2, 0)) == "input_ids is [2, 0], without tokens"
    assert told(input_ids=(1, 1)) == ""
    limits = "sequence % 4 <= 0 (as well)"
    assert told(input_ids=(2, 6)) == "sequence is 6, and the graph takes sequence % 4 <= 0"
    assert told(input_ids=(2, 8)) == ""


def test_what_a_graph_does_not_take_must_say_what_holds_without_it(classifier: tuple[nn.Module, Path]) -> None:
    served = runtime.load(classifier[1])
    ids = torch.tensor([[5, 8, 9], [4, 6, 7]])
    counted = torch.arange(3).expand(2, 3)
    assert served(input_ids=ids, position_ids=counted).logits.equal(served(input_ids=ids).logits)
    with pytest.raises(PeftfxError, match="takes no position_ids, and would answer as without it"):
        served(input_ids=ids, position_ids=counted + 1)
    assert is_default("attention_mask", torch.ones(2, 9), "here")
    with pytest.raises(PeftfxError, match="takes no attention_mask") as caught:
        is_default("attention_mask", torch.tensor([[1, 1], [1, 0]]), "here")
    assert "one length" in caught.value.hint


class TestGeneration:
    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3, "num_return_sequences": 3},
            {"do_sample": True, "top_k": 9},
            {"guidance_scale": 1.7, "negative_prompt_ids": torch.tensor([[4, 9, 6]] * 4)},
            pytest.param({"use_cache": False}, marks=pytest.mark.slow),
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_beams_samples_and_no_cache_give_pefts_tokens(self, llama: tuple[Pair, Path], options: dict) -> None:
        pair, directory = llama
        results = []
        for model in (pair.peft, runtime.load(directory)):
            torch.manual_seed(5)
            results.append(model.generate(**prompts(), **{"do_sample": False, **options}, max_new_tokens=12))
        assert torch.equal(*results)

    def test_the_memory_of_the_cache_is_used_again(self, llama: tuple[Pair, Path]) -> None:
        model = runtime.load(llama[1])
        cache, places = model.new_cache(), []
        tokens = prompts(2)["input_ids"]
        for _ in range(12):
            output = model(input_ids=tokens, cache=cache)
            places.append(cache.layers[0].keys.data_ptr())
            tokens = output.logits[:, -1:].argmax(-1)
        assert cache.get_seq_length() == 7 + 11
        assert len(set(places)) <= 5  # two pieces, each grown once or twice: not one for each step

    def test_two_caches_do_not_disturb_each_other(self, llama: tuple[Pair, Path]) -> None:
        model = runtime.load(llama[1])
        texts = [prompts(1, seed=seed)["input_ids"] for seed in (1, 2)]
        caches = [model.new_cache(), model.new_cache()]
        for _ in range(3):
            for i in (0, 1):
                logits = model(input_ids=texts[i][:, caches[i].get_seq_length() :], cache=caches[i]).logits
                texts[i] = torch.cat([texts[i], logits[:, -1:].argmax(-1)], 1)
        options = {"max_new_tokens": 3, "eos_token_id": None, "do_sample": False}
        alone = [model.generate(prompts(1, seed=seed)["input_ids"], **options) for seed in (1, 2)]
        assert all(map(torch.equal, texts, alone))

    def test_transformers_pipeline_takes_it(self, llama: tuple[Pair, Path]) -> None:
        made = runtime.pipeline(llama[1])
        (found,) = made(["w5 w6 w7"], max_new_tokens=4, do_sample=False)
        want = llama[0].peft.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        assert found[0]["generated_text"].endswith(" ".join(words(want[0, 3:])))

    def test_the_command_streams_the_continuation(self, llama: tuple[Pair, Path], peftfx: Run) -> None:
        pair, directory = llama
        result = peftfx("run", directory, "--prompt", "w5 w6 w7", "--max-new-tokens", "6")
        want = pair.peft.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=3)
        assert result.code == 0
        assert result.out.split() == words(want[0, 3:])
        chat = peftfx("run", directory, "--prompt", "w5", "--chat", "--max-new-tokens", "6")
        want = pair.peft.generate(torch.tensor([[9, 5]]), max_new_tokens=6, do_sample=False, eos_token_id=3)
        assert chat.out.split() == words(want[0, 2:])
        samples = [peftfx("run", directory, "-p", "w5", "--temperature", "2", "--seed", s).out for s in (1, 1, 2)]
        assert samples[0] == samples[1] != samples[2]


class TestClassification:
    def test_a_text_classifier_answers_as_transformers_does(
        self,
        classifier: tuple[nn.Module, Path],
        peftfx: Run,
    ) -> None:
        model, directory = classifier
        texts = ["w5 w6", "w7 w8 w9 w10"]
        tokenizer = hf.AutoTokenizer.from_pretrained(directory)
        theirs = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        want = theirs(texts, top_k=2)
        made = runtime.pipeline(directory)
        result = peftfx("run", directory, "--text", texts[0], "--text", texts[1], "--top", "2")
        printed = [json.loads(line) for line in result.out.splitlines()]
        for found in (made(texts, top_k=2), printed):
            assert [[x["label"] for x in row] for row in found] == [[x["label"] for x in row] for row in want]
            for a, b in zip(chain(*found), chain(*want), strict=True):
                assert a["score"] == pytest.approx(b["score"], abs=1e-5)

    def test_an_image_classifier_does_too(self, tmp_path: Path, peftfx: Run) -> None:
        from PIL import Image

        model = ZOO["vit"].build()
        directory = exported(model, tmp_path / "out")
        processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
        processor.save_pretrained(directory)
        image = Image.effect_noise((40, 40), 60).convert("RGB")
        image.save(tmp_path / "noise.png")
        want = hf.pipeline("image-classification", model=model, image_processor=processor, device="cpu")(image)
        result = peftfx("run", directory, "--image", tmp_path / "noise.png")
        assert result.code == 0, result.err
        (found,) = (json.loads(line) for line in result.out.splitlines())
        assert [x["label"] for x in found] == [x["label"] for x in want]
        assert found[0]["score"] == pytest.approx(want[0]["score"], abs=1e-5)

    def test_a_segmenter_counts_its_pixels_and_draws_them(self, tmp_path: Path, peftfx: Run) -> None:
        from PIL import Image

        model = ZOO["segformer"].build()
        directory = exported(model, tmp_path / "out")
        processor = hf.SegformerImageProcessor(size={"height": 32, "width": 32})
        processor.save_pretrained(directory)
        image = Image.effect_noise((50, 40), 60).convert("RGB")
        image.save(tmp_path / "noise.png")
        where = ("--image", tmp_path / "noise.png", "--output", tmp_path / "mask.png")
        result = peftfx("run", directory, *where)
        assert result.code == 0, result.err
        with torch.no_grad():
            output = model(**processor(image, return_tensors="pt"))
        (want,) = processor.post_process_semantic_segmentation(output, target_sizes=[(40, 50)])
        mask = Image.open(tmp_path / "mask.png")
        assert torch.equal(torch.tensor(list(mask.getdata())).view(40, 50), want)
        (told,) = (json.loads(line) for line in result.out.splitlines())
        counts = torch.bincount(want.flatten())
        assert [x["pixels"] for x in told] == sorted((n for n in counts.tolist() if n), reverse=True)
        assert {model.config.label2id[x["label"]]: x["pixels"] for x in told} == {
            i: n for i, n in enumerate(counts.tolist()) if n
        }
        refused = peftfx("run", directory, *where, "--image", tmp_path / "noise.png")
        assert refused.code == 2
        assert "one image" in refused.err
        assert "takes images, not texts" in peftfx("run", directory, "--text", "a street").err

    def test_what_is_not_there_is_said(
        self,
        classifier: tuple[nn.Module, Path],
        tmp_path: Path,
        peftfx: Run,
    ) -> None:
        _, directory = classifier
        assert "run takes exactly one of" in peftfx("run", directory).err
        assert "no such image" in peftfx("run", directory, "--image", tmp_path / "none.png").err
        result = peftfx("run", directory, "--prompt", "w5")
        assert result.code == 2
        assert "no cache, so it cannot generate" in result.err
        assert "image processor" in peftfx("run", directory, "--task", "image-classification", "--image", __file__).err
        shutil.copytree(directory, tmp_path / "bare")
        for path in (tmp_path / "bare").glob("token*"):
            path.unlink()
        assert "no tokenizer" in peftfx("run", tmp_path / "bare", "--text", "w5").err
        with pytest.raises(PeftfxError, match="no such directory"):
            runtime.load(tmp_path / "none")
        with pytest.raises(PeftfxError, match="no cache, so it cannot generate"):
            runtime.load(directory).generate(input_ids=torch.ones(1, 2, dtype=torch.long))
        (tmp_path / "one.onnx_adapter").write_bytes(b"\0\0\0\0TORT")
        with pytest.raises(PeftfxError, match="an adapter for a graph, not a model"):
            runtime.load(tmp_path / "one.onnx_adapter")


def test_a_session_has_the_options_that_it_is_given(llama: tuple[Pair, Path]) -> None:
    _, directory = llama
    plain = ort.SessionOptions()
    plain.intra_op_num_threads = 1
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    given = prompts(3)
    options = {"max_new_tokens": 4, "do_sample": False}
    want = runtime.load(directory).generate(**given, **options)
    assert runtime.load(directory, options=plain).generate(**given, **options).equal(want)
    assert runtime.load(directory, threads=1).generate(**given, **options).equal(want)
    assert sleeps(OnnxModel(directory))
    assert not sleeps(OnnxModel(directory, options=plain))


def sleeps(model: OnnxModel) -> bool:
    """Whether threads with nothing to do sleep."""
    key = "session.intra_op.allow_spinning"
    try:
        return bool(model._session.get_session_options().get_session_config_entry(key) == "0")
    except RuntimeError:  # nobody said
        return False
