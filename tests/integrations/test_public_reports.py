"""Faults that users of other models, trainers and converters reported in public; above each test is the report."""

import json
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from model_helpers import (
    EXACT,
    SETTINGS,
    VOCABULARY,
    attention_backend,
    balance_by_hand,
    random_tokens,
    setting_id,
    tiny_config,
    tiny_llama_config,
    tiny_model,
)
from query_experts.common.checkpoints import load_whole
from query_experts.common.errors import SettingError
from query_experts.convert import from_dense
from query_experts.convert.folder import convert_folder
from query_experts.convert.settings import ConvertSettings
from query_experts.training import GQETrainer

# training


def small_model(**changes):
    return tiny_model(dtype=torch.float32, exact_loss=False, num_hidden_layers=1, **changes)


def labelled(ids):
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def unlabelled(ids):
    return [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in ids]


def trainer_of(tmp_path, model, rows, trainer=GQETrainer, **changes):
    settings = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 2,
        "learning_rate": 0.0, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "log_level": "error",
    }  # fmt: skip
    arguments = TrainingArguments(**settings | changes)
    return trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


# huggingface/sentence-transformers#3145: auto_find_batch_size calls train again after each failure
@pytest.mark.parametrize("steps", [3, 1], ids=["ended", "failed"])
def test_what_an_earlier_call_of_train_did_not_log_is_not_in_the_next_ones_lm_loss(tmp_path, monkeypatch, steps):
    trainer = trainer_of(tmp_path, small_model(), labelled(random_tokens(6, 8)))  # of three steps it logs two
    step = trainer.training_step

    def out_of_memory(*inputs):
        loss = step(*inputs)
        if trainer.state.global_step == steps:
            raise MemoryError
        return loss

    with monkeypatch.context() as patched, suppress(MemoryError):
        patched.setattr(trainer, "training_step", out_of_memory)
        trainer.train()
    trainer.train()
    second = logged(trainer, "lm_loss")
    trainer.train()
    assert logged(trainer, "lm_loss") == second
    coefficient, top_k, experts = 0.01, 2, 4
    difference = logged(trainer, "loss")[0] - second[0]
    assert coefficient * top_k * 0.9 < difference < coefficient * experts  # one layer's balance loss, k to M


# huggingface/trl#6668
@pytest.mark.parametrize("trainer", [Trainer, GQETrainer])
def test_a_step_whose_labels_are_all_masked_leaves_the_weights_finite(tmp_path, trainer):
    model = small_model()
    embeddings = model.model.embed_tokens.weight.clone()
    trainer_of(tmp_path, model, unlabelled(random_tokens(6, 8)), trainer, learning_rate=1e-2).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    same = torch.equal(model.model.embed_tokens.weight, embeddings)
    assert same == (trainer is Trainer)  # which weights the balance loss by labels; GQETrainer weights it by tokens


# huggingface/trl#6668
def test_rows_whose_labels_are_all_masked_do_not_enter_eval_loss(tmp_path):
    ids = random_tokens(4, 8)
    rows = unlabelled(ids[:2]) + labelled(ids[2:])
    model = small_model()
    trainer = trainer_of(tmp_path, model, rows, per_device_eval_batch_size=2)
    expected = model(ids[2:], labels=ids[2:]).lm_loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# huggingface/transformers#34392
def test_rows_without_labels_are_refused_by_the_trainers_own_words(tmp_path):
    rows = [{"input_ids": row} for row in random_tokens(4, 8)]
    with pytest.raises(ValueError, match="did not return a loss from the inputs"):
        trainer_of(tmp_path, small_model(), rows).train()


# unslothai/unsloth-zoo#1066
@pytest.mark.parametrize("more", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=["plain", "all"])
def test_documents_that_transformers_flattens_have_the_loss_of_each_alone(tmp_path, more):
    model = tiny_model(num_hidden_layers=1)
    documents = [random_tokens(1, length, seed=length)[0].tolist() for length in (3, 5, 7, 2)]
    trainer = trainer_of(
        tmp_path, model, [{"input_ids": ids, "labels": ids} for ids in documents], max_steps=1, logging_steps=1,
        per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.data_collator = DataCollatorWithFlattening(**more)
    trainer.train()
    losses = [model(torch.tensor([ids]), labels=torch.tensor([ids])).lm_loss * (len(ids) - 1) for ids in documents]
    assert logged(trainer, "lm_loss") == [pytest.approx((sum(losses) / 13).item(), rel=1e-9)]


# vllm-project/vllm#2096: users change the number of active experts of a loaded model
def test_the_balance_loss_counts_the_experts_that_each_layer_selects():
    model = tiny_model(output_projection="expert", active_query_experts=2)
    model.model.layers[0].self_attn.set_top_k(1)
    model.config.active_query_experts = 3  # which no layer follows
    out = model(random_tokens(2, 9), output_router_logits=True)
    by_hand = [balance_by_hand([logits], [logits], 2, k) for logits, k in zip(out.router_logits, (1, 2), strict=True)]
    torch.testing.assert_close(out.aux_loss, sum(by_hand), **EXACT)


# adapters


# huggingface/transformers#38130
def test_a_trainer_evaluates_an_adapted_model(tmp_path):
    peft = pytest.importorskip("peft")
    ids = random_tokens(4, 8)
    model = small_model()
    expected = model(ids, labels=ids).lm_loss.item()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    trainer = trainer_of(tmp_path, wrapped, labelled(ids), per_device_eval_batch_size=4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert len(logged(trainer, "lm_loss")) == 1


# huggingface/transformers#45127
def test_embeddings_that_adapters_trained_apart_stay_apart_through_a_file(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(tie_word_embeddings=True, num_hidden_layers=1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the tied weights
        wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
    ids = random_tokens(2, 9)
    expected = wrapped.eval()(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.merge_and_unload().save_pretrained(tmp_path)
    again = load_whole(AutoModelForCausalLM, str(tmp_path), torch.float64, "checkpoint")
    torch.testing.assert_close(again(ids).logits, expected, **EXACT)


# huggingface/peft#2821
@pytest.mark.parametrize("setting", SETTINGS[:2], ids=setting_id)
def test_a_tuned_prefix_decodes_as_in_one_pass_and_padding_does_not_count(setting):
    peft = pytest.importorskip("peft")
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_model(num_hidden_layers=1, **setting), prefix).double().eval()
    ids = random_tokens(1, 12)
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.normal_()
        asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        out = wrapped.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **asked)
        one_pass = wrapped(input_ids=out.sequences[:, :-1]).logits[:, -4:]
        torch.testing.assert_close(torch.stack(out.logits, 1), one_pass, rtol=0, atol=1e-5, check_dtype=False)

        mask = (torch.arange(17) < 12).long()[None]
        padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
        right = wrapped(input_ids=padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100))
        torch.testing.assert_close(right.loss, wrapped(input_ids=ids, labels=ids).loss, **EXACT)


# attention


# huggingface/transformers#43705: is_causal=False makes an encoder of a decoder
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [6, 12])  # up to 8 tokens decode in a way of their own where there is a cache
def test_without_causality_every_real_token_is_seen_with_and_without_a_cache(backend, length):
    ids = random_tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        reference = tiny_model(num_hidden_layers=1)
        expected = reference(ids, attention_mask=mask, is_causal=False, use_cache=False).logits
        assert (reference(changed, attention_mask=mask, is_causal=False).logits - expected)[1, 0].abs().max() > 1e-3
        assert (reference(ids, attention_mask=mask).logits - expected)[1, 0].abs().max() > 1e-3
        with attention_backend(backend, is_causal=False, num_hidden_layers=1) as (model, tolerance):
            for use_cache in (True, False):
                logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
                torch.testing.assert_close(logits[mask == 1], expected[mask == 1], **tolerance)


# huggingface/transformers#43705
def test_packed_documents_without_causality_are_refused():
    model = tiny_model(num_hidden_layers=1)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="is_causal is False, and position_ids restart"):
        model(random_tokens(1, 5), position_ids=positions, is_causal=False)


# huggingface/transformers#40039: since then a cache forgets what lies outside of a window that the config names
@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 4), ("attention_chunk_size", 4), ("layer_types", ["full_attention", "sliding_attention"])],
)
def test_windows_that_the_cache_alone_would_obey_are_refused(field, value):
    with pytest.raises(Exception, match=rf"{field} (is 4|hold 'sliding_attention'); ") as refused:
        tiny_config(**{field: value})
    assert type(refused.value.__cause__) is ValueError
    tiny_config(layer_types=["full_attention"] * 2, sliding_window=None)


# huggingface/transformers#46612
@pytest.mark.parametrize("setting", SETTINGS[:3], ids=setting_id)
def test_beams_of_a_left_padded_batch_are_those_of_each_row_alone_in_a_static_cache_too(setting):
    model = tiny_model(num_hidden_layers=1, **setting)
    ids = random_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    asked = {
        "max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False, "eos_token_id": -1,
        "pad_token_id": 0,
    }  # fmt: skip
    alone = [model.generate(ids[:1, 4:], **asked)[:, -4:], model.generate(ids[1:], **asked)[:, -4:]]
    for cache in ("dynamic", "static"):
        kept = {"cache_implementation": cache, "disable_compile": True}
        assert torch.equal(model.generate(ids, attention_mask=mask, **asked, **kept)[:, -4:], torch.cat(alone))


# conversion


# huggingface/accelerate#2082
def test_a_model_whose_weights_are_offloaded_is_not_converted(tmp_path):
    dense = AutoModelForCausalLM.from_config(tiny_llama_config(num_hidden_layers=1))
    dense.model.layers[0].mlp.up_proj.to("meta")  # as accelerate leaves what it keeps on a disk
    with pytest.raises(SettingError, match=r"no values in memory for model\.layers\.0\.mlp\.up_proj\.weight"):
        from_dense(dense)


def sentencepiece_like():
    """A tokenizer as Llama 2, Mistral and Phi-3 have it: ▁ for a space, and one before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def byte_level():
    """A tokenizer as GPT-2 and Qwen2 have it, which cuts numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(folder, tokenizer, tokenizer_class):
    texts = ["hello world 1234", "the  quick\n\nfox"]
    special = ["<unk>", "<s>", "</s>", "<|end|>"]
    tokenizer.train_from_iterator(
        texts * 5, trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages }}"}
    named = {"tokenizer_class": tokenizer_class} if tokenizer_class else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | named))


# huggingface/transformers#45488: LlamaTokenizer and others make a tokenizer of their own of the vocabulary
@pytest.mark.parametrize(
    ("config", "make", "named"),
    [
        (LlamaConfig, sentencepiece_like, "LlamaTokenizerFast"),
        (MistralConfig, sentencepiece_like, "LlamaTokenizer"),
        (Phi3Config, sentencepiece_like, "LlamaTokenizer"),
        (Qwen2Config, sentencepiece_like, None),
        (Qwen2Config, byte_level, "LlamaTokenizerFast"),
        (MistralConfig, byte_level, "CodeLlamaTokenizerFast"),
    ],
)
def test_a_converted_checkpoints_tokenizer_makes_the_tokens_of_the_dense_ones(tmp_path, config, make, named):
    changes = {"sliding_window": None} if config is MistralConfig else {}
    sizes = tiny_llama_config().to_dict()
    sizes = {name: sizes[name] for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads")}
    dense = config(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        **sizes, **changes,
    )  # fmt: skip
    folder = tmp_path / "dense"
    AutoModelForCausalLM.from_config(dense).save_pretrained(folder)
    save_tokenizer(folder, make(), named)
    convert_folder(ConvertSettings(checkpoint=str(folder), out=str(tmp_path / "gqe")))
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "gqe"))
    assert type(after) is type(before)
    for text in ("hello world 1234", "  the quick\n\n fox", "<s> hello <|end|> fox"):
        ids = before(text).input_ids
        assert after(text).input_ids == ids
        assert after.decode(ids) == before.decode(ids)
    kept, given = (json.loads((path / "tokenizer_config.json").read_text()) for path in (tmp_path / "gqe", folder))
    assert kept.keys() - {"tokenizer_class"} == given.keys() - {"tokenizer_class"}
    assert config is not LlamaConfig or kept == given


# huggingface/transformers#45488
def test_a_tokenizer_that_cannot_be_loaded_is_copied_as_it_is(tmp_path):
    folder = tmp_path / "dense"
    AutoModelForCausalLM.from_config(tiny_llama_config(num_hidden_layers=1)).save_pretrained(folder)
    save_tokenizer(folder, byte_level(), "LlamaTokenizer")
    shutil.copyfile(folder / "tokenizer.json", folder / "other.json")
    (folder / "tokenizer.json").write_text("{}")
    convert_folder(ConvertSettings(checkpoint=str(folder), out=str(tmp_path / "gqe")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path(tmp_path / "gqe" / name).read_bytes() == (folder / name).read_bytes()
