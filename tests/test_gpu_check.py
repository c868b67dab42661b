"""The check of a machine's GPUs, tried on a CPU: all of it runs, and what is wrong on purpose is found."""

import dataclasses
import io
import json
import sys
from contextlib import redirect_stdout
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava import attention, machine
from scripts import selftest
from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check import correctness, environment, kernels, launch, step
from scripts.gpu_check.common import FAIL, INFO, OK, SKIPPED, Finding, Settings
from tests import forks
from tests.conftest import shared
from tests.test_launch import ROOT

TINY = Settings("cpu", "tiny")
CUDA = Settings("cuda", "7b")  # to judge as on a GPU; nothing is run with it


def by_name(findings):
    return {finding.name: finding for finding in findings}


def failed(findings):
    return [finding.name for finding in findings if finding.verdict == FAIL]


# ---- all of it


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The one run of the command with every section, its trainings in forks: (what it says, file it wrote)."""

    def make(folder):
        words = ["--device", "cpu", "--size", "tiny", "--processes", "1", "--output", str(folder / "gpu_check.json")]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
            patch.setattr(launch, "subprocess", SimpleNamespace(Popen=job, TimeoutExpired=TimeoutExpired))
            code = call(words)
        (folder / "said").write_text(said.getvalue())
        assert code == 0, said.getvalue()

    folder = shared(tmp_path_factory, "gpu-check", make)
    return (folder / "said").read_text(), folder / "gpu_check.json"


def job(command, env, stdout, stderr):
    """What the check starts. (That the command itself starts: tests/test_installed.py.)"""
    return forks.Job(command, cwd=ROOT, env=env, stdout=stdout.name, stderr=stderr.name)


def test_every_section_runs_and_nothing_fails_here(whole):
    said, file = whole
    report = json.loads(file.read_text())
    findings = [Finding(**one) for one in report["findings"]]
    assert list(dict.fromkeys(one.section for one in findings)) == list(gpu_check.SECTIONS)
    skipped = {one.name.split(": ")[-1] for one in findings if one.verdict == SKIPPED}
    assert skipped == {"share of the peak", "waits of the CPU in a step"}  # only these need a GPU to be said at all
    assert report["machine"].startswith("CPU") and {"torch", "peft"} <= report["versions"].keys()
    found = by_name(findings)
    assert found["checkpoints after the stop"].value == "[2, 3]" and found["steps made"].value == "6 of 6"
    assert found["losses from the CPU's"].value < 1e-3
    assert 0 < found["bf16: loss of a step, from a CPU's"].value < 2e-2
    assert all(f"| {one.name} | {one.shown}" in said for one in findings if "|" not in one.shown)
    assert "To change: nothing" in said and f"0 of {len(findings)} checks failed" in said


def test_two_files_stand_beside_each_other(whole, tmp_path, capsys):
    report = json.loads(whole[1].read_text())
    other = report | {"commit": "f" * 40, "machine": "another"}
    del other["findings"][0]
    timed = next(one for one in other["findings"] if one["unit"] == "ms")
    timed["value"] *= 2
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert call(["--compare", str(whole[1]), str(tmp_path / "other.json")]) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if f"| {timed['name']} |" in line]
    assert line.endswith("| 2 |") and "second: another, tiny, commit ffffffffff" in said
    (line,) = [line for line in said.splitlines() if "| machine |" in line]
    assert line.endswith("| - | - |")


# ---- the command


def call(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_check", *words])
        return gpu_check.main()


@pytest.fixture
def stubbed(monkeypatch, tmp_path):
    """The command with two sections of a finding each: what they find is to be set."""
    found = {"environment": [Finding("environment", "a", 1.0, "s", OK)], "kernels": [Finding("kernels", "b", 2.0)]}
    for name in found:
        monkeypatch.setitem(gpu_check.SECTIONS, name, lambda settings, name=name: iter(found[name]))

    def run(*more):
        file = tmp_path / "report.json"
        code = call(["--device", "cpu", "--size", "tiny", "--sections", *found, "--output", str(file), *more])
        return code, json.loads(file.read_text())["findings"]

    run.found = found
    return run


def test_a_check_that_fails_ends_the_command_with_1(stubbed, capsys):
    stubbed.found["environment"].append(Finding("environment", "c", float("nan"), "", FAIL, "turn it on"))
    code, written = stubbed()
    assert code == 1 and [one["verdict"] for one in written] == [OK, FAIL, INFO] and written[1]["value"] == "nan"
    said = capsys.readouterr().out
    assert "To change:\n  environment, c: nan. turn it on\n1 of 3 checks failed" in said


def test_an_error_in_a_section_is_a_failure_and_the_rest_goes_on(stubbed):
    def broken():
        yield Finding("environment", "a", 1.0)
        raise KeyError("no such thing")

    stubbed.found["environment"] = broken()
    code, written = stubbed()
    assert code == 1 and [one["name"] for one in written] == ["a", "goes on to its end", "b"]
    assert written[1]["value"] == "KeyError: 'no such thing'"


@pytest.mark.parametrize(("section", "verdict"), [("step", SKIPPED), ("correctness", FAIL)])
def test_a_model_that_does_not_fit_is_skipped_but_a_small_one_has_to(section, verdict, monkeypatch):
    def full(settings):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setitem(gpu_check.SECTIONS, section, full)
    assert [one.verdict for one in gpu_check.run(section, TINY)] == [verdict]


def test_this_machine_beside_the_one_of_a_file(stubbed, tmp_path, capsys):
    stubbed()
    (tmp_path / "report.json").rename(tmp_path / "first.json")
    stubbed.found["environment"] = [Finding("environment", "a", 3.0, "s", OK)]
    assert stubbed("--compare", str(tmp_path / "first.json"))[0] == 0
    assert "| environment | a | 1 s ok | 3 s ok | 3 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--compare", "no_such_file.json"], "no_such_file.json: no such file"),
        (["--compare", str(ROOT / "scripts/zero2.json")], "this is no report of scripts.gpu_check"),
        (["--compare", str(ROOT / "README.md")], "broken JSON"),
        (["--compare", "a", "b", "c"], "one file or two, not 3"),
        (["--device", "cpu"], "--size tiny"),
        (["--sections", "nonsense"], "invalid choice"),
        ([], "no GPU to check: 4 GPUs here, and an old driver; "),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_line(words, text, monkeypatch, capsys):
    monkeypatch.setattr(machine, "problem", lambda found: "4 GPUs here, and an old driver")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        call(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and text in error and error.count("\n") == 1


# ---- what is wrong on purpose


def test_a_driver_too_old_and_a_variable_that_hides_the_gpu_are_found(monkeypatch):
    monkeypatch.setattr(machine, "problem", lambda found: "its driver is too old")
    monkeypatch.setattr(machine, "look", lambda: machine.Machine("470.1", 4, 0, False, "13.0"))
    monkeypatch.setattr(machine, "describe", lambda device: "4 GPUs")
    monkeypatch.setattr(environment, "capabilities", lambda: iter(()))
    monkeypatch.setattr(machine.psutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 2**20))
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = by_name(environment.run(CUDA))
    assert failed(found.values()) == [
        "torch's CUDA and the driver", "GPUs listed, and seen by torch", "DS_ACCELERATOR", "free in /dev/shm",
        "cuDNN's attention",
    ]  # fmt: skip
    assert found["torch's CUDA and the driver"].advice == "its driver is too old"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as Slurm does where a job asked for one of the four
    assert environment.gpus(machine.Machine("470.1", 4, 1, False, "13.0")).verdict == OK


def test_a_packed_pair_whose_answers_see_each_other_is_found(monkeypatch):
    monkeypatch.setattr(
        attention, "tree_attention", lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    assert failed(kernels.check(TINY, kernels.packed_pair(TINY))) == [
        f"packed pair: error of {what}" for what in ("output", "dQ", "dK", "dV")
    ]  # fmt: skip


def test_a_call_without_a_fast_kernel_is_found(monkeypatch):
    plainly = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plainly:
        found = by_name(kernels.check(TINY, kernels.vision_tower(TINY)))
    kind = found.pop("vision tower: kernels")
    assert kind.verdict == FAIL and "math" in kind.value and kind.advice.startswith("no fast kernel")
    assert not failed(found.values())


def test_kernels_are_told_apart_by_their_names():
    """Names of a profile on an A100 and an H100, shortened."""
    names = {
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>(Flash_fwd_params)": "flash",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)": "memory-efficient",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128": "cuDNN",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float>": "math",
    }
    assert {name: kernels.classify([name, "elementwise_kernel"]) for name in names} == {
        name: {kind} for name, kind in names.items()
    }


def test_a_term_of_the_wrong_sign_is_found(monkeypatch):
    right = selftest.share
    monkeypatch.setattr(
        selftest, "share", lambda scores: 1 - right(scores) if scores.masses.requires_grad else right(scores)
    )
    monkeypatch.setattr(correctness, "steps", lambda settings: iter(()))
    monkeypatch.setattr(correctness, "answers", lambda settings: iter(()))
    what = "a step along the attention term raises the target's share"
    assert failed(correctness.run(TINY)) == [f"fp32: {what}", f"bf16: {what}"]


def test_a_device_that_computes_something_else_is_found(monkeypatch):
    """Of each quantity what is twice its limit from the CPU's."""
    measured = {
        ("cpu", torch.float32): (1.0, {"w": torch.ones(4)}, 0.5),
        ("cuda", torch.float32): (1.0002, {"w": torch.ones(4)}, 0.5),
        ("cuda", torch.bfloat16): (1.0, {"w": torch.full((4,), 1.1)}, 0.5),
    }  # fmt: skip
    monkeypatch.setattr(correctness, "measured", lambda device, dtype, folder: measured[device, dtype])
    assert failed(correctness.steps(CUDA)) == [
        "fp32: loss of a step, from a CPU's", "bf16: gradients of a step, from a CPU's"
    ]  # fmt: skip
    answers = {
        ("cpu", torch.float32): ([[1, 2], [3, 4]], 0.5), ("cuda", torch.float32): ([[1, 2], [3, 5]], 0.5),
        ("cuda", torch.bfloat16): ([[1, 2], [3, 5]], 0.6),
    }  # fmt: skip
    monkeypatch.setattr(correctness, "said", lambda settings, device, dtype: answers[device, dtype])
    assert failed(correctness.answers(CUDA)) == [
        "fp32: greedy answers as on a CPU", "bf16: ratio of answers, from a CPU's"
    ]  # fmt: skip


class Job:
    """A launched job that has ended already."""

    def __init__(self, code):
        self.code = code

    def wait(self, patience):
        return self.code

    def poll(self):
        return self.code


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The section of the launch with jobs that only leave behind what `launched` is told."""
    monkeypatch.setattr(launch, "build_pairs", lambda *_: None)
    outcome = {"codes": [0, 0, 0], "says": f"continuing from run/checkpoint-{launch.STOP_AFTER}",
               "losses": [0.7, 0.6, 0.5, 0.4, 0.3, 0.2], "checkpoints": (2, 3)}  # fmt: skip

    def start(self, **variables):
        for number in outcome["checkpoints"]:
            (self.output / f"checkpoint-{number}").mkdir(parents=True, exist_ok=True)
        self.output.mkdir(exist_ok=True)
        self.log.write_text(f"Traceback\nValueError: bad\n{outcome['says']}")
        losses = [0.7, 0.6, 0.5, 0.4, 0.3, 0.2] if "reference" in self.output.name else outcome["losses"]
        history = [{launch.LOGGED: loss} for loss in losses] + [{"train_runtime": 1.0}]
        (self.output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return Job(outcome["codes"].pop(0))

    monkeypatch.setattr(launch.Run, "start", start)

    def run(**changes):
        outcome.update(changes)
        return failed(launch.run(dataclasses.replace(TINY, folder=tmp_path)))

    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"says": "step 1/6"}, ["goes on where it was stopped"]),
        ({"checkpoints": (2,)}, ["checkpoints after the stop"]),
        ({"checkpoints": (2, 4, 6)}, ["checkpoints after the stop"]),
        ({"codes": [0, 0, 1]}, ["the same command again"]),
        ({"codes": [0, 1]}, ["1 processes with ZeRO-2, stopped"]),
        ({"losses": [0.7, 0.6, 0.5, 0.4, 0.3]}, ["steps made"]),
        ({"losses": [0.7, 0.6, 0.5, 0.4, 0.302, 0.2]}, ["losses from the CPU's"]),
    ],
    ids=str,
)
def test_a_launch_that_does_not_do_what_it_should_is_found(launched, changes, expected):
    assert launched(**changes) == expected


def test_a_row_that_does_not_fit_is_skipped_and_the_next_is_measured(monkeypatch):
    def measure(bench, name, shape, is_checkpointed):
        yield Finding("step", name, 1.0)
        if not is_checkpointed:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore")

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step, "rows", lambda bench: {"a": None, "b": None})
    monkeypatch.setattr(step, "extras", lambda bench: iter(()))
    monkeypatch.setattr(step, "Bench", lambda settings: SimpleNamespace(policy=torch.nn.Linear(1, 1), checkpoint=print))
    found = list(step.run(TINY))
    assert [(one.name, one.verdict) for one in found if one.value is None] == [
        ("a, no checkpointing", SKIPPED), ("b, no checkpointing", SKIPPED)
    ]  # fmt: skip
    assert len(found) == 6 and "does not fit: CUDA out of memory. Tried to allocate 9 GiB. (" in found[2].advice


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12), ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_data_sheets(device, peak):
    assert step.peak_of(device) == peak


def test_speed_is_judged_by_the_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    verdicts = {share: list(step.speed(CUDA, "a row", share * 312e12))[1] for share in (0.55, 0.45, 0.2)}
    assert [one.verdict for one in verdicts.values()] == [OK, INFO, FAIL]
    assert [round(one.value) for one in verdicts.values()] == [55, 45, 20] and verdicts[0.45].advice
