"""The console command that is a launch script: `aa-train` runs the file that one would edit in the clone."""

import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent


def train() -> NoReturn:
    """Become train_dpo_multi_hpc_a100.sh, with this environment's python and torchrun, activated or not."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.execvp("bash", ["bash", str(ROOT / "train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh"), *sys.argv[1:]])
