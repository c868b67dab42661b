"""The repository as a whole: who imports whom, what a file may hold, and launch scripts that start from anywhere."""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from scripts import measures
from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"train", "inference", "inference_optimization", "data_gen"}
OURS = STAGES | {"llava", "scripts", "tests"}
TRAIN_SCRIPT = ROOT / "train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh"
ABSOLUTE = re.compile(r"(?<![\w.$}~])/(?:home|scratch|mnt|root)/\w")
ELSEWHERE = re.compile(r"\u00a7\s*\d|(?i:\b(?:design|issue|ticket|brief)(?:\.md)? ?(?:#|no\. ?|section )\d)")  # to cite


def files_of_the_repository():
    """Tracked files and new ones that git does not ignore; without git everything but hidden and built folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
        names = [name for name in names if not re.search(r"(^|/)(\.|output|__pycache__|[\w-]+\.egg-info)", name)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


FILES = files_of_the_repository()
PYTHON = [path for path in FILES if path.suffix == ".py"]
SHELL = [path for path in FILES if path.suffix == ".sh" or path.name == "run"]


def name(path):
    return str(path.relative_to(ROOT))


def imported(nodes):
    """Full names of what is imported; of `from a import b` both a and a.b, as either may be a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


# ---- one direction


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_imports_go_one_way(path):
    package = name(path).split("/")[0]
    forbidden = {
        "llava": STAGES | {"scripts", "tests"},
        **{stage: STAGES - {stage} | {"scripts", "tests"} for stage in STAGES},
        "scripts": {"tests"},
    }
    found = imported(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))  # also inside functions
    assert not {module.split(".")[0] for module in found} & forbidden.get(package, set())


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_files_need_no_tricks(path):
    """No edit of sys.path, no star import, no relative import; they run as modules."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path"), f"{name(path)}:{node.lineno}"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and all(alias.name != "*" for alias in node.names), f"{name(path)}:{node.lineno}"


def test_the_rules_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    bad = tmp_path / "llava" / "x.py"
    bad.parent.mkdir()
    bad.write_text("import sys\ndef f():\n    from train.y import z\n    sys.path.append('.')\n")
    with pytest.raises(AssertionError):
        test_imports_go_one_way(bad)
    with pytest.raises(AssertionError):
        test_python_files_need_no_tricks(bad)
    assert ABSOLUTE.search('DATA="/' + 'home/alice/data"') and not ABSOLUTE.search("path/to/home/x")
    assert all(map(ELSEWHERE.search, ("design \u00a74", "see \u00a7 12", "Issue \x2345", "design.md section\x202")))
    assert not ELSEWHERE.search("Efron and Tibshirani 1993, chapter 13; arXiv 2403.00409 eq. 5; a#2")


def outside_functions(node):
    """The nodes of what runs when a module is loaded."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from outside_functions(child)


def import_circle(texts):
    """Modules, by name with their text, that import each other in a ring when they are loaded; empty without one."""
    graph = {name: texts.keys() & imported(outside_functions(ast.parse(text))) for name, text in texts.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_leads_back_to_its_module():
    modules = {name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in PYTHON}
    assert import_circle({module: path.read_text(encoding="utf-8") for module, path in modules.items()}) == []


def test_circles_are_those_of_loading():
    """Through a package and an `if`; not through a function, which runs later."""
    texts = {"a": "from b import c", "b": "x = 1", "b.c": "if True:\n    import a", "d": "def f():\n    import a"}
    assert set(import_circle(texts)) == {"a", "b.c"}
    texts["b.c"] = "def f():\n    import a"
    assert import_circle(texts) == []


def test_the_measures_name_what_does_not_hold(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measures, "ROOT", tmp_path)
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava/x.py").write_text("import llava.y\n\ndef f():\n    return 1\n" + "\n" * 500)
    (tmp_path / "llava/y.py").write_text('"""Documented."""\n\nfrom llava import x\n')
    assert measures.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert [line[:2] for line in said] == ["ok", "NO", "ok", "ok", "NO"] and "66.7 (at most 5)" in said[4]
    assert "llava/x.py): 504" in said[1]


def test_every_package_folder_has_an_init():
    folders = {path.parent for path in PYTHON} | {parent for path in PYTHON for parent in path.parent.parents}
    folders = {folder for folder in folders if ROOT in folder.parents} - {ROOT / "docs"}  # whose script is for people
    assert len(folders) >= 5 and all((folder / "__init__.py").is_file() for folder in folders)


# ---- what a file may hold


def test_no_file_of_code_is_longer_than_400_lines():
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON + SHELL}
    assert not {path: lines for path, lines in lengths.items() if lines > 400}


def test_notebooks_have_no_outputs():
    for path in (path for path in FILES if path.suffix == ".ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), name(path)
            lines = [line for line in "".join(cell["source"]).splitlines() if line.strip()]
            commented = all(line.lstrip().startswith("#") for line in lines)
            assert cell["cell_type"] != "code" or not (lines and commented), f"{name(path)}: a cell commented out"


def test_no_absolute_path_and_no_document_that_is_not_here():
    found = []
    for path in (path for path in FILES if path.suffix not in (".png", ".safetensors")):
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        found += [f"{name(path)}:{n}" for n, line in lines if ABSOLUTE.search(line) or ELSEWHERE.search(line)]
    assert not found


def test_root_names_shadow_no_installed_package():
    """`python -m` puts the root first: a folder `datasets/` there would hide the library of that name."""
    roots = {path.relative_to(ROOT).parts[0] for path in FILES}
    modules = {root.removesuffix(".py") for root in roots if (ROOT / root).is_dir() or root.endswith(".py")}
    installed = {module: set(owners) - {"attention-aware-dpo"} for module, owners in packages_distributions().items()}
    shadowed = {module for module in modules if installed.get(module)}
    assert modules >= {"llava", "train", "tests"} and not shadowed


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_shell_scripts_are_executable_and_parse(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert os.access(path, os.X_OK) and (first.startswith("#!/") or first.startswith("# Sourced"))
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the launch script, with stubs for python and torchrun


STUB = """#!/bin/bash
if [[ $1 == -c ]]; then # asked for torch
  [[ -z ${NO_TORCH:-} ]] || exit 1
  exit 0
fi
if [[ $2 == llava.machine ]]; then # asked for the GPUs that it can use
  [[ -z ${UNUSABLE:-} ]] || { echo "error: $UNUSABLE" >&2; exit 2; }
  echo "${GPUS:-0} PYTORCH_ALLOC_CONF"
  exit
fi
printf '%s\\t' "$(basename "$0")" "$PWD" "$PYTHONPATH" "$PYTHONSAFEPATH" \\
  "${OMP_NUM_THREADS:-} ${DS_ACCELERATOR:-} ${PYTORCH_ALLOC_CONF:-} ${PYTORCH_CUDA_ALLOC_CONF:-}" "$@" >>"$CALLS"
printf '\\n' >>"$CALLS"
exit "${STUB_EXIT:-0}"
"""


class Call:
    """One recorded command line: program, working folder, where modules come from, words, last value of each flag;
    `environment`: threads, DeepSpeed's accelerator, settings of the allocator under its new and its old name."""

    def __init__(self, line):
        self.program, self.folder, self.modules, safe, environment, *self.words = line.rstrip("\t").split("\t")
        self.environment = environment.split(" ")
        self.is_safe = safe == "1"
        self.flags = {}
        for word, value in zip(self.words, [*self.words[1:], ""], strict=True):
            if word.startswith("--"):
                key, _, after = word[2:].partition("=")
                self.flags[key] = after or value


@pytest.fixture
def launch(tmp_path):
    """Run the launch script (or a copy of it) with stubs first on PATH: (exit code, stderr, calls)."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for program in ("python", "torchrun"):
        (stubs / program).write_text(STUB)
        (stubs / program).chmod(0o755)

    def run(*flags, script=TRAIN_SCRIPT, cwd="/", **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{stubs}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", str(script), *flags], cwd=cwd, capture_output=True, text=True, check=False,
            env={"PATH": path, "HOME": str(tmp_path), "CALLS": str(calls), **environment},
        )  # fmt: skip
        return done.returncode, done.stderr, [Call(line) for line in calls.read_text().splitlines()]

    return run


def known_flags():
    groups = (ModelArguments, DataArguments, LossArguments, TrainArguments)
    return {field.name for group in groups for field in dataclasses.fields(group)}


def test_dry_run_first_then_torchrun(launch):
    code, stderr, (check, train) = launch()
    assert code == 0, stderr
    assert check.program == "python" and check.words[:2] == ["-m", "train.llava_hound_dpo.run_dpo"]
    assert check.words[-2:] == ["--dry_run", "True"]
    assert train.program == "torchrun" and train.words[:2] == ["--standalone", "--nproc_per_node=1"][::-1]
    assert train.words[2:4] == ["-m", "train.llava_hound_dpo.run_dpo"] and "dry_run" not in train.flags
    assert train.flags["check_images"] == "exists"  # the dry run has decoded every picture


def test_flags_of_the_script_exist(launch):
    """Also those that are only written in it."""
    check, train = launch()[2]
    code = [line for line in TRAIN_SCRIPT.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    written = set(re.findall(r"--([a-z]\w+)", "\n".join(code))) - {"help"}
    assert (set(check.flags) | set(train.flags)) - {"standalone", "nproc_per_node"} <= known_flags()
    assert written <= known_flags() and {"dpo_alpha", "gamma", "deepspeed"} <= written


def test_values_of_the_script(launch):
    for call in launch()[2]:
        flags = call.flags
        assert (flags["dpo_alpha"], flags["gamma"], flags["beta"]) == ("1.0", "0.0", "0.1")
        assert (flags["lora_r"], flags["lora_alpha"]) == ("128", "256")
        assert flags["deepspeed"] == str(ROOT / "scripts/zero2.json") and Path(flags["deepspeed"]).is_file()


def test_every_stage_of_deepspeed_is_a_knob(launch):
    for stage in ("3", "3_offload"):
        assert Path(launch(ZERO=stage)[2][-1].flags["deepspeed"]).is_file()


@pytest.mark.parametrize("how", ["from /", "from its folder", "spool copy", "spool copy of a subfolder's job"])
def test_the_repository_is_found(launch, tmp_path, how):
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = shutil.copy(TRAIN_SCRIPT, spool / "slurm_script")
    options = {
        "from /": {},
        "from its folder": {"cwd": TRAIN_SCRIPT.parent, "script": TRAIN_SCRIPT.name},
        "spool copy": {"script": copy, "SLURM_SUBMIT_DIR": str(ROOT)},
        "spool copy of a subfolder's job": {"script": copy, "SLURM_SUBMIT_DIR": str(TRAIN_SCRIPT.parent)},
    }[how]
    code, stderr, calls = launch(**options)
    assert code == 0, stderr
    assert [call.modules for call in calls] == [str(ROOT)] * 2


def test_paths_are_those_of_the_callers_folder(launch, tmp_path):
    """Knobs and flags alike, as they are spelled; a module of that folder never hides one of ours."""
    calls = launch("--output_dir", "out", cwd=tmp_path, DATA="d.json", PYTHONPATH="mine")[2]
    assert [(call.folder, call.modules, call.is_safe) for call in calls] == [(str(tmp_path), f"{ROOT}:mine", True)] * 2
    assert (calls[1].flags["data_path"], calls[1].flags["output_dir"]) == ("d.json", "out")


def test_outside_the_repository_the_script_says_so(launch, tmp_path):
    copy = shutil.copy(TRAIN_SCRIPT, tmp_path / "slurm_script")
    code, stderr, calls = launch(script=copy, cwd=tmp_path)
    assert (code, calls) == (2, []) and "repository not found" in stderr


def test_edited_knobs_arrive(launch, tmp_path):
    """The experiment is edited at the top of the file."""
    text = TRAIN_SCRIPT.read_text(encoding="utf-8")
    edited = text.replace("dpo_alpha=${dpo_alpha:-1.0}", "dpo_alpha=0.25").replace("gamma=${gamma:-0.0}", "gamma=0.75")
    assert edited.count("0.25") == edited.count("0.75") == 1
    copy = tmp_path / "edited.sh"
    copy.write_text(edited)
    for call in launch(script=copy, SLURM_SUBMIT_DIR=str(ROOT))[2]:
        assert (call.flags["dpo_alpha"], call.flags["gamma"]) == ("0.25", "0.75")


def test_knobs_from_the_environment_arrive(launch):
    own = {"dpo_alpha": "0.0", "gamma": "1.0", "MODEL": "my model", "DATA": "d.json", "IMAGES": "i.tar", "OUTPUT": "o"}
    for call in launch(**own)[2]:
        flags = call.flags
        assert (flags["dpo_alpha"], flags["gamma"], flags["model_name_or_path"]) == ("0.0", "1.0", "my model")
        assert (flags["data_path"], flags["image_folder"], flags["output_dir"]) == ("d.json", "i.tar", "o")


def test_trailing_flags_come_last_and_whole(launch):
    flags = ["--gamma", "0.5", "--check_images", "full", "--run_name", "two words"]
    check, train = launch(*flags)[2]
    assert train.words[-6:] == flags and check.words[-8:] == [*flags, "--dry_run", "True"]
    assert train.flags["gamma"] == check.flags["gamma"] == "0.5"


@pytest.mark.parametrize(
    "flags", [["--dry_run"], ["--dry_run", "True"], ["--dry_run=True"], ["--help"], ["-h"]], ids=str
)
def test_dry_run_and_help_stop_before_torchrun(launch, flags):
    code, stderr, calls = launch(*flags)
    assert code == 0, stderr
    assert [call.program for call in calls] == ["python"]


def test_a_failed_check_ends_the_job(launch):
    code, _, calls = launch(STUB_EXIT="2")
    assert code == 2 and [call.program for call in calls] == ["python"]


def test_without_torch_it_takes_the_repositorys_own_environment_or_ends_in_a_line(launch, tmp_path):
    """In a copy, so that there is an environment of the test's own."""
    root = tmp_path / "copy"
    for part in (TRAIN_SCRIPT, *(ROOT / "scripts").glob("*.sh")):
        (root / part.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(part, root / part.relative_to(ROOT))
    script = root / TRAIN_SCRIPT.relative_to(ROOT)
    code, stderr, calls = launch(script=script, NO_TORCH="1")
    assert (code, calls) == (2, []) and len(stderr.splitlines()) == 1 and "bash scripts/setup.sh" in stderr
    for program in ("python", "torchrun"):
        own = root / ".venv/bin" / program
        own.parent.mkdir(parents=True, exist_ok=True)
        text = STUB.replace("[[ -z ${NO_TORCH:-} ]] || exit 1", "")
        own.write_text(text.replace('"$(basename "$0")"', f"own-{program}"))
        own.chmod(0o755)
    code, stderr, calls = launch(script=script, NO_TORCH="1", GPUS="3")
    assert code == 0 and stderr.splitlines()[0] == "python has no torch: taking the repository's .venv"
    assert [call.program for call in calls] == ["own-python", "own-torchrun"]
    assert calls[1].flags["nproc_per_node"] == "3"


def test_several_nodes_need_a_launcher_each(launch):
    code, stderr, calls = launch(SLURM_NNODES="2")
    assert (code, calls) == (2, []) and "srun --ntasks-per-node=1" in stderr


def test_one_launcher_of_several_nodes(launch):
    slurm = {"SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_NODEID": "1"}
    train = launch(**slurm, SLURM_JOB_NODELIST="node[7-8]", NPROC="4")[2][-1]
    assert (train.flags["nnodes"], train.flags["node_rank"], train.flags["nproc_per_node"]) == ("2", "1", "4")
    assert train.flags["master_addr"] == "node7" and "standalone" not in train.flags


def test_launch_scripts_hold_no_site_fact():
    """Account, partition and mail come from the environment."""
    text = TRAIN_SCRIPT.read_text(encoding="utf-8")
    assert not re.search(r"#SBATCH.*(account|partition|mail|-A |-p )|@", re.sub(r'"\$@"|\[@\]|USR1@\d+', "", text))
    assert len(text.splitlines()) <= 40
