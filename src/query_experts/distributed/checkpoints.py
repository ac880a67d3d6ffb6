"""Checkpoints of Transformers' Trainer that appear whole or not at all, and that another number of ranks can load.

A checkpoint is written beside its place and renamed when every rank has written its part, and a list of its files with
their sizes and checksums. A model that Transformers sharded (`DistributedConfig`) is written by all ranks, each its own
shards, in the formats of torch.distributed.checkpoint; any other model is written as the Trainer writes it. Either kind
is read by either kind of model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from query_experts.common.files import checksum_of, parse_json, sync_file, sync_folder
from query_experts.distributed.ranks import gathered, rank_and_number
from query_experts.model.tied import check_tied

WRITING = "writing"  # the folder, beside the checkpoints, of one that isn't finished
FILES = "files.json"  # of a checkpoint: the size and the checksum of each other file
MOST_READ_AT_ONCE = 8
SHARDED_OPTIMIZER = "optimizer"  # the folder of the ranks' parts


class WholeCheckpoints(Trainer):
    """The part of a Trainer that writes and reads checkpoints."""

    _is_writing = False
    _to_push: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        arguments: Any = kwargs.get("args", args[1] if len(args) > 1 else None)
        model = kwargs.get("model", args[0] if args else None)
        strategy = getattr(arguments, "save_strategy", None)
        if is_sharded(model) and arguments is not None:  # which the stock Trainer refuses, as it couldn't resume
            arguments.save_strategy = "no"
        super().__init__(*args, **kwargs)
        if is_sharded(self.model):
            check_tied(self.model)
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of writes in place to outputs; there are none
            # it warns of the gradients' norm over two meshes
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if arguments is not None:
            arguments.save_strategy = strategy

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        if (mesh := built.get("parallelism_config")) is not None and self.args.use_cpu:
            mesh._validate_accelerator = lambda _: None  # it knows no ranks on a CPU, where gloo carries them as well
        return built

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, WRITING) if self._is_writing else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / WRITING, ignore_errors=True)
        barrier()
        self._is_writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_writing = False
        self._name_best(run / WRITING / name, run / name)
        barrier()  # every rank's files are there
        sums = of_all_ranks(written_out(run / WRITING / name))
        if self.args.should_save:
            put_in_place(run / WRITING / name, run / name, sums)
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)
        barrier()
        if self._to_push is not None:
            self._push_from_checkpoint(self._to_push)
            self._to_push = None

    def _name_best(self, written: Path, final: Path) -> None:
        """Has the Trainer's state name the best checkpoint by its final place, if it is the one just written."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _load_best_model(self) -> None:
        if not is_sharded(self.model):
            return super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None:
            self._load_from_checkpoint(best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._is_writing:  # it is pushed from its place, as the push may outlast the writing
            written = Path(checkpoint_folder)
            self._to_push = str(written.parents[1] / written.name)
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._is_writing and is_sharded(self.model):
            self.model.save_pretrained(output_dir, distributed_checkpoint=True)
        else:
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            return super()._save_optimizer_and_scheduler(output_dir)
        from transformers.distributed.checkpoint import save_optimizer_distributed

        save_optimizer_distributed(self.model, self._plain_optimizer(), os.path.join(output_dir, SHARDED_OPTIMIZER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (is_sharded(self.model) or has_shards(Path(resume_from_checkpoint))):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if not has_shards(Path(resume_from_checkpoint)):
            return load_whole_weights(model, Path(resume_from_checkpoint))
        from transformers.distributed.checkpoint import _load_model_checkpoint_distributed

        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process may read shards
        _load_model_checkpoint_distributed(model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (is_sharded(self.model) or has_shards(Path(checkpoint))):
            return super()._load_optimizer_and_scheduler(checkpoint)
        if has_shards(Path(checkpoint)):
            from transformers.distributed.checkpoint import load_optimizer_distributed

            load_optimizer_distributed(self.model, self._plain_optimizer(), os.path.join(checkpoint, SHARDED_OPTIMIZER))
        else:
            self._shard_optimizer(torch.load(Path(checkpoint, OPTIMIZER_NAME), "cpu", weights_only=True, mmap=True))
        self._set_schedule(torch.load(Path(checkpoint, SCHEDULER_NAME), "cpu", weights_only=True))

    def _shard_optimizer(self, whole: dict[str, Any]) -> None:
        """Takes the state of an optimizer in one process, which numbers parameters in the order of its groups."""
        decayed = set(self.get_decay_parameter_names(self.model))
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        names = [n for n in trained if n in decayed] + [n for n in trained if n not in decayed]
        groups = [group | {"params": [names[i] for i in group["params"]]} for group in whole["param_groups"]]
        state: Any = {"state": {names[i]: value for i, value in whole["state"].items()}, "param_groups": groups}
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self.model, self._plain_optimizer(), state, options=options)

    def _set_schedule(self, kept: dict[str, Any]) -> None:
        """Puts the schedule at its step. Its rates are computed anew, as the groups may be others on another mesh."""
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        schedule.last_epoch, schedule._step_count = kept["last_epoch"], kept["_step_count"]
        schedule._last_lr = schedule.get_lr()
        for group, rate in zip(self._plain_optimizer().param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def _plain_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)


def is_sharded(model: Any) -> bool:
    """Whether Transformers sharded a model as it loaded it."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def has_shards(checkpoint: Path) -> bool:
    """Whether several ranks wrote a checkpoint's weights, each its own."""
    return (checkpoint / SHARDED_OPTIMIZER).is_dir()


def load_whole_weights(model: nn.Module, checkpoint: Path) -> None:
    """Gives each rank of a sharded model its part of an ordinary checkpoint, in which tied weights stand once."""
    whole: dict[str, Any] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        whole |= load_file(file)
    named = dict(model.named_parameters(remove_duplicate=False))
    kept_as = {id(p): name for name, p in named.items() if name in whole}
    whole |= {name: whole[kept_as[id(p)]] for name, p in named.items() if name not in whole and id(p) in kept_as}
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))


def barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def written_out(checkpoint: Path) -> dict[str, str]:
    """Has this rank's files on the disk, and returns their checksums."""
    own = [path for path in files_of(checkpoint) if writer_of(path.name) == rank_and_number()[0]]
    for path in own:
        sync_file(path)
    return checksums(checkpoint, own)


def of_all_ranks(sums: dict[str, str]) -> dict[str, str]:
    """All ranks' checksums. Every rank must call this."""
    return {name: value for each in gathered(sums) for name, value in each.items()}


def writer_of(name: str) -> int:
    """The rank that wrote a file of a checkpoint, by the file's name: rank 0 unless it has another's number."""
    own = re.match(r"rng_state_(\d+)\.pth|__(\d+)_\d+\.distcp", name)
    counted_from_one = re.match(r"shard-(\d+)-", name)
    number = int(counted_from_one[1]) - 1 if counted_from_one else int(own[1] or own[2]) if own else 0
    return number if number < rank_and_number()[1] else 0


def put_in_place(written: Path, final: Path, sums: dict[str, str]) -> None:
    """Lists a checkpoint's files in it, and gives it its name, in place of one that has it, when all is on the disk.

    sums: the checksums of its files, which are on the disk.
    """
    (written / FILES).write_text(json.dumps({"sizes": sizes(written), "sha256": sums}), encoding="utf-8")
    sync_file(written / FILES)
    for folder in (*(path for path in written.rglob("*") if path.is_dir()), written):
        sync_folder(folder)
    shutil.rmtree(final, ignore_errors=True)
    written.replace(final)
    sync_folder(final.parent)
    with suppress(OSError):  # another file system's own files in it
        written.parent.rmdir()


def files_of(checkpoint: Path) -> list[Path]:
    """The files that a checkpoint lists: all but the list."""
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != checkpoint / FILES]


def sizes(checkpoint: Path) -> dict[str, int]:
    """The files of a checkpoint, with their bytes."""
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files_of(checkpoint)}


def checksums(checkpoint: Path, files: list[Path]) -> dict[str, str]:
    """Files of a checkpoint, with the SHA-256 of each. They are read side by side."""
    with ThreadPoolExecutor(MOST_READ_AT_ONCE) as pool:
        found = pool.map(lambda path: checksum_of([path]), files)
    return {path.relative_to(checkpoint).as_posix(): digest for path, digest in zip(files, found, strict=True)}


def damaged_files(checkpoint: Path) -> list[str]:
    """The files that a checkpoint lists and that are missing or other than listed.

    Earlier versions wrote lists without checksums, and in one process none.

    Raises ValueError for a list that is damaged.
    """
    if not (checkpoint / FILES).exists():
        of_ranks = has_shards(checkpoint) or any(checkpoint.glob("rng_state_*.pth"))
        return [FILES] if of_ranks else []
    listed = parse_json((checkpoint / FILES).read_text(encoding="utf-8"))
    if not (isinstance(listed, dict) and "sizes" in listed and all(isinstance(v, dict) for v in listed.values())):
        raise ValueError(f"{checkpoint / FILES} is damaged")
    wrong = differing(listed["sizes"], sizes(checkpoint))
    return (
        wrong
        if wrong or "sha256" not in listed
        else differing(listed["sha256"], checksums(checkpoint, files_of(checkpoint)))
    )


def differing(listed: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [name for name, value in listed.items() if there.get(name) != value]
