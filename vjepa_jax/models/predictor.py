"""Predictors: narrow transformers that predict features.

One predicts hidden tokens from visible ones, the other the next frame given actions.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models import functional, layers, positions


class Predictor(nn.Module):
    """Predict the target's features at hidden positions (V-JEPA §3).

    The fields that are not listed here are those of `layers.TransformerConfig`.

    Attributes:
      out_dim: channels of the features to predict.
      num_mask_tokens: learned tokens that stand for hidden ones; V-JEPA learns one per
        mask type.
      input_dim: channels of a hidden layer before the input projection, for features of
        several levels (V-JEPA 2.1); 0: none.
      predict_context: also predict the features of visible tokens, through a separate
        output projection (V-JEPA 2.1).
      image_embed: add a learned embedding of the modality, image or video (V-JEPA 2.1).
      pos_embed, base_grid: see `layers.position_code`.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    out_dim: int
    mlp: str = "gelu"
    scale_init: bool = True
    num_mask_tokens: int = 2
    input_dim: int = 0
    predict_context: bool = False
    image_embed: bool = False
    pos_embed: str = "rope"
    base_grid: positions.Grid | None = None
    norm_eps: float = layers.NORM_EPS
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        context: jax.Array,
        ctx_idx: jax.Array,
        tgt_idx: jax.Array,
        grid: positions.Grid,
        mask_index: int = 0,
        is_image: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Predict features.

        Args:
          context: [B, K, D], the encoder's output for the visible tokens.
          ctx_idx: int [B, K], indices of the visible tokens.
          tgt_idx: int [B, M], indices of the tokens to predict.
          grid: (T, H, W) of the clip.
          mask_index: which mask token stands for the hidden ones.
          is_image: whether to add the image's modality embedding, or the video's.

        Returns:
          In `dtype`: features of the hidden tokens [B, M, out_dim], and with
          `predict_context` those of the visible tokens [B, K, out_dim], else None.
        """
        chex.assert_rank(context, 3)
        chex.assert_shape(ctx_idx, context.shape[:2])
        chex.assert_shape(tgt_idx, (len(context), None))
        chex.assert_type([context, ctx_idx, tgt_idx], [float, int, int])
        mask_tokens = layers.parameter(
            self,
            "mask_tokens",
            nn.initializers.zeros,
            (None, "embed"),
            (self.num_mask_tokens, self.width),
        )
        num_context, num_target = ctx_idx.shape[1], tgt_idx.shape[1]
        x = context
        if self.input_dim:
            x = layers.Dense(
                self.input_dim, ("embed", "mlp"), self.dtype, name="input"
            )(x)
            x = functional.gelu(x)
        x = layers.Dense(self.width, ("embed", "mlp"), self.dtype, name="embed")(x)
        hidden = jnp.broadcast_to(
            mask_tokens[mask_index].astype(self.dtype),
            (x.shape[0], num_target, self.width),
        )
        x = jnp.concatenate([x, hidden], axis=1)
        idx = jnp.concatenate([ctx_idx, tgt_idx], axis=1)
        added, tables = layers.position_code(
            self.pos_embed, idx, grid, self.width, self.num_heads, self.base_grid
        )
        if added is not None:
            x = x + added.astype(self.dtype)
        if self.image_embed:
            x = x + layers.modality(self, self.width, is_image).astype(self.dtype)
        stack = layers.Stack(layers.TransformerConfig.of(self), name="stack")
        x, _ = stack(x, tables)
        if not self.predict_context:
            x = x[:, num_context:]
        x = layers.LayerNorm(self.dtype, self.norm_eps, name="norm")(x)
        axes = ("mlp", "embed")
        proj = layers.Dense(self.out_dim, axes, self.dtype, name="proj")
        if not self.predict_context:
            return proj(x), None
        proj_context = layers.Dense(self.out_dim, axes, self.dtype, name="proj_context")
        return proj(x[:, num_context:]), proj_context(x[:, :num_context])


class ActionPredictor(nn.Module):
    """Predict the next frame's features from frames, actions and states (V-JEPA 2-AC).

    Every frame is a group of tokens: action, state, camera extrinsics if used, then its
    patches. A token attends to its own frame and to earlier ones. Positions are V-JEPA
    2's tiled rotation; tokens other than patches rotate by time only. Columns are
    spread over as many positions as there are rows (official `ACRoPEAttention`).

    The fields that are not listed here are those of `layers.TransformerConfig`.

    Attributes:
      out_dim: channels of the frames' features.
      use_extrinsics: whether the camera's extrinsics are given. Their projection always
        has parameters, as in the official checkpoints.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    out_dim: int
    mlp: str = "gelu"
    use_extrinsics: bool = False
    norm_eps: float = layers.NORM_EPS
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        actions: jax.Array,
        states: jax.Array,
        extrinsics: jax.Array | None,
        grid: positions.Grid,
    ) -> jax.Array:
        """Predict, at every frame, the features of the next one.

        Args:
          tokens: [B, T * H * W, D], features of the frames, each encoded by itself.
          actions: [B, T, A], the action at each frame.
          states: [B, T, A], the robot's pose at each frame.
          extrinsics: [B, T, A - 1], the camera's pose; None where it is not used.
          grid: (T, H, W) of `tokens`.

        Returns:
          [B, T * H * W, out_dim] in `dtype`.
        """
        frames, height, width = grid
        batch, patches = len(tokens), height * width
        chex.assert_shape(tokens, (batch, frames * patches, None))
        chex.assert_shape([actions, states], (batch, frames, None))

        def project(name, x):
            axes = ("embed", "mlp")
            return layers.Dense(self.width, axes, self.dtype, name=name)(x)

        x = project("embed", tokens).reshape(batch, frames, patches, self.width)
        groups = [project("action", actions), project("state", states)]
        if self.is_initializing() or self.use_extrinsics:
            if extrinsics is None:
                extrinsics = jnp.zeros((*actions.shape[:2], actions.shape[2] - 1))
            camera = project("extrinsics", extrinsics)
        if self.use_extrinsics:
            groups.append(camera)
        x = jnp.concatenate([*(g[:, :, None] for g in groups), x], axis=2)
        frame = np.repeat(np.arange(frames), len(groups) + patches)
        offset = np.tile(np.arange(len(groups) + patches) - len(groups), frames)
        cell = np.maximum(offset, 0)  # tokens before the patches: row 0, column 0
        column = cell % width * (height / width)
        tables = positions.rope_at(
            (jnp.asarray(frame), jnp.asarray(cell // width), jnp.asarray(column)),
            self.width // self.num_heads,
            tiled=True,
        )
        stack = layers.Stack(layers.TransformerConfig.of(self), name="stack")
        x, _ = stack(
            x.reshape(batch, -1, self.width),
            (tables[0][None], tables[1][None]),
            mask=jnp.asarray(frame[:, None] >= frame[None, :]),
        )
        x = x.reshape(batch, frames, -1, self.width)[:, :, len(groups) :]
        x = x.reshape(batch, -1, self.width)
        x = layers.LayerNorm(self.dtype, self.norm_eps, name="norm")(x)
        return layers.Dense(self.out_dim, ("mlp", "embed"), self.dtype, name="proj")(x)
