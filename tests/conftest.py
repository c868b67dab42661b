"""What the tests share: a tiny LLaVA with peaky attention, its checkpoint on disk, and records to feed it."""

import gc
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace


def asks_for_gpu(words):
    """Whether a command line of pytest selects tests that need a GPU: `-m gpu`, `-m "gpu and not slow"`."""
    chosen = [after for word, after in itertools.pairwise([*words, ""]) if word == "-m"]
    chosen += [word[2:] for word in words if word.startswith("-m")]
    return any("gpu" in marks and "not gpu" not in marks for marks in chosen)


gc.disable()  # until all is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ and not asks_for_gpu(sys.argv):  # workers have what the first process chose
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  the import hook looks it up by name
from tests import forks

# Shapes written in signatures are checked while tests run.
CHECKED = [
    "llava.attention", "llava.families.family", "llava.regions", "llava.scaling", "train.llava_hound_dpo.losses",
]  # fmt: skip
install_import_hook(CHECKED, "tests.shapes.check")

import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image
from transformers import LlavaForConditionalGeneration

from scripts.miniature import make_data
from scripts.miniature.model import build_model, build_processor

torch.set_num_threads(1)
# torch makes its thread pool anew in a fork, when it is first used; two threads that do so at once, as those that read
# weights, find none ("Invalid thread pool!"). Here it is used before there are threads.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

SIDE = 72  # px of the miniature's pictures
BASE = str(Path(__file__).parent.parent / "scripts/miniature/base")  # the model that demo and study train


def pytest_collection_modifyitems(config, items):
    """Skip what takes minutes, unless asked for with `-m slow`, and what needs a GPU, unless with `-m gpu`."""
    asked = config.getoption("-m")
    skips = {"slow": "takes minutes: run it with -m slow", "gpu": "needs a CUDA device: run it on one with -m gpu"}
    if "slow" in asked:
        del skips["slow"]
    if torch.cuda.is_available():
        del skips["gpu"]
    for item in items:
        for name, reason in skips.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Before any test has changed anything of this process: its server, if one of the tests starts jobs.

    What is imported by then is never garbage. To look through it again and again, as every training asks for, and this
    while it is imported, would take a fifth of the time.
    """
    gc.freeze()
    gc.enable()
    if any(vars(item.module).get("forks") for item in getattr(session, "items", ())):
        forks.serve()


def pytest_sessionfinish():
    forks.end()


@pytest.fixture(scope="session")
def processor():
    return build_processor()


def tiny_model(processor, seed=0, **text_config):
    """An untrained miniature LLaVA whose attention is far from uniform, so that a wrong mask shows."""
    config = build_model(processor, seed=seed).config
    for name, value in text_config.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, processor):
    """Folder of a tiny checkpoint in the llava-hf format."""

    def make(folder):
        tiny_model(processor).save_pretrained(folder)
        processor.save_pretrained(folder)

    return str(shared(tmp_path_factory, "checkpoint", make))


def llava15(image_processor, patch=14, pad=True):
    """The family of a vision tower as large as the processor's pictures, bound to a tokenizer that knows no text."""
    from llava.families.llava15 import Llava15

    side = image_processor.crop_size["height"] if image_processor.do_center_crop else image_processor.size["height"]
    config = SimpleNamespace(image_token_id=99, vision_config=SimpleNamespace(image_size=side, patch_size=patch))
    tokenizer = SimpleNamespace(eos_token="</s>", added_tokens_decoder={}, convert_tokens_to_ids=lambda token: 99)
    return Llava15(config, tokenizer, image_processor, pad)


@pytest.fixture(scope="session")
def family(checkpoint):
    """The tiny checkpoint's tokenizer, prompts and picture geometry."""
    from llava.checkpoints import open_checkpoint

    return open_checkpoint(checkpoint).family


@pytest.fixture
def start(request, checkpoint):
    """The checkpoint that training starts from: the untrained one, or what a test asks for."""
    return getattr(request, "param", None) or checkpoint


@pytest.fixture
def model(processor):
    """A fresh tiny model with our attention function installed."""
    from llava.attention import install

    model = tiny_model(processor)
    install(model)
    return model


def encoded(model, pixels):
    """LLaVA's pictures as `score` takes them."""
    from llava.families import Llava15

    return Llava15.encode(None, model, {"pixel_values": pixels})


def kill_with_workers(job):
    """Kill a launched job and all that it started: torchrun's workers have sessions of their own, and would go on."""
    processes = [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)
    job.wait()


def shared(tmp_path_factory, name, make):
    """A folder that `make(folder)` fills once, and for all processes that run the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


def make_world(folder, *flags):
    """The miniature's questions and pictures. (That a process of its own makes the same: tests/test_miniature.py.)"""
    words = ["--output", folder, "--num_train", 3, "--seed", 3, *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_data", *map(str, words)])
        make_data.main()


def picture(colour, size=(SIDE, SIDE)):
    return Image.new("RGB", size, colour)


COLOURS = ("red", "green", "blue", "yellow", "white")


def preference(number=0, num_images=2, target=1, **changes):
    """A sequence preference record as a dict, with pictures named after colours."""
    lines = "".join(f"Image{i + 1}:<image>\n" for i in range(num_images))
    record = {
        "id": f"pair_{number}",
        "image": [f"{COLOURS[(number + i) % 5]}.png" for i in range(num_images)],
        "prompt": f"{lines}In Image{target}, what colour is the picture?",
        "chosen": COLOURS[(number + target - 1) % 5],
        "rejected": COLOURS[(number + target) % 5],
    }
    record.update(changes)
    return {key: value for key, value in record.items() if value is not None}


@pytest.fixture
def data(tmp_path):
    """A folder with `images/`, and a function that writes records to `train.json` and returns its path."""
    images = tmp_path / "images"
    images.mkdir()
    for colour in COLOURS:
        picture(colour).save(images / f"{colour}.png")

    def write(records, name="train.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    write.folder, write.images = tmp_path, images
    return write
