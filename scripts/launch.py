"""One node's launcher in a job on several: torchrun, but it ends when another node fails, and says why in one line.

Started by scripts/cluster.sh on every node, with torchrun's own arguments. With torchrun alone the other nodes wait for
the failed one until a collective times out: half an hour by transformers' default.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llava.runtime import LOST_PEERS

POLL_S = 1.0  # between two looks at the other nodes
GRACE_S = 5.0  # for what follows a failure: its report to arrive, the workers to end
FAILED = "failed"


class Watch:
    """What the launchers of a job tell each other: the first failure, by way of a store on node 0.

    Raises OSError or torch's DistError if the store cannot be reached in time, ValueError if it is another job's.
    """

    def __init__(self, host: str, port: int, job: str, node: int, nodes: int, timeout_s: float):
        self.node, self.nodes, self.problem = node, nodes, ""
        if node:
            _wait_for(host, port, timeout_s)  # the store's own waiting ends in pages of stack frames
        self._store = TCPStore(host, port, nodes, node == 0, timedelta(seconds=timeout_s), wait_for_workers=False)
        if node == 0:
            self._store.set("job", job)
        elif self._store.get("job").decode() != job:
            raise ValueError(
                f"{host}:{port} belongs to another job: set MASTER_PORT to a free port, the same on all nodes"
            )

    def start(self) -> None:
        """Look at the others from now on; a failure ends this process's launcher with SIGTERM."""
        threading.Thread(target=self._look, daemon=True).start()

    def report(self, problem: str) -> str:
        """Tell the others; gives what went wrong first, here or there."""
        try:
            first = self._store.compare_set(FAILED, "", problem).decode()
            if self.node == 0:
                self._wait_for_readers()
            return first
        except DistError:
            return problem

    def first_failure(self, wait_s: float) -> str:
        """What another node reported, or comes to report within this time; "" if nothing."""
        end = time.monotonic() + wait_s
        while not self.problem and time.monotonic() < end:
            time.sleep(POLL_S / 5)
        return self.problem

    def _look(self) -> None:
        try:
            while not self._store.check([FAILED]):
                time.sleep(POLL_S)
            self.problem = self._store.get(FAILED).decode()
            self._store.add("readers", 1)
        except DistError:
            time.sleep(GRACE_S)  # node 0 may have finished a little earlier than this one
            self.problem = "the launcher of node 0 has ended"
        time.sleep(GRACE_S)  # the workers may find out themselves, and end in order
        os.kill(os.getpid(), signal.SIGTERM)

    def _wait_for_readers(self) -> None:
        end = time.monotonic() + GRACE_S
        while self._store.add("readers", 0) < self.nodes and time.monotonic() < end:
            time.sleep(POLL_S / 5)


def _wait_for(host: str, port: int, timeout_s: float) -> None:
    """Until something listens there. Raises OSError, the last reason why not."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(POLL_S / 5)


def main() -> None:
    """Run this node's processes. Exit code 1, after one line, if any process of any node failed."""
    args = parse_args(sys.argv[1:])
    nodes, node = int(args.nnodes), args.node_rank
    timeout_s = dict(pair.split("=") for pair in args.rdzv_conf.split(",") if pair).get("timeout", "900")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its report is replaced by a line
    place = f"node {node} of {nodes} ({socket.gethostname()})"
    try:
        job = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
        watch = Watch(args.master_addr, args.master_port + 1, job, node, nodes, float(timeout_s))
        watch.start()
        run(args)
        leave(0)
    except ValueError as error:
        ended(f"{place}: {error}")
    except (DistError, OSError) as error:
        reason = "the port is taken: set MASTER_PORT" if "EADDRINUSE" in str(error) else f"waited {timeout_s} s"
        where = f"{args.master_addr}:{args.master_port}"
        ended(f"{place}: the nodes did not meet at {where} ({reason}); the other nodes' output may say why")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        problem = f"rank {rank} on {place} ended with {how}; what it wrote before that says why"
        if failure.exitcode == LOST_PEERS:  # not the cause: another process ended first
            ended(watch.first_failure(GRACE_S) or watch.report(problem))
        ended(watch.report(problem))
    except SignalException as error:
        ended(watch.first_failure(0) or watch.report(f"{place} was stopped with {error.sigval.name}"))


def ended(problem: str) -> NoReturn:
    """Say why in one line, and end."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    leave(1)


def leave(code: int) -> NoReturn:
    """End without Python's own shutdown, which a thread that is inside the store's C++ code turns into an abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
