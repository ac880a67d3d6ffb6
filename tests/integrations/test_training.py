"""PEFT and TRL with a GQE model: LoRA trains, decodes, saves and merges; SFT trains with and without balance loss."""

import copy
import random

import pytest
import torch
from datasets import Dataset

from model_helpers import (
    EXACT,
    SETTINGS,
    assert_same_tensors,
    new_cache,
    no_router_warning,
    random_tokens,
    setting_id,
    tiny_model,
    word_tokenizer,
)
from query_experts import GQEForCausalLM
from query_experts.layers.router import Router

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from query_experts.sft import GQESFTTrainer  # noqa: E402 - needs trl

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "q_shared", "gate_proj", "up_proj", "down_proj"]
SPARSE = {"num_attention_heads": 16, "active_query_experts": 1}  # M = 8: one token projects only the selected experts


def adapted(model, *, trained_router=True, seed=3):
    """A LoRA model whose adapters have an effect already; LoRA itself starts with B = 0."""
    has_router = model.config.routing == "learned"
    targets = [name for name in PROJECTIONS if any(n.endswith(name) for n, _ in model.named_modules())]
    saved = ["router"] if trained_router and has_router else None
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, modules_to_save=saved,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.2 * noise)
    return wrapped.eval()


@pytest.mark.parametrize("setting", [*SETTINGS, SPARSE], ids=setting_id)
def test_merged_adapters_give_the_logits_of_the_adapted_model(setting, tmp_path):
    ids = random_tokens(2, 9)
    plain, model = tiny_model(**setting), tiny_model(**setting)
    wrapped = adapted(model)
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        assert (expected - plain(ids).logits).abs().max() > 0.1
        wrapped.save_pretrained(tmp_path / "adapter")
        with no_router_warning():
            loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, **EXACT)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, **EXACT)
        assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_modules())
        merged.save_pretrained(tmp_path / "merged")
        with no_router_warning():
            again = GQEForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
        assert_same_tensors(again.state_dict(), merged.state_dict())


@pytest.mark.parametrize("setting", [{}, SPARSE, SPARSE | {"variant": "hard_concat"}], ids=setting_id)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_single_tokens_decode_through_the_adapters(setting, kind):
    with torch.no_grad():
        wrapped = adapted(tiny_model(**setting))
        ids, cache = random_tokens(1, 9), new_cache(kind, wrapped)
        pieces = [wrapped(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
        expected = wrapped(input_ids=ids).logits
        torch.testing.assert_close(torch.cat(pieces, 1), expected, **EXACT)
        with wrapped.disable_adapter():
            assert (wrapped(input_ids=ids).logits - expected).abs().max() > 0.1
            cache = new_cache(kind, wrapped)
            pieces = [wrapped(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
            torch.testing.assert_close(torch.cat(pieces, 1), wrapped(input_ids=ids).logits, **EXACT)


@pytest.mark.parametrize("trained_router", [True, False])
def test_lora_trains_the_projections_and_the_router_where_it_is_asked_to(trained_router):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    wrapped = adapted(model, trained_router=trained_router).train()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert {name.split(".")[6] for name in trained if "self_attn" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "q_shared", *(["router"] if trained_router else []),
    }  # fmt: skip
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids, losses = random_tokens(4, 12), []
    start = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(12):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all((p - start[name]).abs().max() > 0 for name, p in trained.items())
    kept = wrapped.unload().state_dict()  # the model without its adapters
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    changed = {name.rsplit(".", 1)[0] for name in before if not torch.equal(kept[name], before[name])}
    assert changed <= routers
    assert bool(changed) == trained_router


def test_the_router_is_no_target_of_all_linear():
    wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert not any("router" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    assert any("q_shared" in name for name, p in wrapped.named_parameters() if p.requires_grad)


# TRL


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(eos_token="<eos>")


def sft(tmp_path, tokenizer, trainer=GQESFTTrainer, model=None, trainer_arguments=None, **changes):
    """A trainer on 48 documents whose words count upwards."""
    draw = random.Random(0)
    texts = [" ".join(f"w{(s + i) % 29}" for i in range(draw.randint(3, 12))) for s in range(48)]
    settings = {
        "output_dir": str(tmp_path / "run"), "max_steps": 16, "per_device_train_batch_size": 4, "max_length": 24,
        "learning_rate": 1e-2, "logging_steps": 4, "report_to": [], "use_cpu": True, "bf16": False, "seed": 0,
        "save_strategy": "no", "disable_tqdm": True, "log_level": "error", "lr_scheduler_type": "constant",
    }  # fmt: skip
    return trainer(
        model=model if model is not None else tiny_model(dtype=torch.float32, exact_loss=False, initializer_range=0.05),
        args=trl.SFTConfig(**settings | changes),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        **trainer_arguments or {},
    )


def logged(trainer, key):
    return [log[key] for log in trainer.state.log_history if key in log]


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}, {"gradient_accumulation_steps": 2}],
    ids=["padded", "packed", "packed and cut", "accumulated"],
)
def test_sft_trains_with_the_models_own_loss(tmp_path, tokenizer, changes):
    trainer = sft(tmp_path, tokenizer, **changes)
    trainer.train()
    losses, lm_losses = logged(trainer, "loss"), logged(trainer, "lm_loss")
    assert not logged(trainer, "mean_token_accuracy")  # TRL's, of its own loss
    assert lm_losses[-1] < 0.8 * lm_losses[0]
    layers, top_k, coefficient = 2, 2, 0.01
    for loss, lm_loss in zip(losses, lm_losses, strict=True):  # a layer's term: k if balanced, up to M if collapsed
        assert 0.9 * top_k <= (loss - lm_loss) / (coefficient * layers) <= 4


def test_packed_documents_give_sft_the_loss_and_gradients_of_padded_ones(tmp_path, tokenizer):
    step = {}
    for name, changes in {"padded": {}, "packed": {"packing": True, "max_length": 512}}.items():
        model = tiny_model(dtype=torch.float64)
        trainer = sft(tmp_path, tokenizer, model=model, **changes)
        trainer.args.per_device_train_batch_size = 48 if name == "padded" else 1
        trainer._train_batch_size = trainer.args.per_device_train_batch_size
        batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        loss = trainer.compute_loss(model.train(), batches[0], num_items_in_batch=items)
        loss.backward()
        step[name] = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(step["packed"][0], step["padded"][0], **EXACT)
    assert_same_tensors(step["packed"][1], step["padded"][1])


@pytest.mark.skipif(
    "router_aux_loss_coef" not in trl.SFTConfig.__dataclass_fields__,
    reason="this TRL's SFTTrainer takes the loss that the model returns",
)
def test_stock_sft_trains_without_a_balance_loss_and_says_so_where_it_would_be_wrong(tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, trl.SFTTrainer, router_aux_loss_coef=0.0)
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.8 * logged(trainer, "loss")[0]
    assert trainer.model.config.router_aux_loss_coef == 0.0  # and so it is saved
    with pytest.raises(AttributeError, match=r"within each group.*GQESFTTrainer"):
        sft(tmp_path, tokenizer, trl.SFTTrainer).train()


def test_sft_trains_adapters(tmp_path, tokenizer):
    lora = peft.LoraConfig(r=4, target_modules=PROJECTIONS, modules_to_save=["router"])
    model = tiny_model(dtype=torch.float32, exact_loss=False)
    trainer = sft(tmp_path, tokenizer, model=model, trainer_arguments={"peft_config": lora})
    trainer.train()
    assert logged(trainer, "lm_loss")[-1] < 0.9 * logged(trainer, "lm_loss")[0]
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_sft_saves_a_checkpoint_with_the_shim(tmp_path, tokenizer):
    trainer = sft(tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "modeling_gqe.py").is_file()


def test_sft_refuses_a_loss_that_replaces_the_models(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"loss_type is 'dft'|compute_loss_func replace"):
        sft(tmp_path, tokenizer, loss_type="dft")


def preferences(tokenizer, tmp_path, name, **changes):
    """TRL's trainer of that name. For a reference model TRL loads the trained one again, by its name."""
    tiny_model(dtype=torch.float32, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    settings |= {"report_to": [], "bf16": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    rows, arguments = {"prompt": ["w1 w2"] * 2, "chosen": ["w3 w4"] * 2, "rejected": ["w5 w6"] * 2}, {}
    if name == "GRPO":
        rows = {"prompt": rows["prompt"]}
        settings |= {"num_generations": 2, "max_completion_length": 3}
        arguments["reward_funcs"] = lambda completions, **_: [float(len(text)) for text in completions]
    return getattr(trl, f"{name}Trainer")(
        model=GQEForCausalLM.from_pretrained(tmp_path / "model"),
        args=getattr(trl, f"{name}Config")(**settings | changes),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        **arguments,
    )


@pytest.mark.skipif(
    "router_aux_loss_coef" not in trl.DPOConfig.__dataclass_fields__, reason="this TRL has no balance loss of its own"
)
@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_trls_other_trainers_train_without_a_balance_loss_and_are_refused_with_one(tmp_path, tokenizer, name):
    trainer = preferences(tokenizer, tmp_path, name, router_aux_loss_coef=0.0)
    trainer.train()
    assert logged(trainer, "loss")
    with pytest.raises(AttributeError, match=rf"within each group.*router_aux_loss_coef=0\.0 in .*{name}Config"):
        preferences(tokenizer, tmp_path, name).train()
