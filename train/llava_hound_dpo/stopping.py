"""How a run ends early: on request after the step in progress, or because a process failed, with one line each."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker

from llava.records import DataError
from llava.runtime import USER_ERROR, is_main_process
from train.llava_hound_dpo.checkpoints import CheckpointError, DiskError

logger = logging.getLogger(__name__)

STOPPED = 75  # exit code of a run that was asked to stop and goes on when started again ("temporary failure")
STOP_FILE = "STOP_FILE"  # environment variable of the launch script: a file that is there once a stop is wanted
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 130  # exit code after a second Ctrl-C, as the shell has it
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
READING_S = 5  # seconds for the rest of a step's pictures after a SIGTERM


class StopOnRequest(TrainerCallback):
    """After a signal to any process (Ctrl-C is one), or once `$STOP_FILE` is there, the step in progress is the last.

    All processes agree at the end of every step, save a checkpoint and leave the training. `stopped` says so. A second
    Ctrl-C ends a process at once.
    """

    def __init__(self):
        self.stopped = False
        self._is_asked = False
        self._previous = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_step_end(self, args, state, control, **kwargs):
        is_last = state.global_step >= state.max_steps
        if self._agree(args.device) and not is_last:
            self.stopped = control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = False  # whoever asked will not wait for it

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:  # the Trainer ends the epoch here, but it is not over
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if not self.stopped:
            return
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the launcher ends the others when the first one exits
        if (path := os.environ.get(STOP_FILE)) and state.is_local_process_zero:
            Path(path).write_text("stopped early", encoding="utf-8")
        logger.info(
            "stopped early, as asked, after step %d of %d: start the same command again to go on (exit code %d)",
            state.global_step, state.max_steps, STOPPED,
        )  # fmt: skip

    @property
    def exit_code(self) -> int:
        """Of this process: 0 also if stopped where the launch script reads that from its file.

        torchrun would make a failure with a long report of another code.
        """
        return STOPPED if self.stopped and not os.environ.get(STOP_FILE) else 0

    def _ask(self, number, frame) -> None:
        if number == signal.SIGINT:
            if self._is_asked:
                raise KeyboardInterrupt
            logger.info("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        self._is_asked = True

    def _agree(self, device: torch.device) -> bool:
        path = os.environ.get(STOP_FILE)
        flag = torch.tensor(int(self._is_asked or bool(path and Path(path).exists())), device=device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


def start_loader(worker: int, num_workers: int, rank: int) -> None:
    """Of a process that reads pictures: its seed, and what it does when the whole job gets a signal.

    The step in progress needs its pictures; the Trainer has them all before its first pass. So the process lives on for
    a while, and then exits in a way that does not end its parent (which also ends it with SIGTERM, and waits for it).
    """
    seed_worker(worker, num_workers=num_workers, rank=rank)
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(READING_S))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line where training fails by bad data, for want of memory or disk, or by Ctrl-C.

    An error of ours keeps its traceback, and so does what the end of another process causes: the launch script has the
    last line. No destructors run: they may wait for the other processes.
    """
    try:
        yield
    except DataError as error:
        _end(f"error: {_message(error)}", USER_ERROR)
    except CheckpointError as error:  # all processes find it
        _end(f"error: {error}" if is_main_process() else "", USER_ERROR)
    except OSError as error:
        if not isinstance(error, DiskError) and error.errno not in FULL:
            raise
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("interrupted: the same command goes on from the newest checkpoint" * is_main_process(), INTERRUPTED)
    except (FloatingPointError, torch.cuda.OutOfMemoryError) as error:
        _end(f"error: {str(error).splitlines()[0]}", 1)


def _message(error: DataError) -> str:
    """Its message; torch makes the error of a process that reads pictures anew, of its whole traceback as one text."""
    if isinstance(error.problems, str):
        return error.problems.strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")
    return str(error)


def _end(message: str, code: int) -> NoReturn:
    if message:
        print(f"\n{message}", file=sys.stderr, flush=True)  # noqa: T201  below the progress bar's line
    if not torch.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)
