"""The pretrained parts as transformers has them: SmolLM2 out of its GGUF, DINOv2 out of an ONNX graph."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, LlamaForCausalLM

GGUF = Path("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
ONNX = Path("dinov2/vit_s_focus.onnx")
BACKBONE = "backbone."  # of the graph's names: behind it comes a decoder of its own, which is not ours
OLD_NAMES = {  # the graph was exported from an older transformers
    r"\.attention\.attention\.query\.": ".attention.q_proj.",
    r"\.attention\.attention\.key\.": ".attention.k_proj.",
    r"\.attention\.attention\.value\.": ".attention.v_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
}
HEAD_WIDTH = 64  # of every DINOv2
PARITY = 1e-4  # largest difference of a feature between graph and rebuilt tower; features are of the order of 1


def read_language_model(parts: Path) -> tuple[LlamaForCausalLM, object]:
    """SmolLM2-135M-Instruct in fp32 (its 4-bit weights dequantised) and its tokenizer.

    Raises FileNotFoundError for a missing file, ValueError if the package gguf is not installed.
    """
    file = _existing(parts / GGUF)
    _needs("gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(loaded.config)(
        **{name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    )
    model = LlamaForCausalLM(config)  # a model that came from a GGUF refuses to be saved
    model.load_state_dict(loaded.state_dict())
    return model.eval(), tokenizer


def read_vision_tower(parts: Path, side: int) -> Dinov2Model:
    """DINOv2-small in fp32 for square pictures of `side` px: the backbone of the ONNX graph.

    Its positions, of 37 x 37 patches, are resampled once, as transformers does in every forward.
    Raises FileNotFoundError for a missing file, ValueError without the package onnx, or for another graph.
    """
    model = rebuild(_existing(parts / ONNX))
    positions = resample(model.embeddings.position_embeddings.data, side // model.config.patch_size)
    config = Dinov2Config(**{**model.config.to_dict(), "image_size": side})
    resized = Dinov2Model(config)
    resized.load_state_dict(model.state_dict() | {"embeddings.position_embeddings": positions})
    return resized.eval()


def rebuild(file: Path) -> Dinov2Model:
    """The graph's backbone at its own size, every tensor by name. Raises ValueError for another kind of graph."""
    _needs("onnx")
    state = backbone_state(file)
    try:
        width, num_positions = state["embeddings.cls_token"].shape[-1], state["embeddings.position_embeddings"].shape[1]
        patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
        config = Dinov2Config(
            hidden_size=width, num_attention_heads=width // HEAD_WIDTH,
            image_size=patch * round((num_positions - 1) ** 0.5),
            num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer.")),
            patch_size=patch, mlp_ratio=state["encoder.layer.0.mlp.fc1.bias"].shape[0] // width, use_mask_token=False,
        )  # fmt: skip
        model = Dinov2Model(config)
        model.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: the graph has no DINOv2 backbone as expected ({error})") from error
    return model.eval()


def backbone_state(file: Path) -> dict[str, Tensor]:
    """The backbone's tensors under today's names.

    Biases and norms keep their names in the graph. Matrices and positions lost theirs in the export: they are found by
    the node that uses them, matrices transposed.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    tensors = {tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor))) for tensor in graph.initializer}
    state = {name.removeprefix(BACKBONE): own for name, own in tensors.items() if name.startswith(BACKBONE)}
    positions = {}
    for node in graph.node:
        for name in node.input:
            own = tensors.get(name)
            if own is None or not node.name.startswith("/backbone/") or name.startswith(BACKBONE):
                continue
            module = node.name.removeprefix("/backbone/").rsplit("/", 1)[0].replace("/", ".")
            if node.op_type == "MatMul":
                state[f"{module}.weight"] = own.T.contiguous()
            elif own.ndim == 3:
                positions[own.shape[1] == 1] = own  # that of the class token, and those of the patches
    if len(positions) == 2:
        state["embeddings.position_embeddings"] = torch.cat([positions[True], positions[False]], dim=1)
    return {_today(name): own for name, own in state.items()}


def _today(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def resample(positions: Tensor, patches: int) -> Tensor:
    """(1, 1 + patches², hidden) position embeddings, bicubic; the class token's stays."""
    own, rest = positions[:, :1], positions[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    square = rest.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(patches, patches), mode="bicubic", align_corners=False)
    return torch.cat([own, square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def parity(parts: Path, side: int = 224, seed: int = 0) -> float | None:
    """Largest difference between the rebuilt tower's features and the graph's, of one random picture.

    None where onnxruntime is not installed. Raises ValueError if they differ by more than rounding.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnx
    import onnxruntime

    file = _existing(parts / ONNX)
    whole = onnx.load(file)
    last = next(node.output[0] for node in whole.graph.node if f"{BACKBONE}layernorm.bias" in node.input)
    whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(seed).standard_normal((1, 3, side, side), dtype=np.float32)
    (wanted,) = session.run([last], {whole.graph.input[0].name: pixels})
    with torch.inference_mode():
        found = rebuild(file)(torch.from_numpy(pixels)).last_hidden_state
    difference = float(np.abs(found.numpy() - wanted).max())
    if difference > PARITY:
        raise ValueError(f"{file}: the rebuilt tower's features differ from the graph's by up to {difference:.2g}")
    return difference


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; `python -m scripts.larger.fetch` gets it")
    return file


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"the package {package} is not installed: pip install -r scripts/larger/requirements.txt")
