"""Action anticipation by frozen features: which action follows a second later?

V-JEPA 2's protocol on EPIC-KITCHENS-100 (paper section 6,
`evals/action_anticipation_frozen`): the model sees a clip that ends one second before
an action. Heads see the target encoder's tokens of the clip and the predictor's tokens
for the time of the action. Three queries pool them for the verb, the noun and the
action, which is the pair of verb and noun. The measure is recall at 5, averaged over
classes. Paper and code define the time of an action differently; results are given for
both definitions. See docs/anticipation.md.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from sklearn.metrics import accuracy_score, recall_score

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips.media import Limits
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.records import hold_out
from vjepa_jax.evals import classification, settings
from vjepa_jax.evals.anticipation.epic_kitchens import (
    ANCHORS,
    Actions,
    Classes,
    ContextReader,
    Contexts,
    read_actions,
)
from vjepa_jax.evals.classification import Predictions, Preparation
from vjepa_jax.evals.frozen import FrozenModel, random_init
from vjepa_jax.evals.heads.head_grid import make_training, name_of
from vjepa_jax.evals.tokens.clip_tokens import TokenBatch, Videos, encode_in_calls

OUTPUTS = ("verb", "noun", "action")  # in the order of the queries

# Of the focal loss (arXiv 1708.02002).
_ALPHA, _GAMMA = 0.25, 2.0


@dataclasses.dataclass(frozen=True)
class Anticipator:
    """Turns clips into the tokens that heads see.

    Attributes:
      model: of the features.
      clips_per_call: clips that it encodes at once.
      fps: frames of a clip per second.
      num_output_frames: frames to predict, at least one tubelet.
      mask_index: which of the predictor's mask tokens stands for the predicted tokens.
      use_predictor: whether tokens are predicted; else they are those of the clip.
    """

    num_clips: ClassVar[int] = 1  # a context is one clip

    model: FrozenModel
    clips_per_call: int
    fps: float
    num_output_frames: int
    mask_index: int
    use_predictor: bool

    def __call__(self, video: np.ndarray, ahead_secs: np.ndarray) -> np.ndarray:
        """Encode clips and predict the features of some time after each.

        Args:
          video: uint8 [B, T, H, W, 3].
          ahead_secs: float [B], from the end of each clip to the predicted time,
            rounded down to time steps of tokens.

        Returns:
          float32 [B, N, D].
        """
        tubelet = self.model.encoder.tubelet_size
        # Rounding may have made a whole number of steps slightly smaller.
        steps = np.floor(ahead_secs * self.fps / tubelet + 1e-6).astype(np.int32)
        num_steps = max(1, self.num_output_frames // tubelet)

        def encode(video, steps):
            if self.use_predictor:
                return self.model.anticipate(video, steps, num_steps, self.mask_index)
            tokens = self.model.encode(video)
            return tokens.reshape(len(tokens), -1, tokens.shape[-1])

        return encode_in_calls(encode, self.clips_per_call, video, steps)

    def cache_key(self) -> tuple:
        """Return what the tokens of given clips depend on, besides the model."""
        if not self.use_predictor:
            return ("encoder",)
        return "predictor", self.fps, self.num_output_frames, self.mask_index


@dataclasses.dataclass(frozen=True)
class ContextVideos(Videos):
    """Tokens of contexts, see `clip_tokens.Videos`."""

    source: Contexts
    encoder: Anticipator

    def encode(self, video: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Encode clips [B, 1, T, H, W, 3] of contexts [B]: float32 [B, 1, N, D]."""
        return self.encoder(video[:, 0], self.source.ahead_secs[index])[:, None]


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Train heads on annotated actions and test what they anticipate.

    Args:
      model: of the features.
      config: from `settings.anticipation`.

    Returns:
      {measure: {anchor: value}}, with `config.random_init` also {"ANCHOR_random":
      value}. For each of `OUTPUTS`, of the head with the best recall of actions on the
      held-out actions:

      `*_recall_at_5`: the share of a class's test actions for which it is among the
      five most probable classes, averaged over the classes that occur. `*_accuracy`,
      `*_top5_accuracy`: over all test actions. `*_class_mean_accuracy`: averaged over
      classes.
      `official_best_on_test_*_recall_at_5`: of the head that is best on the test
      actions, a different one for each of `OUTPUTS`, as reported by the released code.
      `held_out_action_recall_at_5`, `chosen_head` (from 1), and both recalls of actions
      of every head.
      `actions_fitted`, `actions_held_out`, `actions_tested`, `actions_unreadable`:
      their numbers. `actions_unknown`: number of test actions whose pair is not among
      the training annotations; they are left out, as in the released code.
      `tests_that_see_the_action`: share of the tested contexts that end after the
      action has begun.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    anchors = config.data.anchors
    if not anchors or not set(anchors) <= set(ANCHORS):
        raise UserError(f"config.data.anchors={anchors}: known: {', '.join(ANCHORS)}")
    if config.use_predictor:
        _check_predictor(model, config.mask_index)
    networks = {"": model}
    if config.random_init:
        networks["_random"] = random_init(model, config.seed)
    columns = {
        f"{anchor}{name}": _evaluate(network, config, anchor)
        for anchor in anchors
        for name, network in networks.items()
    }
    measures = next(iter(columns.values()))
    return {m: {name: of[m] for name, of in columns.items()} for m in measures}


def _check_predictor(model: FrozenModel, mask_index: int) -> None:
    try:
        model.require_predictor(mask_index)
    except UserError as error:
        raise UserError(
            f"{error}; or leave the predictor out with config.use_predictor=False"
        ) from None
    tokens = np.asarray(model.params["predictor"]["mask_tokens"])
    if not tokens[mask_index].any():
        logging.warning(
            "mask token %d of the predictor is zero: it was never trained "
            "(config.mask_index)",
            mask_index,
        )


def _evaluate(model: FrozenModel, config: ConfigDict, anchor: str) -> dict[str, Any]:
    data = config.data
    train, test = (_read(config, key) for key in ("train_path", "test_path"))
    classes = Classes.of(train)
    if len(classes.actions) < 2:
        raise UserError(
            f"all {len(train)} actions of {train.name!r} are of one verb and one noun: "
            "give annotations of two actions at least"
        )

    def contexts(actions: Actions, point=0.0, ahead_secs=data.anticipation_secs):
        return Contexts(
            actions,
            classes.labels(actions),
            data.videos_path,
            anchor=anchor,
            point=point,
            ahead_secs=ahead_secs,
        )

    if data.val_path:
        fit, held_out = train, _known(_read(config, "val_path"), classes)
    else:
        parts = hold_out(contexts(train), data.held_out_share, config.seed)
        fit, held_out = (train.take(part.indices) for part in parts)
    num_test, test = len(test), _known(test, classes)
    classification.require_batch(config, len(fit))

    prepare = Preparation(
        model,
        config,
        lambda contexts, _: _make_videos(model, config, cast(Contexts, contexts)),
        with_predictor=config.use_predictor,
    )
    head = classification.make_attentive_head(
        config,
        model,
        model.encoder.out_dim,
        outputs=tuple((name, classes.counts[name]) for name in OUTPUTS),
    )
    per_epoch = len(fit) // config.batch_size
    grid = classification.train(
        head,
        make_training(config, per_epoch, make_loss(classes)),
        _training_batches(prepare, contexts, fit, per_epoch),
        per_epoch,
        seed=config.seed,
        mesh=model.mesh,
    )
    size = config.test_batch_size
    # The test actions are not used before all heads are trained and one is chosen.
    chosen_by = classification.predict(grid, prepare(contexts(held_out), 1), size)
    held_out_recalls = measure_heads(chosen_by, classes)["action_recall_at_5"]
    chosen = int(np.argmax(held_out_recalls))
    test_contexts = contexts(test)
    tested = classification.predict(grid, prepare(test_contexts, 1), size)
    measures = measure_heads(tested, classes)
    results = {name: values[chosen] for name, values in measures.items()}
    for name in OUTPUTS:
        key = f"{name}_recall_at_5"
        results[f"official_best_on_test_{key}"] = max(measures[key])
    results |= {
        "held_out_action_recall_at_5": held_out_recalls[chosen],
        "chosen_head": chosen + 1,
        "actions_fitted": len(fit),
        "actions_held_out": len(chosen_by.labels),
        "actions_tested": len(tested.labels),
        "actions_unreadable": len(held_out)
        - len(chosen_by.labels)
        + len(test)
        - len(tested.labels),
        "actions_unknown": num_test - len(test),
        "tests_that_see_the_action": float(test_contexts.sees_action().mean()),
    }
    for number, pair in enumerate(grid.heads):
        prefix = f"head {number + 1}: {name_of(pair)}"
        results[f"{prefix}, held-out recall_at_5"] = held_out_recalls[number]
        of_test = measures["action_recall_at_5"][number]
        results[f"{prefix}, test recall_at_5"] = of_test
    return results


def _read(config: ConfigDict, key: str) -> Actions:
    path = config.data[key]
    if not path:
        raise UserError(
            f"config.data.{key} is not set: give annotations of EPIC-KITCHENS-100, "
            "EPIC_100_train.csv or EPIC_100_validation.csv"
        )
    return read_actions(path)


def _known(actions: Actions, classes: Classes) -> Actions:
    """Leave out actions whose pair is not among the training annotations."""
    known = actions.take(classes.labels(actions) >= 0)
    if not len(known):
        raise UserError(
            f"{actions.name!r} has no action that occurs in config.data.train_path: "
            "give lists of the same data set"
        )
    return known


def _make_videos(
    model: FrozenModel, config: ConfigDict, source: Contexts
) -> ContextVideos:
    data = config.data
    reader = ContextReader(
        Sampling(
            data.num_frames or model.video_shape[0],
            fps=data.fps,
            rule=data.sampling,
        ),
        data.resolution or model.video_shape[1],
        data.resize,
        Limits(data.max_pixels, data.time_limit_secs),
    )
    model.grid(reader.shape()[1:])
    anticipator = Anticipator(
        model,
        config.clips_per_call,
        data.fps,
        config.num_output_frames,
        config.mask_index,
        config.use_predictor,
    )
    return ContextVideos(
        source, reader, anticipator, 1, data.num_workers, data.worker_timeout_secs
    )


def _training_batches(
    prepare: Preparation,
    contexts: Callable[..., Contexts],
    fit: Actions,
    per_epoch: int,
) -> Iterator[TokenBatch]:
    """Yield the batches of all epochs; times, if random, are drawn in each epoch."""
    config, data = prepare.config, prepare.config.data
    if not data.augment:
        steps = config.epochs * per_epoch
        yield from prepare.training_batches(contexts(fit), steps, config.seed)
        return
    for epoch in range(config.epochs):
        rng = np.random.default_rng((config.seed, epoch))
        first_point, last_point = data.train_anticipation_point
        least_secs, most_secs = data.train_anticipation_secs
        drawn = contexts(
            fit,
            rng.uniform(first_point, last_point, len(fit)),
            rng.uniform(least_secs, most_secs, len(fit)),
        )
        seed = int(rng.integers(1 << 31))
        yield from prepare.training_batches(drawn, per_epoch, seed)


def make_loss(classes: Classes) -> Callable[[dict[str, jax.Array], jax.Array], Any]:
    """Make the loss: the sum of the sigmoid focal losses of verb, noun and action.

    Args:
      classes: of the labels.

    Returns:
      A function from logits {name: [B, classes]} and actions, int [B], to losses [B],
      summed over classes.
    """
    tables = {name: jnp.asarray(table) for name, table in classes.tables().items()}

    def loss(logits: dict[str, jax.Array], labels: jax.Array) -> jax.Array:
        total: Any = 0.0
        for name, of_name in logits.items():
            wanted = jax.nn.one_hot(tables[name][labels], of_name.shape[-1])
            each = optax.sigmoid_focal_loss(of_name, wanted, alpha=_ALPHA, gamma=_GAMMA)
            total += each.sum(-1)
        return total

    return loss


def measure_heads(predictions: Predictions, classes: Classes) -> dict[str, list[float]]:
    """Return every measure of every head, {measure: [H]}; see `evaluate`."""
    measures: dict[str, list[float]] = {}
    for name in OUTPUTS:
        labels = classes.tables()[name][predictions.labels]
        for best in predictions.best[name]:
            # An action whose class is among the best counts as correctly predicted.
            among = np.where((best == labels[:, None]).any(1), labels, -1)
            values = {
                "recall_at_5": _class_mean(labels, among),
                "accuracy": accuracy_score(labels, best[:, 0]),
                "top5_accuracy": accuracy_score(labels, among),
                "class_mean_accuracy": _class_mean(labels, best[:, 0]),
            }
            for key, value in values.items():
                measures.setdefault(f"{name}_{key}", []).append(float(value))
    return measures


def _class_mean(labels: np.ndarray, predicted: np.ndarray) -> float:
    return recall_score(labels, predicted, labels=np.unique(labels), average="macro")
