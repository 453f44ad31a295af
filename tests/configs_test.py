"""Official recipes: their parameters, cost and shardings, and their small forms' steps.

`UPDATE_GOLDEN=1 pytest tests/configs_test.py` rewrites `tests/goldens/trees/`.
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_setup import one_device

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import smoke
from vjepa_jax.config.defaults import get_config
from vjepa_jax.config.rules import validate
from vjepa_jax.objective.state import init_shapes, make_init
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build, flops

ROOT = pathlib.Path(__file__).parents[1]
TREES = ROOT / "tests" / "goldens" / "trees"
V5P, H100, UTILISATION = 459e12, 989e12, 0.4
# Parameters of the encoder: exact, or in millions. None includes the fixed table of
# positions, which V-JEPA 2's files contain; those of 2.1 include the embedding of
# images, both modality embeddings and four norms.
PUBLISHED = {
    "vjepa2:vitl16": 303.9,
    "vjepa2:vith16": 631.6,
    "vjepa2:vitg16": 1012.2,
    "vjepa2_1:vitb16": 86_833_152,
    "vjepa2_1:vitl16": 304.7,
    "vjepa2_1:vitg16": 1_013_267_968,
    "vjepa2_1:vitG16": 1845.2,
}


@functools.cache
def recipes(family: str) -> types.ModuleType:
    """Load a config file of the family."""
    path = ROOT / "configs" / f"{family}.py"
    spec = importlib.util.spec_from_file_location(family, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = ("vjepa", "vjepa2", "vjepa2_1")
NAMES = [f"{family}:{v}" for family in FAMILIES for v in recipes(family).VARIANTS]


def config_of(name: str, suffix: str = ""):
    family, variant = name.split(":")
    return recipes(family).get_config(variant + suffix)


def complete(config):
    """Set the paths that a user of the recipe must give."""
    config.data.path = "videos"
    for fields in config.streams.values():
        fields.path = "images"
    config.init.path = "run" if config.init.is_required else ""
    config.teacher.path = "run" if config.teacher.is_required else ""
    return config


@pytest.mark.parametrize("name", NAMES)
def test_recipe_validates_and_requires_what_it_continues_from(name):
    config = complete(config_of(name))
    validate(config)
    assert config.init.is_required == ("cooldown" in name)
    for key in ("init", "teacher"):
        if config[key].is_required:
            config[key].path = ""
            with pytest.raises(UserError, match=rf"{key}\.path"):
                validate(config)
            config[key].path = "run"


def test_cooldowns_end_where_the_official_ones_do():
    def end_of(name, **optim):
        config = config_of(name)
        config.optim.update(optim)
        rate = build.make_schedules(config)["learning_rate"]
        return float(rate(config.total_steps - 1))

    assert end_of("vjepa:vitl16") == pytest.approx(7.5e-5, rel=0.02)
    assert end_of("vjepa2:vitl16") == pytest.approx(5.25e-4)
    assert end_of("vjepa2:vitg16_cooldown_384") == pytest.approx(1.06e-4, rel=0.005)
    assert end_of("vjepa2_1:vitG16_cooldown") == pytest.approx(1.21e-4, rel=0.005)
    paper = end_of("vjepa2:vitl16_cooldown", schedule_scale=1.0)
    assert paper == pytest.approx(1e-6, rel=1e-3)


# ------------------------------------------------------------------- trees and counts


@functools.cache
def _tree(model_json: str):
    """Return (shapes, shardings) of the state for a config's `model`, as JSON."""
    config = get_config()
    with config.unlocked():
        config.model.update(json.loads(model_json))
    objective = build.make_objective(config)
    clips = {"video": jax.ShapeDtypeStruct((1, 2, 16, 16, 3), "uint8")}
    init = make_init(objective, build.make_optimizer(config), clips)
    mesh = sharding.make_mesh(**config_of(NAMES[0]).mesh)
    return init_shapes(init), sharding.state_shardings(init, mesh)


def tree_of(name: str):
    return _tree(config_of(name).model.to_json(sort_keys=True))


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def listed(tree, shardings) -> list[str]:
    leaves, specs = jax.tree.leaves_with_path(tree), jax.tree.leaves(shardings)
    return [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} "
        f"{leaf.dtype}{list(leaf.shape)} {tuple(sharding.spec)}"
        for (path, leaf), sharding in zip(leaves, specs, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_their_shardings_are_as_recorded(name):
    shapes, shardings = tree_of(name)
    lines = [f"# {part}: {count(tree)}" for part, tree in shapes.params.items()]
    lines += listed(shapes.params, shardings.params)
    # On file systems that ignore case, vitg and vitG are the same name.
    golden = name.replace(":", "-").replace("vitG", "vit_gigantic")
    path, text = TREES / f"{golden}.txt", "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text
    # The target and the moments are sharded as the parameters.
    encoder = listed(shapes.params["encoder"], shardings.params["encoder"])
    assert listed(shapes.target, shardings.target) == encoder
    for moment in ("mu", "nu"):
        tree = optax_moment(shapes.opt_state, moment)
        specs = optax_moment(shardings.opt_state, moment)
        assert listed(tree, specs) == lines[2:]
    # Every matrix is split, the same way in every layer.
    for line in lines[2:]:
        is_vector = line.split()[0].endswith(("bias", "scale", "mask_tokens", "ality"))
        assert is_vector != ("'fsdp'" in line), line


def test_official_recipes_split_the_state_over_all_devices_of_a_host():
    for name in NAMES:
        assert dict(sharding.make_mesh(**config_of(name).mesh).shape) == {
            "data": 1,
            "fsdp": jax.device_count(),
        }


def optax_moment(opt_state, name: str):
    return next(getattr(part, name) for part in opt_state if hasattr(part, name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_encoder_has_the_published_number_of_parameters(name):
    ours, published = count(tree_of(name)[0].params["encoder"]), PUBLISHED[name]
    if isinstance(published, int):
        assert ours == published
    else:
        assert round(ours / 1e6, 1) == published


def test_predictors_have_the_released_shapes():
    shapes = {
        name: jax.tree.map(lambda x: x.shape, tree_of(f"vjepa2_1:{name}")[0].params)
        for name in ("vitb16", "vitG16")
    }
    small, large = (shapes[name]["predictor"] for name in ("vitb16", "vitG16"))
    assert small["embed"]["kernel"] == (768, 384) and "input" not in small
    assert small["proj"]["kernel"] == small["proj_context"]["kernel"] == (384, 1664)
    assert large["input"]["kernel"] == (4 * 1664, 1664)
    assert large["embed"]["kernel"] == (1664, 384)
    assert large["proj"]["kernel"] == (384, 4 * 1664)
    assert small["mask_tokens"] == large["mask_tokens"] == (8, 384)


# ------------------------------------------------------------------------ distillation


def students(**fields):
    """Return the distilled ViT-B's config, changed, and its models."""
    config = complete(config_of("vjepa2_1:vitb16"))
    config.update_from_flattened_dict(fields)
    return config, *build.make_models(config)


def test_student_learns_from_a_larger_teacher():
    config, encoder, predictor = students(
        **{"data.resolution": 64, "streams.image.resolution": 64}
    )
    trained = config_of("vjepa2_1:vitG16")
    teacher = build.make_teacher(config, trained, encoder, predictor)
    assert (teacher.depth, teacher.num_levels, teacher.out_dim) == (48, 1, 1664)
    assert (encoder.out_dim, predictor.out_dim) == (768, 1664)
    objective = build.make_objective(config, trained)
    assert (objective.encoder, objective.teacher) == (encoder, teacher)
    streams = objective.streams
    shapes, masks, batch = build.video_shapes(config), {}, {}
    for name, stream in streams.items():
        batch[name] = jax.ShapeDtypeStruct((2, *shapes[name]), jnp.uint8)
        masks[name] = {
            mask: tuple(
                jax.ShapeDtypeStruct((2, n), jnp.int32)
                for n in (spec.num_context, spec.num_target)
            )
            for mask, spec in stream.masks.items()
        }
    params, target = (
        tree_of(f"vjepa2_1:{name}")[0].params for name in ("vitb16", "vitG16")
    )
    loss, metrics = jax.eval_shape(
        functools.partial(objective.loss, key=None),
        params,
        target["encoder"],
        batch,
        masks,
        step=jnp.zeros((), jnp.int32),
    )
    assert loss.shape == () and "train/context_term" in metrics


@pytest.mark.parametrize(
    ("of_student", "of_teacher", "message"),
    [
        ({"model.predictor.out_dim": 768}, {}, "1664"),
        ({"teacher.output_levels": 5}, {}, "has 4"),
        ({}, {"model.image_embed": False}, "cannot be cut"),
        ({}, {"model.encoder.patch_size": 32}, "patch_size"),
    ],
)
def test_teacher_that_does_not_fit_is_refused(of_student, of_teacher, message):
    config, encoder, predictor = students(**of_student)
    trained = config_of("vjepa2_1:vitG16")
    trained.update_from_flattened_dict(of_teacher)
    with pytest.raises(UserError, match=message):
        build.make_teacher(config, trained, encoder, predictor)


# ------------------------------------------------------------------------------- cost


def cost(config) -> float:
    """Return the FLOPs of a run."""
    trained = config_of("vjepa2_1:vitG16") if config.teacher.is_required else None
    objective = build.make_objective(config, trained)
    return build.step_flops(config, objective) * config.total_steps


def row_of(name: str) -> str:
    """Return the variant's row in the table of its docstring."""
    config = config_of(name)
    total = cost(config)
    hours = [total / (peak * UTILISATION * 3600) for peak in (V5P, H100)]
    sizes = " + ".join(str(size) for size in build.batch_sizes(config).values())
    cells = (
        f"`{name.split(':')[1]}`",
        sizes,
        f"{config.data.num_frames} x {config.data.resolution}²",
        str(config.total_steps),
        f"{total / 1e21:.2f}",
        *(f"{h / 1000:.1f} k" for h in hours),
    )
    return " | ".join(cells)


@pytest.mark.parametrize("family", FAMILIES)
def test_docstring_has_the_cost_of_every_variant(family):
    rows = [
        " | ".join(cell.strip() for cell in line.strip("|").split("|"))
        for line in recipes(family).__doc__.splitlines()
        if line.startswith("|")
    ]
    wanted = [row_of(name) for name in NAMES if name.startswith(f"{family}:")]
    assert rows[2:] == wanted


# Per clip, in TFLOP: an independent estimate with other mask counts.
@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("vjepa:vitl16", 2.5),
        ("vjepa:vith16", 4.7),
        ("vjepa2:vitl16", 3.5),
        ("vjepa2:vith16", 6.4),
        ("vjepa2:vitg16", 9.7),
        ("vjepa2:vitl16_cooldown", 24),
        ("vjepa2:vith16_cooldown", 40),
        ("vjepa2:vitg16_cooldown", 58),
        ("vjepa2:vitg16_cooldown_384", 212),
    ],
)
def test_cost_per_clip_agrees_with_an_independent_estimate(name, tera):
    config = config_of(name)
    per_clip = cost(config) / config.total_steps / config.batch_size
    assert per_clip == pytest.approx(tera * 1e12, rel=0.08)


def test_pixels_as_targets_save_the_target_encoder():
    config = config_of("vjepa2:vitl16")
    encoder, predictor = build.make_models(config)
    assert predictor.out_dim == encoder.out_dim == 1024
    features = cost(config)
    config.objective.target = "pixels"
    assert build.make_models(config)[1].out_dim == 2 * 16 * 16 * 3
    size = flops.Transformer(24, 1024, 4096, "gelu")
    forward = flops.encoder_flops(size, 8 * 16 * 16, 2 * 16 * 16 * 3)
    hidden = sum(
        m.num_target
        for m in build.make_streams(config, encoder)["video"].masks.values()
    )
    wider = 3 * 2 * hidden * 384 * (1536 - 1024)
    saved = (forward - wider) * config.batch_size * config.total_steps
    assert features - cost(config) == saved


# ------------------------------------------------------------------------- small forms


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("", ("one", False)),
        ("smoke", ("one", True)),
        ("two", ("two", False)),
        ("two,smoke", ("two", True)),
        ("two:smoke", ("two", True)),
    ],
)
def test_argument_names_variant_and_form(argument, wanted):
    assert smoke.split_argument(argument, ("one", "two")) == wanted


@pytest.mark.parametrize("argument", ["three", "one,two", "Smoke", "one,small"])
def test_unknown_argument_lists_the_variants(argument):
    with pytest.raises(UserError, match="one, two"):
        smoke.split_argument(argument, ("one", "two"))


@functools.cache
def _two_steps(config_json: str):
    """Return (state before, state after, metrics of both steps) of a small recipe.

    Many variants have the same small form; each is compiled once.
    """
    config = get_config()
    with config.unlocked():
        config.update(_with_tuples(json.loads(config_json)))
    program = build.make_program(config, one_device())
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 256, clips.shape, np.uint8)
        for name, clips in program.batch.items()
    }
    # Compilation takes most of the time: skip that of `init`, and optimise less.
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), program.state)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), state.params
    )
    state = before = state.replace(params=params, target=params["encoder"])
    options = {"xla_backend_optimization_level": 0}
    step = jax.jit(program.train_step, compiler_options=options)
    metrics = []
    for _ in range(config.total_steps):
        state, values = step(state, batch)
        metrics.append(jax.device_get(values))
    return before, state, metrics


def _with_tuples(data):
    if isinstance(data, dict):
        return {key: _with_tuples(value) for key, value in data.items()}
    return tuple(data) if isinstance(data, list) else data


@pytest.mark.parametrize("name", NAMES)
def test_small_form_validates_and_takes_two_steps(name):
    full, config = config_of(name), config_of(name, ",smoke")
    validate(config)
    assert list(config.streams) == list(full.streams)
    assert len(config.model.encoder.levels) == len(full.model.encoder.levels)
    for part, keys in {
        "model": ("pos_embed", "remat", "image_embed", "scale_init"),
        "optim": ("schedule", "schedule_scale", "clip_norm", "learning_rate"),
        "objective": ("context_weight", "context_distance"),
    }.items():
        assert all(config[part][key] == full[part][key] for key in keys), part
    before, after, metrics = _two_steps(config.to_json(sort_keys=True))
    for values in metrics:
        assert all(np.isfinite(v) for v in values.values()), values
    assert int(after.guard.skipped) == 0 and int(after.step) == 2
    for part in ("encoder", "predictor"):
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), before.params[part], after.params[part]
        )
        still = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, has_moved in jax.tree.leaves_with_path(moved)
            if not has_moved
        }
        # A distilled encoder does not train the norms of its other levels.
        distilled = part == "encoder" and full.teacher.is_required
        unused = {f"norm_{i}/{leaf}" for i in range(3) for leaf in ("bias", "scale")}
        assert still == (unused if distilled else set())
    if full.streams:
        assert "train/loss_of_image" in metrics[0]
