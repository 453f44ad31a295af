"""Names and layouts of official PyTorch weights, and the parameters they correspond to.

A model is a list of rules. Each rule names one of our parameters, the arrays of the
official state dict that make it up, and how they are laid out. The same rules import
and export. Official names are without the wrappers' prefixes (`module.backbone.`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.models.predictor import ActionPredictor, Predictor

State = Mapping[str, np.ndarray]
_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How to turn an official array into ours (`read`) and back (`write`)."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


_SAME = _Layout(lambda x: x, lambda x: x)
_LINEAR = _Layout(lambda x: x.T, lambda x: x.T)  # [out, in] -> [in, out]
_TOKEN = _Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))


def _tubelets(tubelet_size: int, patch_size: int) -> _Layout:
    """Make the layout of a Conv3d's [D, C, t, p, p]: our matrix [t * p * p * C, D]."""

    def read(x):
        return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])

    def write(x):
        shape = (tubelet_size, patch_size, patch_size, -1, x.shape[-1])
        return x.reshape(shape).transpose(4, 3, 0, 1, 2)

    return _Layout(read, write)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters and the official arrays that make it up.

    Attributes:
      ours: path of the parameter, `/` between names.
      theirs: official names; several only where `stacked`.
      layout: of each official array.
      stacked: whether the official arrays are stacked along a leading axis of ours.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: _Layout
    stacked: bool = False


def _linear(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", (f"{theirs}.weight",), _LINEAR),
        Rule(f"{ours}/bias", (f"{theirs}.bias",), _SAME),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(f"{ours}/scale", (f"{theirs}.weight",), _SAME),
        Rule(f"{ours}/bias", (f"{theirs}.bias",), _SAME),
    ]


def _embed(ours: str, theirs: str, tubelet_size: int, patch_size: int) -> list[Rule]:
    layout = _tubelets(tubelet_size, patch_size)
    return [
        Rule(f"{ours}/proj/kernel", (f"{theirs}.proj.weight",), layout),
        Rule(f"{ours}/proj/bias", (f"{theirs}.proj.bias",), _SAME),
    ]


def _stack(theirs: str, depth: int, mlp: str) -> list[Rule]:
    rules = []
    one = _norm("norm1", "norm1") + _norm("norm2", "norm2")
    one += _linear("qkv", "attn.qkv") + _linear("proj", "attn.proj")
    for name in ("fc1", "fc2") if mlp == "gelu" else ("fc1", "fc2", "fc3"):
        one += _linear(name, f"mlp.{name}")
    for rule in one:
        names = tuple(f"{theirs}.{i}.{rule.theirs[0]}" for i in range(depth))
        rules.append(Rule(f"stack/blocks/{rule.ours}", names, rule.layout, True))
    return rules


def _modality() -> list[Rule]:
    names = ("img_mod_embed", "video_mod_embed")
    return [Rule("modality", names, _TOKEN, stacked=True)]


def encoder_rules(model: VideoEncoder) -> list[Rule]:
    """Return the rules of an encoder."""
    rules = _embed("embed", "patch_embed", model.tubelet_size, model.patch_size)
    if model.image_embed:
        rules += _embed("image_embed", "patch_embed_img", 1, model.patch_size)
        rules += _modality()
    rules += _stack("blocks", model.depth, model.mlp)
    for level in range(len(model.levels)):
        rules += _norm(f"norm_{level}", f"norms_block.{level}")
    return rules if model.levels else rules + _norm("norm", "norm")


def predictor_rules(model: Predictor) -> list[Rule]:
    """Return the rules of a predictor."""
    names = tuple(f"mask_tokens.{k}" for k in range(model.num_mask_tokens))
    rules = [Rule("mask_tokens", names, _TOKEN, stacked=True)]
    if model.input_dim:
        rules += _linear("input", "predictor_embed.0")
        rules += _linear("embed", "predictor_embed.2")
    else:
        rules += _linear("embed", "predictor_embed")
    if model.image_embed:
        rules += _modality()
    rules += _stack("predictor_blocks", model.depth, model.mlp)
    rules += _norm("norm", "predictor_norm") + _linear("proj", "predictor_proj")
    if model.predict_context:
        rules += _linear("proj_context", "predictor_proj_context")
    return rules


def action_predictor_rules(model: ActionPredictor) -> list[Rule]:
    """Return the rules of V-JEPA 2-AC's predictor."""
    rules = _linear("embed", "predictor_embed")
    for name in ("action", "state", "extrinsics"):
        rules += _linear(name, f"{name}_encoder")
    rules += _stack("predictor_blocks", model.depth, model.mlp)
    return rules + _norm("norm", "predictor_norm") + _linear("proj", "predictor_proj")


def classifier_rules(model: AttentiveClassifier) -> list[Rule]:
    """Return the rules of an attentive probe."""
    cross = "pooler.cross_attention_block"
    attend = f"{cross}.xattn" if model.complete_block else cross
    rules = [Rule("query", ("pooler.query_tokens",), _SAME)]
    rules += _linear("q", f"{attend}.q") + _linear("kv", f"{attend}.kv")
    if model.blocks_on_query:
        rules += _linear("proj", f"{attend}.proj")
    if model.complete_block:
        rules += _norm("norm1", f"{cross}.norm1") + _norm("norm2", f"{cross}.norm2")
        rules += _linear("fc1", f"{cross}.mlp.fc1") + _linear("fc2", f"{cross}.mlp.fc2")
    if model.depth > 1:
        rules += _stack("pooler.blocks", model.depth - 1, "gelu")
    for name, _ in model.outputs:
        rules += _linear(f"{name}_linear", f"{name}_classifier")
    return rules if model.outputs else rules + _linear("linear", "linear")


_FIXED_TABLE = "a fixed table: computed again or, with rotations, not used"
# Official arrays without a parameter of ours, with the reason.
IGNORED = {"pos_embed": _FIXED_TABLE, "predictor_pos_embed": _FIXED_TABLE}

# Parts of names that wrappers add: of `DistributedDataParallel`, of the official code,
# of `torch.compile`, of `FullyShardedDataParallel`, of activation checkpointing.
_WRAPPERS = frozenset(
    (
        "module",
        "backbone",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    )
)


def strip_prefixes(state: State, model: str = "") -> dict[str, np.ndarray]:
    """Remove from names what wrappers add, at the front or further inside.

    Args:
      state: arrays by name.
      model: a further prefix to remove: the name of the model in a larger one.

    Raises:
      UserError: two names are the same without their prefixes.
    """
    stripped = {}
    for name, value in state.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        short = ".".join(parts[1:] if parts[:1] == [model] else parts)
        if short in stripped:
            raise UserError(f"two of the weights are {short} without their prefixes")
        stripped[short] = value
    return stripped


def count_numbered(names: Iterable[str], prefix: str) -> int:
    """Return how many numbered entries `prefix.0`, `prefix.1`, ... names have."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)(\.|$)")
    numbers = [int(match[1]) for name in names if (match := pattern.match(name))]
    return 1 + max(numbers, default=-1)


def import_state(
    rules: list[Rule], state: State, shapes: Any, what: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Make our parameters from an official state dict.

    Args:
      rules: of the model.
      state: official arrays by name, without prefixes.
      shapes: shapes of our parameters, a nested dict of objects with `shape`.
      what: the model's name, for messages.

    Returns:
      (params, ignored): nested dict of float32 arrays; official names that are not
      used, with the reason.

    Raises:
      UserError: names are missing, unknown, or of another shape; ten are listed.
    """
    problems: list[str] = []
    used: set[str] = set()
    params: dict[str, Any] = {}
    for rule in rules:
        used |= set(rule.theirs)
        missing = [name for name in rule.theirs if name not in state]
        if missing:
            problems += [f"{name}: missing" for name in missing]
            continue
        try:
            parts = [rule.layout.read(np.asarray(state[name])) for name in rule.theirs]
        except ValueError:  # another number of axes
            problems += [
                f"{name}: {state[name].shape} does not make {rule.ours}"
                for name in rule.theirs
            ]
            continue
        if len({part.shape for part in parts}) > 1:
            problems.append(f"{rule.theirs[0]}: its layers differ in shape")
            continue
        value = np.stack(parts) if rule.stacked else parts[0]
        node, wanted = params, shapes
        *parents, leaf = rule.ours.split("/")
        for parent in parents:
            node, wanted = node.setdefault(parent, {}), wanted[parent]
        if value.shape != wanted[leaf].shape:
            problems.append(
                f"{rule.theirs[0]}: {state[rule.theirs[0]].shape} makes {rule.ours} of "
                f"{value.shape}, the model has {wanted[leaf].shape}"
            )
        node[leaf] = np.ascontiguousarray(value, dtype=np.float32)
    ignored = {name: IGNORED[name] for name in state if name in IGNORED}
    left = sorted(set(state) - used - set(ignored))
    problems += [f"{name}: unknown, of shape {state[name].shape}" for name in left]
    if problems:
        listed = problems[:_MAX_LISTED]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise UserError(
            f"the weights do not fit {what} ({len(problems)} names):\n  "
            + "\n  ".join(listed)
        )
    return params, ignored


def export_state(rules: list[Rule], params: Any) -> dict[str, np.ndarray]:
    """Make the official state dict, without prefixes, of our parameters."""
    state = {}
    for rule in rules:
        value = params
        for name in rule.ours.split("/"):
            value = value[name]
        parts = np.asarray(value) if rule.stacked else [np.asarray(value)]
        for name, part in zip(rule.theirs, parts, strict=True):
            state[name] = np.ascontiguousarray(rule.layout.write(part))
    return state
