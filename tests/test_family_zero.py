"""Every family under DeepSpeed on two CPU processes: what ZeRO-2 computes, ZeRO-3 computes, projector and all."""

from importlib import import_module

import pytest

from tests.test_family_commands import ONE_EACH, history, training, world  # noqa: F401  a fixture
from tests.test_family_contract import CASES, Tiny
from tests.test_launch import run, torchrun

pytestmark = pytest.mark.slow
FLAGS = {"projector": ["--freeze_mm_mlp_adapter", "False"], "full": ["--lora_enable", "False"]}
DENSE = [*(case for case in ONE_EACH if "moe" not in case[1]), ("qwen_vl", "qwen2_5_vl"), ("qwen_vl", "qwen3_vl")]


def losses(kind, module, world, tmp_path, stage, more):  # noqa: F811
    folder = tmp_path / "base"
    if not folder.exists():
        import_module(f"tests.tiny.{module}").write(folder, kind)
    words = training(Tiny(module, str(folder)), world, tmp_path / stage, "--gamma", "0.5", *more)
    words[words.index("--per_device_train_batch_size") + 1] = 2
    code, _, errors = run(torchrun(2, *map(str, words), "--deepspeed", f"scripts/{stage}.json"))
    assert code == 0, errors[-3000:]
    return [(log["losses/dpo"], log["logps/chosen"], log["losses/total"]) for log in history(tmp_path / stage)]


@pytest.mark.parametrize("trained", FLAGS)
@pytest.mark.parametrize(("module", "kind"), DENSE, ids=[kind for _, kind in DENSE])
def test_zero_2_and_3_compute_the_same(world, tmp_path, module, kind, trained):  # noqa: F811
    second, third = (losses(kind, module, world, tmp_path, f"zero{stage}", FLAGS[trained]) for stage in (2, 3))
    assert second[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert [value for step in second for value in step] == pytest.approx(
        [value for step in third for value in step], abs=1e-4
    )
    assert second[1][2] < second[0][2]


def test_joined_experts_are_refused_under_zero_3_before_weights(world, tmp_path):  # noqa: F811
    module, kind = next(case for case in CASES if "moe" in case[1])
    import_module(f"tests.tiny.{module}").write(tmp_path / "base", kind)
    (tmp_path / "base/model.safetensors").unlink()
    words = training(Tiny(module, str(tmp_path / "base")), world, tmp_path / "out", "--deepspeed", "scripts/zero3.json")
    code, _, errors = run(torchrun(1, *map(str, words)))
    first = errors.splitlines()[0]  # what follows is torchrun's
    assert code != 0 and first.startswith("error: ") and first.endswith("use --deepspeed scripts/zero2.json")
