"""Which pairs form which step and row: the plan, its loader, and the loss of a step however it is split."""

import itertools
import os
import random
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import skip_first_batches
from transformers import TrainerCallback

from llava.records import DataError
from tests.test_trainer import make_trainer, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo.arguments import parse
from train.llava_hound_dpo.batches import BatchPlan, RowLoader, divide, epoch_steps, flags_for, make_plan
from train.llava_hound_dpo.checkpoints import COMPLETE, CheckpointError, check_optim, latest_checkpoint
from train.llava_hound_dpo.stopping import STOPPED, one_line_errors
from train.llava_hound_dpo.trainer import METRICS


def lengths(num_pairs, seed=0):
    """Packed tokens of pairs of one to five pictures."""
    rng = random.Random(seed)
    return [576 * rng.randint(1, 5) + rng.randint(60, 200) for _ in range(num_pairs)]


# (pairs, pairs per row, accumulation, processes, tokens per batch)
SIZES = [
    (24, 2, 2, 2, 0), (23, 1, 8, 1, 0), (23, 1, 4, 2, 0), (65, 1, 32, 2, 0), (5, 2, 2, 2, 0), (1, 1, 1, 2, 0),
    (9, 1, 64, 1, 0), (100, 4, 2, 3, 0), (100, 4, 2, 3, 4096), (23, 1, 8, 2, 3200), (64, 1, 8, 8, 9000),
    (3, 1, 4, 4, 8192),
]  # fmt: skip
EVERY_SIZE = pytest.mark.parametrize("size", SIZES, ids=str)


def plan_of(size, seed=1, epochs=2) -> BatchPlan:
    num_pairs, per_row, accumulation, processes, tokens = size
    return make_plan(lengths(num_pairs), per_row, accumulation, processes, seed, epochs, tokens_per_batch=tokens)


class TestPlan:
    @EVERY_SIZE
    def test_an_epoch_has_every_pair_once_in_steps_of_nearly_equal_size(self, size):
        num_pairs, per_row, accumulation, processes, _ = size
        plan, most = plan_of(size), per_row * accumulation * processes
        for epoch in range(3):
            steps = plan.steps(epoch)
            assert sorted(itertools.chain(*steps)) == list(range(num_pairs))
            assert len(steps) == plan.steps_per_epoch == -(-num_pairs // most)
            assert max(map(len, steps)) <= most and max(map(len, steps)) - min(map(len, steps)) <= 1
        assert plan.steps(0) != plan.steps(1) or num_pairs == 1

    def test_the_pairs_of_a_step_depend_on_nothing_but_seed_epoch_and_pairs_per_step(self):
        """Not on processes, rows, lengths of the pairs, or the token limit."""
        plans = [
            make_plan(lengths(50, seed), per_row, accumulation, processes, 7, 3, tokens_per_batch=tokens)
            for seed, (per_row, accumulation, processes, tokens) in enumerate(
                [(1, 12, 1, 0), (2, 3, 2, 0), (1, 4, 3, 0), (3, 2, 2, 4000), (12, 1, 1, 9999)]
            )
        ]
        for epoch in range(3):
            assert len({str(plan.steps(epoch)) for plan in plans}) == 1
        assert len({str(epoch_steps(50, 12, seed, 0)) for seed in range(5)}) == 5

    def test_the_order_is_the_same_in_every_version(self):
        """A run that goes on after an update must go on with the same pairs."""
        assert epoch_steps(7, 3, seed=42, epoch=0) == [[4, 2], [1, 6], [0, 5, 3]]
        assert epoch_steps(7, 3, seed=42, epoch=1) == [[5, 0], [3, 4], [6, 2, 1]]

    @EVERY_SIZE
    def test_rows_keep_their_limits_and_every_process_has_as_many(self, size):
        _, per_row, _, processes, tokens = size
        plan = plan_of(size)
        for step in plan.steps(0) + plan.steps(1):
            rows = plan.rows(step)
            assert sorted(itertools.chain(*rows)) == sorted(step)
            assert len(rows) == processes * plan.accumulation
            totals = [sum(plan.lengths[pair] for pair in row) for row in rows]
            assert totals == sorted(totals, reverse=True)
            assert max(totals) <= tokens if tokens else max(map(len, rows)) <= per_row
            assert sum(not row for row in rows) == max(0, len(rows) - len(step))

    @EVERY_SIZE
    def test_no_row_is_empty_and_the_weights_of_a_step_sum_to_one(self, size):
        plan = plan_of(size)
        for step in plan.steps(0):
            slots = plan.slots(step)
            assert all(slots)
            counted = [(pair, 1 / n) for row in slots for pair, n in row if n]
            assert sorted(pair for pair, _ in counted) == sorted(step)
            assert sum(weight for _, weight in counted) == pytest.approx(1)

    @pytest.mark.parametrize("size", [size for size in SIZES if size[-1]], ids=str)
    def test_rows_of_tokens_are_as_few_as_the_fullest_step_needs(self, size):
        plan = plan_of(size)
        fewer = plan.world_size * (plan.accumulation - 1)
        steps = [[plan.lengths[pair] for pair in step] for step in plan.steps(0) + plan.steps(1)]
        assert not fewer or any(divide(own, fewer, max_tokens=plan.tokens_per_row) is None for own in steps)

    def test_rows_are_balanced(self):
        """Against the best of all divisions: within 4/3 - 1/(3 rows), Graham's bound of the longest first."""
        for seed in range(20):
            own = lengths(7, seed)
            found = max(sum(own[n] for n in row) for row in divide(own, 3))
            best = min(
                max(sum(n for n, r in zip(own, choice, strict=True) if r == row) for row in range(3))
                for choice in itertools.product(range(3), repeat=7)
            )
            assert best <= found <= (4 / 3 - 1 / 9) * best

    def test_packing_falls_back_on_the_fullest_row_that_fits(self):
        """Longest first into the emptiest row makes 8 and 7 of 6, 4, 3, 2; no row above 8 holds them otherwise."""
        rows = divide([3, 3, 2, 2, 2], 2, max_tokens=6)
        assert sorted(map(sorted, rows)) == [[0, 1], [2, 3, 4]]
        assert divide([5, 5, 5], 2, max_tokens=9) is None

    def test_which_flags_keep_the_pairs_per_step(self):
        assert flags_for(8, 2, 1) == "--gradient_accumulation_steps 4"
        assert flags_for(6, 2, 2) == "--per_device_train_batch_size 1 --gradient_accumulation_steps 3"
        assert "1, 2, 4" in flags_for(8, 2, 3)


@EVERY_SIZE
def test_the_processes_together_load_the_plan_also_after_a_skip(size):
    """What the Trainer does at a resume: skip, then tell the sampler below the skipping one the epoch."""
    plan = plan_of(size)
    indices = SimpleNamespace(item=lambda index, epoch: {"index": index, "epoch": epoch})
    expected = [[slot for row in plan.slots(step) for slot in row] for step in plan.steps(1)]
    shares = []
    for rank in range(plan.world_size):
        loader = RowLoader(indices, plan, rank, collate_fn=lambda items: items)
        loader.set_epoch(1)
        whole = list(loader)
        assert {item["epoch"] for row in whole for item in row} == {1}
        assert len(whole) == len(loader) == plan.steps_per_epoch * plan.accumulation
        skipping = skip_first_batches(RowLoader(indices, plan, rank, collate_fn=lambda items: items), 1)
        skipping.batch_sampler.batch_sampler.set_epoch(1)
        assert list(skipping) == whole[1:]
        shares.append(whole)
    for step, slots in enumerate(expected):
        own = slice(step * plan.accumulation, (step + 1) * plan.accumulation)
        loaded = [(item["index"], item["step_pairs"]) for share in shares for row in share[own] for item in row]
        assert sorted(loaded) == sorted(slots)


def step_gradient(trainer, size, tokens=0):
    """(loss, gradient) of the first step of a plan, as all its processes compute it together."""
    per_row, accumulation, processes = size
    trainer.batches = plan = make_plan(
        trainer.batches.lengths, per_row, accumulation, processes, 0, 1, tokens_per_batch=tokens
    )
    trainer.model.zero_grad()
    total = 0.0
    for rank in range(processes):
        loader = iter(RowLoader(trainer.train_dataset, plan, rank, collate_fn=trainer.data_collator))
        for _ in range(plan.accumulation):
            loss = trainer.compute_loss(trainer.model, next(loader)) / plan.accumulation / processes
            loss.backward()
            total += loss.item()
    return total, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_and_gradient_of_a_step_are_the_mean_over_its_pairs_however_it_is_split(make_trainer):  # noqa: F811
    """Nine pairs: in rows of tokens, over 1 to 3 processes, with a row that only fills, against one pair at a time."""
    trainer = make_trainer("--gamma", "0.5", seed_b=2)
    trainer.model.train()
    expected, losses = {}, []
    for index in range(9):
        trainer.model.zero_grad()
        batch = trainer.data_collator([trainer.train_dataset[index]])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + parameter.grad / 9
    longest = max(trainer.batches.lengths)
    splits = [((9, 1, 1), 0), ((3, 3, 1), 0), ((1, 5, 2), 0), ((2, 2, 3), 0)]
    splits += [((1, 9, 1), longest), ((1, 9, 1), 3 * longest), ((3, 1, 3), 2 * longest), ((9, 1, 2), longest)]
    for size, tokens in splits:
        loss, found = step_gradient(trainer, size, tokens)
        assert loss == pytest.approx(sum(losses) / 9, abs=1e-5), (size, tokens)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=f"{size} {tokens} {name}")


def test_a_pair_that_only_fills_a_row_is_in_no_metric(make_trainer):  # noqa: F811
    trainer = make_trainer("--save_strategy", "no", seed_b=2)
    items = [trainer.train_dataset[n] | {"step_pairs": 2 if n else 0} for n in range(3)]
    loss, metrics = trainer.compute_loss(trainer.model, trainer.data_collator(items), return_outputs=True)
    assert metrics.shape == (3, len(METRICS)) and metrics[0].isnan().all()
    share = trainer.batches.rows_per_step / 2
    assert loss.item() == pytest.approx(share * metrics[1:, METRICS.index("losses/total")].sum().item(), rel=1e-5)


def losses_of(trainer):
    return [log["losses/total"] for log in trainer.state.log_history if "losses/total" in log]


def test_a_run_in_rows_of_tokens_is_the_same_run(make_trainer, tmp_path):  # noqa: F811
    flags = ("--num_train_epochs", "2", "--learning_rate", "1e-3", "--save_strategy", "no")
    runs = {}
    for tokens in ("0", "400"):
        trainer = make_trainer("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4",
                               "--tokens_per_batch", tokens, *flags)  # fmt: skip
        trainer.train()
        runs[tokens] = losses_of(trainer)
        assert len(runs[tokens]) == 6 and trainer.args.gradient_accumulation_steps == trainer.batches.accumulation
    assert trainer.batches.accumulation < 3
    assert runs["400"] == pytest.approx(runs["0"], abs=1e-4)
    assert runs["0"][0] != runs["0"][-1]


def test_pictures_decoded_ahead_are_the_same_batches(make_trainer):  # noqa: F811
    flags = ("--num_train_epochs", "2", "--save_strategy", "no", "--learning_rate", "1e-3")
    ahead = ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True",
             "--dataloader_prefetch_factor", "4")  # fmt: skip
    plain, fast = make_trainer(*flags), make_trainer(*flags, *ahead)
    plain.train()
    fast.train()
    assert losses_of(fast) == losses_of(plain)


class Ask(TrainerCallback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_asked_to_stop_it_finishes_the_step_and_goes_on_where_it_was(make_trainer, tmp_path, number, monkeypatch):  # noqa: F811
    """With the same weights at the end as if never asked, to the bit; epoch strategies save and evaluate only there."""
    flags = ("--num_train_epochs", "3", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3",
             "--save_strategy", "epoch", "--lora_dropout", "0.1")  # fmt: skip
    whole = make_trainer(*flags, "--output_dir", str(tmp_path / "whole"))
    whole.train()
    before = signal.getsignal(number)
    first = make_trainer(*flags)
    first.add_callback(Ask(6, number))
    first.train()
    assert first.stop.stopped and first.stop.exit_code == STOPPED and first.state.global_step == 7
    assert signal.getsignal(number) is before
    saved = sorted(path.parent.name for path in (tmp_path / "out").glob(f"checkpoint-*/{COMPLETE}"))
    assert saved == ["checkpoint-5", "checkpoint-7"]
    again = make_trainer(*flags)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-7"))
    assert not again.stop.stopped and again.state.global_step == 15
    for (name, ours), (_, theirs) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_stop_file_stops_as_a_signal_does_and_says_so_to_the_script(make_trainer, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "stop"
    path.touch()
    monkeypatch.setenv("STOP_FILE", str(path))
    trainer = make_trainer("--num_train_epochs", "2")
    trainer.train()
    assert trainer.stop.stopped and trainer.state.global_step == 1
    assert trainer.stop.exit_code == 0 and path.read_text() == "stopped early"


def test_asked_to_stop_in_the_last_step_it_simply_ends(make_trainer):  # noqa: F811
    trainer = make_trainer("--max_steps", "2", "--save_strategy", "no")
    trainer.add_callback(Ask(1, signal.SIGTERM))
    trainer.train()
    assert trainer.state.global_step == 2 and not trainer.stop.stopped


class TestRefused:
    def test_a_pair_above_tokens_per_batch_is_named(self, make_trainer):  # noqa: F811
        with pytest.raises(ValueError, match=r"record 4 \(id 3\): .* above --tokens_per_batch 100, as are 3 pairs"):
            make_trainer("--tokens_per_batch", "100")

    @pytest.mark.parametrize(
        "flag",
        [
            ("--dataloader_drop_last", "True"), ("--ignore_data_skip", "True"), ("--auto_find_batch_size", "True"),
            ("--train_sampling_strategy", "sequential"),
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_flags_that_would_change_the_steps(self, flag):
        needed = ["--model_name_or_path", "m", "--data_path", "d", "--image_folder", "i", "--output_dir", "o"]
        with pytest.raises(ValueError, match=rf"{flag[0]} \S+ must stay"):
            parse([*needed, *flag])

    def test_other_pairs_per_step_name_the_flags_that_keep_them(self, tmp_path):
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-3" / COMPLETE).write_text('{"pairs_per_step": 8, "beta": 0.1}')
        ours = {"pairs_per_step": 4, "beta": 0.1}
        with pytest.raises(ValueError, match=r"8 pairs per step, these flags make 4: go on with --grad\S+ 4$"):
            latest_checkpoint(tmp_path, ours, lambda pairs: flags_for(pairs, 2, 1))
        with pytest.raises(ValueError, match="another run"):
            latest_checkpoint(tmp_path, ours | {"beta": 1}, lambda pairs: flags_for(pairs, 2, 1))


def test_states_that_no_other_number_of_processes_could_read_are_refused_with_deepspeed():
    with pytest.raises(ValueError, match=r"--optim adamw_bnb_8bit .* choose adamw_torch"):
        check_optim("adamw_bnb_8bit")
    check_optim("adamw_torch_fused")


class TestOneLineErrors:
    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (FloatingPointError("not finite at step 3: x"), 1, "error: not finite at step 3: x"),
            (DataError(["train.json record 2: a.png is damaged"]), 2, "error: train.json record 2: a.png is damaged"),
            (CheckpointError("checkpoint-3: no exp_avg"), 2, "error: checkpoint-3: no exp_avg"),
            (torch.cuda.OutOfMemoryError("out of memory\nlong\ntext"), 1, "error: out of memory"),
        ],
        ids=lambda value: type(value).__name__,
    )  # fmt: skip
    def test_what_a_user_can_act_on_is_one_line(self, capsys, error, code, line):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise error
        assert ended.value.code == code and capsys.readouterr().err.strip() == line

    def test_an_error_of_ours_keeps_its_traceback(self):
        with pytest.raises(RuntimeError, match="shapes"), one_line_errors():
            raise RuntimeError("shapes differ")

    def test_a_damaged_picture_is_named_also_by_a_process_that_reads_ahead(self, make_trainer, tmp_path, capsys):  # noqa: F811
        trainer = make_trainer("--dataloader_num_workers", "1", "--save_strategy", "no")
        (tmp_path / "images/4_0.png").write_bytes(b"no picture")
        with pytest.raises(SystemExit), one_line_errors():
            trainer.train()
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "record 5 (id 4)" in line and "4_0.png" in line
