"""What this machine has, whether torch can use it, and the line about it that a run begins with.

A torch whose CUDA the driver is too old for sees no GPU, and all would run on the CPU without a word: `require_usable`
stops before that. The launch scripts ask `python -m llava.machine`.
"""

import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

ROOT = Path("/")  # of the files that the driver and the system show
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last is Slurm's
# CUDA of a build, the oldest driver that it runs on (one for all builds of a major version), and how to get such a
# build: PyPI has CUDA 12.8 up to torch 2.10 and 13.0 from 2.11 on, the index of CUDA 11.8 ends with torch 2.7.
BUILDS = (
    (13, (580, 65, 6), "pip install 'torch>=2.11,<=2.13.0'"),
    (12, (525, 60, 13), "pip install 'torch>=2.9,<2.11'"),
    (11, (450, 80, 2), "pip install 'torch>=2.6,<2.8' --index-url https://download.pytorch.org/whl/cu118"),
)
KERNELS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cudnn"}  # as torch numbers its SDPBackend
GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """GPUs, as the driver lists them and as torch sees them."""

    driver: str | None  # NVIDIA's, as "570.86.15"; None: none answers
    listed: int  # GPUs that this job was given; one in MIG mode is one
    visible: int  # GPUs that torch can use; of MIG parts CUDA gives a process one
    hidden: bool  # CUDA_VISIBLE_DEVICES names none
    torch_cuda: str | None  # that torch is built for, as "12.8"; None: a build for the CPU


def look() -> Machine:
    """This machine's GPUs. Raises nothing."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in HIDDEN
    return Machine(*(_asked_smi() or _read_files()), _visible(), hidden, torch.version.cuda)


def _visible() -> int:
    """GPUs that torch can use. Before `init` it counts what the driver lists: more under MIG, or with an old driver."""
    with warnings.catch_warnings(), suppress(RuntimeError):  # torch's, on a driver that is too old
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            torch.cuda.init()
            return torch.cuda.device_count()
    return 0


def _asked_smi() -> tuple[str | None, int] | None:
    """(driver, GPUs) by nvidia-smi, which lists what the job was given; None where it does not answer."""
    said = _smi("--query-gpu=driver_version", "--format=csv,noheader")
    found = re.findall(r"^\s*(\d+(?:\.\d+)+)\s*$", said, re.M)
    if found or "No devices" in said:  # the latter on a GPU node, in a job that asked for none
        return (*found, None)[0], len(found)
    listed = re.findall(r"^GPU \d+:", _smi("-L"), re.M)
    return (_driver_file(), len(listed)) if listed else None


def _smi(*words: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    said = done.stdout + done.stderr
    return said if done.returncode == 0 or "No devices" in said else ""


def _read_files() -> tuple[str | None, int]:
    """(driver, GPUs) by device files; without any the list that even a container without GPUs shows, and no driver."""
    files = [file for file in ROOT.glob("dev/nvidia[0-9]*") if os.access(file, os.R_OK)]
    return _driver_file() if files else None, len(files) or len(list(ROOT.glob("proc/driver/nvidia/gpus/*")))


def _driver_file() -> str | None:
    version = ROOT / "proc/driver/nvidia/version"
    found = re.search(r"\d{3,}(\.\d+)+", version.read_text()) if version.is_file() else None
    return found and found[0]


def problem(machine: Machine) -> str | None:
    """Why torch uses none of the GPUs that are here, and what to do, in a line; None if all is well."""
    if machine.visible or machine.hidden or not machine.listed:
        return None
    return (
        f"{machine.listed} GPU{'s'[: machine.listed - 1]} here, but torch {torch.__version__} sees none: "
        f'{_reason(machine)}; to run on the CPU set CUDA_VISIBLE_DEVICES=""'
    )


def _reason(machine: Machine) -> str:
    if machine.torch_cuda is None and not machine.driver:
        return "it is built for the CPU: install one for CUDA (docs/training.md, Installing on clusters)"
    if machine.driver is None:
        return "no driver answers: start a container with --gpus all (docker) or --nv (apptainer), else see nvidia-smi"
    driver = tuple(map(int, machine.driver.split(".")))
    cure = next((how for _, oldest, how in BUILDS if driver >= oldest), "have the driver updated")
    if machine.torch_cuda is None:
        cure = cure.replace("install", "install --force-reinstall")  # else pip is content with this one
        return f"it is built for the CPU. For driver {machine.driver}: {cure}"
    oldest = {major: oldest for major, oldest, _ in BUILDS}.get(int(machine.torch_cuda.split(".")[0]), (0,))
    if driver < oldest:
        wanted = ".".join(f"{part:02}" for part in oldest)
        return f"its CUDA {machine.torch_cuda} needs driver {wanted}, here is {machine.driver}: {cure}"
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return f"CUDA_VISIBLE_DEVICES={chosen} names none of them: unset it"
    return 'python -c "import torch; torch.cuda.init()" says why (a GPU in MIG mode that has no part, for one)'


def require_usable(use_cpu: bool) -> None:
    """Raises ValueError where GPUs are here that this process cannot use, unless the CPU was asked for."""
    seen = 0 if use_cpu else _visible()
    if not use_cpu and not seen and (line := problem(look())):
        raise ValueError(line)
    if 0 < seen < (processes := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        raise ValueError(f"{processes} processes on a node where torch sees {seen} GPUs: set NPROC={seen}")


def own_device() -> torch.device:
    """This process's GPU, from now on torch's current one (else all have a context on the first), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def announce(device: torch.device, workers: int, flag: str) -> None:
    """Log `describe`, and a warning if shared memory is too small for `workers` processes; `flag` says how many."""
    if not logger.isEnabledFor(logging.INFO):  # the first process speaks for all
        return
    logger.info("%s", describe(device))
    if workers and (free := shared_memory()) is not None and free < GIB:
        logger.warning(
            "/dev/shm has %.2f GiB free, which the batches of %d workers pass through: start a container with "
            "--shm-size=8g, or set %s 0", free / GIB, workers, flag,
        )  # fmt: skip


def shared_memory() -> int | None:
    """Bytes free in /dev/shm; None where there is no such place."""
    place = ROOT / "dev/shm"
    return psutil.disk_usage(str(place)).free if place.is_dir() else None


def describe(device: torch.device | None = None) -> str:
    """GPUs, driver, torch, kernels of attention and free memory, or what there is of it on a CPU, in a line."""
    device, machine, name = device or own_device(), look(), f"torch {torch.__version__}"
    if device.type == "cpu":
        free, total, hidden = psutil.virtual_memory().available, host_memory(), machine.listed or machine.visible
        unused = f" ({hidden} GPU{'s'[: hidden - 1]} not used)" if hidden else ""
        parts = [f"CPU{unused}", name, f"{torch.get_num_threads()} threads"]
    else:
        free, total = torch.cuda.mem_get_info(device)
        parts = [f"{machine.visible} x {torch.cuda.get_device_name(device)}", f"driver {machine.driver}"]
        parts += [f"{name} with CUDA {machine.torch_cuda}", f"attention by {attention_kernels(device)}"]
    return ", ".join([*parts, f"{min(free, total) / GIB:.1f} of {total / GIB:.1f} GiB free"])


def attention_kernels(device: torch.device) -> str:
    """What torch chooses for a row's causal head and for its masked tail, at the head size of 7B."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    row = torch.zeros(1, 8, 256, 128, dtype=torch.bfloat16 if has_bf16 else torch.half, device=device)
    row.requires_grad_()
    mask = torch.ones(64, 256, dtype=torch.bool, device=device)
    head = torch._fused_sdp_choice(row, row, row, is_causal=True)
    tail = torch._fused_sdp_choice(row[:, :, -64:], row, row, attn_mask=mask)
    return f"{KERNELS.get(head, head)} (causal) and {KERNELS.get(tail, tail)} (masked)"


def host_memory() -> int:
    """Bytes of main memory that this job may use on this node: all there is, or what Slurm or a container gives."""
    names = ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")  # MiB, MiB, number; none or 0: all
    node, cpu, cpus = (int(os.environ.get(name, "0")) for name in names)
    files = [ROOT / "sys/fs/cgroup" / name for name in ("memory.max", "memory/memory.limit_in_bytes")]
    groups = [int(text) for file in files if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(filter(None, [psutil.virtual_memory().total, node * 1024**2, cpu * cpus * 1024**2, *groups]))


def main() -> int:
    """Print how many GPUs torch can use, and which variable its allocator reads; 2 and a line if there is a problem."""
    machine = look()
    if line := problem(machine):
        sys.stderr.write(f"error: {line}\n")
        return 2
    is_new = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # 2.9 passes over the name that it asks for
    sys.stdout.write(f"{machine.visible} PYTORCH_{'' if is_new else 'CUDA_'}ALLOC_CONF\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
