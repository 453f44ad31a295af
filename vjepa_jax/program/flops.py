"""Count the FLOPs of a V-JEPA update analytically; list the peaks of known devices.

Only matrix multiplications count, two FLOPs per multiply-add, as in the usual model
FLOPs utilisation: no norms, softmax or activations (1 to 2 % at real sizes), and no
recomputation. The compiler's own count is not used, since it counts the body of a
scanned stack once.
"""

import dataclasses
from collections.abc import Sequence

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets.
_TPU_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
# GPU names carry form factor and memory ("NVIDIA H100 80GB HBM3"): first match counts.
_GPU_PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Size of a stack of blocks, with the field names of the models.

    Attributes:
      depth: number of blocks.
      width: channels.
      mlp_dim: hidden channels of the MLP.
      mlp: `gelu` has two matrices, `swiglu` three.
    """

    depth: int
    width: int
    mlp_dim: int
    mlp: str = "gelu"

    def forward(self, num_tokens: int) -> int:
        """Count the FLOPs of the blocks on one sequence with full attention."""
        columns = 4 * self.width + (2 if self.mlp == "gelu" else 3) * self.mlp_dim
        projections = 2 * num_tokens * self.width * columns
        attention = 4 * num_tokens**2 * self.width
        return self.depth * (projections + attention)


def embed_flops(num_tokens: int, patch_dim: int, width: int) -> int:
    """Count the FLOPs of embedding `num_tokens` tubelets of `patch_dim` values."""
    return 2 * num_tokens * patch_dim * width


def encoder_flops(encoder: Transformer, num_tokens: int, patch_dim: int) -> int:
    """Count the FLOPs of the encoder's forward pass on all tokens of one clip."""
    embed = embed_flops(num_tokens, patch_dim, encoder.width)
    return embed + encoder.forward(num_tokens)


def predictor_flops(
    predictor: Transformer,
    num_context: int,
    num_target: int,
    feature_dim: int,
    input_dim: int = 0,
    predict_context: bool = False,
    out_dim: int = 0,
) -> int:
    """Count the FLOPs of the predictor's forward pass for one mask of one clip.

    Args:
      predictor: its blocks, which attend to context and target tokens together.
      num_context: tokens from the encoder.
      num_target: tokens to predict.
      feature_dim: channels of the context tokens.
      input_dim: channels of a hidden layer before the input projection; 0: none.
      predict_context: whether the features of context tokens are also predicted.
      out_dim: channels of the predictions; 0: those of the context tokens.
    """
    if input_dim:
        read = feature_dim * input_dim + input_dim * predictor.width
    else:
        read = feature_dim * predictor.width
    num_written = num_target + num_context * predict_context
    projections = num_context * read
    projections += num_written * predictor.width * (out_dim or feature_dim)
    return 2 * projections + predictor.forward(num_context + num_target)


def train_step_flops(
    encoder: Transformer,
    predictor: Transformer,
    *,
    num_tokens: int,
    patch_dim: int,
    masks: Sequence[tuple[int, int]],
    feature_dim: int | None = None,
    input_dim: int = 0,
    predict_context: bool = False,
    out_dim: int = 0,
    target: Transformer | None,
) -> int:
    """Count the FLOPs of one update, per clip.

    The target encoder runs forward on all tokens; for each mask, the context encoder
    and the predictor run forward and backward, where backward costs twice forward.

    Args:
      encoder: blocks of the encoder.
      predictor: blocks of the predictor.
      num_tokens: tokens of the full clip.
      patch_dim: values in a tubelet, e.g. 2 * 16 * 16 * 3.
      masks: (num_context, num_target) of each mask that a clip gets.
      feature_dim: channels of the features, all levels; None: the encoder's width.
      input_dim, predict_context, out_dim: see `predictor_flops`.
      target: blocks of the target encoder; None: no target encoder runs.
    """
    feature_dim = feature_dim or encoder.width
    total = encoder_flops(target, num_tokens, patch_dim) if target else 0
    for counts in masks:
        # Pixels take no gradient, so the backward pass of the embedding costs its
        # forward pass once.
        total += 2 * embed_flops(counts[0], patch_dim, encoder.width)
        total += 3 * encoder.forward(counts[0])
        total += 3 * predictor_flops(
            predictor, *counts, feature_dim, input_dim, predict_context, out_dim
        )
    return total


def peak_flops(device_kind: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of one device; None if unknown."""
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind]
    return next((peak for name, peak in _GPU_PEAKS if name in device_kind), None)
