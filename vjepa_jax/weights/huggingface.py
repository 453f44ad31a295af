"""Translate weights of V-JEPA 2 between Hugging Face's names and the official ones.

In `transformers`, queries, keys and values are separate, and all mask tokens are in one
array. Nothing is transposed. Source: `models/vjepa2/modeling_vjepa2.py`, 5.23.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.weights.rules import State, count_numbered, strip_prefixes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODEL_TYPE = "vjepa2"

_RATIOS = ("mlp_ratio", "pred_mlp_ratio")
_FIELDS = (
    "num_attention_heads",
    "pred_num_attention_heads",
    "frames_per_clip",
    "crop_size",
    "patch_size",
    "tubelet_size",
    "hidden_size",
    "num_hidden_layers",
    "pred_hidden_size",
    "pred_num_hidden_layers",
    "pred_num_mask_tokens",
    "num_pooler_layers",
    *_RATIOS,
)
_MASK_TOKENS = "predictor.embeddings.mask_tokens"
# (their name, official part, official name), without `.weight` and `.bias`.
_NAMES = (
    ("encoder.embeddings.patch_embeddings.proj", "encoder", "patch_embed.proj"),
    ("encoder.layernorm", "encoder", "norm"),
    ("predictor.embeddings.predictor_embeddings", "predictor", "predictor_embed"),
    ("predictor.layernorm", "predictor", "predictor_norm"),
    ("predictor.proj", "predictor", "predictor_proj"),
    ("classifier", "classifier", "linear"),
)
_BLOCKS = (
    ("encoder.layer", "encoder", "blocks"),
    ("predictor.layer", "predictor", "predictor_blocks"),
)
_POOLER_BLOCKS = "pooler.self_attention_layers"
_POOLER_CROSS = "pooler.cross_attention_layer"
_CROSS = "pooler.cross_attention_block"
_MLP = (("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_POOLER_NORMS = (("layer_norm1", "norm1"), ("layer_norm2", "norm2"))


def _correspondence(
    parts: Iterable[str], depths: Mapping[str, int], num_mask_tokens: int
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (official part, official name, their names) of every official array.

    An official array with several of their names, such as queries, keys and values, is
    the concatenation of their arrays.
    """

    def both(part, name, *theirs):
        for kind in ("weight", "bias"):
            yield part, f"{name}.{kind}", tuple(f"{t}.{kind}" for t in theirs)

    for theirs, part, name in _NAMES:
        if part in parts:
            yield from both(part, name, theirs)
    for theirs, part, name in _BLOCKS:
        for i in range(depths.get(part, 0)):
            a, b = f"{name}.{i}", f"{theirs}.{i}"
            qkv = [f"{b}.attention.{x}" for x in ("query", "key", "value")]
            yield from both(part, f"{a}.attn.qkv", *qkv)
            yield from both(part, f"{a}.attn.proj", f"{b}.attention.proj")
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                yield from both(part, f"{a}.{same}", f"{b}.{same}")
    if "predictor" in parts:
        for k in range(num_mask_tokens):
            yield "predictor", f"mask_tokens.{k}", (f"{_MASK_TOKENS}.{k}",)
    if "classifier" not in parts:
        return
    part = "classifier"
    yield part, "pooler.query_tokens", ("pooler.query_tokens",)
    for i in range(depths.get(part, 0)):
        a, b = f"pooler.blocks.{i}", f"{_POOLER_BLOCKS}.{i}"
        qkv = [f"{b}.self_attn.{x}_proj" for x in "qkv"]
        yield from both(part, f"{a}.attn.qkv", *qkv)
        yield from both(part, f"{a}.attn.proj", f"{b}.self_attn.out_proj")
        for theirs, name in (*_POOLER_NORMS, *_MLP):
            yield from both(part, f"{a}.{name}", f"{b}.{theirs}")
    attend = f"{_POOLER_CROSS}.cross_attn"
    yield from both(part, f"{_CROSS}.xattn.q", f"{attend}.q_proj")
    yield from both(part, f"{_CROSS}.xattn.kv", f"{attend}.k_proj", f"{attend}.v_proj")
    for theirs, name in (*_POOLER_NORMS, *_MLP):
        yield from both(part, f"{_CROSS}.{name}", f"{_POOLER_CROSS}.{theirs}")


def to_official(state: State) -> dict[str, dict[str, np.ndarray]]:
    """Rename and join the arrays of a model to official state dicts.

    Args:
      state: arrays by name, of `VJEPA2Model` or `VJEPA2ForVideoClassification`.

    Returns:
      Those of {"encoder", "predictor", "classifier"} that the model has.

    Raises:
      UserError: names are missing or unknown, or shapes do not fit; ten are listed.
    """
    state = strip_prefixes(state, model=MODEL_TYPE)
    tokens = state.pop(_MASK_TOKENS, None)
    if tokens is not None:
        if tokens.ndim != 4:
            raise UserError(
                f"{_MASK_TOKENS} has the shape {tokens.shape}: expected 4 axes"
            )
        state |= {f"{_MASK_TOKENS}.{k}": token for k, token in enumerate(tokens)}
    starts = {
        "encoder": ("encoder.",),
        "predictor": ("predictor.",),
        "classifier": ("pooler.", "classifier."),
    }
    parts = [p for p, s in starts.items() if any(n.startswith(s) for n in state)]
    depths = {part: count_numbered(state, theirs) for theirs, part, _ in _BLOCKS}
    depths["classifier"] = count_numbered(state, _POOLER_BLOCKS)
    out: dict[str, dict[str, np.ndarray]] = {part: {} for part in parts}
    problems: list[str] = []
    used: set[str] = set()
    num_tokens = 0 if tokens is None else len(tokens)
    for part, name, theirs in _correspondence(parts, depths, num_tokens):
        used |= set(theirs)
        missing = [n for n in theirs if n not in state]
        problems += [f"{n}: missing" for n in missing]
        if not missing:
            arrays = [state[n] for n in theirs]
            if len({array.shape for array in arrays}) > 1:
                shapes = ", ".join(str(array.shape) for array in arrays)
                problems.append(f"{theirs[0]}: its group has the shapes {shapes}")
            elif len(arrays) == 1:
                out[part][name] = arrays[0]
            else:
                out[part][name] = np.concatenate(arrays)
    if "predictor" in parts and tokens is None:
        problems.append(f"{_MASK_TOKENS}: missing")
    problems += [f"{n}: unknown" for n in sorted(set(state) - used)]
    if problems:
        raise UserError(
            f"these are not the weights of transformers' V-JEPA 2 "
            f"({len(problems)} names):\n  " + "\n  ".join(problems[:10])
        )
    return out


def read_config(content: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the fields of `config.json` that the weights do not show, and sizes.

    Args:
      content: of the file.
      path: of the file, for messages.

    Raises:
      UserError: it is of another model, or a value is not a positive number.
    """
    kind = content.get("model_type")
    if kind is None:
        raise UserError(f"{path} has no model_type: expected '{MODEL_TYPE}'")
    if kind != MODEL_TYPE:
        raise UserError(f"{path} is of a '{kind}', not of a V-JEPA 2")
    activation = content.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{path}: hidden_act '{activation}' is unknown")
    fields = {name: content[name] for name in _FIELDS if name in content}
    for name, value in fields.items():
        kinds = (int, float) if name in _RATIOS else (int,)
        # A pooler may consist of its cross-attention alone.
        may_be_zero = name == "num_pooler_layers"
        is_number = type(value) in kinds and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and not may_be_zero):
            raise UserError(f"{path}: {name}={value!r} is not a positive number")
    return fields


def require_sizes(
    config: Mapping[str, Any], parts: Mapping[str, State], path: str
) -> None:
    """Raise UserError if sizes in a config differ from those of the weights.

    Args:
      config: from `read_config`.
      parts: from `to_official`.
      path: of the config, for the message.
    """
    found: dict[str, float] = {}
    patches = parts["encoder"]["patch_embed.proj.weight"].shape
    if len(patches) == 5:  # otherwise `official.make_config` refuses them
        found |= {"tubelet_size": patches[2], "patch_size": patches[3]}
    for _, part, blocks in _BLOCKS:
        if part not in parts:
            continue
        prefix = "pred_" if part == "predictor" else ""
        found[f"{prefix}num_hidden_layers"] = count_numbered(parts[part], blocks)
        norm = parts[part].get(f"{blocks}.0.norm1.weight", np.zeros(0))
        found[f"{prefix}hidden_size"] = norm.size
        # As transformers computes it, the hidden size of the MLP is truncated.
        ratio = config.get(f"{prefix}mlp_ratio")
        hidden = parts[part].get(f"{blocks}.0.mlp.fc1.bias", np.zeros(0)).size
        if ratio is not None and int(norm.size * ratio) != hidden:
            found[f"{prefix}mlp_ratio"] = hidden / max(norm.size, 1)
    if "predictor" in parts:
        count = count_numbered(parts["predictor"], "mask_tokens")
        found["pred_num_mask_tokens"] = count
    if "classifier" in parts:
        count = count_numbered(parts["classifier"], "pooler.blocks")
        found["num_pooler_layers"] = count
    differing = [
        f"{name}={config[name]}, in the weights {value}"
        for name, value in found.items()
        if config.get(name, value) != value
    ]
    if differing:
        raise UserError(
            f"{path} and the weights beside it are of different models "
            f"({'; '.join(differing)}): download both again"
        )


def from_official(parts: Mapping[str, State]) -> dict[str, np.ndarray]:
    """Invert `to_official`.

    Returns:
      Arrays with the names of a `VJEPA2Model`; with a classifier, with those of a
      `VJEPA2ForVideoClassification`.
    """
    depths = {p: count_numbered(parts[p], b) for _, p, b in _BLOCKS if p in parts}
    if "classifier" in parts:
        depths["classifier"] = count_numbered(parts["classifier"], "pooler.blocks")
    num_tokens = count_numbered(parts.get("predictor", ()), "mask_tokens")
    out: dict[str, np.ndarray] = {}
    for part, name, theirs in _correspondence(parts, depths, num_tokens):
        pieces = np.split(parts[part][name], len(theirs))
        out |= dict(zip(theirs, pieces, strict=True))
    if num_tokens:
        names = [f"{_MASK_TOKENS}.{k}" for k in range(num_tokens)]
        out[_MASK_TOKENS] = np.stack([out.pop(name) for name in names])
    if "classifier" in parts:
        heads = ("pooler.", "classifier.")
        out = {n if n.startswith(heads) else f"vjepa2.{n}": v for n, v in out.items()}
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def mlp_ratio(width: int, hidden: int) -> float:
    """Return the ratio from which transformers, which truncates, computes `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def encoder_config(encoder: VideoEncoder, clip: tuple[int, int]) -> dict[str, Any]:
    """Return the fields of an encoder in `config.json`.

    Args:
      encoder: the module.
      clip: (frames, side in pixels) of the clips.
    """
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["VJEPA2Model"],
        "dtype": "float32",
        "patch_size": encoder.patch_size,
        "tubelet_size": encoder.tubelet_size,
        "frames_per_clip": clip[0],
        "crop_size": clip[1],
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "mlp_ratio": mlp_ratio(encoder.width, encoder.mlp_dim),
    }


def predictor_config(predictor: Predictor) -> dict[str, Any]:
    """Return the fields of a predictor in `config.json`."""
    return {
        "pred_hidden_size": predictor.width,
        "pred_num_hidden_layers": predictor.depth,
        "pred_num_attention_heads": predictor.num_heads,
        "pred_num_mask_tokens": predictor.num_mask_tokens,
        "pred_mlp_ratio": mlp_ratio(predictor.width, predictor.mlp_dim),
    }


def classifier_config(num_classes: int, depth: int, **_: Any) -> dict[str, Any]:
    """Return the fields of an `AttentiveClassifier` in `config.json`.

    Raises:
      UserError: it has several outputs.
    """
    if not num_classes:
        raise UserError("transformers has no probe of several outputs (EK100)")
    labels = {str(i): f"LABEL_{i}" for i in range(num_classes)}
    return {
        "architectures": ["VJEPA2ForVideoClassification"],
        "num_pooler_layers": depth - 1,
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }
