"""The benchmarks run, at a size at which they tell nothing, and compare things that are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import before_and_after
import check_sites
import contenders
import decode
import growth
import pytest
import torch
from checkpoint import Size, write_checkpoint
from contenders import CONTENDERS
from measure import forget, measured
from safetensors.torch import load_file, save_file
from support.few import but_for

from peftfx.export import OnnxModel

SIZE = Size(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=300)
BENCHMARKS = Path(growth.__file__).parent
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SIZE).items()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    write_checkpoint(root, SIZE, shard=100_000)
    return root


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    contenders.peftfx(checkpoint / "base", checkpoint / "adapter", checkpoint / "peftfx")
    return checkpoint / "peftfx"


def test_the_checkpoint_is_one_that_peft_loads_and_that_the_adapter_changes(checkpoint: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model, said = AutoModelForCausalLM.from_pretrained(checkpoint / "base", output_loading_info=True)
    assert not any(said.values())
    assert len(list((checkpoint / "base").glob("*.safetensors"))) > 2
    adapted = peft.PeftModel.from_pretrained(model, checkpoint / "adapter").eval()
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            difference = (adapted(input_ids=ids).logits - logits).std()
    assert 0.3 < float(logits.std()) < 3
    assert float(difference) > 0.05


@pytest.mark.further
@pytest.mark.parametrize(
    "name", but_for({"PEFT + transformers.exporters"}, (n for n in CONTENDERS if n.startswith("PEFT")))
)
def test_peers_make_the_model_that_peftfx_makes(name: str, checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    run, needs = CONTENDERS[name]
    for package in needs:
        pytest.importorskip(package)
    run(checkpoint / "base", checkpoint / "adapter", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.onnx")
    feed = {"input_ids": torch.randint(300, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    want = OnnxModel(exported)(**feed)["logits"]
    torch.testing.assert_close(OnnxModel(path)(**feed)["logits"], want, rtol=1e-4, atol=1e-4)


def test_the_sampled_sites_are_pefts_arithmetic_and_a_wrong_one_is_seen(
    checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    base, adapter = checkpoint / "base", checkpoint / "adapter"
    found = check_sites.check(base, adapter, exported, count=100)
    assert check_sites.right(found)
    assert sum(f.adapted for f in found) == 7 * SIZE.layers
    assert len(found) == 7 * SIZE.layers + 3 + 2 * SIZE.layers, "all weights: the head, the words, the norms"
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(n for n in tensors if "layers.1.mlp.down_proj.lora_B" in n)
    tensors[name][3, 0] += 0.01
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    wrong = [f.name for f in check_sites.check(base, tmp_path, exported, count=100) if f.adapted and f.steps > 1]
    assert wrong == ["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("counts", [[1], pytest.param([1, 2], marks=pytest.mark.slow)], ids=str)
def test_growth_has_every_step_at_every_count(counts: list[int], tmp_path: Path) -> None:
    results = growth.growth(counts, "forward")
    assert list(results) == counts
    assert all(set(costs) == set(growth.STEPS) for costs in results.values())
    assert all(costs[step] > 0 for costs in results.values() for step in growth.STEPS)
    rows = dict(growth.per_layer(results))
    assert rows["merge"] == [1e3 * results[n]["merge"] / n for n in counts]
    pytest.importorskip("matplotlib")
    growth.plot(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_a_measure_is_what_the_process_took(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from measure import ready; import time; ready()\n"
    code += "held = bytearray(200 << 20); open(sys.argv[2], 'wb').write(bytes(5 << 20))\n"
    code += "end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    found = measured([sys.executable, "-c", code, str(BENCHMARKS), str(tmp_path / "file")])
    assert found.wall > 0.5
    assert 0.5 < found.work_cpu < 5
    assert found.anonymous - found.imports_anonymous > 200 << 20
    assert 5 << 20 <= found.written < 6 << 20
    forget(tmp_path)
    with pytest.raises(RuntimeError, match="exit code 3"):
        measured([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_and_writes_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / "export.py"), *OPTIONS, "--work", str(tmp_path)]
    command += ["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "numbers.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in CONTENDERS)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert list(numbers) == list(CONTENDERS)
    assert all(0 < n["imports_cpu"] < n["cpu"] for n in numbers.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["numbers.json", "plot.png"]


@pytest.mark.slow
def test_the_graphs_that_decode_are_compared_call_by_call(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main([*OPTIONS, "--only", "peftfx", "peftfx --optimize none"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table] == [
        *("", "---", "peftfx", "peftfx --optimize none", "(peftfx --optimize none)"),
    ]
    assert all(float(cell) > 0 for line in table[2:4] for cell in line.split("|")[2:-1])


@pytest.mark.slow
def test_what_swappable_adapters_take_is_measured_command_by_command(checkpoint: Path, tmp_path: Path) -> None:
    words = [sys.executable, BENCHMARKS / "swappable.py", checkpoint, "--output", tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["merged", "swappable", "an adapter's file", "batched"]


@pytest.mark.slow
def test_a_revision_is_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SIZE).items()]
    before_and_after.main(["HEAD", "--pairs=1", *sizes])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row.split("|")[1].strip().partition(",")[0] for row in rows] == [
        "export",
        "export",
        "swappable",
        "batched",
        "decode",
        "train",
    ]
