"""A stored weight is computed with in the dtype it is presented in, exactly, and takes no memory until it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from checkpoint import Size, write_checkpoint
from safetensors import safe_open
from torch import nn

import peftfx
from peftfx.bases.load import load_base
from peftfx.errors import PeftfxError
from peftfx.graph.lazy_weights import Stored, exact, faked, load_contiguous, load_tensor, pieces, store

SIZE = Size(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)
MARIAN = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, of several shards."""
    root = tmp_path_factory.mktemp("stored")
    write_checkpoint(root, SIZE, "bf16", shard=60_000)
    return root / "base"


def weight() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


OPERATIONS = {
    "linear": lambda w, x: nn.functional.linear(x, w),
    "linear of a transpose": lambda w, x: x[:, :3] @ w.t()[:, :3].t()[:3],
    "embedding": lambda w, x: nn.functional.embedding(torch.tensor([[5, 0]]), w),
    "addmm": lambda w, x: torch.addmm(w[:2], x, w[:4]),
    "rows": lambda w, x: w[2:5] * 3,
    "a row": lambda w, x: w[1] + 1,
    "a view of other sizes": lambda w, x: w.view(3, 2, 4).transpose(0, 2).sum(1),
    "permuted and expanded": lambda w, x: w.permute(1, 0).unsqueeze(0).expand(2, 4, 6) + 1,
    "two of them": lambda w, x: w + w,
    "among others": lambda w, x: torch.cat([w, w * 2]),
    "cast back": lambda w, x: w.to(torch.bfloat16),
    "a number": lambda w, x: w.sum(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_computes_what_it_does_on_the_cast_weight(name: str) -> None:
    source, x = weight(), torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    x = x if name != "addmm" else x[:, :4]
    run = OPERATIONS[name]
    got, want = run(Stored(source, torch.float32), x), run(source.float(), x)
    assert got.dtype == want.dtype
    assert torch.equal(load_tensor(got), want)


def test_it_looks_like_a_tensor_of_its_dtype_and_is_neither_copied_nor_written() -> None:
    source = weight()
    stored = Stored(source, torch.float32)
    assert (stored.dtype, stored.shape, stored.stride()) == (torch.float32, source.shape, source.stride())
    assert exact(stored) is source
    assert exact(stored.detach().t()).data_ptr() == source.data_ptr()
    assert load_tensor(torch.ones(2)).sum() == 2
    before = source.clone()
    for write in (lambda: stored.add_(1), lambda: stored.copy_(torch.zeros(6, 4)), lambda: stored[0].zero_()):
        with torch.no_grad(), pytest.raises(PeftfxError, match="stays in its file"):
            write()
    assert torch.equal(source, before)


def test_tied_weights_stay_tied_and_others_are_left_alone() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}).to(torch.bfloat16)
    model["b"].weight = model["a"].weight
    model.register_parameter("count", nn.Parameter(torch.tensor([3]), requires_grad=False))
    norm = model["norm"].weight
    store(model, lambda name: torch.bfloat16 if name.startswith("norm") else torch.float32)
    assert model["a"].weight is model["b"].weight
    assert isinstance(model["a"].weight, Stored)
    assert model["norm"].weight is norm
    assert model.count.dtype == torch.int64
    with faked(model):
        assert not isinstance(model["a"].weight, Stored)
        assert model["a"].weight is model["b"].weight
        assert model["a"].weight.dtype == torch.float32
    assert isinstance(model["a"].weight, Stored)


def test_a_bfloat16_base_in_float32_is_the_eager_model_and_its_files_values(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_base(base, dtype=torch.float32)
    eager = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, eager(input_ids=ids).logits, rtol=0, atol=0)
    stored = {n: p for n, p in model.named_parameters() if isinstance(p, Stored)}
    assert len(stored) == len(dict(model.named_parameters()))
    found = 0
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(exact(stored[name]), file.get_tensor(name))
                assert torch.equal(load_tensor(stored[name]), file.get_tensor(name).float())
                found += 1
    assert found == len(stored)


def test_what_no_file_holds_is_computed_in_the_wanted_dtype(tmp_path: Path) -> None:
    """Marian's files have no positions, which are sines: rounded to bfloat16 they are 2e-3 off."""
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in MARIAN.items()}
    config = hf.MarianConfig(vocab_size=99, d_model=16, pad_token_id=0, **sizes)
    hf.MarianMTModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = hf.MarianMTModel.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_base(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 31, 7, 50]])
    with torch.no_grad():
        got, want = (model.eval()(input_ids=ids, decoder_input_ids=ids[:, :3]).logits for model in (ours, theirs))
    assert torch.equal(got, want)


def test_a_stored_base_is_adapted_as_one_in_memory(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (
        load_base(base, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    ):
        adapted = peftfx.load(model.eval(), base.parent / "adapter").eval()
        with torch.no_grad():
            results.append(adapted(input_ids=ids).logits)
    torch.testing.assert_close(*results, rtol=0, atol=0)


LOADED = """
import sys, torch
from pathlib import Path
from peftfx.bases.load import load_base
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
dtype = getattr(torch, sys.argv[2])
load_base(sys.argv[3], dtype=dtype)  # what is imported when first used
before = anonymous()
model = load_base(sys.argv[1], dtype=dtype)
after_load = anonymous()
with torch.no_grad():
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
print(before, after_load, anonymous(), sum(p.numel() * 4 for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_loaded_base_takes_no_anonymous_memory(dtype: str, base: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, Size(4, 1024, 4096, 8, 8, 2000), "bf16")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "base"), dtype, str(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, loaded, ran, size = map(int, done.stdout.split()[-4:])
    assert size > 250 << 20
    assert loaded - before < size / 20
    assert ran - before < size / 5, "one weight at a time"


def test_a_large_weight_is_cast_in_pieces_and_permuted_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftfx.graph.lazy_weights._PIECE", 10)
    monkeypatch.setattr("peftfx.graph.lazy_weights._STRIP", 16)
    source, x = weight(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    stored, bias = Stored(source, torch.float32), torch.ones(6)
    for more in ((), (bias,)):
        want = nn.functional.linear(x, source.float(), *more)
        torch.testing.assert_close(nn.functional.linear(x, stored, *more), want, rtol=1e-6, atol=1e-6)
    turned = load_contiguous(stored.permute(1, 0))
    assert turned.is_contiguous()
    assert turned.equal(source.float().T)
    for like, want in ((stored, source.float()), (stored.permute(1, 0), source.float().T)):
        parts = list(pieces(like))
        assert len(parts) > 1
        assert all(part.is_contiguous() for part in parts)
        assert torch.cat(parts).equal(want)
    half = Stored(source.bfloat16(), torch.float16)
    want = nn.functional.linear(x.half(), source.bfloat16().half())
    torch.testing.assert_close(nn.functional.linear(x.half(), half), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="same dtype"):
        nn.functional.linear(x, half)
    float_source = Stored(source.float(), torch.bfloat16)
    want = nn.functional.linear(x.bfloat16(), source.bfloat16())
    torch.testing.assert_close(nn.functional.linear(x.bfloat16(), float_source), want, rtol=1e-2, atol=1e-2)
