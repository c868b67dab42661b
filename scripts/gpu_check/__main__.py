"""What is wrong with this machine's GPUs, and how fast they are: `python -m scripts.gpu_check` (five minutes)

Random weights, nothing is downloaded. Says of every check ok, FAIL, info or skipped, then what to change; writes
gpu_check.json. Exit code 1 if a check fails. The launch takes all GPUs, the rest the first. With --compare FILE this
machine stands beside the one that wrote FILE; with two files these do, and nothing is run.
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llava import machine, runtime
from llava.command_line import check_numbers, flag, parse
from llava.markdown import table
from llava.run_folder import read_object
from llava.weights import reason
from scripts.bench.common import release
from scripts.gpu_check import correctness, environment, generation, kernels, launch, step
from scripts.gpu_check.common import FAIL, INFO, SIZES, Finding, Settings, too_large

SECTIONS = {
    "environment": environment.run, "kernels": kernels.run, "correctness": correctness.run, "step": step.run,
    "launch": launch.run, "generation": generation.run,
}  # fmt: skip
LARGE = ("step", "generation")  # which a smaller GPU need not be able to do
MADE_BY = "scripts.gpu_check"


@dataclasses.dataclass(kw_only=True)
class Flags:
    """What is checked."""

    device: str = flag("to check; cpu only shows that the check itself works", "cuda", choices=["cuda", "cpu"])
    size: str = flag("of the model whose steps and answers are measured", "7b", choices=list(SIZES))
    sections: list[str] = flag("to run", list(SECTIONS), choices=list(SECTIONS))
    processes: int | None = flag("of the launch; default: the GPUs, or 2 on a CPU", None)
    output: Path = flag("file to write", Path("gpu_check.json"))
    compare: list[Path] = flag("files to compare with, or, if two, with each other", [])

    def __post_init__(self):
        check_numbers(self, processes=(1, 64))
        if len(self.compare) > 2:
            raise ValueError(f"--compare: one file or two, not {len(self.compare)}")
        if self.device == "cpu" and self.size != "tiny":
            raise ValueError("--device cpu is for --size tiny: larger ones would take days")


def main() -> int:
    """Checks, prints, writes; the exit code."""
    runtime.setup_logging()
    runtime.without_compiler()
    with runtime.user_errors():
        (own,) = parse((Flags,), __doc__)
        others = [read(path) for path in own.compare]
        if len(others) == 2:
            print(beside(*others))
            return 0
        runtime.check_outputs([own.output], own.compare)
        require(own.device)
    if own.device == "cpu":
        torch.set_num_threads(1)  # more of them only wait for each other on a miniature
    report = measure(own)
    runtime.write_text(own.output, json.dumps(report, indent=1) + "\n")
    findings = [Finding(**one) for one in report["findings"]]
    print(f"\n{summary(findings)}\n")
    if others:
        print(f"{beside(*others, report)}\n")
    for verdict, title in ((INFO, "Worth a look"), (FAIL, "To change")):
        lines = [f"  {one.section}, {one.name}: {one.shown}. {one.advice}" for one in findings
                 if one.verdict == verdict and one.advice]  # fmt: skip
        print("\n".join([f"{title}:", *lines]) if lines else f"{title}: nothing")
    failed = sum(finding.verdict == FAIL for finding in findings)
    print(f"{failed} of {len(findings)} checks failed; written to {own.output}")
    return int(failed > 0)


def require(device: str) -> None:
    """Raises ValueError where there is no GPU to check."""
    if device == "cuda" and not torch.cuda.is_available():
        why = machine.problem(machine.look()) or "torch sees none, and the driver lists none (or they are hidden)"
        raise ValueError(f"no GPU to check: {why}; --device cpu --size tiny only tries the check itself")


def measure(own: Flags) -> dict[str, Any]:
    """The report, as it is written; findings are printed as they come."""
    start, findings = time.perf_counter(), []
    described = machine.describe(torch.device(own.device))  # before anything may break the GPU's context
    processes = own.processes or (torch.cuda.device_count() if own.device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as folder:
        for name in own.sections:
            print(name, flush=True)
            (Path(folder) / name).mkdir()
            settings = Settings(own.device, own.size, processes, Path(folder) / name)
            for finding in run(name, settings):
                findings.append(finding)
                told = f"   ({finding.advice})" if finding.advice else ""
                print(f"  {finding.verdict:<8}{finding.name}: {finding.shown}{told}", flush=True)
    return {
        "made_by": MADE_BY, "machine": described, "size": own.size,
        "processes": processes, "seconds": round(time.perf_counter() - start, 1), "versions": runtime.versions(),
        "commit": runtime.git_commit(), "findings": [dataclasses.asdict(finding) for finding in findings],
    }  # fmt: skip


def run(name: str, settings: Settings) -> Iterator[Finding]:
    """Findings of a section; what it cannot go on after is one, too."""
    release()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for finding in SECTIONS[name](settings):
                is_number = not isinstance(finding.value, float) or math.isfinite(finding.value)
                yield finding if is_number else dataclasses.replace(finding, value=str(finding.value))
    except Exception as error:
        if name in LARGE and isinstance(error, torch.cuda.OutOfMemoryError):
            yield too_large(name, "the rest of this section", error)
            return
        told = "the rest of this section was not checked; with this alone: --sections " + name
        yield Finding(name, "goes on to its end", reason(error), "", FAIL, told)


def read(path: Path) -> dict[str, Any]:
    """A report. Raises FileNotFoundError, or ValueError for a file of something else."""
    if not path.is_file():
        raise FileNotFoundError(f"--compare {path}: no such file")
    report = read_object(path)
    if report.get("made_by") != MADE_BY:
        raise ValueError(f"--compare {path}: this is no report of {MADE_BY}")
    return report


def summary(findings: Sequence[Finding]) -> str:
    """All findings as a table."""
    rows = [(one.section, one.name, one.shown, one.verdict) for one in findings]
    return table(("section", "check", "found", "verdict"), rows, left=2)


def beside(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Two reports in a table, of whatever commits and sizes: what one of them lacks is "-"."""
    lines = [f"{name}: {one['machine']}, {one['size']}, commit {runtime.short_commit(one['commit'])}" for name, one in
             (("first", first), ("second", second))]  # fmt: skip
    ours, theirs = ({(one["section"], one["name"]): Finding(**one) for one in report["findings"]}
                    for report in (first, second))  # fmt: skip
    rows = [(*key, *compared(ours.get(key), theirs.get(key))) for key in {**ours, **theirs}]
    return "\n".join([*lines, "", table(("section", "check", "first", "second", "second / first"), rows, left=2)])


def compared(first: Finding | None, second: Finding | None) -> tuple[str, str, str]:
    """Both values with their verdicts, and their ratio where they are numbers."""
    shown = [f"{one.shown} {one.verdict}" if one else "-" for one in (first, second)]
    values = [one.value for one in (first, second) if one and isinstance(one.value, int | float)]
    return *shown, f"{values[1] / values[0]:.3g}" if len(values) == 2 and values[0] else "-"


if __name__ == "__main__":
    sys.exit(main())
