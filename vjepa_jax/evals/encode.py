"""Features of videos from a checkpoint, in one call: `load_encoder`."""

from typing import Any

import jax
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.saved import restored
from vjepa_jax.evals import frozen
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.functional import computation_dtype
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint


class LoadedEncoder:
    """A frozen encoder: call it with a video to get features.

    Attributes:
      encoder: the module.
      params: its parameters.
      meta: metadata of the checkpoint, with the config under `config`.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        params: Any,
        meta: dict[str, Any],
        out_layers: tuple[int, ...] = (),
    ):
        """Take the attributes, and the blocks whose outputs to return."""
        self.encoder, self.params, self.meta = encoder, params, meta
        self._out_layers = out_layers

    def __call__(self, video: np.ndarray) -> np.ndarray:
        """Encode a video; every new shape compiles once.

        Args:
          video: uint8 RGB [B, T, H, W, 3], or without B, or one frame [H, W, 3], of any
            length and size. Pixels and frames that do not fill a last tubelet are left
            out, as by the official code's convolution. Frames alone (T of 1) take the
            image embedding where there is one (V-JEPA 2.1); else they are repeated to
            fill a tubelet. A float video is taken as normalised already.

        Returns:
          Layer-normalised features, float32 [B, T', H', W', D], D being the channels
          of all `out_layers` where these were asked for; B is 1 where the video has no
          batch axis.

        Raises:
          UserError: the array is not a video, or is smaller than a tubelet.
        """
        video = np.asarray(video)
        if not (3 <= video.ndim <= 5 and video.shape[-1] == 3):
            raise UserError(
                f"a video of shape {video.shape} is not [B, T, H, W, 3], [T, H, W, 3] "
                "or [H, W, 3]"
            )
        if video.dtype != np.uint8 and not np.issubdtype(video.dtype, np.floating):
            raise UserError(
                f"a video of {video.dtype} is neither uint8 nor normalised floats"
            )
        encoder = self.encoder
        video = video[(None,) * (5 - video.ndim)]
        if video.shape[1] == 1 and not encoder.image_embed:
            video = np.repeat(video, encoder.tubelet_size, axis=1)
        if 0 in video.shape:
            raise UserError(f"a video of shape {video.shape} is empty")
        unit = 1 if encoder.is_image(video.shape) else encoder.tubelet_size
        sides = (unit, encoder.patch_size, encoder.patch_size)
        t, h, w = (
            n - n % side for n, side in zip(video.shape[1:4], sides, strict=True)
        )
        if 0 in (t, h, w):
            frames, height, width = video.shape[1:4]
            raise UserError(
                f"a clip of {frames} frames of {height}x{width} is smaller than a "
                f"tubelet of {unit}x{encoder.patch_size}x{encoder.patch_size}: "
                "enlarge it"
            )
        video = video[:, :t, :h, :w]
        tokens = frozen.encode(
            self.params, video, encoder=encoder, out_layers=self._out_layers
        )
        return np.asarray(tokens).reshape(len(video), *encoder.grid(video.shape), -1)


def load_encoder(
    path: str,
    step: int | None = None,
    dtype: str | None = None,
    all_levels: bool = False,
    out_layers: tuple[int, ...] = (),
) -> LoadedEncoder:
    """Load the target encoder of a checkpoint, converted or trained here.

    Args:
      path: folder of a conversion, or workdir of a run.
      step: a saved step; None: the latest.
      dtype: of the computation, `float32` or `bfloat16`; None: as in the config.
        CPUs compute in float32.
      all_levels: V-JEPA 2.1: return the features of all levels, concatenated in the
        channels, instead of the last level's.
      out_layers: blocks, counted from 0, whose outputs are returned instead, each
        through the last layer norm, concatenated in the channels.

    Raises:
      UserError: there is no such checkpoint, it holds a probe, or the encoder has no
        such block.
    """
    params, meta = checkpoint.restore_target(path, step)
    if "config" not in meta:
        raise UserError(f"{path} holds a {meta.get('kind')}, not an encoder")
    here = jax.default_backend()
    with checkpoint.explain_misfit(path):
        encoder, _ = build.make_models(restored(meta["config"]), here)
    if dtype is not None:
        encoder = encoder.clone(dtype=computation_dtype(dtype, here))
    if encoder.levels:
        encoder = encoder.clone(output_levels=0 if all_levels else 1)
    out_layers = frozen.require_blocks(encoder, out_layers)
    return LoadedEncoder(encoder, params, meta, out_layers)
