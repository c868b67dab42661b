"""The text of vicuna_v1, written out by hand, and its tokens."""

import pytest
from llava.conversation import check_answer, encode_answer, encode_prompt, render

ONE_OPEN = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nIn Image1, what colour is it? ASSISTANT:"
)
ONE = ONE_OPEN + " It is red.</s>"
TWO_OPEN = ONE + "USER: Are you sure? ASSISTANT:"
TWO = TWO_OPEN + " Yes.</s>"
FIRST = "<image>\nIn Image1, what colour is it?"
PROMPT = "Image1:<image>\nImage2:<image>\nIn Image2, what shape is it?"


@pytest.fixture(scope="module")
def tokenizer(processor):
    return processor.tokenizer


# ---- text


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([(FIRST, None)], ONE_OPEN),
        ([(FIRST, "It is red.")], ONE),
        ([(FIRST, "It is red."), ("Are you sure?", None)], TWO_OPEN),
        ([(FIRST, "It is red."), ("Are you sure?", "Yes.")], TWO),
    ],
)
def test_text_of_one_and_two_turns(turns, text):
    assert render(turns) == text


def test_a_turn_after_an_open_one_is_refused():
    with pytest.raises(ValueError, match="turn 1 has no answer"):
        render([(FIRST, None), ("Are you sure?", "Yes.")])


@pytest.mark.parametrize("answer", ["red</s>", "</s>", "see <image>", "<image>\n"])
def test_answers_with_tokens_of_the_template_are_refused(answer):
    for use in (check_answer, lambda text: render([(FIRST, text)])):
        with pytest.raises(ValueError, match=r"</s>|<image>"):
            use(answer)


def test_a_harmless_answer_passes_unchanged():
    assert check_answer("It is < red > & 3/4.") == "It is < red > & 3/4."


# ---- tokens


def test_prompt_begins_with_one_bos_and_ends_open(tokenizer):
    ids = encode_prompt(tokenizer, PROMPT)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("ASSISTANT:")


def test_image_ids_stand_where_the_placeholders_do(tokenizer):
    """Between the pieces of the text around them, each decoded on its own."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = encode_prompt(tokenizer, PROMPT)
    first, second = (n for n, token in enumerate(ids) if token == image)
    assert tokenizer.decode(ids[:first]).endswith("questions. USER: Image1:")
    assert tokenizer.decode(ids[first + 1 : second]).strip() == "Image2:"
    assert tokenizer.decode(ids[second + 1 :]).strip() == "In Image2, what shape is it? ASSISTANT:"


@pytest.mark.parametrize("answer", ["red", "It is a green square.", "42", "Ünïcode 漢字 🙂", "two\nlines"])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(tokenizer, answer):
    prompt, ids = encode_prompt(tokenizer, PROMPT), encode_answer(tokenizer, PROMPT, answer)
    system = ONE_OPEN[: ONE_OPEN.index("USER:")]
    whole = f"{system}USER: {PROMPT} ASSISTANT: {answer}</s>"
    assert prompt + ids == tokenizer(whole)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]).strip() == answer


def test_an_answer_that_changes_the_prompts_tokens_is_refused():
    """As SentencePiece does where a blank at the answer's start joins the template's own."""

    class Merging:
        eos_token_id = 2

        def __call__(self, text):
            text, end = text.removesuffix("</s>"), [2] * text.endswith("</s>")
            return {"input_ids": [1, *map(ord, text.replace(":  ", "\u2581")), *end]}

    assert encode_answer(Merging(), "Why?", "red") == [ord(c) for c in " red"] + [2]
    with pytest.raises(ValueError, match="leading blanks"):
        encode_answer(Merging(), "Why?", " red")


def test_a_tokenizer_without_the_end_token_is_refused(tokenizer):
    class Deaf:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text):
            return tokenizer(text.removesuffix("</s>"))

    with pytest.raises(ValueError, match="</s>"):
        encode_answer(Deaf(), PROMPT, "red")
