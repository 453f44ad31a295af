"""Reading of golden files: what the official code computed, and how it was set."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.weights import rules

# Every key that a golden may have: an option that this test does not know must fail.
KNOWN = {
    "name",
    "family",
    "layout",
    "img_size",
    "num_frames",
    "clip_frames",
    "patch_size",
    "tubelet_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "use_silu",
    "use_pred_silu",
    "wide_silu",
    "predictor_dim",
    "predictor_depth",
    "predictor_heads",
    "num_mask_tokens",
    "pos",
    "mask_token_index",
    "optimizer",
    "loss_exp",
    "reg_coeff",
    "steps",
    "norm_eps",
    "clip_seed",
    "clip_shape",
    "eval_clip_shape",
    "clips",
    "hierarchical_layers",
    "image_mode",
    "weight_distance_loss",
    "offset_context_loss",
    "lambda_context",
    "interpolate_rope",
    "losses",
    "use_extrinsics",
    "note",
    "num_classes",
    "complete_block",
}
KNOWN_OF_OPTIMIZER = {
    "start_lr",
    "lr",
    "final_lr",
    "wd",
    "final_wd",
    "warmup_steps",
    "anneal_steps",
    "total_steps",
    "ema",
    "betas",
    "eps",
    "schedule",
}


class Golden:
    """A golden file: arrays, state dicts without prefixes, and meta data."""

    def __init__(self, path: pathlib.Path):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        self.meta = json.loads(str(arrays.pop("__meta__")))
        unknown = set(self.meta) - KNOWN
        assert not unknown, f"options that this test does not know: {unknown}"
        self.states: dict[str, dict] = {}
        self.arrays = {}
        for name, value in arrays.items():
            model, _, key = name.partition("/")
            if key:
                self.states.setdefault(model, {})[key] = value
            else:
                self.arrays[name] = value
        self.states = {k: rules.strip_prefixes(v) for k, v in self.states.items()}

    def clips(self, step: int, shape: str = "clip_shape") -> jax.Array:
        """Return the clips of a step as [B, T, H, W, 3], normalised."""
        rng = np.random.default_rng(self.meta["clip_seed"] * 1000 + step)
        clips = rng.standard_normal(self.meta[shape], dtype=np.float32)
        return jnp.asarray(clips.transpose(0, 2, 3, 4, 1))

    def masks(self, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {mask: (ctx_idx, tgt_idx)} of a step."""
        found = {}
        while f"step{step}_ctx{len(found)}" in self.arrays:
            j = len(found)
            found[str(j)] = (
                self.arrays[f"step{step}_ctx{j}"],
                self.arrays[f"step{step}_tgt{j}"],
            )
        assert found
        return found
