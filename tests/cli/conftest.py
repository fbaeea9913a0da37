"""Bases and adapters in directories, as a user has them."""

from __future__ import annotations

import peft
import pytest
import tokenizers
import torch
import transformers as hf
from support.adapted import randomise
from support.command import LABELS, SIZES, Inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**SIZES)).save_pretrained(root / "encoder")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "merge": 2}, unk_token="[UNK]")
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="[UNK]", pad_token="[PAD]"
    )
    fast.save_pretrained(root / "encoder")
    (root / "encoder" / "preprocessor_config.json").write_text('{"size": 3}', encoding="utf-8")
    (root / "encoder" / "README.md").write_text("# A model", encoding="utf-8")
    hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)).save_pretrained(root / "classifier")
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
    model = hf.BertForSequenceClassification.from_pretrained(root / "encoder", num_labels=LABELS)
    eager = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="SEQ_CLS"))
    randomise(eager)
    eager.save_pretrained(str(root / "adapter"))
    lora = peft.get_peft_model(
        hf.BertForSequenceClassification.from_pretrained(root / "classifier"), peft.LoraConfig(**options)
    )
    randomise(lora)
    lora.save_pretrained(str(root / "lora"))
    return Inputs(root / "encoder", root / "classifier", root / "adapter", root / "lora", eager.eval())
