"""The cache with room against transformers' own, and the probe on keys as they are stored."""

from unittest.mock import Mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, DynamicLayer

from llava import attention, cache, generation
from llava.cache import RoomyLayer, new_cache
from llava.generation import generate
from llava.scaling import Scale
from tests.test_generation import batch_of, prompts_of


def states(tokens, seed=0, rows=4):
    return torch.randn(2, rows, 3, tokens, 8, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs):
    return all(
        torch.equal(a, b)
        for one, two in zip(ours.layers, theirs.layers, strict=True)
        for a, b in ((one.keys, two.keys), (one.values, two.values))
    )


def test_it_holds_what_transformers_own_holds(monkeypatch):
    """Whatever happens to it: growth beyond its room, cropping, reordering, beams from rows, rows left out."""
    monkeypatch.setattr(cache, "ROOM", 3)
    both = new_cache(), DynamicCache()
    changes = [
        lambda c: c.crop(-1), lambda c: c.reorder_cache(torch.tensor([1, 1, 0, 2])), lambda c: c.crop(-2),
        lambda c: c.batch_repeat_interleave(2), lambda c: c.batch_select_indices(torch.tensor([7, 0, 3, 4])),
        lambda c: c.reset(),
    ]  # fmt: skip
    for number, tokens in enumerate((5, 1, 1, 1, 4, 1, 2, 3, 1, 1, 1, 6)):
        rows = 8 if number in (7, 8) else 4  # once every row stands there twice
        given = [own.update(*states(tokens, number + layer, rows), layer) for own in both for layer in (0, 1)]
        assert all(torch.equal(*pair) for pair in zip(given[0] + given[1], given[2] + given[3], strict=True))
        assert same(*both) and both[0].get_seq_length() == both[1].get_seq_length()
        if number % 2 == 0 and number < 2 * len(changes):
            for own in both:
                changes[number // 2](own)
            assert changes[number // 2] is changes[-1] or same(*both)


def test_a_token_copies_no_prompt():
    ours = new_cache()
    ours.update(*states(200), 0)
    place = ours.layers[0].keys.data_ptr()
    for token in range(cache.ROOM):
        ours.update(*states(1, token), 0)
        assert ours.layers[0].keys.data_ptr() == ours.layers[0]._whole[0].data_ptr() == place
    assert ours.get_seq_length() == 200 + cache.ROOM
    ours.update(*states(1), 0)
    assert ours.layers[0].keys.data_ptr() != place


def boost(confidence, batch):
    factor = torch.tensor([1.8, 1.0, 1.4])
    return Scale.of_last_row(factor, batch.regions[..., 0], batch.regions[..., 1] > 0)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("steer", [None, boost])
def test_answers_are_those_of_transformers_cache_to_the_bit(model, family, monkeypatch, beams, steer):
    monkeypatch.setattr(cache, "ROOM", 4)  # grows on the way
    found = []
    for kind in (RoomyLayer, DynamicLayer):
        monkeypatch.setattr(generation, "new_cache", lambda kind=kind: Cache(layer_class_to_replicate=kind))
        answers = generate(
            model, family, batch_of(family, prompts_of(model)), [1, 2], steer, max_new_tokens=10, num_beams=beams
        )
        found.append([(a.tokens, a.confidence, a.perplexity, a.masses.tolist()) for a in answers])
    assert found[0] == found[1] and max(len(tokens) for tokens, *_ in found[0]) > 4


def grouped(dtype=torch.bfloat16):
    """Query of 6 heads and 2 rows, cache of 2 heads and 50 tokens."""
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 6, 2, 16), (2, 2, 50, 16)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes]


@pytest.mark.parametrize("kind", ["scores", "output"])
def test_bf16_read_as_stored_is_fp32_math(monkeypatch, kind):
    """What CUDA does in one call is done here on the very operands of that call, which must be bf16."""
    query, cached = grouped()
    rows = query if kind == "scores" else torch.rand(2, 6, 2, 50).softmax(dim=-1)
    exact = attention.times_cached(rows, cached, is_transposed=kind == "scores")
    wide = cached.double().repeat_interleave(3, dim=1)
    expected = rows.double() @ (wide.transpose(2, 3) if kind == "scores" else wide)
    torch.testing.assert_close(exact.double(), expected, atol=1e-5, rtol=1e-6)
    operands = []
    monkeypatch.setattr(attention, "reads_bf16", lambda cached: True)
    monkeypatch.setattr(
        attention, "product_in_fp32", lambda a, b: operands.append((a, b)) or (a.double() @ b.double()).float()
    )
    stored = attention.times_cached(rows, cached, is_transposed=kind == "scores")
    torch.testing.assert_close(stored, exact, atol=1e-5, rtol=1e-6)
    ((left, right),) = operands
    assert left.dtype == right.dtype == torch.bfloat16 and right.shape[0] == 2 * 2
    assert right.untyped_storage().data_ptr() == cached.untyped_storage().data_ptr()


class Made(TorchDispatchMode):
    """Notes the tensors in memory of their own that operations make."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.found.append((func.overloadpacket.__name__, out.dtype, out.numel()))
        return out


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("function", ["_probed", "_scaled"])
def test_on_a_gpu_no_copy_of_the_cache_is_made(monkeypatch, function, on_gpu):
    """The operations of a GPU's path on tensors without numbers; on the CPU's path the same count finds the copies."""
    if "dtype" not in torch.ops.aten.bmm.overloads():
        pytest.skip("torch below 2.8 has no product of bf16 into fp32")
    if on_gpu:
        monkeypatch.setattr(attention, "reads_bf16", lambda cached: True)
    with FakeTensorMode(), torch.no_grad():
        query, room = (torch.empty(2, h, k, 64, dtype=torch.bfloat16) for h, k in ((8, 1), (2, 3020)))
        key, regions, no = room[:, :, :3000], torch.empty(2, 2900, 2), torch.zeros(1, dtype=torch.bool)
        scale = Scale(regions[:, :1, 0], regions[:, None, :, 0], regions[..., 1] > 0, no, no, keeps_any=False)
        plan = attention.Plan(probe=attention.Probe(regions, frozenset({0})), scale=scale)
        with Made() as made:
            if function == "_probed":
                mass = attention._probed(query, key, None, None, plan)
            else:
                mass = attention._scaled(query.transpose(1, 2), query, key, key, None, None, plan, 0, True)[1]
    assert mass.dtype == torch.float32 and mass.shape == (2, 8, 1, 2)
    assert any(size >= key.numel() for _, _, size in made.found) != on_gpu
    assert {"bmm"} <= {name for name, dtype, _ in made.found if dtype == torch.float32}


@pytest.mark.parametrize(("is_cuda", "dtype", "read"), [
    (True, torch.bfloat16, True), (False, torch.bfloat16, False), (True, torch.float32, False),
])  # fmt: skip
def test_bf16_on_a_gpu_alone_is_read_as_stored(monkeypatch, is_cuda, dtype, read):
    cached = Mock(spec=torch.Tensor, is_cuda=is_cuda, dtype=dtype)
    overloads = torch.ops.aten.bmm.overloads()
    with torch.no_grad():
        assert attention.reads_bf16(cached) == (read and "dtype" in overloads)
        monkeypatch.setattr(torch.ops.aten.bmm, "overloads", lambda: ["default", "out"])  # as torch 2.6 has it
        assert not attention.reads_bf16(cached)


def test_the_attention_function_switches_cudnn_off(model):
    torch.backends.cuda.enable_cudnn_sdp(True)
    attention.install(model)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
