"""What an exported directory gives to sentence-transformers and optimum, in an environment of their own.

They want older transformers than peftfx, so this file imports nothing of it. Make the environment once:

    python -m venv older
    older/bin/pip install "sentence-transformers<6" optimum-onnx onnxruntime

and then, beside what peftfx itself gives (`peftfx run DIR --text ... --save FILE.npy`):

    older/bin/python older_transformers.py DIR SentenceTransformer --text "A lease ends." --save FILE.npy
    older/bin/python older_transformers.py DIR ORTModelForSequenceClassification --inputs IN.npz --save OUT.npz
    older/bin/python older_transformers.py DIR ORTModelForCausalLM --inputs IN.npz --generate 20 --save OUT.npz
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np


def embedded(directory: str, texts: list[str]) -> np.ndarray:
    """The embeddings of texts by sentence-transformers, over ONNX Runtime."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(directory, backend="onnx", device="cpu", local_files_only=True)
    return model.encode(texts)


def scored(directory: str, pairs: list[list[str]]) -> np.ndarray:
    """The scores of pairs of texts by sentence-transformers' re-rankers, over ONNX Runtime."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(directory, backend="onnx", device="cpu", local_files_only=True)
    return model.predict(pairs)


def answered(directory: str, kind: str, inputs: dict[str, Any], generate: int | None) -> dict[str, np.ndarray]:
    """The outputs of one of optimum's classes by their names, or the tokens that it generates."""
    import optimum.onnxruntime
    import torch

    model = getattr(optimum.onnxruntime, kind).from_pretrained(directory, local_files_only=True)
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if generate is not None:
        tokens = model.generate(**given, max_new_tokens=generate, min_new_tokens=generate, do_sample=False)
        return {"tokens": tokens.numpy()}
    return {name: value.numpy() for name, value in model(**given).items() if isinstance(value, torch.Tensor)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="that `peftfx export` wrote")
    parser.add_argument("kind", help="SentenceTransformer, CrossEncoder, or a class of optimum.onnxruntime")
    parser.add_argument(
        "--text", action="append", default=[], help="given again; for CrossEncoder the first is the query"
    )
    parser.add_argument("--inputs", help="arrays by the names of the model's inputs, as numpy.savez writes them")
    parser.add_argument("--generate", type=int, help="how many tokens")
    parser.add_argument("--save", required=True, help="where the result goes")
    asked = parser.parse_args()
    if asked.kind == "SentenceTransformer":
        np.save(asked.save, embedded(asked.directory, asked.text))
    elif asked.kind == "CrossEncoder":
        query, *texts = asked.text
        np.save(asked.save, scored(asked.directory, [[query, text] for text in texts]))
    else:
        inputs = dict(np.load(asked.inputs))
        np.savez(asked.save, **answered(asked.directory, asked.kind, inputs, asked.generate))
    print(f"{asked.kind} read {asked.directory}: {asked.save}")


if __name__ == "__main__":
    main()
