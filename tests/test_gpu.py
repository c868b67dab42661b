"""The check of a machine's GPUs, as tests: `pytest -m gpu` on a machine that has one."""

import pytest

from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check.common import FAIL, Settings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("section", gpu_check.SECTIONS)
def test_nothing_fails_on_this_gpu(section, tmp_path, monkeypatch):
    import torch

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # the other tests run on the CPU
    settings = Settings("cuda", "7b", torch.cuda.device_count(), tmp_path)
    findings = list(gpu_check.run(section, settings))
    assert findings and not [finding for finding in findings if finding.verdict == FAIL]
