"""How a model sees answers of whomever: `python -m inference.llava_hound_dpo.measure --help`, or by torchrun.

Adds the attention ratio (overall, by layer, share of every image), confidence and perplexity to each line of --answers
and writes them in the same order, like answers.jsonl of `run_inference`. All answers to a question are measured by one
pass. Killed, the same command goes on.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from llava.answering import identify, prepare
from llava.command_line import check_numbers, flag, parse
from llava.elsewhere import answered, measure_answers, read_given, with_answers
from llava.heads import HeadSettings
from llava.runtime import check_outputs, leave, setup_logging, user_errors
from llava.settings import AnswerSettings, ModelSettings, QuestionFiles


@dataclass(kw_only=True)
class MeasureSettings(HeadSettings):
    """Which answers are measured, and what of them."""

    _argument_group_name = "answers"

    answers: Path = flag(
        "JSON lines of `question_id` and `text`, several to a question too; `is_complete` false where one was cut off; "
        "further fields are kept"
    )
    attention_layers: str = flag("layers of the attention ratio: auto, 14-22, 3,5 or none", "auto")
    attention_maps: int = flag("questions whose first answer gets its map of attention by patch", 12)

    def __post_init__(self):
        check_numbers(self, attention_maps=(0, None), top_heads=(1, None))

    def answering(self) -> AnswerSettings:
        """The same, as a job takes them."""
        names = ("attention_layers", "attention_heads", "top_heads", "attention_maps")
        return AnswerSettings(max_new_tokens=1, **{name: getattr(self, name) for name in names})


def main() -> None:
    """Check, measure what is not measured yet, merge."""
    setup_logging()
    with user_errors():
        files, own, model = parse((QuestionFiles, MeasureSettings, ModelSettings), __doc__)
        check_outputs([files.output], [files.data_path, own.answers])
        answers = read_given(own.answers)
        job = prepare(model, own.answering(), lambda: answered(files.read(), answers))
        job = with_answers(job, answers)
        identity = identify(job)
    measure_answers(job, files.output, identity)
    leave()


if __name__ == "__main__":
    sys.exit(main())
