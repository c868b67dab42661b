"""What a training says of itself: a line for every logged step, and warnings where DPO unlearns the chosen answers."""

import logging
from collections import deque

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

logger = logging.getLogger(__name__)

WATCHED = 5  # logs whose mean is judged: one alone is noise
LEAST_FALL = 0.5  # nats of a whole answer, or of its end; what was certain doubles its log-prob by less


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
    """Warns, once each, when the chosen answers, or their end, are far less likely than they were under the reference.

    DPO rewards the margin alone, which also grows while both answers become less likely; what gains is then neither
    of them. The end token is in both, so the margin does not hold it, and a model without it goes on and on. Far: the
    mean log-prob has doubled, and fallen by `LEAST_FALL` at least. Source: arXiv 2410.08847 (likelihood displacement);
    the remedy, a share of SFT, arXiv 2404.19733.
    """

    WARNINGS = {
        "chosen": "the chosen answers have become much less likely (mean log-prob %.2f, reference %.2f): DPO raises "
        "the margin by lowering both answers; a share of SFT (--gamma 0.5 or more) or a lower --learning_rate keeps "
        "them",
        "chosen_end": "the end of the chosen answers has become much less likely (mean log-prob of the end token %.2f, "
        "reference %.2f): answers may soon not end; a share of SFT (--gamma 0.1 or more) keeps it, and --answer_end "
        "has other ways",
    }  # fmt: skip

    def __init__(self):
        self.found = {name: deque(maxlen=WATCHED) for name in self.WARNINGS}
        self.has_warned: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name, warning in self.WARNINGS.items():
            if not {f"logps/{name}", f"reference/{name}"} <= set(logs or {}):
                continue
            self.found[name].append((logs[f"logps/{name}"], logs[f"reference/{name}"]))
            if name in self.has_warned or not _have_fallen(self.found[name]):
                continue
            self.has_warned.add(name)
            if state.is_world_process_zero:
                logger.warning(f"step %d: {warning}", state.global_step, *_means(self.found[name]))


def _means(found: deque) -> tuple[float, float]:
    """Mean log-probs of policy and reference."""
    policy, reference = (sum(values) / len(found) for values in zip(*found, strict=True))
    return policy, reference


def _have_fallen(found: deque) -> bool:
    policy, reference = _means(found)
    return len(found) == WATCHED and reference - policy >= max(LEAST_FALL, -reference)
