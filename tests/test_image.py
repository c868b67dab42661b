"""Pictures from a folder, a .zip and a .tar; padding to a square; the model's input against transformers'."""

import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llava.image import ImageStore
from tests.conftest import llava15

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(97, 40), (40, 97), (64, 64), (3, 2), (1, 50), (1, 1)]  # width, height


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


FILES = {f"sub/{n}.png": encoded(noise(8 + n, 6, seed=n)) for n in range(12)}


def make_store(folder, kind, files, top=""):
    """The files in a folder, zip or tar below `folder`, below a common top folder if one is given."""
    path = folder / f"pictures.{kind}"
    if kind == "folder":
        for name, data in files.items():
            (path / top / name).parent.mkdir(parents=True, exist_ok=True)
            (path / top / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(top + name, data)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(top + name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "zip", "tar"])
def kind(request):
    return request.param


def assert_all_read(store):
    for n, name in enumerate(FILES):
        np.testing.assert_array_equal(np.asarray(store.open(name)), noise(8 + n, 6, seed=n))


# ---- where pictures come from


def test_pictures_are_read_as_stored(tmp_path, kind):
    store = ImageStore(make_store(tmp_path, kind, FILES))
    assert_all_read(store)
    assert store.size("sub/3.png") == (11, 6) and store.has("sub/3.png") and not store.has("sub/99.png")


@pytest.mark.parametrize("archive", ["zip", "tar"])
@pytest.mark.parametrize("top", ["images/", "./", "./images/"])
def test_a_common_top_folder_may_be_left_out(tmp_path, archive, top):
    files = FILES | {"b.png": FILES["sub/0.png"]}  # else `sub` is the common top folder
    store = ImageStore(make_store(tmp_path, archive, files, top))
    assert_all_read(store)
    assert store.has("images/sub/0.png") and store.has("./sub/0.png") and not store.has("other/sub/0.png")


def test_without_a_common_top_folder_nothing_is_left_out(tmp_path):
    store = ImageStore(make_store(tmp_path, "zip", {"a/x.png": FILES["sub/0.png"], "b/y.png": FILES["sub/1.png"]}))
    assert store.has("a/x.png") and not store.has("x.png")


def test_two_workers_read_while_the_parent_holds_the_archive_open(tmp_path, kind):
    store = ImageStore(make_store(tmp_path, kind, FILES))
    assert_all_read(store)
    names = list(FILES) * 8
    loader = DataLoader(
        names, batch_size=None, num_workers=2, collate_fn=lambda n: (n, np.asarray(store.open(n)).sum())
    )
    found = list(loader)
    assert_all_read(store)
    wanted = {name: noise(8 + n, 6, seed=n).sum() for n, name in enumerate(FILES)}
    assert len(found) == len(names) and all(total == wanted[name] for name, total in found)


def test_a_pickled_store_reads_in_a_fresh_process(tmp_path, kind):
    """What a spawned DataLoader worker gets: after use, with an open handle and a lock."""
    store = ImageStore(make_store(tmp_path, kind, FILES))
    store.open("sub/0.png")
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).open('sub/5.png').size)"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(store), cwd=ROOT, capture_output=True)
    assert done.stdout.decode().strip() == "(13, 6)", done.stderr.decode()
    assert_all_read(pickle.loads(pickle.dumps(store)))


def test_threads_share_a_store(tmp_path, kind):
    store = ImageStore(make_store(tmp_path, kind, FILES))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: assert_all_read(store), range(16)))


def test_missing_picture_is_named(tmp_path, kind):
    path = make_store(tmp_path, kind, FILES)
    for look in (ImageStore(path).open, ImageStore(path).size, ImageStore(path).stamp):
        with pytest.raises(FileNotFoundError, match=r"(?s)(sub/none\.jpg.*pictures|pictures.*sub/none\.jpg)"):
            look("sub/none.jpg")


def test_stamp_changes_with_the_content(tmp_path, kind):
    path = make_store(tmp_path, kind, FILES)
    before = ImageStore(path).stamp("sub/1.png")
    assert ImageStore(path).stamp("sub/1.png") == before
    make_store(tmp_path, kind, FILES | {"sub/1.png": FILES["sub/1.png"] + b"more"})
    assert ImageStore(path).stamp("sub/1.png") != before


def test_missing_store_and_files_that_are_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageStore(tmp_path / "nowhere")
    (tmp_path / "list.txt").write_text("a.jpg\n" * 200)
    (tmp_path / "empty.zip").write_bytes(b"")
    compressed = make_store(tmp_path, "tar.gz", FILES)
    for path in (tmp_path / "list.txt", tmp_path / "empty.zip", compressed):
        with pytest.raises(ValueError, match=rf"{path.name}.*\.zip or an uncompressed \.tar"):
            ImageStore(path)


# ---- damaged pictures

GOOD = noise(60, 40)
DAMAGED = {
    "cut.jpg": encoded(GOOD, "JPEG")[:-900],
    "cut.png": encoded(GOOD)[:-900],
    "text.jpg": b"<html>404 not found</html>",
    "zero.png": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_named(tmp_path, kind, name):
    path = make_store(tmp_path, kind, DAMAGED | {"sub/good.png": encoded(GOOD)})
    with pytest.raises(ValueError, match=name) as caught:
        ImageStore(path).open(name)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("picture_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_picture_cut_anywhere_is_a_value_error(tmp_path, picture_format):
    data = encoded(noise(20, 12), picture_format)
    path = tmp_path / "x.img"
    store = ImageStore(tmp_path)
    for length in range(0, len(data) - 16, max(1, len(data) // 80)):
        path.write_bytes(data[:length])
        try:
            store.open("x.img")
        except ValueError as error:
            assert "x.img" in str(error)


def test_a_picture_of_absurd_size_is_named(tmp_path):
    """A header that claims 20,000 x 20,000 px: pillow takes it for a decompression bomb."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = encoded(GOOD)
    (tmp_path / "x.png").write_bytes(data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:])
    with pytest.raises(ValueError, match=r"x\.png"):
        ImageStore(tmp_path).open("x.png")


def test_a_damaged_zip_member_is_named(tmp_path):
    """Flipped bytes inside an archive: its checksum fails before pillow sees the picture."""
    path = make_store(tmp_path, "zip", {"a.png": encoded(GOOD), "b.png": encoded(GOOD)})
    data = bytearray(path.read_bytes())
    data[1000:1100] = bytes(100)  # inside the first member
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png"):
        ImageStore(path).open("a.png")


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_an_archive_cut_off_is_refused(tmp_path, archive):
    """A download that stopped half-way."""
    path = make_store(tmp_path, archive, {f"{n}.png": encoded(GOOD) for n in range(5)})
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(ValueError, match=path.name):
        store = ImageStore(path)
        for n in range(5):
            store.open(f"{n}.png")


# ---- colour modes


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint16))
    else:
        picture = grey.convert("RGB").convert(mode) if mode in ("P", "RGBA", "CMYK") else grey.convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    picture.save(tmp_path / "x.img", kind)
    found = ImageStore(tmp_path).open("x.img")
    assert found.mode == "RGB" and found.size == (2, 2)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], [[0, 255], [255, 0]])


# ---- square padding and the model's input


@pytest.mark.parametrize("size", SHAPES)
def test_padded_pixels_are_those_of_a_square_made_by_numpy(size):
    """Of the mean colour of CLIP, rounded down, as LLaVA pads."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    width, height = size
    square = np.empty((max(size), max(size), 3), dtype=np.uint8)
    square[:] = (122, 116, 104)
    top, left = (max(size) - height) // 2, (max(size) - width) // 2
    square[top : top + height, left : left + width] = noise(*size)
    wanted = clip(images=[Image.fromarray(square)], return_tensors="pt")["pixel_values"]
    ours = llava15(clip).pixels([Image.fromarray(noise(*size))])["pixel_values"]
    assert ours.shape == (1, 3, 56, 56) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)


def test_unpadded_pixels_are_the_processors_own(processor):
    pictures = [Image.fromarray(noise(90, 80, seed)) for seed in range(2)]
    ours = llava15(processor.image_processor, 12, pad=False).pixels(pictures)["pixel_values"]
    theirs = [processor.image_processor(images=[p], return_tensors="pt")["pixel_values"][0] for p in pictures]
    assert torch.equal(ours, torch.stack(theirs)) and not torch.equal(ours[0], ours[1])
