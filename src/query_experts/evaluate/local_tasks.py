"""Benchmark files in their authors' format, as the tasks of lm-evaluation-harness want them.

A task definition of lm-eval names a dataset on the hub. Here the rows of that dataset are made from local files, with
the hub's columns, types and splits; then a definition that includes lm-eval's own, and differs from it in where the
rows lie, goes into a folder that lm-eval's task manager reads. What is asked stays lm-eval's.
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

Row = dict[str, Any]
TEXT = Value("string")
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass(frozen=True)
class Source:
    """A dataset of the hub in its original files.

    folder: where in the data folder they lie. files: split -> the names that its file may have; {name} is the hub's
    name of the subset. names: the subsets that have such files; empty for any. note: what in the rows, if anything,
    keeps a score from being comparable with published ones.
    """

    folder: str
    files: dict[str, tuple[str, ...]]
    features: dict[str, Any]
    read: Callable[[Path], Iterable[Row]]
    names: tuple[str | None, ...] = (None,)
    note: Callable[[list[Row]], str | None] = lambda rows: None

    def path(self, data_dir: Path, split: str, name: str | None) -> Path:
        """The file of a split: the first that exists, else the first that it may be."""
        paths = [data_dir / self.folder / file.format(name=name) for file in self.files[split]]
        return next((path for path in paths if path.is_file()), paths[0])


def write_definitions(
    names: list[str], index: dict[str, Any], data_dir: Path, folder: Path, shots: int | None
) -> dict[str, str]:
    """Write definitions of the named tasks and groups, and their rows, into a folder. -> task -> note.

    index: name -> its entry in lm-eval's TaskManager. shots: examples before a question. Raises SettingError for a task
    without local files, and for files that are missing or damaged.
    """
    if not data_dir.is_dir():
        raise SettingError(f"data_dir is {data_dir}; it must be a folder of benchmark files")
    notes: dict[str, str] = {}
    for name in names:
        entry = index[name]
        if entry.kind.name == "GROUP":
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"include": str(entry.yaml_path), "group": name}))
            notes |= write_definitions(plain_members(name, entry, index), index, data_dir, folder, shots)
            continue
        definition, note = local_definition(name, entry.cfg or {}, data_dir, folder, shots)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"include": str(entry.yaml_path)} | definition))
        notes |= {name: note} if note else {}
    return notes


def plain_members(name: str, entry: Any, index: dict[str, Any]) -> list[str]:
    """The tasks and groups in a group. Raises SettingError for a group that sets up tasks of its own."""
    members = entry.cfg["task"]
    if not all(isinstance(member, str) and member in index for member in members):
        raise SettingError(
            f"tasks holds {name!r}, a group with settings of its own for its tasks, which has no local form; with "
            "data_dir it must be a task, or a group that only lists tasks"
        )
    return members


def local_definition(name: str, task: Row, data_dir: Path, folder: Path, shots: int | None) -> tuple[Row, str | None]:
    """What a task's definition says in place of lm-eval's; and the note on its rows."""
    source = SOURCES.get(task.get("dataset_path", ""))
    subset = task.get("dataset_name")
    if not source or (source.names and subset not in source.names):
        raise SettingError(
            f"tasks holds {name!r}, which has no local form; with data_dir it must be a task on one of "
            f"{', '.join(SOURCES)}"
        )
    asked = task.get("test_split") or task["validation_split"]
    shown = task.get("fewshot_split") or task.get("training_split")
    shots = num_examples(task.get("output_type"), task.get("num_fewshot"), shots)
    needed = {asked} | ({shown} if shots and shown else set())
    files: dict[str, str] = {}
    note = None
    for split in source.files:
        path = source.path(data_dir, split, subset)
        if not path.is_file():
            if split in needed:
                use = "asks" if split == asked else "takes its examples from (num_fewshot)"
                raise SettingError(f"data_dir holds no {path}, the {split} split, which {name} {use}")
            continue
        rows = read_rows(source, path)
        note = source.note(rows) if split == asked else note
        files[split] = str(folder / f"{name}.{split}.parquet")
        Dataset.from_list(rows, features=Features(source.features)).to_parquet(files[split])
    here: Row = {"dataset_path": "parquet", "dataset_name": None, "tag": None, "task": name}
    here["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
    absent = {key: None for key in (*SPLITS.values(), "fewshot_split") if task.get(key) not in files}
    return here | absent, note


def num_examples(output_type: str | None, own: int | None, asked: int | None) -> int:
    """Examples before a question: as many as asked, or the task's own; a task that says 0 has none to show."""
    if output_type == "loglikelihood_rolling":  # a text is scored alone, whatever lm-eval writes down
        return 0
    return (own if own == 0 or asked is None else asked) or 0


def read_rows(source: Source, path: Path) -> list[Row]:
    """The hub's rows of a file. Raises SettingError for one that is damaged or empty."""
    rows = list(source.read(path))
    if not rows:
        raise SettingError(f"data_dir holds {path}, which is empty; it must hold questions")
    return rows


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(f"data_dir holds {path}, which is no UTF-8 text ({error.reason})") from error


def lines(make: Callable[[Row], Row]) -> Callable[[Path], Iterator[Row]]:
    """A reader of a JSON object a line, each of which `make` turns into the hub's row."""

    def read(path: Path) -> Iterator[Row]:
        for number, line in enumerate(text_of(path).rstrip("\n").split("\n"), 1):
            try:
                row = make(json.loads(line))
                json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
                yield row
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
                raise SettingError(f"data_dir holds {path}, whose line {number} is damaged: {reason}") from error

    return read


def texts(row: Row, *fields: str) -> dict[str, str]:
    """These fields of a row. Raises KeyError or TypeError if they aren't there or no text."""
    for field in fields:
        if not isinstance(row[field], str):
            raise TypeError(f"{field} is {row[field]!r}; it must be text")
    return {field: row[field] for field in fields}


def one_of(field: str, value: Any, allowed: Iterable[Any]) -> Any:
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    return value


def whole(field: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) >= 2**31:
        raise ValueError(f"{field} is {value!r}; it must be a whole number below 2 ** 31")
    return int(value)


def hellaswag(row: Row) -> Row:
    """The authors' row, or one of texts that are already cleaned, with the query in place of the context's two parts.

    Such a row says nothing of `source_id`, `split` and `split_type`.
    """
    endings = row["endings"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(text, str) for text in endings):
        raise ValueError(f"endings is {endings!r}; it must be four texts")
    ind, label = whole("ind", row["ind"]), one_of("label", str(row["label"]), "0123")
    common = {"ind": ind, "endings": endings, "label": label, **texts(row, "activity_label", "ctx")}
    if "ctx_a" in row or "query_lm_eval" not in row:
        return common | texts(row, "ctx_a", "ctx_b", "source_id", "split", "split_type")
    activity, query = row["activity_label"], row["query_lm_eval"]
    start, end = context_parts(row["ctx"], query.removeprefix(f"{activity}: "))
    if query != preprocess(f"{activity}: {start} {end.capitalize()}"):
        raise ValueError(f"query_lm_eval is {query!r}; it must be activity_label and ctx as lm-eval joins them")
    return common | {"ctx_a": start, "ctx_b": end, "source_id": "", "split": "val", "split_type": ""}


def context_parts(context: str, capitalized: str) -> tuple[str, str]:
    """The context's sentences and the last one's start, which the query has with a capital letter."""
    for at in range(len(context) - 1, 0, -1):
        start, end = context[:at], context[at + 1 :]
        if context[at] == " " and end != end.capitalize() and f"{start} {end.capitalize()}" == capitalized:
            return start, end
    return context, ""


def hellaswag_note(rows: list[Row]) -> str | None:
    if all(row["source_id"] for row in rows):
        return None
    return (
        "the file's texts are cleaned already: where an ending began with a bracketed mark, the published form has one "
        "more blank before it"
    )


def piqa(path: Path) -> Iterator[Row]:
    """Questions, and beside them in NAME-labels.lst their labels."""
    questions = list(lines(lambda row: texts(row, "goal", "sol1", "sol2"))(path))
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.is_file():
        raise SettingError(f"data_dir holds no {beside}, the labels of {path.name}")
    labels = text_of(beside).split()
    if len(labels) != len(questions):
        raise SettingError(f"data_dir holds {beside} with {len(labels)} labels; it must hold {len(questions)}")
    for number, (question, label) in enumerate(zip(questions, labels, strict=True), 1):
        if label not in ("0", "1"):
            raise SettingError(f"data_dir holds {beside}, whose line {number} is {label!r}; it must be 0 or 1")
        yield question | {"label": int(label)}


def arc(row: Row) -> Row:
    choices = [texts(choice, "text", "label") for choice in row["question"]["choices"]]
    labels = [choice["label"] for choice in choices]
    return {
        "id": texts(row, "id")["id"],
        "question": texts(row["question"], "stem")["stem"],
        "choices": {"text": [choice["text"] for choice in choices], "label": labels},
        "answerKey": one_of("answerKey", row["answerKey"], labels),
    }


def winogrande(row: Row) -> Row:
    held = texts(row, "sentence", "option1", "option2", "answer")
    one_of("answer", held["answer"], "12")
    if "_" not in held["sentence"]:
        raise ValueError(f"sentence is {held['sentence']!r}; it must have a gap, _")
    return held


def lambada(row: Row) -> Row:
    held = texts(row, "text")
    if " " not in held["text"].strip():
        raise ValueError(f"text is {held['text']!r}; it must have a word to predict and words before it")
    return held


def blimp(row: Row) -> Row:
    flags = {name: bool(row[name]) for name in BLIMP_FLAGS}
    return texts(row, *BLIMP_TEXTS) | flags | {"pair_id": whole("pairID", row["pairID"])}


def wikitext(path: Path) -> Iterator[Row]:
    """One row a page. A page begins at a heading of the first level, as the hub's dataset cuts them."""
    page: list[str] = []
    for line in text_of(path).split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if "\n".join(page).strip():
                yield {"page": "\n".join(page)}
            page = []
        page.append(line)
    if "\n".join(page).strip():
        yield {"page": "\n".join(page)}


def wikitext_note(rows: list[Row]) -> str | None:
    if any("\n \n" in row["page"] for row in rows):
        return None
    return (
        "the file has lost the blank lines around headings: word counts are the published file's, the text and its "
        "bytes aren't"
    )


BLIMP_TEXTS = ("sentence_good", "sentence_bad", "field", "linguistics_term", "UID")
BLIMP_FLAGS = ("simple_LM_method", "one_prefix_method", "two_prefix_method", "lexically_identical")
SOURCES = {
    "Rowan/hellaswag": Source(
        folder="hellaswag",
        files={"train": ("hellaswag_train.jsonl",), "validation": ("hellaswag_val.jsonl",)},
        features={
            "ind": Value("int32"), "activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "ctx": TEXT,
            "endings": List(TEXT), "source_id": TEXT, "split": TEXT, "split_type": TEXT, "label": TEXT,
        },
        read=lines(hellaswag),
        note=hellaswag_note,
    ),
    "baber/piqa": Source(
        folder="piqa",
        files={"train": ("train.jsonl",), "validation": ("valid.jsonl",)},
        features={"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": Value("int64")},
        read=piqa,
    ),
    "allenai/ai2_arc": Source(
        folder="arc",
        files={"train": ("{name}-Train.jsonl",), "validation": ("{name}-Dev.jsonl",), "test": ("{name}-Test.jsonl",)},
        features={
            "id": TEXT, "question": TEXT, "choices": {"text": List(TEXT), "label": List(TEXT)}, "answerKey": TEXT,
        },
        read=lines(arc),
        names=("ARC-Easy", "ARC-Challenge"),
    ),
    "allenai/winogrande": Source(
        folder="winogrande",
        files={"train": ("train_xl.jsonl",), "validation": ("dev.jsonl", "winogrande_dev.jsonl")},
        features={"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
        read=lines(winogrande),
        names=("winogrande_xl",),
    ),
    "EleutherAI/lambada_openai": Source(
        folder="lambada",
        files={"test": ("lambada_test.jsonl",)},
        features={"text": TEXT},
        read=lines(lambada),
        names=("default",),
    ),
    "nyu-mll/blimp": Source(
        folder="blimp",
        files={"train": ("{name}.jsonl",)},  # the hub calls its one split so
        features=dict.fromkeys(BLIMP_TEXTS, TEXT) | dict.fromkeys(BLIMP_FLAGS, Value("bool"))
        | {"pair_id": Value("int32")},
        read=lines(blimp),
        names=(),
    ),
    "EleutherAI/wikitext_document_level": Source(
        folder="wikitext2",
        files={"train": ("wiki.train.raw",), "validation": ("wiki.valid.raw",), "test": ("wiki.test.raw",)},
        features={"page": TEXT},
        read=wikitext,
        names=("wikitext-2-raw-v1",),
        note=wikitext_note,
    ),
}  # fmt: skip
