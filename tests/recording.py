"""run_dpo that also records which pairs were trained at which step: `torchrun -m tests.recording FLAGS`.

Adds one line per packed row to the file `$RECORD`: the attempt `$ATTEMPT`, steps done before, and the pairs that count.
Process `$SLOW_RANK` waits before it looks for reference log-probs.
"""

import json
import os
import sys
import time
from pathlib import Path

from train.llava_hound_dpo.reference import ReferenceCache
from train.llava_hound_dpo.run_dpo import main
from train.llava_hound_dpo.trainer import AttentionAwareDPOTrainer

plain, plain_load = AttentionAwareDPOTrainer.compute_loss, ReferenceCache.load


def compute_loss(self, model, inputs, *args, **kwargs):
    counted = inputs["index"][inputs["step_pairs"] > 0].tolist()
    line = {"attempt": int(os.environ["ATTEMPT"]), "step": self.state.global_step, "pairs": counted}
    with Path(os.environ["RECORD"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return plain(self, model, inputs, *args, **kwargs)


def load(self):
    if os.environ.get("SLOW_RANK") == os.environ["RANK"]:
        time.sleep(2)
    plain_load(self)


if __name__ == "__main__":
    AttentionAwareDPOTrainer.compute_loss, ReferenceCache.load = compute_loss, load
    sys.exit(main())
