"""The page: what is on it, and what happens when it is used. Needs gradio (requirements-viewer.txt)."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which asks for the newest version otherwise

import gradio as gr

from llava.adaptviz import SCOPES, AdaptViz, Bands
from llava.attention import layer_range
from llava.image import LARGEST
from llava.messages import one_line
from llava.scaling import RULES
from llava.vlm import VLM
from scripts.viewer.answers import ANY, COLUMNS, FILTERS, AnswerFiles
from scripts.viewer.cards import about, card, notice

FONT = ["system-ui", "sans-serif"]  # the reader's own: nothing to fetch
THEME = gr.themes.Default(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=FONT)
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}  # a second visitor waits in a queue
FACTORS = (0.25, 4.0)
UNSTEERED = "Not steered: nothing is told apart in this prompt. Scope “all” scales all that is seen."
TOO_LONG = "Prompt and answer are longer than what the model was made for."
HINT = "Drop pictures and ask. The plain answer comes first, then the steered one; moving a control steers again."


@dataclass(frozen=True)
class Desk:
    """Answers what the page asks: a plain card of every model, then a steered one of each."""

    models: Mapping[str, VLM]
    settings: Mapping[str, Any]  # of `VLM.ask`: `attention_layers`, `max_new_tokens`

    @property
    def slots(self) -> list[tuple[str, bool]]:
        """(model, whether it is steered) of each card."""
        return [(name, is_steered) for is_steered in (False, True) for name in self.models]

    def ask(
        self, gallery: list | None, prompt: str, opened: dict | None, factor: float, scope: str, rule: str
    ) -> Iterator[list[Any]]:
        """The cards, one after another as they come. Raises gr.Error for what cannot be asked."""
        if not gallery:
            raise _error("no picture: drop one or several first")
        if not prompt.strip():
            raise _error("no question: write one first")
        yield from self._answers(self.slots, gallery, prompt, opened, (factor, scope, rule))

    def steer(self, gallery: list | None, prompt: str, opened: dict | None, *steering: Any) -> Iterator[list[Any]]:
        """The steered cards alone, when a control has been moved; nothing before there is something to ask."""
        slots = [slot for slot in self.slots if slot[1]] if gallery and prompt.strip() else []
        yield from self._answers(slots, gallery, prompt, opened, steering)

    def _answers(self, slots: Sequence, gallery, prompt: str, opened: dict | None, steering) -> Iterator[list[Any]]:
        cards = [gr.skip() for _ in self.slots]
        yield cards
        pictures = [picture for picture, _ in gallery or ()]
        is_as_opened = opened is not None and (opened["prompt"], opened["count"]) == (prompt, len(pictures))
        fields = opened["fields"] if is_as_opened else {}
        for slot in slots:
            yield [self._card(slot, pictures, prompt, fields, *steering) if own == slot else gr.skip()
                   for own in self.slots]  # fmt: skip

    def _card(self, slot, pictures: list, prompt: str, fields: dict, factor: float, scope: str, rule: str) -> str:
        name, is_steered = slot
        title, steer = f"{name} · plain", None
        if is_steered:
            title = f"{name} · {scope}, {'×' if rule == 'multiply' else rule} {factor:g}"
            steer = AdaptViz(scope=scope, rule=rule, bands=Bands.fixed(factor))
        try:
            reply = self.models[name].ask(pictures, prompt, steer=steer, **self.settings, **fields)
        except (ValueError, OSError) as error:
            if is_steered:  # the plain answer stays
                return notice(title, _line(error, pictures))
            raise _error(_line(error, pictures)) from error
        notes = [UNSTEERED] if is_steered and factor != 1 and reply.scale == 1 else []
        notes += [TOO_LONG] if reply.record["is_too_long"] else []
        layers = layer_range(self.models[name].checkpoint.num_layers, self.settings["attention_layers"])
        return card(title, reply, sorted(layers), " ".join(notes))


def _line(error: Exception, pictures: Sequence[str] = ()) -> str:
    """What an error says, without where the page keeps its pictures."""
    text = str(error).removeprefix("prompt 1, ").removeprefix("prompt 1: ")
    for path in pictures:
        text = text.replace(f"{path}: ", "")
    return one_line(text)


def build(models: Mapping[str, VLM], tests: AnswerFiles | None, settings: Mapping[str, Any]) -> gr.Blocks:
    """The page, which is not served yet."""
    desk, title = Desk(models, settings), f"Where {' and '.join(models)} look"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        with gr.Tabs() as tabs:
            with gr.Tab("Ask", id="ask"):
                asking = _ask_tab(desk)
            if tests:
                with gr.Tab("Answers", id="answers"):
                    _answers_tab(desk, tests, tabs, *asking)
    return page


def _ask_tab(desk: Desk) -> tuple[list, list, gr.HTML]:
    """The first tab: (what is asked with, the cards, what is known about the question)."""
    opened = gr.State(None)
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            gallery, prompt, button = _question()
            steering = factor, scope, rule = _steering()
        with gr.Column(scale=5, min_width=320):
            known = gr.HTML(about(HINT), elem_id="known")
            with gr.Row(elem_classes="cards"):
                cards = [gr.HTML(elem_id=f"card-{number}") for number in range(len(desk.slots))]
    inputs, moved = [gallery, prompt, opened, *steering], [factor.release, scope.input, rule.input]
    gr.on([button.click, prompt.submit], desk.ask, inputs, cards, **ONE_AT_A_TIME)
    gr.on(moved, desk.steer, inputs, cards, trigger_mode="always_last", **ONE_AT_A_TIME)
    prompt.input(lambda: (None, about(HINT)), None, [opened, known], queue=False)
    gr.on([gallery.upload, gallery.delete], _changed, gallery, [gallery, opened, known], queue=False)
    return inputs, cards, known


def _question() -> tuple[gr.Gallery, gr.Textbox, gr.Button]:
    gallery = gr.Gallery(
        label="Pictures: Image1, Image2, …", type="filepath", format="png", sources=["upload", "clipboard"],
        file_types=["image"], columns=3, height="auto", interactive=True, buttons=[], elem_id="pictures",
    )  # fmt: skip
    hint = "In Image2, what colour is the car?"
    prompt = gr.Textbox(label="Question", placeholder=hint, lines=1, max_lines=8, elem_id="prompt")
    return gallery, prompt, gr.Button("Ask", variant="primary", elem_id="ask-button")


def _steering() -> tuple[gr.Slider, gr.Radio, gr.Radio]:
    label = "Steering: factor on the attention scores"
    return (
        gr.Slider(*FACTORS, value=1.5, step=0.05, label=label, elem_id="factor", buttons=[]),
        gr.Radio(list(SCOPES), value="target", label="Scope: whose scores", elem_id="scope"),
        gr.Radio(list(RULES), value="multiply", label="Rule: how", elem_id="rule"),
    )


def _changed(pictures: list | None) -> tuple[list, None, str]:
    """Other pictures: they are numbered anew, and no longer those of a test set."""
    return numbered(pictures), None, about(HINT)


def _answers_tab(desk: Desk, tests: AnswerFiles, tabs: gr.Tabs, inputs: list, cards: list, known: gr.HTML) -> None:
    """The second tab: filters, a table, and a click that opens a question in the first."""
    files = list(tests.files)
    with gr.Row():
        file = gr.Dropdown(files, value=files[0], label="answers file", elem_id="file", visible=len(files) > 1)
        filters = [gr.Dropdown(tests.choices(name), value=ANY, label=name, min_width=150) for name in FILTERS]
    every = tests.table(files[0], *[ANY] * len(FILTERS))
    count = gr.HTML(_count(every, every), elem_id="count")
    table = gr.Dataframe(
        every, headers=list(COLUMNS), type="array", interactive=False, buttons=[], elem_id="answers", wrap=True,
        column_widths=list(COLUMNS.values()),
    )  # fmt: skip

    def filtered(file: str, *wanted: str) -> tuple[list, str]:
        rows = tests.table(file, *wanted)
        return rows, _count(rows, tests.files[file])

    def show(event: gr.SelectData, file: str) -> tuple:
        return (*_opened(tests, file, event.row_value[list(COLUMNS).index("id")]), gr.Tabs(selected="ask"))

    gr.on([one.input for one in (file, *filters)], filtered, [file, *filters], [table, count])
    clicked = table.select(show, file, [*inputs[:3], known, tabs])
    clicked.success(desk.ask, inputs, cards, **ONE_AT_A_TIME)


def _opened(tests: AnswerFiles, file: str, id: str) -> tuple[list, str, dict[str, Any], str]:
    """A question of the test set for the first tab: gallery, prompt, what `opened` holds, and what is known."""
    try:
        pictures, prompt, fields, said = tests.open(file, id)
    except (ValueError, OSError) as error:
        raise _error(_line(error)) from error
    opened = {"prompt": prompt, "count": len(pictures), "fields": fields}
    return numbered([(picture, None) for picture in pictures]), prompt, opened, about(*said)


def numbered(pictures: Sequence[tuple[Any, Any]] | None) -> list[tuple[Any, str | None]]:
    """The pictures of a gallery under the names that a prompt has for them, if they are several."""
    return [(picture, f"Image{n}" if len(pictures) > 1 else None) for n, (picture, _) in enumerate(pictures or [], 1)]


def _count(rows: Sequence, every: Sequence) -> str:
    return about(f"{len(rows)} of {len(every)} questions", "A click on one opens it and asks it again.")


def _error(message: str) -> gr.Error:
    """A line on the page; gradio would take it for HTML."""
    return gr.Error(escape(message), duration=None, title="Cannot ask this", print_exception=False)


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Start to serve a page, and give its address. Raises OSError where the port is taken."""
    nobody_else = {"share": False, "run_history": False, "ssr_mode": False, "mcp_server": False, "pwa": False}
    looks = {"theme": THEME, "css_paths": [Path(__file__).parent / "style.css"], "footer_links": []}
    page.queue(api_open=False)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, max_file_size=LARGEST,
            **nobody_else, **looks,
        )  # fmt: skip
    except OSError as error:
        taken = f"--port {port}" if port else "ports from 7860"
        raise OSError(f"{taken} on {host}: taken, or not for us to open; give another --port or --host") from error
    return url
