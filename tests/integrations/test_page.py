"""The snippets of docs/integrations.md run as they stand there."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

from model_helpers import VOCABULARY, random_tokens, tiny_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
QUANTISED = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "torchao"))


def test_the_snippets_of_the_page_run_one_after_the_other(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    words = ["<pad>", "<eos>", "def", "import", *(f"w{i}" for i in range(VOCABULARY - 4))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained("checkpoint")
    tiny_model(dtype=torch.float32, hidden_size=32, intermediate_size=64, head_dim=32).save_pretrained("checkpoint")
    names = {
        "checkpoint": "checkpoint",
        "documents": Dataset.from_dict({"text": ["w1 w2 w3 w4 w5", "w3 w4 w5"] * 8}),
        "token_ids": random_tokens(2, 9),
    }
    missing = set()  # what this environment can't run, by a word of the snippet
    if not QUANTISED:
        missing.add("torchao")
    if "router_aux_loss_coef" not in trl.SFTConfig.__dataclass_fields__:
        missing.add("router_aux_loss_coef")
    if "kwargs" not in inspect.signature(PagedAttentionCache.update).parameters:
        missing.add("generate_batch")
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        if not any(word in snippet for word in missing):
            exec(snippet, names)
    assert "y" in names, "the last snippet"
    assert Path("merged", "modeling_gqe.py").is_file()
    assert Path("adapter", "adapter_model.safetensors").is_file()
