"""Read `modules.json` of a sentence-transformers directory, and the files that belong to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from peftfx.bases.sentences.steps import SENTENCE, Pooling, make_step
from peftfx.errors import PeftfxError
from peftfx.files import is_file, read_json, read_objects

FILE = "modules.json"
SETTINGS = "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"
ALL = (FILE, SETTINGS, LENGTHS)  #: the files of sentence-transformers beside a model's own files
_KIND = "SentenceTransformer"


@dataclass(frozen=True)
class SentenceModules:
    """The steps that sentence-transformers runs after a transformer.

    Attributes:
        directory: the directory of `modules.json`.
        transformer: the folder of the transformer in the directory; empty if it is the directory itself.
        steps: the class name and the folder of each later step, in order.
    """

    directory: Path
    transformer: str
    steps: tuple[tuple[str, str], ...]

    @staticmethod
    def found(directories: Iterable[Path]) -> SentenceModules | None:
        """Read the first directory with steps of a sentence encoder, not a re-ranker; None if there is none."""
        for directory in directories:
            if is_file(directory / FILE) and _kind(directory) == _KIND:
                return SentenceModules.read(directory)
        return None

    @staticmethod
    def read(directory: Path) -> SentenceModules:
        """Read the steps of a directory.

        Raises:
            PeftfxError: `modules.json` is broken, or does not begin with a transformer.
        """
        path = directory / FILE
        listed = [(str(m.get("type")).rpartition(".")[2], str(m.get("path") or "")) for m in read_objects(path)]
        if not listed or listed[0][0] != "Transformer":
            what = f"the first module is {listed[0][0] if listed else 'missing'}, but it must be a Transformer"
            raise PeftfxError(what, str(path), "export a model of transformers")
        outside = [folder for _, folder in listed if Path(folder).is_absolute() or ".." in Path(folder).parts]
        if outside:
            raise PeftfxError(
                f"a module lies outside of the directory: {outside[0]}", str(path), "download the file again"
            )
        return SentenceModules(directory, listed[0][1], tuple(listed[1:]))

    def build(self) -> nn.Sequential:
        """Build the steps, with their weights.

        Raises:
            PeftfxError: a step is unknown, its files are broken, or no step gives a vector for a sentence.
        """
        made = [make_step(kind, self.directory / folder) for kind, folder in self.steps]
        if not any(isinstance(step, Pooling) for step in made):
            what = f"no module pools the tokens, so there is no {SENTENCE}"
            raise PeftfxError(what, str(self.directory / FILE), "export it with --task feature-extraction")
        return nn.Sequential(*(step for step in made if step is not None)).eval()

    def copy(self, target: Path) -> None:
        """Copy sentence-transformers' files into a directory that has the transformer at its top."""
        home = self.directory / self.transformer
        for path in (self.directory / SETTINGS, home / LENGTHS):
            if is_file(path):
                shutil.copyfile(path, target / path.name)
        listed = read_objects(self.directory / FILE)
        (target / FILE).write_text(json.dumps([{**listed[0], "path": ""}, *listed[1:]], indent=2), encoding="utf-8")
        for _, folder in self.steps:
            (target / folder).mkdir(parents=True, exist_ok=True)
            for name in ("config.json", "model.safetensors"):
                if folder and is_file(self.directory / folder / name):
                    shutil.copyfile(self.directory / folder / name, target / folder / name)


def transformer_folder(base: Path) -> Path:
    """Return the folder of a base's transformer. Older sentence-transformers directories have a subfolder."""
    if is_file(base / "config.json") or not is_file(base / FILE):
        return base
    return base / SentenceModules.read(base).transformer


def prompts_of(directory: Path) -> tuple[Mapping[str, str], str | None]:
    """Return the prompts by their names, and the name of the default prompt, if there is one."""
    path = directory / SETTINGS
    config = read_json(path) if is_file(path) else {}
    listed, default = config.get("prompts"), config.get("default_prompt_name")
    found = listed.items() if isinstance(listed, dict) else ()
    prompts = {str(name): text for name, text in found if isinstance(text, str)}
    return prompts, default if isinstance(default, str) and default in prompts else None


def _kind(directory: Path) -> str:
    """Return the kind of the model in sentence-transformers. Older directories do not give it."""
    path = directory / SETTINGS
    return str((read_json(path) if is_file(path) else {}).get("model_type") or _KIND)
