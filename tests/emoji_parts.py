"""Stand-ins for what scripts.larger fetches: tiny packages, emoji pictures, and pretrained parts of random weights."""

import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.larger.fetch import NPM, PYPI, Package
from scripts.larger.world import ATTRIBUTES, CATEGORIES, STYLES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # SmolLM2's first three


def package(file, members):
    """A Package for a file that exists, wanting `members`."""
    name = file.name.split("-1.0.0")[0].replace("_", "-")
    registry = PYPI if file.suffix == ".whl" else NPM
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Package(name, "1.0.0", registry, file.name, digest, members, "none")


def write_tgz(file, contents, links=()):
    """A package as npm packs it; `links` are (name, target)."""
    with tarfile.open(file, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return file


def write_wheel(file, contents):
    """A package as PyPI has it."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file


def labels(per_kind=8):
    """Entries of emoji.json: some of every kind of ours, one of a kind that is not, one that a style does not draw."""
    ours = [
        (theirs, subcategories[number % len(subcategories)], f"{kind}-{number}.png")
        for theirs, kinds in CATEGORIES.values()
        for kind, subcategories in kinds.items()
        for number in range(per_kind)
    ]
    drawn = {f"has_img_{style}": True for style in STYLES.values()}
    entries = [{"category": c, "subcategory": s, "image": image} | drawn for c, s, image in ours]
    flag = {"category": "Flags", "subcategory": "country-flag", "image": "flag.png"} | drawn
    undrawn = entries[0] | {"image": "undrawn.png", "has_img_twitter": False}
    return [*entries, flag, undrawn]


def picture(number, style):
    """PNG of a small disc with transparent corners, its colour by number, its size by style."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    across = np.hypot(*(np.mgrid[:16, :16] - 7.5))
    pixels[across < (7 if style == "google" else 5)] = (*np.random.default_rng(number).integers(0, 200, 3), 255)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_emoji(folder, per_kind=8):
    """What fetch leaves of the two emoji packages."""
    entries = labels(per_kind)
    for style in set(STYLES.values()):
        (folder / style).mkdir(parents=True)
        for number, entry in enumerate(entries):
            if entry.get(f"has_img_{style}"):
                (folder / style / entry["image"]).write_bytes(picture(number, style))
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


def tokenizer():
    """Byte-level as SmolLM2's, with a token for each answer; everything else is characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = [*SPECIAL, *alphabet], []
    for word in sorted({word for values in ATTRIBUTES.values() for word in values}):
        left = "Ġ"
        for letter in word:
            merges.append((left, letter))
            left += letter
            if left not in pieces:
                pieces.append(left)
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(dict.fromkeys(merges)))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(SPECIAL))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def language_model(vocabulary):
    """LLaMA of two layers with tied embeddings, as SmolLM2 has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tower(side, width=64, layers=2):
    """DINOv2 of one or two heads."""
    torch.manual_seed(1)
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, image_size=side, patch_size=14,
        mlp_ratio=2, use_mask_token=False,
    )  # fmt: skip
    return Dinov2Model(config).eval()
