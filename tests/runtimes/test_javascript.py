"""What is exported runs in ONNX Runtime for JavaScript, by the example: see docs/runtimes.md.

npm install --prefix FOLDER onnxruntime-node && PEFTFX_NODE=FOLDER pytest -n 0 -m runtimes tests/runtimes
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.adapted import randomise
from support.zoo import ZOO

import peftfx

pytestmark = [pytest.mark.slow, pytest.mark.runtimes]

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate.mjs"


def test_the_example_writes_the_tokens_of_the_models_own_generate(tmp_path: Path) -> None:
    folder = os.environ.get("PEFTFX_NODE")
    if not folder:
        pytest.skip("PEFTFX_NODE names no folder with the npm package onnxruntime-node")
    adapted = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=4, target="all-linear"), seed=0).eval()
    randomise(adapted.adapters)
    adapted.export(tmp_path / "out")
    script = shutil.copy(EXAMPLE, Path(folder) / EXAMPLE.name)  # node looks for packages beside the script
    words = ["node", str(script), str(tmp_path / "out"), "8", "3", "5", "8", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prompt = torch.tensor([[3, 5, 8, 2]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = adapted.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    assert [int(token) for token in done.stdout.split()] == want[0].tolist()
