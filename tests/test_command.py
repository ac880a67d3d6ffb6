"""The console command as a process: it answers at once, and Ctrl-C and closed pipes end it without a traceback."""

import ast
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rich.table import Table

from query_experts import cli
from query_experts.cli import COMMANDS, EXTRAS, main
from query_experts.common.errors import SettingError
from query_experts.common.settings import presets
from query_experts.evaluate.settings import GenerateSettings
from query_experts.study import single
from query_experts_command import replace_what_cannot_be_printed

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
COMMAND = [sys.executable, "-m", "query_experts_command"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}


# what needs no model


@pytest.mark.parametrize(
    ("argv", "status"),
    [([], 2), (["--help"], 0), (["--version"], 0), (["trian"], 2), *(([name, "--help"], 0) for name in COMMANDS)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_the_version_and_a_wrong_command_import_neither_torch_nor_transformers_nor_the_package(argv, status):
    code = f"""
import sys
from query_experts_command import main
status = main({argv!r})
print([name for name in ("torch", "transformers", "query_experts", "numpy") if name in sys.modules], status)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {status}"


@pytest.fixture(scope="module")
def help_pages():
    spec = importlib.util.spec_from_file_location("help_pages", ROOT / "dev" / "help_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_pages_are_those_that_the_parsers_print(help_pages, command):
    kept = (help_pages.PAGES / f"{command}.txt").read_text(encoding="utf-8")
    assert help_pages.page(command) == kept, "an option has changed: run python dev/help_pages.py"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_page_begins_with_an_example_and_lists_every_option_once(capsys, command):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.splitlines()[2].startswith(f"  query-experts {command} ")
    assert max(map(len, page.splitlines())) <= 104
    options = re.findall(r"^  (--\w+)", page, re.MULTILINE)
    assert len(options) == len({*options})


def test_help_beside_other_options_shows_the_defaults_that_they_leave(capsys):
    assert main(["compare", "--help"]) == 0
    plain = capsys.readouterr().out
    assert main(["compare", "--preset", "small", "--help"]) == 0
    small = capsys.readouterr().out
    assert "hidden size D (default: 64)" in plain
    assert "hidden size D (default: 256)" in small
    assert [line[:36] for line in plain.splitlines()[:9]] == [line[:36] for line in small.splitlines()[:9]]
    assert f"one of {', '.join(sorted(presets('recipes')))}" in " ".join(plain.split())


def test_train_lists_the_presets_that_it_can_use(capsys):
    assert main(["train", "--help"]) == 0
    known = ", ".join(sorted({*presets("recipes")} - {"distill"}))
    assert f"one of {known} (default: demo)" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_arguments_beside_the_command_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "query-experts.args").write_text("--steps 7")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "query-experts")])
    held = []
    monkeypatch.setattr(single, "train", lambda settings, console: held.append(settings) or True)
    assert main(["train"]) == 0
    assert held[0].steps == 1000


# what isn't installed


@pytest.mark.parametrize(
    ("argv", "missing", "extra"),
    [
        (["compare"], "scipy", "study"),
        (["train"], "accelerate", "train"),
        (["distill"], "rich", "train"),
        (["convert", "a", "b"], "pydantic", "train"),
        (["evaluate", "a", "--tasks", "piqa"], "datasets", "evaluate"),
        (["bench"], "rich", "study"),
        (["data", "prepare", "a"], "filelock", "train"),
        (["report", "a"], "jinja2", "study"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_holds_it(monkeypatch, refused, argv, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    refused(argv, f"{missing} is not installed; pip install query-experts[{extra}]")


def test_every_extra_holds_what_its_commands_need():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert EXTRAS.keys() == COMMANDS.keys()
    for extra, modules in EXTRAS.values():
        names = {re.match(r"[\w-]+", line)[0] for line in extras[extra]}
        if "query-experts" in names:
            names |= {re.match(r"[\w-]+", line)[0] for line in extras["train"]}
        assert {module.replace("_", "-") for module in modules} <= names


# Ctrl-C

SLOW = """
import sys
print("importing", flush=True)
try:
    sys.stdin.readline()
except BaseException:
    pass  # as a module may that is interrupted
raise SystemExit(7)
"""


def started(argv, handler=signal.SIG_DFL, **options):
    """A process that Ctrl-C is not ignored in, or is; ignored is what a shell's background jobs begin with."""
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler), **options,
    )  # fmt: skip


@pytest.fixture
def slow_imports(tmp_path):
    """An environment in which importing torch waits for a line on stdin, and then ends the process with 7."""
    (tmp_path / "torch.py").write_text(SLOW)
    return ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"}


def test_ctrl_c_during_imports_ends_in_a_sentence(slow_imports):
    process = started([*COMMAND, "compare"], env=slow_imports)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert (process.returncode, said, error) == (130, "", "query-experts: stopped\n")


def test_ctrl_c_that_is_ignored_stays_ignored(slow_imports):
    process = started([*COMMAND, "compare"], handler=signal.SIG_IGN, env=slow_imports)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate("\n", timeout=60)
    assert (process.returncode, error) == (7, "")


def test_ctrl_c_while_the_process_ends_is_a_sentence_too():
    code = """
import atexit, sys
from query_experts_command import main
atexit.register(lambda: (print("ending", flush=True), sys.stdin.readline()))
sys.argv = ["query-experts", "--version"]
sys.exit(main())
"""
    process = started([sys.executable, "-c", code], env=ENVIRONMENT)
    assert process.stdout.readline().startswith("query-experts ")
    assert process.stdout.readline() == "ending\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "query-experts: stopped\n")


@pytest.mark.full
def test_ctrl_c_during_the_work_says_that_the_command_goes_on():
    code = """
import sys
from query_experts.study import compare
from query_experts_command import main
compare.compare = lambda *_: (print("working", flush=True), sys.stdin.readline())
sys.argv = ["query-experts", "compare"]
sys.exit(main())
"""
    process = started([sys.executable, "-c", code], env=ENVIRONMENT)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "query-experts: stopped; the same command goes on from the last checkpoint, if there is one\n"
    assert process.returncode == 130


# a closed pipe


def run_without_a_reader(argv, env=ENVIRONMENT):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(writer)


@pytest.mark.full
@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["compare", "--help"], ["train", "--preset", "small", "--help"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_that_nobody_reads_ends_quietly(argv, unbuffered):
    done = run_without_a_reader([*COMMAND, *argv], ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.full
def test_text_that_nobody_reads_ends_quietly():
    argv = ["generate", str(FIXTURES / "model"), "--prompt", "def ", "--max_new_tokens", "3", "--device", "cpu"]
    done = run_without_a_reader([*COMMAND, *argv])
    assert (done.returncode, done.stderr) == (141, "")


def test_a_report_that_nobody_reads_is_written_and_ends_quietly(tmp_path):
    shutil.copy(FIXTURES / "compare_finished" / "comparison.json", tmp_path)
    done = run_without_a_reader([*COMMAND, "report", str(tmp_path)])
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "report.html").exists()


# a terminal that lacks characters


def printed_in_ascii(argv):
    """Runs a command in a terminal that knows ASCII alone; its status, and what reached stdout and stderr."""
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(error):
        status = main(argv)
    for stream in (out, error):
        stream.flush()
    return status, *(stream.buffer.getvalue().decode("ascii") for stream in (out, error))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_a_question_mark_for_what_the_terminal_lacks(monkeypatch, command):
    def work():
        print("\N{MINUS SIGN}1 \udcff", file=sys.stderr)
        table = Table("caf\N{LATIN SMALL LETTER E WITH ACUTE}")
        table.add_row("\N{MINUS SIGN}1")
        cli.terminal().print(table)
        return 0

    monkeypatch.setitem(cli.LOADERS, command, lambda command, argv: work)
    status, out, error = printed_in_ascii([command])
    assert (status, error) == (0, "?1 ?\n")
    assert "caf?" in out
    assert "?1" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_sentence_of_refusal_reaches_a_terminal_that_lacks_its_characters(monkeypatch, command):
    def work():
        raise SettingError("data holds '\N{GREEK SMALL LETTER ALPHA}.txt'; it must be there")

    monkeypatch.setitem(cli.LOADERS, command, lambda command, argv: work)
    sentence = "query-experts: data holds '?.txt'; it must be there\n"
    assert printed_in_ascii([command]) == (2, "", sentence)


def test_text_that_the_terminal_lacks_is_generated_to_its_end():
    prompt = "\N{GREEK SMALL LETTER ALPHA}\N{GREEK SMALL LETTER BETA} "
    argv = ["generate", str(FIXTURES / "model"), "--prompt", prompt, "--max_new_tokens", "3", "--device", "cpu"]
    status, out, _ = printed_in_ascii(argv)
    assert status == 0
    assert out.startswith("?? ")


def test_a_processs_own_handler_of_what_it_cannot_print_stays(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    replace_what_cannot_be_printed()
    assert stream.errors == "backslashreplace"


@pytest.mark.parametrize("prompt", ["caf\N{LATIN SMALL LETTER E WITH ACUTE}", "caf\udcc3\udca9"])
def test_a_prompt_is_text_also_where_the_locale_could_not_decode_it(prompt):
    assert GenerateSettings("model", prompt=prompt).prompt_text == "caf\N{LATIN SMALL LETTER E WITH ACUTE}"


def opens_in_the_locales_encoding(call):
    """Whether a call reads or writes text without naming the encoding. The package's own `write_text` is UTF-8."""
    function = ast.unparse(call.func)
    if function == "os.open" or not (function == "open" or function.endswith((".open", ".read_text", ".write_text"))):
        return False
    modes = [node.value for node in call.args if isinstance(node, ast.Constant)]
    binary = any(isinstance(mode, str) and "b" in mode for mode in modes)
    return not binary and all(word.arg != "encoding" for word in call.keywords)


def test_no_file_is_read_or_written_in_the_encoding_of_the_locale():
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{path}:{call.lineno}" for call in calls if opens_in_the_locales_encoding(call)]
    assert found == []


def test_what_rich_prints_to_a_closed_pipe_raises(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True))
    with pytest.raises(BrokenPipeError):
        cli.terminal().print("a table")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_nobody_reads_ends_with_the_status_of_sigpipe(monkeypatch, capsys, command):
    def closed():
        raise BrokenPipeError

    monkeypatch.setitem(cli.LOADERS, command, lambda command, argv: closed)
    assert main([command]) == 141
    assert capsys.readouterr().err == ""


def test_the_text_of_a_library_that_exits_is_printed(monkeypatch, capsys):
    from query_experts import cli

    monkeypatch.setitem(cli.LOADERS, "report", lambda command, argv: sys.exit("a reason"))
    assert main(["report", "x"]) == 1
    assert capsys.readouterr().err == "query-experts: a reason\n"


@pytest.mark.parametrize("argv", [["--init", "none"], ["--init=none"], ["--teacher", "none"]], ids=" ".join)
def test_train_takes_none_for_the_options_of_distill(monkeypatch, argv):
    from query_experts.study import single

    asked = []
    monkeypatch.setattr(single, "train", lambda settings, console: asked.append(settings) or True)
    assert main(["train", *argv]) == 0
    assert asked
