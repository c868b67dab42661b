"""`pip install .` brings everything that runs: every command starts from any folder, without the clone."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import preference
from tests.test_architecture import FILES, ROOT, name

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
START_ALL = """
import contextlib, importlib.metadata, io, sys
for command in importlib.metadata.distribution("attention-aware-dpo").entry_points:
    if command.name == "aa-train":
        continue  # becomes another program
    sys.argv, said = [command.name, *([] if command.name == "aa-doctor" else ["--help"])], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            code = command.load()()
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        code = repr(error)
    print(command.name, code or 0, "|", said.getvalue().replace("\\n", " ")[:300])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project as pip installs it from a copy; its folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for path in FILES:
        (source / name(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / name(path))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(installed, folder, *words, **environment):
    """What a command of the installed project says in a folder, in an environment that nobody has activated."""
    folder.mkdir(exist_ok=True)
    own = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "NPROC": "1", **environment}
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONSAFEPATH", "STOP_FILE")}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=kept | own, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_that_runs_is_there(installed):
    """Also what is no Python: launch scripts, settings, templates, the small checkpoint; and nothing of the tests."""
    wanted = [path for path in FILES if path.suffix in (".py", ".sh", ".json", ".j2", ".css") and path.parent != ROOT]
    wanted += (ROOT / "scripts/miniature/base").iterdir()
    missing = {name(path) for path in wanted if not (installed / name(path)).is_file()}
    assert {path for path in missing if not path.startswith(("tests/", "docs/", "scripts/miniature/results/"))} == set()
    assert not (installed / "tests").exists()
    assert {path.name for path in (installed / "bin").iterdir()} == set(COMMANDS)


def test_every_command_starts_in_an_empty_folder(installed, tmp_path):
    said = run(installed, tmp_path / "empty", sys.executable, "-c", START_ALL)
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("aa-")}
    assert lines.keys() == set(COMMANDS) - {"aa-train"}
    assert [line for line in lines.values() if line.split()[1] != "0"] == []
    assert "no problem found" in lines.pop("aa-doctor")
    assert [command for command, line in lines.items() if "usage:" not in line and "--help" not in line] == []


def test_training_reads_and_writes_in_the_folder_it_is_called_from(installed, data):
    """Relative knobs, a relative flag, and a folder of the user's that is called like a package of ours."""
    data([preference(n, num_images=2 + n % 3) for n in range(4)], "mine.json")
    shutil.copytree(installed / "scripts/miniature/base", data.folder / "base")
    (data.folder / "train").mkdir()
    (data.folder / "train/__init__.py").write_text("raise RuntimeError('not ours')")
    knobs = {"MODEL": "base", "DATA": "mine.json", "IMAGES": "elsewhere", "OUTPUT": "out/adapter", "REPORT_TO": "none"}
    flags = ["--image_folder", "images", "--bf16", "False", "--dry_run", "True"]
    said = run(installed, data.folder, installed / "bin/aa-train", *flags, **knobs)
    assert "out/adapter" in said
    assert not list(Path(installed).glob("wandb")) and not (installed / "out").exists()
