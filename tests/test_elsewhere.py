"""Answers of a server on this machine and of files, measured: against our own answers, kills, order, refusals."""

import base64
import io
import json
import sys
import threading

import pytest
from PIL import Image

from inference.llava_hound_dpo import measure, run_inference
from llava import endpoint
from llava.answers import AnswerStore
from tests.conftest import BASE
from tests.test_llm_judge import Endpoint, text_in
from tests.test_prove import asked  # noqa: F401  a fixture: 12 prompts, three of each format

MEASURED = ("attention_ratio", "confidence", "perplexity")


class Server(Endpoint):
    """Says what `answers` has for a prompt's text and pictures, whole and in order: (text, finish_reason)."""

    answers = {}

    def action(self, request):
        self.requests.append(request)
        if key_of(request) not in self.answers:
            return 500, {}, ""
        text, reason = self.answers[key_of(request)]
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return 200, {}, json.dumps({"choices": [choice]})


def key_of(request):
    parts = [part["image_url"]["url"] for part in request["messages"][0]["content"] if "image_url" in part]
    files = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in parts]
    return text_in(request), *(Image.open(io.BytesIO(file)).tobytes() for file in files)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(endpoint, "TRIES", 1)
    monkeypatch.setattr(endpoint, "FAILED_IN_A_ROW", 3)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,)).start()
        yield running
        running.shutdown()


def call(module, asked, output, *more):  # noqa: F811
    """The lines of a command's output."""
    words = ["--model_name_or_path", BASE, "--data_path", asked[0], "--image_folder", asked[1], "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words), "--num_workers", "0", *map(str, more)])
        module.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture(scope="module")
def ours(asked, tmp_path_factory):  # noqa: F811
    """Our own answers, cut off after so many tokens: a function that gives their lines, and their file."""
    folder = tmp_path_factory.mktemp("ours")
    found = {}
    for length in (1, 8):
        found[length] = call(run_inference, asked, folder / f"{length}.jsonl", "--max_new_tokens", length)
    return folder, found


def knows(server, asked, lines):  # noqa: F811
    """Let the server answer what is in the lines."""
    images = [record["image"] for record in json.loads(asked[0].read_text())]
    server.answers = said_to(asked[1], images, lines)


def said_to(folder, images, lines):
    """What a server shall know, of the pictures of every line; in a message each is a part of its own."""
    found = {}
    for names, line in zip(images, lines, strict=True):
        pictures = [Image.open(folder / name).convert("RGB").tobytes() for name in names]
        key = line["prompt"].replace("<image>", "#"), *pictures
        found[key] = line["text"], "stop" if line["is_complete"] else "length"
    return found


def assert_measured_alike(found, wanted):
    for own, other in zip(found, wanted, strict=True):
        numbers = {*MEASURED, "attention_ratio_by_layer", "attention_by_image", "attention_map"}
        assert {k: v for k, v in own.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        assert own.keys() == other.keys()
        for name in {*numbers} - {"attention_map"}:
            assert own[name] == pytest.approx(other[name], abs=1e-5)
        for one, same in zip(own.get("attention_map", ()), other.get("attention_map", ()), strict=True):
            assert one["area"] == same["area"] and one["mass"] == [pytest.approx(row, rel=0.01) for row in same["mass"]]


@pytest.mark.parametrize("length", [8, 1], ids=["whole answers", "cut off"])
def test_our_answers_measured_are_as_they_were(asked, ours, tmp_path, length):  # noqa: F811
    """Maps included, whatever the file says itself."""
    folder, wanted = ours[0], ours[1][length]
    assert all(line["is_complete"] for line in wanted) == (length == 8) and any(
        "attention_map" in line for line in wanted
    )
    bare = tmp_path / "bare.jsonl"
    kept = ("question_id", "text", "is_complete")
    bare.write_text("\n".join(json.dumps({name: line[name] for name in kept}) for line in wanted))
    for name, given in (("whole", folder / f"{length}.jsonl"), ("bare", bare)):
        assert_measured_alike(call(measure, asked, tmp_path / f"{name}_out.jsonl", "--answers", given), wanted)


@pytest.mark.parametrize("length", [8, 1], ids=["whole answers", "cut off"])
def test_a_server_answers_and_we_measure(asked, ours, server, tmp_path, length):  # noqa: F811
    """The same records, null where nothing was measured; then the same numbers."""
    wanted = ours[1][length]
    knows(server, asked, wanted)
    more = ("--endpoint", server.url, "--max_new_tokens", length)
    served = call(run_inference, asked, tmp_path / "served.jsonl", *more)
    for line, own in zip(served, wanted, strict=True):
        nothing = [name for name in line if line[name] is None and own[name] is not None]
        assert {*nothing} <= {*MEASURED, "attention_ratio_by_layer", "attention_by_image"}
        assert [line[name] for name in ("question_id", "text", "num_tokens", "is_complete")] == [
            own[name] for name in ("question_id", "text", "num_tokens", "is_complete")
        ]
    assert_measured_alike(call(measure, asked, tmp_path / "out.jsonl", "--answers", tmp_path / "served.jsonl"), wanted)
    assert len(server.requests) == 12 and {r["model"] for r in server.requests} == {BASE}
    assert {(r["temperature"], r["top_p"], r["max_tokens"]) for r in server.requests} == {(0, 1.0, length)}


def test_a_server_that_stumbles_or_goes_is_asked_for_the_rest(asked, ours, server, tmp_path, capsys):  # noqa: F811
    knows(server, asked, ours[1][8])
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    more = ("--endpoint", server.url, "--endpoint_workers", 1)
    call(run_inference, asked, whole, *more)
    answers, server.requests = server.answers, []

    def refused():
        with pytest.raises(SystemExit) as ended:
            call(run_inference, asked, output, *more)
        assert ended.value.code == 2 and not output.exists()
        return capsys.readouterr().err.splitlines()[-1]

    server.answers = dict(list(answers.items())[:-1])
    assert "no answer to 1 questions" in refused() and len(server.requests) == 12
    server.requests, server.answers = [], {}
    assert "no answer to 1 questions" in refused() and len(server.requests) == 1
    server.answers = answers
    call(run_inference, asked, output, *more)
    assert output.read_bytes() == whole.read_bytes() and len(server.requests) == 2


def test_a_server_that_goes_ends_the_run_and_what_it_said_stays(asked, ours, server, tmp_path, capsys):  # noqa: F811
    knows(server, asked, ours[1][8])
    answers, output, more = server.answers, tmp_path / "out.jsonl", ("--endpoint_workers", 1, "--endpoint", server.url)
    whole = call(run_inference, asked, tmp_path / "whole.jsonl", *more)
    said = [key_of(request) for request in server.requests[:5]]
    server.requests, server.answers = [], {key: answers[key] for key in said}
    with pytest.raises(SystemExit):
        call(run_inference, asked, output, *more)
    assert "no reply about 3 answers in a row" in capsys.readouterr().err and len(server.requests) == 5 + 3
    server.requests, server.answers = [], answers
    assert call(run_inference, asked, output, *more) == whole and len(server.requests) == 7


def several(asked, path):  # noqa: F811
    """A file of three answers to one question, one to another and two to a third, mixed, with a field of its own."""
    ids = [record["id"] for record in json.loads(asked[0].read_text())]
    said = [(0, "red"), (4, "a blue circle"), (0, "green"), (7, " yes\n"), (0, ""), (7, "red")]
    lines = [{"question_id": ids[n], "text": text, "engine": f"e{place}"} for place, (n, text) in enumerate(said)]
    lines[2]["is_complete"] = False
    path.write_text("\n".join(map(json.dumps, lines)))
    return lines


def test_several_answers_to_a_question(asked, tmp_path):  # noqa: F811
    """In the order of the file, with their own fields; the same as each alone, however many are in a row."""
    lines = several(asked, tmp_path / "all.jsonl")
    found = call(measure, asked, tmp_path / "found.jsonl", "--answers", tmp_path / "all.jsonl")
    assert [line["engine"] for line in found] == [f"e{n}" for n in range(6)]
    assert [line["text"] for line in found] == [line["text"].strip() for line in lines]
    assert [line.get("sample") for line in found] == [0, None, 1, 0, 2, 1]
    assert [line["is_complete"] for line in found] == [True, True, False, True, True, True]
    pairs = call(measure, asked, tmp_path / "2.jsonl", "--answers", tmp_path / "all.jsonl", "--batch_size", 2)
    for number, line in enumerate(lines):
        (tmp_path / "one.jsonl").write_text(json.dumps(line))
        (alone,) = call(measure, asked, tmp_path / f"out_{number}.jsonl", "--answers", tmp_path / "one.jsonl")
        for name in MEASURED:
            assert found[number][name] == pytest.approx(alone[name], rel=1e-5) == pytest.approx(pairs[number][name])


def test_killed_at_any_batch_it_ends_with_the_same_file(asked, tmp_path, monkeypatch):  # noqa: F811
    several(asked, tmp_path / "all.jsonl")
    more = ("--answers", tmp_path / "all.jsonl", "--batch_size", 2)
    call(measure, asked, tmp_path / "whole.jsonl", *more)
    whole, append = (tmp_path / "whole.jsonl").read_bytes(), AnswerStore.append
    for kept in range(4):
        left, output = [None] * kept, tmp_path / f"{kept}.jsonl"

        def stumbling(store, part, records, left=left):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            append(store, part, records)

        with monkeypatch.context() as patch:
            patch.setattr(AnswerStore, "append", stumbling)
            with pytest.raises(KeyboardInterrupt):
                call(measure, asked, output, *more)
        assert not output.exists()
        call(measure, asked, output, *more)
        assert output.read_bytes() == whole


@pytest.mark.parametrize(("change", "said"), [
    ({"question_id": "nobody"}, "no question has this id"), ({"text": None}, "a `question_id`, a `text`"),
    ({"text": "a <image>"}, "special token"), ({"is_complete": "no"}, "`is_complete` false"),
], ids=str)  # fmt: skip
def test_answers_that_cannot_be_measured_are_named(asked, tmp_path, capsys, change, said):  # noqa: F811
    lines = several(asked, tmp_path / "all.jsonl")
    lines[3] |= change
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit) as ended:
        call(measure, asked, tmp_path / "out.jsonl", "--answers", tmp_path / "all.jsonl")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and said in error and "all.jsonl record 4" in error


@pytest.mark.parametrize(("more", "said"), [
    (("--temperature", 1), "answers greedily"), (("--num_beams", 2), "answers greedily"),
    (("--attention_layers", "all"), "to `measure`"), (("--endpoint_workers", 0), "at least 1"),
], ids=str)  # fmt: skip
def test_flags_that_do_not_go_with_a_server(asked, tmp_path, capsys, more, said):  # noqa: F811
    with pytest.raises(SystemExit) as ended:
        call(run_inference, asked, tmp_path / "out.jsonl", "--endpoint", "http://127.0.0.1:9/v1", *more)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_answers_of_a_server_and_our_own_never_go_on_with_each_other(asked, ours, server, tmp_path, capsys):  # noqa: F811
    knows(server, asked, ours[1][8])
    served, more = tmp_path / "served.jsonl", ("--attention_maps", 0)
    call(run_inference, asked, served, "--endpoint", server.url, *more)
    for flags in (more, (*more, "--endpoint", server.url, "--endpoint_model", "another")):
        with pytest.raises(SystemExit):
            call(run_inference, asked, served, *flags)
        assert "is of another run (" in capsys.readouterr().err
