"""Preference pairs as other projects write them: a row, told by its columns, becomes a conversation and its answers.

Sources: "Dataset formats" of TRL, data/README.md of LLaMA-Factory, "Custom dataset" of ms-swift, the card of RLAIF-V.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_gen.drops import Unusable
from llava.records import IMAGE, PLACEHOLDER_OF_MIA_DPO

Row = dict[str, Any]
Messages = list[dict[str, Any]]  # `role` (system, user, assistant) and `content`: text, or a list of parts
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
TOOLS = {"tool", "tool_call", "tool_response", "function", "function_call", "observation"}  # roles, too
REJECTED = ("rejected", "rejected_response", "rejected_messages")
# Columns that say what a pair of ours cannot: a row that has one is left out.
NOT_KEPT = {
    "tools": ("tools", "rejected_tools"),
    "video or audio": ("videos", "video", "audios", "audio", "rejected_videos", "rejected_audios"),
    "grounding": ("objects",),
    "no pair": ("kto_tag",),
}


@dataclass(frozen=True)
class Conversation:
    """What a row says: messages up to the question, and the contents of the answers to it."""

    format: str
    messages: Messages
    chosen: Any
    rejected: list[Any]


def take(row: Row) -> Conversation:
    """What the row says; the columns that say it are taken out of it, and what is left is the record's own.

    Raises Unusable for what no pair can hold, ValueError for what is of no known format.
    """
    for reason, columns in NOT_KEPT.items():
        for name in columns:
            if row.pop(name, None) not in (None, "", "[]", [], {}):
                raise Unusable(reason, f"the row has `{name}`", is_bad=False)
    there = {name for name, value in row.items() if value is not None}
    if not there.intersection(REJECTED):
        if "label" in there:  # of ms-swift and of TRL
            raise Unusable("no pair", "an answer with a `label` is half a pair", is_bad=False)
        raise ValueError(f"no `rejected`; the columns are {', '.join(row)}")
    for name, columns, reader in FORMATS:
        if columns <= there:
            messages, chosen, rejected = reader(row)
            return Conversation(name, _with_system(row.pop("system", None), messages), chosen, rejected)
    raise ValueError(f"of no known format; the columns are {', '.join(row)}")


def text_of(content: Any, pictures: list[Any]) -> str:
    """A message's text with `<image>` for its image parts; pictures that are inside the parts are appended.

    Raises Unusable for parts of another kind, ValueError.
    """
    if isinstance(content, str):
        return content.replace(PLACEHOLDER_OF_MIA_DPO, IMAGE)
    if not isinstance(content, list):
        raise ValueError(f"a message must be a text or a list of parts, not {type(content).__name__}")
    return "".join(_part(part, pictures) for part in content)


def listed(pictures: Any) -> list[Any]:
    """One picture or several, as a list; what is empty is none."""
    found = pictures if isinstance(pictures, list) else [pictures]
    return [picture for picture in found if picture is not None and picture != ""]


def _part(part: Any, pictures: list[Any]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return part.get("text") or ""
    if kind not in ("image", "image_url"):
        raise Unusable("video or audio", f"a message has a part of type {kind!r}", is_bad=False)
    own = next((part[name] for name in ("image", "image_url", "url", "path") if part.get(name)), None)
    if own is not None:
        pictures.append(own.get("url", own) if isinstance(own, dict) else own)
    return IMAGE


def _trl(row: Row) -> tuple[Messages, Any, list[Any]]:
    """The prompt, a text or messages, stands before the answers or in front of each of them."""
    prompt, context = row.pop("prompt", None), row.pop("context", None)
    (head, chosen), (other, rejected) = _answers(row.pop("chosen")), _answers(row.pop("rejected"))
    given = _messages(prompt) if isinstance(prompt, list) else _user(prompt)
    if head != other or (head and isinstance(prompt, list) and given != head):
        raise ValueError("`chosen` and `rejected` must answer one prompt: what stands in front of them differs")
    return [*_messages(context or []), *(head or given)], _one(chosen), rejected


def _rlaif_v(row: Row) -> tuple[Messages, Any, list[Any]]:
    row["prompt"] = row.pop("question")
    return _trl(row)


def _sharegpt(row: Row) -> tuple[Messages, Any, list[Any]]:
    name = "conversations" if row.get("conversations") is not None else "messages"
    return _messages(row.pop(name)), _one(_bare(row.pop("chosen"))), _bare(row.pop("rejected"))


def _alpaca(row: Row) -> tuple[Messages, Any, list[Any]]:
    chosen = next(name for name in ("chosen", "output") if row.get(name) is not None)
    rejected = next(name for name in REJECTED if row.get(name) is not None)
    question = "\n".join(filter(None, (row.pop("instruction"), row.pop("input", None))))
    messages = [*_history(row.pop("history", None)), *_user(question)]
    return messages, _one(_bare(row.pop(chosen))), _bare(row.pop(rejected))


def _swift(row: Row) -> tuple[Messages, Any, list[Any]]:
    """The messages end with the chosen answer; the rejected one stands alone, or at the end of messages of its own."""
    head, chosen = _answers(row.pop("messages"))
    own = row.pop("rejected_messages", None)
    other, rejected = _answers(own if own is not None else row.pop("rejected_response", None))
    pictures = listed(row.pop("rejected_images", None))
    if pictures and pictures != (listed(row.get("images")) or listed(row.get("image"))):
        raise Unusable("other pictures", "the rejected answer is about pictures of its own", is_bad=False)
    if other and other != head:
        raise ValueError("`messages` and `rejected_messages` must differ in the last answer only")
    return head, _one(chosen), rejected


def _swift_turns(row: Row) -> tuple[Messages, Any, list[Any]]:
    row["messages"] = _history([turn["human"], turn["assistant"]] for turn in row.pop("conversation"))
    return _swift(row)


def _swift_query(row: Row) -> tuple[Messages, Any, list[Any]]:
    messages = [*_history(row.pop("history", None)), *_user(row.pop("query"))]
    return messages, _one(_bare(row.pop("response"))), _bare(row.pop("rejected_response"))


# In this order: rows of one format often keep columns of the one that they were made of.
FORMATS: list[tuple[str, set[str], Callable[[Row], tuple[Messages, Any, list[Any]]]]] = [
    ("TRL", {"prompt", "chosen", "rejected"}, _trl),
    ("LLaMA-Factory sharegpt", {"conversations", "chosen", "rejected"}, _sharegpt),
    ("LLaMA-Factory alpaca", {"instruction", "chosen", "rejected"}, _alpaca),
    ("RLAIF-V", {"question", "chosen", "rejected"}, _rlaif_v),
    ("LLaMA-Factory sharegpt", {"messages", "chosen", "rejected"}, _sharegpt),
    ("ms-swift", {"messages", "rejected_response"}, _swift),
    ("ms-swift", {"messages", "rejected_messages"}, _swift),
    ("ms-swift", {"query", "response", "rejected_response"}, _swift_query),
    ("ms-swift", {"conversation", "rejected_response"}, _swift_turns),
    ("ms-swift", {"instruction", "output", "rejected_response"}, _alpaca),
    ("TRL", {"chosen", "rejected"}, _trl),
]


def _user(text: Any) -> Messages:
    return [] if text is None else [{"role": "user", "content": text}]


def _history(pairs: Any) -> Messages:
    turns = [(role, text) for pair in pairs or [] for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text} for role, text in turns]


def _with_system(system: Any, messages: Messages) -> Messages:
    has_one = messages[:1] and messages[0]["role"] == "system"
    return messages if has_one or not system else [{"role": "system", "content": system}, *messages]


def _messages(said: Any) -> Messages:
    """Messages of `role` and `content`, or of `from` and `value`. Raises Unusable for tools, ValueError."""
    if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
        raise ValueError("a list of messages is needed, each with `role` and `content` or `from` and `value`")
    found = []
    for message in said:
        role = message.get("role") or message.get("from")
        if role in TOOLS or message.get("tool_calls"):
            raise Unusable("tools", f"a message is of {role}, and calls or answers a tool", is_bad=False)
        if role not in ROLES:
            raise ValueError(f"a message is of {role!r}, which is none of {', '.join(ROLES)}")
        content = message.get("content")
        found.append({"role": ROLES[role], "content": message.get("value") if content is None else content})
    return found


def _answers(said: Any) -> tuple[Messages, list[Any]]:
    """What stands in front of an answer, and its content; or the contents of several answers."""
    if isinstance(said, str):
        return [], [said]
    if isinstance(said, list) and said and all(isinstance(text, str) for text in said):
        return [], said
    messages = _messages([said] if isinstance(said, dict) else said)
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("an answer must be a text, or end with a message of the assistant")
    if all(message["role"] == "assistant" for message in messages):
        return [], [message["content"] for message in messages]
    return messages[:-1], [messages[-1]["content"]]


def _bare(said: Any) -> list[Any]:
    head, answers = _answers(said)
    if head:
        raise ValueError("an answer must be one message, not several turns")
    return answers


def _one(answers: list[Any]) -> Any:
    if len(answers) != 1:
        raise ValueError(f"one chosen answer is needed, not {len(answers)}")
    return answers[0]
