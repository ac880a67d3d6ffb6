"""`query-experts evaluate`: a checkpoint's scores by lm-evaluation-harness, on the hub's questions or on local files.

The tasks, the model's wrapper and the scores are lm-eval's; what is added here is where questions may come from
(local_tasks.py) and how results are told.
"""

from __future__ import annotations

import difflib
import errno
import logging
import math
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from query_experts.common.checkpoints import load_tokenizer, load_whole
from query_experts.common.device import resolve_device
from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders, write_json
from query_experts.evaluate.local_tasks import num_examples, write_definitions

DTYPES = ("auto", "float32", "bfloat16", "float16")
FEWSHOT_SEED = 1234  # this and seed_all's are lm-eval's own
BEYOND_A_TABLE = ("out of range", "out of bounds", "device-side assert")  # torch on a CPU, and on CUDA
BOOTSTRAP_SAMPLES = 1000  # a perplexity's standard error is good to 2%; lm-eval's own 100,000 take minutes on LAMBADA


def evaluate(
    checkpoint: str,
    tasks: list[str],
    console: Console,
    *,
    data_dir: str | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    out: str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint (any causal model of Transformers) and print a table. -> what `out` holds.

    checkpoint: a folder, or a name on the hub. tasks: names of lm-eval's tasks, groups or tags. data_dir: a folder of
    benchmark files in place of the hub. limit: questions of each task. max_length: tokens that the model is given at
    once; by default max_position_embeddings. dtype: of the weights; auto is the checkpoint's. out: a new file for the
    results, JSON. Raises SettingError.
    """
    least = {"batch_size": (batch_size, 1), "limit": (limit, 1), "num_fewshot": (num_fewshot, 0)}
    for name, (value, lowest) in (least | {"max_length": (max_length, 1)}).items():
        if value is not None and value < lowest:
            raise SettingError(f"{name} is {value}; it must be {lowest} or more")
    if dtype not in DTYPES:
        raise SettingError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if out is not None:
        require_new_file(Path(out))
    device = resolve_device(device)
    quiet()
    model, tokenizer = load_model(checkpoint, dtype)
    scorer = Scorer(
        pretrained=model.to(device), tokenizer=tokenizer, backend="causal", batch_size=batch_size,
        max_length=max_length, softmax_dtype="float32",
    )  # fmt: skip
    seed_all()
    with TemporaryDirectory() as folder:
        asked, notes = load_tasks(tasks, data_dir, Path(folder), num_fewshot)
        try:
            scored = lm_eval.evaluate(scorer, asked, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False)
        except OverflowError as error:
            raise SettingError(
                f"checkpoint is {checkpoint}, whose perplexity is beyond any number; it must have learnt more, or "
                "tasks must ask for no perplexity"
            ) from error
    dtype = str(model.dtype).removeprefix("torch.")
    results = {
        "checkpoint": checkpoint,
        "model": {
            "type": model.config.model_type,
            "parameters": model.num_parameters(),
            "max_length": scorer.max_length,
        },
        "requests": {"all": scorer.requests, "truncated": scorer.truncated},
        "tasks": task_results(scored, notes),
        "settings": {"data_dir": data_dir, "batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot},
        "environment": environment(device, dtype) | {name: version(name) for name in ("lm_eval", "datasets")},
    }
    try:
        print_results(results, console)
    finally:  # each is done though the other fails: nobody reads, or the disk is full
        if out is not None:
            write_json(Path(out), results)
    return results


def require_new_file(out: Path) -> None:
    """Raises SettingError where results can't be written, or would take the place of a file."""
    if out.is_dir():
        raise SettingError(f"out is {out}, which is a folder; it must be a file for the results")
    if out.exists():
        raise SettingError(f"out is {out}, which exists; it must be a new file")
    try:
        with no_empty_folders(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.touch()
            out.unlink()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise SettingError(f"out is {out}, which can't be written ({error.strerror}); it must be a new file") from error


def seed_all() -> None:
    """Seeds as lm-eval's own command sets them: some tasks shuffle their answers as they load."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


class Scorer(HFLM):
    """lm-eval's wrapper of a model, which tells how many contexts it has cut, and in a sentence what it can't score."""

    requests = 0
    truncated = 0

    def _loglikelihood_tokens(self, requests: list[Any], *options: Any, **named: Any) -> list[tuple[float, bool]]:
        """requests: (texts, tokens of the context, tokens of the continuation)."""
        longest = max(len(continuation) for _, _, continuation in requests)
        for texts, *halves in requests:
            if not all(halves):
                raise SettingError(
                    f"tasks hold the question and answer {texts}, and to the checkpoint's tokenizer one of them is no "
                    "token; both must be some"
                )
        if longest > self.max_length:
            raise SettingError(
                f"max_length is {self.max_length}, and these tasks have an answer of {longest} tokens; it must be so "
                "many (a model with rotary embeddings takes more than it was trained on, and less well)"
            )
        self.requests += len(requests)
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        with self.length_refused():
            scores = super()._loglikelihood_tokens(requests, *options, **named)
        if any(math.isnan(log_likelihood) for log_likelihood, _ in scores):  # argmax would take it for the best
            raise SettingError(
                f"dtype is {str(self.model.dtype).removeprefix('torch.')}, in which the checkpoint gives "
                "log-likelihoods that aren't numbers; it must be a wider one"
            )
        return scores

    def generate_until(self, *options: Any, **named: Any) -> list[str]:
        with self.length_refused():
            return super().generate_until(*options, **named)

    def tok_batch_encode(
        self, strings: list[str], *options: Any, left_truncate_len: int | None = None, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts of texts to generate. -> tokens and mask, [texts, longest]."""
        tokens, mask = super().tok_batch_encode(strings, *options, **named)
        self.requests += len(strings)
        if left_truncate_len:
            self.truncated += int((mask.sum(-1) > left_truncate_len).sum())
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    @contextmanager
    def length_refused(self) -> Iterator[None]:
        """Raises SettingError where texts to generate don't fit in max_length, or it is beyond a table of positions."""
        try:
            yield
        except (AssertionError, IndexError, RuntimeError) as error:
            if "maximum sequence length" in str(error):
                wanted = "these tasks ask for texts as long as that; it must be more"
            elif self._max_length and any(words in str(error) for words in BEYOND_A_TABLE):
                wanted = "the checkpoint has fewer positions; it must be as many or less"
            else:
                raise
            traceback.clear_frames(error.__traceback__)  # which hold lm-eval's bar, and the sentence goes below it
            raise SettingError(f"max_length is {self.max_length}, and {wanted}") from error


def quiet() -> None:
    """Leave lm-eval's progress bars on the screen, and errors."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()


def load_model(checkpoint: str, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint. Raises SettingError if it has no weights, or no tokenizer, to score with."""
    model = load_whole(AutoModelForCausalLM, checkpoint, dtype, "checkpoint")
    tokenizer = load_tokenizer(checkpoint, model, "checkpoint")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SettingError(
            f"checkpoint is {checkpoint}, whose tokenizer has neither a bos_token nor an eos_token; it must have one, "
            "for texts to begin with"
        )
    return model, tokenizer


@cache
def definitions() -> TaskManager:
    """lm-eval's own task definitions, some 14,000: reading them takes seconds."""
    return TaskManager()


def load_tasks(
    tasks: list[str], data_dir: str | None, folder: Path, num_fewshot: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """lm-eval's `TaskDict` of the tasks and groups of those names; and task -> note on its local questions."""
    manager = definitions()
    names = task_names(tasks, manager.task_index)
    notes: dict[str, str] = {}
    if data_dir is not None:
        if not data_dir:
            raise SettingError("data_dir is empty; it must be a folder of benchmark files")
        notes = write_definitions(names, manager.task_index, Path(data_dir), folder, num_fewshot)
        manager = TaskManager(include_defaults=False, include_path=str(folder))
    asked: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except OSError as error:
            raise SettingError(
                f"tasks holds {name!r}, whose questions can't be loaded ({error}); without the hub, data_dir must be a "
                "folder of benchmark files"
            ) from error
        except Exception as error:  # of the task's own code
            raise SettingError(
                f"tasks holds {name!r}, which can't be loaded ({type(error).__name__}: {error}); it must be a task "
                "that lm-eval can load here"
            ) from error
        for task, loaded in found["tasks"].items():
            if task in asked["tasks"] and loaded.dump_config() != asked["tasks"][task].dump_config():
                raise SettingError(
                    f"tasks holds {task!r} a second time, in {name!r} and with other settings; each must have a run of "
                    "its own"
                )
        asked = {kind: held | found.get(kind, {}) for kind, held in asked.items()}
    for name, task in asked["tasks"].items():
        require_texts(name, task)
        set_examples(name, task, num_fewshot)
    return asked, notes


def require_texts(name: str, task: Any) -> None:
    """Raises SettingError for a task that lm-eval's wrapper can't run, or not without leave."""
    for flag, what in {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "isn't of texts alone"}.items():
        if getattr(task, flag, False):
            raise SettingError(f"tasks holds {name!r}, which {what}; it must be a task that only reads texts")


def set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """As many examples before a question as asked. Raises SettingError for more than the task can show."""
    shots = num_examples(task.OUTPUT_TYPE, task.get_config("num_fewshot"), num_fewshot)
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if not shots or not hasattr(task, "sampler"):
        return
    shown = len(task.sampler.df) - (task.fewshot_cfg.split == task.get_config("test_split"))  # one is the question
    if shots > shown:
        raise SettingError(f"num_fewshot is {shots}, and {name} has {shown} to show; it must be so many or less")


def task_names(tasks: list[str], index: dict[str, Any]) -> list[str]:
    """The names of tasks and groups, each once, with tags resolved. Raises SettingError for one that lm-eval lacks."""
    names: list[str] = []
    for name in (part for word in tasks for part in word.replace(",", " ").split()):
        if name not in index:
            near = difflib.get_close_matches(name, index, n=3)
            known = f", such as {', '.join(near)}" if near else ""
            raise SettingError(f"tasks holds {name!r}; it must be a task, group or tag of lm-eval{known}")
        entry = index[name]
        names += sorted(entry.tags) if entry.kind.name == "TAG" else [name]
    if not names:
        raise SettingError("tasks is empty; it must name tasks of lm-eval, such as hellaswag,arc_easy,piqa")
    return list(dict.fromkeys(names))


def task_results(scored: dict[str, Any], notes: dict[str, str]) -> dict[str, Any]:
    """Task or group -> version, items, few-shot examples, and metric -> value, standard error, higher is better.

    A number that isn't finite, or a standard error that lm-eval doesn't give, is None.
    """
    tasks = {}
    for name, found in scored["results"].items():
        metrics = {}
        for key, value in found.items():
            metric, comma, used = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                better = scored["higher_is_better"].get(name, {}).get(metric)
                label = metric if used == "none" else f"{metric} ({used})"
                error = found.get(f"{metric}_stderr,{used}")
                metrics[label] = {
                    "value": finite_or_none(value),
                    "stderr": finite_or_none(error),
                    "higher_is_better": better,
                }
        if metrics:
            tasks[name] = {
                "version": scored["versions"].get(name), "items": found["sample_len"],
                "num_fewshot": scored["n-shot"].get(name), "metrics": metrics, "note": notes.get(name),
            }  # fmt: skip
    return tasks


def finite_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def readable(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.4f}" if abs(number) < 1e5 else f"{number:.3e}"


def print_results(results: dict[str, Any], console: Console) -> None:
    table = Table(title=Text(f"{results['checkpoint']}, by lm-eval {results['environment']['lm_eval']}", "table.title"))
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "standard error", "items"):
        table.add_column(heading, justify="right")
    for name, task in results["tasks"].items():
        for metric, score in task["metrics"].items():
            numbers = (readable(score[kind]) for kind in ("value", "stderr"))
            table.add_row(name, metric, *numbers, f"{task['items']:,}")
    console.print(table)
    if (limit := results["settings"]["limit"]) is not None:
        console.print(
            f"Of each task at most {limit:,} questions (limit): these are no benchmark's scores.", highlight=False
        )
    requests = results["requests"]
    if requests["truncated"]:
        console.print(
            f"Of {requests['all']:,} requests {requests['truncated']:,} lost the start of their context: the model was "
            f"given {results['model']['max_length']:,} tokens at most (max_length).",
            highlight=False,
        )
    asked = results["settings"]["num_fewshot"]
    alone = [name for name, task in results["tasks"].items() if asked and task["num_fewshot"] == 0]
    if alone:
        console.print(
            f"No examples before {', '.join(alone[:3])}{' and others' * (len(alone) > 3)}, whatever num_fewshot is: "
            "lm-eval allows none there.",
            highlight=False,
        )
    for name, task in results["tasks"].items():
        if task["note"]:
            console.print(f"{name} is not quite comparable with published scores: {task['note']}.", highlight=False)
