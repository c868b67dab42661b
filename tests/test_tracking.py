"""Where a training reports to: a tracker that is not there is one line, wandb never waits, a queued job has one run."""

import subprocess

import pytest
from transformers.integrations import integration_utils

from tests.test_arguments import parsed
from train.llava_hound_dpo import tracking

VARIABLES = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SILENT")


@pytest.fixture
def prepared(tmp_path, monkeypatch, caplog):
    """A function that prepares wandb and returns (the variables that it reads, what was said)."""

    def prepare(variables=None, netrc=None, error=None, report_to=("wandb",)):
        def start(words, timeout, **settings):
            compile(words[-1], "login", "exec")
            if isinstance(error, Exception):
                raise error
            return subprocess.CompletedProcess(words, bool(error), "", error or "")

        monkeypatch.setattr(tracking.subprocess, "run", start)
        monkeypatch.setattr(tracking, "os", type("os", (), {"environ": dict(variables or {})}))
        tracking.os.environ["NETRC"] = str(tmp_path / "netrc")
        (tmp_path / "netrc").write_text(netrc or "")
        caplog.clear()
        with caplog.at_level("INFO"):
            tracking.prepare_wandb(report_to, tmp_path / "out")
        return {name: tracking.os.environ.get(name) for name in VARIABLES}, caplog.messages

    return prepare


@pytest.mark.parametrize(
    ("settings", "mode", "said"),
    [
        ({}, "offline", "wandb: no login found, logging offline"),
        ({"netrc": "machine api.wandb.ai"}, None, None),
        ({"variables": {"WANDB_API_KEY": "x"}}, None, None),
        ({"variables": {"WANDB_MODE": "online"}}, "online", None),
        ({"variables": {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}}, "offline", None),
        (
            {"variables": {"WANDB_API_KEY": "x"}, "error": "wandb: 1\nwandb.errors.AuthenticationError: no route\n"},
            "offline", "wandb: its server did not let us in (no route), logging offline",
        ),
        (
            {"netrc": "machine api.wandb.ai", "error": subprocess.TimeoutExpired("", 40)}, "offline",
            "wandb: its server gave no answer, logging offline",
        ),
        ({"report_to": ["tensorboard"]}, None, None),
        ({"report_to": []}, None, None),
    ],
)  # fmt: skip
def test_wandb_goes_offline_with_one_line_where_it_cannot_log_in(prepared, settings, mode, said):
    variables, lines = prepared(**settings)
    assert variables["WANDB_MODE"] == mode
    assert [line.partition(" (send")[0] for line in lines] == ([said] if said else [])


def test_a_job_that_is_queued_again_goes_on_in_the_same_wandb_run(prepared, tmp_path):
    login = {"WANDB_API_KEY": "x"}
    first, again = prepared(login)[0], prepared(login)[0]
    assert first == again and first["WANDB_RESUME"] == "allow" and len(first["WANDB_RUN_ID"]) == 8
    assert (tmp_path / "out" / tracking.WANDB_ID).read_text() == first["WANDB_RUN_ID"]
    assert prepared(login | {"WANDB_RUN_ID": "mine"})[0]["WANDB_RUN_ID"] == "mine"
    assert prepared()[0]["WANDB_RUN_ID"] == first["WANDB_RUN_ID"]  # offline as well: to be synced into one


@pytest.mark.parametrize(
    ("name", "reason"),
    [("tensorbord", "no such tracker"), ("wandb", "not installed"), ("tensorboard", "not installed")],
)
def test_a_tracker_that_is_not_there_is_one_line_with_the_flag(monkeypatch, name, reason):
    for package in ("wandb", "tensorboard"):
        monkeypatch.setattr(integration_utils, f"is_{package}_available", lambda: False)
    with pytest.raises(ValueError, match=f"^--report_to {name}: .*none$") as caught:
        tracking.check_trackers(parsed("--report_to", name)[3].report_to)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_every_tracker_of_transformers_can_be_looked_for():
    for name in integration_utils.INTEGRATION_TO_CALLBACK:
        assert callable(getattr(integration_utils, f"is_{tracking.IMPORTED_AS.get(name, name)}_available"))
    tracking.check_trackers(parsed("--report_to", "none")[3].report_to)
