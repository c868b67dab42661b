"""Every checkpoint format gives the same model; a tensor too few, too many or of another shape is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor

from llava.checkpoints import open_checkpoint, shapes_of
from llava.families.llava15 import vicuna_v1
from llava.families.llava15_original import pad_rows, translate_config, translate_name
from llava.weights import account
from tests.dialects import SIDE, make_formats


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return make_formats(tmp_path_factory.mktemp("formats"))


def logits_of(path, **settings):
    """Logits of a fixed prompt with two images."""
    model = open_checkpoint(str(path), **settings).load().eval()
    image = [model.config.image_token_id] * 16
    ids = torch.tensor([[1, 5, 9, *image, 30, *image, 31, 40, 7]])
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("name", ["original", "original_bin"])
def test_original_checkpoints_give_the_logits_of_llava_hf(formats, name):
    expected = logits_of(formats.llava_hf)
    torch.testing.assert_close(logits_of(getattr(formats, name)), expected, atol=1e-5, rtol=0)


def test_original_lora_folder_gives_the_logits_of_the_peft_adapter(formats):
    base, adapter = logits_of(formats.llava_hf), logits_of(formats.adapter)
    assert (adapter - base).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(formats.original_lora), adapter, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 32}},
        {"alpha_pattern": {"model.layers.1.self_attn.v_proj": 32, r"^model\.layers\.0\.mlp": 16}},
    ],
    ids=["rslora", "alpha by module", "alpha by layer"],
)
def test_settings_that_change_what_an_original_lora_folder_weighs_are_honoured(formats, tmp_path, change):
    """As PEFT has them in an adapter of its own, where the modules' names are transformers'."""

    def changed(folder, names):
        copy, path = shutil.copytree(folder, tmp_path / folder.name), tmp_path / folder.name / "adapter_config.json"
        text = names(json.dumps(change))
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(text)))
        return logits_of(copy)

    theirs = changed(formats.original_lora, str)
    ours = changed(formats.adapter, lambda text: text.replace("model", "model.language_model"))
    assert (theirs - logits_of(formats.original_lora)).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"mm_projector_type": "linear"}, {"mm_projector_type": None}, {"mm_vision_select_feature": "cls_patch"},
        {"mm_use_im_start_end": True}, {"mm_patch_merge_type": "spatial_unpad"}, {"image_aspect_ratio": "anyres"},
    ],
)  # fmt: skip
def test_settings_of_another_llava_are_refused_by_name(formats, tmp_path, change):
    folder = copied(formats.original, tmp_path)
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))} .* no other LLaVA is read here"):
        open_checkpoint(str(folder))


def test_the_tower_can_be_given(formats, tmp_path):
    moved = tmp_path / "tower"
    shutil.copytree(formats.tower, moved)
    folder = copied(formats.original, tmp_path)
    edit_config(folder, mm_vision_tower="nowhere/to-be-found")
    with pytest.raises(FileNotFoundError, match="nowhere/to-be-found"):
        open_checkpoint(str(folder))
    expected = logits_of(formats.original)
    torch.testing.assert_close(logits_of(folder, image_tower=str(moved)), expected, atol=0, rtol=0)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_tower_that_moved_with_its_checkpoint_is_found(formats, tmp_path, caplog, place):
    folder = copied(formats.original, tmp_path)
    tower = shutil.copytree(formats.tower, (folder if place == "inside" else tmp_path) / "clip-vit")
    edit_config(folder, mm_vision_tower="/gone/place/clip-vit")
    caplog.set_level("INFO")
    torch.testing.assert_close(logits_of(folder), logits_of(formats.original), atol=0, rtol=0)
    assert f"its vision tower /gone/place/clip-vit is not there, {tower} is taken" in caplog.text
    edit_config(folder, mm_vision_tower=str(formats.tower))  # it is there: nothing else is taken
    assert open_checkpoint(str(folder)).tower == str(formats.tower)


@pytest.mark.parametrize(("said", "pad"), [("pad", True), ("square", False)])
def test_the_padding_that_a_checkpoint_says_counts_unless_another_is_asked_for(formats, tmp_path, said, pad):
    folder = copied(formats.original, tmp_path)
    edit_config(folder, image_aspect_ratio=said)
    assert open_checkpoint(str(folder)).family.pad == pad
    assert open_checkpoint(str(folder), pad=not pad).family.pad != pad


@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("llava_hf", "transformers"),
        ("original", "original LLaVA"),
        ("original_bin", "original LLaVA"),
        ("adapter", "PEFT adapter"),
        ("original_lora", "original LLaVA LoRA"),
    ],
)
def test_the_dialect_is_found(formats, name, dialect):
    assert open_checkpoint(str(getattr(formats, name))).dialect == dialect


class TestRefusedByName:
    """A missing, an extra and a mis-shaped tensor, in every format."""

    @pytest.fixture(params=["llava_hf", "original", "original_bin", "adapter", "original_lora"])
    def kind(self, request):
        return request.param

    def broken(self, formats, kind, tmp_path, change):
        """A copy with one file of tensors changed."""
        folder = copied(getattr(formats, kind), tmp_path)
        file = {
            "llava_hf": "model.safetensors", "original": "model-00002-of-00002.safetensors",
            "original_bin": "pytorch_model-00002-of-00002.bin", "adapter": "adapter_model.safetensors",
            "original_lora": "adapter_model.bin",
        }[kind]  # fmt: skip
        path = folder / file
        is_safe = path.suffix == ".safetensors"
        tensors = load_file(path) if is_safe else torch.load(path, weights_only=True)
        victim = next(name for name in sorted(tensors) if "layers.2.self_attn.v_proj" in name and "vision" not in name)
        change(tensors, victim)
        save_file(tensors, path, metadata={"format": "pt"}) if is_safe else torch.save(tensors, path)
        return str(folder)

    def test_missing(self, formats, kind, tmp_path):
        path = self.broken(formats, kind, tmp_path, lambda tensors, name: tensors.pop(name))
        with pytest.raises(ValueError, match=r"missing tensors: .*layers\.2\.self_attn\.v_proj"):
            open_checkpoint(path).load()

    def test_unexpected(self, formats, kind, tmp_path):
        def add(tensors, name):
            tensors[name.replace("layers.2", "layers.7")] = tensors[name].clone()

        with pytest.raises(ValueError, match=r"unexpected tensors: .*layers\.7\.self_attn\.v_proj"):
            open_checkpoint(self.broken(formats, kind, tmp_path, add)).load()

    def test_mis_shaped(self, formats, kind, tmp_path):
        def cut(tensors, name):
            tensors[name] = tensors[name][:, :-1].clone()

        with pytest.raises(ValueError, match=r"mis-shaped tensors: .*layers\.2\.self_attn\.v_proj"):
            open_checkpoint(self.broken(formats, kind, tmp_path, cut)).load()

    def test_a_tensor_that_means_nothing(self, formats, tmp_path):
        def add(tensors, name):
            tensors["model.mm_resampler.weight"] = torch.ones(2)

        with pytest.raises(ValueError, match=r"unexpected tensors: model\.mm_resampler\.weight"):
            open_checkpoint(self.broken(formats, "original", tmp_path, add)).load()


def copied(folder, tmp_path):
    target = tmp_path / folder.name
    shutil.copytree(folder, target)
    return target


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bin_with_code_in_it_is_not_run(formats, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    folder = copied(formats.original_bin, tmp_path)
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        open_checkpoint(str(folder)).load()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mm_projector_type": "linear"}, "mlp2x_gelu"),
        ({"mm_vision_select_feature": "cls_patch"}, "patch"),
        ({"mm_vision_tower": None}, "--image_tower"),
    ],
)
def test_what_llava_15_does_not_have_is_refused(formats, tmp_path, changes, expected):
    folder = copied(formats.original, tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=expected):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("hidden", "ffn", "layers", "heads"), [(4096, 11008, 32, 32), (5120, 13824, 40, 40)], ids=["7b", "13b"]
)
def test_the_key_map_of_the_full_model_leaves_nothing_over(tmp_path, hidden, ffn, layers, heads):
    """Names and shapes of liuhaotian/llava-v1.5-*, from the format's public description, on the meta device."""
    (tmp_path / "config.json").write_text(json.dumps(CLIP_L_336))
    raw = {
        "model_type": "llava", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "rms_norm_eps": 1e-5, "vocab_size": 32000,
        "max_position_embeddings": 4096, "mm_vision_tower": str(tmp_path), "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = translate_config(raw, str(tmp_path))
    assert (config.image_token_id, config.text_config.vocab_size, config.image_seq_length) == (32000, 32064, 576)
    given = {}
    for name, shape in original_index(hidden, ffn, layers).items():
        ours = translate_name(name)
        if ours is not None:
            rows = "embed_tokens" in name or name == "lm_head.weight"
            given[ours] = torch.Size([32064, hidden]) if rows else shape
    assert len(given) == 9 * layers + 3 + 4
    wanted = {name: shape for name, shape in shapes_of(config).items() if "vision_tower" not in name}
    account("index", wanted, given)


CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def original_index(hidden, ffn, layers):
    """Name to shape of every tensor of the original index."""
    found = {
        "model.embed_tokens.weight": (32000, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (32000, hidden),
    }
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        found |= {f"{stem}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        found |= {f"{stem}.mlp.{n}_proj.weight": (ffn, hidden) for n in ("gate", "up")}
        found |= {f"{stem}.mlp.down_proj.weight": (hidden, ffn)}
        found |= {f"{stem}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        found |= {f"{stem}.self_attn.rotary_emb.inv_freq": (64,)}
    found |= {"model.mm_projector.0.weight": (hidden, 1024), "model.mm_projector.0.bias": (hidden,)}
    found |= {"model.mm_projector.2.weight": (hidden, hidden), "model.mm_projector.2.bias": (hidden,)}
    return {name: torch.Size(shape) for name, shape in found.items()}


def test_padded_rows_never_win_and_hardly_count():
    torch.manual_seed(0)
    weight, hidden = torch.randn(320, 16), torch.randn(50, 16)
    logits = hidden @ pad_rows(weight, 384).T
    assert (logits.argmax(-1) < 320).all()
    added = logits.logsumexp(-1) - logits[:, :320].logsumexp(-1)
    assert (added >= 0).all() and (added <= torch.tensor(1 + 64 / 320).log()).all()


TEXTS = [
    "Image1:<image>\nImage2:<image>\nIn Image2, what colour is the shape?",
    "<image>\nIn the central picture, how many shapes  are there?",
    "def f(x):\n    return  x\n\nÜnïcode <image> 12345.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_the_rule_of_the_original_code(formats, text):
    """Split at `<image>`, sentencepiece for each chunk, one BOS in front, the image id between chunks."""
    family = open_checkpoint(str(formats.original)).family
    pieces = SentencePieceProcessor(model_file=str(formats.pieces))
    image = family.tokenizer.convert_tokens_to_ids("<image>")

    def by_rule(whole):
        ids = [pieces.bos_id()]
        for number, chunk in enumerate(whole.split("<image>")):
            ids += ([image] if number else []) + pieces.encode(chunk)
        return ids

    prompt, answer = family.encode_prompt(text), family.encode_answer(text, "dark blue")
    assert prompt == by_rule(vicuna_v1([(text, None)]))
    assert prompt.count(pieces.bos_id()) == 1
    # the stop string is one token; the original's sentencepiece reads it so because it is a control symbol there
    assert prompt + answer == [*by_rule(vicuna_v1([(text, "dark blue")]).removesuffix("</s>")), pieces.eos_id()]


def test_llava_hf_and_original_tokenizers_agree(formats):
    old, new = (open_checkpoint(str(p)).family for p in (formats.original, formats.llava_hf))
    for text in TEXTS:
        assert old.encode_prompt(text) == new.encode_prompt(text)
