"""Single-image data for the generators' tests: every picture has a colour of its own, so that it can be found again."""

import colorsys
import hashlib
import json
import sys

import numpy as np
from PIL import Image

from data_gen.gen_instruction import __main__ as gen_instruction
from data_gen.gen_instruction import test_set


def colour(number):
    """Distinct for the first hundred numbers; never white, black, or grey."""
    hue, value = (number * 0.381966) % 1, 0.4 + 0.5 * ((number * 0.618) % 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def record(number, subset="coco", **changes):
    """A LLaVA-style record with two turns."""
    fields = {
        "id": f"{subset}_{number}",
        "image": f"{subset}/{number}.png",
        "conversations": turns(f"<image>\nWhat colour is it, {number}?", f"Colour {number}.", "Is it nice?", "Yes."),
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


def turns(*texts):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def save_pictures(folder, count, subset="coco", sides=(8, 60), seed=0):
    rng = np.random.default_rng(seed)
    (folder / subset).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        size = tuple(int(side) for side in rng.integers(*sides, 2))
        Image.new("RGB", size, colour(number)).save(folder / subset / f"{number}.png")


def world(folder, count=24, subset="coco", **options):
    """Pictures and source.json in a folder; the flags that name them."""
    save_pictures(folder / "images", count, subset, **options)
    return write(folder, [record(number, subset) for number in range(count)])


def write(folder, records, name="source.json"):
    (folder / name).write_text(json.dumps(records, indent=1), encoding="utf-8")
    return ["--source", str(folder / name), "--image_folder", str(folder / "images")]


def generate(monkeypatch, *flags, module=gen_instruction):
    """Run a generator in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["generator", *map(str, flags)])
    monkeypatch.setattr(module, "setup_logging", lambda: None)  # it would outlive the test
    try:
        return module.main()
    except SystemExit as end:
        return end.code


def generate_test_set(monkeypatch, *flags):
    return generate(monkeypatch, *flags, module=test_set)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digest(folder):
    """Hash of every file of a finished output but run.json, which has the command."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
