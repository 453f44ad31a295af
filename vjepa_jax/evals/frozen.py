"""A trained model with its weights frozen: what every evaluation starts from."""

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
from vjepa_jax.evals import forward
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective.state import TrainState, unbox
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build
from vjepa_jax.program.program import Program
from vjepa_jax.run import checkpoint


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A checkpoint's modules and weights, laid out on a mesh.

    Attributes:
      encoder: module of both encoders.
      predictor: module; None where the checkpoint has no weights for it.
      params: `target` and, where there is a predictor, `encoder` and `predictor`.
      config: of the run, or as the conversion made it.
      video_shape: (T, H, W, C) of the clips it was trained on.
      mesh: of the devices that compute; batches are split over all of them.
    """

    encoder: VideoEncoder
    predictor: Predictor | None
    params: Mapping[str, Any]
    config: ConfigDict
    video_shape: tuple[int, int, int, int]
    mesh: Mesh

    def call(self, function: Callable[..., Any], *batch: np.ndarray, **static) -> Any:
        """Call a jitted function on a batch that is split over the mesh.

        Args:
          function: `function(params, *batch, **static)`, jitted, to arrays whose first
            axis is the batch. Compiled once for all models of one architecture.
          batch: videos [B, T, H, W, 3] of any B, and what else there is of each of them
            [B, ...]; whole on every process. What is missing to a multiple of the
            devices is filled up and left out of the result.
          static: further arguments, hashable.

        Returns:
          Its arrays on the host, whole on every process of the mesh.
        """
        count = len(batch[0])
        missing = -count % self.mesh.size
        batch = [np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in batch]
        with sharding.use(self.mesh):
            over_devices = sharding.batch_sharding(self.mesh)
            placed = [
                jax.make_array_from_callback(x.shape, over_devices, x.__getitem__)
                for x in batch
            ]
            found = function(self.params, *placed, **static)
            found = _to_host(found)
            return jax.tree.map(lambda x: x[:count], found)

    def encode(
        self,
        video: np.ndarray,
        out_layers: Sequence[int] = (),
        params_of: str = "target",
    ) -> np.ndarray:
        """Encode clips.

        Args:
          video: uint8 [B, T, H, W, 3] of a size that tubelets fill.
          out_layers: blocks, counted from 0, whose outputs are wanted instead of the
            features, each through the last layer norm, side by side in the channels.
          params_of: `target`, or `encoder` for the online encoder.

        Returns:
          Tokens, float32 [B, T', S, D]: T' time steps of S places.

        Raises:
          UserError: tubelets do not fill the clips, there is no such block, or the
            checkpoint has no online encoder.
        """
        out_layers = tuple(out_layers)
        if any(not 0 <= layer < self.encoder.depth for layer in out_layers):
            last = self.encoder.depth - 1
            raise UserError(f"out_layers={out_layers}: the blocks are 0 to {last}")
        if params_of not in self.params:
            raise UserError(f"the checkpoint has no '{params_of}' to encode with")
        grid = self.grid(video.shape)
        tokens = self.call(
            forward.encode,
            video,
            encoder=self.encoder,
            out_layers=out_layers,
            params_of=params_of,
        )
        return tokens.reshape(len(video), grid[0], grid[1] * grid[2], -1)

    def predict(
        self,
        video: np.ndarray,
        ctx_idx: Sequence[int],
        tgt_idx: Sequence[int],
        mask_index: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predict the features of hidden tokens from visible ones.

        Args:
          video: uint8 [B, T, H, W, 3] of a size that tubelets fill.
          ctx_idx: [K], the tokens that the online encoder sees in every clip.
          tgt_idx: [M], the tokens to predict.
          mask_index: which of the predictor's mask tokens stands for them.

        Returns:
          The predictions and the target encoder's features of the whole clip at the
          same places, layer-normalised as in training; both float32 [B, M, D].

        Raises:
          UserError: tubelets do not fill the clips, or `require_predictor` does.
        """
        self.require_predictor(mask_index)
        self.grid(video.shape)
        return self.call(
            forward.predict,
            video,
            encoder=self.encoder,
            predictor=self.predictor,
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
        """Encode clips and predict the features of what comes some time after each.

        As in V-JEPA 2's action anticipation (`evals/action_anticipation_frozen`), and
        unlike `predict`, the predictor sees the target encoder's features.

        Args:
          video: uint8 [B, T, H, W, 3] of a size that tubelets fill.
          steps_ahead: int [B], time steps of tokens from the end of each clip to the
            first one to predict.
          num_steps: time steps to predict, P.
          mask_index: which of the predictor's mask tokens stands for them.

        Returns:
          The clips' features and after them the predictions, float32
          [B, (T' + P) * S, D]: T' time steps of S places.

        Raises:
          UserError: tubelets do not fill the clips, the predictor has no such
            positions, or `require_predictor` does.
        """
        self.require_predictor(mask_index)
        grid, predictor = self.grid(video.shape), self.predictor
        steps_ahead = np.asarray(steps_ahead, np.int32)
        if predictor.pos_embed == "sincos":
            # Unlike a rotation, a table ends, and beyond it nothing was trained.
            last, known = grid[0] + steps_ahead.max() + num_steps, predictor.base_grid
            if last > known[0]:
                raise UserError(
                    f"the predictor has positions for {known[0]} time steps of tokens, "
                    f"and a clip with what is ahead of it takes {last}: shorten "
                    "config.data.num_frames"
                )
            grid = known[0], *grid[1:]
        return self.call(
            forward.anticipate,
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

    def require_predictor(self, mask_index: int = 0) -> None:
        """Raise UserError unless there is a predictor of the target's features.

        Args:
          mask_index: of its mask tokens, which has to be there.
        """
        if self.predictor is None:
            raise UserError(
                "the checkpoint has no predictor of masked tokens: give the workdir of "
                "a pretraining run, or converted weights that hold one"
            )
        if self.predictor.out_dim != self.encoder.out_dim:
            raise UserError(
                f"the predictor gives {self.predictor.out_dim} channels, a teacher's "
                f"or pixels, and the target encoder has {self.encoder.out_dim}: "
                "nothing compares"
            )
        count = self.predictor.num_mask_tokens
        if not 0 <= mask_index < count:
            raise UserError(
                f"mask_index={mask_index}: the predictor has {count} mask tokens, "
                "counted from 0"
            )


def _to_host(tree: Any) -> Any:
    """Return arrays whole; what only other processes have is gathered by all."""

    def one(x):
        is_here = x.is_fully_addressable or x.is_fully_replicated
        return (
            np.asarray(x)
            if is_here
            else multihost_utils.process_allgather(x, tiled=True)
        )

    return jax.tree.map(one, tree)


def load(path: str, step: int | None = None, mesh: Mesh | None = None) -> Frozen:
    """Load a run's checkpoint or converted weights.

    Args:
      path: the workdir of a run, or the folder of a conversion.
      step: a saved step; None takes the latest.
      mesh: where to compute; None: all devices share every batch.

    Raises:
      UserError: there is no such checkpoint, or no encoder in it.
    """
    params, meta = checkpoint.restore_models(path, step)
    kind = meta.get("kind", "pretraining")
    if "config" not in meta:
        raise UserError(f"{path} holds a {kind}, not an encoder")
    config = restored(meta["config"])
    encoder, predictor = build.make_models(config)
    # The predictor of robots' actions is another module.
    if "predictor" not in params or kind == "action":
        params, predictor = {"target": params["target"]}, None
    else:
        params = {name: params[name] for name in ("target", "encoder", "predictor")}
    video_shape = tuple(meta["video_shape"])
    mesh = sharding.make_mesh() if mesh is None else mesh
    init = _make_init(encoder, predictor, video_shape)
    # From the host: devices of several processes do not take each other's arrays.
    params = jax.tree.map(np.asarray, params)
    placed = jax.device_put(params, sharding.state_shardings(init, mesh))
    return Frozen(encoder, predictor, placed, config, video_shape, mesh)


def from_state(program: Program, state: TrainState) -> Frozen:
    """Return the model in a run's hands.

    In one process the weights are the state's own arrays, on the run's mesh, which the
    next update takes away. In several, each process gets a copy on its own devices, so
    that whatever it computes with the model waits for no other; all of them call.

    Args:
      program: of the run.
      state: between two updates.
    """
    config, mesh = program.config, program.mesh
    video_shape = build.video_shapes(config)[MAIN_STREAM]
    params = {"target": state.target, **state.params}
    if mesh.is_multi_process:
        # Split over the devices as in the run, since it may not fit one of them.
        fsdp = 0 if mesh.shape["fsdp"] > 1 else 1
        mesh = sharding.make_mesh(fsdp=fsdp, devices=list(mesh.local_devices))
        init = _make_init(program.encoder, program.predictor, video_shape)
        shardings = sharding.state_shardings(init, mesh)
        # One array at a time is whole on the host.
        params = jax.tree.map(
            lambda x, s: jax.device_put(_to_host(x), s), params, shardings
        )
    return Frozen(program.encoder, program.predictor, params, config, video_shape, mesh)


def random_init(frozen: Frozen, seed: int) -> Frozen:
    """Return an untrained model of the same architecture.

    Its target encoder is its online encoder, as at the start of a run.
    """
    parts = frozen.encoder, frozen.predictor, frozen.video_shape, frozen.mesh
    params = unbox(_compiled_init(*parts)(jax.random.key(seed)))
    return dataclasses.replace(frozen, params=params)


def beside_untrained(
    measure: Callable[[Frozen], Mapping[str, Any]], model: Frozen, config: ConfigDict
) -> dict[str, dict[str, Any]]:
    """Measure a model and, with `config.random_init`, an untrained one beside it.

    Args:
      measure: from a model to {measure: value}.
      model: what is judged.
      config: of the evaluation.

    Returns:
      {measure: {"pretrained": value, "random_init": value}}.
    """
    columns = {"pretrained": measure(model)}
    if config.random_init:
        columns["random_init"] = measure(random_init(model, config.seed))
    return {
        name: {column: values[name] for column, values in columns.items()}
        for name in columns["pretrained"]
    }


@functools.lru_cache(maxsize=2)  # of many seeds, the first alone is compiled
def _compiled_init(encoder, predictor, video_shape, mesh):
    init = _make_init(encoder, predictor, video_shape)
    return jax.jit(init, out_shardings=sharding.state_shardings(init, mesh))


def _make_init(encoder, predictor, video_shape):
    """Make the function from a key to boxed `Frozen.params`."""

    def init(key):
        # Not the run's own seed: that encoder is where the run started.
        video = jnp.zeros((1, *video_shape))
        weights = encoder.init(jax.random.fold_in(key, 1), video)["params"]
        if predictor is None:
            return {"target": weights}
        one = jnp.zeros((1, 1), jnp.int32)
        of_predictor = predictor.init(
            jax.random.fold_in(key, 2),
            jnp.zeros((1, 1, encoder.out_dim)),
            one,
            one,
            encoder.grid(video_shape),
        )["params"]
        return {"target": weights, "encoder": weights, "predictor": of_predictor}

    return init
