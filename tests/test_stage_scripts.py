"""The launch scripts of inference, AdaptViz and data generation, with stubs for python and torchrun (training's own is
in test_architecture)."""

import importlib
import re
import shutil

import pytest

from llava.command_line import Parser
from tests.test_architecture import ROOT, launch  # noqa: F401  a fixture

INFERENCE = ROOT / "inference/llava_hound_dpo/my_inference_hpc.sh"
ADAPTIVE = ROOT / "inference_optimization/llava_hound_dpo/my_inference_adaptive.sh"
INSTRUCTIONS = ROOT / "data_gen/gen_instruction/gen_instruction.sh"
PAIRS = ROOT / "data_gen/gen_chosen_rejected/gen_chosen_rejected.sh"
MODULES = {
    INFERENCE: "inference.llava_hound_dpo.run_inference",
    ADAPTIVE: "inference_optimization.llava_hound_dpo.run_adaptive",
    INSTRUCTIONS: "data_gen.gen_instruction",
    PAIRS: "data_gen.gen_chosen_rejected",
}
SCRIPTS = pytest.mark.parametrize("script", MODULES, ids=lambda path: path.name)


def flags_of(script, monkeypatch):
    """Every flag that the script's module takes."""
    found, name = [], MODULES[script]
    monkeypatch.setattr(Parser, "parse_args_into_dataclasses", lambda parser, *a, **k: found.append(parser) or 1 / 0)
    monkeypatch.setattr("sys.argv", [name])
    module = importlib.import_module(name if script in (INFERENCE, ADAPTIVE) else f"{name}.__main__")
    with pytest.raises(ZeroDivisionError):
        module.main()
    return {option.removeprefix("--") for action in found[0]._actions for option in action.option_strings}


@SCRIPTS
def test_flags_exist_and_trailing_ones_come_last(launch, script, monkeypatch):  # noqa: F811
    code, stderr, calls = launch("--seed", "7", script=script)
    assert code == 0, stderr
    call = calls[-1]
    assert call.words[call.words.index("-m") + 1] == MODULES[script] and call.words[-2:] == ["--seed", "7"]
    assert call.flags.keys() - {"standalone", "nproc_per_node"} <= flags_of(script, monkeypatch)


@SCRIPTS
def test_the_repository_is_found_from_a_spool_copy(launch, script, tmp_path):  # noqa: F811
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = shutil.copy(script, spool / "slurm_script")
    code, stderr, calls = launch(script=copy, SLURM_SUBMIT_DIR=str(script.parent))
    assert code == 0 and calls[-1].modules == str(ROOT), stderr
    code, stderr, calls = launch(script=copy, cwd=tmp_path)
    assert (code, calls) == (2, []) and "repository not found" in stderr


@SCRIPTS
def test_knobs_from_the_environment_arrive(launch, script):  # noqa: F811
    knobs = re.findall(r"^([A-Z]+)=\$\{\1:-", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"IMAGES", "OUTPUT"} <= set(knobs)
    own = {name: f"my {name}" for name in knobs}
    words = launch(script=script, **own)[2][-1].words
    assert set(own.values()) <= set(words)


@pytest.mark.parametrize("script", [INFERENCE, ADAPTIVE, PAIRS], ids=lambda path: path.name)
def test_one_process_needs_no_torchrun_several_do(launch, script):  # noqa: F811
    assert launch(script=script)[2][-1].program == "python"
    several = launch(script=script, NPROC="3")[2][-1]
    assert several.program == "torchrun" and several.flags["nproc_per_node"] == "3"


def test_scope_and_config_of_adaptviz_are_passed_only_if_given(launch):  # noqa: F811
    flags = launch(script=ADAPTIVE)[2][-1].flags
    assert not {"scope", "config"} & flags.keys()
    flags = launch(script=ADAPTIVE, SCOPE="balance", CONFIG="tuned.json")[2][-1].flags
    assert (flags["scope"], flags["config"]) == ("balance", "tuned.json")


@SCRIPTS
def test_scripts_are_short_and_hold_no_site_fact(script):
    text = script.read_text(encoding="utf-8")
    assert not re.search(r"#SBATCH.*(account|partition|mail|-A |-p )|@", re.sub(r'"\$@"|\[@\]', "", text))
    assert len(text.splitlines()) <= 40
