"""Jobs in forks say and return what those of a process of their own would."""

from tests import forks


def test_torchrun_says_how_its_worker_failed():
    code, _, errors = forks.run(["torchrun", "--standalone", "--nproc_per_node=1", "-m", "tests.no_such_module"])
    assert code == 1 and "exitcode  : 1" in errors and "No module named tests.no_such_module" in errors


def test_words_streams_and_folder_are_its_own(tmp_path):
    (tmp_path / "good.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("[")
    good, bad = (
        forks.run(["python", "-m", "json.tool", "--compact", f"{name}.json"], cwd=tmp_path) for name in ("good", "bad")
    )
    assert good == (0, "[1]\n", "")
    assert bad[:2] == (1, "") and bad[2].startswith("Expecting value: ") and bad[2].count("\n") == 1
