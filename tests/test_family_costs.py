"""FLOPs that the plan counts from the shapes of weights, against PyTorch's own counter on models that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.test_family_contract import each_family, tiny  # noqa: F401  a fixture
from train.llava_hound_dpo.costs import PairShape, count

SIZES = [(200, 150), (90, 60)]  # px


@torch.no_grad()
def counted(forward, *given, **named):
    with FlopCounterMode(display=False, depth=None) as counter:
        forward(*given, **named)
    return counter.get_total_flops()


@each_family
def test_pictures_and_tokens_cost_what_pytorch_counts(tiny, module, kind):  # noqa: F811
    """Pictures within a tenth (small windows and class tokens are left out), the language model exactly."""
    own = tiny(module, kind)
    family, model, costs = own.family, own.stock(), count(own.checkpoint.config)
    model.set_attn_implementation("eager")
    ids, images, _, pixels, _ = own.prompt(SIZES)
    patches = tuple(piece for size in SIZES for piece in family.patches(size, len(SIZES)))
    shape = PairShape(len(ids) - 1, 3, (), sum(len(image.areas) for image in images), patches)
    seen = counted(family.encode, model, pixels)
    assert costs.tower(shape) + costs.projector(shape) == pytest.approx(seen, rel=0.1)
    language = model.get_submodule(f"model.{family.language}")
    few, many = (counted(language, inputs_embeds=torch.randn(1, n, 64), use_cache=False) for n in (8, 16))
    attended = (many - 2 * few) / (16**2 - 2 * 8**2)
    assert attended == costs.attended
    if "moe" in kind:  # whose experts the counter does not see: two of four, of three matrices each
        assert costs.token == pytest.approx(2 * 4 * (64 * (64 + 32 + 32 + 64) + 2 * 3 * 64 * 32))
    else:
        assert (few - attended * 8**2) / 8 == costs.token
