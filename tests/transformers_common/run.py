"""Runs Transformers' common model tests, from the source distribution of the installed version, on the GQE model.

    python tests/transformers_common/run.py [--cache DIR] [pytest arguments]

The distribution is downloaded once and its tests unpacked into DIR/transformers-VERSION. Exit status: pytest's, or 2 if
the distribution can't be downloaded. Needs the packages pytest and parameterized.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
COMMON_TESTS = "tests/test_modeling_common.py"


class CannotRun(Exception):
    """The run can't start; the message is a sentence that names what is missing."""


def sdist_tests(cache: Path, version: str) -> Path:
    """The folder with the `tests` of that version's distribution; downloads it if it isn't there yet."""
    root = cache / f"transformers-{version}"
    if (root / COMMON_TESTS).is_file():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as folder:
        download(version, Path(folder))
        archive = next(Path(folder).glob("transformers-*.tar.gz"), None)
        if archive is None:
            raise CannotRun(f"pip fetched no source archive of transformers {version}.")
        unpacked = unpack(archive, Path(folder) / "unpacked")
        if not (unpacked / COMMON_TESTS).is_file():
            raise CannotRun(f"{archive.name} holds no {COMMON_TESTS}.")
        if not root.exists():
            unpacked.rename(root)
    return root


def download(version: str, folder: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["nothing"]
        error = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise CannotRun(f"The source distribution of transformers {version} can't be fetched; pip says: {error}")


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack only the tests, and add `tests/__init__.py`: ConfigTester runs it, and the distribution lacks it."""
    with tarfile.open(archive) as tar:
        tests = [member for member in tar.getmembers() if member.name.partition("/")[2].startswith("tests/")]
        tar.extractall(folder, members=tests, filter="data")
    root = folder / archive.name.removesuffix(".tar.gz")
    if root.is_dir():
        (root / "tests" / "__init__.py").touch()
    return root


def environment(sdist: Path) -> dict[str, str]:
    path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(REPOSITORY / "src")]
    return {
        "OMP_NUM_THREADS": "1",  # for tiny models more threads only slow the ranks down
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "TRANSFORMERS_SDIST": str(sdist),
        "PYTHONPATH": os.pathsep.join(path),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache", help="default: .cache of the repository")
    arguments, pytest_arguments = parser.parse_known_args()
    try:
        for package in ("transformers", "pytest", "parameterized"):
            if importlib.util.find_spec(package) is None:
                raise CannotRun(f"The package {package} is not installed.")
        sdist = sdist_tests(arguments.cache.resolve(), importlib.metadata.version("transformers"))
    except (CannotRun, OSError, tarfile.TarError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    return subprocess.run(
        [sys.executable, "-m", "pytest", *pytest_arguments], cwd=HERE, env=environment(sdist)
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
