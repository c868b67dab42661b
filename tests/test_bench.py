"""The training benchmarks: what they compare computes the same, and their commands run."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from scripts.bench import adaptviz, collage, common, flops, inference, scaling, training
from scripts.bench.memory import MIB, peak
from scripts.bench.pairs import Shape, add_lora, build_pairs
from scripts.bench.steps import NAMES, build_steps, difference
from tests.conftest import SIDE, tiny_model

SHAPE = Shape(images=2, chosen=7, rejected=4, count=3, side=(SIDE, SIDE))


@pytest.fixture
def pairs(processor, tmp_path):
    return build_pairs(tmp_path / "data", SHAPE, tiny_model(processor).config, processor)


@pytest.fixture
def steps(processor, pairs, tmp_path):
    """Every way of the benchmark on the miniature, with the same three pairs."""
    build = partial(tiny_model, processor)
    found = build_steps(NAMES, add_lora(build(), rank=4), build, pairs, tmp_path)
    for step in found.values():
        step.load(pairs)
    return found


def test_all_compute_the_same_loss_and_gradients(steps):
    losses, gradients = {}, {}
    for name, step in steps.items():
        losses[name], gradients[name] = step().item(), step.gradients()
    assert losses["eager"] == pytest.approx(losses["ours"], rel=1e-5)
    assert losses["trl"] == pytest.approx(losses["plain"], rel=1e-5)
    assert difference(gradients["ours"], gradients["eager"]) < 1e-4
    assert difference(gradients["plain"], gradients["trl"]) < 1e-4
    # The two kinds do differ, so that the above says something of the attention term as well.
    assert losses["ours"] > losses["plain"] + 0.01
    assert difference(gradients["ours"], gradients["plain"]) > 0.01
    assert all(len(own) == 2 * 7 * 4 for own in gradients.values())  # A and B of 7 layers of 4 blocks


def test_a_step_does_not_add_to_the_one_before(steps):
    first, again = [(steps["ours"]().item(), steps["ours"].gradients()) for _ in range(2)]
    assert first[0] == again[0] and difference(first[1], again[1]) == 0


def test_all_are_checkpointed(steps):
    """A block's forward runs again in the backward pass: three times with the reference's."""
    for name, step in steps.items():
        calls = []
        block = step.policy.get_base_model().model.language_model.layers[0].mlp
        handle = block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        step()
        handle.remove()
        assert len(calls) == 3, name


def test_a_precomputed_reference_changes_nothing(steps, tmp_path):
    step = steps["ours"]
    loss, gradients = step().item(), step.gradients()
    training.precompute(step, tmp_path / "cache")
    assert step().item() == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, step.gradients()) < 1e-5


def test_gradients_of_other_weights_are_not_compared():
    with pytest.raises(ValueError, match="different weights"):
        difference({"a": torch.ones(1)}, {"b": torch.ones(1)})


@pytest.mark.parametrize(
    ("images", "separate", "packed", "separate_cached", "packed_cached"),
    [(1, 77.9, 42.1, 58.0, 31.7), (3, 210.9, 107.1, 157.4, 81.0), (5, 351.5, 176.0, 263.0, 133.4)],
)
def test_operations_of_a_7b_step(images, separate, packed, separate_cached, packed_cached):
    """TFLOP per pair of answers of 75 tokens, counted by hand for LLaVA-1.5-7B when the method was designed."""
    shape, config = Shape(images, chosen=75, rejected=75), common.config_of("7b")
    ours, theirs = flops.forward(config, shape), flops.forward(config, shape, packed=False, every_row=True)
    # Two rows: policy and reference encode the pictures of both; with precomputed log-probs the policy alone.
    found = [flops.step(theirs, 2), flops.step(ours, 1), flops.step(theirs, 1, True), flops.step(ours, 1, True)]
    expected = [separate, packed, separate_cached, packed_cached]
    assert [value / 1e12 for value in found] == pytest.approx(expected, abs=0.15)


def test_operations_are_those_that_pytorch_counts():
    """Linear layers of a forward, against torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    model = common.build("tiny", torch.device("cpu"), torch.float32)
    shape = Shape(images=1, chosen=5, rejected=5)
    one = flops.forward(model.config, shape, text=14)
    batch = common.batch_of([1], 18, 0)  # with four words and a number at the image: 24 that are not of it
    assert batch.input_ids.shape[1] == 576 + 14 + 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch.input_ids, pixel_values=batch.pixel_values, logits_to_keep=10)
    counts = counter.get_flop_counts()
    head = sum(counts["LlavaForConditionalGeneration.lm_head"].values())
    linear = sum(n for op, n in counts["LlavaForConditionalGeneration.model.language_model"].items() if "mm" in str(op))
    assert (linear, head) == (one.linear, one.output)


def test_peak_memory_is_what_a_step_holds_at_once():
    """24 MiB kept while 40 MiB come and go twice: 64 MiB at most."""

    def run():
        kept = torch.ones(24 * MIB // 4)
        for _ in range(2):
            torch.ones(40 * MIB // 4).sum()
        return kept.sum()

    class Fake:
        policy = SimpleNamespace(zero_grad=lambda: None)

        def __call__(self):
            return run()

    assert peak(Fake()) / MIB == pytest.approx(64, abs=4)


def test_the_commands_write_their_tables(tmp_path, monkeypatch):
    """All but scaling, smaller than small; memory, which takes processes of its own, is made up."""
    results = tmp_path / "RESULTS.md"
    monkeypatch.setattr(common, "RESULTS", results)
    monkeypatch.setattr(training, "measure", lambda name, size, images: {n: MIB * len(name) for n in images})
    flags = ["--size", "tiny", "--images", "1", "--repeats", "1", "--only", "step", "attention", "reference", "loader"]
    monkeypatch.setattr("sys.argv", ["training", *flags])
    training.main()
    text = results.read_text()
    assert text.count("\n## ") == 5 and "out of memory" not in text
    step, term = (text.split(f"## {title}")[1] for title in ("Training step: peak", "The attention term"))
    assert "| 1 | 4.0 | 5.0 | 3.0 | 5.0 | 0.75 | 1.25 |" in step and "| 4.0 | 5.0 | 0.80 |" in term


def test_the_loop_counts_its_pairs(tmp_path, monkeypatch, capsys, processor):
    """Pairs per second of the worker: those of the counted steps over the time between their ends."""
    now = iter(range(0, 1000, 2))  # two seconds a step
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(
        "sys.argv", ["scaling", "--size", "tiny", "--images", "1", "--accumulation", "2", "--steps", "4"]
    )
    scaling.main()
    assert capsys.readouterr().out.splitlines()[-1] == "pairs per second: 1.0"  # two pairs a step


def test_a_process_that_fails_is_not_a_rate():
    with pytest.raises(RuntimeError, match="ended before it trained, with code 2"):
        scaling.alone(1, "tiny", "--images", "none")


@pytest.mark.slow
def test_scaling_runs_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr("sys.argv", ["training", "--only", "scaling", "--size", "tiny", "--repeats", "1"])
    training.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| 2 processes, DDP |" in text and "| 300 |" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["speed", "--repeats", "1", "--prompts", "1"], "collages per second and core: "),
        pytest.param(["memory", "--records", "20", "40"], "40", marks=pytest.mark.slow),
    ],
)
def test_the_bench_of_data_generation_writes_its_table(tmp_path, monkeypatch, flags, said):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr("sys.argv", ["collage", *flags])
    collage.main()
    assert said in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("bench", [adaptviz, inference])
def test_the_benches_of_answering_write_their_tables(tmp_path, monkeypatch, bench):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr("sys.argv", ["bench", "--size", "tiny", "--repeats", "1"])
    bench.main()
    assert "\n## " in (tmp_path / "RESULTS.md").read_text()
