"""How a check of a machine judges what it measures, on values that are made up."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

from scripts.gpu_check import common, environment, step
from scripts.gpu_check.common import FAIL, INFO, OK, Finding
from tests.test_gpu_check import CUDA, TINY, by_name


def test_limits_are_limits():
    assert [common.at_most(value, 1.0, 2.0) for value in (1.0, 1.5, 2.5, float("nan"))] == [OK, INFO, FAIL, FAIL]
    assert common.aimed(TINY, "step", "a", 9.0, 1.0, 2.0, "advice") == Finding(
        "step", "a", 9.0, "(aim: at most 1)", INFO, ""
    )
    assert common.aimed(CUDA, "step", "a", 1.5, 1.0, 2.0, "advice").advice == "advice"


def test_waits_are_counted_by_torchs_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for text in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "another"):
            warnings.warn(text, stacklevel=1)

    assert common.count_syncs(CUDA, run) == 2 and modes == ["warn", "default"]
    with pytest.raises(ZeroDivisionError):
        common.count_syncs(CUDA, lambda: 1 / 0)
    assert modes[-1] == "default"


class Timed:
    """A step that takes a second, and `planning` seconds more for a row of a new length; and the clock it moves."""

    def __init__(self, planning):
        self.planning, self.now, self.seen, self.trainer = planning, 0.0, set(), SimpleNamespace(data_collator=tuple)

    def __call__(self):
        self.now += 1 + self.planning * (self.batch not in self.seen)
        self.seen.add(self.batch)

    def gradients(self):
        return {"w": torch.ones(1)}


@pytest.mark.parametrize(("planning", "expected"), [(0.0, OK), (0.2, INFO), (0.5, FAIL)])
def test_plans_built_for_every_new_length_are_found(planning, expected, monkeypatch):
    own = Timed(planning)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: own.now))
    monkeypatch.setattr(common, "wait", lambda settings: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    bench = SimpleNamespace(
        settings=CUDA, step=own, pairs=lambda shape: [shape.chosen],
        load=lambda step, pairs: setattr(step, "batch", tuple(pairs)),
    )  # fmt: skip
    found = by_name(step.extras(bench))["20 different lengths / one repeated"]
    assert found.verdict == expected and found.value == pytest.approx(1 + planning * 19 / 20)  # one was seen before
    assert bool(found.advice) == (expected != OK)


def test_cards_of_two_kinds_and_without_bf16_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 0) if number else (7, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    kinds, bf16 = environment.capabilities()
    assert kinds.value == "7.0, 8.0" and "several kinds" in kinds.advice and bf16.verdict == FAIL


def test_on_a_gpu_only_the_gpus_kernels_are_named(monkeypatch):
    """The operators of the CPU side have names of all kinds."""
    kind = torch.autograd.DeviceType
    events = [("aten::_softmax", kind.CPU), ("fmha_cutlassF", kind.CUDA), ("cudaLaunchKernel", kind.CPU)]
    profile = SimpleNamespace(events=lambda: [SimpleNamespace(name=n, device_type=d) for n, d in events])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profile))
    monkeypatch.setattr(common, "wait", lambda settings: None)
    assert common.kernels_of(CUDA, lambda: None) == ["fmha_cutlassF"]
