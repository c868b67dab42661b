"""A page to see where a model looks: ask it about pictures, plain and steered, one model or two side by side.

`python -m scripts.viewer --model_name_or_path MODEL [--compare ADAPTER] [--answers answers.jsonl --data_path test.json
--image_folder IMAGES]`. Needs gradio: pip install -r requirements-viewer.txt
"""

import ipaddress
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llava.attention import layer_range
from llava.command_line import check_numbers, flag, parse
from llava.runtime import setup_logging, stop, user_errors
from llava.settings import ModelSettings
from llava.vlm import VLM
from scripts.viewer.answers import AnswerFiles

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ViewerModels:
    """Whom the page asks."""

    _argument_group_name = "models"

    model_name_or_path: str = flag("checkpoint or adapter of any dialect: folder or hub name")
    compare: str | None = flag("a second one, asked the same and shown beside it", None)
    base_model: str | None = flag("what an adapter stands on, instead of the base it names", None)
    max_image_tokens: int | None = flag("tokens that a picture may cost, in families where its size decides", None)
    dtype: str = flag(
        "auto: bfloat16 on a GPU, float32 on a CPU", "auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    attention_layers: str = flag("layers of the attention ratio: auto, all, 14-22 or 3,5", "auto")
    max_new_tokens: int = flag("tokens of an answer at most", 128)

    def __post_init__(self):
        check_numbers(self, max_image_tokens=(1, None), max_new_tokens=(1, None))


@dataclass(kw_only=True)
class ViewerPage:
    """What it shows beside, and to whom."""

    _argument_group_name = "page"

    answers: list[Path] | None = flag("answers.jsonl to browse, one file a model; needs the next two", None)
    data_path: str | None = flag("test set that was answered", None)
    image_folder: str | None = flag("folder, .zip or .tar of its pictures", None)
    port: int | None = flag("port; default: the first free one from 7860", None)
    host: str = flag("address to listen on; any other than 127.0.0.1 lets others in, who need no password", "127.0.0.1")

    def __post_init__(self):
        check_numbers(self, port=(1, 65535))
        if self.answers and not (self.data_path and self.image_folder):
            raise ValueError("--answers needs --data_path and --image_folder: the questions and their pictures")
        if not self.answers and (self.data_path or self.image_folder):
            raise ValueError("--data_path and --image_folder are for --answers: give the answers to browse, too")


def main(argv: Sequence[str] | None = None) -> None:
    """Serves the page until Ctrl-C."""
    page = start(argv)
    try:
        page.block_thread()
    finally:
        page.close()


def start(argv: Sequence[str] | None):
    """The page, being served."""
    setup_logging()
    with user_errors():
        models, shown = parse((ViewerModels, ViewerPage), __doc__, argv)
    if find_spec("gradio") is None:
        stop("the page needs gradio: pip install -r requirements-viewer.txt")
    with user_errors():
        tests = AnswerFiles.read(shown.answers, shown.data_path, shown.image_folder) if shown.answers else None
        names = ("base_model", "max_image_tokens", "dtype")
        own = {name: getattr(models, name) for name in names}
        paths = [models.model_name_or_path, *([models.compare] if models.compare else [])]
        settings = [ModelSettings(model_name_or_path=path, image_folder="", **own) for path in paths]
        checkpoints = [one.open() for one in settings]
        for checkpoint in checkpoints:  # before the weights of any
            layer_range(checkpoint.num_layers, models.attention_layers)
        opened = dict(zip(_names(paths), map(VLM.load, settings, checkpoints), strict=True))
        from scripts.viewer.page import build, serve  # gradio takes seconds, and may be missing

        asking = {name: getattr(models, name) for name in ("attention_layers", "max_new_tokens")}
        page = build(opened, tests, asking)
        url = serve(page, shown.host, shown.port)
    log.info("the page: %s  (Ctrl-C ends it)", url)
    if not _is_own(shown.host):
        log.warning("--host %s: whoever reaches this machine can ask the model, and sees the test set", shown.host)
    return page


def _names(paths: Sequence[str]) -> list[str]:
    """What the page calls the models: their folders' names, or whole paths where these are one."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else list(map(str, paths))


def _is_own(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
