"""What a checkpoint must hold to be loaded, and that every refusal names the tensor, file or id."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava.attention import NAME
from llava.checkpoints import open_checkpoint
from llava.families import Llava15

TARGETS = Llava15.lora_targets()
PROJECTOR = "multi_modal_projector.linear_1.weight"  # its name in the file ends in this


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    """Apply `change(tensors, name of the projector's first weight)` to the file; return that name."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(PROJECTOR))
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def family_of(folder):
    return open_checkpoint(str(folder)).family


def inputs(config, seed=0):
    torch.manual_seed(seed)
    ids = torch.tensor([[1, 300, *[config.image_token_id] * 36, 301, 302, 303]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 72, 72)}


# ---- a good checkpoint


def test_config_and_processor(checkpoint, processor):
    opened = open_checkpoint(checkpoint)
    config, loaded = opened.config, opened.family
    assert (config.model_type, loaded.num_image_tokens()) == ("llava", 36)  # 72 px / 12 px = 6 x 6
    text = "USER: <image>\nIn Image1, what? ASSISTANT:"
    assert loaded.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id


def test_loaded_weights_are_those_of_the_file(checkpoint):
    model, plain = open_checkpoint(checkpoint).load(), LlavaForConditionalGeneration.from_pretrained(checkpoint)
    assert len(model.state_dict()) == len(plain.state_dict())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**inputs(model.config)).logits, plain(**inputs(model.config)).logits)


def test_only_the_language_model_uses_our_attention(checkpoint):
    config = open_checkpoint(checkpoint).load().config
    assert config.text_config._attn_implementation == NAME
    assert config.vision_config._attn_implementation == "sdpa"


def test_dtype(checkpoint):
    assert {p.dtype for p in open_checkpoint(checkpoint).load(torch.bfloat16).parameters()} == {torch.bfloat16}


# ---- weights that do not fit


def test_missing_tensor_is_named(copy):
    edit_weights(copy, lambda tensors, name: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"missing tensors: \S*{PROJECTOR}"):
        open_checkpoint(str(copy)).load()


def test_unexpected_tensor_is_named(copy):
    edit_weights(copy, lambda tensors, name: tensors.update({"language_model.stranger.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"unexpected tensors: \S*stranger\.weight"):
        open_checkpoint(str(copy)).load()


def test_misshaped_tensor_is_named(copy):
    edit_weights(copy, lambda tensors, name: tensors.update({name: torch.zeros(5, 7)}))
    with pytest.raises(ValueError, match=rf"mis-shaped tensors: \S*{PROJECTOR} \(5, 7\), the model has \(128, 96\)"):
        open_checkpoint(str(copy)).load()


def test_many_missing_tensors_are_counted(copy):
    def drop_layer(tensors, name):
        for key in [key for key in tensors if "language_model" in key and ".layers.1." in key]:
            del tensors[key]

    edit_weights(copy, drop_layer)
    with pytest.raises(ValueError, match=r"missing tensors: .* and 4 more"):  # 9 tensors a block, 5 named
        open_checkpoint(str(copy)).load()


def test_cut_weights_are_a_user_error(copy):
    """A download that stopped half-way ends a run with one line, so `user_errors` must know its kind of error."""
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises((ValueError, FileNotFoundError), match="copy"):
        open_checkpoint(str(copy)).load()


def test_absent_weights_are_a_user_error(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="copy"):
        open_checkpoint(str(copy)).load()


# ---- folders that are no checkpoint


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such checkpoint folder"):
        open_checkpoint(str(tmp_path / "nowhere"))


def test_hub_name_while_offline():
    with pytest.raises(FileNotFoundError, match="llava-hf/no-such-model") as caught:
        open_checkpoint("llava-hf/no-such-model")
    assert "\n" not in str(caught.value)
    assert "download the checkpoint" in str(caught.value)


@pytest.mark.parametrize("model_type", ["llava_next", "llama", "llava_next"])
def test_other_models_are_refused(copy, model_type):
    edit_config(copy, model_type=model_type)
    with pytest.raises(ValueError, match=rf"copy.*'{model_type}'.*LLaVA-1\.5"):
        open_checkpoint(str(copy))


def test_config_without_language_model_names_the_folder(copy):
    edit_config(copy, text_config=...)
    with pytest.raises(ValueError, match="copy"):
        open_checkpoint(str(copy))


def test_broken_config_names_the_file(copy):
    (copy / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json"):
        open_checkpoint(str(copy))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (None, "projector_hidden_act", "x"), ("vision_config", "hidden_act", 3), ("text_config", "hidden_act", "x"),
        ("vision_config", "num_attention_heads", -1), ("vision_config", "num_attention_heads", 0),
        ("text_config", "num_hidden_layers", -3), ("text_config", "intermediate_size", True),
        ("vision_config", "patch_size", 0), ("text_config", "vocab_size", -5),
    ],
)  # fmt: skip
def test_a_config_that_no_model_can_be_built_of_is_named(copy, part, name, value):
    own = json.loads((copy / "config.json").read_text())
    (own[part] if part else own)[name] = value
    (copy / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match=re.escape(str(copy))):
        open_checkpoint(str(copy)).family  # noqa: B018


def test_feature_strategy_with_the_class_token_is_refused(copy):
    edit_config(copy, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r"'full'.*'default'"):
        open_checkpoint(str(copy))


# ---- tokenizer


def test_another_image_id_is_refused(copy):
    wanted = open_checkpoint(str(copy)).config.image_token_id
    edit_config(copy, image_token_index=17, image_token_id=17)
    with pytest.raises(ValueError, match=rf"<image> as id {wanted}.*17"):
        family_of(copy)


def test_another_end_token_is_refused(copy):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"'<s>'.*'</s>'"):
        family_of(copy)


def test_folder_without_tokenizer(copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="copy: no processor"):
        family_of(copy)


# ---- LoRA


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """(folder of a LoRA adapter with random weights, the model it was saved from), by plain peft."""
    torch.manual_seed(0)
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    lora = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", lora.eval()


def test_adapter_loads_on_its_base(adapter, checkpoint):
    folder, wanted = adapter
    model = open_checkpoint(str(folder)).load()
    assert isinstance(model, PeftModel) and model.config.text_config._attn_implementation == NAME
    with torch.no_grad():
        logits = [m(**inputs(wanted.config)).logits for m in (model.eval(), wanted, open_checkpoint(checkpoint).load())]
    torch.testing.assert_close(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_config_and_processor_of_an_adapter_are_its_bases(adapter, checkpoint):
    folder = str(adapter[0])
    own, base = open_checkpoint(folder), open_checkpoint(checkpoint)
    assert own.config.to_dict() == base.config.to_dict()
    assert own.family.tokenizer.get_vocab() == base.family.tokenizer.get_vocab()


def test_adapter_without_its_base(adapter):
    path = adapter[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(FileNotFoundError, match="/nowhere/base"):
        open_checkpoint(str(adapter[0])).load()


def test_adapter_with_a_missing_tensor_is_refused(adapter):
    """peft fills the hole with fresh weights and only warns."""
    path = adapter[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=gone.split(".lora_")[0].split("model.", 1)[1]):
        open_checkpoint(str(adapter[0])).load()


def test_lora_targets_are_the_seven_layers_of_each_language_block(adapter):
    model = adapter[1]
    found = sorted(
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("lora_A.default")
    )
    blocks = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    prefix = "base_model.model.model.language_model.layers"
    assert found == sorted(f"{prefix}.{layer}.{block}" for layer in range(4) for block in blocks)


# ---- what an adapter stands on


def write_adapter(folder, base):
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_adapters_that_stand_on_each_other_in_a_circle_are_refused(tmp_path, length):
    """Not followed for ever."""
    names = [f"adapter{number}" for number in range(length)]
    for name, below in zip(names, [*names[1:], names[0]], strict=True):
        write_adapter(tmp_path / name, tmp_path / below)
    with pytest.raises(ValueError, match=r"adapter0: the adapters stand on each other in a circle.*--base_model") as e:
        open_checkpoint(str(tmp_path / "adapter0"))
    assert "\n" not in str(e.value)


def test_a_given_base_wins_over_the_one_that_an_adapter_names(adapter, checkpoint, copy):
    folder = str(adapter[0])
    assert open_checkpoint(folder).root.path == checkpoint
    assert open_checkpoint(folder, base=str(copy)).root.path == str(copy)


def test_an_adapter_that_names_no_base(tmp_path):
    with pytest.raises(ValueError, match=r"names no base model.*--base_model"):
        open_checkpoint(write_adapter(tmp_path / "adapter", ""))


def test_a_peft_adapter_beside_a_config_is_still_one(adapter, checkpoint):
    """Some tools leave the base's config.json in an adapter's folder; it says nothing of the tensors' names."""
    folder, wanted = adapter
    shutil.copy(Path(checkpoint) / "config.json", folder)
    opened = open_checkpoint(str(folder))
    assert opened.dialect == "PEFT adapter"
    with torch.no_grad():
        logits = [m(**inputs(wanted.config)).logits for m in (opened.load().eval(), wanted)]
    torch.testing.assert_close(*logits)


# ---- opened once


def test_a_checkpoint_is_what_it_says(adapter, checkpoint):
    own, base = open_checkpoint(str(adapter[0])), open_checkpoint(checkpoint)
    assert (base.dialect, base.base, base.root) == ("transformers", None, base)
    assert (own.root, own.base.path) == (own.base, checkpoint)
    assert str(own) == f"{adapter[0]} (PEFT adapter) on {checkpoint} (LLaVA-1.5)"
    assert own.family is own.family and (base.num_layers, base.num_heads) == (4, 4)
    assert own.check_tensors() == len(own.load().state_dict()) > base.check_tensors()


def test_the_digest_changes_with_the_weights_of_the_adapter_or_its_base(adapter, copy):
    folder = str(adapter[0])
    before = open_checkpoint(folder, base=str(copy)).digest
    assert open_checkpoint(folder, base=str(copy)).digest == before != open_checkpoint(str(copy)).digest
    edit_weights(copy, lambda tensors, name: [tensor.add_(1) for tensor in tensors.values()])
    assert open_checkpoint(folder, base=str(copy)).digest != before


def test_no_code_that_comes_with_a_checkpoint_is_run(copy, tmp_path):
    """A config may name python files of its own (`auto_map`)."""
    owned = tmp_path / "owned"
    (copy / "evil.py").write_text(f"import pathlib\npathlib.Path({str(owned)!r}).touch()\nEvil = None\n")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (copy / name).is_file():
            found = json.loads((copy / name).read_text())
            kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
            (copy / name).write_text(json.dumps(found | {"auto_map": {kind: "evil.Evil" for kind in kinds}}))
    opened = open_checkpoint(str(copy))
    assert opened.family.num_image_tokens() == 36 and opened.load()
    assert not owned.exists()


def test_nothing_trusts_code_of_a_checkpoint():
    root = Path(__file__).parent.parent
    stages = ("llava", "train", "inference", "inference_optimization", "data_gen", "scripts")
    text = "\n".join(path.read_text(encoding="utf-8") for stage in stages for path in (root / stage).rglob("*.py"))
    assert text.count("trust_remote_code") == text.count("trust_remote_code=False") > 0
