"""Analytic FLOPs of a V-JEPA update, and the peak of known devices.

Counted are matrix multiplications, two FLOPs per multiply-add, as in the usual model
FLOPs utilisation: no norms, softmax or activations (1 to 2 % at real sizes), and no
recomputation by rematerialisation. The compiler's own count is no substitute, since it
counts the body of a scanned stack once.
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
    """Size of a stack of blocks; the fields are those of the models.

    Attributes:
      depth: number of blocks.
      width: channels.
      mlp_dim: hidden channels of the MLP.
    """

    depth: int
    width: int
    mlp_dim: int

    def forward(self, num_tokens: int) -> int:
        """FLOPs of the blocks on one sequence with full attention."""
        projections = 2 * num_tokens * self.width * (4 * self.width + 2 * self.mlp_dim)
        attention = 4 * num_tokens**2 * self.width
        return self.depth * (projections + attention)


def embed_flops(num_tokens: int, patch_dim: int, width: int) -> int:
    """FLOPs of the tubelet embedding of one clip.

    Args:
      num_tokens: tubelets that are embedded.
      patch_dim: values in a tubelet, e.g. 2 * 16 * 16 * 3.
      width: channels of the encoder.
    """
    return 2 * num_tokens * patch_dim * width


def encoder_flops(encoder: Transformer, num_tokens: int, patch_dim: int) -> int:
    """FLOPs of the encoder's forward pass on all `num_tokens` of one clip."""
    embed = embed_flops(num_tokens, patch_dim, encoder.width)
    return embed + encoder.forward(num_tokens)


def predictor_flops(
    predictor: Transformer, num_context: int, num_target: int, encoder_width: int
) -> int:
    """FLOPs of the predictor's forward pass for one mask of one clip.

    Args:
      predictor: its blocks, which see context and target tokens together.
      num_context: tokens that come from the encoder.
      num_target: tokens to predict; only they are projected back.
      encoder_width: channels of the context tokens and of the predictions.
    """
    projections = 2 * (num_context + num_target) * encoder_width * predictor.width
    return projections + predictor.forward(num_context + num_target)


def train_step_flops(
    encoder: Transformer,
    predictor: Transformer,
    *,
    num_tokens: int,
    patch_dim: int,
    masks: Sequence[tuple[int, int]],
) -> int:
    """FLOPs of one update, per clip.

    The target encoder runs forward on all tokens; for each mask, the context encoder
    and the predictor run forward and backward, where backward costs twice forward.

    Args:
      encoder: blocks of the encoder, hence of the target encoder.
      predictor: blocks of the predictor.
      num_tokens: tokens of the whole clip.
      patch_dim: values in a tubelet.
      masks: (num_context, num_target) of each mask that a clip gets.
    """
    # All tubelets are embedded before the context is gathered. Pixels take no gradient,
    # so the backward pass of the embedding costs its forward pass once.
    embed = 2 * embed_flops(num_tokens, patch_dim, encoder.width)
    total = encoder_flops(encoder, num_tokens, patch_dim)
    for num_context, num_target in masks:
        total += embed + 3 * encoder.forward(num_context)
        total += 3 * predictor_flops(predictor, num_context, num_target, encoder.width)
    return total


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device by its `device_kind`; None if unknown."""
    if device_kind in _TPU_PEAKS:
        return _TPU_PEAKS[device_kind]
    return next((peak for name, peak in _GPU_PEAKS if name in device_kind), None)
