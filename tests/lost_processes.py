"""A test whose process dies, of native code or because it hung, is run once more in another process, and counted.

It fails if it dies again. xdist would put all files of a dead process back into the queue, those too that are done,
and then wait for tests that are in none (xdist 3.8, `LoadScopeScheduling.remove_node` and `_reschedule`).
"""

import contextlib
import subprocess

import pytest
from xdist.scheduler import LoadFileScheduling


class Files(LoadFileScheduling):
    """A file to each process."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lost = set()
        self.end = None  # of the process that died last: an exit code, or minus a signal, if it is known

    def _reschedule(self, node):
        """As upstream, but until it has three tests or is told to end: with one it would wait for the next.

        And nothing for one that is still collecting: upstream would take a file from the queue, fail to name its tests
        and say nothing of it (`KeyError`, xdist 3.8, `DSession.worker_errordown`).
        """
        if node not in self.registered_collections:
            return
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) <= 2:
            super()._reschedule(node)

    def remove_node(self, node):
        """As upstream, but it puts back what is to do, and nothing that was lost before."""
        files = self.assigned_work.pop(node)
        self.end = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe is closed, but it lives on: no exit code yet
            self.end = node.gateway._io.popen.wait(timeout=5)
        to_do = [(tests, test) for tests in files.values() for test, is_done in tests.items() if not is_done]
        if not to_do:
            return None
        tests, dead = to_do[0]
        tests[dead] = dead in self.lost
        self.workqueue.update({file: tests for file, tests in files.items() if not all(tests.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return dead


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    report.longrepr = f"{report.longrepr} (exit code {sched.end})"
    if crashitem not in sched.lost:
        sched.lost.add(crashitem)
        report.outcome = "lost"


def pytest_report_teststatus(report):
    return ("lost", "L", "LOST") if report.outcome == "lost" else None


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("lost", []):
        terminalreporter.write_line(f"LOST {report.nodeid}: {report.longrepr}; it was run once more")
