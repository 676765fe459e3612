"""A contender in a process of its own, asked over pipes: a request and its reply are a line of JSON each.

So thread pools of several runtimes do not wait for each other's cores, each has the threads that it is told and no
more, and peak memory is that of one contender.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..export.backends import child_environment
from ..files import one_line
from .contenders import Contender, contender_of


class Failed(Exception):
    """A contender could not do what it was asked; the message is why."""


class Worker:
    """The process of a contender, seen from the bench. Use it in a `with` block, which ends the process.

    Args:
        contender: who; None for a process that measures the machine.
        threads: that it may compute with. How those of OpenMP wait is left to it, and it lets them spin for some
            milliseconds: llama.cpp's meet after each operation, and where they sleep in between a step takes four
            times as long.
    """

    def __init__(self, contender: Contender | None, threads: int):
        self.threads = threads
        environment = {**child_environment(), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("OMP_WAIT_POLICY", None)
        command = [sys.executable, "-m", __name__, json.dumps(contender and contender.to_dict())]
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # what its libraries say, until `__exit__`
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # an interrupt ends the bench, which ends its workers
        )

    def ask(self, what: str, **arguments: Any) -> Any:
        """
        Args:
            what: a method of `_Served`.

        Raises:
            Failed: it raised an exception, or died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # of a process that is dead, which the reply will tell
            self._process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = self._said.read().decode("utf-8", "replace").strip().splitlines()
            code = self._process.wait()
            end = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise Failed(f"its process ended with {end}; its last words: {said[-1] if said else 'none'}")
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply["result"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_exception) -> None:
        if self._process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it has started
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]  # pipes are there, since we asked for them


class _Served:
    """What a worker can be asked."""

    def __init__(self, contender: Contender | None):
        self.contender = contender

    def rates(self, threads: int, device: str) -> dict[str, float]:
        from .floors import measure_rates

        return measure_rates(threads, device)

    def prepare(self, folder: str) -> None:
        assert self.contender is not None
        self.contender.prepare(Path(folder))

    def load(self, folder: str, threads: int) -> None:
        assert self.contender is not None
        self.contender.import_packages()
        self.before = memory()["now"]
        self.contender.load(Path(folder), threads)

    def answer(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        assert self.contender is not None
        wall, used = time.perf_counter(), time.process_time()
        tokens, times = self.contender.answer(prompts, new_tokens)
        return {
            "tokens": tokens,
            "times": times,
            # Cores that were busy on average: what the pinned threads come to.
            "cores": (time.process_time() - used) / (time.perf_counter() - wall),
            "peak_mb": memory()["peak"] / 1e6,
            "memory_mb": (memory()["peak"] - self.before) / 1e6,
        }


def memory() -> dict[str, float]:
    """Bytes of this process in memory: `now`, and at the `peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:  # unlike getrusage's, not of the process that this one was forked from
            return {"now": 1024 * int(lines["VmRSS"].split()[0]), "peak": 1024 * int(lines["VmHWM"].split()[0])}
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"now": peak, "peak": peak}


def main(contender: Mapping[str, str] | None) -> None:
    """Serve until the other side closes the pipe."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    served = _Served(None if contender is None else contender_of(contender))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(served, request.pop("what"))(**request)}
        except Exception as error:  # whatever a runtime raises is why it has no row
            traceback.print_exc()
            reply = {"failed": one_line(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
