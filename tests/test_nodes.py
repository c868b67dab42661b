"""Jobs on several nodes, for real on one machine: every "node" is a launcher with Slurm's variables of its own."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from scripts.launch import Watch
from tests.conftest import kill_with_workers
from tests.test_architecture import TRAIN_SCRIPT, launch  # noqa: F401  a fixture
from tests.test_launch import PATH, ROOT, data_set, environment, flags, history  # noqa: F401  a fixture

HOST = "127.0.0.1"
BOUND_S = 300  # a job that goes on for longer after a failure hangs; long enough for a machine with other work
SMALL = (
    "--bf16 False --num_train_epochs 1 --lora_r 4 --lora_alpha 8 --learning_rate 1e-3 --per_device_train_batch_size 2 "
)
SMALL += "--gradient_accumulation_steps 2 --dataloader_num_workers 0 --save_strategy no --disable_tqdm True"


def slurm(node, job, **changes):
    """Slurm's variables on a node of two, one launcher each."""
    return {
        "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": str(node), "SLURM_PROCID": str(node),
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(job), **changes,
    }  # fmt: skip


class Launcher:
    """A launcher in the background; its output goes to files, where it can be read while it runs."""

    def __init__(self, folder, command, **changes):
        folder.mkdir()
        (folder / "scontrol").write_text(f"#!/bin/bash\nprintf '{HOST}\\n{HOST}\\n'\n")
        (folder / "scontrol").chmod(0o755)
        self.out, self.err = folder / "out", folder / "err"
        changes = {"PATH": f"{folder}{os.pathsep}{PATH}", "NPROC": "1", **changes}
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


@pytest.fixture(scope="module")
def jobs(data_set, checkpoint, tmp_path_factory):  # noqa: F811
    """(folder, {name: [(exit code, lines of stderr) of node 0, of node 1]}) of two jobs at once on the same "nodes":
    `whole` by the launch script, `killed` without its checks; its second worker is killed after the first step."""
    folder = tmp_path_factory.mktemp("jobs")
    run = [*flags(data_set, checkpoint, folder / "killed"), "--num_train_epochs", "99", "--save_strategy", "no"]

    def start(name, node):
        if name == "whole":
            return script(folder / f"whole{node}", data_set, checkpoint, folder / "whole", **slurm(node, 4200))
        words = f"--nproc_per_node=1 --nnodes=2 --node_rank={node} --master_addr={HOST} --master_port=29006"
        command = [sys.executable, "-m", "scripts.launch", *words.split(), "-m", "train.llava_hound_dpo.run_dpo", *run]
        return Launcher(folder / f"killed{node}", command)

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


def script(folder, data, checkpoint, output, **changes):
    """The launch script of training, for one epoch of three steps."""
    return Launcher(
        folder, ["bash", str(TRAIN_SCRIPT), *SMALL.split()], MODEL=checkpoint, DATA=str(data / "train.json"),
        IMAGES=str(data / "images.zip"), OUTPUT=str(output), REPORT_TO="none", **changes,
    )  # fmt: skip


def test_two_nodes_train_as_one_of_two_processes(jobs, data_set, checkpoint, tmp_path):  # noqa: F811
    folder, ended = jobs
    assert [code for code, _ in ended["whole"]] == [0, 0], ended["whole"]
    code, errors = script(tmp_path / "one", data_set, checkpoint, tmp_path / "out", NPROC="2").wait()
    assert code == 0, errors
    ours, theirs = history(folder / "whole"), history(tmp_path / "out")
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("losses/total", "losses/dpo", "losses/attention", "attention/ratio", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], abs=1e-6), name


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_fails_ends_the_other_with_one_line_that_names_it(jobs, node):
    code, errors = jobs[1]["killed"][node]
    assert code == 1
    assert errors[-1].startswith("error: rank 1 on node 1 of 2") and "SIGKILL" in errors[-1]
    assert not any("Traceback" in line for line in errors)


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_never_comes_is_waited_for_so_long_and_no_longer(node):
    words = f"--nproc_per_node=1 --nnodes=2 --master_addr={HOST} --master_port=29008 --rdzv_conf=timeout=2"
    command = [sys.executable, "-m", "scripts.launch", *words.split(), f"--node_rank={node}", "-m", "timeit"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: node {node} of 2") and f"did not meet at {HOST}:29008 (waited 2 s)" in line


def test_the_first_failure_is_the_one_that_all_report(monkeypatch):
    monkeypatch.setattr("scripts.launch.GRACE_S", 0.1)  # nobody reads it here
    first, second = (Watch(HOST, 29011, "7.0", node, 2, 20) for node in range(2))
    assert second.report("rank 1 ended") == "rank 1 ended"
    assert first.report("rank 0 lost it") == "rank 1 ended"


def test_the_port_of_another_job_is_refused():
    first = Watch(HOST, 29013, "7.0", 0, 2, 20)
    with pytest.raises(ValueError, match="belongs to another job: set MASTER_PORT"):
        Watch(HOST, 29013, "8.0", 1, 2, 20)
    assert first.first_failure(0) == ""


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
    assert call.words[:3] == ["-m", "scripts.launch", "--nproc_per_node=1"]
    assert call.flags["rdzv_conf"] == "timeout=60" and call.modules == str(ROOT)
