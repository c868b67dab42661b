"""The real command on all GPUs: torchrun, DeepSpeed, a stop after 3 of 6 steps, going on; its losses and a CPU's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from llava.checkpoints import open_checkpoint
from scripts.bench.common import Shape, build_pairs
from scripts.gpu_check.common import BASE, FAIL, OK, Finding, Settings, judged, limited

SECTION = "launch"
ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, STOP_AFTER = 6, 3
LIMITS = {"cuda": 3e-2, "cpu": 1e-3}  # of the difference of a step's loss, in bf16 and in fp32
PATIENCE_S = 300
LOGGED = "losses/total"


class Run:
    """A training on the small base in a folder of its own; on a CPU or, with ZeRO-2, where `settings` say."""

    def __init__(self, settings: Settings, name: str, is_reference: bool = False):
        self.settings, self.output = settings, settings.folder / name
        self.device, processes = ("cpu", 1) if is_reference else (settings.device, settings.processes)
        flags = {
            "model_name_or_path": BASE, "data_path": settings.folder / "pairs/train.json",
            "image_folder": settings.folder / "pairs", "output_dir": self.output, "max_steps": STEPS,
            "save_steps": STOP_AFTER - 1, "learning_rate": 1e-3, "lora_r": 4, "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2 * settings.processes // processes, "bf16": self.device == "cuda",
            "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        if not is_reference:
            flags["deepspeed"] = ROOT / "scripts/zero2.json"
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        self.command = [sys.executable, "-m", *launcher * (not is_reference), "train.llava_hound_dpo.run_dpo", *words]

    @property
    def log(self) -> Path:
        """What the newest job says."""
        return self.output.with_suffix(".log")

    def start(self, **environment: str) -> subprocess.Popen:
        """A job in the background."""
        own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        kept = {name: value for name, value in os.environ.items() if name not in ("STOP_FILE", "DS_ACCELERATOR")}
        if self.device == "cpu":
            own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with self.log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(self.command, env=kept | own, stdout=log, stderr=log)

    def losses(self) -> list[float]:
        """Of every step of a finished run."""
        state = json.loads((self.output / "trainer_state.json").read_text(encoding="utf-8"))
        return [log[LOGGED] for log in state["log_history"] if LOGGED in log]


def run(settings: Settings) -> Iterator[Finding]:
    """Start, stop, go on, compare; beside it the same on a CPU, in one go."""
    family = open_checkpoint(BASE).family
    build_pairs(settings.folder / "pairs", Shape(images=2, chosen=3, rejected=3, count=24), family)
    reference, own = Run(settings, "reference", is_reference=True), Run(settings, "run")
    beside = reference.start()
    try:
        for finding in (found for make in (stop, go_on, partial(finish, reference, beside)) for found in make(own)):
            yield finding
            if finding.verdict == FAIL:
                return
    finally:
        terminate(beside)


def stop(own: Run) -> Iterator[Finding]:
    """A job that is asked to end."""
    # The file that asks is of the checkpoint of step 2, so that it is first seen at the end of step 3.
    asked = own.output / f"checkpoint-{STOP_AFTER - 1}" / "README.md"
    yield end(own, own.start(STOP_FILE=str(asked)), f"{own.settings.processes} processes with ZeRO-2, stopped")
    done = sorted(int(folder.name.split("-")[1]) for folder in own.output.glob("checkpoint-*"))
    told = "a run that is asked to stop does not save its step and end: a job's last minutes would be lost"
    yield judged(SECTION, "checkpoints after the stop", str(done), done[-1:] == [STOP_AFTER], told)


def go_on(own: Run) -> Iterator[Finding]:
    """The same job again."""
    yield end(own, own.start(), "the same command again")
    is_right = f"checkpoint-{STOP_AFTER}" in own.log.read_text(encoding="utf-8")
    told = f"the second job began anew, and not after step {STOP_AFTER}"
    yield judged(SECTION, "goes on where it was stopped", "yes" if is_right else "no", is_right, told)


def finish(reference: Run, beside: subprocess.Popen, own: Run) -> Iterator[Finding]:
    """Its losses against those of one process on a CPU."""
    yield end(reference, beside, "the same on a CPU")
    found, expected = own.losses(), reference.losses()
    is_right = len(found) == len(expected) == STEPS
    yield judged(SECTION, "steps made", f"{len(found)} of {STEPS}", is_right, "some were lost or made twice")
    error = max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))
    told = "the processes do not train what one would: see correctness, and what NCCL_DEBUG=INFO says of the links"
    yield limited(SECTION, "losses from the CPU's", error, LIMITS[own.device], told)


def end(of: Run, job: subprocess.Popen, name: str) -> Finding:
    """How a job ends."""
    start = time.perf_counter()
    try:
        code = job.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        code = f"none after {PATIENCE_S} s"
    finally:
        terminate(job)
    if code == 0:
        return Finding(SECTION, name, time.perf_counter() - start, "s", OK)
    said = [line for line in of.log.read_text(encoding="utf-8").splitlines() if "rror" in line] or ["nothing"]
    return Finding(SECTION, name, f"exit code {code}", "", FAIL, f"its log says first: {said[0].strip()[:300]}")


def terminate(job: subprocess.Popen) -> None:
    """End a job, if it has not ended: torchrun ends its workers."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(30)
        except subprocess.TimeoutExpired:
            job.kill()
