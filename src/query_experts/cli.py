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
from typing import Any, NoReturn, get_args, get_type_hints

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
    except KeyboardInterrupt:
        return refuse("stopped; what was finished is kept, and the same command goes on", 130)
    except SettingError as error:
        return refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("query_experts"):
            raise
        return refuse(f"{error.name} is not installed; pip install query-experts[study]")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return refuse(f"out has no room left on its disk ({error.filename or 'device full'})")
        return refuse(f"{error.filename or 'a file'} can't be read or written: {error.strerror or error}")


def refuse(sentence: str, status: int = 2) -> int:
    print(f"query-experts: {' '.join(sentence.split())}", file=sys.stderr)
    return status


class Options(argparse.ArgumentParser):
    """Refuses an option in one sentence, as everything else is refused."""

    def error(self, message: str) -> NoReturn:
        refuse_option(self, message)


def refuse_option(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise SettingError(f"{message}; {parser.prog} --help lists what is allowed")


def run_study(command: str, argv: list[str]) -> int:
    from rich.console import Console
    from transformers import HfArgumentParser

    from query_experts.study import compare as study
    from query_experts.study.settings import CompareSettings, TrainSettings

    class StudyOptions(HfArgumentParser):
        error = refuse_option

    kind = CompareSettings if command == "compare" else TrainSettings
    parser = StudyOptions(kind, prog=f"query-experts {command}", description=COMMANDS[command])
    parser.add_argument("--preset", default="demo", help=f"one of {', '.join(presets())}")
    parser.add_argument("--recipe", help="a YAML file of settings, over the preset's")
    names, optional = {f.name for f in fields(kind)}, optional_fields(kind)
    argv, lifted = without_none(argv, optional)
    first = parser.parse_args(argv)
    if first.preset not in presets():
        raise SettingError(f"preset is {first.preset!r}; it must be one of {', '.join(presets())}")
    allowed = names | {f.name for settings in (CompareSettings, TrainSettings) for f in fields(settings)}
    recipe: dict[str, Any] = {"out": f"runs/{first.preset}"} if command == "compare" else {}
    for source in [presets()[first.preset], *([Path(first.recipe)] if first.recipe else [])]:
        settings_held = read_recipe(source, allowed)
        check_recipe(source, settings_held, parser, names, optional)
        recipe |= settings_held
    recipe = {name: value for name, value in recipe.items() if name in names} | dict.fromkeys(lifted)
    parser.set_defaults(**{name: value for name, value in recipe.items() if value is None or value == []})
    settings = parser.parse_args_into_dataclasses(as_options(recipe) + argv)[0]
    done = (study.compare if command == "compare" else study.train)(settings, Console())
    return 0 if done else 1


def optional_fields(kind: type) -> set[str]:
    """The settings that may be null in a recipe, and `none` on the command line."""
    hints = get_type_hints(kind)
    return {f.name for f in fields(kind) if type(None) in get_args(hints[f.name])}


def without_none(argv: list[str], optional: set[str]) -> tuple[list[str], list[str]]:
    """The options without those that say `--name none`, and the names of these."""
    kept, lifted, rest = [], [], list(argv)
    while rest:
        name = rest[0].removeprefix("--").replace("-", "_")
        if rest[0].startswith("--") and name in optional and rest[1:2] == ["none"]:
            lifted.append(name)
            del rest[:2]
        else:
            kept.append(rest.pop(0))
    return kept, lifted


def check_recipe(source: Any, held: dict[str, Any], parser: Any, names: set[str], optional: set[str]) -> None:
    """Raises SettingError, naming the recipe, for a value that its setting can't take."""
    for name, value in held.items():
        if name not in names:  # of the other command
            continue
        if value is None and name not in optional:
            raise SettingError(f"recipe {source} sets {name} to null; it must have a value")
        try:
            _, left = parser.parse_known_args(as_options({name: value}))
        except SettingError as error:
            raise SettingError(f"recipe {source}: {error}") from error
        if left:
            raise SettingError(f"recipe {source} sets {name} to {value!r}; it must be one value")


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
    parser = Options(prog="query-experts generate", description=COMMANDS["generate"])
    parser.add_argument("checkpoint", help="folder of a GQE checkpoint, with its tokenizer")
    parser.add_argument("--prompt", default="def ", help="text to go on from")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=100)
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
    parser = Options(prog="query-experts report", description=COMMANDS["report"])
    parser.add_argument("folder", help="a compared folder, with comparison.json")
    folder = Path(parser.parse_args(argv).folder)

    from rich.console import Console

    from query_experts.study.report import print_summary, write_report

    source = folder / "comparison.json"
    try:
        comparison = json.loads(source.read_text(encoding="utf-8"))
        runs = comparison["runs"]
        if not runs or not all({"arm", "seed", "validation_loss"} <= run.keys() for run in runs):
            raise ValueError("no runs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingError(f"folder is {folder}; it must hold the comparison.json of a compare") from error
    page = write_report(comparison, folder / "report.html")
    print_summary(comparison, Console())
    print(f"Page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
