"""Real jobs under torchrun and DeepSpeed that are killed or asked to stop, and go on with as many processes or others.

`tests.recording` notes which pairs were trained at which step. A run has two epochs of four steps of five or six of
23 pairs; it is killed or stopped in a random step, by a seed.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import forks
from tests.conftest import kill_with_workers, shared
from tests.test_launch import ROOT, SCRIPT, data_set, environment, flags, history, run, torchrun  # noqa: F401  a fixture
from train.llava_hound_dpo.batches import epoch_steps
from train.llava_hound_dpo.checkpoints import COMPLETE
from train.llava_hound_dpo.stopping import STOPPED

NUM_PAIRS, PAIRS_PER_STEP, STEPS_PER_EPOCH, STEPS = 23, 6, 4, 8


class Job:
    """One experiment in its folder, in attempts. A row has one pair; in steps of five, one row only fills."""

    def __init__(self, folder, data_set, checkpoint, stage=2):  # noqa: F811
        self.folder, self.output, self.record = folder, folder / "out", folder / "record.jsonl"
        folder.mkdir(exist_ok=True)
        records = json.loads((data_set / "train.json").read_text())[:NUM_PAIRS]
        (folder / "train.json").write_text(json.dumps(records))
        self.words = [*flags(data_set, checkpoint, self.output), "--data_path", str(folder / "train.json"),
                      "--deepspeed", f"scripts/zero{stage}.json"]  # fmt: skip
        self.attempts = 0

    def start(self, processes, *words):
        self.attempts += 1
        size = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(PAIRS_PER_STEP // processes)]
        command = torchrun(processes, *self.words, *size, *words)
        command[command.index("train.llava_hound_dpo.run_dpo")] = "tests.recording"
        recorded = {"RECORD": str(self.record), "ATTEMPT": str(self.attempts)}
        self.log = self.folder / f"log-{self.attempts}"
        return forks.Job(
            command, cwd=ROOT, env=environment(**recorded), new_session=True, stdout=self.log, stderr=self.log
        )  # fmt: skip

    def lines(self, attempt=None):
        text = self.record.read_text().splitlines() if self.record.is_file() else []
        read = [json.loads(line) for line in text if line.endswith("}")]
        return [line for line in read if attempt in (None, line["attempt"])]

    def wait_for_step(self, job, step):
        """Until the current attempt is in a step, counted from 0."""
        deadline = time.monotonic() + 240
        while not any(line["step"] >= step for line in self.lines(self.attempts)):
            assert job.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def finish(self, processes, *words, weights="adapter_model.safetensors"):
        code = self.start(processes, *words).wait(timeout=240)
        assert code == 0, self.log.read_text()[-3000:]
        return load_file(self.output / weights)

    def checkpoints(self):
        return sorted(int(path.parent.name.split("-")[1]) for path in self.output.glob(f"checkpoint-*/{COMPLETE}"))

    def trained(self):
        """Pairs of every step as the last attempt that made it trained them; attempts follow on each other."""
        steps = {}
        for line in self.lines():
            attempt, pairs = steps.get(line["step"], (0, []))
            assert line["attempt"] >= attempt
            steps[line["step"]] = (line["attempt"], (pairs if line["attempt"] == attempt else []) + line["pairs"])
        assert sorted(steps) == list(range(STEPS))
        return [sorted(pairs) for _, pairs in (steps[step] for step in range(STEPS))]


def planned():
    return [sorted(step) for epoch in range(2) for step in epoch_steps(NUM_PAIRS, PAIRS_PER_STEP, 42, epoch)]


def workers(job):
    return psutil.Process(job.pid).children()  # as torchrun has started them


@pytest.fixture(scope="module")
def whole(data_set, checkpoint, tmp_path_factory):  # noqa: F811
    """The experiment on two processes with ZeRO-2, never interrupted: its job and weights."""
    folder = shared(tmp_path_factory, "going-on", lambda folder: Job(folder, data_set, checkpoint).finish(2))
    job = Job(folder, data_set, checkpoint)
    return job, load_file(job.output / "adapter_model.safetensors")


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


def test_every_step_has_the_planned_pairs_and_an_epoch_every_pair_once(whole):
    steps = whole[0].trained()
    assert steps == planned()
    for epoch in (steps[:STEPS_PER_EPOCH], steps[STEPS_PER_EPOCH:]):
        assert sorted(pair for pairs in epoch for pair in pairs) == list(range(NUM_PAIRS))


def test_a_signal_to_one_process_stops_all_and_one_process_goes_on(whole, data_set, checkpoint, tmp_path):  # noqa: F811
    """SIGTERM to the second of two processes; then one process, in rows of tokens, to the same weights."""
    job, step = Job(tmp_path, data_set, checkpoint), random.Random(1).randint(1, 5)
    running = job.start(2)
    job.wait_for_step(running, step)
    workers(running)[1].send_signal(signal.SIGTERM)
    assert running.wait(timeout=240) != 0
    said = job.log.read_text()
    assert said.count("stopped early, as asked, after step") == 1 and f"exitcode  : {STOPPED}" in said
    done = job.checkpoints()[-1]
    assert step < done < STEPS and not (job.output / "adapter_model.safetensors").exists()
    found = job.finish(1, "--tokens_per_batch", "1000")
    assert min(line["step"] for line in job.lines(attempt=2)) == done
    assert job.trained() == planned()
    assert_close(found, whole[1])
    ours, theirs = (history(j.output) for j in (job, whole[0]))
    assert [log["learning_rate"] for log in ours] == [log["learning_rate"] for log in theirs]
    assert [log["losses/total"] for log in ours] == pytest.approx([log["losses/total"] for log in theirs], abs=1e-4)


def test_killed_in_a_random_step_it_goes_on_with_the_same_weights(whole, data_set, checkpoint, tmp_path):  # noqa: F811
    """kill -9 to all; as many processes go on from the newest complete checkpoint, to the bit."""
    job, step = Job(tmp_path, data_set, checkpoint), random.Random(2).randint(2, 6)
    running = job.start(2)
    job.wait_for_step(running, step)
    kill_with_workers(running)
    done = job.checkpoints()[-1]
    assert 0 < done < STEPS
    found = job.finish(2)
    assert min(line["step"] for line in job.lines(attempt=2)) == done
    assert job.trained() == planned()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole[1].items())


@pytest.mark.slow
def test_full_fine_tuning_goes_on_also_where_a_process_is_slow(data_set, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    """Weight decay makes two groups of parameters; the reference log-probs are shared out although one comes late."""
    words = ["--lora_enable", "False", "--learning_rate", "1e-4", "--weight_decay", "0.1"]
    expected = Job(tmp_path / "whole", data_set, checkpoint).finish(1, *words, weights="model.safetensors")
    monkeypatch.setenv("SLOW_RANK", "0")
    job = Job(tmp_path / "parts", data_set, checkpoint)
    running = job.start(2, *words)
    job.wait_for_step(running, 2)
    workers(running)[0].send_signal(signal.SIGUSR1)
    running.wait(timeout=240)
    found = job.finish(1, *words, weights="model.safetensors")
    assert 2 < min(line["step"] for line in job.lines(attempt=2)) < STEPS
    assert job.trained() == planned()
    assert_close(found, expected)


def test_the_state_of_three_processes_is_read_by_two_to_the_bit(tmp_path):
    """fp32 copies and moments, whole, where no process's part has the size of another's; the next step is the same."""
    for what, processes in (("save", 3), ("load", 2)):
        command = ["torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", "tests.engine_state"]
        code, _, errors = run([*command, what, str(tmp_path)])
        assert code == 0, errors[-3000:]
        assert sorted(path.parent.name for path in tmp_path.glob(f"*/{what}.done")) == [
            "zero2_bf16", "zero3_bf16", "zero3_fp32"
        ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_stopped_and_killed_again_and_again_with_1_to_3_processes(
    whole, data_set, checkpoint, tmp_path, stage, seed  # noqa: F811
):  # fmt: skip
    """Any order of processes, signals and kills trains every pair once an epoch, to the weights of a whole run."""
    rng, job = random.Random(seed), Job(tmp_path, data_set, checkpoint, stage)
    for step in range(1, STEPS):
        if rng.random() < 0.3:
            continue
        running = job.start(rng.choice([1, 2, 3]))
        job.wait_for_step(running, step)
        if rng.random() < 0.5:
            kill_with_workers(running)
        else:
            rng.choice(workers(running)).send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            running.wait(timeout=240)
        if (job.output / "adapter_model.safetensors").exists():
            break
    found = job.finish(rng.choice([1, 2, 3]))
    assert job.trained() == planned()
    assert_close(found, whole[1])


class TestScript:
    """SIGUSR1 to the launch script, as Slurm sends it before the time is up."""

    def start(self, data_set, checkpoint, folder, **changes):  # noqa: F811
        words = ["--bf16", "False", "--lora_r", "4", "--lora_alpha", "8", "--gradient_accumulation_steps", "2",
                 "--dataloader_num_workers", "1"]  # fmt: skip
        knobs = {"MODEL": checkpoint, "DATA": str(data_set / "train.json"), "IMAGES": str(data_set / "images.zip"),
                 "OUTPUT": str(folder / "out"), "NPROC": "1", "REPORT_TO": "none"}  # fmt: skip
        return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=ROOT, env=environment(**knobs, **changes),
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def test_it_saves_and_queues_the_job_again(self, data_set, checkpoint, tmp_path):  # noqa: F811
        (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/called\n')
        (tmp_path / "scontrol").chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{environment()['PATH']}"
        job = self.start(data_set, checkpoint, tmp_path, PATH=path, SLURM_JOB_ID="123")
        for line in job.stdout:
            if line.startswith("step 1/"):
                break
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=240)[0]
        assert job.returncode == STOPPED and "stopped early, as asked" in said and "Traceback" not in said
        assert (tmp_path / "called").read_text() == "requeue 123\n"
        (marker,) = (tmp_path / "out").glob(f"checkpoint-*/{COMPLETE}")
        assert not (tmp_path / "out/adapter_model.safetensors").exists()
        state = json.loads((Path(marker).parent / "trainer_state.json").read_text())
        assert 1 <= state["global_step"] < state["max_steps"]
