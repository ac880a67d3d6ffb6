"""Makes benchmark files in their authors' format usable by the tasks of lm-evaluation-harness.

A task definition of lm-eval names a dataset on the hub. This file makes that dataset's rows from local files, with the
hub's columns, types and splits. Then it writes a definition that includes lm-eval's own and only changes where the rows
are. So the prompts, choices and metrics stay lm-eval's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, Features, List, Value
from lm_eval.tasks.hellaswag.utils import preprocess

from query_experts.common.errors import SettingError
from query_experts.common.files import parse_json

Row = dict[str, Any]
TEXT = Value("string")
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass(frozen=True)
class LocalDataset:
    """A dataset of the hub in its authors' files.

    Attributes:
        folder: of the files, within the data folder.
        files: split -> names that its file may have; `{subset}` stands for the subset's name.
        features: the hub's columns and their types.
        read: reads a file into the hub's rows.
        subsets: the hub's subsets that have such files; empty for any.
        note: says why scores on these rows aren't quite comparable with published ones; None if they are.
    """

    folder: str
    files: dict[str, tuple[str, ...]]
    features: dict[str, Any]
    read: Callable[[Path], Iterable[Row]]
    subsets: tuple[str | None, ...] = (None,)
    note: Callable[[list[Row]], str | None] = lambda rows: None

    def path(self, data_dir: Path, split: str, subset: str | None) -> Path:
        """The file of a split: the first name that exists, or else the first name."""
        paths = [data_dir / self.folder / file.format(subset=subset) for file in self.files[split]]
        return next((path for path in paths if path.is_file()), paths[0])


def write_definitions(
    names: list[str], index: dict[str, Any], data_dir: Path, folder: Path, shots: int | None
) -> dict[str, str]:
    """Write definitions of tasks and groups, and their rows, into a folder.

    Args:
        names: of the tasks and groups.
        index: name -> its entry in lm-eval's TaskManager.
        data_dir: the folder of benchmark files.
        folder: to write to.
        shots: few-shot examples before each question; None for the task's own number.

    Returns:
        Task -> why its scores aren't quite comparable with published ones; only tasks with such a note.

    Raises:
        SettingError: for a task without local files, and for files that are missing or damaged.
    """
    if not data_dir.is_dir():
        raise SettingError(f"data_dir is {data_dir}; it must be a folder of benchmark files")
    notes: dict[str, str] = {}
    for name in names:
        entry = index[name]
        if entry.kind.name == "GROUP":
            write_definition(folder, name, {"include": str(entry.yaml_path), "group": name})
            notes |= write_definitions(group_members(name, entry, index), index, data_dir, folder, shots)
            continue
        definition, note = local_definition(name, entry.cfg or {}, data_dir, folder, shots)
        write_definition(folder, name, {"include": str(entry.yaml_path)} | definition)
        notes |= {name: note} if note else {}
    return notes


def write_definition(folder: Path, name: str, definition: Row) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def group_members(name: str, entry: Any, index: dict[str, Any]) -> list[str]:
    """The tasks and groups in a group. Raises SettingError for a group that changes its tasks' settings."""
    members = entry.cfg["task"]
    if not all(isinstance(member, str) and member in index for member in members):
        raise SettingError(
            f"tasks holds {name!r}, a group with settings of its own for its tasks, which has no local form; with "
            "data_dir it must be a task, or a group that only lists tasks"
        )
    return members


def local_definition(name: str, task: Row, data_dir: Path, folder: Path, shots: int | None) -> tuple[Row, str | None]:
    """The fields of a task's definition that differ from lm-eval's, and the note on its rows.

    task: lm-eval's definition.
    """
    dataset = LOCAL_DATASETS.get(task.get("dataset_path", ""))
    subset = task.get("dataset_name")
    if not dataset or (dataset.subsets and subset not in dataset.subsets):
        raise SettingError(
            f"tasks holds {name!r}, which has no local form; with data_dir it must be a task on one of "
            f"{', '.join(LOCAL_DATASETS)}"
        )
    question_split = task.get("test_split") or task["validation_split"]
    example_split = task.get("fewshot_split") or task.get("training_split")
    shots = num_examples(task.get("output_type"), task.get("num_fewshot"), shots)
    needed = {question_split} | ({example_split} if shots and example_split else set())
    files: dict[str, str] = {}
    note = None
    for split in dataset.files:
        path = dataset.path(data_dir, split, subset)
        if not path.is_file():
            if split in needed:
                use = "asks" if split == question_split else "takes its examples from (num_fewshot)"
                raise SettingError(f"data_dir holds no {path}, the {split} split, which {name} {use}")
            continue
        rows = read_rows(dataset, path)
        note = dataset.note(rows) if split == question_split else note
        files[split] = str(folder / f"{name}.{split}.parquet")
        Dataset.from_list(rows, features=Features(dataset.features)).to_parquet(files[split])
    definition: Row = {"dataset_path": "parquet", "dataset_name": None, "tag": None, "task": name}
    definition["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    absent = {key: None for key in (*SPLITS.values(), "fewshot_split") if task.get(key) not in files}
    return definition | absent, note


def num_examples(output_type: str | None, task_shots: int | None, shots: int | None) -> int:
    """Few-shot examples before each question: `shots`, or the task's own number if that is 0 or `shots` is None."""
    if output_type == "loglikelihood_rolling":  # scores a text without context, whatever number lm-eval records
        return 0
    return (task_shots if task_shots == 0 or shots is None else shots) or 0


def read_rows(dataset: LocalDataset, path: Path) -> list[Row]:
    """The hub's rows of a file. Raises SettingError for a file that is damaged or empty."""
    rows = list(dataset.read(path))
    if not rows:
        raise SettingError(f"data_dir holds {path}, which is empty; it must hold questions")
    return rows


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark. Raises SettingError for one that isn't UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingError(f"data_dir holds {path}, which is no UTF-8 text ({error.reason})") from error


def json_lines(make_row: Callable[[Row], Row]) -> Callable[[Path], Iterator[Row]]:
    """A reader of files with a JSON object on each line that isn't blank, which `make_row` turns into the hub's row."""

    def read(path: Path) -> Iterator[Row]:
        for number, line in enumerate(read_utf8(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = make_row(parse_json(line))
                json.dumps(row, ensure_ascii=False).encode()  # raises for half a surrogate pair
                yield row
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise SettingError(f"data_dir holds {path}, whose line {number} is damaged: {reason}") from error

    return read


def text_fields(row: Row, *fields: str) -> dict[str, str]:
    """These fields of a row. Raises KeyError for a missing field and TypeError for one that isn't text."""
    for field in fields:
        if not isinstance(row[field], str):
            raise TypeError(f"{field} is {row[field]!r}; it must be text")
    return {field: row[field] for field in fields}


def one_of(field: str, value: Any, allowed: Iterable[Any]) -> Any:
    """The same value. Raises ValueError if it isn't allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return value


def whole_number(field: str, value: Any) -> int:
    """A value of digits, or an integer, as int. Raises ValueError for others and for 2 ** 31 and above."""
    if not str(value).isdecimal() or int(value) >= 2**31:
        raise ValueError(f"{field} is {value!r}; it must be a whole number below 2 ** 31")
    return int(value)


def hellaswag(row: Row) -> Row:
    """A row in the authors' form, or in a form with cleaned texts and the query instead of the context's two parts.

    The latter has no `source_id`, `split` and `split_type`.
    """
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(text, str) for text in endings):
        raise ValueError(f"endings is {endings!r}; it must be four texts")
    ind, label = whole_number("ind", row["ind"]), one_of("label", str(row["label"]), "0123")
    common = {"ind": ind, "endings": endings, "label": label, **text_fields(row, "activity_label", "ctx")}
    if "ctx_a" in row or "query_lm_eval" not in row:
        return common | text_fields(row, "ctx_a", "ctx_b", "source_id", "split", "split_type")
    activity, query = row["activity_label"], row["query_lm_eval"]
    start, end = context_parts(row["ctx"], query.removeprefix(f"{activity}: "))
    if query != preprocess(f"{activity}: {start} {end.capitalize()}"):
        raise ValueError(f"query_lm_eval is {query!r}; it must be activity_label and ctx as lm-eval joins them")
    return common | {"ctx_a": start, "ctx_b": end, "source_id": "", "split": "val", "split_type": ""}


def context_parts(context: str, capitalized: str) -> tuple[str, str]:
    """Split a context into its sentences and the start of the last one, which has a capital letter in the query."""
    for at in range(len(context) - 1, 0, -1):
        start, end = context[:at], context[at + 1 :]
        if context[at] == " " and end != end.capitalize() and f"{start} {end.capitalize()}" == capitalized:
            return start, end
    return context, ""


def hellaswag_note(rows: list[Row]) -> str | None:
    """The note on rows with cleaned texts."""
    if all(row["source_id"] for row in rows):
        return None
    return (
        "the file's texts are cleaned already: if an ending began with a bracketed mark, the published form has one "
        "more blank before it"
    )


def piqa(path: Path) -> Iterator[Row]:
    """Rows of a file of questions and the file of their labels, NAME-labels.lst."""
    questions = list(json_lines(lambda row: text_fields(row, "goal", "sol1", "sol2"))(path))
    if not questions:
        return
    label_file = path.with_name(f"{path.stem}-labels.lst")
    if not label_file.is_file():
        raise SettingError(f"data_dir holds no {label_file}, the labels of {path.name}")
    labels = read_utf8(label_file).split()
    if len(labels) != len(questions):
        raise SettingError(f"data_dir holds {label_file} with {len(labels)} labels; it must hold {len(questions)}")
    for number, (question, label) in enumerate(zip(questions, labels, strict=True), 1):
        if label not in ("0", "1"):
            raise SettingError(f"data_dir holds {label_file}, whose line {number} is {label!r}; it must be 0 or 1")
        yield question | {"label": int(label)}


def arc(row: Row) -> Row:
    choices = [text_fields(choice, "text", "label") for choice in row["question"]["choices"]]
    labels = [choice["label"] for choice in choices]
    return {
        "id": text_fields(row, "id")["id"],
        "question": text_fields(row["question"], "stem")["stem"],
        "choices": {"text": [choice["text"] for choice in choices], "label": labels},
        "answerKey": one_of("answerKey", row["answerKey"], labels),
    }


def winogrande(row: Row) -> Row:
    fields = text_fields(row, "sentence", "option1", "option2", "answer")
    one_of("answer", fields["answer"], "12")
    if "_" not in fields["sentence"]:
        raise ValueError(f"sentence is {fields['sentence']!r}; it must have a gap, _")
    return fields


def lambada(row: Row) -> Row:
    fields = text_fields(row, "text")
    if " " not in fields["text"].strip():
        raise ValueError(f"text is {fields['text']!r}; it must have a word to predict and words before it")
    return fields


def blimp(row: Row) -> Row:
    flags = {name: bool(row[name]) for name in BLIMP_FLAGS}
    return text_fields(row, *BLIMP_TEXTS) | flags | {"pair_id": whole_number("pairID", row["pairID"])}


def wikitext(path: Path) -> Iterator[Row]:
    """One row for each page. A page begins at a heading of the first level, as in the hub's dataset."""
    page: list[str] = []
    for line in read_utf8(path).split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if "\n".join(page).strip():
                yield {"page": "\n".join(page)}
            page = []
        page.append(line)
    if "\n".join(page).strip():
        yield {"page": "\n".join(page)}


def wikitext_note(rows: list[Row]) -> str | None:
    """The note on a file without the blank lines around headings."""
    if any("\n \n" in row["page"] for row in rows):
        return None
    return (
        "the file has lost the blank lines around headings: its words are those of the published file, its text and "
        "bytes aren't"
    )


BLIMP_TEXTS = ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID")
BLIMP_FLAGS = ("simple_LM_method", "one_prefix_method", "two_prefix_method", "lexically_identical")
LOCAL_DATASETS = {
    "Rowan/hellaswag": LocalDataset(
        folder="hellaswag",
        files={"train": ("hellaswag_train.jsonl",), "validation": ("hellaswag_val.jsonl",)},
        features={
            "ind": Value("int32"), "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "ctx": TEXT,
            "endings": List(TEXT), "source_id": TEXT, "split": TEXT, "split_type": TEXT, "label": TEXT,
        },
        read=json_lines(hellaswag),
        note=hellaswag_note,
    ),
    "baber/piqa": LocalDataset(
        folder="piqa",
        files={"train": ("train.jsonl",), "validation": ("valid.jsonl",)},
        features={"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": Value("int64")},
        read=piqa,
    ),
    "allenai/ai2_arc": LocalDataset(
        folder="arc",
        files={
            "train": ("{subset}-Train.jsonl",), "validation": ("{subset}-Dev.jsonl",),
            "test": ("{subset}-Test.jsonl",),
        },
        features={
            "id": TEXT, "question": TEXT, "choices": {"text": List(TEXT), "label": List(TEXT)}, "answerKey": TEXT,
        },
        read=json_lines(arc),
        subsets=("ARC-Easy", "ARC-Challenge"),
    ),
    "allenai/winogrande": LocalDataset(
        folder="winogrande",
        files={"train": ("train_xl.jsonl",), "validation": ("dev.jsonl", "winogrande_dev.jsonl")},
        features={"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
        read=json_lines(winogrande),
        subsets=("winogrande_xl",),
    ),
    "EleutherAI/lambada_openai": LocalDataset(
        folder="lambada",
        files={"test": ("lambada_test.jsonl",)},
        features={"text": TEXT},
        read=json_lines(lambada),
        subsets=("default",),
    ),
    "nyu-mll/blimp": LocalDataset(
        folder="blimp",
        files={"train": ("{subset}.jsonl",)},  # the hub's only split has this name
        features=dict.fromkeys(BLIMP_TEXTS, TEXT) | dict.fromkeys(BLIMP_FLAGS, Value("bool"))
        | {"pair_id": Value("int32")},
        read=json_lines(blimp),
        subsets=(),
    ),
    "EleutherAI/wikitext_document_level": LocalDataset(
        folder="wikitext2",
        files={"train": ("wiki.train.raw",), "validation": ("wiki.valid.raw",), "test": ("wiki.test.raw",)},
        features={"page": TEXT},
        read=wikitext,
        subsets=("wikitext-2-raw-v1",),
        note=wikitext_note,
    ),
}  # fmt: skip
