# ruff: noqa: F811  `world` is a fixture, and what a case spoils
"""Malformed records, pictures, archives, weights and checkpoints at the commands that read them: one line, exit code 2.

What stands in a line is a pattern: file, record where there is one, what is wrong.
"""

import io
import os
import shutil
import struct
import zipfile
import zlib

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.malformed import MARKER
from tests.test_malformed import healthy, world  # noqa: F401

# ---- records: changes of the second one


def record(file, **changes):
    def spoil(world):
        found = world.read(file)
        found[1].update(changes)
        world.write(file, found)

    return spoil


LONG = "x" * 3_000_000
INJECTED = "q\n\x1b[2Jerror: \r\x00\u202e\u2028all is well"
SECOND = r"(train|test)\.json record 2 \(id q1\): "
RECORDS = {  # changes, what the line says
    "bool target": ({"target": True}, "must be a whole number"),
    "text target": ({"target": "2"}, "must be a whole number"),
    "fractional target": ({"target": 1.5}, "must be a whole number"),
    "target beyond": ({"target": 3}, "the prompt names Image2"),
    "negative target": ({"target": -1}, "the prompt names Image2"),
    "huge target": ({"target": 10**4000}, "the prompt names Image2"),
    "bool box": ({"target_box": [True, False, 5, 5]}, "target_box"),
    "box of NaN": ({"target_box": [0, 0, float("nan"), 5]}, "target_box"),
    "endless box": ({"target_box": [0, 0, float("inf"), float("inf")]}, "target_box"),
    "bool grid": ({"grid": [True, 2]}, "grid"),
    "image of numbers": ({"image": [1, 2]}, "`image` must be"),
    "image of objects": ({"image": [{}, None]}, "`image` must be"),
    "no image": ({"image": []}, "`image` must be"),
    "one image too few": ({"image": ["red.png"]}, "2 <image> but .* 1 images"),
    "prompt of numbers": ({"prompt": 7}, "`prompt` must be text"),
    "prompt of lists": ({"prompt": ["a"]}, "`prompt` must be text"),
    "empty prompt": ({"prompt": " "}, "`prompt` is empty"),
    "half a character": ({"prompt": "Image1:<image>\nImage2:<image>\nIn Image1, \ud800?"}, "half a character"),
    "half a character aside": ({"note": ["\udfff"]}, "half a character"),
    "unknown format": ({"image_type": "video"}, "'video' is none of"),
    "list for a format": ({"image_type": ["sequence"]}, "is none of"),
    "a picture outside": ({"image": ["../zero.json", "red.png"]}, "zero.json: the path leaves"),
    "a picture anywhere": ({"image": ["/etc/hostname", "red.png"]}, "hostname: the path leaves"),
    "a picture by a drive": ({"image": ["C:\\x.png", "red.png"]}, "the path leaves"),
    "a folder as a picture": ({"image": [".", "red.png"]}, "no such picture"),
    "a NUL in a name": ({"image": ["a\0b.png", "red.png"]}, "no such picture"),
    "a name of megabytes": ({"image": [LONG, "red.png"]}, "x"),
    "a prompt of control characters": ({"image_type": INJECTED}, "is none of"),
    "a format of megabytes": ({"image_type": LONG}, "'xxx"),
}  # fmt: skip
PAIRS = {
    "chosen of numbers": ({"chosen": 1}, "`chosen` must be text"),
    "rejected missing": ({"rejected": None}, "`rejected` must be text"),
    "both the same": ({"rejected": "blue", "chosen": "blue"}, "the same text"),
    "an end inside": ({"chosen": "blue</s>red"}, "must not contain '</s>'|special"),
    "an image inside": ({"rejected": "<image>"}, "must not contain '<image>'"),
}
ANSWERS = {
    "bool share": ({"attention_ratio": True}, "attention_ratio"),
    "share of NaN": ({"attention_ratio": float("nan")}, "attention_ratio"),
    "share above 1": ({"attention_ratio": 2}, "attention_ratio"),
    "share as text": ({"attention_by_image": "half"}, "attention_by_image"),
    "bool number": ({"num_images": True}, "num_images"),
    "no number": ({"num_images": 0}, "num_images"),
    "id of lists": ({"question_id": [1]}, "question_id"),
    "text of numbers": ({"text": 5}, "text"),
    "twice": ({"question_id": "q0"}, "was there before"),
    "of no question": ({"question_id": "q99"}, "q99 is not in"),
    "another truth": ({"answer": "mauve"}, "`answer` is 'mauve'"),
    "choices of numbers": ({"choices": [1, 2]}, "`choices`"),
    "others of nothing": ({"others": [""]}, "`others`"),
}
IDS = {"new lines and escape codes": INJECTED, "megabytes": LONG, "a list": [LONG], "an object": {"a": INJECTED}}

# ---- pictures


def png(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(kind, size=(40, 40)):
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, kind)
    return file.getvalue()


PICTURES = {
    "empty": (b"", "not a picture|empty file"),
    "web page": (b"<!doctype html><title>404</title>", "not a picture"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not a picture"),
    "json": (b"{}", "not a picture"),
    "zeros": (bytes(5000), "not a picture"),
    "cut png": (encoded("PNG")[:-900], "truncated or damaged|not a picture"),
    "cut jpeg": (encoded("JPEG")[:-400], "truncated or damaged"),
    "cut gif": (encoded("GIF")[:-400], "truncated or damaged"),
    "cut webp": (encoded("WEBP")[:-400], "truncated or damaged|not a picture"),
    "header only": (encoded("PNG")[:33], "truncated or damaged|not a picture"),
    "bomb of pixels": (png(100_000, 100_000), "more pixels"),
    "twice the limit": (png(12_000, 12_000), "more pixels"),
    "no width": (png(0, 5), "damaged|no area|not a picture"),
    "floats": ("F", "floating-point"),
    "wrong checksum": (encoded("PNG").replace(b"IDAT", b"IDAU", 1), "damaged|not a picture"),
}

def put(name, content):
    def spoil(world):
        if isinstance(content, bytes):
            (world / name).write_bytes(content)
        else:
            Image.new(content, (8, 8)).save((world / name).with_suffix(".tif"))
            (world / name).with_suffix(".tif").rename(world / name)

    return spoil


# ---- archives


def archive(spoil_bytes=None, **options):
    """`images.zip` in place of the folder, its bytes spoilt."""

    def spoil(world):
        with zipfile.ZipFile(world / "images.zip", "w", **options) as file:
            for path in sorted((world / "images").iterdir()):
                file.write(path, path.name)
        data = bytearray((world / "images.zip").read_bytes())
        if spoil_bytes:
            data = spoil_bytes(data) or data
        (world / "images.zip").write_bytes(data)

    return spoil


def headers(place, bits):
    """Of both headers of every member, a byte with other bits (9: bzip2's neighbour, which Python lacks)."""

    def change(data):
        for sign, offset in ((b"PK\3\4", place), (b"PK\1\2", place + 2)):
            start = data.find(sign)
            while start >= 0:
                data[start + offset] = bits
                start = data.find(sign, start + 4)

    return change


def zeroed(start, stop):
    def change(data):
        data[start:stop] = bytes(len(data[start:stop]))

    return change


def claiming(size):
    def change(data):
        start = data.find(b"PK\1\2")
        data[start + 24 : start + 28] = struct.pack("<I", size)

    return change


ARCHIVES = {
    "encrypted": (archive(headers(6, 1)), r"\.png in .*encrypted"),
    "unknown compression": (archive(headers(8, 9)), r"\.png in .*compression"),
    "broken bzip2": (archive(zeroed(45, 90), compression=zipfile.ZIP_BZIP2), r"\.png in "),
    "broken lzma": (archive(zeroed(45, 90), compression=zipfile.ZIP_LZMA), r"\.png in "),
    "broken deflate": (archive(zeroed(45, 90), compression=zipfile.ZIP_DEFLATED), r"\.png in "),
    "broken directory": (archive(lambda data: zeroed(data.find(b"PK\1\2"), data.find(b"PK\1\2") + 60)(data)),
                         r"images\.zip: the archive is cut off or damaged"),
    "cut": (archive(lambda data: data[: len(data) // 2]), r"images\.zip: not a folder, a \.zip"),
    "of hundreds of megabytes": (archive(claiming(900 << 20)), r"900|943,718,400 bytes"),
    "gzip": (lambda world: (world / "images.zip").write_bytes(b"\x1f\x8b\x08\0" + bytes(50)), r"images\.zip: not a"),
    "empty": (lambda world: (world / "images.zip").write_bytes(b""), r"images\.zip: not a"),
    "web page": (lambda world: (world / "images.zip").write_bytes(b"<html>" * 99), r"images\.zip: not a"),
    "missing": (lambda world: None, r"images\.zip: no such image folder"),
    "device": (lambda world: (world / "images.zip").symlink_to(os.devnull), r"images\.zip: not a"),
}  # fmt: skip

# ---- weights and checkpoints


def tensors(change):
    def spoil(world):
        path = world / "hf/model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, metadata={"format": "pt"})

    return spoil


def first(found, value):
    name = next(name for name in sorted(found) if "q_proj" in name)
    found[name] = value(found[name])


def replaced(file, content):
    return lambda world: (world / file).write_bytes(content if isinstance(content, bytes) else content(world / file))


def index(**changes):
    def spoil(world):
        name = "orig/model.safetensors.index.json"
        found = world.read(name)
        found["weight_map"] |= dict.fromkeys(list(found["weight_map"])[:1], changes["shard"])
        world.write(name, found)

    return spoil


def half(path):
    return path.read_bytes()[: path.stat().st_size // 2]


def pickled_code(world):
    """A .bin that would run code as it is unpickled."""

    class Runs:
        def __reduce__(self):
            return open, (str(world / MARKER), "w")

    torch.save({"a": Runs()}, world / "orig_bin/pytorch_model-00001-of-00002.bin")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
PAGE = b"\n<!DOCTYPE html><html>404</html>"
HF, SHARD = "hf/model.safetensors", "orig/model-00001-of-00002.safetensors"
BIN = "orig_bin/pytorch_model-00001-of-00002.bin"
WEIGHTS = {  # spoil, model, what the line says
    **{f"{what} {file.split('/')[0]}": (replaced(file, content), file.split("/")[0], rf"{file.split('/')[1]}: .*{said}")
       for file in (HF, SHARD, BIN, "adapter/adapter_model.safetensors", "orig_lora/non_lora_trainables.bin")
       for what, content, said in (
           ("empty", b"", "empty file"), ("git-lfs pointer", LFS, "git-lfs"), ("web page", PAGE, "web page"),
           ("half", half, "cannot be read|cut"), ("noise", b"\7" * 4096, "cannot be read"))},
    "missing shard": (lambda world: (world / SHARD).unlink(), "orig", "not there"),
    "shard above": (index(shard="../hf/model.safetensors"), "orig", "must lie beside"),
    "shard anywhere": (index(shard="/etc/hostname"), "orig", "must lie beside"),
    "shard of a number": (index(shard=7), "orig", "weight_map"),
    "no weights": (lambda world: (world / HF).unlink(), "hf", "no weights|cannot be read"),
    "NaN": (tensors(lambda found: first(found, lambda t: t * float("nan"))), "hf", r"hf: no numbers .*q_proj"),
    "infinity": (tensors(lambda found: first(found, lambda t: t + float("inf"))), "hf", r"hf: no numbers .*q_proj"),
    "wrong shape": (tensors(lambda found: first(found, lambda t: t[:-1].clone())), "hf", "mis-shaped.*q_proj"),
    "one missing": (tensors(lambda found: found.pop(sorted(found)[3])), "hf", "missing tensors"),
    "one too many": (tensors(lambda found: found.update(extra=torch.ones(2))), "hf", "unexpected tensors: extra"),
    "code in a pickle": (pickled_code, "orig_bin", r"00001-of-00002\.bin: cannot be read"),
}  # fmt: skip


def settings(file, **changes):
    def spoil(world):
        world.write(file, {**world.read(file), **changes})

    return spoil


def with_code(*files):
    """`auto_map` in settings, and the Python that it names, which leaves a mark if it runs."""

    def spoil(world):
        for name in files:
            kinds = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoModel", "AutoModelForImageTextToText")
            auto = {kind: "runs.Runs" for kind in kinds} | {"AutoTokenizer": ["runs.Runs", None]}
            world.write(name, {**world.read(name), "auto_map": auto, "custom_generate": "runs.py"})
        for folder in {world / name.split("/")[0] for name in files}:
            code = f"open({str(world / MARKER)!r}, 'w')\nclass Runs: pass\n"
            (folder / "runs.py").write_text(code)
            (folder / "custom_generate").mkdir(exist_ok=True)
            (folder / "custom_generate/generate.py").write_text(code)

    return spoil


ADAPTER = "adapter/adapter_config.json"
CHECKPOINTS = {
    "its own base": (lambda w: settings(ADAPTER, base_model_name_or_path=str(w / "adapter"))(w), "adapter", "circle"),
    "two that name each other": (
        lambda w: (shutil.copytree(w / "adapter", w / "other"),
                   settings(ADAPTER, base_model_name_or_path=str(w / "other"))(w),
                   settings("other/adapter_config.json", base_model_name_or_path=str(w / "adapter"))(w)),
        "adapter", "circle"),
    "base of a number": (settings(ADAPTER, base_model_name_or_path=7), "adapter", "no such checkpoint"),
    "base of a list": (settings(ADAPTER, base_model_name_or_path=["a"]), "adapter", "no such checkpoint"),
    "base of control characters": (settings(ADAPTER, base_model_name_or_path=INJECTED), "adapter", "no such check"),
    "base nowhere": (settings(ADAPTER, base_model_name_or_path="/nowhere"), "adapter", "nowhere"),
    "model of a list": (settings("hf/config.json", model_type=["llava"]), "hf", "hf: "),
    "model of megabytes": (settings("hf/config.json", model_type=LONG), "hf", "hf: "),
    "text settings of a list": (settings("hf/config.json", text_config=[1]), "hf", "hf: "),
    "text settings of text": (settings("hf/config.json", text_config="big"), "hf", "hf: "),
    "vision settings of null": (settings("hf/config.json", vision_config=7), "hf", "hf: "),
    "layers as text": (settings("orig/config.json", num_hidden_layers="many"), "orig", "orig"),
    "vocabulary of a list": (settings("orig/config.json", vocab_size=[1]), "orig", "orig"),
    "no vocabulary": (settings("orig/config.json", vocab_size=None), "orig", "orig"),
    "a tower of a number": (settings("orig/config.json", mm_vision_tower=7), "orig", ""),
    "a projector of another": (settings("orig/config.json", mm_projector_type="linear"), "orig", "mlp2x_gelu"),
    "layers of no tower": (settings("orig/config.json", mm_vision_select_layer=7), "orig", "vision_feature_layer is 7"),
    "pictures of a kind of lists": (
        lambda w: (settings("clip/preprocessor_config.json", image_processor_type=["x"])(w),
                   settings("orig/config.json", mm_vision_tower=str(w / "clip"))(w)),
        "orig", r"clip/preprocessor_config\.json: "),
    "pieces of noise": (replaced("orig/tokenizer.model", b"\7" * 99), "orig", "tokenizer"),
    "no pieces": (replaced("orig/tokenizer.model", b""), "orig", "tokenizer"),
    "pictures of a size as text": (
        lambda w: settings("hf/processor_config.json", image_processor={
            **w.read("hf/processor_config.json")["image_processor"], "size": "large"})(w), "hf", "hf: "),
}  # fmt: skip
AT_THE_WEIGHTS = {
    "an unknown activation": (settings("orig/config.json", hidden_act="x"), "orig", "orig: KeyError: 'x'"),
    "a rank for nothing": (settings(ADAPTER, alpha_pattern=True), "adapter", "adapter_config"),
}

CASES = {
    **{f"{command}: {name}": (record(file, **changes), command, SECOND + f".*({line})")
       for name, (changes, line) in RECORDS.items()
       for file, command in (("train.json", "train"), ("test.json", "answer"))},
    **{f"train: {name}": (record("train.json", **changes), "train", SECOND + f".*({line})")
       for name, (changes, line) in PAIRS.items()},
    **{f"evaluate: {name}": (record("answers.jsonl", **changes), "evaluate", rf"answers\.jsonl.*({line})")
       for name, (changes, line) in ANSWERS.items()},
    **{f"{command}: an id of {name}": (record(file, id=id, target=9), command, "record 2 .*the prompt names Image2")
       for name, id in IDS.items() for file, command in (("train.json", "mix"), ("test.json", "evaluate"))},
    **{f"{command}: picture, {name}": (put("images/green.png", content), command, rf"record 1 (?=.*green).*({line})")
       for name, (content, line) in PICTURES.items() for command in ("train", "answer", "mix")},
    **{f"{command}: archive, {name}": (spoil, command, line, "--image_folder", "@images.zip")
       for name, (spoil, line) in ARCHIVES.items() for command in ("train", "answer")},
    **{f"export: weights, {name}": (spoil, "export", line, "--model_name_or_path", f"@{model}")
       for name, (spoil, model, line) in WEIGHTS.items()},
    **{f"export: {name}": (spoil, "export", line, "--model_name_or_path", f"@{model}")
       for name, (spoil, model, line) in AT_THE_WEIGHTS.items()},
    **{f"answer: checkpoint, {name}": (spoil, "answer", line, "--model_name_or_path", f"@{model}")
       for name, (spoil, model, line) in CHECKPOINTS.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line(world, case):
    spoil, command, line, *more = CASES[case]
    spoil(world)
    before = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*") if path.is_file()}
    world.refused(command, line, *more)
    after = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*") if path.is_file()}
    assert {path for path in after if path not in before and path.suffix != ".lock"} == set()
    assert all(after.get(path) == time for path, time in before.items())


SETTINGS = ("config", "processor_config", "tokenizer_config", "generation_config")


@pytest.mark.parametrize("file", SETTINGS)
@pytest.mark.parametrize("command", ["train", "answer", "export"])
def test_code_of_a_checkpoint_never_runs(world, command, file, monkeypatch):
    """Refused, or read without it; no question is asked either."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with_code(f"hf/{file}.json")(world)
    code, _, err = world.run(command)
    assert not (world / MARKER).exists()
    assert code == 0 or (code == 2 and err.count("\n") == 1)
