"""Answer a multi-image test set: `python -m inference.llava_hound_dpo.run_inference --help`, or by torchrun.

Every answer comes with its attention ratio and confidence, and is on disk as soon as it is finished. With --endpoint a
server answers; its answers get them by `python -m inference.llava_hound_dpo.measure`.
"""

import sys

from llava.answering import answer, identify, prepare
from llava.command_line import parse
from llava.elsewhere import ServerSettings, answer_by_server
from llava.runtime import leave, setup_logging, user_errors
from llava.settings import AnswerSettings, ModelSettings, QuestionFiles


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    setup_logging()
    with user_errors():
        files, model, settings, server = parse((QuestionFiles, ModelSettings, AnswerSettings, ServerSettings), __doc__)
        if server.endpoint and (settings.attention_layers != "auto" or settings.attention_heads):
            raise ValueError("--endpoint measures nothing: give --attention_layers and --attention_heads to `measure`")
        endpoint = server.open(model.model_name_or_path, settings)
        job = prepare(model, settings, files.read)
        identity = identify(job) | {"served_model": None}
    if endpoint:
        answer_by_server(job, endpoint, server.endpoint_workers, files.output)
    else:
        answer(job, files.output, identity)
    leave()


if __name__ == "__main__":
    sys.exit(main())
