"""Processes of Python that need not import torch, transformers and the package, since one that has forks them.

To import all that takes longer than what tests start two processes of a training for. What torchrun and `accelerate
launch` start is in `test_cache.py` and `test_accelerate_launch.py`.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest
import torch


IMPORTED = ("forked", "distillation_toys")  # and what these import


def forking():
    """The context of such processes; the one that forks them starts once in a session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    paths = [str(Path(__file__).parent), str(Path(sys.modules["hf_encdec_distill"].__file__).parents[1])]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(paths))
        patched.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def start_rank(rank, script, folder, port, **environment):
    """One of the two processes of `script folder`, which meet at this port; what it says is in `folder`-`rank`.txt."""
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words, said = [str(script), str(folder)], f"{folder}-{rank}.txt"
    process = forking().Process(target=_be, args=(words, said, environment))
    process.start()
    return process


def _be(words, said, environment):
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def on_two_processes(script, folder):
    """Run `script folder` on two processes of one thread each, which meet here, as those of torchrun do there."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    both = [start_rank(rank, script, folder, store.port, TORCHELASTIC_USE_AGENT_STORE="True") for rank in (0, 1)]
    while running := [process.sentinel for process in both if process.exitcode is None]:
        connection.wait(running)
        if any(process.exitcode for process in both):  # for which the other one would wait
            for process in both:
                process.kill()
    said = [Path(f"{folder}-{rank}.txt").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in both] == [0, 0], "\n".join(text[-4000:] for text in said)
