"""The same flags write the same bytes: any number of workers, interrupted, killed; other runs' folders are refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_gen.gen_instruction.output import Output
from data_gen.gen_instruction.workers import WorkerKilled, ordered
from tests.single_images import digest, generate, record, world, write

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("image_type", ["sequence", "collage", "pip", "mix"])
def test_the_same_bytes_for_any_number_of_workers_and_others_for_another_seed(monkeypatch, tmp_path, image_type):
    flags = ["--format", image_type, *world(tmp_path, 16)]
    for name, more in {"one": [1], "two": [2], "seed": [1, "--seed", 1]}.items():
        assert generate(monkeypatch, *flags, "--output", tmp_path / name, "--num_workers", *more) == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert digest(tmp_path / "one")["instructions.jsonl"] != digest(tmp_path / "seed")["instructions.jsonl"]


class Killed(BaseException):
    """Ends a run as abruptly as can be within a process."""


def test_interrupted_anywhere_it_ends_with_the_same_bytes(monkeypatch, tmp_path):
    flags = ["--format", "mix", "--num_workers", 1, *world(tmp_path, 10)]
    write(tmp_path, [record(number) for number in range(10)] + [record(99), record(98, image=None)])
    assert generate(monkeypatch, *flags, "--output", tmp_path / "whole") == 1
    out, append = tmp_path / "out", Output.append
    for point in (0, 1, 5, 8):

        def killed_there(self, record, drops, point=point):
            if self.num_done + (calls := getattr(self, "calls", 0)) >= point:
                with self._log.path.open("ab") as log:
                    log.write(b'{"record": {"id": "cut of')
                (self.unfinished / "1.part").write_bytes(b"half a picture")
                raise Killed
            self.calls = calls + 1
            append(self, record, drops)

        monkeypatch.setattr(Output, "append", killed_there)
        with pytest.raises(Killed):
            generate(monkeypatch, *flags, "--output", out)
    monkeypatch.setattr(Output, "append", append)
    assert not (out / "instructions.jsonl").exists()
    assert generate(monkeypatch, *flags, "--output", out) == 1
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize("step", ["records moved", "run.json written"])
def test_killed_while_finishing(monkeypatch, tmp_path, step):
    flags = ["--format", "pip", "--num_workers", 1, *world(tmp_path, 6)]
    assert generate(monkeypatch, *flags, "--output", tmp_path / "whole") == 0
    name = {"records moved": "write_run_json", "run.json written": "shutil.rmtree"}[step]

    def killed(*args, **options):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"data_gen.gen_instruction.output.{name}", killed)
        generate(monkeypatch, *flags, "--output", tmp_path / "out")
    assert generate(monkeypatch, *flags, "--output", tmp_path / "out") == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_kill_minus_nine(monkeypatch, tmp_path):
    """The real thing, on two workers; they do not outlive their parent."""
    flags = ["--format", "collage", "--num_cells_weights", "9:1", "--num_records", "60", *world(tmp_path, 20)]
    command = [sys.executable, "-m", "data_gen.gen_instruction", *flags, "--num_workers", "2"]
    out = tmp_path / "out"
    job = subprocess.Popen([*command, "--output", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)
    log, deadline = out / "unfinished/log.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not (out / "instructions.jsonl").exists(), "the run ended before it could be killed"
    assert generate(monkeypatch, *flags, "--num_workers", 2, "--output", out) == 0
    assert generate(monkeypatch, *flags, "--num_workers", 1, "--output", tmp_path / "whole") == 0
    assert digest(out) == digest(tmp_path / "whole")
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # a zombie waits for nothing but its parent
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_finished_run_is_not_repeated_and_another_is_refused(monkeypatch, tmp_path, capsys):
    flags = ["--format", "sequence", *world(tmp_path, 6), "--output", tmp_path / "out"]
    assert generate(monkeypatch, *flags) == 0
    before = (tmp_path / "out/run.json").stat().st_mtime_ns
    assert generate(monkeypatch, *flags, "--num_workers", 1) == 0
    assert (tmp_path / "out/run.json").stat().st_mtime_ns == before
    assert generate(monkeypatch, *flags, "--seed", 5) == 2
    assert "seed 0 there, 5 here" in capsys.readouterr().err
    write(tmp_path, [record(number) for number in range(5)])
    assert generate(monkeypatch, *flags) == 2
    assert "source.json" in capsys.readouterr().err


def test_leftovers_of_another_run_are_refused_in_one_line(monkeypatch, tmp_path, capsys):
    flags = ["--format", "pip", *world(tmp_path, 6), "--output", tmp_path / "out", "--num_workers", 1]
    monkeypatch.setattr(Output, "append", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        generate(monkeypatch, *flags)
    capsys.readouterr()
    assert generate(monkeypatch, *flags, "--seed", 1) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "unfinished run" in errors[0] and "--output" in errors[0]
    (tmp_path / "other/images").mkdir(parents=True)
    assert generate(monkeypatch, *flags[:-3], tmp_path / "other") == 2


def test_two_processes_do_not_write_one_folder(tmp_path):
    code = "from data_gen.gen_instruction.output import Output; from pathlib import Path; import sys\n"
    code += "Output(Path(sys.argv[1]), {'a': {}}).writing().__enter__()"
    with Output(tmp_path, {"a": {}}).writing():
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "another process is writing there" in done.stderr


def test_a_killed_worker_ends_the_run_in_a_sentence():
    with pytest.raises(WorkerKilled, match="start the same command again with fewer --num_workers"):
        list(ordered(_die, None, range(3), 2))


def _die(_, task):
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_and_not_far_ahead():
    taken = []

    def tasks():
        for number in range(40):
            taken.append(number)
            yield number

    results = ordered(_double, 2, tasks(), 2)
    assert next(results) == 0 and len(taken) <= 8
    assert list(results) == [2 * number for number in range(1, 40)]


def _double(factor, number):
    return factor * number
