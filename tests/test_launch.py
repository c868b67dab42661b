"""The real thing: the launch script and torchrun, on two CPU processes, with DeepSpeed, killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import forks
from tests.conftest import SIDE, kill_with_workers, preference, shared
from tests.test_architecture import launch  # noqa: F401  a fixture
from train.llava_hound_dpo.checkpoints import COMPLETE

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """The published layout: train.json without target boxes, `<image-placeholder>`, and images.zip."""
    return shared(tmp_path_factory, "published", write_data_set)


def write_data_set(folder):
    rng = np.random.default_rng(0)
    records = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(24):
            count = 2 + number % 3 if number % 2 else 1
            names = [f"coco/{number}_{i}.jpg" for i in range(count)]
            for name in names:
                size = (SIDE, SIDE) if number % 2 else (936, 488)
                pixels = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
                with archive.open(f"images/{name}", "w") as file:
                    Image.fromarray(pixels).resize(size).save(file, "JPEG")
            lines = "".join(f"Image{i + 1}:<image-placeholder>\n" for i in range(count))
            prompt = f"{lines if count > 1 else '<image-placeholder>' + chr(10)}In Image2, what colour is the shape?"
            record = {
                "id": f"pair {number}",
                "image": names,
                "prompt": prompt,
                "chosen": "red",
                "rejected": "dark green",
            }
            records.append(record | {"gt": "red"})
    (folder / "train.json").write_text(json.dumps(records))


def flags(data_set, checkpoint, output):
    """Two epochs of three steps of eight pairs, a checkpoint after every step."""
    pairs = {
        "model_name_or_path": checkpoint, "data_path": data_set / "train.json", "image_folder": data_set / "images.zip",
        "output_dir": output, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "num_train_epochs": 2,
        "lr_scheduler_type": "cosine", "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1,
        "gradient_checkpointing": True, "eval_split": 0, "disable_tqdm": True,
    }  # fmt: skip
    return [str(word) for name, value in pairs.items() for word in (f"--{name}", value)]


def environment(**changes):
    return {
        **os.environ,
        "PATH": PATH,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        **changes,
    }


def torchrun(processes, *words):
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}", "-m", "train.llava_hound_dpo.run_dpo", *words]


def run(command, **changes):
    """(exit code, stdout, stderr)."""
    return forks.run(command, cwd=ROOT, env=environment(**changes))


def run_anew(command, **changes):
    """As `run`, in a process that imports all that it needs."""
    done = subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def history(output):
    """Logged training steps of a finished run."""
    state = json.loads((Path(output) / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


@pytest.fixture(scope="module")
def zero2(data_set, checkpoint, tmp_path_factory):
    """Output folder of an uninterrupted run on two processes with ZeRO-2."""

    def make(folder):
        words = [*flags(data_set, checkpoint, folder / "out"), "--gradient_accumulation_steps", "2"]
        code, _, errors = run_anew(torchrun(2, *words, "--deepspeed", "scripts/zero2.json"))
        assert code == 0, errors[-3000:]

    return shared(tmp_path_factory, "zero2", make) / "out"


def test_step_0_is_ln_2_and_run_json_tells_everything(zero2):
    first = history(zero2)[0]
    assert first["losses/dpo"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == 0
    record = json.loads((zero2 / "run.json").read_text())
    assert record["counts"]["train"]["pairs"] == 24
    assert record["loss"]["attention_threshold"] == 0.75 and record["attention_layers"] == [0, 1, 2, 3]
    assert {"torch", "transformers", "deepspeed"} <= set(record["versions"])


@pytest.mark.parametrize(
    ("processes", "accumulation", "config", "more"),
    [
        (1, 4, None, []),
        (2, 2, "scripts/zero3.json", []),
        (2, 2, "scripts/zero2.json", ["--reference_cache", "cache", "--per_device_eval_batch_size", "3"]),
    ],
    ids=["one process", "zero3 on two", "cached reference"],
)
def test_losses_agree_with_zero2_on_the_same_global_batch(
    data_set, checkpoint, tmp_path, zero2, processes, accumulation, config, more
):
    """To 2e-4 over six steps in fp32; the first step, before any update, to 1e-5."""
    words = [*flags(data_set, checkpoint, tmp_path / "out"), "--gradient_accumulation_steps", str(accumulation)]
    words += ["--deepspeed", config] if config else []
    words += [str(tmp_path / word) if word == "cache" else word for word in more]
    code, _, errors = run(torchrun(processes, *words))
    assert code == 0, errors[-3000:]
    if more:
        check_shared(tmp_path / "cache")
    for step, (ours, theirs) in enumerate(zip(history(tmp_path / "out"), history(zero2), strict=True)):
        for name in ("losses/total", "losses/dpo", "losses/attention", "attention/ratio", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-4 if step else 1e-5), (step, name)


def check_shared(cache):
    """Both processes have written their part of the 24 pairs' reference log-probs, none twice."""
    parts = [path.read_text().splitlines() for path in sorted(cache.glob("part-*.jsonl"))]
    keys = [json.loads(line)["key"] for lines in parts for line in lines]
    assert len(parts) == 2 and all(parts) and len(keys) == len(set(keys)) == 24


@pytest.mark.slow  # of any step, and on other numbers of processes: tests/test_going_on.py
def test_killed_and_resumed_ends_with_the_same_weights(data_set, checkpoint, tmp_path, zero2):
    words = [*flags(data_set, checkpoint, tmp_path / "out"), "--gradient_accumulation_steps", "2"]
    command = torchrun(2, *words, "--deepspeed", "scripts/zero2.json")
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob(f"checkpoint-*/{COMPLETE}")) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_with_workers(job)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists(), "the job ended before it could be killed"
    code, output, errors = run(command)
    assert code == 0, errors[-3000:]
    assert "continuing from" in output
    resumed, whole = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", zero2))
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_adapter_loads_in_plain_peft_with_the_same_logits(checkpoint, zero2):
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    from llava.checkpoints import open_checkpoint
    from scripts.export import drawn, first_logits

    plain = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(checkpoint), zero2).eval()
    opened = open_checkpoint(str(zero2))
    family, ours = opened.family, opened.load().eval()
    asked = drawn(family)
    base = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    assert (first_logits(plain, family, asked) - first_logits(base, family, asked)).abs().max() > 1e-4
    torch.testing.assert_close(first_logits(ours, family, asked), first_logits(plain, family, asked), atol=1e-5, rtol=0)


def test_other_pairs_per_step_are_refused_before_loading_with_the_flags_that_keep_them(data_set, checkpoint, zero2):
    words = [*flags(data_set, checkpoint, zero2), "--gradient_accumulation_steps", "2"]
    command = [sys.executable, "-m", "train.llava_hound_dpo.run_dpo", *words, "--deepspeed", "scripts/zero2.json"]
    code, _, errors = run([*command, "--dry_run"])
    assert code == 2
    assert "8 pairs per step, these flags make 4: go on with --gradient_accumulation_steps 4" in errors
    code, output, errors = run([*command, "--dry_run", "--gradient_accumulation_steps", "4"])
    assert code == 0 and "continuing from" in output, errors
    assert "4 rows per step = 4 accumulated x 1 processes" in output


def test_full_fine_tuning_under_zero3(data_set, checkpoint, tmp_path):
    words = [*flags(data_set, checkpoint, tmp_path / "out"), "--lora_enable", "False", "--save_strategy", "no"]
    code, _, errors = run(torchrun(2, *words, "--deepspeed", "scripts/zero3.json"))
    assert code == 0, errors[-3000:]
    check_shared(tmp_path / "out" / "reference")
    logs = history(tmp_path / "out")
    assert logs[0]["losses/dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert logs[-1]["losses/dpo"] < 0.68
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.numel() for tensor in saved.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its optimiser for the CPU, needs g++")
def test_offloading_to_the_cpu_changes_no_loss(data_set, checkpoint, tmp_path):
    """Compiling takes over a minute the first time. Without offloading the optimiser is torch's."""
    logs = {}
    for name in ("zero3", "zero3_offload"):
        words = [*flags(data_set, checkpoint, tmp_path / name), "--lora_enable", "False", "--save_strategy", "no"]
        code, _, errors = run(torchrun(2, *words, "--deepspeed", f"scripts/{name}.json"))
        assert code == 0, errors[-3000:]
        logs[name] = [log["losses/total"] for log in history(tmp_path / name)]
    assert logs["zero3_offload"] == pytest.approx(logs["zero3"], abs=1e-4)
    assert logs["zero3"][-1] < logs["zero3"][0] - 0.1


class TestScript:
    """train_dpo_multi_hpc_a100.sh as a user calls it, on one CPU process."""

    def given(self, data_set, checkpoint, output, *words):
        """Flags and knobs."""
        small = "--bf16 False --lora_r 4 --lora_alpha 8 --max_steps 1 --dataloader_num_workers 0"
        return [*small.split(), "--gradient_accumulation_steps", "2", *words], {
            "MODEL": checkpoint, "DATA": str(data_set / "train.json"), "IMAGES": str(data_set / "images.zip"),
            "OUTPUT": str(output), "NPROC": "1",
        }  # fmt: skip

    def call(self, data_set, checkpoint, output, *words, **changes):
        own, knobs = self.given(data_set, checkpoint, output, *words)
        return run_anew(["bash", str(SCRIPT), *own], **knobs | changes)

    @pytest.fixture
    def check(self, launch, data_set, checkpoint):  # noqa: F811
        """As `call`, but only what the script runs first, and that in a fork. (That a failure of it ends the script,
        as --dry_run and --help do: tests/test_architecture.py, and the first test of bad input here.)"""

        def run_check(output, *words, folder=data_set, **changes):
            own, knobs = self.given(folder, checkpoint, output, *words)
            knobs |= changes
            first = launch(*own, **knobs)[2][0]
            return run(["python", *first.words], NPROC=knobs["NPROC"])

        return run_check

    def test_the_other_recipe_trains_with_wandb_offline_without_a_login(self, data_set, checkpoint, tmp_path):
        changes = {"dpo_alpha": "0.0", "gamma": "1.0", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}
        code, output, errors = self.call(data_set, checkpoint, tmp_path / "out", WANDB_MODE="", **changes)
        assert code == 0, errors[-3000:]
        assert "0 x (dpo" in output and "1 x (sft" in output
        log = history(tmp_path / "out")[0]
        assert "losses/sft" in log and "losses/dpo" not in log
        assert list(tmp_path.glob("wandb/offline-run-*"))

    def test_another_experiment_in_the_same_output_is_refused_before_torchrun(self, check, zero2):
        code, _, errors = check(zero2, gamma="0.5")
        assert code == 2 and "gamma 0.0 there, 0.5 here" in errors and "Traceback" not in errors

    def test_dry_run_prints_the_plan_and_writes_nothing(self, check, tmp_path):
        code, output, errors = check(tmp_path / "out", "--dry_run", NPROC="2")
        assert code == 0, errors
        assert "24 to train on" in output and "= 1 x 2 accumulated x 2 processes" in output
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--dpo_alpa", "1"], "did you mean --dpo_alpha"),
            (["--model_max_length", "100"], "record 2 (id pair 1)"),
            (["--X", "Image"], "no longer exists"),
            (["--dpo_alpha", "0"], "nothing to train"),
            (["--image_folder", "nowhere"], "nowhere: no such image folder"),
        ],
    )
    def test_bad_input_ends_in_one_line(self, check, data_set, checkpoint, tmp_path, words, expected):
        """The first through the script to its end: torchrun would say more."""
        run_all = partial(self.call, data_set, checkpoint) if "--dpo_alpa" in words else check
        code, _, errors = run_all(tmp_path / "out", *words)
        assert code == 2
        lines = [line for line in errors.splitlines() if line.strip() and "WARNING" not in line]
        assert len(lines) == 1 and expected in lines[0], errors

    def test_a_truncated_picture_names_file_record_and_id(self, check, data, tmp_path):
        path = data([preference(0), preference(1)])
        whole = (data.images / "blue.png").read_bytes()
        (data.images / "blue.png").write_bytes(whole[: len(whole) // 2])
        code, _, errors = check(tmp_path / "out", "--image_folder", str(data.images), folder=data.folder)
        assert code == 2
        assert f"{path} record 2 (id pair_1)" in errors and "blue.png" in errors and "damaged" in errors

    def test_help_is_complete(self, check, tmp_path):
        code, output, _ = check(tmp_path / "out", "--help")
        assert code == 0
        for flag in ("--dpo_alpha", "--attention_layers", "--overlong", "--learning_rate", "--dry_run"):
            assert flag in output
