"""A frozen model computes what its modules do, for any batch and on any mesh."""

import json
import shutil

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vjepa_jax import probe
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config
from vjepa_jax.evals import frozen, registry
from vjepa_jax.models import registry as sizes
from vjepa_jax.models.encoder import normalise
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint

SHAPE = (4, 16, 16, 3)  # a grid of 2 x 2 x 2 tokens


@pytest.fixture(scope="module", autouse=True)
def pico():
    """Return a model smaller than the named ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sizes.SIZES, "pico", sizes.Size(2, 16, 2, 32))
        yield


def make_config(**model):
    config = get_config()
    config.data.path = "videos"
    config.data.num_frames, config.data.resolution = SHAPE[0], SHAPE[1]
    config.model.dtype = "float32"
    config.model.encoder.size, config.model.encoder.patch_size = "pico", 8
    config.model.predictor.update(depth=1, width=8, num_heads=2)
    config.model.update_from_flattened_dict(model)
    return config


def random_params(config, seed=0):
    """Return random parameters; the encoder and the target differ."""
    encoder, predictor = build.make_models(config)
    init = frozen._make_init(encoder, predictor, SHAPE)
    leaves, tree = jax.tree.flatten(nn.unbox(jax.eval_shape(init, jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
    )


def save(path, config, params, **meta):
    params = dict(params)
    meta = {"config": config.to_dict(), "video_shape": SHAPE} | meta
    checkpoint.save_converted(str(path), params.pop("target"), params or None, meta)
    return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = make_config()
    params = random_params(config)
    return save(tmp_path_factory.mktemp("frozen") / "run", config, params), params


@pytest.fixture(scope="module")
def model(saved):
    return frozen.load(saved[0])


@pytest.mark.parametrize("count", [8, 11])
def test_encode_is_that_of_the_target_encoder(saved, model, rng, count):
    video = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    encoder, _ = build.make_models(make_config())
    found = model.encode(video)
    np.testing.assert_array_equal(model.encode(video[:3]), found[:3])
    apply = jax.jit(lambda p: encoder.apply({"params": p}, normalise(video)))
    wanted = apply(saved[1]["target"])
    assert found.shape == (count, 2, 4, 16) and found.dtype == np.float32
    np.testing.assert_allclose(
        found.reshape(count, 8, 16), wanted, atol=1e-5, rtol=1e-4
    )


def test_out_layers_are_concatenated(saved, model, rng):
    video = rng.integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    encoder, _ = build.make_models(make_config())
    found = model.encode(video, out_layers=[1, 0]).reshape(2, 8, 32)
    wanted = jax.jit(
        lambda p: encoder.apply({"params": p}, normalise(video), out_layers=(1, 0))
    )(saved[1]["target"])
    for layer in range(2):
        part = found[..., layer * 16 : (layer + 1) * 16]
        np.testing.assert_allclose(part, wanted[layer], atol=1e-5, rtol=1e-4)


def test_predict_takes_the_online_encoder_and_the_normalised_target(saved, model, rng):
    video = rng.integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    order = rng.permutation(8)
    ctx_idx, tgt_idx = order[:3], order[3:7]
    found = model.predict(video, ctx_idx, tgt_idx, mask_index=1)
    encoder, predictor = build.make_models(make_config())
    params, clip = saved[1], normalise(video)

    def rows(idx):
        return jnp.tile(jnp.asarray(idx), (3, 1))

    @jax.jit
    def apply(params):
        context = encoder.apply({"params": params["encoder"]}, clip, rows(ctx_idx))
        prediction, _ = predictor.apply(
            {"params": params["predictor"]},
            context,
            rows(ctx_idx),
            rows(tgt_idx),
            (2, 2, 2),
            mask_index=1,
        )
        return prediction, encoder.apply({"params": params["target"]}, clip)

    prediction, features = map(np.asarray, apply(params))
    features = features - features.mean(-1, keepdims=True)
    features /= np.sqrt((features**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found[0], prediction, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found[1], features[:, tgt_idx], atol=1e-4, rtol=1e-4)
    assert np.abs(model.predict(video, ctx_idx, tgt_idx)[0] - found[0]).max() > 1e-3


def test_anticipate_puts_mask_tokens_at_future_positions(tmp_path, rng):
    """Clips of 2 time steps of 2 x 2 places; as far ahead as each clip's own time."""
    # Heads of fewer channels would not be rotated.
    config = make_config(pos_embed="rope", **{"predictor.width": 16})
    params = random_params(config)
    model = frozen.load(save(tmp_path, config, params))
    video = rng.integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    found = model.anticipate(video, [0, 3, 1], num_steps=2, mask_index=1)
    encoder, predictor = build.make_models(config)

    @jax.jit
    def apply(params):
        features = encoder.apply({"params": params["target"]}, normalise(video))
        prediction, _ = predictor.apply(
            {"params": params["predictor"]},
            features,
            jnp.tile(jnp.arange(8), (3, 1)),
            jnp.array([[*range(8, 16)], [*range(20, 28)], [*range(12, 20)]]),
            (7, 2, 2),
            mask_index=1,
        )
        return features, prediction

    wanted = np.concatenate(apply(params), axis=1)
    assert found.shape == (3, 16, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
    for steps, mask_index in (([0, 2, 1], 1), ([0, 3, 1], 0)):
        other = model.anticipate(video, steps, num_steps=2, mask_index=mask_index)
        changed = np.abs(other - found).max((1, 2)) > 1e-3
        assert changed.tolist() == [mask_index == 0, True, mask_index == 0]
        np.testing.assert_array_equal(other[:, :8], found[:, :8])


def test_anticipate_refuses_unknown_mask_tokens_and_positions(tmp_path, model, rng):
    video = rng.integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    with pytest.raises(UserError, match="mask_index=2: the predictor has 2 mask tok"):
        model.anticipate(video, [0], mask_index=2)
    config = make_config(pos_embed="sincos")
    config.data.num_frames = 8
    tabled = frozen.load(save(tmp_path, config, random_params(config)))
    far = tabled.anticipate(video, [1], num_steps=1)
    assert np.abs(tabled.anticipate(video, [0]) - far)[:, 8:].max() > 1e-3
    with pytest.raises(UserError, match=r"for 4 time steps .* predicted time takes 5"):
        tabled.anticipate(video, [2])


def test_a_sharded_model_computes_the_same(saved, model, rng):
    video = rng.integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    sharded = frozen.load(saved[0], mesh=sharding.make_mesh(2, 4))
    np.testing.assert_allclose(
        sharded.encode(video), model.encode(video), atol=1e-5, rtol=1e-4
    )


def test_random_init_is_a_model_of_its_seed(model, rng):
    video = rng.integers(0, 256, (2, *SHAPE), dtype=np.uint8)
    first, again, other = (frozen.random_init(model, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.encode(video), again.encode(video))
    chex.assert_trees_all_equal(first.params["target"], first.params["encoder"])
    assert np.abs(first.encode(video) - other.encode(video)).max() > 0.1
    part = [m.predict(video, [0, 1], [5])[0] for m in (first, other)]
    assert np.abs(part[0] - part[1]).max() > 0.01


def test_weights_of_an_encoder_alone_encode_but_do_not_predict(tmp_path, rng):
    params = random_params(make_config())
    path = save(tmp_path, make_config(), {"target": params["target"]}, kind="encoder")
    model = frozen.load(path)
    video = rng.integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    assert model.encode(video).shape == (1, 2, 4, 16)
    assert frozen.random_init(model, 0).encode(video).shape == (1, 2, 4, 16)
    with pytest.raises(UserError, match="no predictor"):
        model.predict(video, [0], [1])
    with pytest.raises(UserError, match="no predictor"):
        model.anticipate(video, [0])


def test_the_predictor_of_a_teachers_features_is_refused(tmp_path, rng):
    config = make_config(**{"predictor.out_dim": 24})
    model = frozen.load(save(tmp_path, config, random_params(config)))
    with pytest.raises(UserError, match=r"24 channels.* has 16"):
        model.predict(np.zeros((1, *SHAPE), np.uint8), [0], [1])


def test_wrong_sizes_and_blocks_are_named(model):
    with pytest.raises(UserError, match="cannot be cut into tubelets"):
        model.encode(np.zeros((1, 4, 20, 16, 3), np.uint8))
    with pytest.raises(UserError, match="blocks are 0 to 1"):
        model.encode(np.zeros((1, *SHAPE), np.uint8), out_layers=[2])


# -------------------------------------------------------------------------- the command


def run_main(monkeypatch, capsys, *arguments):
    """Run `python -m vjepa_jax.probe`, in this process."""
    names = "_CONFIG", "_WORKDIR", "_CHECKPOINT"
    for name, value in zip(names, arguments, strict=True):
        flag = ConfigDict({"value": value})
        monkeypatch.setattr(probe, name, flag, raising=False)
    probe.main()
    return capsys.readouterr().out


def make_evaluation(**fields):
    return ConfigDict({"evaluation": "plain", "step": -1, "seed": 0} | fields)


@pytest.fixture
def plain(monkeypatch):
    """Register an evaluation that knows its model."""

    def evaluate(model, config):
        width = model.encoder.width
        return {"width": width, "share_accuracy": {"here": 0.5, "there": 0.25}}

    monkeypatch.setitem(registry.EVALUATIONS, "plain", evaluate)


def test_results_are_printed_and_written_beside_the_checkpoint(
    plain, saved, monkeypatch, capsys
):
    printed = run_main(monkeypatch, capsys, make_evaluation(), None, saved[0])
    lines = [line.split() for line in printed.splitlines()]
    assert lines == [
        ["value", "here", "there"],
        ["width", "16.000"],
        ["share_accuracy", "50.0%", "25.0%"],
    ]
    run_main(monkeypatch, capsys, make_evaluation(name="mine"), saved[0], None)
    for name in ("plain", "mine"):
        with open(f"{saved[0]}/results_{name}.json") as file:
            written = json.load(file)
        assert written.pop("seconds").keys() == {"probe"}
        assert written == {
            "width": 16,
            "share_accuracy": {"here": 0.5, "there": 0.25},
        }


@pytest.mark.parametrize("folders", [(None, None), ("a", "b")])
def test_a_run_or_a_conversion_must_be_given(monkeypatch, capsys, folders):
    with pytest.raises(UserError, match="--workdir of a run or a converted"):
        run_main(monkeypatch, capsys, make_evaluation(), *folders)


def test_one_of_several_processes_is_refused(plain, saved, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(UserError, match=r"one process, .*: start it once"):
        run_main(monkeypatch, capsys, make_evaluation(), None, saved[0])
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert "width" in run_main(monkeypatch, capsys, make_evaluation(), None, saved[0])


def test_an_unknown_evaluation_is_named(saved):
    config = make_evaluation(evaluation="palmistry")
    with pytest.raises(UserError, match=r"'palmistry': known: .*physics, .*world"):
        probe.probe(config, saved[0])
    with pytest.raises(UserError, match=r"not of an evaluation: .* configs/probe"):
        probe.probe(make_config(), saved[0])


def test_probes_of_the_world_need_a_run_of_it(saved):
    with pytest.raises(UserError, match=r"no config\.world\.path"):
        probe.probe(make_evaluation(evaluation="world"), saved[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder.size", None),
        ("encoder.patch_size", 0),
        ("encoder.patch_size", -1),
        ("encoder.tubelet_size", 0),
        ("pos_embed", "learned"),
        ("attention", "magic"),
        ("predictor.num_heads", 0),
        ("predictor.depth", -1),
        ("predictor.mlp", "relu"),
    ],
)
def test_a_changed_description_of_the_model_is_named(saved, tmp_path, key, value):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    (file,) = workdir.glob("checkpoints/*/meta/metadata")
    meta = json.loads(file.read_text())
    *parents, name = key.split(".")
    fields = meta["config"]["model"]
    for parent in parents:
        fields = fields[parent]
    fields[name] = value
    file.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"meta.* is damaged|is damaged .meta: ") as e:
        frozen.load(str(workdir))
    assert str(workdir) in str(e.value) and "\n" not in str(e.value)
