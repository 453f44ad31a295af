"""Equal to the official PyTorch code, golden file by golden file.

Each `.npz` holds what the official modules computed in fp32 on tiny models, and in
`__meta__` all that is needed to build ours. The environment variable `VJEPA_GOLDENS`
names another folder.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import FOLDER, Golden

from vjepa_jax.models import registry
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.models.layers import take_tokens
from vjepa_jax.objective import losses, optim
from vjepa_jax.objective.masked import LossTerms, MaskedObjective, Stream
from vjepa_jax.weights import rules as weights

FILES = sorted(FOLDER.glob("*.npz"))
# The columns of `losses` by family; the later ones may be missing.
LOSS_COLUMNS = {
    "vjepa": ("train/total_loss", "train/loss", "train/prediction_variance_term"),
    "vjepa2": ("train/total_loss",),
    "vjepa2_1": ("train/total_loss", "train/loss", "train/context_term"),
}
KNOWN_OF_OPTIMIZER = {
    *("start_lr", "lr", "final_lr", "wd", "final_wd", "warmup_steps", "anneal_steps"),
    *("total_steps", "ema", "betas", "eps", "schedule"),
}

FEATURES = 2e-5  # max error over the output's standard deviation
LOSSES = 1e-4  # relative
TARGET = 1e-4
SCHEDULES = 1e-6
# Token counts differ from step to step, hence every step compiles: spend less on it.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
    },
)


@functools.cache
def apply_encoder(encoder):
    """Return the encoder's forward pass; all uses share its compilations."""
    return quick_jit(encoder.apply)


def tree_of(rules, state, init, what):
    """Import a state dict, with every array of ours and theirs accounted for."""
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))["params"]
    params, _ = weights.import_state(rules, state, shapes, what)
    assert jax.tree.structure(params) == jax.tree.structure(dict(shapes))
    again = weights.export_state(rules, params)
    for name, value in again.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    return params


def check(actual, wanted, tolerance, what, report):
    """Compare with a tolerance relative to the wanted output's deviation."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, what
    error = np.abs(actual - wanted).max() / max(wanted.std(), 1e-12)
    report.append(f"{what} {error:.1e}")
    assert error <= tolerance, f"{what}: {error:.2e} above {tolerance}"


def check_values(actual, wanted, tolerance, what, report):
    """Compare scalars with a relative tolerance."""
    wanted = np.asarray(wanted, np.float64)
    error = (np.abs(np.asarray(actual) - wanted) / np.maximum(abs(wanted), 1e-12)).max()
    report.append(f"{what} {error:.1e}")
    assert error <= tolerance, f"{what}: {error:.2e} above {tolerance}"


def position_fields(meta):
    family = meta["family"]
    grid = tuple(
        meta[a] // meta[b]
        for a, b in (
            ("num_frames", "tubelet_size"),
            ("img_size", "patch_size"),
            ("img_size", "patch_size"),
        )
    )
    pos = meta.get("pos", "")
    if family == "vjepa2_1":
        assert meta["interpolate_rope"] == "to a 16x16 grid"
        return {"pos_embed": "rope", "base_grid": (1, 16, 16)}
    if pos == "sincos3d uniform_power":
        return {"pos_embed": "sincos", "base_grid": grid}
    assert family == "vjepa2" and pos == "rope3d as in V-JEPA 2 (sin/cos tiled)"
    return {"pos_embed": "rope_tiled"}


def make_models(meta):
    assert meta["family"] in LOSS_COLUMNS, meta["family"]
    swiglu = "swiglu_wide" if meta.get("wide_silu", True) else "swiglu"
    mlp = swiglu if meta.get("use_silu") else "gelu"
    is_gated = meta.get("use_pred_silu", meta.get("use_silu"))
    shared = {
        "norm_eps": meta["norm_eps"],
        "scan_layers": True,
        **position_fields(meta),
    }
    levels = tuple(meta.get("hierarchical_layers", ()))
    is_2_1 = meta["family"] == "vjepa2_1"
    size = registry.Size(
        meta["depth"],
        meta["embed_dim"],
        meta["num_heads"],
        int(meta["embed_dim"] * meta["mlp_ratio"]),
    )
    encoder = registry.make_encoder(
        size,
        patch_size=meta["patch_size"],
        tubelet_size=meta["tubelet_size"],
        levels=levels,
        image_embed=is_2_1,
        mlp=mlp,
        **shared,
    )
    predictor = registry.make_predictor(
        depth=meta["predictor_depth"],
        width=meta["predictor_dim"],
        num_heads=meta["predictor_heads"],
        out_dim=encoder.out_dim,
        num_mask_tokens=meta["num_mask_tokens"],
        input_dim=encoder.width if len(levels) > 1 else 0,
        predict_context=is_2_1,
        image_embed=is_2_1,
        mlp_ratio=meta.get("predictor_mlp_ratio", 4.0),
        mlp=swiglu if is_gated else "gelu",
        **shared,
    )
    return encoder, predictor


def import_models(golden, encoder, predictor):
    one = jnp.zeros((1, 1), jnp.int32)

    def init_predictor(key):
        context = jnp.zeros((1, 1, encoder.out_dim))
        return predictor.init(key, context, one, one, (1, 1, 1))

    def init_encoder(key):
        return encoder.init(key, golden.clips(0))

    rules = weights.encoder_rules(encoder)
    states = golden.states
    return {
        "encoder": tree_of(rules, states["encoder"], init_encoder, "encoder"),
        "predictor": tree_of(
            weights.predictor_rules(predictor),
            states["predictor"],
            init_predictor,
            "predictor",
        ),
    }, tree_of(rules, states["target_encoder"], init_encoder, "target encoder")


def make_schedules(o):
    """Return learning rate, weight decay and EMA momentum of the golden's recipe."""
    assert set(o) <= KNOWN_OF_OPTIMIZER, set(o) - KNOWN_OF_OPTIMIZER
    steps, kind = o["total_steps"], o.get("schedule", "cosine")
    rates = o["start_lr"], o["lr"], o["final_lr"]
    if kind == "cosine":
        rate = optim.warmup_cosine(*rates, o["warmup_steps"], steps)
    elif kind == "linear":
        rate = optim.linear_decay(*rates[1:], steps)
    else:
        assert kind == "wsd", kind
        rate = optim.warmup_stable_decay(
            *rates, o["warmup_steps"], o["anneal_steps"], steps
        )
    decay = optim.cosine(o["wd"], o["final_wd"], steps)
    return rate, decay, optim.linear(*o["ema"], steps)


def make_terms(meta):
    weight = meta["lambda_context"] if meta["family"] == "vjepa2_1" else 0.0
    if meta.get("offset_context_loss"):
        # Distances are divided by the grid's side over 16, in whole numbers.
        assert meta["img_size"] // meta["patch_size"] // 16 == 1
    return LossTerms(
        exponent=meta.get("loss_exp", 1.0),
        context_weight=weight,
        context_distance=meta.get("weight_distance_loss", False),
        prediction_variance_weight=meta.get("reg_coeff", 0.0),
    )


def mask_indices(meta, count):
    if meta["family"] == "vjepa":
        return tuple(range(count))  # one token per mask type
    rule = meta.get("mask_token_index", "0 for every mask")
    assert rule.startswith("0 for every mask")
    return (0,) * count


def check_training(golden, report):
    meta = golden.meta
    encoder, predictor = make_models(meta)
    params, target = import_models(golden, encoder, predictor)
    num_masks = len(golden.masks(0))
    stream = Stream(
        {str(j): None for j in range(num_masks)},
        mask_indices=mask_indices(meta, num_masks),
    )
    terms = make_terms(meta)
    objective = MaskedObjective(encoder, predictor, {"video": stream}, terms)
    check_forward(golden, encoder, predictor, params, target, report)

    rate, decay, momentum = make_schedules(meta["optimizer"])
    betas = tuple(meta["optimizer"]["betas"])
    tx = optim.make_optimizer(rate, decay, betas, meta["optimizer"]["eps"])
    opt_state = quick_jit(tx.init)(params)
    compute_grads = quick_jit(jax.grad(objective.loss, has_aux=True))

    @quick_jit
    def update(step, grads, params, target, opt_state):
        updates, opt_state = tx.update(grads, opt_state, params, step=step)
        params = optax.apply_updates(params, updates)
        target = optax.incremental_update(
            params["encoder"], target, step_size=1 - momentum(step)
        )
        norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}
        return params, target, opt_state, norms

    history = []
    for step in range(meta["steps"]):
        batch, masks = {"video": golden.clips(step)}, {"video": golden.masks(step)}
        grads, metrics = compute_grads(params, target, batch, masks, None, step)
        history.append(metrics)
        params, target, opt_state, norms = update(
            step, grads, params, target, opt_state
        )
        for name, norm in norms.items():
            key = f"step{step}_grad_norm_{name}"
            if key in golden.arrays:
                check_values(norm, golden.arrays[key], LOSSES, key, report)
    check_losses(golden, history, report)

    steps = np.arange(meta["steps"])
    for name, schedule in (("lr", rate), ("wd", decay), ("ema", momentum)):
        if name in golden.arrays:
            values = jax.jit(schedule)(steps)
            check_values(values, golden.arrays[name], SCHEDULES, name, report)
    features = apply_encoder(encoder)({"params": target}, golden.eval_clips())
    final = [name for name in golden.arrays if name.startswith("final_target_")]
    assert final
    for name in final:
        actual = features[..., -encoder.width :] if name.endswith("full") else features
        check(actual, golden.arrays[name], TARGET, name, report)


def check_losses(golden, history, report):
    """Compare the losses of all steps, of which a golden has one to three columns."""
    wanted = golden.arrays["losses"].reshape(golden.meta["steps"], -1)
    columns = LOSS_COLUMNS[golden.meta["family"]]
    assert wanted.shape[1] <= len(columns), f"losses of {wanted.shape[1]} columns"
    for name, values in zip(columns, wanted.T, strict=False):
        is_variance = name == "train/prediction_variance_term"
        if is_variance and not golden.meta.get("reg_coeff"):
            continue  # a term of weight 0 is not computed
        check_values([m[name] for m in history], values, LOSSES, name, report)


def check_forward(golden, encoder, predictor, params, target, report):
    """Compare everything that the first step computes."""
    arrays, clips = golden.arrays, golden.eval_clips()
    full = apply_encoder(encoder)({"params": params["encoder"]}, clips)
    last = full[..., -encoder.width :]
    check(last, arrays["eval_encoder_full"], FEATURES, "eval_encoder_full", report)
    if encoder.levels:
        check(full, arrays["eval_encoder_hier"], FEATURES, "eval_encoder_hier", report)
    clips, masks = golden.clips(0), golden.masks(0)
    grid, is_image = encoder.grid(clips.shape), encoder.is_image(clips.shape)

    @quick_jit
    def forward(params, target, clips, masks):
        features = encoder.apply({"params": target}, clips)
        features = losses.normalise_target(features, max(len(encoder.levels), 1))
        computed = {}
        indices = mask_indices(golden.meta, len(masks))
        for (j, (ctx_idx, tgt_idx)), index in zip(masks.items(), indices, strict=True):
            context = encoder.apply({"params": params["encoder"]}, clips, ctx_idx)
            prediction, of_context = predictor.apply(
                {"params": params["predictor"]},
                context,
                ctx_idx,
                tgt_idx,
                grid,
                index,
                is_image,
            )
            far = losses.distance_to_targets(ctx_idx, tgt_idx, grid)
            computed |= {
                f"step0_context{j}": context,
                f"step0_pred{j}": prediction,
                f"step0_predctx{j}": of_context,
                f"step0_target{j}": take_tokens(features, tgt_idx),
                f"step0_dist{j}": jnp.sqrt(far),
            }
        return computed

    for name, value in forward(params, target, clips, masks).items():
        if name in arrays:
            check(value, arrays[name], FEATURES, name, report)


def check_action_predictor(golden, report):
    meta, arrays = golden.meta, golden.arrays
    side = meta["img_size"] // 16
    predictor = registry.make_action_predictor(
        depth=meta["depth"],
        width=meta["predictor_dim"],
        num_heads=meta["num_heads"],
        out_dim=meta["embed_dim"],
        use_extrinsics=meta["use_extrinsics"],
    )

    def inputs(frames):
        tokens = arrays["tokens"][:, : frames * side**2]
        camera = arrays["extrinsics"][:, :frames] if meta["use_extrinsics"] else None
        parts = [arrays[name][:, :frames] for name in ("actions", "states")]
        return tokens, *parts, camera, (frames, side, side)

    frames = arrays["actions"].shape[1]
    params = tree_of(
        weights.action_predictor_rules(predictor),
        golden.states["predictor"],
        lambda key: predictor.init(key, *inputs(frames)),
        "action predictor",
    )
    for name, count in (("out", frames), ("out_first_two_frames", 2)):
        *given, grid = inputs(count)
        apply = jax.jit(functools.partial(predictor.apply, grid=grid))
        out = apply({"params": params}, *given)
        check(out, arrays[name], FEATURES, name, report)


def check_classifier(golden, report):
    meta = golden.meta
    model = AttentiveClassifier(
        num_classes=meta["num_classes"],
        num_heads=meta["num_heads"],
        depth=meta["depth"],
        blocks_on_query=meta["name"].startswith("vjepa1"),
        complete_block=meta.get("complete_block", True),
    )
    tokens = golden.arrays["x"]
    params = tree_of(
        weights.classifier_rules(model),
        golden.states["classifier"],
        lambda key: model.init(key, tokens),
        "classifier",
    )
    out = jax.jit(model.apply)({"params": params}, tokens)
    check(out, golden.arrays["y"], FEATURES, "y", report)


def test_there_are_goldens():
    assert FILES, f"no golden files in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_equals_the_official_code(path, record_property):
    golden, report = Golden(path), []
    if reason := golden.reason_to_skip():
        pytest.skip(reason)
    golden.require_known()
    with jax.default_matmul_precision("highest"):
        if "classifier" in golden.states:
            check_classifier(golden, report)
        elif golden.meta["family"] == "vjepa2_ac":
            check_action_predictor(golden, report)
        else:
            check_training(golden, report)
    record_property("errors", "; ".join(report))
    print(path.stem, *report, sep="\n  ")
