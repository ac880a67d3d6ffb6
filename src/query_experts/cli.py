"""The console command `query-experts`: compare, train, generate, report.

Every setting of `compare` and `train` is an option; a preset or a recipe (YAML) sets them first, and the command
line has the last word. A setting that can't be used ends in one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from query_experts.errors import SettingError

COMMANDS = {
    "compare": "train arms head to head and report; the main job",
    "train": "train one arm",
    "generate": "write text with a trained GQE checkpoint",
    "report": "make the page and the table again from a compared folder",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 stopped before the end (go on with the same command), 2 a setting is unusable."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: query-experts COMMAND [options]; COMMAND --help tells more\n")
        print("\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items()))
        return 0 if argv else 2
    try:
        match argv[0]:
            case "compare" | "train":
                return run_study(argv[0], argv[1:])
            case "generate":
                return run_generate(argv[1:])
            case "report":
                return run_report(argv[1:])
        raise SettingError(f"command is {argv[0]!r}; it must be one of {', '.join(COMMANDS)}")
    except SettingError as error:
        print(f"query-experts: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("query_experts"):
            raise
        print(f"query-experts: {error.name} is not installed; pip install query-experts[study]", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"query-experts: out has no room left on its disk ({error.filename or 'device full'})", file=sys.stderr)
        return 2


def run_study(command: str, argv: list[str]) -> int:
    from rich.console import Console
    from transformers import HfArgumentParser

    from query_experts.study import compare as study
    from query_experts.study.settings import CompareSettings, TrainSettings

    kind = CompareSettings if command == "compare" else TrainSettings
    parser = HfArgumentParser(kind, prog=f"query-experts {command}", description=COMMANDS[command])
    parser.add_argument("--preset", default="demo", help=f"one of {', '.join(presets())} (default: demo)")
    parser.add_argument("--recipe", help="a YAML file of settings, over the preset's")
    first = parser.parse_args(argv)
    if first.preset not in presets():
        raise SettingError(f"preset is {first.preset!r}; it must be one of {', '.join(presets())}")
    allowed = {f.name for settings in (CompareSettings, TrainSettings) for f in fields(settings)}
    recipe = read_recipe(presets()[first.preset], allowed)
    if first.recipe:
        recipe |= read_recipe(Path(first.recipe), allowed)
    recipe = {name: value for name, value in recipe.items() if name in {f.name for f in fields(kind)}}
    hints = get_type_hints(kind)  # the parser has changed the types that the fields hold
    for name, value in recipe.items():
        if value is None and type(None) not in get_args(hints[name]):
            raise SettingError(f"recipe sets {name} to null; it must have a value")
    parser.set_defaults(**{name: value for name, value in recipe.items() if value is None or value == []})
    settings = parser.parse_args_into_dataclasses(as_options(recipe) + argv)[0]
    done = (study.compare if command == "compare" else study.train)(settings, Console())
    return 0 if done else 1


def presets() -> dict[str, Any]:
    recipes = files("query_experts") / "recipes"
    return {p.name.removesuffix(".yaml"): p for p in recipes.iterdir() if p.name.endswith(".yaml")}


def read_recipe(path: Any, allowed: set[str]) -> dict[str, Any]:
    """The settings in a YAML file. Raises SettingError for a file that holds none, or one that doesn't exist."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"recipe is {path}, which can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise SettingError(f"recipe is {path}; it must hold lines of `setting: value`")
    for name in recipe:
        if name not in allowed:
            raise SettingError(f"recipe {path} sets {name!r}; it must be one of {', '.join(sorted(allowed))}")
    return recipe


def as_options(recipe: dict[str, Any]) -> list[str]:
    """A recipe as command-line options, so that both are checked in one place."""
    options: list[str] = []
    for name, value in recipe.items():
        if value is not None and value != []:
            options += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return options


def run_generate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="query-experts generate", description=COMMANDS["generate"])
    parser.add_argument("checkpoint", help="folder of a GQE checkpoint, with its tokenizer")
    parser.add_argument("--prompt", default="def ", help="text to go on from")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args(argv)

    from query_experts.generation import generate

    generate(
        Path(options.checkpoint), options.prompt, options.max_new_tokens, options.temperature, options.seed,
        options.device,
    )  # fmt: skip
    return 0


def run_report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="query-experts report", description=COMMANDS["report"])
    parser.add_argument("folder", help="a compared folder, with comparison.json")
    folder = Path(parser.parse_args(argv).folder)

    from rich.console import Console

    from query_experts.study.report import print_summary, write_report

    source = folder / "comparison.json"
    try:
        comparison = json.loads(source.read_text(encoding="utf-8"))
        if not isinstance(comparison, dict) or not comparison.get("runs"):
            raise ValueError("no runs")
    except (OSError, ValueError) as error:
        raise SettingError(f"folder is {folder}; it must hold the comparison.json of a finished compare") from error
    page = write_report(comparison, folder / "report.html")
    print_summary(comparison, Console())
    print(f"Page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
