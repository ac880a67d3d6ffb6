"""Converts a dense checkpoint to GQE, then trains it with fewer active experts and the dense model as teacher.

python examples/convert_and_distill.py                           # makes a tiny dense Llama first
python examples/convert_and_distill.py --dense FOLDER --text my-text.txt --out my-gqe
"""

import argparse
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)  # fmt: skip

from query_experts.convert import from_dense
from query_experts.distillation import DistillationTrainer
from query_experts.training import GQETrainer

BATCH, LENGTH = 8, 64
CHARACTERS = 8 * BATCH * LENGTH  # of the text for each step

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dense", type=Path, help="folder of a Llama, Mistral, Qwen2, Qwen3 or Phi-3 with its tokenizer")
parser.add_argument(
    "--text", type=Path,
    help=f"a UTF-8 file to train on; {CHARACTERS:,} characters a step are read; by default Python's standard library",
)  # fmt: skip
parser.add_argument("--top-k", type=int, default=1, help="active experts in each group")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--out", type=Path, default=Path("runs/example"))
args = parser.parse_args()
if args.steps < 1:
    parser.error(f"--steps is {args.steps}; it must be 1 or more")


def arguments(learning_rate: float = 3e-3) -> TrainingArguments:
    return TrainingArguments(
        args.out / "trainer", max_steps=args.steps, learning_rate=learning_rate, per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine", logging_steps=50, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip


def examples(rows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows]


def held_out_loss(model: PreTrainedModel) -> float:
    """The language-model loss on held-out text in nats a token."""
    return GQETrainer(model=model, args=arguments(), eval_dataset=examples(held_out)).evaluate()["eval_loss"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


set_seed(0)
files = [args.text] if args.text else sorted(Path(os.__file__).parent.glob("*.py"))
try:
    whole = "\n".join(file.read_text(encoding="utf-8") for file in files)
except (OSError, UnicodeDecodeError) as error:
    parser.error(f"--text is {args.text}, which can't be read: {error}")
text = whole[: CHARACTERS * args.steps]
print(f"reads {len(text):,} of {len(whole):,} characters of text")
tokenizer = AutoTokenizer.from_pretrained(args.dense) if args.dense else byte_tokenizer()
tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
rows = rows[torch.randperm(len(rows))]
held_out, training = rows[:32], rows[32:]
if len(training) < BATCH:
    parser.error(f"--text holds {len(tokens)} tokens; it must hold at least {(32 + BATCH) * LENGTH}")

if args.dense:
    dense = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.float32)
else:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    dense = LlamaForCausalLM(config)
try:
    from_dense(dense, top_k=args.top_k)
except ValueError as error:
    parser.error(f"--dense and --top-k can't be used: {error}")
if not args.dense:
    GQETrainer(model=dense, args=arguments(), train_dataset=examples(training)).train()
dense.eval()

full = from_dense(dense)  # all experts active
with torch.no_grad():
    some = held_out[:4].to(dense.device)  # a trainer may have moved the model to a GPU
    rounding = (full(some).logits - dense(some).logits).abs().max()
sparse = from_dense(dense, top_k=args.top_k, calibration=training[:64])  # the router is fitted to text
losses = {"dense": held_out_loss(dense), "all experts active": held_out_loss(full)}
losses[f"k = {args.top_k}, before training"] = held_out_loss(sparse)
DistillationTrainer(
    model=sparse, teacher=dense, weight=0.9, args=arguments(1e-3), train_dataset=examples(training)
).train()  # fmt: skip
losses[f"k = {args.top_k}, after training"] = held_out_loss(sparse)
sparse.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)

print(f"with all experts active, logits differ from the dense model's by {rounding:.1e} at most")
for name, loss in losses.items():
    print(f"held-out loss, {name}: {loss:.3f}")
print(f"saved in {args.out}")
