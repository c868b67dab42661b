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
from llava.messages import one_line
from llava.scaling import RULES
from llava.vlm import VLM
from scripts.viewer.answers import ANY, COLUMNS, FILTERS, TestSet
from scripts.viewer.cards import about, card, notice

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # gradio's own come from a CDN
THEME = gr.themes.Default(primary_hue="teal", neutral_hue="slate", **FONTS)
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}  # a second visitor waits in a queue
FACTORS = (0.25, 4.0)
WIDTHS = [240, 180, 180, 100, 90, 80, 110, 80, 90, 220]  # px of `COLUMNS`
HINT = "Drop pictures and ask: the model's answer comes first, then the steered one. Moving a control steers again."
PLAIN, STEERED = False, True


@dataclass(frozen=True)
class Desk:
    """Answers what the page asks: of every model a plain and a steered card, in this order."""

    models: Mapping[str, VLM]
    settings: Mapping[str, Any]  # of `VLM.ask`: `attention_layers`, `max_new_tokens`

    @property
    def slots(self) -> list[tuple[str, bool]]:
        """(model, whether it is steered) of each card."""
        return [(name, is_steered) for name in self.models for is_steered in (PLAIN, STEERED)]

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
        slots = [slot for slot in self.slots if slot[1] is STEERED] if gallery and prompt.strip() else []
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
        (name, is_steered), title = slot, f"{slot[0]} · plain"
        steer = None
        if is_steered:
            title = f"{name} · {scope}, {'×' if rule == 'multiply' else rule} {factor:g}"
            steer = AdaptViz(scope=scope, rule=rule, bands=Bands.fixed(factor))
        try:
            reply = self.models[name].ask(
                pictures, prompt, steer=steer, **self.settings, **fields
            )
        except (ValueError, OSError) as error:
            if is_steered:  # the plain answer stays
                return notice(title, one_line(str(error)))
            raise _error(str(error)) from error
        unsteered = is_steered and factor != 1 and reply.scale == 1
        note = "Not steered: the prompt names no one of several images. Scope “all” scales every image." if unsteered else ""
        layers = layer_range(self.models[name].checkpoint.num_layers, self.settings["attention_layers"])
        return card(title, reply, sorted(layers), note)


def build(models: Mapping[str, VLM], tests: TestSet | None, settings: Mapping[str, Any]) -> gr.Blocks:
    """The page, which is not served yet."""
    desk = Desk(models, settings)
    with gr.Blocks(title="Where does it look?", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        with gr.Tabs() as tabs:
            with gr.Tab("Ask", id="ask"):
                asking = _ask_tab(desk)
            if tests:
                with gr.Tab("Answers", id="answers"):
                    _answers_tab(desk, tests, tabs, *asking)
    return page


def _ask_tab(desk: Desk) -> tuple[list, list, Any]:
    """The first tab: (what is asked with, the cards, what is known about the question)."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=2, min_width=320):
            gallery = gr.Gallery(
                label="Pictures: Image1, Image2, …", type="filepath", format="png",
                sources=["upload", "clipboard"], file_types=["image"], columns=3, height="auto", object_fit="contain",
                interactive=True, buttons=[], elem_id="pictures",
            )  # fmt: skip
            prompt = gr.Textbox(
                label="Question", placeholder="In Image2, what colour is the car?", lines=1, max_lines=8, elem_id="prompt"
            )
            button = gr.Button("Ask", variant="primary", elem_id="ask-button")
            factor = gr.Slider(
                *FACTORS, value=1.5, step=0.05, label="Steering: factor on the attention scores",
                elem_id="factor", buttons=[],
            )  # fmt: skip
            scope = gr.Radio(list(SCOPES), value="target", label="Scope: whose scores", elem_id="scope")
            rule = gr.Radio(list(RULES), value="multiply", label="Rule: how", elem_id="rule")
        with gr.Column(scale=5, min_width=320):
            known = gr.HTML(about(HINT), elem_id="known")
            with gr.Row(elem_classes="cards"):
                cards = [gr.HTML(elem_id=f"card-{n}", min_width=300) for n in range(len(desk.slots))]
    opened = gr.State(None)
    inputs = [gallery, prompt, opened, factor, scope, rule]
    gr.on([button.click, prompt.submit], desk.ask, inputs, cards, **ONE_AT_A_TIME)
    gr.on([factor.release, scope.input, rule.input], desk.steer, inputs, cards, trigger_mode="always_last", **ONE_AT_A_TIME)
    prompt.input(lambda: (None, about(HINT)), None, [opened, known], queue=False)
    gr.on(
        [gallery.upload, gallery.delete], lambda pictures: (numbered(pictures), None, about(HINT)), gallery,
        [gallery, opened, known], queue=False,
    )  # fmt: skip
    return inputs, cards, known


def _answers_tab(desk: Desk, tests: TestSet, tabs, inputs: list, cards: list, known) -> None:
    """The second tab: filters, a table, and a click that opens a question in the first."""
    files = list(tests.files)
    with gr.Row():
        file = gr.Dropdown(files, value=files[0], label="answers file", elem_id="file", visible=len(files) > 1)
        filters = [gr.Dropdown(tests.choices(name), value=ANY, label=name, min_width=150) for name in FILTERS]
    first = tests.table(files[0], *[ANY] * len(FILTERS))
    count = gr.HTML(_count(first, first), elem_id="count")
    table = gr.Dataframe(
        first, headers=list(COLUMNS), type="array", interactive=False, buttons=[], elem_id="answers", wrap=True,
        column_widths=WIDTHS,
    )  # fmt: skip

    def filtered(file: str, *wanted: str):
        rows = tests.table(file, *wanted)
        return rows, _count(rows, tests.files[file])

    def show(event: gr.SelectData, file: str):
        try:
            pictures, prompt, fields, said = tests.open(file, event.row_value[COLUMNS.index("id")])
        except (ValueError, OSError) as error:
            raise _error(str(error)) from error
        opened = {"prompt": prompt, "count": len(pictures), "fields": fields}
        return numbered([(picture, None) for picture in pictures]), prompt, opened, about(*said), gr.Tabs(selected="ask")

    gr.on([one.input for one in (file, *filters)], filtered, [file, *filters], [table, count])
    clicked = table.select(show, file, [*inputs[:3], known, tabs])
    clicked.success(desk.ask, inputs, cards, **ONE_AT_A_TIME)


def numbered(pictures: Sequence[tuple[Any, Any]] | None) -> list[tuple[Any, str | None]]:
    """The pictures of a gallery under the names that a prompt has for them, if they are several."""
    return [(picture, f"Image{n}" if len(pictures) > 1 else None) for n, (picture, _) in enumerate(pictures or [], 1)]


def _count(rows: Sequence, every: Sequence) -> str:
    return about(f"{len(rows)} of {len(every)} questions", "A click on one opens it and asks it again.")


def _error(message: str) -> gr.Error:
    """A line on the page; gradio would take it for HTML."""
    return gr.Error(escape(one_line(message)), duration=None, title="Cannot ask this", print_exception=False)


def serve(page: gr.Blocks, host: str, port: int | None) -> str:
    """Start to serve a page, and give its address. Raises OSError where the port is taken."""
    _, url, _ = page.queue(api_open=False).launch(
        server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True, inbrowser=False,
        footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False, theme=THEME,
        css_paths=[Path(__file__).parent / "style.css"],
    )  # fmt: skip
    return url
