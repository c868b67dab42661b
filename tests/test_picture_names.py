"""One set of pictures in a folder, a zip and a tar: the same names, the same refusals; healthy and hostile files."""

import io
import stat
import tarfile
import tracemalloc
import zipfile
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from data_gen.pictures import decode
from llava import image
from llava.image import ImageStore
from tests.test_image import encoded, kind, make_store, noise  # noqa: F401  a fixture

GOOD = encoded(noise(9, 6))
NAME = "Zoë/Übung.png"
NFC, NFD = normalize("NFC", NAME), normalize("NFD", NAME)
OF_SYSTEMS = ("__MACOSX/images/._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", "images/._b.png")


ASKED = ["a.png", "images/a.png", "./images/a.png", "images\\a.png", ".\\a.png"]
PLACES = [(top, name) for top in ("", "images/", "set/", "Ümlaut/") for name in ASKED]
PLACES += [("images/images/", "images/a.png"), ("images/", "images/images/a.png")]


@pytest.mark.parametrize(("top", "asked"), PLACES)
def test_folder_zip_and_tar_answer_to_the_same_names(tmp_path, kind, top, asked):  # noqa: F811
    """Zipped with or without its folder, unpacked beside or inside one of its name: a record need not know."""
    store = ImageStore(make_store(tmp_path, kind, {"a.png": GOOD, "b.png": GOOD}, top))
    assert store.open(asked).size == store.size(asked) == (9, 6)
    assert store.has(asked) and store.read(asked) == GOOD and store.stamp(asked)
    assert not store.has("other/a.png") and not store.has("c.png")


@pytest.mark.parametrize("name", ["coco/a.png", "coco\\a.png"])
def test_a_folder_that_means_something_is_not_left_out(tmp_path, kind, name):  # noqa: F811
    store = ImageStore(make_store(tmp_path, kind, {"coco/a.png": GOOD, "vg/a.png": encoded(noise(5, 5))}))
    assert store.size(name) == (9, 6) and not store.has("a.png") and not store.has("gqa/a.png")


def test_what_systems_put_beside_the_pictures_is_not_one(tmp_path, kind):  # noqa: F811
    files = {"images/a.png": GOOD, **dict.fromkeys(OF_SYSTEMS, b"none")}
    store = ImageStore(make_store(tmp_path, kind, files))
    assert store.size("a.png") == store.size("images/a.png") == (9, 6)


@pytest.mark.parametrize(("stored", "asked"), [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD),
                                               (f"{NFD[:4]}/{NFC[4:]}", f"{NFC[:3]}/{NFD[5:]}")])  # fmt: skip
def test_letters_are_the_same_composed_or_not(tmp_path, kind, stored, asked):  # noqa: F811
    """A Mac's disk has ¨ after its letter, a JSON file mostly both as one."""
    store = ImageStore(make_store(tmp_path, kind, {stored: GOOD, "b.png": GOOD}))
    assert store.size(asked) == (9, 6) and store.has(asked)


def test_two_pictures_that_differ_in_this_alone_are_both_there(tmp_path, kind):  # noqa: F811
    store = ImageStore(make_store(tmp_path, kind, {NFC: GOOD, NFD: encoded(noise(5, 5))}))
    assert (store.size(NFC), store.size(NFD)) == ((9, 6), (5, 5))


# ---- paths out of the store


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "{folder}/secret.png", "..\\secret.png",
                                  "C:\\secret.png", "images/../../secret.png"])  # fmt: skip
def test_a_path_that_leaves_the_store_is_refused(tmp_path, kind, name):  # noqa: F811
    (tmp_path / "secret.png").write_bytes(GOOD)
    store = ImageStore(make_store(tmp_path, kind, {"sub/a.png": GOOD, "b.png": GOOD, "../secret.png": GOOD}
                                  if kind != "folder" else {"sub/a.png": GOOD}))  # fmt: skip
    name = name.format(folder=tmp_path)
    for look in (store.open, store.size, store.read, store.stamp):
        with pytest.raises(ValueError, match=r"secret\.png.*the path leaves the image folder"):
            look(name)
    assert not store.has(name)


def test_a_link_that_leaves_the_folder_is_refused_and_one_inside_is_followed(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(GOOD)
    folder = make_store(tmp_path, "folder", {"a.png": GOOD})
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.png").symlink_to("a.png")
    store = ImageStore(folder)
    for name in ("out.png", "up/secret.png"):
        with pytest.raises(ValueError, match=r"secret|out\.png: a link that leaves"):
            store.open(name)
    assert store.size("in.png") == (9, 6)
    monkeypatch.setenv("FOLLOW_LINKS", "1")
    assert store.size("out.png") == store.size("up/secret.png") == (9, 6)


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_in_a_tar_are_followed_to_a_member_or_refused(tmp_path, type):
    path = make_store(tmp_path, "tar", {"a.png": GOOD})
    with tarfile.open(path, "a") as archive:
        for name, target in (("in.png", "a.png"), ("out.png", "/etc/hostname")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type, target
            archive.addfile(info)
    store = ImageStore(path)
    with pytest.raises(ValueError, match=r"out\.png in .*it is a link"):
        store.open("out.png")
    if type == tarfile.LNKTYPE:  # as tar itself stores the second of two hard links
        assert store.size("in.png") == (9, 6)


def test_a_link_in_a_zip_is_no_picture(tmp_path):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/hostname")
    with pytest.raises(ValueError, match=r"link\.png.*not a picture"):
        ImageStore(tmp_path / "x.zip").open("link.png")


# ---- archives that cannot be read


def patched(path, before, after):
    """The archive with some bytes of its headers changed."""
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, after))


def test_an_encrypted_member_is_named(tmp_path):
    path = make_store(tmp_path, "zip", {"a.png": GOOD})
    data = bytearray(path.read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(header) + flags] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png in .*encrypted"):
        ImageStore(path).open("a.png")


@pytest.mark.parametrize("method", [9, 97, 98])
def test_a_compression_that_python_lacks_is_named(tmp_path, method):
    path = make_store(tmp_path, "zip", {"a.png": GOOD})
    data = bytearray(path.read_bytes())
    for header, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.index(header) + place] = method
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png in .*compression"):
        ImageStore(path).open("a.png")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_broken_stream_is_named(tmp_path, method):
    big = encoded(noise(90, 90))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("a.png", big)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[45:2000] = bytes(1955)
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.png in "):
        ImageStore(tmp_path / "x.zip").open("a.png")


@pytest.mark.parametrize("size", ["true", "false"])
def test_a_member_that_would_inflate_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, size):
    """Also where its header gives another size."""
    monkeypatch.setattr(image, "LARGEST", 1 << 20)
    path = make_store(tmp_path, "zip", {"bomb.png": bytes(64 << 20)})
    if size == "false":
        patched(path, (64 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    store = ImageStore(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.png in "):
        store.open("bomb.png")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


# ---- healthy pictures that are out of the ordinary


def with_text(kilobytes, compressed):
    info = PngImagePlugin.PngInfo()
    info.add_text("history", "x" * (kilobytes << 10), zip=compressed)
    info.add_itxt("more", "y" * (kilobytes << 10), zip=compressed)
    return {"pnginfo": info}


def profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(3 << 20)


HEALTHY = {
    "text": ("PNG", lambda: with_text(3 << 10, False)),
    "compressed text": ("PNG", lambda: with_text(3 << 10, True)),
    "profile in a png": ("PNG", lambda: {"icc_profile": profile()}),
    "profile in a jpeg": ("JPEG", lambda: {"icc_profile": profile()}),
    "profile in a webp": ("WEBP", lambda: {"icc_profile": profile(), "lossless": True}),
    "exif": ("JPEG", lambda: {"exif": Image.Exif(), "comment": b"x" * 60_000}),
    "exif of a png": ("PNG", lambda: {"exif": b"Exif\0\0MM\0*\0\0\0\10\0\0\0\0\0\0" + bytes(2 << 20)}),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_picture_with_megabytes_of_metadata_is_read(tmp_path, case):
    format, options = HEALTHY[case]
    pixels = noise(12, 7)
    Image.fromarray(pixels).save(tmp_path / "x.img", format, **options())
    store = ImageStore(tmp_path)
    plain = io.BytesIO()
    Image.fromarray(pixels).save(plain, format, **({"lossless": True} if format == "WEBP" else {}))
    wanted = np.asarray(Image.open(plain).convert("RGB"))
    assert store.size("x.img") == (12, 7)
    np.testing.assert_array_equal(np.asarray(store.open("x.img")), wanted)
    np.testing.assert_array_equal(np.asarray(decode(store.read("x.img"), "x").pixels), wanted)


def test_text_that_inflates_without_end_is_refused(tmp_path):
    Image.fromarray(noise(4, 4)).save(tmp_path / "x.png", **with_text(80 << 10, True))
    with pytest.raises(ValueError, match=r"x\.png: truncated or damaged picture"):
        ImageStore(tmp_path).open("x.png")
