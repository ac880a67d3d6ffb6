"""Trains a model that several processes share, with a script of your own:

    torchrun --nproc_per_node 2 examples/sharded.py runs/sharded

Run again, it goes on from its last checkpoint, also with another number of processes.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.trainer_utils import get_last_checkpoint

from query_experts import GQEConfig, GQEForCausalLM
from query_experts.training import GQETrainer


def main(folder: Path) -> None:
    dist.init_process_group()  # on GPUs, torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) comes first
    initial = folder / "initial"
    if dist.get_rank() == 0 and not initial.exists():  # each process reads its part of it
        torch.manual_seed(0)
        GQEForCausalLM(GQEConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=8,
        )).save_pretrained(initial)  # fmt: skip
    dist.barrier()
    sharding = DistributedConfig(fsdp_size=dist.get_world_size())  # or tp_size, or both
    model = GQEForCausalLM.from_pretrained(initial, distributed_config=sharding)

    rows = torch.arange(64 * 32).remainder(97).view(64, 32)  # your tokens
    arguments = TrainingArguments(
        str(folder / "checkpoints"), max_steps=8, save_steps=4, logging_steps=1, per_device_train_batch_size=4,
        use_cpu=not torch.cuda.is_available(), report_to=[],
    )  # fmt: skip
    trainer = GQETrainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    before = Path(arguments.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(before) if before.exists() else None)
    model.save_pretrained(folder / "model")  # on every process: an ordinary checkpoint
    if dist.get_rank() == 0:
        print(f"Trained to step {trainer.state.global_step} of {arguments.max_steps}. Model: {folder / 'model'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 2 or "RANK" not in os.environ:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
