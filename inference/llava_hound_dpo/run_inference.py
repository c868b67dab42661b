"""Answer a multi-image test set: `python -m inference.llava_hound_dpo.run_inference --help`, or by torchrun.

Every answer comes with its attention ratio and confidence, and is on disk as soon as it is finished. With --endpoint a
server answers; its answers get them by `python -m inference.llava_hound_dpo.measure`.
"""

import sys
from dataclasses import dataclass

from llava.answering import answer, identify, prepare
from llava.command_line import check_numbers, flag, parse
from llava.elsewhere import ServerSettings, answer_by_server
from llava.order import in_other_orders
from llava.records import read_questions
from llava.runtime import leave, setup_logging, user_errors
from llava.settings import AnswerSettings, ModelSettings, QuestionFiles


@dataclass(kw_only=True)
class OrderSettings:
    """In how many orders of its pictures a question is asked."""

    _argument_group_name = "order of the pictures"

    permutations: int = flag("orders in which a sequence is asked, the given one first; evaluate then has flips", 1)

    def __post_init__(self):
        check_numbers(self, permutations=(1, 1000))


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    setup_logging()
    with user_errors():
        groups = (QuestionFiles, ModelSettings, AnswerSettings, OrderSettings, ServerSettings)
        files, model, settings, orders, server = parse(groups, __doc__)
        if server.endpoint and (settings.attention_layers != "auto" or settings.attention_heads):
            raise ValueError("--endpoint measures nothing: give --attention_layers and --attention_heads to `measure`")
        endpoint = server.open(model.model_name_or_path, settings)
        questions = read_questions(files.data_path)
        job = prepare(model, settings, questions + in_other_orders(questions, orders.permutations))
    if endpoint:
        answer_by_server(job, endpoint, server.endpoint_workers, files.output)
    else:
        answer(job, files.output, identify(job) | {"served_model": None})
    leave()


if __name__ == "__main__":
    sys.exit(main())
