"""What is said of a machine, by stub drivers and a torch whose facts are made up; no GPU is needed, none is touched."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava import machine
from llava.answering import prepare
from llava.machine import GIB, Machine, announce, describe, host_memory, look, own_device, problem, require_usable
from llava.settings import AnswerSettings, ModelSettings
from tests.conftest import asks_for_gpu
from tests.test_architecture import ROOT, TRAIN_SCRIPT, launch  # noqa: F401  a fixture
from train.llava_hound_dpo.arguments import TrainArguments

CPU_HINT = 'to run on the CPU set CUDA_VISIBLE_DEVICES=""'


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A machine without GPUs; `node(smi, files, cuda, seen, **environment)` gives it some, and looks at it."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def make(smi=None, files=(), cuda="13.0", seen=0, **environment):
        bin = tmp_path / "bin"
        bin.mkdir()
        monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin" if smi else str(bin))
        if smi:
            stub(bin / "nvidia-smi", smi)
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        torch_sees(monkeypatch, seen, cuda)
        return look()

    return make


def stub(path, script):
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def torch_sees(monkeypatch, count, cuda="13.0"):
    """A torch that can use `count` GPUs; before `init` it counts what the driver lists, another one."""
    counts = [count + 1]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "init", lambda: counts.append(count))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counts[-1])


def lists(*drivers):
    """nvidia-smi that gives the driver once for each GPU, and only for the question that is asked."""
    answer = "\\n".join(drivers)
    return f'[[ "$*" == "--query-gpu=driver_version --format=csv,noheader" ]] && printf "{answer}\\n"'


def test_no_gpu_is_no_problem(node):
    found = node(cuda=None)
    assert found == Machine(None, 0, 0, False, None) and problem(found) is None


@pytest.mark.parametrize(
    ("driver", "cuda", "needed", "cure"),
    [
        ("570.86.15", "13.0", "580.65.06", "pip install 'torch>=2.9,<2.11'"),
        ("580.65.05", "13.0", "580.65.06", "pip install 'torch>=2.9,<2.11'"),
        ("525.60.13", "13.0", "580.65.06", "pip install 'torch>=2.9,<2.11'"),
        ("470.239.06", "12.8", "525.60.13", "pip install 'torch>=2.6,<2.8' --index-url https://download"),
        ("440.33.01", "12.8", "525.60.13", "have the driver updated"),
    ],
)
def test_a_driver_too_old_for_this_torch_names_the_torch_that_fits(node, driver, cuda, needed, cure):
    found = node(lists(driver, driver), cuda=cuda)
    assert found == Machine(driver, 2, 0, False, cuda)
    line = problem(found)
    assert line.startswith("2 GPUs here, but torch 2.13.0 sees none: ") and "\n" not in line
    assert f"its CUDA {cuda} needs driver {needed}, here is {driver}: {cure}" in line and line.endswith(CPU_HINT)


@pytest.mark.parametrize(
    ("driver", "wanted"), [("580.95.05", "'torch>=2.11,<=2.13.0'"), ("550.54", "'torch>=2.9,<2.11'")]
)
def test_a_build_for_the_cpu_is_replaced_by_what_the_driver_takes(node, driver, wanted):
    line = problem(node(lists(driver), cuda=None))
    assert f"1 GPU here, but torch 2.13.0 sees none: it is built for the CPU. For driver {driver}: pip install" in line
    assert f"--force-reinstall {wanted}" in line  # pip finds 2.13.0+cpu good enough


VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: gcc 12.3.0"


def test_an_nvidia_smi_that_only_lists_counts(node):
    lines = "GPU 0: A100 (UUID: x)\\n  MIG 1g.10gb Device 0: (UUID: y)\\nGPU 1: A100\\n"
    found = node(f'[[ $* == -L ]] && printf "{lines}"', {"proc/driver/nvidia/version": VERSION}, cuda=None)
    assert (found.driver, found.listed) == ("570.86.15", 2) and "For driver 570.86.15: pip install" in problem(found)


def test_a_build_for_the_cpu_is_said_without_a_known_driver(node):
    line = problem(node(files={"dev/nvidia3": ""}, cuda=None))
    assert "1 GPU here, but torch 2.13.0 sees none: it is built for the CPU: install one for CUDA" in line


@pytest.mark.parametrize("smi", [None, "echo 'NVIDIA-SMI has failed: no driver' >&2; exit 9", "exit 0"])
def test_without_nvidia_smi_device_files_count(node, smi):
    found = node(smi, {"dev/nvidia3": "", "dev/nvidiactl": "", "proc/driver/nvidia/version": VERSION})
    assert (found.driver, found.listed) == ("570.86.15", 1)  # a container with the fourth GPU of eight
    assert "its CUDA 13.0 needs driver 580.65.06, here is 570.86.15" in problem(found)


def test_a_container_without_the_driver_says_how_to_start_it(node):
    gpus = {f"proc/driver/nvidia/gpus/0000:0{n}:00.0": "" for n in range(4)}
    found = node(files={**gpus, "proc/driver/nvidia/version": VERSION})
    assert found == Machine(None, 4, 0, False, "13.0") and "--gpus all (docker) or --nv (apptainer)" in problem(found)


def test_a_job_on_a_gpu_node_that_asked_for_none_is_on_the_cpu(node):
    found = node("echo 'No devices were found'; exit 6", {"dev/nvidia0": "", "proc/driver/nvidia/version": VERSION})
    assert found.listed == 0 and problem(found) is None


def test_mig_counts_what_torch_can_use(node):
    found = node(lists("580.95.05"), seen=1, CUDA_VISIBLE_DEVICES="MIG-1a,MIG-2b")
    assert (found.listed, found.visible) == (1, 1) and problem(found) is None


def test_a_gpu_that_nobody_can_explain_says_where_to_look(node):
    line = problem(node(lists("580.95.05")))
    assert 'python -c "import torch; torch.cuda.init()" says why (a GPU in MIG mode that has no part' in line


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_the_cpu_asked_for(node, value):
    found = node(lists("570.86.15"), CUDA_VISIBLE_DEVICES=value)
    assert found.hidden and problem(found) is None
    require_usable(use_cpu=False)
    assert describe().startswith("CPU (1 GPU not used), torch 2.13.0, ")


def test_a_torch_that_does_not_start_sees_none(node, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old")

    node(lists("570.86.15"), seen=1)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert look().visible == 0 and "needs driver 580.65.06" in problem(look())


def test_names_of_gpus_that_are_not_there(node):
    assert "CUDA_VISIBLE_DEVICES=7 names none of them" in problem(node(lists("580.95.05"), CUDA_VISIBLE_DEVICES="7"))


def test_training_and_answering_stop_before_anything_else(node):
    """The checkpoint, the questions and the pictures are not there: nobody gets that far."""
    node(lists("570.86.15"))
    model = ModelSettings(model_name_or_path="nowhere", image_folder="nowhere")
    for start in (lambda: prepare(model, AnswerSettings(), "nowhere"), lambda: TrainArguments(output_dir="nowhere")):
        with pytest.raises(ValueError, match=r"1 GPU here, but torch .* needs driver 580\.65\.06"):
            start()
    TrainArguments(output_dir="nowhere", use_cpu=True, report_to=[], bf16=False)
    TrainArguments(output_dir="nowhere", dry_run=True, report_to=[], bf16=False)  # a plan needs no GPU


def test_more_processes_than_gpus_are_refused_by_all_of_them(node):
    node(lists("580.95.05"), seen=1, LOCAL_WORLD_SIZE="2")
    with pytest.raises(ValueError, match="2 processes on a node where torch sees 1 GPUs: set NPROC=1"):
        require_usable(use_cpu=False)
    require_usable(use_cpu=True)


def test_every_process_has_its_own_gpu_as_the_current_one(monkeypatch):
    current = []
    assert own_device() == torch.device("cpu")
    torch_sees(monkeypatch, 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device() == torch.device("cuda", 3) and current == [torch.device("cuda", 3)]


def test_the_line_of_a_gpu(node, monkeypatch):
    node(lists("580.95.05", "580.95.05"), seen=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(machine, "attention_kernels", lambda device: "flash (causal)")
    assert describe(torch.device("cuda", 0)) == (
        "2 x NVIDIA A100-SXM4-80GB, driver 580.95.05, torch 2.13.0 with CUDA 13.0, attention by flash (causal), "
        "70.0 of 80.0 GiB free"
    )


def test_kernels_are_those_that_torch_chooses():
    """Asked on a CPU, which has its own."""
    cpu = torch.device("cpu")
    assert machine.attention_kernels(cpu) == "flash (causal) and flash (masked)"
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert machine.attention_kernels(cpu) == "math (causal) and math (masked)"


@pytest.mark.parametrize(("free", "workers", "warnings"), [(0.5, 4, 1), (0.5, 0, 0), (2, 4, 0)])
def test_small_shared_memory_is_a_warning_if_workers_need_it(node, monkeypatch, caplog, free, workers, warnings):
    node(files={"dev/shm/other": ""})
    monkeypatch.setattr(machine.psutil, "disk_usage", lambda path: SimpleNamespace(free=free * GIB))
    with caplog.at_level(logging.INFO, "llava.machine"):
        announce(torch.device("cpu"), workers, "--num_workers")
    first, *said = caplog.messages
    assert first.startswith("CPU, torch ") and len(said) == warnings
    assert all("0.50 GiB" in line and "--shm-size=8g, or set --num_workers 0" in line for line in said)


@pytest.mark.parametrize(
    ("files", "environment", "gib"),
    [
        ({}, {}, 100),
        ({}, {"SLURM_MEM_PER_NODE": "65536"}, 64),
        ({}, {"SLURM_MEM_PER_NODE": "0"}, 100),  # all of the node's
        ({}, {"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "16"}, 32),
        ({"sys/fs/cgroup/memory.max": "max\n"}, {}, 100),
        ({"sys/fs/cgroup/memory.max": f"{8 * GIB}\n"}, {"SLURM_MEM_PER_NODE": "65536"}, 8),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{48 * GIB}\n"}, {}, 48),
    ],
)
def test_host_memory_is_the_least_that_anyone_allows(node, monkeypatch, files, environment, gib):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=100 * GIB))
    node(files=files, **environment)
    assert host_memory() == gib * GIB


def test_a_launch_script_ends_in_the_same_line(tmp_path):
    """The real thing: a node with GPUs by its nvidia-smi, and the torch of these tests, which sees none."""
    stub(tmp_path / "nvidia-smi", lists("570.86.15"))
    path = f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(["bash", TRAIN_SCRIPT], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: 1 GPU here, but torch") and done.stderr.endswith(f"{CPU_HINT}\n")


def test_the_docs_and_the_containers_name_the_same_builds():
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    for _, oldest, how in machine.BUILDS:
        assert f"`{how}`" in page and f"| {'.'.join(f'{part:02}' for part in oldest)} or newer" in page
    images = {line.split()[1] for path in (ROOT / "scripts/container").iterdir()
              for line in path.read_text(encoding="utf-8").splitlines() if line.lower().startswith("from")}  # fmt: skip
    assert images == {"pytorch/pytorch:2.10.0-cuda12.8-cudnn9-runtime"}


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["pytest"], False), (["pytest", "-m", "gpu"], True), (["pytest", "-mgpu"], True), (["pytest", "-m"], False),
        (["pytest", "-m", "gpu and not slow", "tests"], True), (["pytest", "-m", "not gpu"], False),
        (["pytest", "-m", "slow", "-k", "gpu"], False),
    ],
)  # fmt: skip
def test_tests_see_gpus_only_if_they_are_asked_for(words, asked):
    assert asks_for_gpu(words) == asked


# ---- scripts/cluster.sh, with stubs for python and torchrun


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, "1"),
        ({"CPU_NPROC": "2"}, "2"),
        ({"CPU_NPROC": "2", "GPUS": "1"}, "1"),
        ({"GPUS": "4"}, "4"),
        ({"CUDA_VISIBLE_DEVICES": "0,3,5", "GPUS": "1"}, "1"),  # it names two that are not there
        ({"CUDA_VISIBLE_DEVICES": "MIG-1a,MIG-2b", "GPUS": "1"}, "1"),  # CUDA gives a process one part
        ({"CUDA_VISIBLE_DEVICES": "", "GPUS": "8"}, "1"),  # all hidden
        ({"CUDA_VISIBLE_DEVICES": "-1", "GPUS": "8"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "GPUS": "8"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "GPUS": "2", "NPROC": "6"}, "6"),
    ],
    ids=str,
)
def test_number_of_processes_is_what_torch_sees(launch, environment, processes):  # noqa: F811
    assert launch(**environment)[2][1].flags["nproc_per_node"] == processes


def test_gpus_that_torch_cannot_use_end_the_job_in_a_line(launch):  # noqa: F811
    assert launch(UNUSABLE="too old") == (2, "error: too old\n", [])
    assert launch(UNUSABLE="too old", CUDA_VISIBLE_DEVICES="")[0] == 0  # the CPU was asked for


def test_threads_accelerator_and_allocator_by_what_is_there(launch):  # noqa: F811
    def given(*flags, **environment):
        return launch(*flags, **environment)[2][-1].environment

    cores = len(os.sched_getaffinity(0))
    assert given() == ["1", "cpu", "", ""]
    assert given(GPUS="2") == ["1", "", "expandable_segments:True", ""]
    assert given(GPUS="2", PYTORCH_CUDA_ALLOC_CONF="mine") == ["1", "", "", "mine"]
    assert given(GPUS="2", PYTORCH_ALLOC_CONF="mine")[2] == "mine"
    assert given(GPUS="2", ZERO="3_offload", SLURM_CPUS_PER_TASK="16")[0] == "8"
    assert given("--deepspeed", "scripts/zero3_offload.json", GPUS="1")[0] == str(cores)
    assert given(GPUS="2", ZERO="3_offload", SLURM_CPUS_PER_TASK="1")[0] == "1"
    assert given(GPUS="2", ZERO="3_offload", OMP_NUM_THREADS="3")[0] == "3"


def test_a_studys_command_runs_on_all_gpus_if_it_begins_with_torchrun(launch):  # noqa: F811
    job, words = ROOT / "scripts/study/job.sh", ["-m", "some.module", "--flag", "two words"]
    alone, several, plain = (
        launch(program, *words, script=job, GPUS=gpus)[2][-1]
        for program, gpus in (("torchrun", "1"), ("torchrun", "2"), ("python", "2"))
    )
    assert [alone.program, several.program, plain.program] == ["python", "torchrun", "python"]
    assert several.flags["nproc_per_node"] == "2" and several.words[-4:] == alone.words == plain.words == words
