"""Transformers' common model tests on the GQE model: `python tests/transformers_common/run.py` runs them.

This file holds the tiny model that they need, and what they don't know about GQE. A test that passes without building
a GQE model has tested nothing. It is counted as skipped, with its reason from NO_MODEL_BUILT, and fails without a
known reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import tempfile
import typing
import unittest
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
from tests import test_fsdp_mixin, test_tensor_parallel_mixin
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.testing_utils import torch_device
from transformers.utils import TransformersKwargs

from query_experts import GQEConfig, GQEForCausalLM, GQEModel
from query_experts.model.modeling_gqe import GQEPreTrainedModel
from query_experts.ops.attend import DECODE_TOKENS

# By these lists of model types and class names the tests choose what to run; they lack models outside Transformers.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # no list: every model with a plan
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
MODEL_MAPPING_NAMES["gqe"] = "GQEModel"  # without it training isn't tested

# The tests read the annotations of forward to find its arguments, but don't resolve postponed annotations.
for forward in (GQEModel.forward, GQEForCausalLM.forward):
    hints = typing.get_type_hints(inspect.unwrap(forward)) | {"kwargs": Unpack[TransformersKwargs]}
    inspect.unwrap(forward).__annotations__.update(hints)

if test_fsdp_mixin._get_distributed_device_type() == "cpu":
    # The tests want a core for each rank, but ranks on the CPU are processes, which can share cores.
    test_fsdp_mixin._get_available_fsdp_workers = lambda: 4

# Tests that may pass without building a model: name (a regular expression) -> why that is a skip, or None if it isn't.
NO_MODEL_BUILT = {
    "test_config|test_config_attn_implementation_setter": None,  # only about the configuration
    "test_model_main_input_name": None,  # about forward's signature
    "test_num_layers_is_small": None,  # about GQEModelTester
    "test_get_(text|image|audio|video)_features_.*": "GQE has one input, text, and no get_*_features method",
    "test_generation_tester_mixin_inheritance": "the distribution has no generation tests to inherit; GQE has its own",
    "test_problem_types|test_(can_load_ignoring|load_with)_mismatched_shapes": "GQE tests its heads itself",
}


class Started:
    """Counts the GQE models that were built and the ranks that were started: whether a test did anything."""

    count = 0


def count_calls(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        Started.count += 1
        return original(*args, **kwargs)

    setattr(owner, name, counted)


count_calls(GQEPreTrainedModel, "__init__")
count_calls(importlib.import_module("torch.multiprocessing.spawn"), "start_processes")


def no_silent_pass(test_class: type) -> type:
    """Class decorator: a test method that passes without building a model becomes a skip with a reason, or fails."""

    def guarded(name: str, test: Callable) -> Callable:
        @functools.wraps(test)
        def run(self: unittest.TestCase, *args: Any, **kwargs: Any) -> None:
            before = Started.count
            test(self, *args, **kwargs)
            if Started.count > before:
                return
            known = [reason for pattern, reason in NO_MODEL_BUILT.items() if re.fullmatch(pattern, name)]
            if not known:
                self.fail(f"{name} passed without building a GQE model: what did it test?")
            if known[0] is not None:
                self.skipTest(known[0])

        return run

    for name in dir(test_class):
        if name.startswith("test_") and callable(getattr(test_class, name)):
            setattr(test_class, name, guarded(name, getattr(test_class, name)))
    return test_class


class GQEModelTester:
    """A model with 4 query experts in 2 groups, one active per group, and its inputs.

    `num_attention_heads` has the tests' meaning here: the heads of the attention weights. In GQE these are the selected
    experts and the shared head.
    """

    base_model_class = GQEModel
    causal_lm_class = GQEForCausalLM
    all_model_classes = (GQEModel, GQEForCausalLM)
    is_training = True
    batch_size = 13
    seq_length = DECODE_TOKENS + 3  # with fewer tokens, and the cache on by default, all would take the decode path
    vocab_size = 99
    hidden_size = 32
    intermediate_size = 36  # Transformers 5.17 can't split an odd size over two ranks, nor can its Llama
    num_hidden_layers = 2
    num_query_experts = 4
    num_key_value_heads = 2
    active_query_experts = 1
    num_attention_heads = num_key_value_heads * active_query_experts + 1
    routing = "learned"

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> GQEConfig:
        return GQEConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_query_experts,
            num_key_value_heads=self.num_key_value_heads,
            active_query_experts=self.active_query_experts,
            routing=self.routing,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[GQEConfig, dict[str, torch.Tensor]]:
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = torch.ones_like(input_ids, device=torch_device).tril()  # right padding, of each length
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


@no_silent_pass
class GQEModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    FSDPTesterMixin,
    unittest.TestCase,
):
    model_tester = None
    all_model_classes = GQEModelTester.all_model_classes

    def setUp(self) -> None:
        self.model_tester = GQEModelTester(self)

    def test_config(self) -> None:
        fields = {
            "head_dim": 64,
            "num_attention_heads": 12,
            "num_key_value_heads": 3,
            "active_query_experts": 2,
            "variant": "weighted_concat",
            "output_projection": "expert",
            "routing": "frozen",
            "shared_head_kv": "first",
            "router_aux_loss_coef": 0.02,
            "router_z_loss_coef": 0.001,
            "output_router_logits": True,
        }
        ConfigTester(self, config_class=GQEConfig, **fields).run_common_tests()

    def test_can_init_all_missing_weights(self) -> None:
        """The tests run it for models added since 2023, by the copyright line of the configuration's file."""
        with tempfile.NamedTemporaryFile("w", suffix=".py") as dated:
            dated.write("# Copyright 2026\n")
            dated.flush()
            with unittest.mock.patch("tests.test_modeling_common.inspect.getfile", return_value=dated.name):
                super().test_can_init_all_missing_weights()

    def _get_tiny_config(self) -> tuple[type, dict[str, Any]]:
        """The tests' own configuration has a KV head for each of 4 heads, so that there is nothing to route."""
        config_class, fields = super()._get_tiny_config()
        return config_class, fields | {"num_key_value_heads": 2}
