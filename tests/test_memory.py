"""Memory of a step: the estimate against an audit's figures, against the real code on shapes alone, and by hand."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench.memory import on_shapes, peak, step, untrained
from tests.test_costs import BLOCKS, LORA_128, config_7b, pair_of  # noqa: F401  a fixture
from tests.test_family_contract import pairs_of, tiny  # noqa: F401  a fixture
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments
from train.llava_hound_dpo.costs import PairShape, Recipe, count, filling_flops, hours, work
from train.llava_hound_dpo.memory import GIB, Kept, Memory, Numbers, Row, Zero, activation_bytes, estimate_memory
from train.llava_hound_dpo.packing import pack

ROOT = Path(__file__).resolve().parent.parent
PROBED = tuple(range(14, 23))
LORA = Kept(rank=128, probed=PROBED)

# ---- activations

# An audit's peaks of the real code at 7B on tensors without numbers, by PyTorch's CUDA build: GiB of all activations.
AUDIT = {
    "5 images": (3089, 150, LORA, 1.47),
    "answers of 200": (3339, 400, LORA, 1.59),
    "4 images": (2513, 150, LORA, 1.20),
    "4 pairs of 2 images": (5444, 600, LORA, 2.59),
    "6 pairs of 2 images": (8166, 900, LORA, 3.89),
    "no checkpointing": (3089, 150, Kept(False, 128, PROBED), 17.3),
    "full fine-tuning": (3089, 150, Kept(probed=PROBED), 1.51),
    "fp32 adapter under autocast": (3089, 150, Kept(rank=128, probed=PROBED, casts_adapter=True), 1.77),
}


@pytest.mark.parametrize(("tokens", "answers", "kept", "gib"), AUDIT.values(), ids=AUDIT)
def test_the_audit_of_7b(config_7b, tokens, answers, kept, gib):  # noqa: F811
    assert activation_bytes(config_7b, Row(tokens, answers, 5 * 577), kept) / GIB == pytest.approx(gib, rel=0.05)


def test_the_audit_of_13b(config_7b):  # noqa: F811
    config, kept = copy.deepcopy(config_7b), Kept(rank=128, probed=tuple(range(18, 29)))
    config.text_config.update({"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40,
                               "num_key_value_heads": 40, "head_dim": 128, "intermediate_size": 13824})  # fmt: skip
    assert activation_bytes(config, Row(3089, 150), kept) / GIB == pytest.approx(2.08, rel=0.05)


def batch_of(own):
    """A row of four pairs with its pixels, and what of it decides the memory."""
    pairs, pixels = pairs_of(own)
    row = pack(pairs * 2, own.family.image_id)
    return {"row": row, "pixels": own.family.join(pixels * 2)}, Row(row.input_ids.shape[1], len(row.labels))


@pytest.mark.parametrize(
    ("module", "kind", "rank", "checkpointing"),
    [
        ("qwen_vl", "qwen2_5_vl", 16, True), ("qwen_vl", "qwen3_vl", 16, False), ("qwen_vl", "qwen3_vl_moe", 16, True),
        ("qwen_vl", "qwen3_vl_moe", 0, False), ("internvl", "internvl_llama", 0, False),
    ],
)  # fmt: skip
def test_the_real_code_of_other_families(tiny, module, kind, rank, checkpointing):  # noqa: F811
    """Grouped heads, norms of queries and keys, experts; a tiny width has more beside than a real one."""
    own = tiny(module, kind)
    batch, row = batch_of(own)
    arguments = ModelArguments("m", lora_r=rank) if rank else ModelArguments("m", lora_enable=False)
    layers = LossArguments().layers(own.family.config.get_text_config().num_hidden_layers)
    estimate = activation_bytes(own.family.config, row, Kept(checkpointing, rank, tuple(layers)))
    assert estimate == pytest.approx(peak(own.family, batch, arguments, checkpointing), rel=0.1)


@pytest.mark.parametrize("rank", [16, 0])
def test_flops_of_a_step_with_checkpointing(tiny, rank):  # noqa: F811
    """Of the linear layers behind the pictures, as PyTorch counts them: full fine-tuning recomputes no last layer."""
    own = tiny("internvl", "internvl_llama")
    (batch, row), config = batch_of(own), own.family.config
    arguments = ModelArguments("m", lora_r=rank) if rank else ModelArguments("m", lora_enable=False)
    policy = untrained(own.family, arguments)
    base = policy.get_base_model() if rank else policy
    seen = products(policy, lambda: step(policy, own.family, batch, bool(rank)))
    seen -= products(policy, lambda: own.family.encode(base, batch["pixels"]))
    lora = sum(p.numel() for name, p in policy.named_parameters() if "lora_" in name)
    shape = PairShape(row.tokens - row.answers, row.answers, (), 0, ())
    costs = replace(count(config), attended=0)
    assert work(costs, [shape], Recipe("step" if rank else "none", lora, bool(rank))).total == pytest.approx(seen, 0.01)


def products(policy, run):
    """FLOPs of the matrix products of linear layers in what runs."""
    with FlopCounterMode(display=False) as counter, on_shapes(policy):
        run()
    return sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(name))


# ---- weights, optimiser, DeepSpeed

# ALL weights of LLaVA-1.5-7B and of its language model with the head, which full fine-tuning trains.
ALL, TRAINED = 7_063_427_072, 6_738_939_904


@pytest.mark.parametrize(
    ("name", "rank", "checkpointing", "tokens", "config"),
    [
        ("LoRA, ZeRO-2, no checkpointing, rows of 8,192 tokens", 128, False, 8192, "zero2"),
        ("LoRA, ZeRO-2, checkpointing, a pair a row", 128, True, 3090, "zero2"),
        ("full fine-tuning, ZeRO-3, checkpointing, a pair a row", 0, True, 3090, "zero3"),
    ],
)
def test_the_planning_table_of_the_docs(config_7b, name, rank, checkpointing, tokens, config):  # noqa: F811
    """27,000 pairs of 1 to 5 pictures, as of the published analysis, three epochs at 40 % of an A100's peak."""
    costs, lora = count(config_7b), LORA_128 if rank else 0
    shapes = [pair_of(images) for images in range(1, 6)] * 5400
    recipe = Recipe("step" if rank else "cache", lora, bool(rank), checkpointing, probed_layers=9)
    total = 3 * work(costs, shapes, recipe).total + (0 if rank else filling_flops(costs, shapes))
    numbers = Numbers(ALL + lora, lora or TRAINED)
    row, cells = Row(tokens, round(tokens * 150 / 786)), [name, f"{total / 1e18:.1f}"]
    for gpus in (2, 8, 64):
        memory = estimate_memory(config_7b, numbers, row, Kept(checkpointing, rank, PROBED), zero(config), gpus)
        cells.append(f"{hours(total, gpus, 0.4):.3g} h, {memory.device / GIB:.1f} GiB")
    assert "| " + " | ".join(cells) + " |" in (ROOT / "docs/training.md").read_text(encoding="utf-8").splitlines()


def zero(name):
    return Zero.read(str(ROOT / "scripts" / f"{name}.json"))


def test_deepspeed_configs_are_read():
    assert Zero.read(None) == Zero.read("") == Zero()
    assert [zero(name).stage for name in ("zero2", "zero3", "zero3_offload")] == [2, 3, 3]
    assert not (zero("zero3").offloads_parameters or zero("zero3").offloads_optimizer)
    assert zero("zero3_offload").offloads_parameters and zero("zero3_offload").offloads_optimizer


def test_the_offloading_config_is_zero3_but_for_the_offloading():
    plain, offloading = (
        json.loads((ROOT / "scripts" / f"{name}.json").read_text()) for name in ("zero3", "zero3_offload")
    )
    moved = {name: offloading["zero_optimization"].pop(name) for name in ("offload_param", "offload_optimizer")}
    assert offloading == plain and {entry["device"] for entry in moved.values()} == {"cpu"}


def memory(config, zero, **changes):
    settings = {"numbers": Numbers(ALL, TRAINED, BLOCKS), "row": Row(3090, 150), "kept": Kept(), "world": 8}
    return estimate_memory(config, zero=zero, **settings | changes)


def test_memory_of_full_fine_tuning_by_hand(config_7b):  # noqa: F811
    """Per trained weight: 4 bytes of gradient, 4 of master copy, 8 of moments; of DDP another 4 in its buckets, and as
    the weight itself is the master copy, 2 more than it has in bf16."""
    alone, two, three, offloaded = (
        memory(config_7b, setting) for setting in (Zero(), zero("zero2"), zero("zero3"), zero("zero3_offload"))
    )
    assert (alone.weights, alone.gradients_and_optimizer) == (2 * ALL, (4 + 4 + 8 + 2) * TRAINED)
    assert memory(config_7b, Zero(), world=1).gradients_and_optimizer == (4 + 8 + 2) * TRAINED
    assert (two.weights, two.gradients_and_optimizer) == (2 * ALL, 16 * TRAINED / 8)
    assert (three.weights, three.gradients_and_optimizer) == (2 * ALL / 8, 16 * TRAINED / 8)
    in_bf16 = Zero(2, fp32_gradients=False)
    assert memory(config_7b, in_bf16).gradients_and_optimizer == 14 * TRAINED / 8
    assert memory(config_7b, Zero(1)).gradients_and_optimizer == (4 + 12 / 8) * TRAINED
    # A step's fp32 gradients, joined: of all, or of a sub-group; they are more than activations here.
    assert (alone.update, two.update, three.update) == (0, 4 * TRAINED / 8, 4 * TRAINED / 8)
    assert memory(config_7b, zero("zero3"), world=2).update == 4e9 and offloaded.update == 0
    assert two.device == two.weights + two.gradients_and_optimizer + two.update
    assert three.gathered == 2 * 1e9 and two.gathered == 0
    assert (offloaded.weights, offloaded.gradients_and_optimizer) == (0, 0)
    assert offloaded.host == three.weights + three.gradients_and_optimizer
    assert offloaded.device == offloaded.gathered + offloaded.activations
    assert len({m.activations for m in (alone, two, three, offloaded)}) == 1
    assert alone.host == two.host == three.host == 0


@pytest.mark.parametrize(("bits", "per_weight"), [(16, 2.0), (8, 1.0), (4, 4.127 / 8)])
def test_memory_of_a_quantised_base(config_7b, bits, per_weight):  # noqa: F811
    """Only the blocks are quantised; nf4 with quantised constants is known to take 4.127 bits (arXiv 2305.14314)."""
    found = memory(config_7b, Zero(), numbers=Numbers(ALL, LORA_128, BLOCKS), bits=bits)
    assert found.weights == pytest.approx((ALL - BLOCKS) * 2 + BLOCKS * per_weight, rel=1e-4)


def test_memory_adds_up():
    assert str(Memory(2 * GIB, GIB, GIB / 2, GIB / 4)) == (
        "3.50 GiB (weights 2.00, gradients and optimizer 1.00, activations 0.50)"
    )
    assert str(Memory(GIB, 0, GIB, 2 * GIB)) == "3.00 GiB (weights 1.00, update 2.00)"
    assert str(Memory(0, 0, GIB, gathered=GIB, host=3 * GIB)).endswith("and 3.00 GiB of the CPU's")
