"""Tiny public data sets made by hand, and the command that imports them, for the tests of interchange."""

import base64
import csv
import io
import json

import datasets

from inference.llava_hound_dpo.interchange import main
from tests.conftest import picture

datasets.disable_progress_bars()

CLOSING = "Answer with the option's letter from the given choices directly."


def png(colour, size=(8, 6), kind="PNG"):
    file = io.BytesIO()
    picture(colour, size).save(file, kind)
    return file.getvalue()


def stored(colour, **more):
    """A picture as `datasets` embeds it."""
    return {"bytes": png(colour, **more), "path": None}


def coded(colour):
    return base64.b64encode(png(colour, size=(40, 40))).decode()


BLINK = {
    "idx": "val_Art_Style_1", "sub_task": "Art_Style", "question": "Which shares the style of the first image?",
    "choices": ["the second image", "the third image"], "answer": "(B)",
    "prompt": "Which shares the style of the first image?\nSelect from the following choices.\n"
    "(A) the second image\n(B) the third image",
    "image_1": stored("red"), "image_2": stored("green"), "image_3": stored("blue"), "image_4": None,
}  # fmt: skip
MANTIS = {
    "id": "mantis_1", "question_type": "multi-choice", "question": "<image><image> Are both red?",
    "options": ["(A) Yes", "(B) No"], "answer": "B", "images": [stored("red"), stored("green", kind="JPEG")],
}  # fmt: skip
MUIR = {
    "idx": "7", "task": "Ordering", "image_type": "Slides", "question": "Which follows <image>?",
    "options": ["<image>", "<image>", "None of the choices provided"], "answer": "A",
    "image_list": [stored("red"), stored("green"), stored("blue")],
}  # fmt: skip
QBENCH = {
    "id": 3, "question": "Which image is sharper?", "option0": "The first", "option1": "The second", "option2": "N/A",
    "option3": "N/A", "correct_choice": "A", "question_type": 2, "image1": stored("red"), "image2": stored("blue"),
}  # fmt: skip
MIRB = {
    "question_id": "5", "subset": "count", "questions": "How many cars in <image> and <image>?", "answers": "3",
    "image_list": [stored("red"), stored("red")],
}  # fmt: skip
NLVR2 = {
    "identifier": "dev-1-0-0", "sentence": "Both are red.", "label": "False",
    "left_image": stored("red"), "right_image": stored("blue"),
}  # fmt: skip
INTERLEAVE = {
    "sample_id": 11, "image": ["Split1/a.png", "Split1/b.png"], "metadata": {"question_type": "multi-choice"},
    "conversations": [
        {"from": "human", "value": "<image>\n<image>\nWhich is red?\nA. the first\nB. the second\nYour answer is:"},
        {"from": "gpt", "value": "the first"},
    ],
}  # fmt: skip
LMMS_EVAL = {
    "id": "x", "question": "In Image2, what is it? <image 2> <image 1>", "answer": "a car", "images": ["a.png", "b.png"]
}  # fmt: skip


def table(**changes):
    row = {"index": "0", "image": str([coded("red"), coded("blue")]), "hint": "", "question": "Which is red?"}
    return row | {"A": "the first", "B": "the second", "C": "None", "D": "", "answer": "A", "split": "val"} | changes


class Importer:
    """Imports rows into tmp_path/out, from tmp_path/source."""

    def __init__(self, tmp_path):
        self.source, self.output = tmp_path / "source", tmp_path / "out"

    def __call__(self, name, rows, file="test-00000-of-00001.parquet", *flags):
        """Write rows (None: they are there) to a file by its suffix, and import it: (exit code, records)."""
        path = self.source / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if rows is None:
            assert path.exists()
        elif path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif path.suffix == ".tsv":
            write_table(path, rows)
        else:
            path.write_text(json.dumps(rows))
        code = call("import", "--from", name, "--source", path, "--output", self.output, *flags)
        return code, json.loads((self.output / "test.json").read_text()) if code != 2 else []

    @property
    def problems(self):
        return json.loads((self.output / "run.json").read_text())["problems"]


def call(*arguments):
    """Exit code of the command."""
    try:
        main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def write_table(path, rows):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
