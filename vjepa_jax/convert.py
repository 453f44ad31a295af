r"""Convert weights: official PyTorch or Hugging Face -> checkpoint, and back.

    python -m vjepa_jax.convert --source=vitl.pt --output=runs/vitl
    python -m vjepa_jax.convert --source=runs/vitl --output=vitl.pt --to=official
    python -m vjepa_jax.convert --source=runs/vitl --output=DIR --to=huggingface

Sources: files of V-JEPA, V-JEPA 2 (pretraining and action-conditioned), V-JEPA 2.1 and
of attentive probes, or a folder of a Hugging Face VJEPA2. Every array is used, or
printed with the reason why not; otherwise nothing is written.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import is_remote
from vjepa_jax.config.saved import restored
from vjepa_jax.models import positions, registry
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint, cli
from vjepa_jax.weights import files, huggingface, official
from vjepa_jax.weights import rules as rules

TARGETS = ("checkpoint", "official", "huggingface")
_NO_HINTS = official.Hints()
# Of the encoders in an official file: a run of ours has both.
_OUR_KEYS = {"target": "target_encoder", "all": ("encoder", "target_encoder")}


@dataclasses.dataclass
class Converted:
    """Weights in our form, as `checkpoint.save_converted` takes them.

    Attributes:
      target: parameters of the encoder. Where a file has none, of what it has: of
        probes, {"0": ..., "1": ...}, or of the action-conditioned predictor.
      params: of {"encoder", "predictor", "classifier"} what the file has besides.
      meta: `kind`, `family`, `config` and `video_shape` as a run has them, and the
        fields of modules that the config does not know.
      ignored: names not used, with the reason.
    """

    target: Any
    params: dict[str, Any] | None
    meta: dict[str, Any]
    ignored: dict[str, str]


def _shapes(module: nn.Module, *args: Any) -> Any:
    boxed = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
    return nn.unbox(boxed)["params"]


def _import_predictor(
    source: files.Source, encoder: VideoEncoder, predictor: Predictor
):
    """Return (parameters, ignored) of V-JEPA's predictor."""
    one = jnp.zeros((1, 1), jnp.int32)
    context = jnp.zeros((1, 1, encoder.out_dim))
    shapes = _shapes(predictor, context, one, one, (1, 1, 1))
    predictor_rules = rules.predictor_rules(predictor)
    return rules.import_state(predictor_rules, source.predictor, shapes, "predictor")


def _import_action_predictor(source: files.Source, hints: official.Hints):
    """Return (fields, parameters, ignored) of the action-conditioned predictor."""
    fields = official.action_predictor_fields(source.predictor, hints)
    predictor = registry.make_action_predictor(**fields)
    actions = jnp.zeros((1, 1, source.predictor["action_encoder.weight"].shape[-1]))
    tokens = jnp.zeros((1, 1, predictor.out_dim))
    shapes = _shapes(predictor, tokens, actions, actions, None, (1, 1, 1))
    found = rules.import_state(
        rules.action_predictor_rules(predictor), source.predictor, shapes, "predictor"
    )
    return fields, *found


def _import_classifiers(source: files.Source, hints: official.Hints):
    """Return (fields of the first head, parameters of all by number, ignored)."""
    fields = official.classifier_fields(source.classifiers[0], hints)
    model = AttentiveClassifier(**fields)
    width = source.classifiers[0]["pooler.query_tokens"].shape[-1]
    shapes = _shapes(model, jnp.zeros((1, 1, width)))
    params, ignored = {}, {}
    for i, state in enumerate(source.classifiers):
        params[str(i)], unused = rules.import_state(
            rules.classifier_rules(model), state, shapes, f"probe {i}"
        )
        ignored |= {f"classifier {i} {name}": why for name, why in unused.items()}
    return fields, params, ignored


def import_source(source: files.Source, hints: official.Hints = _NO_HINTS) -> Converted:
    """Turn what was read from a file into our parameters.

    Raises:
      UserError: names are missing, unknown or of another shape; the family or the heads
        are not known.
    """
    hints = dataclasses.replace(
        hints,
        num_heads=hints.num_heads or source.num_heads,
        predictor_heads=hints.predictor_heads or source.predictor_heads,
    )
    meta: dict[str, Any] = {}
    params: dict[str, Any] = {}
    ignored = dict(source.ignored)

    def note(part, unused):
        ignored.update({f"{part} {name}": why for name, why in unused.items()})

    if source.classifiers:
        fields, heads, unused = _import_classifiers(source, hints)
        meta["classifier"] = fields
        ignored |= unused
        if not source.encoders:
            return Converted(heads, None, meta | {"kind": "probe"}, ignored)
        params["classifier"] = heads["0"]
        for i in range(1, len(heads)):
            ignored[f"classifier {i}"] = "the first of several is taken"
    has_actions = official.has_actions(source.predictor)
    if has_actions:
        fields, predictor_params, unused = _import_action_predictor(source, hints)
        meta |= {"kind": "action", "action_predictor": fields}
        note("predictor", unused)
        if not source.encoders:
            return Converted(predictor_params, None, meta, ignored)
    state = source.encoders[source.target_key]
    if has_actions or not hints.family:
        family = official.infer_family(state, source.predictor)
    else:
        family = hints.family
    config = official.make_config(family, state, source.predictor, hints, source.clip)
    encoder, predictor = build.make_models(config)
    encoder_rules, encoders = rules.encoder_rules(encoder), {}
    clip = (1, encoder.tubelet_size, encoder.patch_size, encoder.patch_size, 3)
    shapes = _shapes(encoder, jnp.zeros(clip))
    for key, state in source.encoders.items():
        if key != source.target_key and not source.predictor:
            ignored[key] = "another encoder, without a predictor to train it with"
            continue
        encoders[key], unused = rules.import_state(encoder_rules, state, shapes, key)
        note(key, unused)
    if source.predictor and not has_actions:
        predictor_params, unused = _import_predictor(source, encoder, predictor)
        note("predictor", unused)
    target = encoders[source.target_key]
    if source.predictor:
        params["encoder"] = encoders.get("encoder", target)
        params["predictor"] = predictor_params
    meta = {
        "kind": "pretraining" if source.predictor else "encoder",
        "family": family,
        "config": config.to_dict(),
        "video_shape": list(build.video_shapes(config)[build.MAIN_STREAM]),
        "official_keys": {"target": source.target_key, "all": list(encoders)},
    } | meta
    return Converted(target, params or None, meta, ignored)


def save(converted: Converted, output: str) -> None:
    """Write a checkpoint, complete or not at all.

    Args:
      converted: the weights.
      output: folder to be made, as a workdir of a run that is at step 0.

    Raises:
      UserError: `output` exists.
    """

    def write(place: pathlib.Path | str) -> None:
        checkpoint.save_converted(
            str(place), converted.target, converted.params, converted.meta
        )

    if is_remote(output):  # no renaming there; Orbax completes a step or leaves none
        write(output)
    else:
        files.write_whole(output, write)


def convert(
    source: str, output: str, hints: official.Hints = _NO_HINTS, key: str = ""
) -> Converted:
    """Convert a file of official or Hugging Face weights to a checkpoint.

    Args:
      source: see `weight_files.read`.
      output: see `save`.
      hints: what the weights do not tell.
      key: the encoder to take, where a file has several.

    Raises:
      UserError: something that the user can mend; nothing is written.
    """
    files.require_free(output)
    converted = import_source(files.read(source, key), hints)
    converted.meta["source"] = pathlib.Path(source).name
    save(converted, output)
    return converted


def _add_position_tables(parts: dict[str, Any], encoder: VideoEncoder) -> None:
    """Add the fixed tables which V-JEPA's files hold."""
    for part, state in parts.items():
        norm, name = "norm.weight", "pos_embed"
        if part == "predictor":
            norm, name = f"predictor_{norm}", f"predictor_{name}"
        table = positions.sincos_table(encoder.base_grid, len(state[norm]))
        state[name] = table[None]


def export_parts(models: dict[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    """Return official state dicts without prefixes, by their key in a file.

    Args:
      models: {"target"}, and what of {"encoder", "predictor", "classifier"} there is,
        as `checkpoint.restore_models` gives them.
      meta: of the checkpoint.

    Raises:
      UserError: no official code computes this model.
    """
    parts: dict[str, Any] = {}
    if "classifier" in meta:
        is_probe = meta["kind"] == "probe"
        found = models["target"] if is_probe else {"0": models["classifier"]}
        head_rules = rules.classifier_rules(AttentiveClassifier(**meta["classifier"]))
        heads = [
            rules.export_state(head_rules, found[i]) for i in sorted(found, key=int)
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
    keys = meta.get("official_keys", _OUR_KEYS)
    wanted = {"predictor": predictor_rules or rules.predictor_rules(predictor)}
    if "encoder" in keys["all"]:
        wanted["encoder"] = rules.encoder_rules(encoder)
    backbones = {
        part: rules.export_state(part_rules, models[part])
        for part, part_rules in wanted.items()
        if part in models
    }
    backbones[keys["target"]] = rules.export_state(
        rules.encoder_rules(encoder), models["target"]
    )
    if family == "vjepa":
        _add_position_tables(backbones, encoder)
    return backbones | parts


def export_official(source: str, output: str, step: int | None = None) -> None:
    """Write a checkpoint as an official `.pt` file.

    Args:
      source: folder of a run or of a conversion.
      output: file to be made.
      step: a saved step; None takes the latest.

    Raises:
      UserError: something that the user can mend; nothing is written.
    """
    files.require_free(output)
    models, meta = checkpoint.restore_models(source, step)
    is_wrapped = meta.get("kind", "pretraining") in ("pretraining", "encoder")
    prefix = "module.backbone." if is_wrapped else "module."
    files.write_official(output, export_parts(models, meta), prefix)


def export_huggingface(source: str, output: str, step: int | None = None) -> None:
    """Write a checkpoint as a folder that transformers' VJEPA2 loads.

    Args:
      source, step: see `export_official`.
      output: folder to be made.

    Raises:
      UserError: it is not of V-JEPA 2; nothing is written.
    """
    files.require_free(output)
    models, meta = checkpoint.restore_models(source, step)
    kind = meta.get("kind", "pretraining")
    if kind not in ("pretraining", "encoder"):
        raise UserError(f"transformers has no model for a checkpoint of kind '{kind}'")
    config = restored(meta["config"])
    family = official.family_of(config)
    encoder, predictor = build.make_models(config)
    kinds = {encoder.mlp, predictor.mlp}
    if family != "vjepa2" or kinds != {"gelu"}:
        raise UserError(
            f"transformers has V-JEPA 2 with GELU only; {source} is {family} with "
            f"{' and '.join(sorted(kinds))}"
        )
    exported = export_parts(models, meta)
    parts = {"encoder": exported[meta.get("official_keys", _OUR_KEYS)["target"]]}
    clip = config.data.num_frames, config.data.resolution
    fields = huggingface.encoder_config(encoder, clip)
    if "predictor" in exported:
        parts["predictor"] = exported["predictor"]
        fields |= huggingface.predictor_config(predictor)
    if "classifiers" in exported:
        parts["classifier"] = exported["classifiers"][0]
        fields |= huggingface.classifier_config(**meta["classifier"])
    files.write_huggingface(output, huggingface.from_official(parts), fields)


def describe(converted: Converted) -> str:
    """Return what was converted, and every name that was not used with the reason."""
    meta, lines = converted.meta, []
    for name, tree in {"target": converted.target, **(converted.params or {})}.items():
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
        lines.append(f"  {name}: {count:,} parameters")
    if "config" in meta:
        model = meta["config"]["model"]
        size = model["encoder"]["size"]
        lines.insert(0, f"{meta['kind']} of {meta['family']}, encoder {size}")
    else:
        lines.insert(0, f"{meta['kind']}, no encoder")
    by_reason: dict[str, list[str]] = {}
    for name, why in converted.ignored.items():
        by_reason.setdefault(why, []).append(name)
    lines += [f"  ignored, {why}: {', '.join(n)}" for why, n in by_reason.items()]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    source, output = _SOURCE.value, _OUTPUT.value
    if _TO.value == "checkpoint":
        hints = official.Hints(
            _FAMILY.value or "", _NUM_HEADS.value, _PREDICTOR_HEADS.value
        )
        print(describe(convert(source, output, hints, _KEY.value)))
    else:
        export = export_official if _TO.value == "official" else export_huggingface
        export(source, output, _STEP.value)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "What to convert", required=True)
    _OUTPUT = flags.DEFINE_string("output", None, "What to make", required=True)
    _TO = flags.DEFINE_enum("to", "checkpoint", TARGETS, "What it is to be")
    _FAMILY = flags.DEFINE_enum(
        "family", None, official.FAMILIES, "Family, where the weights do not tell it"
    )
    _KEY = flags.DEFINE_string("key", "", "Encoder to take, e.g. target_encoder")
    _NUM_HEADS = flags.DEFINE_integer("num_heads", 0, "Heads, of unpublished sizes")
    _PREDICTOR_HEADS = flags.DEFINE_integer(
        "predictor_heads", 0, "Heads of the predictor, of unpublished sizes"
    )
    _STEP = flags.DEFINE_integer("step", None, "Step to export, by default the latest")
    cli.run(main)
