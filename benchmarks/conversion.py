"""Conversions of a dense model, each trained on a little: what router start, output projection and sparsity cost.

python benchmarks/conversion.py --teacher runs/teacher/model --data TEXT ... [--cases CASE ...] [--seeds 0 1 2]

The dense model is that of conversion-teacher.yaml, the runs' settings those of conversion.yaml, and all cases of a seed
see the same tokens in the same order. A run that is finished isn't repeated, so the cases may be made in pieces. What
all runs of the folder came to goes into benchmarks/results/conversion.json; conversion_tables.py makes the tables of
docs/converting.md and the plot of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from query_experts.common.environment import environment
from query_experts.common.files import write_json
from query_experts.common.settings import parse_settings
from query_experts.convert import convert_model
from query_experts.data import Corpus
from query_experts.model import costs
from query_experts.study.callbacks import StopRequest
from query_experts.study.compare import open_corpus
from query_experts.study.distill import load_teacher
from query_experts.study.settings import DistillSettings
from query_experts.study.train import StartingPoint, train_arm
from query_experts.study.workspace import own_folder

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "conversion.json"
CALIBRATION_SEQUENCES = 64
LONG = {"steps": 400, "evaluations": 16}

# case -> options of the conversion, then of the training where they aren't the recipe's
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


def run(case: str, seed: int, teacher: Any, settings: DistillSettings, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """One conversion and its training; what the conversion came to is kept beside the run."""
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
    fits = [fit for fit in report.fits if fit is not None]
    return {
        "case": case,
        "seed": seed,
        "active_heads": heads,
        "kl_at_start": report.kl,
        "fits": [{"kept": f.kept, "fixed": f.fixed, "best": f.best} for f in fits],
        **{name: result[name] for name in ("validation_curve", "validation_loss", "teacher_loss", "train_tokens")},
        **{name: result[name] for name in ("parameters", "routing", "diverged_at_tokens", "tokens_per_s", "pieces")},
    }


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
                    write_json(file, run(case, seed, teacher, settings, corpus, out / "runs" / f"{case}-seed{seed}"))
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "results").glob("*.json"))]
    info = {k: v for k, v in corpus.info.items() if k not in ("source", "tokenizer", "skipped_files")}
    held = dataclasses.asdict(settings)
    for name in ("out", "data", "cache_dir", "tokenizer", "init", "teacher", "seed"):
        del held[name]
    write_json(
        options.result,
        {
            "settings": held,
            "data": info | {"source": [Path(name).name for name in options.data]},
            "teacher": {"parameters": costs.parameters(teacher), "heads": teacher.config.num_attention_heads},
            "environment": environment(settings.torch_device, settings.autocast_dtype()),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
