"""What the sections share: findings, sizes, and the few things that a CPU does in another way than a GPU."""

import math
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llava.machine import GIB
from scripts.bench.common import release

OK, FAIL, INFO, SKIPPED = "ok", "FAIL", "info", "skipped"
BASE = str(Path(__file__).resolve().parent.parent / "miniature/base")  # small weights that were trained


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` says in words what to change, or why there is no value."""

    section: str
    name: str
    value: float | str | None
    unit: str = ""
    verdict: str = INFO
    advice: str = ""

    @property
    def shown(self) -> str:
        """Value and unit."""
        if self.value is None:
            return "-"
        return f"{self.value:.4g} {self.unit}".rstrip() if isinstance(self.value, float | int) else self.value


@dataclass(frozen=True)
class Size:
    """What is measured of LLaVA-1.5 7B, or of the miniature."""

    images: tuple[int, ...]  # of the pair of a row, in turn
    answers: tuple[int, int]  # tokens of the chosen and of the rejected answer
    row_tokens: int  # of the row of several pairs, at most
    lengths: int  # different rows in a row
    repeats: int
    prompt: int  # tokens of the prompt of the kernels' row
    heads: int
    prompts: int  # that are answered in a batch
    prompt_images: int
    new_tokens: int


SIZES = {
    "7b": Size((1, 3, 5), (75, 75), 8192, 20, 3, 2939, 32, 8, 5, 33),
    "tiny": Size((2,), (9, 7), 500, 2, 1, 200, 2, 2, 2, 5),
}


@dataclass(frozen=True)
class Settings:
    """Where and how large."""

    device: str = "cuda"
    size: str = "7b"
    processes: int = 1  # of the launch
    folder: Path = field(default_factory=Path)  # for pictures and runs

    @property
    def on_gpu(self) -> bool:
        """Whether times and kernels are judged, and not only taken."""
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights in production."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def sizes(self) -> Size:
        """See `Size`."""
        return SIZES[self.size]


def at_most(value: float, aim: float, limit: float, is_judged: bool = True) -> str:
    """ok up to the aim, FAIL above the limit or if it is no number; between them it is told, and no more."""
    if not is_judged:
        return INFO
    return FAIL if not value <= limit else OK if value <= aim else INFO


def aimed(settings: Settings, section: str, name: str, value: float, aim: float, limit: float, advice: str) -> Finding:
    """`at_most` on a GPU, with advice from the aim on; on a CPU the value alone."""
    verdict = at_most(value, aim, limit, settings.on_gpu)
    is_missed = settings.on_gpu and verdict != OK
    return Finding(section, name, value, f"(aim: at most {aim:g})", verdict, advice * is_missed)


def limited(section: str, name: str, error: float, limit: float, advice: str) -> Finding:
    """ok up to the limit, else FAIL, with advice."""
    verdict = at_most(error, limit, limit)
    return Finding(section, name, error, f"(at most {limit:g})", verdict, advice * (verdict == FAIL))


def judged(section: str, name: str, value: float | str, is_right: bool, advice: str, unit: str = "") -> Finding:
    """ok or FAIL, with advice."""
    return Finding(section, name, value, unit, OK if is_right else FAIL, "" if is_right else advice)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of `theirs`."""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item()


def too_large(section: str, name: str, error: Exception) -> Finding:
    """What does not fit is no failure."""
    free, total = (size / GIB for size in torch.cuda.mem_get_info()) if torch.cuda.is_available() else (math.nan,) * 2
    why = f"does not fit: {str(error).splitlines()[0][:120]} ({free:.1f} of {total:.1f} GiB were free)"
    release()
    return Finding(section, name, None, "", SKIPPED, why)


@contextmanager
def exact() -> Iterator[None]:
    """fp32 products in fp32, and not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- what differs between a GPU and a CPU


def wait(settings: Settings) -> None:
    """Until the GPU has done what it was given."""
    if settings.on_gpu:
        torch.cuda.synchronize()


def seconds(settings: Settings, run: Callable[[], object], repeats: int = 1) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(repeats):
        wait(settings)
        start = time.perf_counter()
        run()
        wait(settings)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak_gib(settings: Settings, run: Callable[[], object]) -> float:
    """Most memory allocated during a call. On a CPU that of the process since its start."""
    if not settings.on_gpu:
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / GIB


def count_syncs(settings: Settings, run: Callable[[], object]) -> int | None:
    """How often a call made the CPU wait for the GPU; None on a CPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if settings.on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            run()
        finally:
            if settings.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    found = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return found if settings.on_gpu else None


def kernels_of(settings: Settings, run: Callable[[], object]) -> list[str]:
    """Names of the kernels of a call; on a CPU of torch's operators."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * settings.on_gpu]) as profile:
        run()
        wait(settings)
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return on_gpu if settings.on_gpu else [event.name for event in profile.events()]
