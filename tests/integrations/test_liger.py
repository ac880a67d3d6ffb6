"""`use_liger_kernel`: the norms and MLPs of the one model change, and no class that a dense model is built of.

Liger's kernels need a GPU. The package stands in here by its names, and its kernels by functions that count calls.
"""

import sys
from types import MethodType, ModuleType

import pytest
import torch
from transformers.integrations import liger as transformers_liger
from transformers.models.llama import modeling_llama

from model_helpers import tiny_llama_config, tiny_model
from query_experts import liger
from query_experts.training import GQETrainer
from study_helpers import Rows, arguments, logged, model_of


@pytest.fixture
def patched(monkeypatch):
    """Installs the stand-in; a list of the modules that were given a kernel, once for each call of it."""
    calls = []

    def patch(module, *_):
        original = type(module).forward
        module.forward = MethodType(lambda self, x: calls.append(self) or original(self, x), module)

    def apply_to_instance(model, **settings):
        if apply := names.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type):
            apply(model=model, **settings)

    names, swiglu, package = (
        ModuleType(f"liger_kernel.transformers{part}") for part in (".monkey_patch", ".swiglu", "")
    )
    names.MODEL_TYPE_TO_APPLY_LIGER_FN = {}
    names._patch_rms_norm_module = names._patch_swiglu_module = patch
    swiglu.LigerSwiGLUMLP = object
    package._apply_liger_kernel_to_instance = apply_to_instance
    for module in (ModuleType("liger_kernel"), names, swiglu, package):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(transformers_liger, "is_liger_kernel_available", lambda: True)
    return calls


def test_a_trainer_trains_and_evaluates_with_the_kernels_and_the_model_s_own_loss(tmp_path, patched):
    stock = {name: getattr(modeling_llama, name) for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")}
    losses = {}
    for use in (False, True):
        model = model_of()
        args = arguments(tmp_path, use_liger_kernel=use)
        trainer = GQETrainer(model, args, train_dataset=Rows(4), eval_dataset=Rows(4))
        trainer.train()
        losses[use] = logged(trainer, "loss"), logged(trainer, "lm_loss"), trainer.evaluate()["eval_loss"]
        assert bool(patched) == use
    assert losses[True] == losses[False]
    layers = model.model.layers
    changed = {
        model.model.norm,
        *(part for x in layers for part in (x.mlp, x.input_layernorm, x.post_attention_layernorm)),
    }
    assert set(patched) == changed
    assert stock == {name: getattr(modeling_llama, name) for name in stock}
    patched.clear()
    modeling_llama.LlamaForCausalLM(tiny_llama_config())(torch.tensor([[1, 2]]))
    assert not patched


def test_a_second_training_keeps_the_kernels(tmp_path, patched):
    losses = {}
    for use in (False, True):
        trainer = GQETrainer(model_of(), arguments(tmp_path, use_liger_kernel=use), train_dataset=Rows(4))
        for _ in range(2):
            patched.clear()
            trainer.train()
        losses[use] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert bool(patched) == use
    assert losses[True] == losses[False]


def test_the_trainer_refuses_a_kernel_that_liger_would_leave_out_silently(tmp_path, patched):
    args = arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"swiglu": True, "geglu": True})
    with pytest.raises(ValueError, match="liger_kernel_config has geglu; for a GQE model it must have rms_norm and"):
        GQETrainer(model_of(), args, train_dataset=Rows(4))
    assert GQETrainer(modeling_llama.LlamaForCausalLM(tiny_llama_config()), args, train_dataset=Rows(4))


def test_either_kernel_can_be_left_out(patched):
    model = tiny_model(num_hidden_layers=1)
    liger.apply_to_gqe(model, swiglu=False, fused_linear_cross_entropy=False)  # as TRL passes it
    model(torch.tensor([[1, 2]]))
    assert set(patched) == {m for name, m in model.named_modules() if name.endswith(("layernorm", "model.norm"))}


@pytest.mark.parametrize("name", ["rope", "cross_entropy", "fused_linear_cross_entropy"])
def test_a_kernel_that_replaces_the_loss_or_shared_functions_is_refused(patched, name):
    with pytest.raises(ValueError, match=f"liger_kernel_config has {name} True; for a GQE model it must be False"):
        liger.apply_to_gqe(tiny_model(num_hidden_layers=1), **{name: True})
    assert not patched


def test_an_mlp_of_another_activation_is_refused(patched):
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu'.*must have swiglu False"):
        liger.apply_to_gqe(tiny_model(num_hidden_layers=1, hidden_act="gelu"))


def test_without_liger_the_trainer_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        GQETrainer(model_of(), arguments(tmp_path, use_liger_kernel=True), train_dataset=Rows(4))
