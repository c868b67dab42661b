"""The local page: its parts in this process, and all of it in a real Chromium that must not talk to anybody else."""

import json
import logging
import socket
import time
from importlib.util import find_spec
from itertools import chain, product

import numpy as np
import pytest
from PIL import Image

from inference.llava_hound_dpo.summary import looked_right
from llava import open_model
from llava.adaptviz import AdaptViz, Bands
from llava.records import read_questions
from scripts.miniature.make_data import question, save_pictures
from scripts.miniature.prompts import sample_prompt
from scripts.viewer import __main__ as viewer
from scripts.viewer.answers import ANY, COLUMNS, AnswerFiles, fields_of
from scripts.viewer.cards import card, parts
from tests.browser import BROWSER, DRIVER, Hand, chromium, light, texts
from tests.conftest import BASE, picture

INSTALL = "pip install -r requirements-viewer.txt selenium; apt-get install chromium chromium-driver"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason=f"no gradio: {INSTALL}")
needs_browser = pytest.mark.skipif(
    not (find_spec("gradio") and find_spec("selenium") and BROWSER and DRIVER), reason=f"no Chromium: {INSTALL}"
)
ASKING = {"attention_layers": "auto", "max_new_tokens": 8}
PLAIN = (1.5, "target", "multiply")  # what the controls say at first


@pytest.fixture(scope="module")
def vlm():
    return open_model(BASE)


@pytest.fixture(scope="module")
def answered(vlm, tmp_path_factory):
    """A folder with a test set of twelve questions, its pictures, and base.jsonl: an answer is missing, one is HTML."""
    folder, rng, records = tmp_path_factory.mktemp("answered"), np.random.default_rng(3), []
    for number in range(12):
        prompt = sample_prompt(rng, "test", ("sequence", "collage", "pip", "single")[number % 4])
        images = save_pictures(prompt.pictures(), folder / "images", "test", f"q{number}")
        records.append({"id": f"q{number}", "image": images} | question(prompt, rng))
    (folder / "test.json").write_text(json.dumps(records))
    lines = []
    for asked in read_questions(folder / "test.json")[1:]:
        paths = [folder / "images" / name for name in asked.images]
        reply = vlm.ask(paths, asked.prompt, **ASKING, **fields_of(asked))
        lines.append(reply.record | {"question_id": asked.id, "answer": asked.answer, "others": asked.extra["others"]})
    lines[0]["text"] = "<script>parrot()</script>"
    (folder / "base.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def book(answered):
    return AnswerFiles.read([answered / "base.jsonl"], answered / "test.json", answered / "images")


def flags_of(folder):
    files = {"answers": "base.jsonl", "data_path": "test.json", "image_folder": "images"}
    return [word for name, file in files.items() for word in (f"--{name}", str(folder / file))]


# ---- cards


def test_a_card_says_what_the_reply_holds(vlm):
    reply = vlm.ask([picture("red"), picture("blue")], "In Image2, what is the colour?", **ASKING)
    said = texts(card("base · plain", reply, [2]))
    assert said.startswith(f"base · plain {reply.text} attention ratio {reply.ratio:.3f}")
    assert f"Image1 {100 * reply.shares[0]:.1f} % Image2 {100 * reply.shares[1]:.1f} %" in said
    assert f"by layer {reply.ratio_by_layer[0]:.2f} 2" in said
    assert [part["is_target"] for part in parts(reply)] == [False, True] and parts(reply)[1]["share"] == reply.ratio


def test_a_card_of_one_image_has_no_ratio(vlm):
    html = card("base", vlm.ask([picture("red")], "What is the colour?", **ASKING), [2])
    assert "attention ratio" not in html and html.count("<img") == 1 and "confidence" in html


def test_answers_are_no_html(vlm):
    pictures = [picture("red"), picture("blue")]
    assert "<b>" not in card("<b>", vlm.look(pictures, "In Image1, what is it?", "<i>red</i>"), [2]).split("<dl>")[0]


# ---- the test set


def test_filters_are_those_of_the_scores(book):
    """Every value of a filter gives the rows that the field of the same name has, and all values give all rows."""
    ((file, rows),) = book.files.items()
    known = {
        "format": lambda row: row.asked.image_type,
        "number of images": lambda row: str({"pip": 2, "single": 1}.get(row.asked.image_type, row.asked.num_regions)),
        "position": lambda row: "-" if row.asked.image_type in ("pip", "single") else f"Image{row.asked.target + 1}",
    }
    for number, name in enumerate(known):
        given = [[row[-1] for row in book.table(file, *[ANY] * number, value, *[ANY] * (3 - number))]
                 for value in book.choices(name)[1:]]  # fmt: skip
        assert given == [
            [row.asked.id for row in rows if known[name](row) == value] for value in book.choices(name)[1:]
        ]
        assert sorted(chain(*given)) == sorted(row.asked.id for row in rows)


def test_looked_and_answered_are_filtered_together(book):
    ((file, rows),) = book.files.items()
    found = {}
    for looked, answered in product(("right", "wrong", "unknown"), ("right", "wrong")):
        found[looked, answered] = book.table(file, ANY, ANY, ANY, f"looked {looked}, answered {answered}")
    words = {True: "right", False: "wrong", None: "unknown"}
    for row in rows:
        (line,) = [line for line in found[words[looked_right(row)[0]], words[row.is_right]] if line[-1] == row.asked.id]
        assert len(line) == len(COLUMNS)
    assert sum(map(len, found.values())) == len(rows) == 12
    assert book.table(file, "single", ANY, "Image1", ANY) == []


def test_an_opened_question_is_asked_as_its_record_says(vlm, book, answered):
    """Pictures, words and fields give the batch's own answer again; so does a missing answer's question."""
    ((file, rows),) = book.files.items()
    for row in rows:
        pictures, words, fields, said = book.open(file, row.asked.id)
        reply = vlm.ask(pictures, words, **ASKING, **fields)
        assert reply.question.prompt == book.questions[row.asked.id].prompt and "<image>" not in words
        assert said[1] == f"true answer: {row.asked.answer}" and len(pictures) == len(reply.pictures)
        if row.given and row.given.attention_ratio is not None:
            assert reply.ratio == pytest.approx(row.given.attention_ratio, abs=1e-6)
    assert "(no answer)" in book.open(file, "q0")[3][2]


# ---- the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--answers", "a.jsonl"], "--answers needs --data_path and --image_folder"),
        (["--data_path", "test.json"], "give the answers to browse"),
        (["--port", "99999999"], "--port 99999999"),
        (["--compare", "no/such/folder"], "no/such/folder"),
        (["--attention_layers", "9"], "layers 0 to 3"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_weights(words, said, capsys, monkeypatch):
    monkeypatch.setattr(viewer, "find_spec", lambda name: name)
    monkeypatch.setattr(viewer.VLM, "load", None)  # calling it would raise
    with pytest.raises(SystemExit) as ended:
        viewer.start(["--model_name_or_path", BASE, *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said in line


def test_a_wrong_answers_file_is_one_line(answered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(viewer, "find_spec", lambda name: name)
    (tmp_path / "bad.jsonl").write_text('{"question_id": "q1", "text": "red"}\n')
    words = ["--answers", str(tmp_path / "bad.jsonl"), *flags_of(answered)[2:]]
    with pytest.raises(SystemExit) as ended:
        viewer.start(["--model_name_or_path", BASE, *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "bad.jsonl" in line and "image_type" in line


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(viewer, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        viewer.start(["--model_name_or_path", BASE])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install -r requirements-viewer.txt\n"


@needs_gradio
def test_others_are_let_in_only_when_told_and_with_a_warning(monkeypatch, caplog):
    from scripts.viewer import page

    served = []
    monkeypatch.setattr(page, "serve", lambda built, host, port: served.append((host, port)) or "http://x")
    monkeypatch.setattr(viewer, "setup_logging", lambda: None)
    for words in ([], ["--host", "0.0.0.0", "--port", "7999"], ["--host", "localhost"]):
        caplog.clear()
        viewer.start(["--model_name_or_path", BASE, *words])
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == ("0.0.0.0" in words) and (not warned or "whoever reaches" in warned[0])
    assert served == [("127.0.0.1", None), ("0.0.0.0", 7999), ("localhost", None)]


# ---- what the page answers, without a browser


REFUSED = [  # pictures, prompt, what is said
    ([], "What is it?", "no picture"),
    (["red.png"], "  ", "no question"),
    (["red.png", "blue.png"], "In Image3, what is it?", "Image3 does not exist: this record has Image1 to Image2"),
    (["red.png", "cut.png"], "In Image1, what is it?", "picture 2: image file is truncated"),
    (["text.png"], "What is it?", "picture 1: not a picture"),
    (["red.png", "blue.png"], "In Image1 and in Image2, <b>what</b>?", "names Image1 and Image2"),
    (["red.png"], "<image> <image> what?", "2 &lt;image&gt;"),
]


@needs_gradio
def test_what_cannot_be_asked_is_one_line(vlm, tmp_path):
    import gradio as gr

    from scripts.viewer.page import Desk

    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / f"{colour}.png")
    noise = np.random.default_rng(0).integers(0, 255, (72, 72, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no picture")
    for pictures, prompt, said in REFUSED:
        gallery = [(str(tmp_path / name), None) for name in pictures]
        with pytest.raises(gr.Error) as error:
            list(Desk({"base": vlm}, ASKING).ask(gallery, prompt, None, *PLAIN))
        text = error.value.message
        assert said in text and "\n" not in text and "<" not in text and str(tmp_path) not in text


@needs_gradio
def test_cards_come_one_after_another(vlm, tmp_path):
    """Plain ones of both models first; a moved control makes the steered ones alone; a state of other words is none."""
    import gradio as gr

    from scripts.viewer.page import Desk

    paths = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        picture(path.stem).save(path)
    gallery, prompt = [(str(path), None) for path in paths], "In Image2, what is the colour?"
    desk = Desk({"a": vlm, "b": vlm}, ASKING)
    stale = {"prompt": "other words", "count": 2, "fields": {"target": 1}}
    steps = list(desk.ask(gallery, prompt, stale, *PLAIN))
    shown = [[n for n, one in enumerate(step) if isinstance(one, str)] for step in steps]
    assert shown == [[], [0], [1], [2], [3]]
    *_, last = desk.steer(gallery, prompt, None, 3.0, "balance", "add")
    steered = vlm.ask(paths, prompt, steer=AdaptViz("balance", "add", bands=Bands.fixed(3.0)), **ASKING)
    assert f"attention ratio {steered.ratio:.3f}" in texts(last[3]) and "balance, add 3" in texts(last[3])
    assert len(list(desk.steer(gallery, prompt, None, *PLAIN))) == 3 and last[0] == gr.skip()
    assert len(list(desk.steer(None, "", None, *PLAIN))) == 1  # nothing asked yet
    unpointed = list(desk.ask(gallery[:1], "What is the colour?", None, *PLAIN))[-1][3]
    assert "Not steered" in unpointed


# ---- in Chromium


@pytest.fixture(scope="module")
def scene(vlm, tmp_path_factory):
    """(paths, the one that the model looks at most when asked about it, the question): a dark picture, thrice,
    so that the more attention lies on a copy, the brighter it is drawn."""
    folder, rng = tmp_path_factory.mktemp("scene"), np.random.default_rng(5)
    for prompt in (sample_prompt(rng, "test", "single") for _ in range(100)):
        pictures = [prompt.pictures()[0]] * 3
        question = f"In Image3, {prompt.question[0].lower()}{prompt.question[1:]}"
        if light(pictures[0]) < 80 and vlm.ask(pictures, question, **ASKING).ratio > 0.5:
            return [folder / name for name in save_pictures(pictures, folder, "p", "p")], 2, question
    raise AssertionError("no such scene")


@needs_browser
def test_the_page_in_chromium(vlm, answered, book, scene, monkeypatch, capsys):
    """One server and one browser for all that a person does; neither speaks to anybody else."""
    reached, look_up, connect = set(), socket.getaddrinfo, socket.socket.connect

    def looks_up(host, *more, **others):
        reached.add(host)
        return look_up(host, *more, **others)

    def connects(self, address):
        reached.add(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", looks_up)
    monkeypatch.setattr(socket.socket, "connect", connects)
    monkeypatch.setattr(viewer, "setup_logging", lambda: None)
    page = viewer.start(["--model_name_or_path", BASE, "--max_new_tokens", "8", *flags_of(answered)])
    try:
        with pytest.raises(SystemExit) as ended:
            viewer.start(["--model_name_or_path", BASE, "--port", str(page.server_port)])
        assert ended.value.code == 2 and f"--port {page.server_port} on 127.0.0.1: taken" in capsys.readouterr().err
        with chromium() as browser:
            hand = Hand(browser, page.local_url)
            asks(hand, vlm, *scene)
            steers(hand, vlm, *scene)
            asks_beside_another(hand, vlm, *scene)
            assert hand.right(390) == 390
            opens(hand, book)
            assert hand.right(390) == 390
            log = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
            is_refused(hand)
            events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    finally:
        page.close()
    assert log == []
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    assert len(urls) > 50 and [url for url in urls if not url.startswith((page.local_url, "data:", "blob:"))] == []
    assert reached <= {"127.0.0.1", "localhost"}


def asks(hand, vlm, paths, target, question):
    """The first answer is there within three seconds, and the heat on the image asked about is the brightest."""
    hand.drop(paths)
    hand.write(question)
    start = time.monotonic()
    hand.click()
    hand.wait(lambda: hand.said(0))
    assert time.monotonic() - start < 3
    hand.wait(lambda: hand.said(1))
    reply = vlm.ask(paths, question, **ASKING)
    assert hand.said(0) == [reply.text] and hand.said(0, "ratio") == [f"{reply.ratio:.3f}"]
    lights = [light(heated) for heated in hand.maps(0)]
    assert np.argmax(lights) == target and len(lights) == 3, lights


def steers(hand, vlm, paths, target, question):
    """The handle is dragged; the rule is switched: each time the steered answer is that of the controls."""
    from selenium.webdriver import ActionChains

    (handle,), plain = hand.all("#factor input[type=range]"), hand.html(0)
    ActionChains(hand.browser).click_and_hold(handle).move_by_offset(60, 0).release().perform()
    factor = float(hand.all("#factor input[type=number]")[0].get_attribute("value"))
    settings, ratios = {"scope": "target", "rule": "multiply"}, set()
    for moved in ({}, {"scope": "all"}, {"rule": "add"}):
        settings |= moved
        for name, value in moved.items():
            hand.all(f"#{name} input[value={value}]")[0].click()
        wanted = vlm.ask(paths, question, steer=AdaptViz(**settings, bands=Bands.fixed(factor)), **ASKING)
        hand.wait(lambda ratio=f"{wanted.ratio:.3f}": hand.said(1, "ratio") == [ratio])
        ratios.add(wanted.ratio)
    assert factor > 2 and len(ratios) == 3 and hand.html(0) == plain


def asks_beside_another(hand, vlm, paths, target, question):
    """Two visitors at once: each gets the answer to his own question."""
    others = [f"In Image{number}, what is the colour?" for number in (1, 2)]
    own = hand.browser.current_window_handle
    hand.write(others[0])
    hand.browser.switch_to.new_window("tab")
    guest = Hand(hand.browser, hand.url)
    guest.drop(paths)
    guest.write(others[1])
    guest.click()
    theirs = hand.browser.current_window_handle
    hand.browser.switch_to.window(own)
    hand.click()
    wanted = [[f"{vlm.ask(paths, other, **ASKING).ratio:.3f}"] for other in others]
    hand.wait(lambda: hand.said(0, "ratio") == wanted[0])
    hand.browser.switch_to.window(theirs)
    guest.wait(lambda: guest.said(0, "ratio") == wanted[1])
    hand.browser.close()
    hand.browser.switch_to.window(own)


def opens(hand, book):
    """Of the test set, collages alone are listed; a click on one shows it in the first tab and asks it."""
    rows = [row for row in book.files[next(iter(book.files))] if row.asked.image_type == "collage"]
    hand.tab("Answers")
    hand.all("input[aria-label=format]")[0].click()
    next(one for one in hand.wait(lambda: hand.all("[role=option]")) if one.text == "collage").click()
    hand.wait(lambda: f"{len(rows)} of 12 questions" in hand.all("#count")[0].text)
    cells = hand.wait(lambda: [cell for cell in hand.all("#answers [data-row='1']") if cell.text])
    assert rows[0].given.text in [cell.text for cell in hand.all("#answers [data-row='0']")]  # HTML, as it is written
    cells[0].click()
    hand.wait(lambda: rows[1].asked.id in "".join(one.text for one in hand.all("#known")))
    assert f"true answer: {rows[1].asked.answer}" in hand.all("#known")[0].text
    hand.wait(lambda: hand.said(0, "ratio") == [f"{rows[1].given.attention_ratio:.3f}"])
    assert hand.said(0) == [rows[1].given.text]


def is_refused(hand):
    hand.write(" ")
    hand.click()
    assert "no question: write one first" in hand.wait(lambda: hand.all("[data-testid=toast-body]"))[0].text
