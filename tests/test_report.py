"""The report of the evaluation: whole without a network, faithful to scores.json, safe against what answers hold."""

import base64
import fnmatch
import io
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from inference.llava_hound_dpo.evaluate import evaluate, main
from inference.llava_hound_dpo.report import PICTURE_WIDTH, TEMPLATE, choose, report
from inference.llava_hound_dpo.summary import is_confused
from llava.image import ImageStore
from llava.records import read_questions

ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}
COLOURS = ("red", "blue", "green", "pink")
HOSTILE = "<script>alert('x')</script> & \"quoted\""
BAD_MAP = "image 1 must have `area`, [x0, y0, x1, y1] in px of the picture of 60 x 40 px, and `mass`, rows of"
MAP = {"area": [0, -10, 60, 50], "mass": [[0.1, 0.0], [0.0, 0.3]]}


class Page(HTMLParser):
    """A parsed page: its tags, pictures, text and tables by id; refuses tags that are left open or closed twice."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.links, self.open, self.words = [], [], [], [], []
        self.tables, self.rows = {}, None
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.text = " ".join(" ".join(self.words).split())
        self.tables = {name: [[" ".join(c.split()) for c in row] for row in t] for name, t in self.tables.items()}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs.items() if name in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.images.append(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(attrs.get("id") or f"table {len(self.tables)}", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def opened(url):
    head, content = url.split(",", 1)
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    picture.load()
    return picture


def asked(number):
    """Question 4n is a sequence, 4n + 1 a collage, 4n + 2 a pic-in-pic, 4n + 3 a single image."""
    image_type = ("sequence", "collage", "pip", "single")[number % 4]
    images = ["a.png", "b.png"] if image_type == "sequence" else ["a.png"]
    where = "In Image2" if image_type in ("sequence", "collage") else "There"
    prompt = ("Image1:<image>\nImage2:" if image_type == "sequence" else "") + f"<image>\n{where}, what?"
    record = {"id": f"q{number}", "image": images, "prompt": prompt, "answer": "red", "image_type": image_type}
    record["others"] = [] if image_type == "single" else ["blue"]
    collage, pip = {"target": 2, "grid": [2, 2]}, {"target_box": [10, 10, 30, 30]}
    return record | {"sequence": {"target": 2}, "collage": collage, "pip": pip, "single": {}}[image_type]


def answered(question, text, **more):
    facts = {name: question[name] for name in ("prompt", "answer", "others", "image_type")}
    facts |= {"target": question.get("target", 1), "num_images": 4 if "grid" in question else len(question["image"])}
    measured = {"attention_ratio": 0.625, "confidence": 0.875, "scale": 1.5}
    return {"question_id": question["id"], "text": text} | facts | measured | more


class World:
    """A test set of 40 questions and two answers files in a folder."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "images").mkdir()
        Image.new("RGB", (60, 40), "olive").save(folder / "images/a.png")
        Image.new("RGB", (40, 40), "navy").save(folder / "images/b.png")
        self.asked = [asked(number) for number in range(40)]
        self.questions = self.write("test.json", self.asked)
        self.first = [answered(q, COLOURS[n // 4 % 4]) for n, q in enumerate(self.asked)]
        self.second = [answered(q, COLOURS[n // 8 % 4]) for n, q in enumerate(self.asked)]

    def write(self, name, records):
        (self.folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return self.folder / name

    def judged(self, *answers):
        self.paths = [self.write(f"answers_m{n}.jsonl", a) for n, a in enumerate(answers or (self.first, self.second))]
        return evaluate(self.paths, self.questions)

    def page(self, *answers, samples=8):
        scores, rows = self.judged(*answers)
        return report(scores, rows, read_questions(self.questions), ImageStore(self.folder / "images"), samples)

    def one(self, number, *answers):
        """The page of a test set of one question; an answer is a text, or all fields."""
        question = self.asked[number]
        self.questions = self.write("test.json", [question])
        lines = [[answered(question, a) if isinstance(a, str) else answered(question, "red") | a] for a in answers]
        return Page(self.page(*lines))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# ---- one file that needs nothing else


def test_page_is_whole_and_self_contained(world):
    text = world.page()
    assert text == world.page()
    page = Page(text)
    assert len(page.images) == 8 and page.tags.count("svg") == 4  # the samples; four charts of accuracy
    assert all(opened(image["src"]).width > 100 and image["alt"] for image in page.images)
    assert all(link.startswith(("data:image/", "#m")) for link in page.links)  # "#m": a marker, defined in its chart
    without_data = re.sub(r'"data:image/[^"]*"', "", text)
    assert not re.search(r"//|@import|url\((?!#)|<script|<link|<iframe", without_data.replace(str(world.folder), ""))


def test_the_parser_of_these_tests_can_fail():
    with pytest.raises(AssertionError, match="left open"):
        Page("<p><b>x</b>")
    with pytest.raises(AssertionError, match="closes nothing"):
        Page("<p><b>x</p></b>")


def test_what_files_hold_is_shown_as_text(world):
    world.asked[0] |= {"prompt": f"<image><image>In Image2, {HOSTILE}?", "answer": HOSTILE, "id": HOSTILE}
    page = world.one(0, HOSTILE, "word " * 1000)
    assert page.text.count("word") == 200 and "(4000 more characters)" in page.text
    assert "script" not in page.tags and page.text.count("<script>alert('x')</script> & \"quoted\"") == 4


def test_names_of_files_do_no_harm(world):
    """matplotlib would read `$` as mathematics and leave out a name with `_` in front."""
    paths = [world.write(name, world.first) for name in ("_a$\\frac$_{.jsonl", "<b>.jsonl", "n" * 80 + ".jsonl")]
    page = Page(report(*evaluate(paths)))
    names = ["_a$\\frac$_{", "<b>", "n" * 80]
    assert page.tables["answers"][0][1:] == [f"{sign} {name}" for sign, name in zip("●■▲", names, strict=True)]
    assert all(page.text.count(name[:35]) > 9 for name in names)  # also in the charts


def interval(group, form=".1f"):
    return f"{100 * group['accuracy']:{form}} [{100 * group['low']:{form}}, {100 * group['high']:{form}}]"


# ---- sample prompts


def outcomes(own, places):
    return {(own[0][n].is_right, own[1][n].is_right, any(is_confused(r[n]) for r in own)) for n in places}


def test_samples_are_spread_over_formats_and_outcomes(world):
    _, rows = world.judged()
    own = list(rows.values())
    chosen = choose(own, 12)
    assert chosen == choose(own, 12) and len(set(chosen)) == 12
    assert all(2 <= sum(n % 4 == image_type for n in chosen) <= 4 for image_type in range(4))

    assert outcomes(own, chosen) == outcomes(own, range(40)) and len(outcomes(own, chosen)) >= 5
    confused = [any(is_confused(r[n]) for r in own) for n in chosen]
    assert confused == sorted(confused, reverse=True) and 0 < sum(confused) < 12


def test_number_of_samples(world):
    own = list(world.judged()[1].values())
    assert sorted(choose(own, 1000)) == list(range(40)) and choose(own, 0) == [] and len(choose(own[:1], 5)) == 5


def test_questions_with_an_attention_map_come_first(world):
    for number in (8, 21, 39):
        world.second[number]["attention_map"] = [MAP]
    own = list(world.judged()[1].values())
    assert sorted(choose(own, 3)) == [8, 21, 39] and {8, 21, 39} < set(choose(own, 6))


def test_attention_maps_hide_no_outcome_and_no_format(world):
    """Where all maps are of one kind of question, the other kinds are still shown."""
    for number in range(0, 40, 4):
        world.second[number]["attention_map"] = [MAP, MAP]
    own = list(world.judged()[1].values())
    chosen = choose(own, 12)
    assert outcomes(own, chosen) == outcomes(own, range(40)) and {n % 4 for n in chosen} == {0, 1, 2, 3}
    assert sum(n % 4 == 0 for n in chosen) >= 6


def test_a_sample_says_what_was_asked_and_answered(world):
    page = world.one(0, "blue", {"text": "", "confidence": None}, "pink")
    assert "In Image2, what? sequence, Image2 of 2 · q0" in page.text and "Image1:" not in page.text
    table = next(table for table in page.tables.values() if table[0][1:3] == ["answer", "verdict"])
    assert table[1:] == [
        ["● m0", "blue", "wrong, true of another image", "0.625", "0.875", "1.5"],
        ["■ m1", "", "unparsed", "0.625", "-", "1.5"],
        ["▲ m2", "pink", "wrong", "0.625", "0.875", "1.5"],
    ]


def test_a_question_that_refers_to_no_image(world):
    """There is no target to outline, to look at, or to hit by chance."""
    world.asked[0] |= {"image_type": "multi", "prompt": "<image><image>Are both red?"}
    del world.asked[0]["target"]
    page = world.one(0, "red")
    lines = [row for name, table in page.tables.items() if "accuracy" in name for row in table[1:]]
    assert "multi · q0" in page.text and "no image is referred to" in page.text
    assert [line[0] for line in lines] == ["all", "multi", "2"] and all(line[-1] == "-" for line in lines)
    assert any(["● m0", "red", "right", "-", "0.875", "1.5"] in table for table in page.tables.values())


def test_an_answer_that_is_missing(world):
    """It is shown as missing, and only where no answered question is left."""
    page = Page(world.page(world.first[:3], world.first[1:], samples=40))
    rows = [row for table in page.tables.values() for row in table if row[2:3] == ["missing"]]
    assert sorted(rows) == sorted([[f"{m}", "", "missing", "-", "-", "-"] for m in ["■ m1"] + ["● m0"] * 37])
    own = list(world.judged(world.first[20:], world.second)[1].values())
    assert min(choose(own, 6)) >= 20


def pictures(page):
    return [opened(image["src"]) for image in page.images if "prompt" in image["alt"]]


def test_pictures_have_the_target_outlined(world):
    """The box of a pic-in-pic in the place of the record; a sequence's target as a whole."""
    (pip,) = pictures(world.one(2, "red"))
    assert pip.size == (360, 240)

    def is_outlined(x, y):
        red, green, blue = pip.convert("RGB").getpixel((x, y))
        return red < 90 and green > 160 and blue > 160

    assert is_outlined(62, 120) and is_outlined(120, 62) and not is_outlined(2, 120) and not is_outlined(120, 120)


def test_wide_pictures_fit_the_page(world):
    Image.new("RGB", (4000, 100)).save(world.folder / "images/b.png")
    assert all(picture.width <= PICTURE_WIDTH + 20 for picture in pictures(world.one(0, "red")))


def test_attention_is_drawn_where_an_answer_has_it(world):
    plain, page = world.one(2, "red", "red"), world.one(2, "red", {"attention_map": [MAP]})
    assert "m1: where the answer looked" in page.text and "where the answer looked" not in plain.text
    (before,), (picture, attention) = pictures(plain), pictures(page)
    assert before == picture and attention.size == picture.size and attention != picture


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([MAP, MAP], "one map for each of the 1 images"),
        ({"area": 1}, "one map for each of the 1 images"),
        ([{"mass": [[1]]}], BAD_MAP),
        (
            [MAP | {"mass": [[1], [1, 2]]}],
            BAD_MAP,
        ),
        ([MAP | {"mass": []}], BAD_MAP),
        (
            [MAP | {"mass": [[float("nan")]]}],
            BAD_MAP,
        ),
        ([MAP | {"mass": [[-0.1]]}], BAD_MAP),
        ([MAP | {"area": [0, 0, 60]}], BAD_MAP),
        (
            [MAP | {"area": [60, 0, 0, 60]}],
            BAD_MAP,
        ),
        (
            [MAP | {"area": [0, 0, 1e9, 1e9]}],
            BAD_MAP,
        ),
    ],
)
def test_a_broken_attention_map_is_named(world, maps, message):
    page = world.one(2, {"attention_map": maps})
    assert message in page.text and len(pictures(page)) == 1


@pytest.mark.parametrize("damage", ["missing", "not a picture", "truncated", "box outside"])
def test_a_sample_without_its_picture_says_so(world, damage, caplog):
    path = world.folder / "images/a.png"
    if damage == "missing":
        path.unlink()
    elif damage == "box outside":
        world.asked[2]["target_box"] = [0, 0, 600, 30]
    else:
        path.write_bytes(b"no picture" if damage == "not a picture" else path.read_bytes()[:100])
    caplog.set_level("INFO", logger="inference")
    page = world.one(2, "red")
    assert not pictures(page)
    assert f"No picture: {'`target_box`' if damage == 'box outside' else path}" in page.text
    assert "report: 1 sample prompts, 1 without pictures" in caplog.text


# ---- the command


def test_the_command_writes_the_report(world):
    world.judged()
    output = world.folder / "out"
    arguments = ["--answers", *map(str, world.paths), "--output", str(output)]
    main(arguments)
    assert "run the evaluation again with --questions" in Page((output / "report.html").read_text()).text
    main([*arguments, "--questions", str(world.questions), "--image_folder", str(world.folder / "images"),
          "--samples", "3"])  # fmt: skip
    page = Page((output / "report.html").read_text())
    overall = json.loads((output / "scores.json").read_text())["answers"]["m1"]["overall"]
    assert len(pictures(page)) == 3 and page.tables["accuracy_format"][1][3] == interval(overall)


@pytest.mark.parametrize(
    ("flags", "message"), [("--samples=-1", "must be at least 0"), ("--image_folder=none", "no such image folder")]
)
def test_bad_flags_end_the_run_before_anything_is_written(world, capsys, flags, message):
    world.judged()
    with pytest.raises(SystemExit) as caught:
        main(["--answers", str(world.paths[0]), "--output", str(world.folder / "out"), flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (world.folder / "out").exists()


def test_the_template_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert any(fnmatch.fnmatch(TEMPLATE, pattern) for pattern in listed["*"])
    assert (ROOT / "inference/llava_hound_dpo" / TEMPLATE).is_file()
