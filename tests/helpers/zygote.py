"""Real processes that run commands: imported once, then forked, killed as a whole or one by one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

# Imports once, then forks: every order is a group of processes as `accelerate launch` would start them.
ZYGOTE = """
import json, os, sys, time, warnings
import torch
torch.set_num_threads(1)
import filelock, tqdm.auto
from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from transformers import PreTrainedTokenizerFast, T5EncoderModel
from skipguide.cli import clip_job, main
import skipguide.pipelines, skipguide.media.pictures
warnings.simplefilter("ignore")
from pathlib import Path
quick = clip_job.make_clip
def slow(*args, **kwargs):  # so that a kill comes in the middle, however busy the machine is
    made = lambda: sum(path.suffix in (".gif", ".webp") for path in Path("clips").rglob("[!.]*"))
    while made() >= int(Path("allowed").read_text()):
        time.sleep(0.002)
    return quick(*args, **kwargs)
for line in sys.stdin:
    argv, world = json.loads(line)
    clip_job.make_clip = slow if world > 1 else quick
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            if world > 1:
                where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                os.environ.update({name: str(value) for name, value in where.items()})
            status = 1
            try:
                status = main(argv)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                os._exit(status)
        try:
            os.setpgid(pid, pids[0] if pids else 0)
        except (ProcessLookupError, PermissionError):
            pass
        pids.append(pid)
    print(json.dumps(pids), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


class Zygote:
    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.folder = folder

    def start(self, argv, world):
        self.process.stdin.write(json.dumps([argv, world]) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())
        return self.pids

    def wait(self):
        alarm = threading.Timer(180, os.killpg, (self.pids[0], signal.SIGKILL))  # a process that hangs fails the test
        alarm.start()
        try:
            return json.loads(self.process.stdout.readline())
        finally:
            alarm.cancel()

    def allow(self, count):
        """How many clips processes that share the work may make: written at once, as they read it at any moment."""
        partial = self.folder / "allowed.partial"
        partial.write_text(str(count))
        partial.replace(self.folder / "allowed")

    def log(self):
        return (self.folder / "log.txt").read_text()


def wait_for(folder, pattern, count):
    deadline = time.monotonic() + 600
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)
