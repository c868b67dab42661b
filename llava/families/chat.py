"""What families with a chat template of their own share: prompts as the checkpoint's template makes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.families.family import Family
from llava.records import IMAGE
from llava.run_folder import read_object

SENTINEL = "an answer"
# Files of a checkpoint that transformers' processors read beside tokenizer and pictures' settings.
PROCESSOR, PICTURES, VIDEO = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
FILES = (PROCESSOR, PICTURES, VIDEO)
# Before a template, so that the pictures of a message stand where its parts have them, as in training: many templates
# put all pictures first, add line breaks, or drop a text that is no list of parts.
IN_PLACE = (
    "{%% set kept = namespace(turns=[]) %%}{%% for message in messages %%}{%% set said = namespace(text='') %%}"
    "{%% if message['content'] is string %%}{%% set said.text = message['content'] %%}{%% else %%}"
    "{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}{%% set said.text = said.text + '%s' %%}"
    "{%% elif part['type'] == 'text' %%}{%% set said.text = said.text + part['text'] %%}{%% endif %%}{%% endfor %%}"
    "{%% endif %%}{%% set kept.turns = kept.turns + [{'role': message['role'], "
    "'content': [{'type': 'text', 'text': said.text}]}] %%}{%% endfor %%}{%% set messages = kept.turns %%}"
)


class ChatFamily(Family):
    """See `Family`. `placeholder` is the text that the family's template has for a picture."""

    placeholder: str
    prelude = IN_PLACE  # what goes before the checkpoint's template; %s is the placeholder

    def __init__(self, config, tokenizer, image_processor, pad: bool | None = None):
        super().__init__(config, tokenizer, image_processor, pad)
        if pad is False:
            raise ValueError(f"--image_aspect_ratio crop: {self.name} sees pictures whole; leave it at pad, or auto")
        if not tokenizer.chat_template:
            raise ValueError("no chat template: chat_template.jinja, or in tokenizer_config.json or chat_template.json")
        behind = self.render([("a prompt", SENTINEL)]).rpartition(SENTINEL)[2]
        found = [(behind.index(token), token) for token in self._specials if token in behind]
        if not found:
            raise ValueError(f"the chat template ends an answer with {behind!r}, which is no token of its own")
        self.end = min(found)[1]

    def render(self, turns: Sequence[tuple[str, str | None]], system: str | None = None) -> str:
        """By the checkpoint's chat template; each `<image>` stands where it stood.

        The last answer stands where the template lets the model begin one, also if the template has it elsewhere.
        """
        *earlier, (prompt, answer) = turns
        opened = self._rendered([*earlier, (prompt, None)], system)
        if answer is None:
            return opened
        whole = self._rendered(turns, system)
        if whole.startswith(opened):
            return whole
        # LLaVA-OneVision's template on the hub has " \n" before a given answer, "\n" before one that is to come.
        return opened + answer + self._rendered([(prompt, SENTINEL)], system).rpartition(SENTINEL)[2]

    def _rendered(self, turns: Sequence[tuple[str, str | None]], system: str | None) -> str:
        said = [("system", system)] if system is not None else []
        for prompt, answer in turns:
            said += [("user", prompt)] + ([("assistant", answer)] if answer is not None else [])
        return self.tokenizer.apply_chat_template(
            [{"role": role, "content": self._content(text)} for role, text in said], tokenize=False,
            add_generation_prompt=said[-1][0] == "user",
        )  # fmt: skip

    def processor(self) -> Any:
        """The tokenizer; what stands beside it is written by `save`."""
        return self.tokenizer

    @property
    def chat_template(self) -> str:
        """The checkpoint's, behind `prelude`."""
        template, prelude = self.tokenizer.chat_template, self.prelude % self.placeholder
        return template if template.startswith(prelude) else prelude + template

    def save(self, folder: Path) -> None:
        """Write tokenizer, pictures' settings and chat template, as transformers and servers read them together."""
        own, template = self.image_processor.to_dict(), self.tokenizer.chat_template
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(folder)
        self.tokenizer.chat_template = template
        self.image_processor.save_pretrained(folder)
        files = {name: self.source / name for name in FILES} if self.source else {}
        found = {name: read_object(file) for name, file in files.items() if file.is_file()}
        for name in (PROCESSOR, VIDEO):
            if name in found:
                settings = found[name] | ({"image_processor": own} if "image_processor" in found[name] else {})
                write_object(Path(folder) / name, settings)
        # An image processor forgets the name of the processor that it is a part of, which other readers go by.
        named = [settings["processor_class"] for settings in found.values() if settings.get("processor_class")]
        if named:
            write_object(Path(folder) / PICTURES, read_object(Path(folder) / PICTURES) | {"processor_class": named[0]})

    def _content(self, text: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text.replace(IMAGE, self.placeholder)}]

    def _encode(self, text: str) -> list[int]:
        bos = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]


def write_object(file: Path, settings: dict[str, Any]) -> None:
    """Write settings as transformers writes them."""
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
