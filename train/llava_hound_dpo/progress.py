"""What a training says of itself: a line for every logged step, and a warning where DPO unlearns the chosen answers."""

import logging
from collections import deque

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

logger = logging.getLogger(__name__)

WATCHED = 5  # logs whose mean is judged: one alone is noise
LEAST_FALL = 0.5  # nats of a whole answer; an answer that was certain doubles its log-prob by less


class StepLines(ProgressCallback):
    """The Trainer's progress bar, where there is a terminal, and one line per logged step in a fixed order."""

    SHOWN = (
        ("loss", "loss"), ("dpo", "losses/dpo"), ("sft", "losses/sft"), ("att", "losses/attention"),
        ("ratio", "attention/ratio"), ("margin", "rewards/margins"), ("acc", "rewards/accuracies"),
        ("lr", "learning_rate"),
    )  # fmt: skip

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step  # steps before a resume took no time of this run's
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=args.disable_tqdm
            )

    def on_prediction_step(self, args, *words, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, *words, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        prefix = next((prefix for prefix in ("", "eval_") if prefix + "loss" in (logs or {})), None)
        if self.training_bar is None or prefix is None:
            return
        shown = [f"{label} {logs[prefix + name]:.4g}" for label, name in self.SHOWN if prefix + name in logs]
        where = f"evaluation at step {state.global_step}" if prefix else f"step {state.global_step}/{state.max_steps}"
        self.training_bar.write(f"{where}  " + "  ".join(shown))


class WatchChosen(TrainerCallback):
    """Warns, once, when the chosen answers have become far less likely than they were under the reference.

    DPO rewards the margin alone, which also grows while both answers become less likely; what gains is then neither
    of them. Far: the mean log-prob of a chosen answer has doubled, and fallen by `LEAST_FALL` at least. Source: arXiv
    2410.08847 (likelihood displacement); the remedy, a share of SFT, arXiv 2404.19733.
    """

    def __init__(self, beta: float):
        self.beta = beta
        self.found = deque(maxlen=WATCHED)
        self.has_warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not {"logps/chosen", "rewards/chosen"} <= set(logs or {}):
            return
        self.found.append((logs["logps/chosen"], -logs["rewards/chosen"] / self.beta))
        policy, fall = (sum(values) / len(self.found) for values in zip(*self.found, strict=True))
        reference = policy + fall
        if self.has_warned or len(self.found) < WATCHED or fall < max(LEAST_FALL, -reference):
            return
        self.has_warned = True
        if state.is_world_process_zero:
            logger.warning(
                "step %d: the chosen answers have become much less likely (mean log-prob %.2f, reference %.2f): DPO "
                "raises the margin by lowering both answers; a share of SFT (--gamma 0.5 or more) or a lower "
                "--learning_rate keeps them", state.global_step, policy, reference,
            )  # fmt: skip
