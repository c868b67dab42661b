"""Small files of pairs with pictures, and the command that mixes them, for the tests of data_gen.mix."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from data_gen.mix import __main__ as mix
from llava.image import ImageStore
from llava.records import read_json


def picture(number, size=(16, 12)):
    """Pixels of its own for every number."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def pair(number, images, sources=None, **changes):
    """A sequence of pictures, the first of which is asked about."""
    head = "".join(f"Image{n}:<image>\n" for n in range(1, len(images) + 1))
    record = {
        "id": f"pair_{number}", "image": images, "prompt": f"{head}In Image1, what is it?", "chosen": f"thing {number}",
        "rejected": "another thing", "gt": f"thing {number}", "image_type": "sequence", "target": 1,
        "attention_ratio": 0.25, "perplexity": 1.5, "rejected_from": "clean", "note": {"kept": [number]},
    }  # fmt: skip
    if sources:
        record["sources"] = [{"id": path, "path": path} for path in sources]
    return record | changes


def two_files(folder):
    """Two files of pairs, groups of three that share a picture; the flags that name them and their pictures."""
    for name, start in (("first", 0), ("second", 1000)):
        own = folder / name
        (own / "images/coco").mkdir(parents=True)
        records = []
        for number in range(30):
            names = [f"coco/own_{number}.png", f"coco/shared_{number // 3}.png"]
            picture(start + number).save(own / "images" / names[0])
            picture(start + 100 + number // 3).save(own / "images" / names[1])
            records.append(pair(number, names, names))
        (own / "pairs.json").write_text(json.dumps(records))
        counts = {"kept": 30, "dropped": {"right": 12}}
        run = {"arguments": {"model_name_or_path": "some/where/a-model"}, "counts": counts}
        (own / "run.json").write_text(json.dumps(run))
    pairs, images = ([folder / name / what for name in ("first", "second")] for what in ("pairs.json", "images"))
    return ["--pairs", *pairs, "--image_folder", *images]


def run(*words):
    return mix.main([str(word) for word in words])


def refused(capsys, *words):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        run(*words)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and lines[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in lines) == 1
    return lines[-1]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def contents(folder, name):
    """Bytes of all pictures of a part."""
    store = ImageStore(next(folder.glob("images*")))
    return {store.open(image).tobytes() for record in read_json(folder / f"{name}.json") for image in record["image"]}
