"""A user of Llama in Transformers misses nothing: what libraries look up by name is there, and the same.

Transformers' generation and Trainer, PEFT and TRL find out by signatures and attributes what a model can do. Each
attribute of Llama's classes and instances is compared with ours. DIFFERENT holds what differs on purpose, and why.
"""

import inspect
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    Trainer,
)
from transformers.utils.generic import can_return_loss, find_labels

from model_helpers import random_tokens, tiny_config, tiny_llama_config
from query_experts import (
    GQEConfig,
    GQEForCausalLM,
    GQEForQuestionAnswering,
    GQEForSequenceClassification,
    GQEForTokenClassification,
    GQEModel,
)
from study_helpers import arguments

PAIRS = [
    (GQEModel, LlamaModel),
    (GQEForCausalLM, LlamaForCausalLM),
    (GQEForSequenceClassification, LlamaForSequenceClassification),
    (GQEForTokenClassification, LlamaForTokenClassification),
    (GQEForQuestionAnswering, LlamaForQuestionAnswering),
]
LOSSES = "the router's losses need them"
OLD_PREFIX = "Llama's is 'transformer' for the sake of old checkpoints; with ours a language model's weights load"
DIFFERENT = {
    ("*", "_can_record_outputs"): "attention weights come from GQESelfAttention",
    ("*", "_tp_plan"): "10 output slots don't split like 16 heads: KV groups have a style of their own",
    ("GQEConfig", "base_model_tp_plan"): "the same",
    ("*", "maybe_distribute_model"): "tied embeddings are tied before they are sharded",
    ("GQEConfig", "keys_to_ignore_at_inference"): "outputs that are no predictions",
    ("GQEForCausalLM", "balance_window"): LOSSES,
    ("GQEForSequenceClassification", "balance_window"): LOSSES,
    ("GQEForTokenClassification", "balance_window"): LOSSES,
    ("GQEForQuestionAnswering", "balance_window"): LOSSES,
    ("GQEForQuestionAnswering", "base_model_prefix"): OLD_PREFIX,
    ("GQEForQuestionAnswering", "_pp_plan"): OLD_PREFIX,
    ("GQEForQuestionAnswering", "_fsdp_plan"): OLD_PREFIX,
}
ADDED = {
    ("GQEModel", "forward"): ["output_router_logits", "kept"],
    ("GQEForCausalLM", "forward"): ["output_router_logits", "num_tokens_in_batch"],
}  # parameters after Llama's


def described(value: Any) -> Any:
    """What can be compared: a function by its parameters, a class by its name, ours under Llama's name."""
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, type):
        return value.__name__.replace("GQE", "Llama")
    if callable(value):
        return list(inspect.signature(value).parameters)
    if isinstance(value, (str, int, float, bool, type(None), list, tuple, set)):
        return repr(value).replace("GQE", "Llama").replace("gqe", "llama")
    return type(value).__name__.replace("GQE", "Llama")


def members(owner: Any) -> dict[str, Any]:
    """The attributes of a class, or those that an instance has itself."""
    names = dir(owner) if isinstance(owner, type) else vars(owner).keys() - {"_modules", "_parameters", "_buffers"}
    return {name: described(getattr(owner, name)) for name in names if not name.startswith("__")}


def without_added(name: str, of: str, value: Any) -> Any:
    """A function's parameters without those that are listed in ADDED, if they come after Llama's."""
    added = ADDED.get((of, name), [])
    rest = [p for p in value if p not in added] if added else value
    assert not added or value == [*rest[:-1], *added, *rest[-1:]], (of, name)  # the last is **kwargs
    return rest


def differing(ours: Any, llamas: Any, of: str) -> set[str]:
    """Names that Llama has and whose value differs, and names on the instance that only ours has."""
    mine, theirs = members(ours), members(llamas)
    names = theirs.keys() | (set() if isinstance(ours, type) else mine.keys())
    return {n for n in names if n not in mine or without_added(n, of, mine[n]) != theirs.get(n)}


@pytest.mark.parametrize(("ours", "llamas"), PAIRS, ids=lambda c: c.__name__)
def test_what_libraries_look_up_on_a_model_is_llama_s(ours, llamas):
    sizes = {"num_hidden_layers": 1, "pad_token_id": 0}
    instances = ours(tiny_config(**sizes)), llamas(tiny_llama_config(**sizes))
    found = differing(ours, llamas, ours.__name__) | differing(*instances, ours.__name__)
    expected = {name for of, name in DIFFERENT if of in ("*", ours.__name__)}
    assert found == {name for name in expected if hasattr(instances[0], name)}  # older versions have fewer
    assert find_labels(ours) == find_labels(llamas)
    assert can_return_loss(ours) == can_return_loss(llamas)
    assert instances[0].can_generate() == instances[1].can_generate()
    for embeddings in ("get_input_embeddings", "get_output_embeddings"):
        assert described(getattr(instances[0], embeddings)()) == described(getattr(instances[1], embeddings)())


def test_what_libraries_look_up_in_a_configuration_is_llama_s():
    expected = {name for of, name in DIFFERENT if of == "GQEConfig"}
    assert differing(GQEConfig, LlamaConfig, "GQEConfig") == expected
    mine, theirs = members(tiny_config()), members(tiny_llama_config())
    assert {name: mine.get(name) for name in theirs} == theirs


def test_the_stock_trainer_smooths_the_labels_of_the_next_tokens(tmp_path):
    """It shifts the labels only for classes in its table of language models."""
    model = GQEForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    ids = random_tokens(2, 9)
    expected = trainer.label_smoother(model(ids), ids, shift_labels=True)
    torch.testing.assert_close(trainer.compute_loss(model, {"input_ids": ids, "labels": ids}), expected)
