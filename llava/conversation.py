"""The `vicuna_v1` conversation template of LLaVA-1.5 and its tokenisation."""

from collections.abc import Sequence

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"
END = "</s>"


def render(turns: Sequence[tuple[str, str | None]]) -> str:
    """Text of a conversation; an answer of None ends it at `ASSISTANT:`, ready to be continued.

    Source: the template LLaVA-1.5 was trained with (`--version v1`): a space between turns, `</s>` and no
    space after an answer.
    Raises ValueError if an answer holds the stop string or an image placeholder, or if a turn follows an
    unanswered one.
    """
    text = SYSTEM + " "
    for number, (prompt, answer) in enumerate(turns):
        text += f"USER: {prompt} ASSISTANT:"
        if answer is None:
            if number != len(turns) - 1:
                raise ValueError(f"turn {number + 1} has no answer but another turn follows it")
            return text
        text += f" {check_answer(answer)}{END}"
    return text


def check_answer(answer: str) -> str:
    """The answer itself. Raises ValueError if it holds `</s>` or `<image>`, which the model reads as tokens."""
    for token in (END, IMAGE):
        if token in answer:
            raise ValueError(f"an answer must not contain {token!r}")
    return answer


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of a one-turn prompt up to and including `ASSISTANT:`, one id per `<image>`."""
    return tokenizer(render([(prompt, None)]))["input_ids"]


def encode_answer(tokenizer, prompt: str, answer: str) -> list[int]:
    """Token ids of the answer as it stands after `ASSISTANT:`, with the end token `</s>`.

    Tokenised in context, as in LLaVA's training, because a tokenizer may merge across a boundary that is
    tokenised in two pieces. Raises ValueError if the answer changes the tokens of the prompt before it.
    """
    context = encode_prompt(tokenizer, prompt)
    whole = tokenizer(render([(prompt, answer)]))["input_ids"]
    if whole[: len(context)] != context:
        raise ValueError("the answer's first characters change the tokens of the prompt: trim its leading blanks")
    if whole[-1] != tokenizer.eos_token_id:
        raise ValueError(f"the tokenizer does not read {END} as its end token (id {tokenizer.eos_token_id})")
    return whole[len(context) :]
