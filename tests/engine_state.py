"""Small DeepSpeed engines that save their states, or read them with other processes and compare them: for torchrun.

`torchrun --nproc_per_node=N -m tests.engine_state save|load FOLDER`, all of CASES in one launch: most of it is imports
"""

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from llava.runtime import leave, without_compiler
from train.llava_hound_dpo.checkpoints import MASTER, STATE, _read, _trained, load_state, save_state

CASES = [(2, "bf16"), (3, "bf16"), (3, "fp32")]  # ZeRO stage, precision


def build(stage, precision):
    """Sizes that neither two nor three processes divide, two groups of the optimiser, and a frozen layer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 11), torch.nn.Linear(11, 1))
    model[1].requires_grad_(False)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    groups = [{"params": list(model[0].parameters()), "lr": 0.1}, {"params": list(model[2].parameters()), "lr": 0.2}]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}, "gradient_clipping": 1.0,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def step(engine, number):
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(4, 5, generator=generator).to(next(engine.module.parameters()).dtype)
    engine.backward(engine(inputs).square().mean())
    engine.step()


def contents(engine):
    """Every parameter and state, whole, and the parameters in the training precision."""
    found = {
        f"{key}/{n}": _read(p, key).clone() for n, p in _trained(engine) for key in (MASTER, "exp_avg", "exp_avg_sq")
    }
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[f"trained/{name}"] = parameter.detach().clone()
    return found


def main(what, folder):
    without_compiler()
    deepspeed.init_distributed(dist_backend="gloo")
    for stage, precision in CASES:
        case = Path(folder) / f"zero{stage}_{precision}"
        case.mkdir(exist_ok=True)
        engine = build(stage, precision)
        try:
            save(engine, case) if what == "save" else load(engine, case, precision)
        except Exception as error:
            raise AssertionError(f"{case.name}: {error}") from error
        if torch.distributed.get_rank() == 0:
            (case / f"{what}.done").touch()
    leave()


def save(engine, folder):
    for number in range(3):
        step(engine, number)
    for group, rate in zip(engine.optimizer.optimizer.param_groups, (0.01, 0.02), strict=True):
        group["lr"] = rate  # as a schedule does
    save_state(engine, folder / STATE)
    before = contents(engine)
    step(engine, 3)
    after = contents(engine)
    if torch.distributed.get_rank() == 0:
        save_file(before, folder / "before.safetensors")
        save_file(after, folder / "after.safetensors")


def load(engine, folder, precision):
    load_state(engine, folder / STATE)
    found = contents(engine)
    expected = load_file(folder / "before.safetensors")
    assert found.keys() == expected.keys() and engine.global_steps == 3
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    step(engine, 3)
    after = load_file(folder / "after.safetensors")
    rounding = 1e-6 if precision == "fp32" else 2e-3  # of gradients averaged over two and three; steps are 1e-2
    for name, tensor in contents(engine).items():
        torch.testing.assert_close(tensor, after[name], atol=rounding, rtol=1e-5, msg=name)
        assert not torch.equal(tensor, expected[name]) or name.startswith("trained/1.")


if __name__ == "__main__":
    main(*sys.argv[1:])
