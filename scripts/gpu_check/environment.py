"""Whether torch, the driver and the settings of this shell fit the machine."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from llava import attention, machine
from scripts.bench.common import build_llava
from scripts.gpu_check.common import FAIL, GIB, INFO, OK, Finding, Settings, exactly

SECTION = "environment"


def run(settings: Settings) -> Iterator[Finding]:
    """All that needs no model of size."""
    found = machine.look()
    problem = machine.problem(found) or ""
    yield Finding(SECTION, "machine", machine.describe(torch.device(settings.device)))
    built = f"CUDA {found.torch_cuda or 'none'} on driver {found.driver or 'none'}"
    yield Finding(SECTION, "torch's CUDA and the driver", built, "", exactly(not problem), problem)
    yield gpus(found)
    if settings.on_gpu:
        yield from capabilities()
    yield from variables(settings)
    yield shared_memory()
    compiler = shutil.which("g++")
    advice = "" if compiler else "only ZERO=3_offload needs it, which compiles its optimiser: load the module of gcc"
    yield Finding(SECTION, "g++", "there" if compiler else "not there", "", OK if compiler else INFO, advice)
    yield cudnn(settings)


def gpus(found: machine.Machine) -> Finding:
    """Those of the driver against those of torch; fewer are fine where a variable asks for fewer."""
    is_right = found.visible == found.listed or found.hidden or "CUDA_VISIBLE_DEVICES" in os.environ
    advice = "" if is_right else "torch does not see them all: compare nvidia-smi -L and CUDA_VISIBLE_DEVICES"
    return Finding(SECTION, "GPUs listed, and seen by torch", f"{found.listed}, {found.visible}", "", exactly(is_right),
                   advice)  # fmt: skip


def capabilities() -> Iterator[Finding]:
    """Of every GPU; a mixed node runs at the pace of its slowest."""
    kinds = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    shown = ", ".join(f"{major}.{minor}" for major, minor in sorted(kinds))
    advice = "GPUs of several kinds: the slowest sets the pace" * (len(kinds) > 1)
    yield Finding(SECTION, "compute capability", shown, "", INFO, advice)
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    advice = "" if has_it else "training takes float16 in its place; nothing below is meant for such a card"
    yield Finding(SECTION, "bfloat16", "there" if has_it else "not there", "", exactly(has_it), advice)


def variables(settings: Settings) -> Iterator[Finding]:
    """Environment variables that decide the device, or how memory is handed out."""
    chosen = os.environ.get("DS_ACCELERATOR", "")
    is_wrong = bool(chosen) and chosen != settings.device
    advice = f"DeepSpeed would take the {chosen}: unset DS_ACCELERATOR" * is_wrong
    yield Finding(SECTION, "DS_ACCELERATOR", chosen or "not set", "", exactly(not is_wrong), advice)
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    is_set = "expandable_segments:True" in given
    advice = "" if is_set else "rows of many lengths break memory up: PYTORCH_ALLOC_CONF=expandable_segments:True"
    yield Finding(SECTION, "allocator", given or "not set", "", OK if is_set else INFO, advice)


def shared_memory() -> Finding:
    """Through it the workers hand on their batches."""
    free = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else 0.0
    advice = "start the container with --shm-size=8g, or train with --dataloader_num_workers 0" * (free < 1)
    return Finding(SECTION, "free in /dev/shm", free, "GiB (at least 1)", exactly(free >= 1), advice)


def cudnn(settings: Settings) -> Finding:
    """cuDNN's attention is off once ours is installed in a model."""
    family = build_llava("tiny")
    with torch.device("meta"):
        attention.install(family.model_class(family.config)(family.config))
    is_off = not torch.backends.cuda.cudnn_sdp_enabled()
    advice = "on H100 it plans anew for every row length: torch.backends.cuda.enable_cudnn_sdp(False)" * (not is_off)
    verdict = OK if is_off else FAIL if settings.on_gpu else INFO
    return Finding(SECTION, "cuDNN's attention", "off" if is_off else "on", "", verdict, advice)
