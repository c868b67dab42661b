"""Answer a multi-image test set: `python -m inference.llava_hound_dpo.run_inference --help`, or by torchrun.

Every answer comes with its attention ratio and confidence, and is on disk as soon as it is finished.
"""

import sys

from llava.answering import answer, identify, prepare
from llava.command_line import parse
from llava.runtime import leave, setup_logging, user_errors
from llava.settings import AnswerSettings, ModelSettings, QuestionFiles


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    setup_logging()
    with user_errors():
        files, model, settings = parse((QuestionFiles, ModelSettings, AnswerSettings), __doc__)
        job = prepare(model, settings, files.data_path)
        identity = identify(job)
    answer(job, files.output, identity)
    leave()


if __name__ == "__main__":
    sys.exit(main())
