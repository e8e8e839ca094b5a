"""A plugin of pytest that records each test at once: `python -m pytest -p benchmarks.first_gpu_run.outcomes`.

Where torch sees no CUDA device, nothing is collected and pytest ends as a skipped step.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.first_gpu_run.records import REASON_CHARACTERS, SKIPPED, append, one_line, read


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    parser.addoption("--records", type=Path, help="file to append the outcomes to")
    parser.addoption("--step", help="name of the step in the records")
    parser.addoption("--unrecorded", action="store_true", help="only tests that no earlier step has started")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """End where there is no device."""
    if torch.cuda.is_available() or hasattr(config, "workerinput"):
        return None
    print("torch sees no CUDA device")
    return SKIPPED


def pytest_configure(config: pytest.Config) -> None:
    """Record in this process, or, where pytest-xdist shares the tests out, in the one that gets all reports."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(DeviceCheck())
    else:
        config.pluginmanager.register(Outcomes(config.getoption("records"), config.getoption("step")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --unrecorded, leave out the tests that have run, or hung, in an earlier step."""
    if config.getoption("unrecorded"):
        # Not this step's own rows: a process that replaces a crashed one must collect the same tests.
        step = config.getoption("step")
        known = {row.get("test") for row in read(config.getoption("records")) if row["step"] != step}
        items[:] = [item for item in items if item.nodeid not in known]


class Outcomes:
    """Appends a row when a test starts and one when it ends."""

    def __init__(self, path: Path, step: str) -> None:
        self._path, self._step = path, step

    def _append(self, test: str, outcome: str, **more: object) -> None:
        append(self._path, {"step": self._step, "test": test, "outcome": outcome, **more})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Record the start, which is all that is known of a test that hangs."""
        self._append(nodeid, "started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the call, and whatever failed or skipped it before or after."""
        if report.when == "call" or report.outcome != "passed":
            self._append(report.nodeid, report.outcome, seconds=round(report.duration, 3), reason=reason(report))


class DeviceCheck:
    """Ends a process of pytest-xdist, which then starts another, when a test has left the device in an error.

    An error in a kernel makes every later call of the process fail.
    """

    def __init__(self) -> None:
        self._failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Look at the device after a test that failed, once its report is on its way."""
        self._failed = self._failed or report.failed
        if report.when == "teardown" and self._failed:
            self._failed = False
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


def reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped or failed, in one line; nothing if it passed."""
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    # Where a process of pytest-xdist has ended, the text begins with that process and ends with the reason.
    return crash.message.strip().split("\n")[0][:REASON_CHARACTERS] if crash else one_line(report.longreprtext)
