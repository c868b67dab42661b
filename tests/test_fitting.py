"""What is decided by estimates of memory: checkpointing, tokens of a row; and the warnings where something is short."""

from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest

from tests.test_costs import LORA_128, config_7b, pair_of  # noqa: F401  a fixture
from train.llava_hound_dpo import fitting
from train.llava_hound_dpo.fitting import Needs, choose, describe_room
from train.llava_hound_dpo.memory import GIB, Kept, Numbers, Zero

LORA, FULL = Numbers(7_060_000_000 + LORA_128, LORA_128), Numbers(7_060_000_000, 6_750_000_000)
ZERO_2 = Zero(2)
Usage = namedtuple("Usage", "free")


@pytest.fixture
def run(config_7b):  # noqa: F811
    """(arguments, needs) of LoRA on 7B under ZeRO-2, with pairs of up to so many pictures, as resolved from flags."""

    def make(images=5, checkpointing="auto", tokens=None, zero=ZERO_2, numbers=LORA):
        args = SimpleNamespace(
            chooses_checkpointing=checkpointing == "auto", activation_checkpointing=checkpointing is not False,
            tokens_per_batch=tokens, output_dir="out", save_strategy="steps", save_total_limit=3,
        )  # fmt: skip
        kept = Kept(args.activation_checkpointing, 128 if numbers.trained == LORA_128 else 0, tuple(range(14, 23)))
        shapes = [pair_of(n) for n in range(1, images + 1)]
        return args, Needs(config_7b, numbers, kept, zero, 16, shapes)

    return make


def chosen(args, needs, gib, world=2):
    """(checkpointing, tokens of a row, what is said) on GPUs of so many GiB."""
    said = choose(args, lambda: needs, world, gib and gib * GIB)
    return args.activation_checkpointing, args.tokens_per_batch, said


@pytest.mark.parametrize(
    ("gib", "images", "is_on", "tokens"),
    [
        (80, 5, False, 8192),  # 17 GiB of activations beside 16 of weights; rows of 8,192 tokens take 46
        (40, 5, False, None),  # they fit just so: larger rows than the longest pair's hardly do
        (32, 5, True, 8192),
        (24, 5, True, 8192),
        (22, 5, True, None),
        (40, 1, False, None),
    ],
)
def test_what_fits(run, gib, images, is_on, tokens):
    args, needs = run(images)
    found, size, said = chosen(args, needs, gib)
    assert found is is_on and needs.longest().tokens <= size <= 8192 and size == (tokens or size)
    fits = needs.memory(needs.of_tokens(size), 2, is_on).device + 3 * GIB
    assert fits <= gib * GIB or size == needs.longest().tokens
    if tokens is None and size > needs.longest().tokens:
        assert needs.memory(needs.of_tokens(size + 256), 2, is_on).device + 3 * GIB > gib * GIB
    without = needs.memory(needs.longest(), 2, False).device / GIB
    assert said["checkpointing"].startswith("on" if is_on else "off") and f"{without:.1f} GiB" in said["checkpointing"]
    assert f"{size:,} tokens" in said["row size"]


def test_given_flags_are_left_alone(run):
    for checkpointing in (True, False):
        for tokens in (0, 4000):
            assert chosen(*run(2, checkpointing, tokens), gib=80) == (checkpointing, tokens, {})


def test_a_cpu_recomputes_and_has_rows_of_pairs(run):
    args, _ = run()
    said = choose(args, partial(pytest.fail, "nothing is estimated"), 2, None)
    assert (args.activation_checkpointing, args.tokens_per_batch) == (True, 0)
    assert said["checkpointing"].startswith("on: there is no GPU")


def test_the_longest_pair_that_does_not_fit_is_a_warning_with_what_to_change(run, caplog):
    assert chosen(*run(), gib=16)[:2] == (True, run()[1].longest().tokens)
    (line,) = caplog.messages
    assert all(word in line for word in ("3,090 tokens", "16.0 GiB", "zero3.json", "--bits 4", "--model_max_length"))
    caplog.clear()
    chosen(*run(), gib=80)
    assert not caplog.messages


def test_rows_of_tokens_are_of_the_pairs_with_the_most_answers(run):
    needs = run()[1]
    row = needs.of_tokens(7860)
    assert row.answers == 1500 and row.patches == pytest.approx(7860 * 2885 / 3090, abs=1)
    assert needs.longest(2).tokens == 3090 + 2514 and needs.longest(2).answers == 300


def test_offloading_needs_the_memory_of_a_node(run, monkeypatch, caplog):
    """16 bytes of optimiser and gradients a weight, and 2 of weights, shared out: 115 GiB of two processes."""
    args, needs = run(zero=Zero(3, True, True), numbers=FULL)
    own = needs.memory(needs.longest(), 2)
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(fitting.shutil, "disk_usage", lambda _: Usage(1000 * GIB))
    for allowed, warned in ((200, 0), (64, 1)):
        monkeypatch.setattr(fitting, "host_memory", lambda allowed=allowed: allowed * GIB)
        rows = describe_room(args, needs, own, 2)
        assert "56.9 GiB a process, 113.7 GiB for 2 on this node" in rows["host memory"]
        assert len(caplog.messages) == warned
    assert "64.0 GiB" in caplog.text and "--mem" in caplog.text


def test_checkpoints_and_the_disk(run, monkeypatch, caplog):
    """12 bytes a trained weight and 2 of each weight, of LoRA its own: three, and a fourth before the first goes."""
    for numbers, gib, free, warned in ((FULL, 88.6, 400, 0), (FULL, 88.6, 300, 1), (LORA, 4.2, 300, 0)):
        monkeypatch.setattr(fitting.shutil, "disk_usage", lambda _, free=free: Usage(free * GIB))
        args, needs = run(numbers=numbers)
        caplog.clear()
        rows = describe_room(args, needs, needs.memory(needs.longest(), 2), 2)
        assert rows == {"checkpoints": f"{gib} GiB each, 3 kept"} and len(caplog.messages) == warned
    args.save_strategy = "no"
    assert describe_room(args, needs, needs.memory(needs.longest(), 2), 2) == {}
