"""Scores by lm-eval: local files give the requests of its own tasks, and scores equal those calculated by hand."""

import errno
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install query-experts[evaluate]")

from lm_eval.tasks import TaskManager  # noqa: E402

from model_helpers import tiny_llama_config, tiny_model  # noqa: E402
from query_experts.cli import main  # noqa: E402
from query_experts.common.errors import SettingError  # noqa: E402
from query_experts.evaluate import harness as evaluation  # noqa: E402
from query_experts.evaluate.local_tasks import LOCAL_DATASETS, hellaswag_note, read_rows, write_definitions  # noqa: E402
from query_experts.evaluate.settings import EvaluateSettings  # noqa: E402

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/eval, with the real questions, is absent")
TASKS = Path(lm_eval.__file__).parent / "tasks"
FOLDERS = ("arc", "blimp", "hellaswag", "lambada", "piqa", "super_glue", "wikitext", "winogrande")
BLIMP = {
    "field": "syntax", "linguistics_term": "agreement", "simple_LM_method": True, "one_prefix_method": False,
    "two_prefix_method": False, "lexically_identical": False,
}  # fmt: skip


def hellaswag_item(number, label, split="val"):
    context = f"A woman lifts pot {number}. She"
    return {
        "ind": number,
        "activity_label": "Cooking soup",
        "ctx_a": context[:-4],
        "ctx_b": "she",
        "ctx": f"{context[:-4]} she",
        "endings": ["[step] stirs it.", "sings loudly.", "sleeps  there.", "eats the pot [title] whole."],
        "label": label,
        "source_id": "activitynet~v_x",
        "split": split,
        "split_type": "indomain",
    }


def prepared(item, *endings):
    """The item in the form with cleaned texts and the query."""
    query = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return {k: item[k] for k in ("ind", "activity_label", "ctx", "label")} | {
        "endings": endings,
        "query_lm_eval": query,
    }


def arc_item(number, answer, labels="ABCD"):
    choices = [{"text": f"stone {label}{number}", "label": label} for label in labels]
    return {"id": f"Q{number}", "question": {"stem": f"What sinks, {number}?", "choices": choices}, "answerKey": answer}


FILES = {
    "hellaswag/hellaswag_val.jsonl": [hellaswag_item(n, n % 4) for n in range(5)],
    "hellaswag/hellaswag_train.jsonl": [hellaswag_item(n, 1, "train") for n in range(90, 93)],
    "piqa/valid.jsonl": [{"goal": f"Open jar {n}", "sol1": "Turn the lid.", "sol2": "Eat the lid."} for n in range(3)],
    "piqa/valid-labels.lst": "0\n1\n0\n",
    "arc/ARC-Easy-Test.jsonl": [arc_item(1, "B"), arc_item(2, "3", "1234"), arc_item(3, "C", "ABC")],
    "winogrande/dev.jsonl": [
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    ],
    "lambada/lambada_test.jsonl": [{"text": 'He took the boat.\n\n"Row," she said to the man in the boat'}],
    "blimp/adjunct_island.jsonl": [
        {"sentence_good": "Who sat?", "sentence_bad": "Who did sat?", "UID": "adjunct_island", "pairID": "7", **BLIMP}
    ],
    "wikitext2/wiki.test.raw": " \n = One = \n \n A b c . \n = = Part = = \n \n D @-@ e . \n \n = Two = \n \n F . \n",
}


@pytest.fixture
def data(tmp_path):
    for name, content in FILES.items():
        write(tmp_path / "data" / name, content)
    return tmp_path / "data"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def definitions():
    """lm-eval's own definitions of a few tasks: reading all 14,000 takes many seconds."""
    return TaskManager(include_defaults=False, include_path=[TASKS / folder for folder in FOLDERS])


@pytest.fixture(autouse=True)
def few_definitions(monkeypatch, definitions):
    monkeypatch.setattr(evaluation, "definitions", lambda: definitions)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random models, one GQE and one stock Llama, with a tokenizer of single bytes."""
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**alphabet, "<|endoftext|>": 256}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(0)
    size = {"vocab_size": 257, "max_position_embeddings": 512}
    saved = {"gqe": tiny_model(dtype=torch.float32, **size), "llama": LlamaForCausalLM(tiny_llama_config(**size))}
    folders = {}
    for name, model in saved.items():
        folders[name] = tmp_path_factory.mktemp("checkpoints") / name
        model.save_pretrained(folders[name])
        fast.save_pretrained(folders[name])
    return folders


def local_task(name, data, folder, definitions, shots=None):
    folder.mkdir(exist_ok=True)
    write_definitions([name], definitions.task_index, data, folder, shots)
    task = TaskManager(include_defaults=False, include_path=str(folder)).load([name])["tasks"][name]
    task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    return task


def requests(task, item=0):
    return [instance.args for instance in task.instances if instance.doc_id == item]


# ---------------------------------------------------------------------------------------------------------------------
# Local files give the requests of lm-eval's own tasks
# ---------------------------------------------------------------------------------------------------------------------

ASKED = {
    "hellaswag": [
        ("Cooking soup: A woman lifts pot 0. She", ending)
        for ending in ("  stirs it.", " sings loudly.", " sleeps there.", " eats the pot. whole.")
    ],
    "piqa": [("Question: Open jar 0\nAnswer:", " Turn the lid."), ("Question: Open jar 0\nAnswer:", " Eat the lid.")],
    "arc_easy": [("Question: What sinks, 1?\nAnswer:", f" stone {label}1") for label in "ABCD"],
    "winogrande": [(f"Ann thanked Eve because {name}", " had helped.") for name in ("Ann", "Eve")],
    "lambada_openai": [('He took the boat.\n\n"Row," she said to the man in the', " boat")],
    "blimp_adjunct_island": [("", " Who sat?"), ("", " Who did sat?")],
    "wikitext": [(" = One =\n\nA b c.\n== Part ==\n\nD-e.\n",)],
}
HUB = {
    "Rowan/hellaswag": "ind activity_label ctx_a ctx_b ctx endings source_id split split_type label",
    "baber/piqa": "goal sol1 sol2 label",
    "allenai/ai2_arc": "id question choices answerKey",
    "allenai/winogrande": "sentence option1 option2 answer",
    "EleutherAI/lambada_openai": "text",
    "nyu-mll/blimp": "sentence_good sentence_bad field linguistics_term UID simple_LM_method one_prefix_method "
    "two_prefix_method lexically_identical pair_id",
    "EleutherAI/wikitext_document_level": "page",
}


@pytest.mark.parametrize("name", ASKED)
def test_the_requests_are_those_of_lm_evals_own_task(name, data, tmp_path, definitions):
    task = local_task(name, data, tmp_path / "tasks", definitions)
    assert requests(task) == ASKED[name]
    assert {"task": name, "version": task.VERSION} == {
        "task": task.task_name,
        "version": definitions.task_index[name].cfg["metadata"]["version"],
    }


@pytest.mark.parametrize("name", ASKED)
def test_local_rows_have_the_hubs_columns(name, data, tmp_path, definitions):
    task = local_task(name, data, tmp_path / "tasks", definitions)
    hub = definitions.task_index[name].cfg["dataset_path"]
    columns = set(HUB[hub].split())
    assert columns == set(LOCAL_DATASETS[hub].features)
    assert columns <= set(task.eval_docs.column_names)  # process_docs may add some


def test_labels_keep_the_hubs_encoding(data, tmp_path, definitions):
    rows = {name: local_task(name, data, tmp_path / name, definitions).eval_docs for name in ASKED}
    assert rows["hellaswag"]["label"][:] == ["0", "1", "2", "3", "0"]
    assert rows["piqa"]["label"][:] == [0, 1, 0]
    assert rows["arc_easy"]["answerKey"][:] == ["B", "3", "C"]
    assert rows["arc_easy"]["choices"][1] == {"text": [f"stone {n}2" for n in "1234"], "label": list("1234")}
    assert rows["winogrande"]["answer"][:] == ["2"]
    assert rows["blimp_adjunct_island"]["pair_id"][:] == [7]


def test_cleaned_hellaswag_texts_ask_the_given_query(data, tmp_path, definitions):
    endings = ("stirs it.", "sings loudly.", "sleeps there.", "eats the pot. whole.")
    whole = {
        **hellaswag_item(1, 2),
        "ctx_a": "How to boil. Take water.",
        "ctx_b": "",
        "ctx": "How to boil. Take water.",
    }
    last = {**hellaswag_item(2, 2), "ctx_b": "the tall Cook", "ctx": "A woman lifts pot 2. the tall Cook"}
    items = [prepared(item, *endings) for item in (hellaswag_item(0, 0), whole, last)]
    items[1]["query_lm_eval"] = "Cooking soup: How to boil. Take water."
    write(data / "hellaswag" / "hellaswag_val.jsonl", items)
    task = local_task("hellaswag", data, tmp_path / "tasks", definitions)
    assert task.eval_docs["query"][:] == [item["query_lm_eval"] for item in items]
    assert task.eval_docs["ctx_b"][:] == ["she", "", "the tall Cook"]


def test_wikitext_is_cut_into_pages_and_counts_the_words_before_detokenizing(data, tmp_path, definitions):
    task = local_task("wikitext", data, tmp_path / "tasks", definitions)
    pages = task.eval_docs["page"][:]
    assert pages == [" = One = \n \n A b c . \n = = Part = = \n \n D @-@ e . \n ", " = Two = \n \n F . \n"]
    words = [task.process_results({"page": page}, (-1.0,))["word_perplexity"][1] for page in pages]
    assert words == [len(page.split()) + 2 for page in pages]  # lm-eval counts the empty words at both ends


def test_examples_come_from_the_training_file(data, tmp_path, definitions):
    (context, _), *_ = requests(local_task("hellaswag", data, tmp_path / "tasks", definitions, shots=2))
    shown = re.findall(r"pot (9\d)\. She sings loudly\.\n\n", context)
    assert len(set(shown)) == 2
    assert context.endswith(ASKED["hellaswag"][0][0])


def hub_arc(items):
    rows = []
    for item in items:
        columns = {key: [choice[key] for choice in item["question"]["choices"]] for key in ("text", "label")}
        stem = item["question"]["stem"]
        rows.append({"id": item["id"], "question": stem, "choices": columns, "answerKey": item["answerKey"]})
    return Dataset.from_list(rows)


def hub_piqa(items, labels):
    return Dataset.from_list([item | {"label": label} for item, label in zip(items, labels, strict=True)])


PIQA = FILES["piqa/valid.jsonl"]
SHOWN = {
    "piqa/train.jsonl": [{"goal": f"Shut jar {n}", "sol1": "Turn the lid.", "sol2": "Cut it."} for n in range(9)],
    "piqa/train-labels.lst": "0\n1\n0\n0\n1\n1\n1\n0\n0\n",
    "arc/ARC-Easy-Train.jsonl": [arc_item(n, "1234"[n % 4], "1234") for n in range(10, 19)],
    "winogrande/train_xl.jsonl": [
        {"sentence": f"Bea met Cy {n} times as _ liked it.", "option1": "Bea", "option2": "Cy", "answer": "12"[n % 2]}
        for n in range(9)
    ],
}
ON_THE_HUB = {
    "piqa": DatasetDict(
        train=hub_piqa(SHOWN["piqa/train.jsonl"], [0, 1, 0, 0, 1, 1, 1, 0, 0]),
        validation=hub_piqa(PIQA, [0, 1, 0]),
        test=hub_piqa(PIQA, [-1] * 3),
    ),
    "arc_easy": DatasetDict(
        train=hub_arc(SHOWN["arc/ARC-Easy-Train.jsonl"]),
        validation=hub_arc([arc_item(4, "A")]),
        test=hub_arc(FILES["arc/ARC-Easy-Test.jsonl"]),
    ),
    "winogrande": DatasetDict(
        train=Dataset.from_list(SHOWN["winogrande/train_xl.jsonl"]),
        validation=Dataset.from_list(FILES["winogrande/dev.jsonl"]),
    ),
}


@pytest.mark.parametrize("shots", [None, 4])
@pytest.mark.parametrize("name", ON_THE_HUB)
def test_local_files_ask_what_the_hubs_dataset_asks(name, shots, data, tmp_path, monkeypatch):
    for file, content in SHOWN.items():
        write(data / file, content)
    local, _ = evaluation.load_tasks([name], str(data), tmp_path, shots)
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda *args, **kwargs: ON_THE_HUB[name])
    hub, _ = evaluation.load_tasks([name], None, tmp_path, shots)
    asked = []
    for task in (local["tasks"][name], hub["tasks"][name]):
        task.build_all_requests()
        asked.append([instance.args for instance in task.instances])
    assert asked[0] == asked[1]
    assert asked[0][0][0].count("\n\n") == (shots or 0)


@needs_shared
def test_every_hellaswag_query_is_the_one_that_lm_eval_builds(tmp_path, definitions):
    write_definitions(["hellaswag"], definitions.task_index, SHARED, tmp_path, None)
    task = TaskManager(include_defaults=False, include_path=str(tmp_path)).load(["hellaswag"])["tasks"]["hellaswag"]
    given = [json.loads(line) for line in (SHARED / "hellaswag" / "hellaswag_val.jsonl").read_text().splitlines()]
    assert len(given) == 10_042
    assert task.eval_docs["query"][:] == [item["query_lm_eval"] for item in given]
    assert task.eval_docs["gold"][:] == [item["label"] for item in given]


@needs_shared
@pytest.mark.parametrize(
    ("hub", "split", "subset", "items"),
    [
        ("baber/piqa", "validation", None, 1838),
        ("allenai/ai2_arc", "test", "ARC-Easy", 2376),
        ("allenai/winogrande", "validation", "winogrande_xl", 1267),
        ("EleutherAI/lambada_openai", "test", "default", 5153),
        ("nyu-mll/blimp", "train", "wh_island", 1000),
        ("EleutherAI/wikitext_document_level", "test", "wikitext-2-raw-v1", 62),
    ],
)
def test_the_real_files_are_read_whole(hub, split, subset, items):
    rows = read_rows(LOCAL_DATASETS[hub], LOCAL_DATASETS[hub].path(SHARED, split, subset))
    assert len(rows) == items
    if "page" in rows[0]:
        assert sum(len(row["page"].split()) for row in rows) == 241_211


@needs_shared
def test_every_blimp_task_has_its_file(definitions):
    subsets = [definitions.task_index[name].cfg["dataset_name"] for name in definitions.task_index["blimp"].cfg["task"]]
    assert len(subsets) == 67
    assert {f"{subset}.jsonl" for subset in subsets} == {path.name for path in (SHARED / "blimp").glob("*.jsonl")}


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(model, tokenizer, context, answer):
    before, after = (tokenizer(text, return_tensors="pt").input_ids for text in (context, answer))
    tokens = torch.cat([before, after[:, :-1]], 1)
    logits = model(tokens, use_cache=False).logits[0, before.shape[1] - 1 :].float()
    return logits.log_softmax(-1).gather(1, after[0][:, None]).sum().item()


@pytest.mark.parametrize("name", ["gqe", "llama"])
def test_the_score_is_what_a_calculation_by_hand_gives(name, checkpoints, data, tmp_path):
    out = tmp_path / "scores.json"
    argv = ["evaluate", str(checkpoints[name]), "--tasks", "hellaswag", "--data-dir", str(data), "--out", str(out)]
    assert main([*argv, "--batch-size", "3", "--device", "cpu"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name])
    assert type(model).__name__ == {"gqe": "GQEForCausalLM", "llama": "LlamaForCausalLM"}[name]
    right = {"acc": 0, "acc_norm": 0}
    for number in range(5):
        answers = [answer for _, answer in ASKED["hellaswag"]]
        context = f"Cooking soup: A woman lifts pot {number}. She"
        sums = [log_likelihood(model, tokenizer, context, answer) for answer in answers]
        by_length = [total / len(answer[1:]) for total, answer in zip(sums, answers, strict=True)]
        right["acc"] += sums.index(max(sums)) == number % 4
        right["acc_norm"] += by_length.index(max(by_length)) == number % 4
    results = json.loads(out.read_text())
    scores = results["tasks"]["hellaswag"]["metrics"]
    assert {metric: score["value"] for metric, score in scores.items()} == {m: n / 5 for m, n in right.items()}
    share = scores["acc"]["value"]
    assert scores["acc"]["stderr"] == pytest.approx((share * (1 - share) / 4) ** 0.5)
    assert (results["tasks"]["hellaswag"]["items"], results["model"]["type"]) == (5, name)
    assert results["requests"] == {"all": 20, "truncated": 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_perplexity_is_what_a_calculation_by_hand_gives(dtype, checkpoints, data, tmp_path):
    """Also in bfloat16, where log-probabilities and their sum, rounded to 8 bits, would be off by more than 1e-4."""
    out = tmp_path / "scores.json"
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", "wikitext", "--data_dir", str(data), "--out", str(out)]
    assert main([*argv, "--limit", "1", "--device", "cpu", "--dtype", dtype]) == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["gqe"])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["gqe"], dtype=dtype)
    total = log_likelihood(model, tokenizer, "<|endoftext|>", ASKED["wikitext"][0][0])
    page = " = One = \n \n A b c . \n = = Part = = \n \n D @-@ e . \n "
    bits = json.loads(out.read_text())["tasks"]["wikitext"]["metrics"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(-total / len(page.encode()) / math.log(2), rel=1e-5)


@torch.no_grad()
def test_a_text_longer_than_the_window_is_scored_in_windows_that_are_full(checkpoints, data, tmp_path):
    out = tmp_path / "scores.json"
    argv = ["evaluate", str(checkpoints["llama"]), "--tasks", "wikitext", "--data_dir", str(data), "--out", str(out)]
    assert main([*argv, "--limit", "1", "--device", "cpu", "--max-length", "16", "--num-fewshot", "2"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    tokens = [tokenizer.eos_token_id, *tokenizer(ASKED["wikitext"][0][0]).input_ids]
    total, end = 0.0, 0
    while end < len(tokens) - 1:
        start, end = end, min(end + 16, len(tokens) - 1)
        first = max(end - 16, 0)
        scores = model(torch.tensor([tokens[first:end]])).logits[0].log_softmax(-1)
        total += sum(scores[at - first, tokens[at + 1]].item() for at in range(start, end))
    page = " = One = \n \n A b c . \n = = Part = = \n \n D @-@ e . \n "
    task = json.loads(out.read_text())["tasks"]["wikitext"]
    bits = task["metrics"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(-total / len(page.encode()) / math.log(2), rel=1e-5)
    assert task["num_fewshot"] == 0  # a text is scored without examples, and needs no training split


def test_a_task_that_shuffles_is_the_same_in_every_run(checkpoints, data, tmp_path, monkeypatch):
    """lm-eval's command seeds what a task draws when it loads, such as the order of GPQA's answers."""
    code = (
        "import random\n\n\ndef docs(rows):\n"
        "    return rows.map(lambda row: {'choices': random.sample([row['sol1'], row['sol2'], 'a', 'b', 'c'], 5)})\n"
    )
    write(tmp_path / "own" / "shuffled.py", code)
    definition = (
        f"include: {TASKS}/piqa/piqa.yaml\ntask: shuffled\nprocess_docs: !function shuffled.docs\n"
        "doc_to_choice: choices\n"
    )
    write(tmp_path / "own" / "shuffled.yaml", definition)
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path / "own"))
    monkeypatch.setattr(evaluation, "definitions", lambda: manager)
    asked, score = [], evaluation.Scorer.loglikelihood

    def noted(scorer, requests, **options):
        asked.append([request.args for request in requests])
        return score(scorer, requests, **options)

    monkeypatch.setattr(evaluation.Scorer, "loglikelihood", noted)
    for seed in (5, 6):
        random.seed(seed)
        assert main(["evaluate", str(checkpoints["llama"]), "--tasks", "shuffled", "--data-dir", str(data)]) == 0
    assert asked[0] == asked[1]
    random.seed(0)
    assert [answer[1:] for _, answer in asked[0][:5]] == random.sample(["Turn the lid.", "Eat the lid.", *"abc"], 5)


def test_generated_answers_count_among_the_requests(checkpoints, data, tmp_path, capsys):
    write(data / "arc" / "ARC-Challenge-Test.jsonl", FILES["arc/ARC-Easy-Test.jsonl"])
    out = tmp_path / "scores.json"
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", "arc_challenge_chat", "--data-dir", str(data)]
    argv += ["--limit", "1"]
    assert main([*argv, "--max-length", "110", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["requests"] == {"all": 1, "truncated": 1}  # the answer takes 100 tokens
    assert main([*argv, "--max-length", "64"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("query-experts: max_length is 64, and these tasks ask for texts as long")


def test_the_command_prints_a_table_and_writes_what_ran(checkpoints, data, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    tasks = ["arc_easy, piqa", "winogrande", "lambada_openai,", "blimp_adjunct_island"]
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", *tasks, "--data_dir", str(data), "--out", str(out)]
    assert main([*argv, "--dtype", "bfloat16", "--limit", "2"]) == 0
    shown = capsys.readouterr()
    assert "Running loglikelihood requests: 100%" in shown.err
    assert "Of each task at most 2 questions (limit): these are no benchmark's scores." in " ".join(shown.out.split())
    for word in ("standard error", "arc_easy", "piqa", "winogrande", "lambada_openai", "acc_norm", "perplexity"):
        assert word in shown.out
    results = json.loads(out.read_text())
    assert list(results) == ["checkpoint", "model", "requests", "tasks", "settings", "environment"]
    assert list(results["model"]) == ["type", "parameters", "max_length"]
    assert list(results["tasks"]["piqa"]) == ["version", "items", "num_fewshot", "metrics", "note"]
    assert list(results["tasks"]["piqa"]["metrics"]["acc"]) == ["value", "stderr", "higher_is_better"]
    assert list(results["settings"]) == ["data_dir", "batch_size", "limit", "num_fewshot"]
    assert {name: task["items"] for name, task in results["tasks"].items()} == {
        "arc_easy": 2, "piqa": 2, "winogrande": 1, "lambada_openai": 1, "blimp_adjunct_island": 1,
    }  # fmt: skip
    assert results["environment"]["dtype"] == "bfloat16"
    assert {"torch", "transformers", "lm_eval", "datasets", "hardware"} <= set(results["environment"])
    assert results["tasks"]["arc_easy"]["version"] == 1.0
    assert results["tasks"]["winogrande"]["metrics"]["acc"]["stderr"] is None  # one item has none
    assert results["tasks"]["lambada_openai"]["metrics"]["perplexity"]["higher_is_better"] is False


def test_a_group_is_scored_with_its_members(checkpoints, data, tmp_path, monkeypatch, capsys):
    """A group of two of BLiMP's tasks, defined in the same way as BLiMP."""
    group = (TASKS / "blimp" / "_blimp.yaml").read_text().split("task:")[0].replace("blimp", "two")
    scores = "aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n    weight_by_size: false\n"
    write(tmp_path / "two" / "two.yaml", f"{group}task: [blimp_adjunct_island, blimp_causative]\n{scores}")
    two = TaskManager(include_defaults=False, include_path=[TASKS / "blimp", tmp_path / "two"])
    monkeypatch.setattr(evaluation, "definitions", lambda: two)
    write(data / "blimp" / "causative.jsonl", FILES["blimp/adjunct_island.jsonl"])
    names = "two,blimp_causative"
    argv = ["evaluate", str(checkpoints["llama"]), "--tasks", names, "--data-dir", str(data), "--num-fewshot", "3"]
    assert main([*argv, "--out", str(tmp_path / "scores.json")]) == 0
    assert "No examples before blimp_adjunct_island, blimp_causative, two" in " ".join(capsys.readouterr().out.split())
    tasks = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert list(tasks) == ["blimp_adjunct_island", "blimp_causative", "two"]
    assert tasks["two"]["items"] == 2
    assert tasks["two"]["metrics"]["acc"]["value"] == tasks["blimp_causative"]["metrics"]["acc"]["value"]
    assert tasks["blimp_causative"]["num_fewshot"] == 0  # the task forbids examples


def test_texts_that_differ_from_the_published_ones_are_named(checkpoints, data, capsys):
    write(data / "hellaswag" / "hellaswag_val.jsonl", [prepared(hellaswag_item(0, 0), "a.", "b.", "c.", "d.")])
    write(data / "wikitext2" / "wiki.test.raw", FILES["wikitext2/wiki.test.raw"].replace(" \n \n", " \n"))
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", "hellaswag,wikitext,piqa", "--data-dir", str(data)]
    assert main(argv) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "hellaswag is not quite comparable with published scores: the file's texts are cleaned already" in words
    assert "wikitext is not quite comparable with published scores: the file has lost the blank lines" in words
    assert "piqa is not" not in words
    cleaned, whole = {"source_id": ""}, {"source_id": "activitynet~v_x"}
    assert hellaswag_note([whole]) is None
    assert hellaswag_note([cleaned, whole]) == hellaswag_note([cleaned]) is not None


def test_contexts_that_a_short_window_cuts_are_counted(checkpoints, data, tmp_path, capsys):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", "piqa", "--data-dir", str(data)]
    # context 28, answers 13 and 14, whose last token isn't read
    assert main([*argv, "--max-length", "41", "--out", str(whole)]) == 0
    assert json.loads(whole.read_text())["requests"] == {"all": 6, "truncated": 0}
    assert main([*argv, "--max_length", "40", "--out", str(cut)]) == 0
    assert json.loads(cut.read_text())["requests"] == {"all": 6, "truncated": 3}
    assert "Of 6 requests 3 lost the start of their context" in " ".join(capsys.readouterr().out.split())


def test_results_are_written_whether_or_not_anyone_reads_the_table(checkpoints, data, tmp_path, monkeypatch):
    def closed(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(evaluation, "print_result", closed)
    out = tmp_path / "scores.json"
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", "piqa", "--data-dir", str(data), "--out", str(out)]
    assert main(argv) == 141
    assert json.loads(out.read_text())["tasks"]["piqa"]["items"] == 3


def test_the_table_is_shown_though_the_disk_is_full(checkpoints, data, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation, "write_json", full)
    argv = ["evaluate", str(checkpoints["gqe"]), "--tasks", "piqa", "--data-dir", str(data)]
    assert main([*argv, "--out", str(tmp_path / "scores.json")]) == 2
    shown = capsys.readouterr()
    assert "acc_norm" in shown.out
    assert "out has no room left on its disk" in shown.err


def test_seeds_are_those_of_lm_evals_own_command():
    evaluation.seed_all()
    drawn = random.random(), np.random.random(), torch.rand(3).tolist()
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    assert drawn == (random.random(), np.random.random(), torch.rand(3).tolist())


def test_a_folder_may_have_any_name(checkpoints, data, tmp_path, capsys):
    folder = tmp_path / "a[red]b[" / "b]"
    shutil.copytree(checkpoints["gqe"], folder)
    assert main(["evaluate", str(folder), "--tasks", "piqa", "--data-dir", str(data)]) == 0
    assert "a[red]b[/b]" in "".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, checkpoints, data):
    """Runs the command on local files; expects exit status 2 and a last line on stderr with all these words."""

    def check(words, *options, checkpoint=None, local=True):
        argv = ["evaluate", str(checkpoint or checkpoints["gqe"]), *(["--data-dir", str(data)] if local else [])]
        assert main([*argv, *options]) == 2
        stderr = capsys.readouterr().err
        last = stderr.splitlines()[-1]
        assert last.startswith("query-experts: ")
        assert "Traceback" not in stderr
        for word in words:
            assert word in last

    return check


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "hellaswga"], ["tasks holds 'hellaswga'", "such as hellaswag"]),
        (["--tasks", ","], ["tasks is empty"]),
        (["--tasks", "boolq"], ["tasks holds 'boolq'", "no local form", "Rowan/hellaswag"]),
        (["--tasks", "ai2_arc"], ["ARC-Challenge-Test.jsonl", "arc_challenge asks"]),
        (["--tasks", "piqa", "--num_fewshot", "1"], ["train.jsonl", "num_fewshot"]),
        (["--tasks", "piqa", "--num_fewshot", "-1"], ["num_fewshot is -1", "0 or more"]),
        (["--tasks", "lambada_openai", "--num_fewshot", "2"], ["num_fewshot is 2", "lambada_openai has 1"]),
        (["--tasks", "piqa", "--limit", "0"], ["limit is 0", "1 or more"]),
        (["--tasks", "piqa", "--batch_size", "0"], ["batch_size is 0"]),
        (["--tasks", "piqa", "--batch-size", "many"], ["batch", "many"]),
        (["--tasks", "piqa", "--max_length", "0"], ["max_length is 0"]),
        (["--tasks", "piqa", "--max_length", "10"], ["max_length is 10", "an answer of 14 tokens"]),
        (["--tasks", "piqa", "--dtype", "int8"], ["dtype is 'int8'", "bfloat16"]),
        (["--tasks", "piqa", "--device", "tpu"], ["device is 'tpu'"]),
        (["--tasks", "piqa", "--out", "."], ["out is .", "folder"]),
        (["--tasks", "piqa", "--data-dir", "nowhere"], ["data_dir is nowhere"]),
        (["--tasks", "piqa", "--data-dir", ""], ["data_dir is empty; it must be a folder of benchmark files"]),
        ([], ["--tasks"]),
    ],
)
def test_a_setting_that_cannot_be_used_ends_in_a_sentence(options, words, refused):
    refused(words, *options)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("piqa/valid.jsonl", None, ["piqa/valid.jsonl", "validation split"]),
        ("piqa/valid-labels.lst", None, ["valid-labels.lst", "the labels of"]),
        ("piqa/valid-labels.lst", "0\n1\n", ["2 labels", "must hold 3"]),
        ("piqa/valid-labels.lst", "0\n1\n2\n", ["line 3 is '2'"]),
        ("piqa/valid.jsonl", "", ["valid.jsonl"]),
        ("piqa/valid.jsonl", '{"goal": "a", "sol1": "b", "sol2": "c"}\n{"goal": "a"', ["valid.jsonl", "line 2"]),
        ("piqa/valid.jsonl", '{"goal": "a", "sol1": "b"}\n', ["line 1", "no field 'sol2'"]),
        ("piqa/valid.jsonl", '{"goal": 1, "sol1": "b", "sol2": "c"}\n', ["line 1", "goal is 1"]),
        ("piqa/valid.jsonl", "[]\n", ["line 1"]),
        ("hellaswag/hellaswag_val.jsonl", [{**hellaswag_item(0, 4)}], ["line 1", "label is '4'"]),
        ("hellaswag/hellaswag_val.jsonl", [{**hellaswag_item(0, 0), "endings": ["a"]}], ["line 1", "four texts"]),
        ("hellaswag/hellaswag_val.jsonl", [{**hellaswag_item(0, 0), "ind": 2**31}], ["line 1", "ind is 2147483648"]),
        ("hellaswag/hellaswag_val.jsonl", [{**hellaswag_item(0, 0), "ind": math.inf}], ["line 1", "ind is inf"]),
        (
            "hellaswag/hellaswag_val.jsonl",
            [prepared(hellaswag_item(0, 0), *"abcd") | {"query_lm_eval": "Soup: Else"}],
            ["line 1", "query_lm_eval is 'Soup: Else'"],
        ),
        ("piqa/valid.jsonl", '{"goal": "\\ud800", "sol1": "b", "sol2": "c"}\n', ["line 1", "surrogates"]),
        ("arc/ARC-Easy-Test.jsonl", [arc_item(0, "E")], ["line 1", "answerKey is 'E'"]),
        ("winogrande/dev.jsonl", [{"sentence": "A.", "option1": "B", "option2": "C", "answer": "1"}], ["gap"]),
        ("lambada/lambada_test.jsonl", [{"text": "word"}], ["line 1", "text is 'word'"]),
        ("blimp/adjunct_island.jsonl", [{"sentence_good": "A"}], ["adjunct_island.jsonl", "line 1"]),
        ("wikitext2/wiki.test.raw", " \n", ["wiki.test.raw", "empty"]),
    ],
)  # fmt: skip
def test_a_missing_or_damaged_file_is_named_with_its_line(name, content, words, refused, data):
    if content is None:
        (data / name).unlink()
    else:
        write(data / name, content)
    tasks = {"arc": "arc_easy", "lambada": "lambada_openai", "blimp": "blimp_adjunct_island", "wikitext2": "wikitext"}
    folder = name.split("/")[0]
    refused(["data_dir holds", *words], "--tasks", tasks.get(folder, folder))


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": null}', b'{"text": "a b', b'{"text": "a \\ud800"}'],
    ids=lambda content: str(content[:20]),
)
def test_a_line_of_a_benchmark_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one two"}\n\n' + content)
    with pytest.raises(SettingError, match=r"x\.jsonl, whose line 3 is damaged: "):
        read_rows(LOCAL_DATASETS["EleutherAI/lambada_openai"], tmp_path / "x.jsonl")


def test_a_benchmark_is_read_as_programs_of_any_system_write_it(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one two"}\r\n\r\n{"text": "a b", "n": NaN}\r\n\n')
    rows = read_rows(LOCAL_DATASETS["EleutherAI/lambada_openai"], tmp_path / "x.jsonl")
    assert rows == [{"text": "one two"}, {"text": "a b"}]


@pytest.mark.parametrize("name", ["valid.jsonl", "valid-labels.lst"])
def test_a_file_that_is_no_text_is_named(name, refused, data):
    (data / "piqa" / name).write_bytes(b'{"goal": "\xff"}\n')
    refused([name, "no UTF-8"], "--tasks", "piqa")


def test_a_file_that_results_would_replace_is_refused_before_the_run(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused(["out is", "notes.txt, which exists"], "--tasks", "piqa", "--out", str(tmp_path / "notes.txt"))
    refused(["tasks holds 'no_such'"], "--tasks", "no_such", "--out", str(tmp_path / "new" / "results.json"))
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    below = str(tmp_path / "notes.txt" / "scores.json")
    refused([f"out is {below}, which can't be written"], "--tasks", "piqa", "--out", below)


def define(folder, monkeypatch, **definitions):
    """Adds tasks and groups with these definitions to PIQA and ARC."""
    for name, text in definitions.items():
        write(folder / f"{name}.yaml", text)
    manager = TaskManager(include_defaults=False, include_path=[TASKS / "piqa", TASKS / "arc", folder])
    monkeypatch.setattr(evaluation, "definitions", lambda: manager)


def test_a_task_that_sets_its_own_examples_needs_them(refused, tmp_path, monkeypatch):
    define(tmp_path / "own", monkeypatch, shown=f"include: {TASKS}/piqa/piqa.yaml\ntask: shown\nnum_fewshot: 1\n")
    refused(["train.jsonl", "shown takes its examples from"], "--tasks", "shown")


@pytest.mark.parametrize("member", ["{task: piqa, num_fewshot: 1}", "{group: inner, task: [piqa]}", "nothing"])
def test_a_group_that_sets_up_tasks_of_its_own_has_no_local_form(member, refused, tmp_path, monkeypatch):
    define(tmp_path / "own", monkeypatch, several=f"group: several\ntask:\n  - {member}\n  - arc_easy\n")
    refused(["tasks holds 'several'", "no local form"], "--tasks", "several")


def test_a_task_asked_twice_with_two_numbers_of_examples_is_refused(refused, tmp_path, monkeypatch):
    define(tmp_path / "own", monkeypatch, several="group: several\ntask:\n  - {task: piqa, num_fewshot: 1}\n")
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", lambda *args, **kwargs: ON_THE_HUB["piqa"])
    refused(["tasks holds 'piqa' a second time, in 'several'"], "--tasks", "piqa,several", local=False)


def test_a_task_that_runs_code_is_refused(refused, tmp_path, monkeypatch):
    define(tmp_path / "own", monkeypatch, coder=f"include: {TASKS}/piqa/piqa.yaml\ntask: coder\nunsafe_code: true\n")
    refused(["tasks holds 'coder'", "runs code"], "--tasks", "coder")


def test_a_window_beyond_the_table_of_positions_is_refused(refused, checkpoints, tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=32, n_embd=8, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "gpt2")
    words = ["max_length is 64", "fewer positions"]
    refused(words, "--tasks", "piqa", "--max_length", "64", checkpoint=tmp_path / "gpt2")


def test_an_answer_that_is_no_token_is_refused(refused, checkpoints, data, tmp_path):
    shutil.copytree(checkpoints["llama"], tmp_path / "words")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<eos>": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="[UNK]")
    fast.save_pretrained(tmp_path / "words")
    write(data / "piqa" / "valid.jsonl", [{"goal": "Open", "sol1": " ", "sol2": "Turn"}] * 3)
    refused(["tasks hold", "Question: Open", "no token"], "--tasks", "piqa", checkpoint=tmp_path / "words")


def copy(folder, target, *without, **changes):
    target.mkdir()
    for path in folder.iterdir():
        if path.name not in without:
            (target / path.name).write_bytes(path.read_bytes())
    for name, content in changes.items():
        (target / name.replace("__", ".")).write_text(content)
    return target


@pytest.mark.parametrize("name", ["gqe", "llama"])
def test_a_checkpoint_that_cannot_be_scored_is_named(name, refused, checkpoints, tmp_path):
    whole = checkpoints[name]
    weightless = copy(whole, tmp_path / "weightless", "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    deeper = json.dumps({**config, "num_hidden_layers": 3, "layer_types": None})
    refused(["nothing", "doesn't exist"], "--tasks", "piqa", checkpoint=tmp_path / "nothing")
    refused(["can't be loaded"], "--tasks", "piqa", checkpoint=weightless)
    refused(
        ["which holds no tokenizer"], "--tasks", "piqa",
        checkpoint=copy(whole, tmp_path / "mute", "tokenizer.json", "tokenizer_config.json"),
    )  # fmt: skip
    refused(
        ["lacks", "model.layers.2"], "--tasks", "piqa",
        checkpoint=copy(whole, tmp_path / "short", config__json=deeper),
    )  # fmt: skip


def test_a_tokenizer_of_another_model_is_refused(refused, tmp_path, checkpoints):
    small = LlamaForCausalLM(tiny_llama_config())  # 31 tokens
    small.save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "small" / name).write_bytes((checkpoints["llama"] / name).read_bytes())
    refused(["257 tokens", "model 31"], "--tasks", "piqa", checkpoint=tmp_path / "small")


def test_a_hub_out_of_reach_is_told_with_the_way_around_it(refused, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", unreachable)
    refused(["tasks holds 'piqa'", "Couldn't reach", "data_dir"], "--tasks", "piqa", local=False)


def test_a_task_that_cannot_be_loaded_is_told_with_the_reason(refused, monkeypatch):
    def outdated(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found piqa.py")

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", outdated)
    refused(["tasks holds 'piqa'", "scripts are no longer supported"], "--tasks", "piqa", local=False)


def test_without_lm_eval_the_extra_is_named(refused, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "query_experts.evaluate.harness")
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    refused(["lm_eval is not installed", "query-experts[evaluate]"], "--tasks", "piqa")


def test_a_context_is_cut_where_the_query_has_a_capital_letter():
    from query_experts.evaluate.local_tasks import context_parts

    assert context_parts("A man sits. he", "A man sits. He") == ("A man sits.", "he")
    assert context_parts("A man sits. He", "A man sits. He") == ("A man sits. He", "")
    with pytest.raises(SettingError, match="dtype"):
        evaluation.evaluate(EvaluateSettings("nowhere", ["piqa"], dtype="int8"), None)


def with_numbers(folder, target, change):
    """A copy of a checkpoint with its output norm's weight changed."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
    save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_scores_that_are_no_numbers_are_refused_and_not_taken_for_the_best(refused, checkpoints, tmp_path):
    broken = with_numbers(checkpoints["gqe"], tmp_path / "nan", lambda weight: weight * math.nan)
    refused(["model.norm.weight holds numbers that aren't finite"], "--tasks", "piqa", checkpoint=broken)
    huge = with_numbers(checkpoints["gqe"], tmp_path / "huge", lambda weight: torch.full_like(weight, 3e38))
    refused(["dtype is float32, in which", "aren't numbers"], "--tasks", "piqa", checkpoint=huge)


def test_a_perplexity_beyond_any_number_is_refused(refused, checkpoints, tmp_path):
    wild = with_numbers(checkpoints["gqe"], tmp_path / "wild", lambda weight: weight * 1e4)
    refused(["whose perplexity is beyond any number"], "--tasks", "lambada_openai", checkpoint=wild)


@pytest.mark.parametrize("around", ["$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>", "<|endoftext|> $A"])
def test_an_answer_goes_on_from_a_context_though_the_tokenizer_would_end_it(checkpoints, around):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        around, special_tokens=[("<|endoftext|>", 256)]
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    scorer = evaluation.Scorer(pretrained=model, tokenizer=tokenizer, backend="causal")
    first = [256] * around.startswith("<")
    context, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in ("He sat", " down"))
    assert scorer._encode_pair("He sat ", "down") == ([*first, *context], answer)
    assert scorer.tok_batch_encode(["He sat"])[0].tolist() == [[*first, *context]]
    assert scorer.tok_encode("a", add_special_tokens=False) == tokenizer("a", add_special_tokens=False).input_ids


def test_a_tokenizer_without_an_eos_token_scores_texts_and_generates_none(checkpoints, refused, data, tmp_path):
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "endless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": "<|endoftext|>", "eos_token": None})
    )
    write(data / "arc" / "ARC-Challenge-Test.jsonl", FILES["arc/ARC-Easy-Test.jsonl"])
    assert main(["evaluate", str(folder), "--tasks", "piqa", "--data-dir", str(data), "--limit", "1"]) == 0
    refused(["tasks ask for generated text", "no eos_token"], "--tasks", "arc_challenge_chat", checkpoint=folder)
