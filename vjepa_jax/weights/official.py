"""Make the config of the model that official weights belong to.

The arrays show depths, widths and kinds of layers, but not the number of heads. For
published sizes it follows from the width; for other sizes the user states it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict, get_config
from vjepa_jax.models import positions, registry
from vjepa_jax.weights.rules import State, count_numbered

FAMILIES = ("vjepa", "vjepa2", "vjepa2_1")
ACTION_FAMILY = "vjepa2_ac"
# The blocks that V-JEPA 2.1 supervises, by depth.
_LEVELS = {
    12: (2, 5, 8, 11),
    24: (5, 11, 17, 23),
    40: (9, 19, 29, 39),
    48: (11, 23, 37, 47),
}
_PREDICTOR_HEADS = {
    "vjepa2": {384: 12},
    "vjepa2_1": {384: 12},
    ACTION_FAMILY: {1024: 16},
}
_PROBE_HEADS = 16  # of every official probe
# Outputs of a probe of action anticipation (EK100), in the order of its queries.
_ANTICIPATED = ("verb", "noun", "action")
# {number of mask tokens in public files: family}; V-JEPA has one per mask type.
_FAMILY_BY_MASK_TOKENS = {2: "vjepa", 10: "vjepa2"}
_FRAMES, _RESOLUTION = 16, 256  # of a clip, where the file does not state them


@dataclasses.dataclass(frozen=True)
class Hints:
    """What the user states about a model; "" or 0: not stated."""

    family: str = ""
    num_heads: int = 0
    predictor_heads: int = 0


def _require_array(state: State, name: str, what: str, ndim: int) -> np.ndarray:
    if name not in state:
        raise UserError(f"the weights of the {what} have no '{name}'")
    if state[name].ndim != ndim:
        raise UserError(
            f"'{name}' of the {what} has the shape {state[name].shape}: expected "
            f"{ndim} axes"
        )
    return state[name]


def _table_grid(table: np.ndarray) -> positions.Grid | None:
    """Return the grid of a position table [1, N, D]; None if it is not V-JEPA's."""
    if table.ndim != 3 or len(table) != 1 or table.size == 0:
        return None
    table, axis_dim = table[0], 2 * -(-table.shape[-1] // 6)

    def run_length(
        rows, axis
    ):  # number of leading rows that equal the first on an axis
        part = rows[:, axis * axis_dim : (axis + 1) * axis_dim]
        same = np.isclose(part, part[0], rtol=0, atol=1e-4).all(1)
        return len(rows) if same.all() else int(same.argmin())

    places = run_length(table, 0)
    columns = run_length(table[:places], 1)
    grid = len(table) // places, places // columns, columns
    if math.prod(grid) != len(table):
        return None
    ours = positions.sincos_table(grid, table.shape[-1])
    return grid if np.allclose(ours, table, rtol=0, atol=1e-4) else None


def has_actions(predictor: State) -> bool:
    """Return whether a predictor is action-conditioned."""
    return "action_encoder.weight" in predictor


def infer_family(encoder: State, predictor: State) -> str:
    """Infer the family from names, mask tokens and V-JEPA's position table.

    Raises:
      UserError: the weights may be of V-JEPA or of V-JEPA 2.
    """
    if has_actions(predictor):
        return ACTION_FAMILY
    if any(n.startswith(("norms_block.", "patch_embed_img.")) for n in encoder):
        return "vjepa2_1"
    if "pos_embed" not in encoder:
        return "vjepa2"
    # Public files of V-JEPA 2 hold the table too, but do not use it.
    family = _FAMILY_BY_MASK_TOKENS.get(count_numbered(predictor, "mask_tokens"))
    if family == "vjepa2" or (family == "vjepa" and _table_grid(encoder["pos_embed"])):
        return family
    raise UserError(
        "these weights may be of V-JEPA or of V-JEPA 2: choose with --family=vjepa or "
        "--family=vjepa2"
    )


def _mlp_of(state: State, blocks: str, width: int, what: str) -> tuple[str, int]:
    """Return the kind and the hidden channels that `registry.mlp_fields` takes."""
    hidden = len(_require_array(state, f"{blocks}.0.mlp.fc1.weight", what, 2))
    if f"{blocks}.0.mlp.fc3.weight" not in state:
        return "gelu", hidden
    if hidden == 4 * width:
        return "swiglu", hidden
    for given in (4 * width, 3 * hidden // 2):
        if registry.mlp_fields("swiglu_wide", given)["mlp_dim"] == hidden:
            return "swiglu_wide", given
    return "swiglu", hidden


def _num_heads(width: int, given: int, known: Mapping[int, int], flag: str) -> int:
    heads = given or known.get(width, 0)
    if not heads:
        raise UserError(
            f"weights do not show the number of heads, and {width} channels are not a "
            f"published size: give --{flag}"
        )
    if width % heads:
        raise UserError(f"--{flag}={heads} does not divide {width} channels")
    return heads


def make_config(
    family: str,
    encoder: State,
    predictor: State,
    hints: Hints,
    clip: tuple[int, int] | None = None,
) -> ConfigDict:
    """Make the config from which `build.make_models` makes the models of the weights.

    Args:
      family: one of `FAMILIES`, or `ACTION_FAMILY`.
      encoder, predictor: official arrays without prefixes; `predictor` may be empty.
      hints: what the user states.
      clip: (frames, side in pixels) of the clips; None: unknown.

    Raises:
      UserError: an array that this depends on is missing, or the number of heads is
        unknown.
    """
    config = get_config()
    model = config.model
    patches = _require_array(encoder, "patch_embed.proj.weight", "encoder", 5)
    width, _, tubelet_size, patch_size, side = patches.shape
    if patch_size != side:
        raise UserError(f"patches of {patch_size}x{side} pixels are not square")
    depth = count_numbered(encoder, "blocks")
    model.mlp, mlp_dim = _mlp_of(encoder, "blocks", width, "encoder")
    known = {s.width: s.num_heads for s in registry.SIZES.values()}
    heads = _num_heads(width, hints.num_heads, known, "num_heads")
    model.encoder.size = registry.name_of(registry.Size(depth, width, heads, mlp_dim))
    model.encoder.patch_size, model.encoder.tubelet_size = patch_size, tubelet_size
    model.dtype, model.scale_init = "float32", family != "vjepa"
    model.pos_embed = {"vjepa": "sincos", "vjepa2_1": "rope"}.get(family, "rope_tiled")
    frames, resolution = clip or (_FRAMES, _RESOLUTION)
    config.data.num_frames = max(frames // tubelet_size, 1) * tubelet_size
    config.data.resolution = max(resolution // patch_size, 1) * patch_size
    if family == "vjepa":
        grid = _table_grid(_require_array(encoder, "pos_embed", "encoder", 3))
        if grid is None:
            raise UserError("'pos_embed' of the encoder is not V-JEPA's table")
        model.base_grid = grid
        config.data.num_frames = grid[0] * tubelet_size
        config.data.resolution = grid[1] * patch_size
    if family == "vjepa2_1":
        model.image_embed = "patch_embed_img.proj.weight" in encoder
        # Positions are interpolated to the grid of 256 pixels at any resolution.
        model.base_grid = (1, 256 // patch_size, 256 // patch_size)
        if depth not in _LEVELS:
            raise UserError(
                f"V-JEPA 2.1 has no encoder of {depth} blocks: "
                f"{', '.join(map(str, _LEVELS))} are known"
            )
        model.encoder.levels = _LEVELS[depth]
    if predictor and family != ACTION_FAMILY:
        _fill_predictor(config, family, predictor, width, heads, hints)
    return config


def _fill_predictor(
    config: ConfigDict,
    family: str,
    state: State,
    encoder_width: int,
    encoder_heads: int,
    hints: Hints,
) -> None:
    """Fill in the predictor's part of a config."""
    fields, levels = config.model.predictor, config.model.encoder.levels
    fields.deep_input = "predictor_embed.0.weight" in state
    embed = "predictor_embed.2" if fields.deep_input else "predictor_embed"
    first = "predictor_embed.0" if fields.deep_input else "predictor_embed"
    fields.width = len(_require_array(state, f"{embed}.weight", "predictor", 2))
    inputs = _require_array(state, f"{first}.weight", "predictor", 2).shape[1]
    if levels and inputs < encoder_width * len(levels):
        config.model.encoder.output_levels = max(inputs // encoder_width, 1)
    known = _PREDICTOR_HEADS.get(family, {fields.width: encoder_heads})
    fields.num_heads = _num_heads(
        fields.width, hints.predictor_heads, known, "predictor_heads"
    )
    fields.depth = count_numbered(state, "predictor_blocks")
    mlp, _ = _mlp_of(state, "predictor_blocks", fields.width, "predictor")
    fields.mlp = mlp if mlp != config.model.mlp else ""
    fields.num_mask_tokens = max(count_numbered(state, "mask_tokens"), 1)
    per = {"vjepa": "mask", "vjepa2": "stream", "vjepa2_1": "run"}[family]
    fields.mask_token_per = per if fields.num_mask_tokens > 1 else "run"
    fields.predict_context = "predictor_proj_context.weight" in state
    fields.out_dim = len(_require_array(state, "predictor_proj.weight", "predictor", 2))
    if fields.out_dim == inputs:
        fields.out_dim = 0


def action_predictor_fields(state: State, hints: Hints) -> dict[str, Any]:
    """Return the arguments of `registry.make_action_predictor`, see `make_config`."""
    what = "predictor"
    width, _ = _require_array(state, "predictor_embed.weight", what, 2).shape
    _require_array(state, "action_encoder.weight", what, 2)
    known = _PREDICTOR_HEADS[ACTION_FAMILY]
    return {
        "depth": count_numbered(state, "predictor_blocks"),
        "width": width,
        "num_heads": _num_heads(width, hints.predictor_heads, known, "predictor_heads"),
        "out_dim": len(_require_array(state, "predictor_proj.weight", what, 2)),
        "mlp": _mlp_of(state, "predictor_blocks", width, what)[0],
        "use_extrinsics": False,  # the file has its layer in any case
    }


def classifier_fields(state: State, hints: Hints) -> dict[str, Any]:
    """Return the fields of `heads.AttentiveClassifier`, see `make_config`."""
    width = _require_array(state, "pooler.query_tokens", "probe", 3).shape[-1]
    published = {s.width: _PROBE_HEADS for s in registry.SIZES.values() if s.depth > 11}
    cross = "pooler.cross_attention_block"
    # Only V-JEPA 1's cross-attention has an output projection; it is never used.
    is_first = any(f"{cross}.{n}.weight" in state for n in ("xattn.proj", "proj"))
    outputs = {
        name: len(_require_array(state, f"{name}_classifier.weight", "probe", 2))
        for name in _ANTICIPATED
        if f"{name}_classifier.weight" in state
    }
    num_classes = (
        0 if outputs else len(_require_array(state, "linear.weight", "probe", 2))
    )
    return {
        "num_classes": num_classes,
        "outputs": tuple(outputs.items()),
        "num_heads": _num_heads(width, hints.num_heads, published, "num_heads"),
        "depth": 1 + count_numbered(state, "pooler.blocks"),
        "blocks_on_query": is_first,
        "complete_block": f"{cross}.norm1.weight" in state,
    }


def family_of(config: ConfigDict) -> str:
    """Return the official family whose code computes a config's models.

    Raises:
      UserError: no official code computes them.
    """
    model = config.model
    patch_size, grid = model.encoder.patch_size, tuple(model.base_grid)
    is_2_1 = bool(model.encoder.levels) and model.image_embed
    if is_2_1 and model.pos_embed == "rope":
        if grid[1:] == (256 // patch_size,) * 2:
            return "vjepa2_1"
    elif not (model.encoder.levels or model.image_embed):
        if model.pos_embed == "sincos":
            return "vjepa"
        if model.pos_embed == "rope_tiled" and not grid:
            return "vjepa2"
    raise UserError(
        "no official code computes this model: config.model has "
        f"pos_embed='{model.pos_embed}', levels={tuple(model.encoder.levels)}, "
        f"image_embed={model.image_embed}, base_grid={grid}"
    )
