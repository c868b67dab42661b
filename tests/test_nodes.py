"""Jobs on several nodes, for real on one machine: every "node" is a launcher with Slurm's variables of its own."""

import os
import subprocess
import time

import psutil
import pytest

from tests.conftest import kill_with_workers
from tests.test_architecture import TRAIN_SCRIPT, launch  # noqa: F401  a fixture
from tests.test_launch import PATH, ROOT, data_set, environment, history  # noqa: F401  a fixture

BOUND_S = 300  # a job that goes on for longer after a failure hangs; long enough for a machine with other work
SMALL = (
    "--bf16 False --num_train_epochs 1 --lora_r 4 --lora_alpha 8 --learning_rate 1e-3 --per_device_train_batch_size 2 "
)
SMALL += "--gradient_accumulation_steps 2 --dataloader_num_workers 0 --save_strategy no --disable_tqdm True"


def slurm(node, job, **changes):
    """Slurm's variables on a node of two, one launcher each."""
    return {
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": str(node), "SLURM_PROCID": str(node),
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]", "SLURM_JOB_ID": str(job), **changes,
    }  # fmt: skip


class Launcher:
    """A launcher in the background; its output goes to files, where it can be read while it runs."""

    def __init__(self, folder, command, **changes):
        folder.mkdir()
        self.out, self.err = folder / "out", folder / "err"
        changes = {"PATH": PATH, "NPROC": "1", **changes}
        self.job = subprocess.Popen(
            command, stdout=self.out.open("w"), stderr=self.err.open("w"), cwd=ROOT, env=environment(**changes)
        )

    def worker(self, rank):
        """The training process of a rank below this launcher, once it has begun."""
        for process in psutil.Process(self.job.pid).children(recursive=True):
            if process.environ().get("RANK") == str(rank):
                return process
        return None

    def wait(self):
        """(exit code, lines of stderr)."""
        return self.job.wait(BOUND_S), [line for line in self.err.read_text().splitlines() if line.strip()]


@pytest.fixture
def jobs(data_set, checkpoint, tmp_path):  # noqa: F811
    """(folder, {name: [(exit code, lines of stderr) of node 0, of node 1]}) of two jobs at once on the same "nodes":
    the second worker of `killed` is killed after the first step."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    endless = ["--num_train_epochs", "99"]

    def start(name, node):
        # Jobs of another process of the tests must not meet these: the port follows from the job's number.
        more, job = (endless, 2 * os.getpid()) if name == "killed" else ([], 2 * os.getpid() + 1)
        return script(folder / f"{name}{node}", data_set, checkpoint, folder / name, *more, **slurm(node, job))

    started = {name: [start(name, node) for node in range(2)] for name in ("whole", "killed")}
    try:
        first, second = started["killed"]
        deadline = time.monotonic() + BOUND_S
        while "step 1/" not in first.out.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        second.worker(1).kill()
        yield folder, {name: [launcher.wait() for launcher in pair] for name, pair in started.items()}
    finally:
        for launcher in (*started["whole"], *started["killed"]):
            if launcher.job.poll() is None:
                kill_with_workers(launcher.job)


def script(folder, data, checkpoint, output, *more, **changes):
    """The launch script of training, for one epoch of three steps."""
    return Launcher(
        folder, ["bash", str(TRAIN_SCRIPT), *SMALL.split(), *more], MODEL=checkpoint, DATA=str(data / "train.json"),
        IMAGES=str(data / "images.zip"), OUTPUT=str(output), REPORT_TO="none", **changes,
    )  # fmt: skip


def test_two_nodes_train_as_one_and_a_killed_worker_ends_both(jobs, data_set, checkpoint, tmp_path):  # noqa: F811
    folder, ended = jobs
    for code, errors in ended["killed"]:
        assert code not in (0, 75)
        assert errors[-1].startswith(f"the training ended with exit code {code}; its own message is above")
    assert [code for code, _ in ended["whole"]] == [0, 0], ended["whole"]
    code, errors = script(tmp_path / "one", data_set, checkpoint, tmp_path / "out", NPROC="2").wait()
    assert code == 0, errors
    ours, theirs = history(folder / "whole"), history(tmp_path / "out")
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("losses/total", "losses/dpo", "losses/attention", "attention/ratio", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], abs=1e-6), name


def test_ports_are_the_same_on_all_nodes_of_a_job_and_another_for_every_job_and_step(launch):  # noqa: F811
    def port(node, job, **changes):
        given = launch(**slurm(node, job, **changes), NPROC="2")[2][-1].flags
        assert given["nproc_per_node"] == "2" and given["rdzv_conf"] == "timeout=900"
        return int(given["master_port"])

    assert port(0, 4200) == port(1, 4200)
    found = [port(0, 4200), port(0, 4201), port(0, 4200, SLURM_STEP_ID="1"), port(0, 19_999)]
    assert len(set(found)) == 4 and all(10_000 <= one < 32_768 and one % 2 == 0 for one in found)
    assert port(0, 4200, MASTER_PORT="6000") == 6000


def test_the_launcher_takes_the_seconds_to_wait_from_the_environment(launch):  # noqa: F811
    call = launch(**slurm(0, 1), NODE_TIMEOUT="60")[2][-1]
    assert call.program == "torchrun" and call.words[:2] == ["--nproc_per_node=1", "--nnodes=2"]
    assert call.flags["rdzv_conf"] == "timeout=60" and call.modules == str(ROOT)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-03,07],x1", "node01"),
        ("node[7-8]", "node7"),
        ("x1,node[1-2]", "x1"),
        ("a,b", "a"),
        ("rack[2-3]n[05,07].site", "rack2n05.site"),
    ],
)
def test_the_first_node_is_read_off_the_list_without_asking_slurm(launch, nodes, first):  # noqa: F811
    assert launch(**slurm(0, 1, SLURM_JOB_NODELIST=nodes))[2][-1].flags["master_addr"] == first


def test_a_given_address_wins(launch):  # noqa: F811
    assert launch(**slurm(0, 1, MASTER_ADDR="10.0.0.1"))[2][-1].flags["master_addr"] == "10.0.0.1"
