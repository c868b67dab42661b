"""Commands in processes that need no imports: forks of one that has made them all, and has run no test.

`serve` makes that process when the tests are collected. A `Job` is what `subprocess.Popen` gives for the same command;
of torchrun, torch's own agent runs and starts its workers in this way, too. What imports alone do, and what is left out
of them, only a process of its own shows: every command has a test that starts one.
"""

import faulthandler
import gc
import inspect
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

NEEDED = (  # by a training and, of DeepSpeed, only on its way: what torch.compile imports
    "train.llava_hound_dpo.trainer", "train.llava_hound_dpo.outcome", "llava.heads", "torch.distributed.run",
    "deepspeed.runtime.zero.muon.original_muon", "transformers.models.llava.modeling_llava",
)  # fmt: skip
OWN = multiprocessing.get_context("forkserver")
OF_TORCHRUN = "torch.distributed.run"


def descriptor(file, otherwise):
    try:
        return file.fileno()
    except OSError:  # pytest's, where it captures only what Python writes
        return otherwise


# Files of pytest in the place of stdout and stderr: loggers of libraries that are imported now go on writing there.
STREAMS = {1: descriptor(sys.stdout, 1), 2: descriptor(sys.stderr, 2)}


def serve():
    """Make the server out of a fork of this process, where `multiprocessing` would start one and import anew."""
    resource_tracker.ensure_running()
    OWN.set_forkserver_preload([])
    with replaced(util, "spawnv_passfds", lambda path, args, fds: os.fork() or _serve(args[-1], fds)):
        forkserver.ensure_running()


def end():
    """End the server; its time is then in that of this process's children."""
    server = forkserver._forkserver._forkserver_pid
    if server:
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)
        forkserver._forkserver._forkserver_pid = None


@contextmanager
def replaced(of, name, value):
    plain = getattr(of, name)
    setattr(of, name, value)
    try:
        yield
    finally:
        setattr(of, name, plain)


def _serve(code, fds):
    """Never returns. Nothing that is open here stays so, or its readers would wait for the end; nor is its number free
    for another file, which whoever has kept it would write to."""
    faulthandler.disable()
    kept = {0, 1, 2, *STREAMS.values(), *fds}
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - kept:
        os.dup2(nothing, fd)
    for module in NEEDED:
        import_module(module)
    gc.freeze()  # a collection in a fork would write to, and so copy, all memory
    try:
        exec(code, {})
    finally:
        os._exit(1)


class Job:
    """A command in the background. `stdout` and `stderr` are paths, appended to, or None: where this process's go."""

    def __init__(self, command, cwd=None, env=None, stdout=None, stderr=None, new_session=False, context=OWN):
        self.args = command
        module, *words = command[command.index("-m") + 1 :] if command[0] != "torchrun" else [OF_TORCHRUN, *command[1:]]
        given = (module, list(map(str, words)), cwd or Path.cwd(), dict(env or os.environ), stdout, stderr)
        self.process = context.Process(target=_become, args=(*given, new_session))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.process.terminate()

    def kill(self):
        self.process.kill()


def run(command, timeout=240, **how):
    """(exit code, stdout, stderr) of a command."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        job = Job(command, stdout=files[0], stderr=files[1], **how)
        return job.wait(timeout), *(file.read_text(encoding="utf-8") for file in files)


def _become(module, words, cwd, env, stdout, stderr, new_session):
    """`python -m module words`, in this process."""
    if new_session:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, stdout), (2, stderr)):
        if path:
            _redirect({number, STREAMS[number]}, path)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in STREAMS)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    logging.getLogger().handlers.clear()  # pytest's
    sys.argv = [module, *words]
    if module == OF_TORCHRUN:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = _worker
        inspect.stack = partial(inspect.stack, 0)  # which the agent asks for names: source lines would take seconds
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)  # it is to be there
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _redirect(numbers, path):
    """All these descriptors."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in numbers:
        os.dup2(file, number)
    os.close(file)


def _worker(args, env, stdout, stderr, start_new_session):
    return Job(list(args), env=env, new_session=start_new_session, context=multiprocessing.get_context("fork"))
