"""A trained model with frozen weights: what every evaluation starts from."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.config.saved import restored
from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.models.layers import take_tokens
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses
from vjepa_jax.objective.masked import init_models
from vjepa_jax.objective.state import TrainState, unbox
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build
from vjepa_jax.program.build import Program
from vjepa_jax.run import checkpoint


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """Modules and weights of a checkpoint, placed on a mesh.

    Attributes:
      encoder: module of both encoders.
      predictor: module; None where the checkpoint has no weights for it.
      params: `target` and, where there is a predictor, `encoder` and `predictor`.
      config: of the run, or written by the conversion.
      video_shape: (T, H, W, C) of the clips of training.
      mesh: devices that compute; every batch is sharded over all of them.
    """

    encoder: VideoEncoder
    predictor: Predictor | None
    params: Mapping[str, Any]
    config: ConfigDict
    video_shape: tuple[int, int, int, int]
    mesh: Mesh

    def call(self, function: Callable[..., Any], *batch: np.ndarray, **static) -> Any:
        """Call a jitted function on a batch that is sharded over the mesh.

        Args:
          function: `function(params, *batch, **static)`, jitted; returns arrays whose
            first axis is the batch. Models of one architecture share its compilation.
          batch: videos [B, T, H, W, 3] of any B, and further arrays [B, ...]; every
            process has all rows. Zeros fill the batch up to a multiple of the devices;
            their results are dropped.
          static: further arguments, hashable.

        Returns:
          The function's arrays on the host, with all rows on every process.
        """
        count = len(batch[0])
        rows = fill_up(batch, self.mesh.size)
        with sharding.use(self.mesh):
            over_devices = sharding.batch_sharding(self.mesh)
            placed = [
                jax.make_array_from_callback(x.shape, over_devices, x.__getitem__)
                for x in rows
            ]
            results = _to_host(function(self.params, *placed, **static))
            return jax.tree.map(lambda x: x[:count], results)

    def encode(self, video: np.ndarray, out_layers: Sequence[int] = ()) -> np.ndarray:
        """Encode clips by the target encoder.

        Args:
          video: uint8 [B, T, H, W, 3]; tubelets must fill the clips.
          out_layers: blocks, counted from 0, whose outputs are returned instead of the
            features, each through the last layer norm, concatenated in the channels.

        Returns:
          Tokens, float32 [B, T', S, D]: T' time steps of S positions.

        Raises:
          UserError: tubelets do not fill the clips, or there is no such block.
        """
        out_layers = require_blocks(self.encoder, out_layers)
        time_steps, height, width = self.grid(video.shape)
        tokens = self.call(
            _encode_by_target, video, encoder=self.encoder, out_layers=out_layers
        )
        return tokens.reshape(len(video), time_steps, height * width, -1)

    def predict(
        self,
        video: np.ndarray,
        ctx_idx: Sequence[int],
        tgt_idx: Sequence[int],
        mask_index: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict the features of hidden tokens from visible ones.

        Args:
          video: uint8 [B, T, H, W, 3]; tubelets must fill the clips.
          ctx_idx: [K], the tokens of every clip that the online encoder sees.
          tgt_idx: [M], the tokens to predict.
          mask_index: index of the predictor's mask token to use.

        Returns:
          Predictions, and features of the same tokens by the target encoder from the
          whole clip, layer-normalised as in training; both float32 [B, M, D].

        Raises:
          UserError: tubelets do not fill the clips; and see `require_predictor`.
        """
        predictor = self.require_predictor(mask_index)
        self.grid(video.shape)
        return self.call(
            _predict,
            video,
            encoder=self.encoder,
            predictor=predictor,
            ctx_idx=tuple(map(int, ctx_idx)),
            tgt_idx=tuple(map(int, tgt_idx)),
            mask_index=mask_index,
        )

    def anticipate(
        self,
        video: np.ndarray,
        steps_ahead: np.ndarray,
        num_steps: int = 1,
        mask_index: int = 0,
    ) -> np.ndarray:
        """Encode clips and predict features of a later time.

        As in V-JEPA 2's action anticipation (`evals/action_anticipation_frozen`), the
        predictor sees the features of the target encoder, not, as in `predict`, those
        of the online encoder.

        Args:
          video: uint8 [B, T, H, W, 3]; tubelets must fill the clips.
          steps_ahead: int [B], time steps of tokens from the end of each clip to the
            first step to predict.
          num_steps: time steps to predict, P.
          mask_index: index of the predictor's mask token to use.

        Returns:
          The features of the clips, followed by the predictions, float32
          [B, (T' + P) * S, D]: T' time steps of S positions.

        Raises:
          UserError: tubelets do not fill the clips, or the predictor has no such
            positions; and see `require_predictor`.
        """
        predictor, grid = self.require_predictor(mask_index), self.grid(video.shape)
        steps_ahead = np.asarray(steps_ahead, np.int32)
        if predictor.pos_embed == "sincos" and predictor.base_grid:
            # A table of positions has an end; rotations (rope) have none.
            known = predictor.base_grid[0]
            last = grid[0] + steps_ahead.max() + num_steps
            if last > known:
                raise UserError(
                    f"the predictor has positions for {known} time steps of tokens, "
                    f"and a clip with the predicted time takes {last}: shorten "
                    "config.data.num_frames"
                )
            grid = known, *grid[1:]
        return self.call(
            _anticipate,
            video,
            steps_ahead,
            encoder=self.encoder,
            predictor=predictor,
            grid=grid,
            num_steps=num_steps,
            mask_index=mask_index,
        )

    def grid(self, video_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the (T, H, W) tokens of clips, or raise UserError."""
        try:
            return self.encoder.grid(tuple(video_shape))
        except ValueError as error:
            raise UserError(str(error)) from None

    def require_predictor(self, mask_index: int = 0) -> Predictor:
        """Return the predictor, or raise UserError unless it predicts target features.

        Args:
          mask_index: a mask token that the predictor must have.
        """
        if self.predictor is None:
            raise UserError(
                "the checkpoint has no predictor of masked tokens: give the workdir of "
                "a pretraining run, or converted weights that hold one"
            )
        if self.predictor.out_dim != self.encoder.out_dim:
            raise UserError(
                f"the predictor's output has {self.predictor.out_dim} channels (a "
                "teacher's features, or pixels), and the target encoder has "
                f"{self.encoder.out_dim}: they cannot be compared"
            )
        count = self.predictor.num_mask_tokens
        if not 0 <= mask_index < count:
            raise UserError(
                f"mask_index={mask_index}: the predictor has {count} mask tokens, "
                "counted from 0"
            )
        return self.predictor


def require_blocks(encoder: VideoEncoder, out_layers: Sequence[int]) -> tuple[int, ...]:
    """Return the block numbers, or raise UserError if one does not exist."""
    if any(not 0 <= layer < encoder.depth for layer in out_layers):
        last = encoder.depth - 1
        raise UserError(f"out_layers={tuple(out_layers)}: the blocks are 0 to {last}")
    return tuple(out_layers)


def fill_up(batch: Sequence[np.ndarray], unit: int) -> list[np.ndarray]:
    """Append rows of zeros to arrays [B, ...], up to a multiple of `unit` rows."""
    missing = -len(batch[0]) % unit
    if not missing:  # np.pad would copy
        return list(batch)
    return [np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in batch]


def _to_host(tree: Any) -> Any:
    """Return arrays with all rows; sharded ones are gathered from all processes."""

    def one(x):
        is_here = x.is_fully_addressable or x.is_fully_replicated
        return (
            np.asarray(x)
            if is_here
            else multihost_utils.process_allgather(x, tiled=True)
        )

    return jax.tree.map(one, tree)


def load(path: str, step: int | None = None, mesh: Mesh | None = None) -> FrozenModel:
    """Load a run's checkpoint or converted weights.

    Args:
      path: workdir of a run, or folder of a conversion.
      step: a saved step; None: the latest.
      mesh: devices that compute; None: all devices, with replicated weights.

    Raises:
      UserError: there is no such checkpoint, or it holds no encoder.
    """
    params, meta = checkpoint.restore_models(path, step)
    kind = meta.get("kind", "pretraining")
    if "config" not in meta:
        raise UserError(f"{path} holds a {kind}, not an encoder")
    config = restored(meta["config"])
    predictor: Predictor | None
    mesh = sharding.make_mesh() if mesh is None else mesh
    with checkpoint.explain_misfit(path):
        encoder, predictor = build.make_models(config, mesh.devices.flat[0].platform)
        # An action-conditioned predictor is another module.
        if "predictor" not in params or kind == "action":
            params, predictor = {"target": params["target"]}, None
        else:
            params = {name: params[name] for name in ("target", "encoder", "predictor")}
        video_shape = tuple(meta["video_shape"])
        init = _make_init(encoder, predictor, video_shape)
        # From the host: devices of several processes do not take each other's arrays.
        params = jax.tree.map(np.asarray, params)
        placed = jax.device_put(params, sharding.state_shardings(init, mesh))
    return FrozenModel(encoder, predictor, placed, config, video_shape, mesh)


def from_state(program: Program, state: TrainState) -> FrozenModel:
    """Return the model of a run in progress; every process calls.

    In one process the weights are the state's own arrays, on the run's mesh; the next
    update donates them. With several processes each gets a copy on its own devices, so
    that it can compute without the others.

    Args:
      program: of the run.
      state: between two updates.
    """
    config, mesh = program.config, program.mesh
    encoder, predictor = program.objective.encoder, program.objective.predictor
    video_shape = program.video_shapes[MAIN_STREAM]
    params = {"target": state.target, **state.params}
    if mesh.is_multi_process:
        # Sharded if the run's weights are: they may not fit on one device.
        fsdp = 0 if mesh.shape["fsdp"] > 1 else 1
        mesh = sharding.make_mesh(fsdp=fsdp, devices=list(mesh.local_devices))
        init = _make_init(encoder, predictor, video_shape)
        shardings = sharding.state_shardings(init, mesh)
        # The host holds one complete array at a time.
        params = jax.tree.map(
            lambda x, s: jax.device_put(_to_host(x), s), params, shardings
        )
    return FrozenModel(encoder, predictor, params, config, video_shape, mesh)


def random_init(model: FrozenModel, seed: int) -> FrozenModel:
    """Return an untrained model of the same architecture.

    Its target encoder equals its online encoder, as at the start of a run.
    """
    parts = model.encoder, model.predictor, model.video_shape, model.mesh
    params = unbox(_compiled_init(*parts)(jax.random.key(seed)))
    return dataclasses.replace(model, params=params)


def beside_untrained(
    measure: Callable[[FrozenModel], Mapping[str, Any]],
    model: FrozenModel,
    config: ConfigDict,
) -> dict[str, dict[str, Any]]:
    """Measure a model and, with `config.random_init`, an untrained one beside it.

    Args:
      measure: from a model to {measure: value}; measures that the untrained model
        lacks are None.
      model: to evaluate.
      config: of the evaluation.

    Returns:
      {measure: {"pretrained": value, "random_init": value}}.
    """
    columns = {"pretrained": measure(model)}
    if config.random_init:
        columns["random_init"] = measure(random_init(model, config.seed))
    return {
        name: {column: values.get(name) for column, values in columns.items()}
        for name in columns["pretrained"]
    }


@functools.lru_cache(maxsize=2)  # one compilation for all seeds
def _compiled_init(encoder, predictor, video_shape, mesh):
    init = _make_init(encoder, predictor, video_shape)
    return jax.jit(init, out_shardings=sharding.state_shardings(init, mesh))


def _make_init(encoder, predictor, video_shape):
    """Make the function from a key to boxed `FrozenModel.params`."""

    def init(key):
        # Keys differ from those of training: a run with this seed started elsewhere.
        keys = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)
        params = init_models(keys, encoder, predictor, video_shape)
        # Without a predictor only the target encoder is used.
        target = params["encoder"] if predictor else params.pop("encoder")
        return {"target": target, **params}

    return init


# ------------------------------------------------------------- what the models compute


@functools.partial(jax.jit, static_argnames=("encoder", "out_layers"))
def encode(
    params: Any,
    video: jax.Array,
    *,
    encoder: VideoEncoder,
    out_layers: tuple[int, ...] = (),
) -> jax.Array:
    """Encode clips; every new shape compiles once for all models of an architecture.

    Args:
      params: of the encoder.
      video: [B, T, H, W, 3], uint8, or float and normalised.
      encoder: module.
      out_layers: see `FrozenModel.encode`.

    Returns:
      Tokens, float32 [B, N, D].
    """
    if video.dtype == jnp.uint8:
        video = normalise(video)
    tokens: Any = encoder.apply({"params": params}, video, out_layers=out_layers)
    if out_layers:
        tokens = jnp.concatenate([*tokens], axis=-1)
    return tokens.astype(jnp.float32)


def _encode_by_target(params, video, **static):
    return encode(params["target"], video, **static)


def target_features(params: Any, video: jax.Array, encoder: VideoEncoder) -> jax.Array:
    """Return the features that the predictor was trained to predict.

    Args:
      params: see `FrozenModel`.
      video: normalised, float [B, T, H, W, 3].
      encoder: module.

    Returns:
      float32 [B, N, D].
    """
    features: Any = encoder.apply({"params": params["target"]}, video)
    return losses.normalise_target(features, encoder.num_levels)


def predicted_features(
    params: Any,
    video: jax.Array,
    encoder: VideoEncoder,
    predictor: Predictor,
    ctx_idx: Sequence[int],
    tgt_idx: Sequence[int],
    mask_index: int,
) -> jax.Array:
    """Return the prediction of `tgt_idx` [M] from `ctx_idx` [K]: float32 [B, M, D]."""
    of_context, of_target = (
        jnp.broadcast_to(jnp.asarray(idx, jnp.int32), (len(video), len(idx)))
        for idx in (ctx_idx, tgt_idx)
    )
    context = encoder.apply({"params": params["encoder"]}, video, of_context)
    prediction, _ = predictor.apply(
        {"params": params["predictor"]},
        context,
        of_context,
        of_target,
        encoder.grid(video.shape),
        mask_index=mask_index,
        is_image=encoder.is_image(video.shape),
    )
    return prediction.astype(jnp.float32)


@functools.partial(
    jax.jit,
    static_argnames=("encoder", "predictor", "ctx_idx", "tgt_idx", "mask_index"),
)
def _predict(params, video, *, encoder, predictor, ctx_idx, tgt_idx, mask_index):
    video = normalise(video)
    prediction = predicted_features(
        params, video, encoder, predictor, ctx_idx, tgt_idx, mask_index
    )
    features = target_features(params, video, encoder)
    wanted = jnp.broadcast_to(jnp.asarray(tgt_idx), (len(video), len(tgt_idx)))
    return prediction, take_tokens(features, wanted)


@functools.partial(
    jax.jit,
    static_argnames=("encoder", "predictor", "grid", "num_steps", "mask_index"),
)
def _anticipate(
    params, video, steps_ahead, *, encoder, predictor, grid, num_steps, mask_index
):
    """See `FrozenModel.anticipate`; `grid` is that of the predictor's positions."""
    video = normalise(video)
    features = encoder.apply({"params": params["target"]}, video)
    batch, count, _ = features.shape
    per_step = grid[1] * grid[2]
    first = count + steps_ahead[:, None] * per_step
    prediction, _ = predictor.apply(
        {"params": params["predictor"]},
        features,
        jnp.broadcast_to(jnp.arange(count), (batch, count)),
        first + jnp.arange(num_steps * per_step),
        grid,
        mask_index=mask_index,
    )
    tokens = jnp.concatenate([features, prediction], axis=1)
    return tokens.astype(jnp.float32)
