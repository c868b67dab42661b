"""`--liger True`: what is fused computes the same, and is refused in one line where it cannot be had."""

import os
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import is_liger_kernel_available

from tests.test_family_contract import LAYERS, Tiny, pairs_of
from train.llava_hound_dpo import model as policy_model
from train.llava_hound_dpo.arguments import ModelArguments, TrainArguments
from train.llava_hound_dpo.model import FUSED, fuse, make_trainable, refuse_fused
from train.llava_hound_dpo.packing import pack
from train.llava_hound_dpo.scoring import score

CASES = [
    ("llava_interleave", "llava_interleave"), ("internvl", "internvl_llama"), ("internvl", "internvl_qwen3"),
]  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
can_run = is_liger_kernel_available() and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def step(own, is_fused, monkeypatch):
    """Log-probs, masses and gradients of LoRA of one row, with checkpointing."""
    base = own.model().to(DEVICE)
    language = base.get_submodule(f"model.{own.family.language}")
    modeling = import_module(type(language).__module__)
    for name in [name for name in vars(modeling) if "rotary" in name or name.endswith(("RMSNorm", "MLP"))]:
        monkeypatch.setattr(modeling, name, getattr(modeling, name))  # to be put back
    if is_fused:
        fuse(base, type(own.family))
        assert "LigerRMSNorm" in str(language) and "LigerSwiGLUMLP" in str(language)
    policy = make_trainable(base, type(own.family), ModelArguments("", lora_r=4)).train()
    generator = torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator).to(DEVICE)
    policy.activation_checkpointing_enable()
    pairs, pixels = pairs_of(own)
    pixels = {name: value.to(DEVICE) for name, value in own.family.join(pixels).items()}
    with torch.no_grad():
        features = own.family.encode(policy, pixels)
    scores = score(policy, pack(pairs, own.family.image_id).to(DEVICE), features, LAYERS)
    (scores.chosen.sum() - scores.rejected.sum() + 10 * scores.masses[..., 0].sum()).backward()
    gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    logps = torch.cat([scores.chosen, scores.rejected]).detach()
    return {"logps": logps, "masses": scores.masses.detach(), "gradients": gradients / gradients.norm()}


@pytest.mark.skipif(not can_run, reason="needs liger-kernel, and CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize(("module", "kind"), CASES, ids=[kind for _, kind in CASES])
def test_a_fused_step_is_the_plain_one(module, kind, tmp_path, monkeypatch):
    import_module(f"tests.tiny.{module}").write(tmp_path / "checkpoint", kind)
    own = Tiny(module, str(tmp_path / "checkpoint"))
    plain, fused = (step(own, is_fused, monkeypatch) for is_fused in (False, True))
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(fused["gradients"], plain["gradients"])


def config(text):
    return SimpleNamespace(model_type="some_vlm", get_text_config=lambda decoder: SimpleNamespace(model_type=text))


@pytest.mark.parametrize(("text", "has_liger", "has_cuda", "said"), [
    ("qwen2_5_vl_text", True, True, r"\(some_vlm\) is of type qwen2_5_vl_text: leave it out"),
    ("llama", False, True, "needs liger-kernel and triton, which are not installed"),
    ("llama", True, False, "needs a CUDA device"),
    ("llama", True, True, None),
])  # fmt: skip
def test_it_is_refused_before_weights(monkeypatch, text, has_liger, has_cuda, said):
    monkeypatch.setattr(policy_model, "is_liger_kernel_available", lambda: has_liger)
    monkeypatch.setattr(policy_model, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    if said is None:
        return refuse_fused(config(text))
    with pytest.raises(ValueError, match=f"--liger True.*{said}"):
        refuse_fused(config(text))


def test_each_language_model_that_is_not_refused_is_compared():
    kinds = {"llava_interleave": "qwen2", "internvl_llama": "llama", "internvl_qwen3": "qwen3"}
    assert {kinds[kind] for _, kind in CASES} == set(FUSED)


def test_it_is_off_and_the_flag_of_transformers_points_at_it(tmp_path):
    assert TrainArguments(output_dir=str(tmp_path)).liger is False
    with pytest.raises(ValueError, match=r"--use_liger_kernel.*--liger True"):
        TrainArguments(output_dir=str(tmp_path), use_liger_kernel=True)
