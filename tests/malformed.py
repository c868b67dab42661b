"""A small world of every file that a command reads, each of which a test may spoil, and the commands on it."""

import contextlib
import io
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from data_gen.gen_chosen_rejected.__main__ import main as pairs_main
from data_gen.gen_instruction.__main__ import main as generate_main
from data_gen.mix.__main__ import main as mix_main
from inference.llava_hound_dpo import evaluate, measure, run_inference
from inference_optimization.llava_hound_dpo import run_adaptive, tune
from scripts import discover_heads, doctor, export
from scripts.study.__main__ import main as study_main
from tests.conftest import COLOURS, picture
from tests.dialects import make_formats
from train.llava_hound_dpo import run_dpo

MAINS = {
    "train": run_dpo.main, "answer": run_inference.main, "steer": run_adaptive.main, "tune": tune.main,
    "evaluate": evaluate.main, "generate": generate_main, "pairs": pairs_main, "mix": mix_main, "study": study_main,
    "export": export.main, "doctor": doctor.main, "heads": discover_heads.main,
    "measure": measure.main,
}  # fmt: skip
MARKER = "this code ran"  # a file that appears if code of a checkpoint does


def records():
    """Four questions about two pictures, with everything that any stage asks of a record."""
    prompt = "Image1:<image>\nImage2:<image>\nIn Image{}, what colour is it?"
    return [
        {"id": f"q{n}", "image": [f"{COLOURS[n]}.png", f"{COLOURS[n + 1]}.png"], "prompt": prompt.format(1 + n % 2),
         "image_type": "sequence", "target": 1 + n % 2, "chosen": COLOURS[n + n % 2], "rejected": "purple",
         "others": [COLOURS[n + 1 - n % 2]]}
        for n in range(4)
    ]  # fmt: skip


def answer(record):
    return {"question_id": record["id"], "text": record["answer"], "num_images": 2, "attention_ratio": 0.5,
            **{name: record[name] for name in ("answer", "image_type", "target", "prompt")}}  # fmt: skip


class World:
    """The files below a folder, named as in `read` and `write`, and a command on them."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def __truediv__(self, name):
        return self.folder / name

    def read(self, name):
        text = (self / name).read_text()
        return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)

    def write(self, name, content):
        content = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
        (self / name).write_text(content)

    def words(self, command):
        """Flags of a command."""
        model = {"model_name_or_path": "@hf", "image_folder": "@images"}
        asked = model | {"data_path": "@test.json", "max_new_tokens": 2, "num_workers": 0}
        training = {"data_path": "@train.json", "output_dir": "@trained", "use_cpu": True, "report_to": "none",
                    "dry_run": True, "bf16": False}  # fmt: skip
        flags = {
            "train": model | training,
            "answer": asked | {"output": "@out/answers.jsonl"},
            "measure": {name: value for name, value in asked.items() if name != "max_new_tokens"}
            | {"answers": "@answers.jsonl", "output": "@out/measured.jsonl"},
            "steer": asked | {"output": "@out/steered.jsonl"},
            "tune": asked | {"output": "@out/tuned", "share": 0.5},
            "evaluate": {"answers": "@answers.jsonl", "questions": "@test.json", "output": "@out/scores"},
            "generate": {"source": "@source.json", "image_folder": "@images", "output": "@out/made",
                         "format": "sequence", "num_workers": 1},
            "pairs": model | {"instructions": "@instructions.jsonl", "output": "@out/pairs", "max_new_tokens": 2},
            "mix": {"pairs": "@train.json", "image_folder": "@images", "output": "@out/set", "validation": 0},
            "study": {"config": "@study.json", "output": "@out/study"},
            "export": {"model_name_or_path": "@hf", "output": "@out/merged", "dtype": "float32"},
            "doctor": model | {"data_path": "@train.json"},
            "heads": asked | {"output": "@out/heads.json"},
        }[command]  # fmt: skip
        return [self.placed(word) for name, value in flags.items() for word in (f"--{name}", value)]

    def placed(self, word):
        """A word of a command line; behind an @ it is a path in the world."""
        return str(self / word[1:]) if str(word).startswith("@") else str(word)

    def run(self, command, *more):
        """(exit code, standard output, standard error) of a command in this process; later flags win."""
        out, err = io.StringIO(), io.StringIO()
        code, handler = 0, signal.getsignal(signal.SIGTERM)  # which a study changes
        words = [*self.words(command), *map(self.placed, more)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [command, *words])
            try:
                code = MAINS[command]() or 0
            except SystemExit as error:
                code = error.code or 0
            finally:
                signal.signal(signal.SIGTERM, handler)
        return code, out.getvalue(), err.getvalue()

    def refused(self, command, line, *more):
        """Assert that the command ends with one line like this on standard error, nothing run, nothing written."""
        code, out, err = self.run(command, *more)
        if command == "doctor":  # prints a line of its report instead
            assert code == 1, out
            found = [text for text in out.splitlines() if text.startswith("  FAIL  ")]
            err = next((text for text in found if re.search(line, text)), "".join(found)) + "\n"
        else:
            assert code == 2, (code, out[-2000:], err[-2000:])
        assert re.search(line, err), err[:2000]
        assert err.endswith("\n") and err.count("\n") == 1 and len(err) < 500, err[:3000]
        assert err[:-1].isprintable(), repr(err)
        assert "Traceback" not in out and not (self / MARKER).exists()
        return err


def build(folder):
    """Every file of the world, healthy."""
    formats = make_formats(folder)
    world = World(folder)
    (folder / "images").mkdir()
    for colour in COLOURS:
        picture(colour).save(folder / "images" / f"{colour}.png")
    pairs = records()
    questions = [{**record, "answer": record["chosen"]} for record in pairs]
    for question in questions:
        del question["chosen"], question["rejected"]
    world.write("train.json", pairs)
    world.write("test.json", questions)
    world.write("instructions.jsonl", questions)
    world.write("answers.jsonl", [answer(question) for question in questions])
    world.write("source.json", [
        {"id": f"s{n}", "image": f"{colour}.png", "conversations": [
            {"from": "human", "value": f"<image>\nWhat colour is it ({n})?"}, {"from": "gpt", "value": colour}]}
        for n, colour in enumerate(COLOURS)
    ])  # fmt: skip
    world.write("heads.json", {
        "model": "m", "base": "m", "weights": "0", "base_weights": "0", "data": "4", "num_prompts": 4, "chance": 0.5,
        "ranking": [{"layer": 1, "head": head, "auc": 0.5, "accuracy": 0.5} for head in range(4)],
    })  # fmt: skip
    world.write("adaptviz.json", {"scope": "target"})
    shutil.copy("scripts/zero2.json", folder / "zero.json")
    data = {"file": str(folder / "train.json"), "images": str(folder / "images")}
    world.write("study.json", {
        "base": str(formats.llava_hf), "data": data, "test": {**data, "file": str(folder / "test.json")},
        "training": {}, "answering": {}, "seeds": [0], "arms": {"one": {}},
    })  # fmt: skip
    return world
