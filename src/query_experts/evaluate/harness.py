"""`query-experts evaluate`: scores a checkpoint with lm-evaluation-harness, on questions of the hub or of local files.

The tasks, the model's wrapper and the scores are lm-eval's. This package adds local files as a source of questions
(local_tasks.py), error sentences, and the results (results.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import logging
import math
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
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

from query_experts.common.checkpoints import load_tokenizer, load_whole, tokens_after_text
from query_experts.common.environment import environment
from query_experts.common.errors import SettingError
from query_experts.common.files import no_empty_folders, write_json
from query_experts.evaluate.local_tasks import num_examples, write_definitions
from query_experts.evaluate.results import (
    EvaluationEnvironment,
    EvaluationResult,
    MetricScore,
    ModelFacts,
    RequestCounts,
    RequestedSettings,
    TaskScore,
)
from query_experts.evaluate.settings import EvaluateSettings

FEWSHOT_SEED = 1234  # lm-eval's default, as are the seeds in seed_all
# torch's errors, on a CPU and on CUDA, for a position that a table of position embeddings doesn't have
POSITION_ERRORS = ("out of range", "out of bounds", "device-side assert")
BOOTSTRAP_SAMPLES = 1000  # gives a perplexity's standard error to 2%; lm-eval's 100,000 take minutes on LAMBADA


def evaluate(settings: EvaluateSettings, console: Console) -> EvaluationResult:
    """Score a checkpoint of any causal language model of Transformers, and print a table.

    Args:
        settings: the checkpoint, the tasks and how to score them.
        console: to print the table on.

    Returns:
        The results, which the file `out` holds too.

    Raises:
        SettingError: for a setting, checkpoint, task or benchmark file that can't be used.
    """
    settings.check()
    if settings.out is not None:
        require_new_file(Path(settings.out))
    silence_libraries()
    model, tokenizer = load_model(settings.checkpoint, settings.dtype)
    scorer = Scorer(
        pretrained=model.to(settings.torch_device), tokenizer=tokenizer, backend="causal",
        batch_size=settings.batch_size, max_length=settings.max_length, softmax_dtype="float32",
    )  # fmt: skip
    seed_all()
    with TemporaryDirectory() as folder:
        loaded, notes = load_tasks(settings.tasks, settings.data_dir, Path(folder), settings.num_fewshot)
        try:
            scored = lm_eval.evaluate(
                scorer, loaded, limit=settings.limit, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False
            )
        except OverflowError as error:
            raise SettingError(
                f"checkpoint is {settings.checkpoint}, whose perplexity is beyond any number; it must have learnt "
                "more, or tasks must ask for no perplexity"
            ) from error
    dtype = str(model.dtype).removeprefix("torch.")
    result = EvaluationResult(
        checkpoint=settings.checkpoint,
        model=ModelFacts(model.config.model_type, model.num_parameters(), scorer.max_length),
        requests=RequestCounts(scorer.requests, scorer.truncated),
        tasks=task_scores(scored, notes),
        settings=RequestedSettings(settings.data_dir, settings.batch_size, settings.limit, settings.num_fewshot),
        environment=EvaluationEnvironment(
            **vars(environment(settings.torch_device, dtype)), lm_eval=version("lm_eval"), datasets=version("datasets")
        ),
    )
    try:
        print_result(result, console)
    finally:  # also writes if printing fails, as to a closed pipe
        if settings.out is not None:
            write_json(Path(settings.out), dataclasses.asdict(result))
    return result


def require_new_file(out: Path) -> None:
    """Raises SettingError for a file that exists or can't be written."""
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
    """Set the seeds that lm-eval's own command sets: some tasks shuffle their answers when they load."""
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)


class Scorer(HFLM):
    """lm-eval's wrapper of a model; also counts requests, and refuses in a sentence what it can't score."""

    requests = 0
    truncated = 0  # requests that lost the start of their context

    def _loglikelihood_tokens(self, requests: list[Any], *options: Any, **named: Any) -> list[tuple[float, bool]]:
        """requests: (texts, tokens of the context, tokens of the answer) each."""
        longest = max(len(answer) for _, _, answer in requests)
        for texts, *tokens in requests:
            if not all(tokens):
                raise SettingError(
                    f"tasks hold the question and answer {texts}, one of which is no token to the checkpoint's "
                    "tokenizer; both must have tokens"
                )
        if longest > self.max_length:
            raise SettingError(
                f"max_length is {self.max_length}, and these tasks have an answer of {longest} tokens; it must be at "
                "least that (a model with rotary embeddings takes more than it was trained on, and is worse there)"
            )
        self.requests += len(requests)
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        with self.length_errors_as_setting_errors():
            scores = super()._loglikelihood_tokens(requests, *options, **named)
        if any(math.isnan(log_likelihood) for log_likelihood, _ in scores):  # argmax would choose NaN
            raise SettingError(
                f"dtype is {str(self.model.dtype).removeprefix('torch.')}, in which the checkpoint gives "
                "log-likelihoods that aren't numbers; it must be a wider one"
            )
        return scores

    @cached_property
    def tokens_after_text(self) -> list[int]:
        return tokens_after_text(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **named: Any) -> list[int]:
        """The ids of a text, without those that the tokenizer puts after it: an answer goes on from a context."""
        ids = super().tok_encode(string, add_special_tokens, **named)
        added = [] if add_special_tokens is False else self.tokens_after_text
        return ids[: len(ids) - len(added)] if added and ids[-len(added) :] == added else ids

    def generate_until(self, *options: Any, **named: Any) -> list[str]:
        if self.tokenizer.eos_token_id is None:
            raise SettingError(
                "tasks ask for generated text, and the checkpoint's tokenizer has no eos_token to end one; they must "
                "be tasks that only score texts"
            )
        with self.length_errors_as_setting_errors():
            return super().generate_until(*options, **named)

    def tok_batch_encode(
        self, strings: list[str], *options: Any, left_truncate_len: int | None = None, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The contexts of texts to generate -> token ids and mask, int64 [texts, longest]."""
        tokens, mask = super().tok_batch_encode(strings, *options, **named)
        if added := self.tokens_after_text:
            tokens, mask = tokens[:, : -len(added)], mask[:, : -len(added)]
        self.requests += len(strings)
        if left_truncate_len:
            self.truncated += int((mask.sum(-1) > left_truncate_len).sum())
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    @contextmanager
    def length_errors_as_setting_errors(self) -> Iterator[None]:
        """Raises SettingError if max_length is too short for the text to generate, or exceeds the model's positions."""
        try:
            yield
        except (AssertionError, IndexError, RuntimeError) as error:
            if "maximum sequence length" in str(error):
                problem = "these tasks ask for texts as long as that; it must be more"
            elif self._max_length and any(words in str(error) for words in POSITION_ERRORS):
                problem = "the checkpoint has fewer positions; it must be as many or less"
            else:
                raise
            traceback.clear_frames(error.__traceback__)  # closes lm-eval's progress bar, so that the sentence is below
            raise SettingError(f"max_length is {self.max_length}, and {problem}") from error


def silence_libraries() -> None:
    """Show only errors and lm-eval's progress bars."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()


def load_model(checkpoint: str, dtype: str) -> tuple[Any, Any]:
    """The model and tokenizer of a checkpoint. Raises SettingError for one that can't be loaded or scored."""
    model = load_whole(AutoModelForCausalLM, checkpoint, dtype, "checkpoint")
    tokenizer = load_tokenizer(checkpoint, model, "checkpoint")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise SettingError(
            f"checkpoint is {checkpoint}, whose tokenizer has neither a bos_token nor an eos_token; it must have one, "
            "to begin texts with"
        )
    return model, tokenizer


@cache
def definitions() -> TaskManager:
    """lm-eval's own task definitions; kept, as there are about 14,000 and reading them takes seconds."""
    return TaskManager()


def load_tasks(
    tasks: list[str], data_dir: str | None, folder: Path, num_fewshot: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Load tasks, groups and tags.

    data_dir: a folder of benchmark files, or None for the hub. folder: an empty one for definitions. -> lm-eval's
    `TaskDict`, and task -> note on its local questions. Raises SettingError for one that can't be loaded.
    """
    manager = definitions()
    names = task_names(tasks, manager.task_index)
    notes: dict[str, str] = {}
    if data_dir is not None:
        if not data_dir:
            raise SettingError("data_dir is empty; it must be a folder of benchmark files")
        notes = write_definitions(names, manager.task_index, Path(data_dir), folder, num_fewshot)
        manager = TaskManager(include_defaults=False, include_path=str(folder))
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except OSError as error:
            raise SettingError(
                f"tasks holds {name!r}, whose questions can't be loaded ({error}); without the hub, data_dir must be a "
                "folder of benchmark files"
            ) from error
        except Exception as error:  # the task's own code raises errors of any kind
            raise SettingError(
                f"tasks holds {name!r}, which can't be loaded ({type(error).__name__}: {error}); it must be a task "
                "that lm-eval can load here"
            ) from error
        for task_name, task in found["tasks"].items():
            before = loaded["tasks"].get(task_name)
            if before is not None and task.dump_config() != before.dump_config():
                raise SettingError(
                    f"tasks holds {task_name!r} a second time, in {name!r} and with other settings; each must have a "
                    "run of its own"
                )
        loaded = {kind: entries | found.get(kind, {}) for kind, entries in loaded.items()}
    for name, task in loaded["tasks"].items():
        check_only_texts(name, task)
        set_examples(name, task, num_fewshot)
    return loaded, notes


def check_only_texts(name: str, task: Any) -> None:
    """Raises SettingError for a task that lm-eval's wrapper can't run, or only with the user's consent."""
    problems = {"UNSAFE_CODE": "runs code that the model writes", "MULTIMODAL": "has other inputs than text"}
    for flag, problem in problems.items():
        if getattr(task, flag, False):
            raise SettingError(f"tasks holds {name!r}, which {problem}; it must be a task that only reads texts")


def set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set the number of few-shot examples. Raises SettingError for more than the task has."""
    shots = num_examples(task.OUTPUT_TYPE, task.get_config("num_fewshot"), num_fewshot)
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(FEWSHOT_SEED)
    if not shots or not hasattr(task, "sampler"):
        return
    available = len(task.sampler.df) - (task.fewshot_cfg.split == task.get_config("test_split"))  # one is the question
    if shots > available:
        raise SettingError(f"num_fewshot is {shots}, and {name} has {available} to show; it must be no more")


def task_names(tasks: list[str], index: dict[str, Any]) -> list[str]:
    """The names of tasks and groups, each once, with tags resolved. Raises SettingError for an unknown name.

    tasks: names, also several in one string, with commas or blanks between. index: name -> lm-eval's entry.
    """
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


def task_scores(scored: dict[str, Any], notes: dict[str, str]) -> dict[str, TaskScore]:
    """Task or group -> its scores. scored: lm-eval's results. notes: task -> note on its local questions."""
    tasks = {}
    for name, found in scored["results"].items():
        metrics = {}
        for key, value in found.items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                label = metric if filter_name == "none" else f"{metric} ({filter_name})"
                metrics[label] = MetricScore(
                    value=finite_or_none(value),
                    stderr=finite_or_none(found.get(f"{metric}_stderr,{filter_name}")),
                    higher_is_better=scored["higher_is_better"].get(name, {}).get(metric),
                )
        if metrics:
            tasks[name] = TaskScore(
                version=scored["versions"].get(name),
                items=found["sample_len"],
                num_fewshot=scored["n-shot"].get(name),
                metrics=metrics,
                note=notes.get(name),
            )
    return tasks


def finite_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def score_text(number: float | None) -> str:
    """A score as the table shows it."""
    if number is None:
        return "-"
    return f"{number:.4f}" if abs(number) < 1e5 else f"{number:.3e}"


def print_result(result: EvaluationResult, console: Console) -> None:
    """Print a table of the scores, and below it what limits their meaning."""
    title = f"{result.checkpoint}, by lm-eval {result.environment.lm_eval}"
    table = Table(title=Text(title, "table.title"))
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "standard error", "items"):
        table.add_column(heading, justify="right")
    for name, task in result.tasks.items():
        for metric, score in task.metrics.items():
            table.add_row(name, metric, score_text(score.value), score_text(score.stderr), f"{task.items:,}")
    console.print(table)
    for remark in remarks(result):
        console.print(remark, highlight=False)


def remarks(result: EvaluationResult) -> Iterator[str]:
    """What the scores can't be compared with, and what the model didn't see."""
    settings, requests = result.settings, result.requests
    if settings.limit is not None:
        yield f"Of each task at most {settings.limit:,} questions (limit): these are no benchmark's scores."
    if requests.truncated:
        yield (
            f"Of {requests.all:,} requests {requests.truncated:,} lost the start of their context: the model was given "
            f"{result.model.max_length:,} tokens at most (max_length)."
        )
    without = [name for name, task in result.tasks.items() if settings.num_fewshot and task.num_fewshot == 0]
    if without:
        yield (
            f"No examples before {', '.join(without[:3])}{' and others' * (len(without) > 3)}, whatever num_fewshot "
            "is: lm-eval allows none there."
        )
    for name, task in result.tasks.items():
        if task.note:
            yield f"{name} is not quite comparable with published scores: {task.note}."
