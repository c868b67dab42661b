"""The LLM judge against a server on this machine: what it is asked, what is read, retries, resumption, the key."""

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import AsyncMock, Mock

import anyio
import httpx
import pytest
from PIL import Image

from inference.llava_hound_dpo import llm_judge
from inference.llava_hound_dpo.evaluate import main
from inference.llava_hound_dpo.llm_judge import READ_TRIES, RUBRICS
from llava import endpoint
from llava.endpoint import LARGEST_REPLY, TRIES

KEY = "sk-Very-Secret-Key-0123456789"
FOUR = {"relevance": 5, "accuracy": 4, "clarity": 3, "completeness": 2}
GOOD = json.dumps(FOUR)


class Endpoint(ThreadingHTTPServer):
    """`script` has, for each request, a reply's text, (status, headers, body) or "close"; `rest` is for all others."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script, self.rest, self.requests = [], GOOD, []

    def action(self, request):
        """What to do about a request; `rest` may be a function of the given answer."""
        self.requests.append(request)
        if self.script:
            return self.script.pop(0)
        return self.rest(given_in(request)) if callable(self.rest) else self.rest


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        action = self.server.action({"path": self.path, "key": self.headers["Authorization"], **body})
        if action == "close":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if isinstance(action, str) and action.startswith("drip"):
            return self.drip(b"HTTP/1.1 200 OK\r\n" + (b"X-Slow: " if "headers" in action else b"\r\n["))
        if isinstance(action, str):
            action = (200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": action}}]}))
        self.send_response(action[0])
        for header in action[1].items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(action[2].encode())

    def drip(self, start):
        with contextlib.suppress(OSError):
            for content in (start, *[b"1"] * 100):
                self.wfile.write(content)
                time.sleep(0.05)

    log_message = Mock()


def text_in(request):
    """All that the judge is told, `#` for each picture."""
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "#") for part in content)


def given_in(request):
    return re.search(r"<given_answer>\n(.*)\n</given_answer>", text_in(request), re.DOTALL)[1]


def answered(number, text, image_type="sequence", prompt="Image1:<image>\nImage2:<image>\nIn Image2, what colour?"):
    facts = {"image_type": image_type, "num_images": 2 if image_type == "sequence" else 1, "target": 2}
    return {"question_id": f"q{number}", "text": text, "answer": "blue", "prompt": prompt, **facts}


RED = answered(1, "It is {red}.")


def answers(count):
    return [answered(number, f"a{number}") for number in range(count)]


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(anyio, "sleep", AsyncMock())  # between openai's tries
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(judge, tmp_path):
    """Run the command on the lines of answers files a and b: scores.json, as it is written."""

    def run(*files, more=(), url=None):
        paths = [tmp_path / f"{name}.jsonl" for name in "ab"[: len(files)]]
        for path, lines in zip(paths, files, strict=True):
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        flags = ["--output", tmp_path / "out", "--judge_url", url or judge.url, "--judge_model", "big-judge", *more]
        main(list(map(str, ["--answers", *paths, *flags])))
        return json.loads((tmp_path / "out/scores.json").read_text())

    return run


@pytest.fixture
def refused(ask, capsys):
    """Run a command that ends with exit code 2: its last line; all of them are in `refused.lines`."""

    def run(*files, **options):
        with pytest.raises(SystemExit) as caught:
            ask(*files, **options)
        run.lines = capsys.readouterr().err.strip("\n").splitlines()
        assert caught.value.code == 2 and run.lines[-1].startswith("error: ")
        return run.lines[-1]

    return run


def judgements(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text().splitlines()]


def overall(scores, name="a"):
    return scores["answers"][name]["judge"]["overall"]


def counts(scores, name="a"):
    return [overall(scores, name)[reason] for reason in ("judged", "unparsed", "failed", "missing", "empty")]


@pytest.mark.parametrize(("variable", "value"), [("OPENAI_API_KEY", KEY), ("OPENAI_API_KEY", ""), ("MINE", "other\n")])
def test_the_request(judge, ask, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    ask([RED], url=judge.url + "/", more=["--judge_key_env", variable])
    (request,) = judge.requests
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "big-judge", 0)
    assert request["key"] == (f"Bearer {value.strip()}" if value else None)
    told = text_in(request)
    assert "<question>\nImage1:[picture]\nImage2:[picture]\nIn Image2, what colour?\n</question>" in told
    assert "<true_answer>\nblue\n</true_answer>" in told and given_in(request) == "It is {red}."
    assert all(f"- {rubric}: " in told for rubric in RUBRICS)


def test_earlier_turns_are_shown(judge, ask):
    ask([RED | {"context": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}]}])
    assert "<question>\nuser: Hi?\n\nassistant: Hi.\n\nuser: Image1:[picture]" in text_in(judge.requests[0])


@pytest.fixture
def shown(tmp_path):
    """The flags that show the judge the two pictures of the question q1."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "images/one.png")
    Image.new("RGB", (50, 40), "blue").save(tmp_path / "images/two.png")
    record = {"id": "q1", "image": ["one.png", "two.png"], "prompt": RED["prompt"], "answer": "blue"}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    return ["--questions", tmp_path / "test.json", "--judge_pictures", tmp_path / "images"]


def test_pictures_stand_where_the_prompt_has_them(judge, ask, shown):
    ask([answered(1, "An <image> of red")], more=shown)
    (request,) = judge.requests
    assert "<question>\nImage1:#\nImage2:#\nIn Image2, what colour?\n</question>" in text_in(request)
    assert given_in(request) == "An <image> of red"
    urls = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    coded = [url.removeprefix("data:image/jpeg;base64,") for url in urls]
    pictures = [Image.open(io.BytesIO(base64.b64decode(text, validate=True))) for text in coded]
    assert [picture.size for picture in pictures] == [(30, 20), (50, 40)]
    red, blue = (picture.getpixel((5, 5)) for picture in pictures)
    assert min(red[0], blue[2]) > 250 and max(*red[1:], *blue[:2]) < 5


def test_other_pictures_are_asked_again(judge, ask, shown, tmp_path):
    assert ask([RED], more=shown) == ask([RED], more=shown) and len(judge.requests) == 1
    Image.new("RGB", (50, 41), "green").save(tmp_path / "images/two.png")
    ask([RED], more=shown)
    ask([RED], more=shown[:2])  # no pictures
    assert len(judge.requests) == 3


def test_what_is_missing_is_named_before_anything_is_asked(judge, refused, shown, tmp_path):
    (tmp_path / "images/two.png").unlink()
    assert "test.json record 1 (id q1): no picture two.png in" in refused([RED], more=shown)
    line = refused([RED, answered(2, "red", prompt=None)])
    assert "a.jsonl record 2 (id q2): no `prompt`" in line and "--questions" in line and not judge.requests


def test_garbage_is_asked_again_and_never_filled_in(judge, ask, tmp_path):
    judge.script, judge.rest = ["I give it a 5.", GOOD], "no"  # for q1, then for q2
    scores = ask([RED, answered(2, "green")], [answered(2, "red")])
    assert (counts(scores, "a"), counts(scores, "b")) == ([1, 1, 0, 0, 0], [0, 1, 0, 1, 0])
    assert overall(scores)["clarity"]["mean"] == 3 and overall(scores, "b")["clarity"] is None
    assert scores["comparisons"][0]["judge"] == {"pairs": 0, **dict.fromkeys(RUBRICS)}
    assert re.search(r"\| clarity \| 3.00 .* \| - \|\n", (tmp_path / "out/scores.md").read_text())
    assert "JSON object" in text_in(judge.requests[1]).split("</given_answer>")[1]
    assert len(judge.requests) == 2 + 2 * READ_TRIES
    assert [line["question_id"] for line in judgements(tmp_path)] == ["q1"]


def test_scores_by_hand(judge, ask, tmp_path):
    """a: q1 to q3 judged, q4 empty, q5 missing. b: q1 and q2 judged, q3 garbage, q4 and q5 judged."""
    said = {"a1": (5, 4, 3, 2), "a2": (3, 1, 3, 2), "a3": (1, 1, 3, 5)}
    said |= {"b1": (5, 5, 3, 1), "b2": (4, 3, 3, 1), "b4": (2, 2, 2, 2), "b5": (1, 1, 1, 1)}
    judge.rest = lambda given: json.dumps(dict(zip(RUBRICS, said[given], strict=True))) if given in said else "Hm."
    formats = ("sequence", "sequence", "pip", "pip", "pip")
    first = [answered(n, text, formats[n - 1]) for n, text in ((1, "a1"), (2, "a2"), (3, "a3"), (4, " \n"))]
    scores = ask(first, [answered(n, f"b{n}", formats[n - 1]) for n in range(1, 6)])
    assert (counts(scores, "a"), counts(scores, "b")) == ([3, 0, 0, 1, 1], [4, 1, 0, 0, 0])
    assert [overall(scores)[rubric]["mean"] for rubric in RUBRICS] == [3, 2, 3, 3]
    assert 1 <= overall(scores)["relevance"]["low"] < 3 < overall(scores)["relevance"]["high"] <= 5
    by_format = scores["answers"]["a"]["judge"]["by_format"]
    assert [by_format["sequence"][rubric]["mean"] for rubric in RUBRICS] == [4, 2.5, 3, 2] and len(by_format) == 2
    assert [by_format["pip"][count] for count in ("questions", "judged", "missing", "empty")] == [3, 1, 1, 1]
    found = scores["comparisons"][0]["judge"]
    assert found["pairs"] == 2 and [found[rubric]["difference"] for rubric in RUBRICS] == [0.5, 1.5, 0, -1]
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (1, 2)
    table = (tmp_path / "out/scores.md").read_text()
    assert "## Grades 1 to 5 by big-judge\n\n|  | a | b |" in table and "| unparsed | 0 | 1 |" in table
    assert "| relevance | 3.00 [" in table and "| relevance, pip | 1.00 [1.00, 1.00] |" in table
    assert "| b - a | 2 | +0.50 [+0.00, +1.00] | +1.50 [+1.00, +2.00] |" in table
    assert len(judge.requests) == 7 + READ_TRIES  # the empty answer was not sent


def test_without_a_judge_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    (tmp_path / "a.jsonl").write_text(json.dumps(RED))
    main(["--answers", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out")])
    assert '"judge"' not in (tmp_path / "out/scores.json").read_text()
    assert "grades" not in (tmp_path / "out/scores.md").read_text() and not list(tmp_path.rglob("judgements*"))


TROUBLE = {
    "429": ([(429, {"Retry-After": "2.5"}, "")], [2.5]),
    "500 twice": ([(500, {}, "x"), (503, {"Retry-After": "7"}, "x")], [None, 7]),
    "closed": (["close"], [None]),
    "a web page": ([(200, {}, "<html>")], [None]),
    "an error as a success": ([(200, {}, '{"error": {"code": 502}}')], [None]),
    "an endless reply": ([(200, {}, '{"choices": ' + "[" * 2 * LARGEST_REPLY)], [None]),
}


@pytest.mark.parametrize(("script", "waits"), TROUBLE.values(), ids=TROUBLE)
def test_passing_trouble(judge, ask, script, waits):
    """What the server asks for is waited for; else openai decides."""
    judge.script = list(script)
    assert counts(ask([RED])) == [1, 0, 0, 0, 0]
    assert len(judge.requests) == len(script) + 1
    seen = [call.args[0] for call in anyio.sleep.call_args_list]
    assert len(seen) == len(waits) and all(w in (None, s) for w, s in zip(waits, seen, strict=True))


@pytest.mark.parametrize("after", [0, 1], ids=["the first reply", "the second reply"])
def test_a_reply_that_drips_is_given_up(judge, ask, refused, monkeypatch, after):
    """The limit is on the whole request, not on the wait for the next byte."""
    monkeypatch.setattr(endpoint, "TIMEOUT_S", 0.5)
    judge.script = [GOOD] * after + ["drip"]
    assert counts(ask(answers(3))) == [2, 0, 1, 0, 0] and len(judge.requests) == 3
    judge.script, judge.requests = ["drip headers"], []
    assert "no reply from the judge in one try (no whole reply in" in refused([answered(9, "x")])


def test_a_judge_that_refuses_a_temperature(judge, ask, tmp_path):
    """It is asked without one, told once, and that is a part of the key of what it says."""
    message = json.dumps({"error": {"message": "Unsupported value: 'temperature' does not support 0"}})
    judge.script = [(400, {}, message)]
    first = ask(answers(3))
    assert [request.get("temperature") for request in judge.requests] == [0, None, None, None]
    assert counts(first) == [3, 0, 0, 0, 0]
    assert all(line["digest"].endswith(" without temperature") for line in judgements(tmp_path))
    assert ask(answers(3)) == first and len(judge.requests) == 4


def test_trouble_that_does_not_pass_is_counted(judge, ask, capsys):
    judge.rest = lambda given: (500, {}, "") if given == "bad" else GOOD
    assert counts(ask([answered(2, "bad"), RED, RED | {"question_id": "q3"}, answered(4, "x")])) == [3, 0, 1, 0, 0]
    assert len(judge.requests) == 2 + TRIES  # RED is asked once
    assert "a.jsonl record 1 (id q2): the judge did not reply (HTTP 500)" in capsys.readouterr().out


def test_an_endpoint_that_is_gone_ends_the_run(judge, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FAILED_IN_A_ROW", 3)
    judge.script, judge.rest = [GOOD], (503, {}, "")
    assert "no reply about 3 answers in a row" in refused(answers(30), more=["--judge_workers", "1"])
    assert len(judge.requests) < 10 * TRIES and len(judgements(tmp_path)) == 1


REFUSALS = [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "said so"), (400, "a.jsonl record 1 (id q0): {")]


@pytest.mark.parametrize(("status", "words"), REFUSALS)
def test_a_refusal_ends_the_run_at_once(judge, refused, tmp_path, status, words):
    judge.rest = (status, {}, json.dumps({"error": {"message": "said so"}}))
    line = refused(answers(3))
    assert all(word in line for word in (words, judge.url, f"HTTP {status}", "; check "))
    assert len(refused.lines) == len(judge.requests) == 1 and not (tmp_path / "out").exists()


def test_a_refusal_in_the_middle_keeps_what_is_judged(judge, refused, ask, tmp_path):
    judge.script, judge.rest = [GOOD, GOOD], (401, {}, "")
    assert "refuses the key" in refused(answers(9), more=["--judge_workers", "1"])
    assert len(judgements(tmp_path)) == 2 and len(judge.requests) <= 4
    judge.requests, judge.rest = [], GOOD
    assert counts(ask(answers(9))) == [9, 0, 0, 0, 0] and len(judge.requests) == 7


def test_nobody_listens(refused, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    line = refused([RED], url=url)
    assert url in line and "cannot be reached (Connection refused)" in line and "--judge_url" in line
    assert len(refused.lines) == 1 and not (tmp_path / "out").exists()
    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=unknown))
    assert "cannot be reached (Name or service not known)" in refused([RED], url="http://judge.invalid/v1")
    assert len(refused.lines) == 1


def test_an_endpoint_that_never_speaks_http(judge, refused):
    judge.rest = "close"
    assert f"no reply from the judge in {TRIES} tries" in refused(answers(2)) and len(judge.requests) == TRIES


def test_a_judge_that_is_away_for_a_moment_is_waited_for(judge, ask, monkeypatch):
    """Once it has answered, a refused connection is a restart, not a wrong URL."""
    real, down = httpx.AsyncClient.send, [False, True, False]

    async def send(client, request, **options):
        if down.pop(0):
            raise httpx.ConnectError("refused", request=request)
        return await real(client, request, **options)

    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    assert counts(ask(answers(2))) == [2, 0, 0, 0, 0] and len(judge.requests) == 2 and not down


def test_nothing_is_asked_twice(judge, ask, tmp_path):
    """Neither in a second run, nor where two files have the same answer."""
    first = ask(answers(6), answers(6))
    assert len(judge.requests) == len(judgements(tmp_path)) == 6 and counts(first, "b") == [6, 0, 0, 0, 0]
    assert ask(answers(6), answers(6)) == first and len(judge.requests) == 6


@pytest.mark.parametrize("change", [{"text": "x"}, {"answer": "x"}, {"prompt": "x"}, "model", "rubrics"], ids=str)
def test_what_decides_a_judgement_is_asked_again(judge, ask, monkeypatch, change):
    ask([RED])
    if change == "rubrics":
        monkeypatch.setattr(llm_judge, "PROMPT_DIGEST", "of another text")
    more = ["--judge_model", "small"] if change == "model" else []
    ask([RED | change if isinstance(change, dict) else RED], more=more)
    assert len(judge.requests) == 2


BROKEN = {"cut": lambda s: s[:-20], "6": lambda s: s.replace(": 5", ": 6"), "other": lambda s: "7", "": lambda s: ""}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_judgement_is_asked_again(judge, ask, tmp_path, broken):
    ask(answers(3))
    cache = tmp_path / "out/judgements.jsonl"
    *whole, last = cache.read_text().splitlines()
    cache.write_text("\n".join([*whole, broken(last)]))
    for _ in range(2):
        assert counts(ask(answers(3))) == [3, 0, 0, 0, 0] and len(judge.requests) == 4


def test_the_key_goes_nowhere_else(judge, ask, refused, tmp_path, capsys):
    echo = json.dumps({"error": {"message": f"Incorrect key {KEY}"}})
    judge.script = [f"Your key is {KEY}"] * READ_TRIES + [(429, {}, echo), GOOD]
    assert counts(ask(answers(2))) == [1, 1, 0, 0, 0]
    shown = list(capsys.readouterr())
    for status in (400, 401, 403, 404, 302):
        judge.rest = (status, {"Location": f"{judge.url}/elsewhere"}, echo)
        shown.append(refused(answers(2)))
    assert len(judge.requests) == READ_TRIES + 2 + 5  # a redirect is not followed
    assert KEY in judge.requests[0]["key"] and "Your key is ***" in shown[0] and "Incorrect key ***" in shown[2]
    shown += [file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()]
    assert (tmp_path / "out/scores.json").is_file() and not any("Very-Secret" in text for text in shown)


@pytest.mark.parametrize(("name", "value"), [(KEY, ""), ("MINE", f"{KEY}\n{KEY}"), ("MINE", "")], ids=str)
def test_a_bad_key_is_refused_without_telling_it(judge, refused, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    line = refused([RED], more=["--judge_key_env", name])
    assert ("holds a space, a line break" if value else "is not set") in line and KEY not in line and not judge.requests
