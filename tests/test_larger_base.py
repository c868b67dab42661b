"""The larger base: assembled of tiny parts, trained by its stages, and its parts read from graphs and GGUF files."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from llava.conversation import encode_answer, encode_prompt
from llava.layout import PatchGrid

from llava.checkpoints import load_config, load_model, load_processor
from scripts import export
from scripts.larger import build_base, draw, parts, world
from scripts.larger.model import assemble, build_processor
from scripts.larger.prompts import sampler
from tests import emoji_parts


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return world.read_emoji(emoji_parts.write_emoji(tmp_path_factory.mktemp("parts") / "emoji"))


# ---- the base


def tiny_base(seed=0):
    """As build_base.construct, of the stand-ins."""
    tokenizer = emoji_parts.tokenizer()
    language_model = emoji_parts.language_model(len(tokenizer))
    processor = build_processor(tokenizer, draw.SIDE, draw.PATCH, 8192)
    model = assemble(language_model, emoji_parts.tower(draw.SIDE), processor, 2, seed)
    return language_model, model, processor


def test_the_assembled_llava_saves_loads_and_computes_as_its_parts(emoji, tmp_path):
    language_model, model, processor = tiny_base()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, read, config = load_model(str(tmp_path)).eval(), load_processor(str(tmp_path)), load_config(str(tmp_path))
    grid = PatchGrid.of(read.image_processor, config.vision_config, pad=True)
    assert grid.num_tokens == 144 and config.vision_config.model_type == "dinov2"
    ids = encode_prompt(read.tokenizer, "<image>\nWhat is shown?")
    answer = encode_answer(read.tokenizer, "<image>\nWhat is shown?", "plant")
    assert read.tokenizer.convert_ids_to_tokens(answer) == ["Ġplant", "</s>"]
    assert read.tokenizer.convert_ids_to_tokens(ids[0]) == "<|im_start|>" and ids == encode_prompt(
        processor.tokenizer, "<image>\nWhat is shown?"
    )
    place = ids.index(config.image_token_id)
    pixels = torch.randn(1, 3, draw.SIDE, draw.SIDE, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[*ids[:place], *[config.image_token_id] * 144, *ids[place + 1 :]]])
    with torch.inference_mode():
        found = loaded(input_ids=ids, pixel_values=pixels).logits
        states = emoji_parts.tower(draw.SIDE)(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        embedded = loaded.get_input_embeddings()(ids)
        embedded[:, place : place + 144] = loaded.model.multi_modal_projector(states)
        wanted = language_model(inputs_embeds=embedded).logits
    assert (found[..., : wanted.shape[-1]] - wanted).abs().max() < 1e-4
    assert loaded.lm_head.weight.shape[0] % 64 == 0
    old_end = language_model.lm_head.weight[2]
    assert torch.equal(loaded.lm_head.weight[read.tokenizer.eos_token_id], old_end)


def test_the_export_of_this_tower_reads_back(tmp_path, monkeypatch):
    _, model, processor = tiny_base()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    words = ["--model_name_or_path", tmp_path / "base", "--output", tmp_path / "exported", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    export.main()
    exported = load_model(str(tmp_path / "exported")).state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in model.state_dict().items())


def test_an_answer_of_several_tokens_is_refused(monkeypatch):
    _, _, processor = tiny_base()
    build_base.check_answers(processor)
    monkeypatch.setitem(world.ATTRIBUTES, "kind", ("plant", "hippopotamus"))
    with pytest.raises(ValueError, match="'hippopotamus'"):
        build_base.check_answers(processor)


@pytest.fixture
def training(emoji, tmp_path, monkeypatch):
    """Runs build_base on the stand-ins and returns the trained model; some modules stay as they began."""
    few = {"steps": 2, "batch": 2, "rate": 1e-3}
    formats = dict.fromkeys(("single", "sequence", "collage", "pip"), 1)
    quick = {
        "projector": few, "reading": few | {"check_every": 1, "prompts": 2, "wanted": 101.0},
        "routing": build_base.RECIPE["routing"]
        | {"steps": 6, "batch": formats, "check_every": 2, "prompts": 2, "wanted": 0.0, "naming_layer": 1},
    }  # fmt: skip
    monkeypatch.setattr(build_base, "QUICK", quick)
    monkeypatch.setattr(build_base, "construct", lambda parts, seed: tiny_base(seed)[1:])
    monkeypatch.setattr(build_base, "parity", lambda parts: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["build_base", "--parts", str(emoji.folder.parent), "--output", str(tmp_path / "base"), "--num_test", "2"]
    monkeypatch.setattr(sys, "argv", words)
    return tmp_path / "base"


def test_the_base_is_trained_by_its_stages_and_only_behind_the_tower(training, monkeypatch):
    with pytest.raises(SystemExit):  # no GPU
        build_base.main()
    sys.argv.append("--quick")
    build_base.main()
    scores = json.loads((training / "base_scores.json").read_text())
    # Reading never reaches 101 %, so it takes all its steps; routing ends at its first check, which asks for nothing.
    assert scores["steps"] == {"projector": 2, "reading": 2, "routing": 2}
    assert scores["test"].keys() == scores["validation"].keys() >= {"single", "sequence_5", "collage", "pip"}
    assert not (training / "progress.pt").exists()
    trained, begun = load_model(str(training)).state_dict(), tiny_base()[1].half().float().state_dict()
    changed = {name.split(".")[1] for name in begun if not torch.equal(trained[name], begun[name])}
    assert changed >= {"multi_modal_projector", "language_model"} and "vision_tower" not in changed


def test_the_projectors_stage_leaves_the_language_model_alone(emoji):
    _, model, processor = tiny_base()
    recipe = {"projector": {"steps": 1, "batch": 1, "rate": 1e-3}, "reading": build_base.RECIPE["reading"]}
    lessons = build_base.Lessons(model, processor, np.random.default_rng(0), sampler(emoji), recipe)
    stage = build_base.projector(lessons)
    stage.lesson()[0].backward()
    projector = {id(p) for name, p in model.named_parameters() if "multi_modal_projector" in name}
    assert {id(p) for p in stage.trained} == projector == {id(p) for p in model.parameters() if p.grad is not None}
    reading = {id(p) for p in build_base.reading(lessons).trained}
    assert reading == {id(p) for name, p in model.named_parameters() if "vision_tower" not in name}


# ---- the pretrained parts


def test_a_missing_package_or_file_is_told_in_one_line(tmp_path, monkeypatch):
    for read, file in (
        (parts.read_language_model, parts.GGUF),
        (partial(parts.read_vision_tower, side=28), parts.ONNX),
    ):
        with pytest.raises(FileNotFoundError, match=r"scripts\.larger\.fetch"):
            read(tmp_path)
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes(b"")
        monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"pip install -r scripts/larger/requirements\.txt"):
            read(tmp_path)


def test_resampled_positions_are_those_that_the_tower_would_make_itself():
    large, small = emoji_parts.tower(70), emoji_parts.tower(42)
    positions = parts.resample(large.embeddings.position_embeddings.data, 3)
    small.load_state_dict(large.state_dict() | {"embeddings.position_embeddings": positions})
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(small(pixels).last_hidden_state, large(pixels).last_hidden_state, atol=1e-5)


def test_a_tower_is_rebuilt_from_the_names_of_an_exported_graph(tmp_path):
    """A graph with the real one's names: matrices without their own, transposed, found by their nodes."""
    onnx = pytest.importorskip("onnx", reason="reads ONNX graphs; pip install -r scripts/larger/requirements.txt")
    wanted = emoji_parts.tower(70, width=128)
    old = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }
    tensors, nodes = [], []

    def add(name, tensor, node=None, kind="MatMul"):
        tensors.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
        if node:
            nodes.append(onnx.helper.make_node(kind, ["x", name], [f"{node}_output_0"], name=node))

    for name, tensor in wanted.state_dict().items():
        for new, before in old.items():
            name = name.replace(f"attention.{new}", f"attention.{before}")
        module = name.rsplit(".", 1)[0].replace(".", "/")
        if name == "embeddings.position_embeddings":
            add("onnx::Concat_1", tensor[:, :1], "/backbone/embeddings/Concat", "Concat")
            add("onnx::Reshape_1", tensor[:, 1:], "/backbone/embeddings/Reshape", "Reshape")
        elif name.startswith("encoder") and tensor.ndim == 2:
            add(f"onnx::MatMul_{len(nodes)}", tensor.T.contiguous(), f"/backbone/{module}/MatMul")
        else:
            add(f"backbone.{name}", tensor)
    add("decoder.weight", torch.zeros(2, 2), "/decoder/MatMul")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "g.onnx")
    found = parts.rebuild(tmp_path / "g.onnx")
    assert found.config.image_size == 70 and found.config.num_hidden_layers == 2
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_a_language_model_is_read_from_a_gguf(tmp_path):
    gguf = pytest.importorskip("gguf", reason="writes GGUF; pip install -r scripts/larger/requirements.txt")
    tokenizer = emoji_parts.tokenizer()
    wanted = emoji_parts.language_model(len(tokenizer))
    file = tmp_path / parts.GGUF
    file.parent.mkdir()
    write_gguf(gguf, file, wanted, tokenizer)
    found, read = parts.read_language_model(tmp_path)
    ids = torch.tensor([[1, 5, 7, 9, 40, 3]])
    with torch.inference_mode():
        assert torch.allclose(found(input_ids=ids).logits, wanted(input_ids=ids).logits, atol=1e-4)
    text = "What is shown? plant"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"] and read.bos_token == "<|im_start|>"
    found.save_pretrained(tmp_path / "saved")  # refused for a model that a GGUF was loaded into


def write_gguf(gguf, file, model, tokenizer):
    """As llama.cpp writes a LLaMA: its names, queries and keys with the halves of their heads interleaved."""
    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    pieces = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in emoji_parts.SPECIAL else 1 for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
