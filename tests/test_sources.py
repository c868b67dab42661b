"""Sources of single-image data: every form gives the same records; what is malformed is said; pictures of all kinds."""

import csv
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from data_gen.drops import Unusable
from data_gen.pictures import decode, encode, fingerprint
from data_gen.sources import BOX, Sources, parse_source
from data_gen.tables import Table
from llava import tables
from tests.single_images import colour, record, save_pictures, turns, write

UNICODE = 'Größe – 多大?\u2028\n"quoted", with , commas'


def records(count=7):
    found = [record(number) for number in range(count)]
    found[2] = record(2, conversations=turns(f"{UNICODE}\n<image>", "So?"), extra=["x"] * 50)
    return found


def read(*paths, images=None):
    drops = []
    sources = Sources(paths, images, drops.append)
    return sources, drops


def save_json(path, rows, kind):
    ascii_only = kind.endswith("ascii")
    dump = lambda row, **more: json.dumps(row, ensure_ascii=ascii_only, **more)  # noqa: E731
    text = {
        "array": dump(rows), "indented": "\n " + dump(rows, indent=2), "array ascii": dump(rows),
        "jsonl": "\n".join(map(dump, rows)), "jsonl ascii": "\n\n".join(map(dump, rows)) + "\n\n",
        "bom": "\ufeff" + dump(rows), "jsonl bom": "\ufeff" + "\n".join(map(dump, rows)),
    }[kind]  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return path


# ---- every form


@pytest.mark.parametrize("kind", ["array", "indented", "array ascii", "jsonl", "jsonl ascii", "bom", "jsonl bom"])
def test_json_forms_are_read_alike(tmp_path, kind):
    path = save_json(tmp_path / "s.json", records(), kind)
    assert list(Table(path).rows()) == records() == list(tables.read_rows(path))
    assert list(pickle.loads(pickle.dumps(Table(path))).rows()) == records()


def test_csv_of_questions(tmp_path):
    with (tmp_path / "q.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer", "id", "subset"])
        writer.writerows([["a/1.png", UNICODE, "So", "one", ""], ["a/2.png", "Why?", "So", "", "special"], ["x"]])
    save_pictures(tmp_path / "images", 1)
    sources, drops = read(tmp_path / "q.csv", images=tmp_path / "images")
    assert [(s.id, s.subset, s.path) for s in sources] == [("one", "a", "a/1.png"), ("q_2", "special", "a/2.png")]
    assert sources[0].turns == ((UNICODE, "So"),) and not sources[0].is_conversation
    assert [(drop.id, drop.reason) for drop in drops] == [("q_3", "unreadable record")] and "1 fields" in drops[
        0
    ].detail


def test_tsv_is_read_as_csv_is(tmp_path):
    (tmp_path / "q.tsv").write_text('image\tquestion\tanswer\na/1.png\tWhy "so"?\tN/A\na/2.png\t\tx\n')
    (tmp_path / "images").mkdir()
    sources, drops = read(tmp_path / "q.tsv", images=tmp_path / "images")
    assert [source.turns for source in sources] == [(('Why "so"?', "N/A"),)]
    assert "the field `question` is missing or empty" in drops[0].detail


def test_half_a_character_is_refused(tmp_path):
    """A lone surrogate is no text: it could be written nowhere."""
    (tmp_path / "s.jsonl").write_text(json.dumps(record(0, conversations=turns("<image> A\ud83d?", "B."))) + "\n")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"malformed record: .*surrogates"):
        read(tmp_path / "s.jsonl", images=tmp_path / "images")


def test_groups_of_companions_are_disjoint_and_the_same_in_every_run(tmp_path):
    raws = [record(number, id=f"{number}_{copy}") for copy in range(2) for number in range(200)]
    flags = write(tmp_path, raws)
    write(tmp_path, raws[:0:-1] + raws[:1], "other.json")
    (tmp_path / "images").mkdir()

    def groups(path):
        sources, _ = read(path, images=tmp_path / "images")
        paths, found = [source.path for source in sources], set()
        for index, path in enumerate(paths):
            own = [frozenset(paths[number] for number in group) for group in sources.companions(index)]
            assert path in own[0] and len(frozenset().union(*own)) == 200 == sum(map(len, own))
            found.add(own[0])
        return found

    found = groups(flags[1])
    assert len(found) == 16 and {len(group) for group in found} == {12, 13} and groups(tmp_path / "other.json") == found


def test_csv_needs_its_columns(tmp_path):
    (tmp_path / "q.csv").write_text("image,question\na,b\n")
    with pytest.raises(ValueError, match="the header lacks answer; it has image, question"):
        list(Table(tmp_path / "q.csv").rows())


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("embedded", ["feature", "binary", "path"])
def test_data_sets_of_the_datasets_library(tmp_path, monkeypatch, kind, embedded):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_pictures(tmp_path / "images", 4)
    names = [f"coco/{number}.png" for number in range(4)]
    data = [(tmp_path / "images" / name).read_bytes() for name in names]
    cells = {"feature": [{"bytes": d, "path": None} for d in data], "binary": data, "path": names}[embedded]
    columns = {"image": cells, "question": [["Who?", "Where?"]] * 4, "answer": [["He.", "There."]] * 4}
    made = datasets.Dataset.from_dict(columns)
    made = made.cast_column("image", datasets.Image()) if embedded == "feature" else made
    path = tmp_path / ("data" if kind == "folder" else "data.parquet")
    made.save_to_disk(str(path)) if kind == "folder" else made.to_parquet(str(path))
    sources, drops = read(path, images=tmp_path / "images" if embedded == "path" else None)
    assert not drops and len(sources) == 4 and sum(map(len, sources.companions(0))) == 4
    for index, source in enumerate(pickle.loads(pickle.dumps(sources))):
        assert source.turns == (("Who?", "He."), ("Where?", "There.")) and source.id == f"data_{index + 1}"
        picture = sources.picture(index, source)
        assert picture.pixels.getpixel((0, 0)) == colour(index) and picture.data == data[index]
        assert (source.subset, sources.is_embedded(index)) == (
            ("coco", False) if embedded == "path" else ("data", True)
        )


def test_splits_must_be_chosen(tmp_path):
    import datasets

    split = datasets.Dataset.from_dict({"question": ["a"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"holds the splits train, test; give one, as .*train"):
        Table(tmp_path / "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("hello", "neither JSON nor JSONL"),
        ('[{"a": 1}, {"a": }]', r"s.json: broken JSON .*after record 1 .*Expecting value"),
        ('[\n{"a": 1},\n{"a": 1', r"s.json: broken JSON .*after record 1 .*Expecting"),
        ('[{"a": 1} {"a": 2}]', "after record 0 .*Expecting ',' or ']'"),
        ('[{"a": 1},', "broken JSON"),
    ],
)
def test_a_file_that_cannot_be_read_on_is_refused(tmp_path, text, message):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(Table(tmp_path / "s.json").rows())


def test_a_broken_line_costs_only_itself(tmp_path):
    rows = [json.dumps(record(0)), '{"id": 3, "ima', json.dumps(record(1))]
    (tmp_path / "s.jsonl").write_text("\n".join(rows))
    (tmp_path / "images").mkdir()
    sources, drops = read(tmp_path / "s.jsonl", images=tmp_path / "images")
    assert [s.id for s in sources] == ["coco_0", "coco_1"]
    assert drops[0].where.endswith("s.jsonl record 2") and drops[0].reason == "unreadable record"


# ---- what a record must have


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"conversations": turns("What?", "This.")}, "no <image>", "0 <image>"),
        ({"conversations": turns("<image> or <image>?", "This.")}, "several <image>", "2 <image>"),
        ({"conversations": turns("<image> A?", "B.", "<image> C?", "D.")}, "several <image>", "2 <image>"),
        ({"conversations": turns("A?", "B.", "<image> C?", "D.")}, "malformed record", "after the first"),
        ({"conversations": []}, "no question", "no human turn"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no question", "no human turn"),
        ({"conversations": turns("<image> A?")}, "malformed record", "take turns"),
        ({"conversations": turns("<image>", "B.")}, "malformed record", "empty"),
        ({"conversations": turns("<image> A?", " ")}, "malformed record", "empty"),
        ({"conversations": turns("<image> A?", "no <image>")}, "malformed record", "<image>"),
        ({"conversations": "<image>"}, "malformed record", "list of turns"),
        ({"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "x"}]}, "malformed record", "text"),
        ({"conversations": turns("<image> A?", "B."), "image": ["a", "b"]}, "malformed record", "one picture"),
        ({"image": None}, "malformed record", "one picture"),
        ({"image": "../secret.png"}, "path outside the image folder", "below"),
        ({"image": "a/../../secret.png"}, "path outside the image folder", "below"),
        ({"image": "/etc/secret.png"}, "path outside the image folder", "below"),
        ({"image": "C:\\secret.png"}, "path outside the image folder", "below"),
        ({"image": "https://example.org/a.png"}, "malformed record", "download"),
        ({"conversations": None}, "malformed record", "no `conversations`"),
        ({"conversations": None, "question": ["a", "b"], "answer": "c"}, "malformed record", "2 questions but 1"),
    ],
)
def test_bad_records(tmp_path, changes, reason, detail):
    raw = record(0, **changes)
    path = tmp_path / "s.jsonl"
    path.write_text("{}")
    with pytest.raises(Unusable, match=detail) as caught:
        parse_source(raw, path, 1)
    assert caught.value.reason == reason and caught.value.is_bad


def test_text_only_records_are_no_mistake(tmp_path):
    raws = [record(0), record(1, image=None, conversations=turns("Hello!", "Hello."))]
    flags = write(tmp_path, raws)
    (tmp_path / "images").mkdir()
    sources, drops = read(flags[1], images=flags[3])
    assert len(sources) == 1 and [(drop.reason, drop.is_bad) for drop in drops] == [("text only", False)]


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path):
    flags = write(tmp_path, [record(0, conversations=[]), record(1, conversations=[])])
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match=r"none of 2 .* record 1 \(id coco_0\): no question"):
        read(flags[1], images=flags[3])


def test_images_must_be_somewhere(tmp_path):
    with pytest.raises(ValueError, match="--image_folder"):
        read(write(tmp_path, [record(0)])[1])


def test_pools_have_each_path_once_and_only_their_subset(tmp_path):
    raws = [record(number % 3, "coco", id=f"c{number}") for number in range(9)] + [record(n, "gqa") for n in range(2)]
    raws.append(record(0, image="./coco/0.png"))
    flags = write(tmp_path, raws)
    (tmp_path / "images").mkdir()
    sources, _ = read(flags[1], images=flags[3])
    assert [list(group) for group in sources.companions(5)] == [[0, 1, 2]]
    assert [list(group) for group in sources.companions(10)] == [[9, 10]]
    assert sources.same_path(0, 3) and sources.same_path(0, 11) and not sources.same_path(0, 9)
    assert sources.subsets == ["coco", "gqa"] and sources.in_subset("gqa").sum() == 2
    assert not sources.in_subset("x").any()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", True),
        ("at [ 1,2,\n3, 4 ].", True),
        ("[1, 2, 3]", False),
        ("[-1, 2, 3, 4]", False),
        ("[.5, 2, 3, 4]", False),
        ("[1, 2, 3, 4, 5]", False),
        ("[1 , 2, 3, 4]", False),
    ],
)
def test_bounding_boxes(text, found):
    assert bool(BOX.search(text)) == found


# ---- pictures


def as_file(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_of_all_modes_become_upright_rgb():
    plain = Image.new("RGB", (40, 20), (200, 30, 60))
    plain.paste((20, 30, 200), (0, 0, 40, 4))  # the top edge is blue
    for kind, mode in [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("TIFF", "CMYK"),
        ("JPEG", "CMYK"),
    ]:
        changed = plain.quantize() if mode == "P" else plain.convert(mode)
        pixels = decode(as_file(changed, kind), "x").pixels
        assert pixels.mode == "RGB" and pixels.size == (40, 20)
        np.testing.assert_allclose(np.asarray(pixels)[15, 20], (200, 30, 60), atol=16, err_msg=f"{kind} {mode}")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = decode(as_file(plain, "PNG", exif=rotated), "x")
    assert turned.pixels.size == (20, 40) and turned.pixels.getpixel((18, 20)) == (20, 30, 200) and not turned.is_plain


def test_sixteen_bits_keep_their_greys():
    grey = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    for kind in ("PNG", "TIFF"):
        found = decode(as_file(grey, kind), "x")
        assert np.asarray(found.pixels)[32, 0].tolist() == [128] * 3 and not found.is_plain
    with pytest.raises(Unusable, match="floating-point"):
        decode(as_file(Image.new("F", (4, 4)), "TIFF"), "x")


def test_what_a_palette_leaves_transparent_is_white():
    palette = Image.new("P", (8, 4))
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(1, (0, 0, 4, 4))
    found = decode(as_file(palette, "PNG", transparency=0), "x")
    assert found.pixels.getpixel((6, 2)) == (255, 255, 255) and found.pixels.getpixel((1, 1)) == (10, 200, 30)
    assert not found.is_plain


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = as_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, "x").pixels.getpixel((0, 0)) == (255, 0, 0)


def test_what_is_passed_on_as_it_came():
    picture = Image.new("RGB", (8, 8), "red")
    for kind, suffix, is_plain in [("JPEG", ".jpg", True), ("PNG", ".png", True), ("GIF", ".gif", False)]:
        found = decode(as_file(picture, kind), "x")
        assert (found.suffix, found.is_plain) == (suffix, is_plain)
    assert decode(as_file(picture.convert("L"), "PNG"), "x").is_plain


def test_damaged_exif_turns_nothing():
    data = as_file(Image.new("RGB", (8, 4), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert decode(data, "x").pixels.size == (8, 4)


def test_a_decompression_bomb_is_refused_at_pillows_limit(monkeypatch):
    data = as_file(Image.new("1", (400, 300)), "PNG")
    for limit in (119_999, 40_000):  # pillow itself only warns up to twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(Unusable) as caught:
            decode(data, "x.png")
        assert caught.value.reason == "huge picture" and f"limit of {limit} " in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120_000)
    assert decode(data, "x.png").pixels.size == (400, 300)


def test_fingerprints_tell_pixels_not_files():
    noise = Image.effect_noise((200, 100), 80).convert("RGB")
    assert fingerprint(noise) == fingerprint(decode(as_file(noise, "PNG"), "x").pixels)
    assert fingerprint(noise) == fingerprint(decode(as_file(noise, "BMP"), "x").pixels)
    assert fingerprint(noise) != fingerprint(Image.effect_noise((200, 100), 80).convert("RGB"))
    blank = [Image.new("RGB", size) for size in ((200, 100), (100, 200))]
    assert fingerprint(blank[0]) != fingerprint(blank[1])


def test_encoding_is_deterministic_and_of_high_quality():
    noise = Image.effect_noise((64, 64), 60).convert("RGB")
    noise.paste((250, 0, 0), (0, 0, 1, 64))
    assert encode(noise, "jpg") == encode(noise, "jpg") and encode(noise, "png") == encode(noise, "png")
    np.testing.assert_array_equal(np.asarray(decode(encode(noise, "png"), "x").pixels), np.asarray(noise))
    error = np.asarray(decode(encode(noise, "jpg"), "x").pixels).astype(int) - np.asarray(noise)
    assert abs(error).mean() < 3
