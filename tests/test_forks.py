"""Jobs in forks say and return what those of a process of their own would."""

from tests import forks


def test_torchrun_says_how_its_worker_failed():
    code, _, errors = forks.run(["torchrun", "--standalone", "--nproc_per_node=1", "-m", "tests.no_such_module"])
    assert code == 1 and "exitcode  : 1" in errors and "No module named tests.no_such_module" in errors


def test_words_streams_and_folder_are_its_own(tmp_path):
    (tmp_path / "said.py").write_text(
        "import sys, os\nprint(sys.argv[1:], os.getcwd(), dict(os.environ)['A'])\nsys.exit('!')"
    )
    found = forks.run(["python", "-m", "said", "x", "--y"], cwd=tmp_path, env={"A": "1"})
    assert found == (1, f"['x', '--y'] {tmp_path} 1\n", "!\n")
