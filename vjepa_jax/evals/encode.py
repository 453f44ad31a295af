"""Features of videos from a checkpoint, in one call: `load_encoder`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.saved import restored
from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint

# video -> float32 features [B, T', H', W', D]
Encode = Callable[[np.ndarray], np.ndarray]


def make_encode(
    encoder: VideoEncoder, params: Any, out_layers: tuple[int, ...] = ()
) -> Encode:
    """Make the function from clips to an encoder's features.

    It takes uint8 [B, T, H, W, 3], or float of the same shape, normalised already, and
    returns float32 [B, T', H', W', D], D being the channels of all `out_layers` where
    there are any. Every new shape compiles once.
    """

    @jax.jit
    def apply(params, video):
        if video.dtype == jnp.uint8:
            video = normalise(video)
        tokens = encoder.apply({"params": params}, video, out_layers=out_layers)
        if out_layers:
            tokens = jnp.concatenate([*tokens], axis=-1)
        shape = (len(video), *encoder.grid(video.shape), -1)
        return tokens.reshape(shape).astype(jnp.float32)

    return lambda video: np.asarray(apply(params, video))


class LoadedEncoder:
    """A frozen encoder: call it with a video to get features.

    Attributes:
      encoder: the module.
      params: its parameters.
      meta: the checkpoint's description, with the config under `config`.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        params: Any,
        meta: dict[str, Any],
        out_layers: tuple[int, ...] = (),
    ):
        """Takes what the attributes are, and the blocks whose outputs to give."""
        self.encoder, self.params, self.meta = encoder, params, meta
        self._encode = make_encode(encoder, params, out_layers)

    def __call__(self, video: np.ndarray) -> np.ndarray:
        """Encode a video.

        Args:
          video: uint8 RGB [B, T, H, W, 3], or without B, or one frame [H, W, 3], of any
            length and size. What does not fill a last tubelet in time, height or width
            is left out, as by the official code's convolution. Frames alone (T of 1)
            take the image embedding where there is one (V-JEPA 2.1) and are repeated to
            a whole tubelet otherwise. A float video is taken as normalised already.

        Returns:
          Layer-normalised features, float32 [B, T', H', W', D]; B is 1 where there was
          none.

        Raises:
          UserError: the video is none, or smaller than a tubelet.
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
        video = video[(None,) * (5 - video.ndim)]
        if video.shape[1] == 1 and not self.encoder.image_embed:
            video = np.repeat(video, self.encoder.tubelet_size, axis=1)
        if 0 in video.shape:
            raise UserError(f"a video of shape {video.shape} is empty")
        encoder = self.encoder
        unit = 1 if encoder.is_image(video.shape) else encoder.tubelet_size
        sides = (unit, encoder.patch_size, encoder.patch_size)
        whole = [n - n % side for n, side in zip(video.shape[1:4], sides, strict=True)]
        if 0 in whole:
            t, h, w = video.shape[1:4]
            raise UserError(
                f"a clip of {t} frames of {h}x{w} is smaller than a tubelet of "
                f"{unit}x{encoder.patch_size}x{encoder.patch_size}: enlarge it"
            )
        return self._encode(video[:, : whole[0], : whole[1], : whole[2]])


def load_encoder(
    path: str,
    step: int | None = None,
    dtype: str | None = None,
    all_levels: bool = False,
    out_layers: tuple[int, ...] = (),
) -> LoadedEncoder:
    """Load the target encoder of a checkpoint, converted or trained here.

    Args:
      path: the folder of a conversion or of a run (its workdir).
      step: a saved step; None takes the latest.
      dtype: of the computation, `float32` or `bfloat16`; None as the config says.
      all_levels: V-JEPA 2.1: the features of all its levels, in the channels, instead
        of the last one's.
      out_layers: blocks, counted from 0, whose outputs are given instead, each through
        the last layer norm, side by side in the channels.

    Raises:
      UserError: there is no such checkpoint, it is of a probe, or the encoder has no
        such block.
    """
    params, meta = checkpoint.restore_target(path, step)
    if "config" not in meta:
        raise UserError(f"{path} holds a {meta.get('kind')}, not an encoder")
    encoder, _ = build.make_models(restored(meta["config"]))
    if dtype is not None:
        encoder = encoder.clone(dtype=jnp.dtype(dtype))
    if encoder.levels:
        encoder = encoder.clone(output_levels=0 if all_levels else 1)
    out_layers = tuple(out_layers)
    if any(not 0 <= layer < encoder.depth for layer in out_layers):
        raise UserError(
            f"out_layers={out_layers}: the blocks are 0 to {encoder.depth - 1}"
        )
    return LoadedEncoder(encoder, params, meta, out_layers)
