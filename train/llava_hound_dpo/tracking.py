"""Where a training reports to, found out before any weight is loaded: trackers that are there, and wandb's one run."""

import logging
import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from transformers.integrations import integration_utils

from llava.runtime import is_main_process, write_text

logger = logging.getLogger(__name__)

WANDB_ID = "wandb_id.txt"  # of the output folder: a job that is queued again goes on in the same wandb run
IMPORTED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}  # where not by the tracker's name
PATIENCE_S = 10  # for the answer of wandb's server


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises ValueError for a tracker of `--report_to` that transformers does not know, or that is not installed."""
    for name in report_to:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(integration_utils.INTEGRATION_TO_CALLBACK)
            raise ValueError(f"--report_to {name!s:.60}: no such tracker; choose from {known}, or none")
        package = IMPORTED_AS.get(name, name)
        if not getattr(integration_utils, f"is_{package}_available")():
            raise ValueError(f"--report_to {name}: {package} is not installed here: install it, or --report_to none")


def prepare_wandb(report_to: Sequence[str], output_dir: Path) -> None:
    """Let wandb go on with the output folder's run, and log offline where nobody is logged in or no server answers.

    So a run never stops at a login prompt, nor waits minutes for a network that its node does not have.
    """
    if "wandb" not in report_to or not is_main_process():
        return
    if not os.environ.get("WANDB_MODE") and (reason := _offline_reason()):
        os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")  # this line says it all
        logger.info("wandb: %s, logging offline (send it later with `wandb sync`)", reason)
    if not (output_dir / WANDB_ID).is_file():
        write_text(output_dir / WANDB_ID, uuid.uuid4().hex[:8])
    os.environ.setdefault("WANDB_RUN_ID", (output_dir / WANDB_ID).read_text(encoding="utf-8").strip())
    if os.environ.get("WANDB_MODE", "online") == "online":  # else wandb warns that there is nothing to ask
        os.environ.setdefault("WANDB_RESUME", "allow")


def _offline_reason() -> str | None:
    """Why wandb cannot log online; None if its server knows the user."""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    in_file = netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")
    if not (in_file or os.environ.get("WANDB_API_KEY")):
        return "no login found"
    login = f"import wandb; wandb.login(verify=True, timeout={PATIENCE_S})"
    try:  # in a process of its own: afterwards this one could no longer choose to log offline
        done = subprocess.run([sys.executable, "-c", login], capture_output=True, text=True, timeout=4 * PATIENCE_S)
    except subprocess.TimeoutExpired:
        return "its server gave no answer"
    reason = done.stderr.strip().rpartition("\n")[2].rpartition("Error: ")[2]
    return f"its server did not let us in ({reason})" if done.returncode else None
