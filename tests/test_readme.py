"""README.md and docs/*.md are true: links, files, figures, and every command, parsed by the program that it names."""

import argparse
import ast
import contextlib
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import BASE, picture
from train.llava_hound_dpo.arguments import RETIRED

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
TRAINING = "train.llava_hound_dpo.run_dpo"
ANSWERING = "inference.llava_hound_dpo.run_inference"
GONE = {"attention_carry", "attention_warmup_share", "attention_schedule", "gpu_hour_price"}  # docs say that they are
OF_OTHERS = {"ntasks-per-node", "kill-on-bad-exit", "repo-type", "local-dir", "wait", "help"}  # srun, hf, sbatch
OF_OTHERS |= {"mem", "shm-size", "index-url"}  # sbatch, docker, pip
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


class Parsed(BaseException):
    """A command line was read whole: the program is stopped before it does anything."""


class WrongError(AssertionError):
    """A page is wrong."""


# ---- pages


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines_of(text: str) -> list[str]:
    """Command lines of the fenced blocks, continued ones joined."""
    whole = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    return [line for line in whole.splitlines() if line.strip()]


def spans(text: str) -> list[str]:
    """Commands in running text, which may leave out what a program requires."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]
    return [span for span in found if re.match(r"(python -m|bash|aa-\w+|hf) ?", span) and span != "bash"]


# ---- commands


def check_line(line: str, is_whole: bool = True) -> None:
    """Raises WrongError for a command line that would not start."""
    words = shlex.split(line, comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        check_command(words[:end], is_whole)
        words = words[end + 1 :]


def check_command(words: list[str], is_whole: bool) -> None:
    knobs = []
    while words and (words[0] == "export" or re.match(r"\w+=", words[0])):
        word = words.pop(0)
        knobs += [] if word == "export" else [word.split("=")[0]]
    if not words:
        return
    program, *rest = words
    if program == "srun":
        rest = rest[next(number for number, word in enumerate(rest) if not word.startswith("--")) :]
        program, *rest = rest
    if program == "bash":
        check_script(rest[0], rest[1:], knobs)
    elif program == "python" and rest[0] == "-m":
        if rest[1] != "venv":
            check_module(rest[1], rest[2:], is_whole)
    elif program in SCRIPTS:
        check_module(SCRIPTS[program].split(":")[0], rest, is_whole)
    elif program in ("pip", "hf", "source", "transformers", "vllm", "lmms-eval"):
        files = [word for word in rest if word.endswith(".txt")]
        if [file for file in files if not (ROOT / file).is_file()]:
            raise WrongError(f"{files}: no such file")
    else:
        raise WrongError(f"{program}: nobody checks such a command")


def check_script(name: str, rest: list[str], knobs: list[str]) -> None:
    path = ROOT / name
    if not path.is_file() or subprocess.run(["bash", "-n", path]).returncode:
        raise WrongError(f"{name}: no such script, or not bash")
    text = path.read_text(encoding="utf-8")
    sourced = [ROOT / "scripts" / file for file in re.findall(r"scripts/(\w+\.sh)", text)]
    known = "\n".join([text, *(file.read_text(encoding="utf-8") for file in sourced if file.is_file())])
    unread = [knob for knob in knobs if f"${{{knob}:-" not in known]
    if unread:
        raise WrongError(f"{name} reads no {unread[0]} from the environment")
    if name == "scripts/test.sh":
        check_tests(rest)
    elif name == "scripts/demo.sh":  # hands them to the training
        check_flags(rest, options_of(TRAINING))
    elif rest:
        modules = re.findall(r"-m ((?:train|inference|inference_optimization|data_gen)[\w.]+)", text)
        check_flags(rest, options_of(modules[-1]) if modules else set())


def check_tests(rest: list[str]) -> None:
    """What pytest is asked for exists."""
    chosen = rest[rest.index("-k") + 1].split() if "-k" in rest else []
    names = {name.lower() for path in (ROOT / "tests").glob("test_*.py") for name in names_in(path)}
    for word in set(chosen) - {"or", "and", "not"}:
        if not any(word.lower() in name for name in names):
            raise WrongError(f"-k {word} selects no test")
    for word in rest:
        if word.startswith("tests/") and not (ROOT / word).is_file():
            raise WrongError(f"{word}: no such file")


@cache
def names_in(path: Path) -> list[str]:
    """Names of a file's tests and classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [path.name, *(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef))]


def check_module(name: str, words: list[str], is_whole: bool) -> None:
    """The words are what the module's parser takes; of a whole command line nothing is missing."""
    if not is_whole or name == "scripts.commands":
        check_flags(words, options_of(TRAINING if name == "scripts.commands" else name, tuple(words[:1])))
        return
    error = run_parser(name, words)[1]
    if error:
        raise WrongError(f"python -m {name} {shlex.join(words)}: {error}")


def check_flags(words: list[str], known: set[str]) -> None:
    for word in words:
        if word.startswith("--") and word.split("=")[0][2:] not in known | {"help"}:
            raise WrongError(f"no such flag: {word}")


@cache
def options_of(name: str, first: tuple[str, ...] = ()) -> set[str]:
    """Names of a module's flags."""
    first = tuple(word for word in first if not word.startswith("-"))
    return {option.lstrip("-") for option in run_parser(name, list(first))[0]}


def run_parser(name: str, words: list[str]) -> tuple[list[str], str]:
    """(flags, error) of a module's own `main` up to where its command line is read."""
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    flags, original = [], argparse.ArgumentParser.parse_known_args

    def read(parser, args=None, namespace=None):
        flags.extend(parser._option_string_actions)
        _, unknown = original(parser, args, namespace)
        raise Parsed(f"unknown: {unknown}" if unknown else "")

    said = []
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", [name, *words])
        patch.setattr(argparse.ArgumentParser, "parse_known_args", read)
        patch.setattr("llava.runtime.stop", lambda text, **_: said.append(str(text)) or sys.exit(2))
        try:
            module.main()
        except Parsed as parsed:
            return flags, str(parsed)
    return flags, " ".join(said) or "ended before its command line was read"


# ---- the tests


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_bytes()) <= 11_000


@EACH_PAGE
def test_links_paths_and_figures_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        assert (page.parent / link).exists(), link
    folders = "scripts|train|inference|inference_optimization|data_gen|llava|tests|docs"
    gone = {"scripts/launch.py", "scripts/larger", "scripts/larger/run.sh"}
    for name in set(re.findall(rf"`((?:{folders})/[\w./]+)`", text)) - gone:
        assert (ROOT / name).exists(), name


def test_figures_are_small():
    for figure in (ROOT / "docs/figures").iterdir():
        assert figure.stat().st_size < 120_000, figure


@EACH_PAGE
def test_every_command_can_be_started(page):
    text = page.read_text(encoding="utf-8")
    past = ("python -m scripts.miniature.study", "bash scripts/larger/run.sh")  # results.md tells of them
    for line in lines_of(text):
        check_line(line)
    for span in spans(text):
        if not span.startswith(past):
            check_line(span, is_whole=False)


@EACH_PAGE
def test_flags_in_the_text_exist(page):
    modules = [TRAINING, ANSWERING, *(target.split(":")[0] for target in SCRIPTS.values())]
    modules += ["inference.llava_hound_dpo.interchange", "scripts.figures", "data_gen.gen_instruction.test_set",
                "scripts.bench.training", "scripts.bench.dispatch", "scripts.miniature.train_base"]  # fmt: skip
    modules.remove("scripts.commands")
    known = set().union(*(options_of(name) for name in modules), OF_OTHERS, GONE)
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)))
    assert known >= flags - {"only", "jobs", "quick", "confirm"}, flags - known
    assert set(RETIRED) >= GONE


def test_console_commands_of_the_readme_are_all():
    found = set(re.findall(r"`(aa-[\w-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert found == set(SCRIPTS)


def test_python_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        picture("red").save(f"{name}.png")
    found = [block for page in PAGES for block in blocks(page.read_text(encoding="utf-8"), "python")]
    assert found
    for block in found:
        exec(block, {"MODEL": BASE})


def test_figures_can_be_drawn_again(tmp_path, monkeypatch):
    from scripts import figures

    monkeypatch.setattr(sys, "argv", ["figures", "--output", str(tmp_path)])
    figures.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn | {"look.png", "viewer.png"} == {path.name for path in (ROOT / "docs/figures").iterdir()}


def test_nothing_is_left_to_fill_in():
    for page in PAGES:
        assert not re.search(r"@[A-Z]+@|TODO", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "python -m scripts.no_such_thing",
        "python -m inference.llava_hound_dpo.evaluate --answers a.jsonl --output scores --no_such_flag 1",
        "python -m inference.llava_hound_dpo.evaluate --answers a.jsonl",
        "python -m data_gen.mix read",
        "python -m inference.llava_hound_dpo.interchange export --to nobody --answers a --questions b --output c",
        "NO_SUCH_KNOB=1 bash train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh",
        "bash train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh --no_such_flag",
        "bash scripts/no_such_script.sh",
        "bash scripts/test.sh -k no_such_" + "test_at_all",
        "aa-nothing --help",
        "pip install -r no_such_requirements.txt",
    ],
)
def test_a_wrong_line_is_found(line):
    with pytest.raises((WrongError, ImportError)):
        check_line(line)
