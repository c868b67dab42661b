"""Whether torch, the driver and the settings of this shell fit the machine."""

import os
import shutil
from collections.abc import Iterator

import torch
from transformers import AutoConfig

from llava import attention, machine
from llava.families import find_family
from llava.machine import GIB
from scripts.gpu_check.common import BASE, INFO, OK, Finding, Settings, judged

SECTION = "environment"


def run(settings: Settings) -> Iterator[Finding]:
    """All that needs no model of size."""
    found = machine.look()
    problem = machine.problem(found) or ""
    yield Finding(SECTION, "machine", machine.describe(torch.device(settings.device)))
    built = f"CUDA {found.torch_cuda or 'none'} on driver {found.driver or 'none'}"
    yield judged(SECTION, "torch's CUDA and the driver", built, not problem, problem)
    yield gpus(found)
    if settings.on_gpu:
        yield from capabilities()
    yield from variables(settings)
    free = (machine.shared_memory() or 0) / GIB
    told = "start the container with --shm-size=8g, or train with --dataloader_num_workers 0"
    yield judged(SECTION, "free in /dev/shm", free, free >= 1, told, "GiB (at least 1)")
    told = "" if shutil.which("g++") else "only ZERO=3_offload needs it, which compiles its optimiser"
    yield Finding(SECTION, "g++", "not there" if told else "there", "", INFO if told else OK, told)
    yield cudnn(settings)


def gpus(found: machine.Machine) -> Finding:
    """Those of the driver against those of torch; fewer are fine where a variable asks for fewer."""
    is_right = found.visible == found.listed or found.hidden or "CUDA_VISIBLE_DEVICES" in os.environ
    told = "torch does not see them all: compare nvidia-smi -L and CUDA_VISIBLE_DEVICES"
    return judged(SECTION, "GPUs listed, and seen by torch", f"{found.listed}, {found.visible}", is_right, told)


def capabilities() -> Iterator[Finding]:
    """Of every GPU; a mixed node runs at the pace of its slowest."""
    kinds = {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
    shown = ", ".join(f"{major}.{minor}" for major, minor in sorted(kinds))
    told = "GPUs of several kinds: the slowest sets the pace" * (len(kinds) > 1)
    yield Finding(SECTION, "compute capability", shown, "", INFO, told)
    has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    told = "training takes float16 in its place; nothing below is meant for such a card"
    yield judged(SECTION, "bfloat16", "there" if has_it else "not there", has_it, told)


def variables(settings: Settings) -> Iterator[Finding]:
    """Environment variables that decide the device, or how memory is handed out."""
    chosen = os.environ.get("DS_ACCELERATOR", "")
    told = f"DeepSpeed would take the {chosen}: unset DS_ACCELERATOR"
    yield judged(SECTION, "DS_ACCELERATOR", chosen or "not set", chosen in ("", settings.device), told)
    given = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    is_set = "expandable_segments:True" in given
    told = "" if is_set else "rows of many lengths break memory up: PYTORCH_ALLOC_CONF=expandable_segments:True"
    yield Finding(SECTION, "allocator", given or "not set", "", OK if is_set else INFO, told)


def cudnn(settings: Settings) -> Finding:
    """cuDNN's attention is off once ours is installed in a model."""
    config = AutoConfig.from_pretrained(BASE)
    with torch.device("meta"):
        attention.install(find_family(config).model_class(config)(config))
    is_off = not torch.backends.cuda.cudnn_sdp_enabled()
    told = "on H100 it plans anew for every row length: torch.backends.cuda.enable_cudnn_sdp(False)"
    return judged(SECTION, "cuDNN's attention", "off" if is_off else "on", is_off or not settings.on_gpu, told)
