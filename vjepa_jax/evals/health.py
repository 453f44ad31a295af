"""How far features are spread out, and how similar clips of one video are.

The statistics that training logs of a batch (`losses.collapse_statistics`), here of a
data set, for single tokens and for pooled clips; and alignment and uniformity (Wang and
Isola, arXiv 2005.10242) of pooled clips.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import pdist
from sklearn.preprocessing import normalize

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.sources.records import Subset, evenly_spread
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, beside_untrained
from vjepa_jax.evals.tokens import clip_tokens
from vjepa_jax.objective import losses


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Measure the spread of features of a data set's videos; labels are not used.

    Args:
      model: of the features.
      config: from `settings.health`. Without `data.test_path` the videos are the run's
        own, sampled as in its training.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`;
      see `measure`.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    config = _with_videos(config, model.config)
    source = clip_tokens.open_source(config, "test_path")
    source = Subset(source, evenly_spread(len(source), config.num_videos))

    def measure_model(model: FrozenModel) -> dict[str, float]:
        videos = clip_tokens.make_videos(model, config, source, False, num_views=1)
        return measure(*_read(videos, config))

    return beside_untrained(measure_model, model, config)


def _with_videos(config: ConfigDict, run: ConfigDict) -> ConfigDict:
    """Return the config, with the videos of the run if it names none."""
    if config.data.test_path:
        return config
    config = config.copy_and_resolve_references()
    config.data.test_path = run.data.path
    for key in ("frame_step", "fps", "duration_secs", "sampling", "resize"):
        config.data[key] = run.data[key]
    return config


def _read(
    videos: clip_tokens.Videos, config: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """Return some tokens [videos, clips, K, D] and pooled clips [videos, clips, D]."""
    num_clips = videos.encoder.num_clips
    rng = np.random.default_rng(config.seed)
    some, pooled = [], []
    for batch in videos.batches(max(1, config.clips_per_call // num_clips)):
        tokens = batch.tokens[batch.valid, 0]
        layers = max(len(config.out_layers), 1)
        tokens = tokens.reshape(len(tokens), layers, num_clips, -1, tokens.shape[-1])
        tokens = np.concatenate([*tokens.transpose(1, 0, 2, 3, 4)], axis=2)
        count = min(config.tokens_per_clip, tokens.shape[2])
        # Other positions in every batch: fixed ones would show as structure.
        some.append(tokens[:, :, rng.permutation(tokens.shape[2])[:count]])
        pooled.append(tokens.mean(2))
    if sum(map(len, pooled)) < 2:
        raise UserError(
            f"fewer than 2 videos of {videos.source.name!r} can be read: their "
            "spread is not defined"
        )
    return np.concatenate(some), np.concatenate(pooled)


def measure(tokens: np.ndarray, pooled: np.ndarray) -> dict[str, float]:
    """Measure the spread of features.

    Args:
      tokens: float [videos, clips, K, D], some tokens of every clip.
      pooled: float [videos, clips, D], the mean of all tokens of every clip.

    Returns:
      `token_std`, `token_effective_rank`, `token_cosine` and the same of `pooled`, see
      `losses.collapse_statistics`. With two or more clips per video: `alignment`, the
      mean squared distance of two clips of one video, and `uniformity`, the logarithm
      of the mean of exp(-2 * squared distance) over clips of different videos; both of
      pooled clips of unit length; lower is better.
    """
    _, clips, width = pooled.shape
    results: dict[str, float] = {}
    for name, features in (("token", tokens), ("pooled", pooled)):
        flat = jnp.asarray(features.reshape(-1, 1, width))
        statistics = losses.collapse_statistics(flat, max_tokens=len(flat))
        results |= {f"{name}_{key}": float(v) for key, v in statistics.items()}
    if clips > 1:
        unit = normalize(pooled.reshape(-1, width)).reshape(pooled.shape)
        within = [pdist(video, "sqeuclidean") for video in unit]
        across = [pdist(unit[:, i], "sqeuclidean") for i in range(clips)]
        results["alignment"] = float(np.mean(within))
        results["uniformity"] = float(np.log(np.mean(np.exp(-2 * np.array(across)))))
    return results
