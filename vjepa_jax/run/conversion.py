"""Convert weights: official or Hugging Face files to a checkpoint, and back.

Every array of a file is used, or listed with the reason why not; otherwise nothing is
written.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import is_remote
from vjepa_jax.config.defaults import MAIN_STREAM
from vjepa_jax.config.saved import restored
from vjepa_jax.models import positions, registry
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.objective.masked import init_models
from vjepa_jax.objective.state import init_shapes
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint
from vjepa_jax.weights import files, huggingface, official, rules

_NO_HINTS = official.Hints()
# The keys of the encoders in an official file made from a training run.
_KEYS_OF_A_RUN = {"target": "target_encoder", "all": ("encoder", "target_encoder")}


@dataclasses.dataclass
class Converted:
    """Converted weights, see `checkpoint.save_converted`.

    Attributes:
      target: parameters of the target encoder. Without an encoder: parameters of the
        probes, {"0": ..., "1": ...}, or of the action-conditioned predictor.
      params: those of {"encoder", "predictor", "classifier"} in the file; None: none.
      meta: `kind`, `family`, `config` and `video_shape` as of a run, and the fields of
        modules that the config does not describe.
      ignored: {unused name: reason}.
    """

    target: Any
    params: dict[str, Any] | None
    meta: dict[str, Any]
    ignored: dict[str, str]

    def summary(self) -> str:
        """Return the models with their sizes, and the unused names, as text."""
        lines = [f"{self.meta['kind']}, no encoder"]
        if "config" in self.meta:
            size = self.meta["config"]["model"]["encoder"]["size"]
            lines = [f"{self.meta['kind']} of {self.meta['family']}, encoder {size}"]
        for name, tree in {"target": self.target, **(self.params or {})}.items():
            count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
            lines.append(f"  {name}: {count:,} parameters")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  ignored, {why}: {', '.join(n)}" for why, n in by_reason.items()]
        return "\n".join(lines)


def _shapes_of(init: Callable[[jax.Array], Any]) -> Any:
    """Return the shapes of a model's parameters; raise UserError if it cannot exist."""
    try:
        return init_shapes(init)
    except (TypeError, ValueError) as error:
        raise UserError(
            "no model has the sizes that these weights show; they are damaged, or "
            f"--num_heads or --predictor_heads is wrong: {str(error).splitlines()[0]}"
        ) from None


def _import_action_predictor(
    state: rules.State, hints: official.Hints
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return (fields, parameters, ignored) of the action-conditioned predictor."""
    fields = official.action_predictor_fields(state, hints)
    predictor = registry.make_action_predictor(**fields)
    actions = jnp.zeros((1, 1, state["action_encoder.weight"].shape[-1]))
    tokens = jnp.zeros((1, 1, predictor.out_dim))
    inputs = tokens, actions, actions, None, (1, 1, 1)
    shapes = _shapes_of(lambda key: predictor.init(key, *inputs)["params"])
    params, ignored = rules.import_state(
        rules.action_predictor_rules(predictor), state, shapes, "predictor"
    )
    return fields, params, ignored


def _import_classifiers(
    states: list[rules.State], hints: official.Hints
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return (fields of the first head, parameters of all by number, ignored)."""
    fields = official.classifier_fields(states[0], hints)
    model = AttentiveClassifier(**fields)
    width = states[0]["pooler.query_tokens"].shape[-1]
    shapes = _shapes_of(lambda key: model.init(key, jnp.zeros((1, 1, width)))["params"])
    params: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    for i, state in enumerate(states):
        params[str(i)], unused = rules.import_state(
            rules.classifier_rules(model), state, shapes, f"probe {i}"
        )
        ignored |= {f"classifier {i} {name}": why for name, why in unused.items()}
    return fields, params, ignored


def import_file(file: files.WeightFile, hints: official.Hints) -> Converted:
    """Convert the content of a file.

    Args:
      file: see `files.read`.
      hints: properties that the weights do not show.

    Raises:
      UserError: names are missing, unknown or of another shape; or the family or the
        number of heads is unknown.
    """
    hints = dataclasses.replace(
        hints,
        num_heads=hints.num_heads or file.num_heads,
        predictor_heads=hints.predictor_heads or file.predictor_heads,
    )
    meta: dict[str, Any] = {}
    params: dict[str, Any] = {}
    ignored = dict(file.ignored)

    def ignore(part: str, unused: dict[str, str]) -> None:
        ignored.update({f"{part} {name}": why for name, why in unused.items()})

    if file.classifiers:
        fields, heads, unused = _import_classifiers(file.classifiers, hints)
        meta["classifier"] = fields
        ignored |= unused
        if not file.encoders:
            return Converted(heads, None, meta | {"kind": "probe"}, ignored)
        params["classifier"] = heads["0"]
        for i in range(1, len(heads)):
            ignored[f"classifier {i}"] = "only the first of several is used"
    has_actions = official.has_actions(file.predictor)
    if has_actions:
        fields, predictor_params, unused = _import_action_predictor(
            file.predictor, hints
        )
        meta |= {"kind": "action", "action_predictor": fields}
        ignore("predictor", unused)
        if not file.encoders:
            return Converted(predictor_params, None, meta, ignored)
    target_state = file.encoders[file.target_key]
    if has_actions or not hints.family:
        family = official.infer_family(target_state, file.predictor)
    else:
        family = hints.family
    config = official.make_config(
        family, target_state, file.predictor, hints, file.clip
    )
    encoder, predictor = build.make_models(config)
    clip_shape = (encoder.tubelet_size, encoder.patch_size, encoder.patch_size, 3)
    shapes = _shapes_of(
        lambda key: init_models((key, key), encoder, predictor, clip_shape)
    )
    encoders = {}
    for key, state in file.encoders.items():
        if key != file.target_key and not file.predictor:
            ignored[key] = "another encoder, without a predictor to train it with"
            continue
        encoders[key], unused = rules.import_state(
            rules.encoder_rules(encoder), state, shapes["encoder"], key
        )
        ignore(key, unused)
    if file.predictor and not has_actions:
        predictor_params, unused = rules.import_state(
            rules.predictor_rules(predictor),
            file.predictor,
            shapes["predictor"],
            "predictor",
        )
        ignore("predictor", unused)
    target = encoders[file.target_key]
    if file.predictor:
        params["encoder"] = encoders.get("encoder", target)
        params["predictor"] = predictor_params
    meta = {
        "kind": "pretraining" if file.predictor else "encoder",
        "family": family,
        "config": config.to_dict(),
        "video_shape": list(build.video_shapes(config)[MAIN_STREAM]),
        "official_keys": {"target": file.target_key, "all": list(encoders)},
    } | meta
    return Converted(target, params or None, meta, ignored)


def save(converted: Converted, output: str) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
      converted: the weights.
      output: folder to be made, as a workdir with a checkpoint of step 0.

    Raises:
      UserError: `output` exists.
    """

    def write(folder: pathlib.Path | str) -> None:
        checkpoint.save_converted(
            str(folder), converted.target, converted.params, converted.meta
        )

    if is_remote(output):  # a store cannot rename; Orbax commits a step or none
        write(output)
    else:
        files.write_complete(output, write)


def convert(
    source: str, output: str, hints: official.Hints = _NO_HINTS, key: str = ""
) -> Converted:
    """Convert a file of official or Hugging Face weights to a checkpoint.

    Args:
      source, key: see `files.read`.
      output: see `save`.
      hints: see `import_file`.

    Raises:
      UserError: see these functions; nothing is written.
    """
    files.require_free(output)
    converted = import_file(files.read(source, key), hints)
    converted.meta["source"] = pathlib.Path(source).name
    save(converted, output)
    return converted


def _add_position_tables(parts: dict[str, Any], encoder: VideoEncoder) -> None:
    """Add the fixed position tables of V-JEPA's files."""
    assert encoder.base_grid is not None  # V-JEPA's positions are of a fixed grid
    for part, state in parts.items():
        norm, name = "norm.weight", "pos_embed"
        if part == "predictor":
            norm, name = f"predictor_{norm}", f"predictor_{name}"
        table = positions.sincos_table(encoder.base_grid, len(state[norm]))
        state[name] = table[None]


def export_parts(models: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Return official state dicts without prefixes, by their key in a file.

    Args:
      models: {"target"} and those of {"encoder", "predictor", "classifier"} that the
        checkpoint has, from `checkpoint.restore_models`.
      meta: of the checkpoint.

    Raises:
      UserError: no official code has this model.
    """
    parts: dict[str, Any] = {}
    if "classifier" in meta:
        is_probe = meta["kind"] == "probe"
        params = models["target"] if is_probe else {"0": models["classifier"]}
        head_rules = rules.classifier_rules(AttentiveClassifier(**meta["classifier"]))
        heads = [
            rules.export_state(head_rules, params[i]) for i in sorted(params, key=int)
        ]
        parts["classifiers"] = heads
        if is_probe:
            is_first = meta["classifier"]["blocks_on_query"]
            return {"classifier": heads[0]} if is_first else parts
    predictor_rules: list[rules.Rule] = []
    if "action_predictor" in meta:
        action_predictor = registry.make_action_predictor(**meta["action_predictor"])
        predictor_rules = rules.action_predictor_rules(action_predictor)
        if "config" not in meta:
            return {"predictor": rules.export_state(predictor_rules, models["target"])}
    config = restored(meta["config"])
    family = official.family_of(config)
    encoder, predictor = build.make_models(config)
    keys = meta.get("official_keys", _KEYS_OF_A_RUN)
    encoder_rules = rules.encoder_rules(encoder)
    wanted = {"predictor": predictor_rules or rules.predictor_rules(predictor)}
    if "encoder" in keys["all"]:
        wanted["encoder"] = encoder_rules
    backbones = {
        part: rules.export_state(part_rules, models[part])
        for part, part_rules in wanted.items()
        if part in models
    }
    backbones[keys["target"]] = rules.export_state(encoder_rules, models["target"])
    if family == "vjepa":
        _add_position_tables(backbones, encoder)
    return backbones | parts


def export_official(source: str, output: str, step: int | None = None) -> None:
    """Write a checkpoint as an official `.pt` file.

    Args:
      source: workdir of a run, or folder of a conversion.
      output: file to be made.
      step: a saved step; None: the latest.

    Raises:
      UserError: the checkpoint cannot be read or exported; nothing is written.
    """
    files.require_free(output)
    models, meta = checkpoint.restore_models(source, step)
    is_wrapped = meta.get("kind", "pretraining") in ("pretraining", "encoder")
    prefix = "module.backbone." if is_wrapped else "module."
    with checkpoint.explain_misfit(source):
        parts = export_parts(models, meta)
    files.write_official(output, parts, prefix)


def export_huggingface(source: str, output: str, step: int | None = None) -> None:
    """Write a checkpoint as a folder for VJEPA2 of transformers.

    Args:
      source, step: see `export_official`.
      output: folder to be made.

    Raises:
      UserError: see `export_official`; or the model is not V-JEPA 2.
    """
    files.require_free(output)
    models, meta = checkpoint.restore_models(source, step)
    kind = meta.get("kind", "pretraining")
    if kind not in ("pretraining", "encoder"):
        raise UserError(f"transformers has no model for a checkpoint of kind '{kind}'")
    with checkpoint.explain_misfit(source):
        config = restored(meta["config"])
        family = official.family_of(config)
        encoder, predictor = build.make_models(config)
    mlps = {encoder.mlp, predictor.mlp}
    if family != "vjepa2" or mlps != {"gelu"}:
        raise UserError(
            f"transformers has only V-JEPA 2 with GELU; {source} is {family} with "
            f"{' and '.join(sorted(mlps))}"
        )
    with checkpoint.explain_misfit(source):
        exported = export_parts(models, meta)
    parts = {"encoder": exported[meta.get("official_keys", _KEYS_OF_A_RUN)["target"]]}
    clip = config.data.num_frames, config.data.resolution
    fields = huggingface.encoder_config(encoder, clip)
    if "predictor" in exported:
        parts["predictor"] = exported["predictor"]
        fields |= huggingface.predictor_config(predictor)
    if "classifiers" in exported:
        parts["classifier"] = exported["classifiers"][0]
        fields |= huggingface.classifier_config(**meta["classifier"])
    files.write_huggingface(output, huggingface.from_official(parts), fields)
