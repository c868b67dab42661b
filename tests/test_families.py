"""The text of vicuna_v1, written out by hand, its tokens, and what a family refuses to read as text."""

from types import SimpleNamespace

import pytest

from llava.checkpoints import open_checkpoint
from llava.families import refuse_unknown
from llava.families.llava15 import SYSTEM, Llava15, vicuna_v1
from llava.records import check_answer

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
def tokenizer(family):
    return family.tokenizer


def bound_to(family, tokenize):
    """The family with another way of tokenising, whose end token has id 2."""

    class Other:
        eos_token, eos_token_id, added_tokens_decoder = "</s>", 2, {}

        def convert_tokens_to_ids(self, token):
            return {"<image>": family.image_id, "</s>": 2}[token]

        def __call__(self, text):
            return {"input_ids": tokenize(text)}

    return Llava15(family.config, Other(), family.image_processor)


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
def test_text_of_one_and_two_turns(family, turns, text):
    assert family.render(turns) == vicuna_v1(turns) == text


def test_a_turn_after_an_open_one_is_refused(family):
    with pytest.raises(ValueError, match="turn 1 has no answer"):
        family.render([(FIRST, None), ("Are you sure?", "Yes.")])


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_prompt_with_earlier_turns_is_the_rendered_conversation(family, system):
    turns, own = [("user", FIRST), ("assistant", "It is red.")], [("system", system)] if system else []
    text = TWO_OPEN if system is None else TWO_OPEN.replace(SYSTEM, system)
    prompt = family.encode_prompt("Are you sure?", [*own, *turns])
    assert prompt == family.tokenizer(text)["input_ids"]
    whole = family.tokenizer(text + " Yes.</s>")["input_ids"]
    assert prompt + family.encode_answer("Are you sure?", "Yes.", [*own, *turns]) == whole
    with pytest.raises(ValueError, match="must not contain '</s>'"):
        family.encode_prompt("Are you sure?", [("user", FIRST), ("assistant", "red</s>")])


@pytest.mark.parametrize("answer", ["red</s>", "</s>", "see <image>", "<image>\n", "<s>red", "a <unk> thing"])
def test_answers_with_special_tokens_are_refused(family, answer):
    with pytest.raises(ValueError, match=r"an answer must not contain '(</s>|<image>|<s>|<unk>)'"):
        family.encode_answer(FIRST, answer)


@pytest.mark.parametrize("answer", ["see <image>", "<image>\n"])
def test_an_answer_that_stands_for_a_picture_is_no_record(answer):
    """Whatever the family is."""
    with pytest.raises(ValueError, match="an answer must not contain '<image>'"):
        check_answer(answer)


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>"])
def test_prompts_with_special_tokens_are_refused(family, token):
    """Else a record's text could end the model's turn, or begin another conversation."""
    for use in (family.encode_prompt, lambda text: family.encode_answer(text, "red")):
        with pytest.raises(ValueError, match=f"a prompt must not contain '{token}'"):
            use(f"{FIRST} {token}")


def test_a_special_token_put_together_from_two_halves_is_refused(family):
    """Taking `<image>` out must not hide what stands around it, nor make a token of it that is not there."""
    assert family.encode_prompt("<<image>/s>").count(family.image_id) == 1


def test_a_harmless_answer_passes_unchanged(family, tokenizer):
    answer = "It is < red > & 3/4."
    assert check_answer(answer) == answer
    assert tokenizer.decode(family.encode_answer(FIRST, answer)[:-1]).strip() == answer


# ---- tokens


def test_prompt_begins_with_one_bos_and_ends_open(family, tokenizer):
    ids = family.encode_prompt(PROMPT)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("ASSISTANT:")


def test_image_ids_stand_where_the_placeholders_do(family, tokenizer):
    """Between the pieces of the text around them, each decoded on its own."""
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = family.encode_prompt(PROMPT)
    first, second = (n for n, token in enumerate(ids) if token == image)
    assert tokenizer.decode(ids[:first]).endswith("questions. USER: Image1:")
    assert tokenizer.decode(ids[first + 1 : second]).strip() == "Image2:"
    assert tokenizer.decode(ids[second + 1 :]).strip() == "In Image2, what shape is it? ASSISTANT:"


@pytest.mark.parametrize("answer", ["red", "It is a green square.", "42", "Ünïcode 漢字 🙂", "two\nlines"])
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(family, tokenizer, answer):
    prompt, ids = family.encode_prompt(PROMPT), family.encode_answer(PROMPT, answer)
    system = ONE_OPEN[: ONE_OPEN.index("USER:")]
    whole = f"{system}USER: {PROMPT} ASSISTANT: {answer}</s>"
    assert prompt + ids == tokenizer(whole)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]).strip() == answer


def test_an_answer_that_changes_the_prompts_tokens_is_refused(family):
    """As SentencePiece does where a blank at the answer's start joins the template's own."""

    def merge(text):
        text, end = text.removesuffix("</s>"), [2] * text.endswith("</s>")
        return [1, *map(ord, text.replace(":  ", "\u2581")), *end]

    merging = bound_to(family, merge)
    assert merging.encode_answer("Why?", "red") == [ord(c) for c in " red"] + [2]
    with pytest.raises(ValueError, match="leading blanks"):
        merging.encode_answer("Why?", " red")


def test_a_tokenizer_without_the_end_token_is_refused(family, tokenizer):
    deaf = bound_to(family, lambda text: tokenizer(text.removesuffix("</s>"))["input_ids"])
    with pytest.raises(ValueError, match="</s>"):
        deaf.encode_answer(PROMPT, "red")


# ---- what is bound together


def test_tokens_of_another_model_are_refused(family):
    config = SimpleNamespace(image_token_id=5, vision_config=family.config.vision_config)
    with pytest.raises(ValueError, match=rf"<image> as id {family.image_id}, the model has id 5"):
        Llava15(config, family.tokenizer, family.image_processor)


def test_a_model_of_no_known_family_names_those_that_are(checkpoint):
    with pytest.raises(ValueError, match=r"'gpt2'.*LLaVA-1\.5 \(llava\)"):
        refuse_unknown({"model_type": "gpt2"})
    assert type(open_checkpoint(checkpoint).family) is Llava15


def test_expanding_needs_a_picture_for_every_placeholder(family):
    ids, image = family.encode_prompt(PROMPT), family.image((30, 40))
    assert family.expand(ids, [image] * 2).count(family.image_id) == 2 * family.num_image_tokens() == 72
    for number in (1, 3):
        with pytest.raises(ValueError, match=f"2 image tokens for {number} images"):
            family.expand(ids, [image] * number)
