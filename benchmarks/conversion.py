"""Converts a dense model in several ways and trains each conversion: what router, projection and sparsity cost.

python benchmarks/conversion.py --teacher runs/teacher/model --data TEXT ... [--cases CASE ...] [--seeds 0 1 2]

conversion-teacher.yaml makes the dense model, and conversion.yaml has the settings of the runs. All cases of a seed see
the same tokens in the same order. A finished run isn't repeated, so the cases can be run in several calls. The results
of all runs in the folder go to benchmarks/results/conversion.json, from which conversion_tables.py makes tables and a
plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console

from query_experts.common.environment import Environment, environment
from query_experts.common.files import write_json
from query_experts.common.settings import parse_settings
from query_experts.convert import convert_model
from query_experts.data import Corpus
from query_experts.model import costs
from query_experts.study.callbacks import StopRequest
from query_experts.study.compare import open_corpus
from query_experts.study.distill import load_teacher
from query_experts.study.results import Curve, ParameterCounts, Piece, RoutingLoad
from query_experts.study.settings import DistillSettings
from query_experts.study.train import StartingPoint, train_arm
from query_experts.study.workspace import own_folder

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "conversion.json"
CALIBRATION_SEQUENCES = 64
LONG = {"steps": 400, "evaluations": 16}

# case -> options of the conversion, and those of the training that differ from the recipe
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all-awake": ({"router": "random", "top_k": None}, {}),
    "static": ({"router": "none"}, {}),
    "static-k2": ({"router": "none", "top_k": 2}, {}),
    "expert-random": ({"router": "random"}, {}),
    "expert-query_norm": ({"router": "query_norm"}, {}),
    "expert-calibrated": ({"router": "calibrated"}, {}),
    "slot-random": ({"router": "random", "output_projection": "slot"}, {}),
    "slot-query_norm": ({"router": "query_norm", "output_projection": "slot"}, {}),
    "slot-calibrated": ({"router": "calibrated", "output_projection": "slot"}, {}),
    "expert-calibrated-k2": ({"router": "calibrated", "top_k": 2}, {}),
    "expert-calibrated-k3": ({"router": "calibrated", "top_k": 3}, {}),
    "expert-calibrated-gradual": ({"router": "calibrated"}, {"sparsify_fraction": 0.5}),
    "expert-calibrated-undistilled": ({"router": "calibrated"}, {"distillation": 0.0}),
    "expert-calibrated-unbalanced": ({"router": "calibrated"}, {"router_aux_loss_coef": 0.0}),
    "slot-calibrated-unbalanced": (
        {"router": "calibrated", "output_projection": "slot"},
        {"router_aux_loss_coef": 0.0},
    ),
    "static-long": ({"router": "none"}, LONG),
    "expert-calibrated-long": ({"router": "calibrated"}, LONG),
    "slot-calibrated-long": ({"router": "calibrated", "output_projection": "slot"}, LONG),
}


@dataclass(frozen=True)
class Fit:
    """Shares of the heads' contributions that are kept: by the router, by fixed heads, and at best."""

    kept: float
    fixed: float
    best: float


@dataclass(frozen=True)
class ConversionRun:
    """One conversion and its training.

    Args:
        kl_at_start: Divergence from the dense model before training.
        fits: Of the layers whose routers were fitted.
    """

    case: str
    seed: int
    active_heads: int
    kl_at_start: float
    fits: list[Fit]
    validation_curve: Curve
    validation_loss: float
    teacher_loss: float
    train_tokens: int
    parameters: ParameterCounts
    routing: RoutingLoad | None
    diverged_at_tokens: int | None
    tokens_per_s: float
    pieces: list[Piece]


@dataclass(frozen=True)
class Teacher:
    parameters: ParameterCounts
    heads: int


@dataclass(frozen=True)
class Settings:
    """The settings of the runs that the tables name; the file holds all of them."""

    num_key_value_heads: int
    batch_size: int
    seq_len: int
    learning_rate: float
    distillation: float
    validation_sequences: int


@dataclass(frozen=True)
class Data:
    """The names of the text's files; the file holds all that `Corpus.facts` has."""

    source: list[str]


@dataclass(frozen=True)
class Conversions:
    """All of conversion.json."""

    settings: Settings
    data: Data
    teacher: Teacher
    environment: Environment
    runs: list[ConversionRun]


_RUN = TypeAdapter(ConversionRun)
_CONVERSIONS = TypeAdapter(Conversions)


def read_run(file: Path) -> ConversionRun:
    return _RUN.validate_python(json.loads(file.read_text(encoding="utf-8")))


def read_conversions(file: Path) -> Conversions:
    """Reads a conversion.json. Raises ValueError for any other file."""
    return _CONVERSIONS.validate_python(json.loads(file.read_text(encoding="utf-8")))


def run(case: str, seed: int, teacher: Any, settings: DistillSettings, corpus: Corpus, folder: Path) -> ConversionRun:
    """Converts the teacher and trains the conversion."""
    conversion, training = CASES[case]
    settings = dataclasses.replace(settings, **training)
    torch.manual_seed(seed)
    chosen = torch.randperm(len(corpus.train))[:CALIBRATION_SEQUENCES].tolist()
    text = torch.stack([corpus.train[i]["input_ids"] for i in chosen])
    model, report = convert_model(teacher, **{"top_k": 1} | conversion, calibration=text, seed=seed)
    model.config.router_aux_loss_coef = settings.router_aux_loss_coef
    heads = costs.heads(model.config).active
    start = StartingPoint(model, teacher, settings.distillation, settings.sparsify_fraction)
    result = train_arm(settings, case, seed, corpus, folder, StopRequest(), start)
    assert result is not None
    return ConversionRun(
        case=case,
        seed=seed,
        active_heads=heads,
        kl_at_start=report.kl,
        fits=[Fit(fit.kept, fit.fixed, fit.best) for fit in report.fits if fit is not None],
        validation_curve=result.validation_curve,
        validation_loss=result.validation_loss,
        teacher_loss=result.teacher_loss,
        train_tokens=result.train_tokens,
        parameters=result.parameters,
        routing=result.routing,
        diverged_at_tokens=result.diverged_at_tokens,
        tokens_per_s=result.tokens_per_s,
        pieces=result.pieces,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the dense model")
    parser.add_argument("--data", required=True, nargs="+", help="text, that of the dense model")
    parser.add_argument("--out", default="runs/conversion", help="folder for the runs")
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache_dir", help="folder for tokenised data")
    parser.add_argument("--result", type=Path, default=RESULT)
    options, rest = parser.parse_known_args()
    recipe = [
        "--init",
        "in memory",
        "--recipe",
        str(ROOT / "benchmarks" / "conversion.yaml"),
        "--tokenizer",
        options.teacher,
    ]
    recipe += ["--out", options.out, "--data", *options.data]
    recipe += ["--cache_dir", options.cache_dir] if options.cache_dir else []
    settings = parse_settings(
        DistillSettings, [*recipe, *rest], prog="conversion.py", about=str(__doc__), folder="recipes", preset="distill"
    )
    console = Console()
    with own_folder(Path(options.out)) as out:
        corpus = open_corpus(settings, out, console)
        teacher = load_teacher(options.teacher)
        for seed in options.seeds:
            for case in options.cases:
                file = out / "results" / f"{case}-seed{seed}.json"
                if not file.exists():
                    console.print(f"{case}, seed {seed}")
                    found = run(case, seed, teacher, settings, corpus, out / "runs" / f"{case}-seed{seed}")
                    write_json(file, dataclasses.asdict(found))
        runs = [read_run(path) for path in sorted((out / "results").glob("*.json"))]
    info = {k: v for k, v in corpus.info.items() if k not in ("source", "tokenizer", "skipped_files")}
    kept = dataclasses.asdict(settings)
    for name in ("out", "data", "cache_dir", "tokenizer", "init", "teacher", "seed"):
        del kept[name]
    write_json(
        options.result,
        {
            "settings": kept,
            "data": info | {"source": [Path(name).name for name in options.data]},
            "teacher": {"parameters": costs.parameters(teacher), "heads": teacher.config.num_attention_heads},
            "environment": dataclasses.asdict(environment(settings.torch_device, settings.autocast_dtype())),
            "runs": [dataclasses.asdict(run) for run in runs],
        },
    )


if __name__ == "__main__":
    main()
