"""`killed_capture.py CACHE TOKENIZER POINTS`: client and server of a capture, killed at so many points in turn.

Prints in how many the client had a shard when it was killed, and was at work when its server was. After each, what the
client goes on to record has to be what a local teacher records.
"""

import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from distillation_toys import make_teacher, ragged_rows
from teacher_server import TeacherServer
from transformers import AutoTokenizer

from hf_encdec_distill.distillation import CachedTeacher, LiveTeacher, ServedTeacher, capture
from hf_encdec_distill.distillation.teachers import http_client


torch.set_num_threads(1)
ServedTeacher.rows_per_comparison = 4
http_client._LONGEST_WAIT = 0.05
folder, tokenizer, points = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2]), int(sys.argv[3])
model, rows = make_teacher(), ragged_rows(48)
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]


def process(run):
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def serve():
    with TeacherServer(model, tokenizer, port=port, delay=0.01):
        threading.Event().wait()


def ask():
    teacher = ServedTeacher(f"http://127.0.0.1:{port}", tokenizer, k=8, requests=2)
    capture(teacher, rows, folder, tokenizer, batch_size=2, rows_per_shard=4, progress=False)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def end_of(pid):
    assert os.waitpid(pid, 0)[1] == 0


def content():
    cache = CachedTeacher(folder)
    return {row["key"]: (row["ids"].tolist(), row["log_probs"], row["tail"]) for row in cache.records}


capture(LiveTeacher(model), rows, folder, tokenizer, k=8, progress=False)
expected = content()
shutil.rmtree(folder)
server = process(serve)
begin = time.monotonic()
end_of(process(ask))
whole = time.monotonic() - begin
gone_on = restarted = 0
for point in range(points):
    for victim in ("client", "server"):
        shutil.rmtree(folder, ignore_errors=True)
        client = process(ask)
        time.sleep(whole * (point + 0.5) / points)
        at_work = os.waitpid(client, os.WNOHANG) == (0, 0)
        if victim == "client":
            if at_work:
                kill(client)
            gone_on += at_work and bool(list(folder.glob("shard-*")))
            client = process(ask)
        else:
            kill(server)
            time.sleep(0.1)
            server = process(serve)
            restarted += at_work
            if not at_work:
                client = process(ask)
        end_of(client)
        found = content()
        assert found.keys() == expected.keys(), (victim, point, len(found))
        for key, (ids, *numbers) in expected.items():
            assert found[key][0] == ids, (victim, point)
            for ours, theirs in zip(numbers, found[key][1:]):
                np.testing.assert_allclose(ours, theirs, atol=1e-4)
kill(server)
print(gone_on, restarted)
