"""Base directories: what is no model is refused by name, and what an export tells is its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.assets import copy_assets
from peftfx.export.command import export_directory
from peftfx.export.directories import load_directories

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, max_position_embeddings=32))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def restore(base: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Store a base's tensors anew."""
    path = base / "model.safetensors"
    save_file({n: change(n, t) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})


class TestWeightsThatAreNoNumbers:
    @pytest.mark.parametrize(
        ("dtype", "text"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.bool, "BOOL")], ids=str
    )
    def test_a_base_without_one_in_floating_point_is_refused(
        self, dtype: torch.dtype, text: str, base: Path, tmp_path: Path
    ) -> None:
        restore(base, lambda _, tensor: (tensor * 100).to(dtype))
        with pytest.raises(PeftfxError, match=f"no floating-point weights: all tensors are {text}"):
            export_directory(base, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_so_is_a_file_of_none(self, base: Path) -> None:
        save_file({}, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PeftfxError, match="no floating-point weights: there is no tensor"):
            load_base(base)

    def test_so_is_one_weight_that_is_stored_as_integers(self, base: Path) -> None:
        restore(base, lambda name, t: (t * 100).to(torch.int8) if "up_proj" in name else t)
        with pytest.raises(PeftfxError, match=r"layers\.0\.mlp\.up_proj\.weight are stored as I8"):
            load_base(base)

    def test_without_weights_none_is_read(self, base: Path) -> None:
        save_file({}, base / "model.safetensors", metadata={"format": "pt"})
        assert load_base(base, weights=False).config.vocab_size == SIZES["vocab_size"]


class TestAnAdapterInTheBasesDirectory:
    def test_it_does_not_act_unless_it_is_given(self, base: Path, tmp_path: Path) -> None:
        """transformers would put it into the base that it loads from there, if `peft` is installed."""
        plain = hf.LlamaForCausalLM.from_pretrained(base).eval()
        rule = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        theirs = peft.get_peft_model(hf.LlamaForCausalLM.from_pretrained(base), rule).eval()
        theirs.save_pretrained(str(base))
        ids = torch.tensor([[3, 5, 8, 1]])
        with pytest.warns(PeftfxWarning, match=r"has an adapter, too \(adapter_config\.json\), which does not act"):
            assert torch.equal(load_base(base)(input_ids=ids).logits, plain(input_ids=ids).logits)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftfxWarning)
            adapted = load_directories(base, {"a": base})
        torch.testing.assert_close(adapted(input_ids=ids).logits, theirs(input_ids=ids).logits)


class TestWhatIsCopied:
    def test_what_the_export_tells_is_not_what_the_base_says(self, base: Path, tmp_path: Path) -> None:
        """Other runtimes read these files: a base's own would be of another model."""
        lies = ("genai_config.json", "export.json", "peftfx_slots.json", "peftfx_adapters.json", "peftfx_report.json")
        for name in (*lies, "tokenizer_config.json", "Genai_Config.json"):
            (base / name).write_text('{"from": "the base"}')
        export_directory(base, tmp_path / "decode", view="decode")
        export_directory(base, tmp_path / "forward", view="forward")
        names = {view: {p.name for p in (tmp_path / view).iterdir()} for view in ("decode", "forward")}
        told = {"decode": {"genai_config.json"}, "forward": {"export.json"}}
        shared = {"config.json", "generation_config.json", "tokenizer_config.json", "peftfx_report.json"}
        for view, own in names.items():
            assert own == {"model.onnx", "model.onnx.data", *shared, *told[view]}
            copied = {p.name for p in (tmp_path / view).glob("*.json") if "from" in json.loads(p.read_text())}
            assert copied == {"tokenizer_config.json"}

    def test_what_is_there_stays(self, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        for directory in (source, target):
            directory.mkdir()
            (directory / "tokenizer.json").write_text(directory.name)
        (source / "config.json").write_text("")
        assert copy_assets(source, target, "config.json") == []
        assert (target / "tokenizer.json").read_text() == "target"
        assert [p.name for p in target.iterdir()] == ["tokenizer.json"]

    def test_links_that_leave_the_base_are_not_followed_and_are_told(self, base: Path, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("a key")
        (base / "vocab.txt").symlink_to(secret)
        (base / "merges.txt").symlink_to(base / "config.json")
        lines: list[str] = []
        export_directory(base, tmp_path / "out", progress=lines.append)
        assert not (tmp_path / "out" / "vocab.txt").exists()
        assert (tmp_path / "out" / "merges.txt").is_file()
        assert any("not copied" in line and "vocab.txt" in line for line in lines)

    def test_links_of_hugging_faces_cache_are_followed(self, tmp_path: Path) -> None:
        """`models--x/snapshots/REVISION/NAME` leads to `models--x/blobs/HASH`."""
        snapshot, blobs, target = tmp_path / "m" / "snapshots" / "abc", tmp_path / "m" / "blobs", tmp_path / "target"
        for directory in (snapshot, blobs, target):
            directory.mkdir(parents=True)
        (blobs / "1").write_text("words")
        (snapshot / "vocab.txt").symlink_to(Path("..", "..", "blobs", "1"))
        (snapshot / "merges.txt").symlink_to(tmp_path)
        assert copy_assets(snapshot, target) == []
        assert (target / "vocab.txt").read_text() == "words"
        assert not (target / "vocab.txt").is_symlink()
