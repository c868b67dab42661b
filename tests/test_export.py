"""Exported checkpoints: read by plain transformers, equal to their source, in both layouts; and what an export says."""

import json
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import scripts.export
from llava.checkpoints import open_checkpoint
from llava.endpoint import messages_of
from llava.families.llava15 import SYSTEM, vicuna_v1
from llava.merging import in_float32, merge
from scripts.export import describe_memory, drawn, first_logits, verdict
from tests.conftest import BASE
from tests.dialects import make_formats


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return make_formats(tmp_path_factory.mktemp("formats"))


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def export(monkeypatch, capsys):
    """Runs `scripts.export` as its command line would."""

    def run(source, output, *words):
        monkeypatch.setattr(
            sys, "argv", ["export", "--model_name_or_path", str(source), "--output", str(output), *words]
        )
        code = 0
        try:
            scripts.export.main()
        except SystemExit as ended:
            code = ended.code
        return Done(code, *capsys.readouterr())

    return run


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def copied(folder, target):
    """A copy of a folder, and a function that edits a JSON file of it."""
    shutil.copytree(folder, target)

    def edit(name, **changes):
        found = json.loads((target / name).read_text()) | changes
        (target / name).write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))

    return target, edit


# ---- weights


@pytest.mark.parametrize(
    ("source", "layout"), [("adapter", "hf"), ("original_lora", "hf"), ("original_lora", "original")]
)
def test_round_trip_in_fp32(export, formats, tmp_path, source, layout):
    done = export(getattr(formats, source), tmp_path / "out", "--format", layout, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    opened = open_checkpoint(str(formats.adapter))
    expected, family = opened.load().eval(), opened.family
    asked = drawn(family)
    if layout == "hf":
        found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    else:
        written = open_checkpoint(str(tmp_path / "out"))
        found, tokenizer = written.load().eval(), written.family.tokenizer
    torch.testing.assert_close(
        first_logits(found, family, asked), first_logits(expected, family, asked), atol=1e-5, rtol=0
    )
    text = "In Image2, what  colour<image>?"
    assert tokenizer(text)["input_ids"] == family.tokenizer(text)["input_ids"]


def test_tensors_have_the_names_of_the_published_llava_hf_checkpoint(export, formats, tmp_path):
    export(formats.adapter, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight",
        "vision_tower.vision_model.post_layernorm.weight",
    } <= names
    prefixes = (
        "language_model.model.",
        "language_model.lm_head.",
        "multi_modal_projector.",
        "vision_tower.vision_model.",
    )
    assert all(name.startswith(prefixes) for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_merge_rounds_once_whatever_the_weights_are_stored_in(formats, stored, dtype):
    adapter = load_file(formats.adapter / "adapter_model.safetensors")
    layer = "model.language_model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
    base = open_checkpoint(str(formats.llava_hf)).load().get_parameter(f"{layer}.weight")
    merged, rounding = merge(open_checkpoint(str(formats.adapter)).load(stored, exact_adapter=True), dtype)
    wanted = (base.to(stored).float() + 2 * (b @ a)).to(dtype)  # lora_alpha / r = 2
    torch.testing.assert_close(merged.get_parameter(f"{layer}.weight"), wanted, atol=0, rtol=2e-7)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert rounding.changed > 0 and (rounding.lost == 0 or dtype != torch.float32)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())


def test_rounding_is_counted_by_hand(formats):
    model = open_checkpoint(str(formats.adapter)).load(exact_adapter=True)
    weight = model.get_submodule("base_model.model.model.language_model.layers.0.self_attn.q_proj")
    before = weight.base_layer.weight.detach().clone()
    after = before + weight.get_delta_weight("default").detach()
    for module in model.modules():
        if hasattr(module, "lora_B") and module is not weight:
            module.lora_B["default"].weight.data.zero_()  # nothing but this layer is changed
    _, rounding = merge(model, torch.bfloat16)
    lost = (after != before) & (after.bfloat16() == before.bfloat16())
    assert (rounding.changed, rounding.lost) == (int((after != before).sum()), int(lost.sum()))
    assert rounding.lost > 0


def test_computing_in_float32_on_stored_weights_is_computing_on_wide_ones(formats):
    opened = open_checkpoint(str(formats.adapter))
    wide, narrow = opened.load().eval(), opened.load(torch.bfloat16, exact_adapter=True).eval()
    for name, parameter in wide.named_parameters():  # the base's as stored, the adapter's as they are
        if ".lora_" not in name and "modules_to_save" not in name:
            parameter.data = parameter.data.bfloat16().float()
    asked = drawn(opened.family)
    torch.testing.assert_close(
        first_logits(narrow, opened.family, asked), first_logits(wide, opened.family, asked), atol=1e-5, rtol=0
    )
    kept = {name: p for name, p in narrow.named_parameters() if "base_layer" in name}
    assert {p.dtype for p in kept.values()} == {torch.bfloat16}
    with in_float32(narrow):
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16, torch.float32}


def test_the_need_of_memory_is_said_before_anything_is_loaded(export, formats, tmp_path):
    done = export(formats.adapter, tmp_path / "out", "--dtype", "bfloat16")
    words = done.stdout
    assert words.index("memory: ") < words.index("loaded ")
    numbers = sum(tensor.numel() for tensor in load_file(formats.llava_hf / "model.safetensors").values())
    assert f"({numbers:,} numbers in float32, " in words
    said = describe_memory(open_checkpoint(BASE), torch.float16)
    assert said.startswith("memory: 0.0061 GB are needed (1,524,160 numbers in float16, 0.003 GB for a file")
    for path in (formats.original, formats.original_bin):  # with the tower, whose tensors lie elsewhere
        assert open_checkpoint(str(path)).stored.total() > 0.9 * numbers


# ---- what it says of an answer's first token


def test_bf16_prints_its_difference_and_a_verdict(export, formats, tmp_path):
    done = export(formats.adapter, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "largest difference" in line)
    assert 0 < float(line.split("source: ")[1].split()[0]) < 0.5
    assert "first tokens that change: " in done.stdout and "compared on drawn pictures" in done.stdout


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([[2.0, 1.0], [0.0, 3.0]], "0 of 2 (0.0 %), probabilities by 0.0e+00: it answers as its source"),
        ([[1.0, 2.0], [0.0, 3.0]], "1 of 2 (50.0 %), probabilities by 4.6e-01: bfloat16 costs answers"),
    ],
)
def test_the_verdict(after, said):
    before = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert verdict(before, torch.tensor(after), "bfloat16").startswith(f"first tokens that change: {said}")


def test_an_adapter_that_rounding_eats_is_named(export, formats, tmp_path):
    folder, _ = copied(formats.adapter, tmp_path / "small")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * (1e-4 if "lora_B" in n else 1) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    done = export(folder, tmp_path / "out", "--dtype", "bfloat16")
    line = next(line for line in done.stdout.splitlines() if line.startswith("rounding to bfloat16 ate the adapter in"))
    assert float(line.split(" in ")[1].split()[0]) > 90
    done = export(folder, tmp_path / "wide", "--dtype", "float32")
    assert "ate the adapter" not in done.stdout and "0 of 6 (0.0 %)" in done.stdout


def test_it_is_compared_on_the_prompts_given_or_on_those_of_the_run(export, formats, data, tmp_path):
    asked = [{"image": ["red.png"], "prompt": "<image>\nWhat colour?", "answer": "red", "id": n} for n in range(3)]
    questions = data(asked)
    words = ("--questions", str(questions), "--image_folder", str(data.images))
    done = export(formats.adapter, tmp_path / "a", *words, "--num", "2")
    assert f"compared on 2 prompts of {questions}" in done.stdout and " of 2 (" in done.stdout
    folder, _ = copied(formats.adapter, tmp_path / "run")
    run = {"data": {"data_path": str(questions), "image_folder": str(data.images)}}
    (folder / "run.json").write_text(json.dumps(run))
    assert f"compared on 3 prompts of {questions}" in export(folder, tmp_path / "b").stdout
    done = export(formats.adapter, tmp_path / "c", *words[:2])
    assert done.returncode == 2 and "--questions and --image_folder go together" in done.stderr


# ---- pictures, prompts and tokens, as plain transformers makes them


@pytest.mark.parametrize("size", [(144, 72), (72, 144), (500, 333), (31, 17), (64, 64)])
@pytest.mark.parametrize("pad", [True, False])
def test_pictures_are_those_of_training(export, formats, tmp_path, size, pad):
    """In the adapter's folder and the exported one, for a run that padded and one that cropped."""
    folder, _ = copied(formats.adapter, tmp_path / "adapter")
    base = AutoImageProcessor.from_pretrained(formats.llava_hf, backend="pil")
    open_checkpoint(str(formats.llava_hf), pad=pad).family.processor().save_pretrained(folder)  # as the Trainer does
    assert open_checkpoint(str(folder)).family.pad == pad
    export(folder, tmp_path / "out", "--dtype", "float32")
    picture = noise(*size)
    square = Image.new("RGB", (max(size), max(size)), (122, 116, 104))
    square.paste(picture, tuple((max(size) - side) // 2 for side in size))
    wanted = base(images=[square if pad else picture], return_tensors="pt")["pixel_values"]
    for place in (folder, tmp_path / "out"):
        read = AutoProcessor.from_pretrained(place)
        assert type(read.image_processor).__name__.startswith("LlavaImageProcessor")
        found = read(text="<image>", images=picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["do_pad"] == pad


PROMPTS = [
    "Image1:<image>\nImage2:<image>\nIn Image2, what colour?",
    "<image>\nWhat is this?",
    "<image>What is this?",
    "<image><image>Which?",
    "<image><image>\nWhich?",
    "What is this?\n<image>",
    "Compare <image>and <image>.",
    "<image>",
    "No picture {{ here }}?",
]


@pytest.fixture(scope="module")
def plain(formats, tmp_path_factory):
    """(processor as plain transformers reads it, family)"""
    folder = tmp_path_factory.mktemp("processor")
    family = open_checkpoint(str(formats.llava_hf)).family
    family.processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder), family


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_chat_template_renders_the_prompt_and_the_tokens_of_training(plain, prompt):
    processor, family = plain
    pictures = [noise(50, 30, seed) for seed in range(prompt.count("<image>"))]
    messages = messages_of([("user", prompt)], pictures, lambda picture: {"type": "image", "image": picture})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == family.render([(prompt, None)]) == f"{SYSTEM} USER: {prompt} ASSISTANT:"
    found = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = family.expand(family.encode_prompt(prompt), [family.image(picture.size) for picture in pictures])
    assert found["input_ids"][0] == ids


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if p else {"type": "image"} for p in parts]}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("Image1:", None, "\nImage2:", None, "\nWhich?")], "USER: Image1:<image>\nImage2:<image>\nWhich? "),
        ([user(None, "What is this?")], "USER: <image>\nWhat is this? "),  # as LLaVA-1.5 was trained
        ([user(None, None, "Which?")], "USER: <image>\n<image>\nWhich? "),
        ([user(None, "\nWhat is this?")], "USER: <image>\nWhat is this? "),
        ([user("See", None, "it")], "USER: See<image>it "),
        ([{"role": "system", "content": "Be brief."}, user("A?")], None),
        (
            [user("A?"), {"role": "assistant", "content": [{"type": "text", "text": "B"}]}, user("C?")],
            "USER: A? ASSISTANT: B</s>USER: C? ",
        ),
    ],
)
def test_messages_that_others_send(plain, messages, text):
    found = plain[0].apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert found == (f"{SYSTEM} {text}ASSISTANT:" if text else "Be brief. USER: A? ASSISTANT:")


def test_strings_are_several_turns_too_and_unknown_roles_are_refused(plain):
    turns = [{"role": role, "content": text} for role, text in (("user", "A?"), ("assistant", "B"), ("user", "C?"))]
    whole = plain[0].apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert whole == vicuna_v1([("A?", "B"), ("C?", None)])
    for role in ("tool", "system"):
        with pytest.raises(Exception, match="a system message at most at its start"):
            plain[0].apply_chat_template([*turns, {"role": role, "content": "x"}], tokenize=False)


@pytest.mark.parametrize("missing", ["num_additional_image_tokens", "patch_size"])
def test_a_base_whose_processor_miscounts_is_named_and_its_export_counts_right(
    export, formats, tmp_path, caplog, missing
):
    base, edit = copied(formats.llava_hf, tmp_path / "base")
    edit("processor_config.json", **{missing: ...})
    assert open_checkpoint(str(base)).family
    assert ("counts no tokens" if missing == "patch_size" else "counts 15 tokens") in caplog.text
    done = export(base, tmp_path / "out", "--dtype", "float32")
    assert done.returncode == 0 and "the model takes 16" in done.stdout
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    inputs = processor(text="<image><image> a", images=[noise(9, 5), noise(5, 9)], return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 32
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_servers_that_leave_the_start_token_to_the_template_have_one_that_writes_it(plain, tmp_path, prompt):
    """vLLM renders the text, and tokenises it without special tokens; a picture is one token then."""
    processor, family = plain
    scripts.export.write(open_checkpoint(BASE).load(), family, tmp_path / "out")
    template = (tmp_path / "out" / "chat_template_with_bos.jinja").read_text()
    messages = messages_of([("user", prompt)], range(prompt.count("<image>")), lambda number: {"type": "image"})
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == family.encode_prompt(prompt)
    # vLLM keeps the order of parts only where it finds a loop over a message's own content.
    assert "for part in message['content']" in template


def test_a_base_that_counts_right_is_not_named(formats, caplog):
    assert open_checkpoint(str(formats.llava_hf)).family and "processor counts" not in caplog.text


# ---- refused


def test_a_folder_with_files_is_not_overwritten(export, formats, tmp_path):
    (tmp_path / "precious").touch()
    done = export(formats.adapter, tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr


def test_original_layout_without_a_sentencepiece_model_says_where_to_get_one(export, formats, tmp_path):
    done = export(formats.llava_hf, tmp_path / "out", "--format", "original")
    assert done.returncode == 2 and "tokenizer.model" in done.stderr
