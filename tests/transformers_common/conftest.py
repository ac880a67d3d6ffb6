"""Makes Transformers' own tests importable for test_gqe_common.py, and ends the run with a table of the skipped tests.

Without the unpacked source distribution (see run.py) nothing here is collected, so an ordinary `pytest` skips it.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"
SDIST_VARIABLE = "TRANSFORMERS_SDIST"  # run.py sets it to the unpacked source distribution

collect_ignore = ["stand_ins"]
if SDIST_VARIABLE in os.environ:
    sys.path.insert(0, str(STAND_INS))  # processes that the tests start inherit both
else:
    collect_ignore.append("test_gqe_common.py")


def skip_reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(reason.removeprefix("Skipped: ").split())


def total_outcome(outcomes: set[str]) -> str:
    """One outcome for a test; a test that passed, but whose subtests were all skipped, is skipped."""
    if "failed" in outcomes or "skipped" in outcomes:
        return "failed" if "failed" in outcomes else "skipped"
    return "skipped" if "subtest skipped" in outcomes and "subtest passed" not in outcomes else "passed"


def pytest_terminal_summary(terminalreporter) -> None:
    if SDIST_VARIABLE not in os.environ:
        return
    outcomes = defaultdict(set)  # test -> its own outcome, and those of its subtests
    skips = defaultdict(set)  # reason -> tests
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        outcome = getattr(report, "outcome", None)
        if outcome in ("failed", "skipped") or (outcome == "passed" and report.when == "call"):
            test, is_subtest = report.nodeid.rpartition("::")[2], hasattr(report, "context")
            outcomes[test].add(f"subtest {outcome}" if is_subtest and outcome != "failed" else outcome)
            if outcome == "skipped":
                skips[skip_reason(report)].add(f"{test}, {report.context.msg or 'a subtest'}" if is_subtest else test)

    totals = Counter(total_outcome(one) for one in outcomes.values())
    write = terminalreporter.write_line
    terminalreporter.section(f"common tests of {Path(os.environ[SDIST_VARIABLE]).name}")
    for outcome in ("passed", "failed", "skipped"):
        write(f"{outcome:8} {totals[outcome]:4}")
    for reason, tests in sorted(skips.items(), key=lambda item: (-len(item[1]), item[0])):
        write(f"\nskipped {len(tests)}: {reason}")
        for test in sorted(tests):
            write(f"    {test}")
