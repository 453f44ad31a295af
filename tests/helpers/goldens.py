"""Golden files: what the official code computed, its weights and its settings."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.run import conversion
from vjepa_jax.weights import files, official, rules

COMMITTED = pathlib.Path(__file__).parents[1] / "goldens"
FOLDER = pathlib.Path(os.environ.get("VJEPA_GOLDENS", COMMITTED))
NAMES = sorted(path.stem for path in COMMITTED.glob("*.npz"))

# Official code of which there is nothing here yet: (family, key of `__meta__`).
NOT_YET = {
    ("levjepa", "sigreg"): "views of a clip are not trained yet",
    ("vjepa2_ac", "auto_steps"): "predictors of actions are not trained yet",
}

# Every key that a golden may have: an option that the tests do not know must fail.
_KNOWN = {
    *("name", "family", "layout", "note", "clips", "losses", "steps", "norm_eps"),
    *("img_size", "num_frames", "clip_frames", "patch_size", "tubelet_size"),
    *("clip_seed", "clip_shape", "eval_clip_shape", "image_mode"),
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "use_silu", "wide_silu"),
    *("predictor_dim", "predictor_depth", "predictor_heads", "predictor_mlp_ratio"),
    *("use_pred_silu", "num_mask_tokens", "mask_token_index"),
    *("pos", "interpolate_rope", "hierarchical_layers"),
    *("optimizer", "loss_exp", "reg_coeff", "lambda_context"),
    *("weight_distance_loss", "offset_context_loss"),
    *("use_extrinsics", "num_classes", "complete_block"),
}


class Golden:
    """A golden file.

    Attributes:
      meta: its settings.
      arrays: what was computed, and the token masks.
      content: the weights by model, as an official file holds them.
    """

    def __init__(self, path: pathlib.Path):
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        self.meta = json.loads(str(arrays.pop("__meta__")))
        self.arrays: dict[str, np.ndarray] = {}
        self.content: dict[str, dict[str, np.ndarray]] = {}
        for name, value in arrays.items():
            model, _, key = name.partition("/")
            if key:
                self.content.setdefault(model, {})[key] = value
            else:
                self.arrays[name] = value
        heads = self.meta.get("num_heads", 0)
        self.hints = official.Hints("", heads, self.meta.get("predictor_heads", heads))

    @classmethod
    def named(cls, name: str) -> "Golden":
        """Read a committed file."""
        return cls(COMMITTED / f"{name}.npz")

    def require_known(self) -> None:
        """Fail on an option that the tests do not know."""
        unknown = set(self.meta) - _KNOWN
        assert not unknown, f"options that this test does not know: {unknown}"

    def reason_to_skip(self) -> str:
        """Return why there is nothing to compare yet; "" where there is."""
        reasons = [
            reason
            for (family, key), reason in NOT_YET.items()
            if self.meta.get("family") == family and key in self.meta
        ]
        return reasons[0] if reasons else ""

    @property
    def states(self) -> dict[str, dict[str, np.ndarray]]:
        """The weights by model, without the wrappers' prefixes."""
        return {k: rules.strip_prefixes(v) for k, v in self.content.items()}

    def clips(self, step: int, shape: str = "clip_shape") -> jax.Array:
        """Return the clips of a step as [B, T, H, W, 3], normalised."""
        rng = np.random.default_rng(self.meta["clip_seed"] * 1000 + step)
        clips = rng.standard_normal(self.meta[shape], dtype=np.float32)
        return jnp.asarray(clips.transpose(0, 2, 3, 4, 1))

    def eval_clips(self) -> np.ndarray:
        """Return the clips of the evaluation as [B, T, H, W, 3], normalised."""
        return np.asarray(self.clips(999, "eval_clip_shape"))

    def masks(self, step: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return {mask: (ctx_idx, tgt_idx)} of a step."""
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        while f"step{step}_ctx{len(found)}" in self.arrays:
            j = len(found)
            found[str(j)] = (
                self.arrays[f"step{step}_ctx{j}"],
                self.arrays[f"step{step}_tgt{j}"],
            )
        assert found
        return found

    def file(self, key: str = "") -> files.WeightFile:
        """Return the weights as `files.read` reads them from an official file."""
        return files.sort_parts(self.content, "x.pt", key)

    def converted(self, key: str = "") -> conversion.Converted:
        """Return the weights as a checkpoint of ours."""
        return conversion.import_file(self.file(key), self.hints)
