"""What a user gets wrong costs one clear line and exit code 2, and changes nothing."""

import json
import math
import subprocess
import sys

import pytest
import video_files

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config, mask, stream
from vjepa_jax.config.rules import validate
from vjepa_jax.config.saved import restored
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.program import build
from vjepa_jax.run import cli, workdirs
from vjepa_jax.train import train_and_evaluate


@pytest.fixture
def config(tmp_path):
    """Return a config that would train, on a list of one video."""
    config = get_config()
    frames = video_files.moving_frames(8, height=16, width=16)
    video_files.write_video(tmp_path / "a.mp4", frames)
    (tmp_path / "list.csv").write_text("a.mp4 0\n")
    config.data.path = str(tmp_path / "list.csv")
    config.data.num_frames = 4
    config.data.resolution = 16
    config.data.num_workers = 0
    config.model.encoder.size = "nano"
    config.model.encoder.patch_size = 4
    config.model.predictor.width = 32
    config.model.predictor.num_heads = 2
    config.batch_size = 8
    return config


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("batch_size", 0, "positive"),
        ("seed", -1, "whole number from 0 to 4294967295"),
        ("seed", 1 << 32, "whole number from 0 to 4294967295"),
        ("optim.learning_rate", math.inf, "positive"),
        ("data.resolution", 100, "multiple of model.encoder.patch_size=16"),
        ("data.num_frames", 15, "multiple of model.encoder.tubelet_size=2"),
        ("model.dtype", "float16", "known: float32, bfloat16"),
        ("model.remat", "some", "known: none"),
        ("model.predictor.num_heads", 5, "divisor of model.predictor.width=384"),
        ("masks.short.mode", "fair", "known: official, unbiased"),
        ("masks.short.spatial_scale", (0.5, 0.1), "low <= high"),
        ("masks.short.num_blocks", 0, "max_temporal_keep < 1"),
        ("ema.start", 1.5, "from 0 to 1"),
        ("model.pos_embed", "learned", "known: sincos, rope, rope_tiled"),
        ("model.mlp", "relu", "known: gelu, swiglu, swiglu_wide"),
        ("model.base_grid", (4, 4), "() or three positive numbers"),
        ("model.base_grid", (4, 0, 4), "() or three positive numbers"),
        ("model.encoder.levels", (5, 2), "block numbers from 0, ascending"),
        ("model.encoder.levels", (2, 2), "block numbers from 0, ascending"),
        ("model.encoder.levels", (-1, 2), "block numbers from 0, ascending"),
        ("model.encoder.output_levels", -1, "zero or a positive number"),
        ("model.predictor.mask_token_per", "clip", "known: mask, stream, run"),
        ("model.predictor.num_mask_tokens", -1, "zero or a positive number"),
        ("model.predictor.out_dim", -1, "zero or a positive number"),
        ("objective.target", "colours", "known: features, pixels"),
        ("objective.exponent", 0.0, "positive"),
        ("objective.context_weight", -0.5, "zero or a positive number"),
        ("objective.context_warmup", (20, 10), "0 <= start <= end"),
        ("objective.context_warmup", (-1, 10), "0 <= start <= end"),
        ("objective.context_warmup", (5,), "(start, end)"),
        ("objective.prediction_variance_weight", -1.0, "zero or a positive number"),
        ("log.image_clips", -1, "zero or a positive number"),
        ("evals.health.every_steps", -5, "zero or a positive number"),
        ("optim.schedule", "step", "known: cosine, linear, wsd"),
        ("optim.anneal_steps", -1, "zero or a positive number"),
        ("optim.clip_start_step", -1, "zero or a positive number"),
        ("optim.max_skipped_in_row", 0, "positive"),
        ("optim.spike_window", -1, "0, or 2 or more losses"),
        ("optim.spike_deviations", 0.0, "positive"),
        ("teacher.output_levels", -1, "zero or a positive number"),
        ("weight", 0.0, "positive"),
        ("masks.long.aspect_ratio", (1.5, 0.5), "low <= high"),
        ("masks.long.group_size", 0, "positive"),
        ("masks.long.num_context", -1, "zero or a positive number"),
        ("masks.long.max_temporal_keep", 0.0, "0 < x <= 1"),
    ],
)
def test_value_out_of_range_names_key_value_and_fix(key, value, fix):
    config = get_config()
    config.data.path = "videos"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        validate(config)
    assert f"config.{key}={value!r}" in str(error.value)
    assert fix in str(error.value)
    assert "\n" not in str(error.value)


def streamed(**fields):
    """Return a config with a stream of images besides its videos."""
    config = get_config()
    config.data.path = "videos"
    config.model.image_embed = True
    fields = {"path": "images", "num_frames": 1, "frame_step": 1} | fields
    with config.unlocked():
        config.streams.image = stream(**{"masks": {"one": mask()}} | fields)
    return config


def refusal(config):
    with pytest.raises(UserError) as error:
        validate(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "key", "fix"),
    [
        ({"path": ""}, "path=''", "a folder of videos or a list"),
        ({"weight": 0.0}, "weight=0.0", "positive"),
        ({"batch_size": -8}, "batch_size=-8", "zero or a positive number"),
        ({"frame_step": 0}, "fps=0.0", "streams.image.frame_step"),
        ({"fps": 4.0}, "fps=4.0", "exactly one of"),
        ({"resolution": 100}, "resolution=100", "model.encoder.patch_size=16"),
        ({"num_frames": 3}, "num_frames=3", "model.encoder.tubelet_size=2"),
        ({"num_frames": 0}, "num_frames=0", "model.encoder.tubelet_size=2"),
        ({"masks": {}}, "masks={}", "at least one mask type"),
        (
            {"masks": {"one": mask(mode="fair")}},
            "masks.one.mode='fair'",
            "known: official, unbiased",
        ),
    ],
)
def test_stream_out_of_range_is_named_with_its_fix(fields, key, fix):
    message = refusal(streamed(**fields))
    assert f"config.streams.image.{key}" in message and fix in message
    validate(streamed())


@pytest.mark.parametrize(
    ("key", "value"),
    [("teacher.path", "run"), ("model.target_dtype", "int8")],
)
def test_pixels_have_no_encoder(key, value):
    config = get_config()
    changes = {"data.path": "videos", "objective.target": "pixels"}
    config.update_from_flattened_dict(changes)
    validate(config)
    config.update_from_flattened_dict({key: value})
    message = refusal(config)
    assert f"config.{key}={value!r}" in message and "target=features" in message


def test_images_beside_videos_have_no_common_pixels():
    config = streamed()
    validate(config)
    config.objective.target = "pixels"
    assert "config.model.image_embed=True" in refusal(config)


def test_a_stream_cannot_take_the_name_of_the_main_one():
    config = streamed()
    with config.unlocked():
        config.streams.video = stream(path="videos", frame_step=1)
    assert "rename it" in refusal(config)


def test_an_image_needs_an_embedding_of_its_own():
    config = streamed()
    config.model.image_embed = False
    assert "config.streams.image.num_frames=1" in refusal(config)


@pytest.mark.parametrize(
    ("fields", "key", "fix"),
    [
        (
            {"full_complement": True, "pred_full_complement": True},
            "full_complement",
            "set one of the two to False",
        ),
        (
            {"kind": "tube", "spatial_scale": (0.5, 0.9)},
            "spatial_scale",
            "give it twice",
        ),
        ({"kind": "tube", "spatial_scale": (1.0, 1.0)}, "spatial_scale", "below 1"),
        ({"kind": "tube", "max_temporal_keep": 0.5}, "max_temporal_keep", "tubes need"),
        ({"kind": "cube"}, "kind", "known: multiblock, tube"),
    ],
)
def test_masks_whose_fields_contradict_are_refused(fields, key, fix):
    config = get_config()
    config.data.path = "videos"
    config.masks.long = mask(**fields)
    message = refusal(config)
    assert f"config.masks.long.{key}=" in message and fix in message


def test_warmup_and_anneal_must_fit_into_the_run():
    config = get_config()
    config.data.path = "videos"
    config.optim.schedule = "wsd"
    config.optim.anneal_steps = config.total_steps - config.optim.warmup_steps
    validate(config)
    config.optim.anneal_steps += 1
    assert "warm-up and anneal must fit into total_steps" in refusal(config)


@pytest.mark.parametrize("key", ["init", "teacher"])
def test_a_recipe_that_needs_another_run_says_so(key):
    config = get_config()
    config.data.path = "videos"
    config[key].is_required = True
    assert f"config.{key}.path=''" in refusal(config)
    config[key].path = "runs/other"
    validate(config)


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("model.encoder.levels", (3, 24), "the last block of size large is 23"),
        ("model.predictor.num_mask_tokens", 1, "2 are used"),
    ],
)
def test_what_the_models_cannot_do_is_refused(key, value, fix):
    config = get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        build.make_models(config)
    assert f"config.{key}={value!r}" in str(error.value) and fix in str(error.value)


def test_mask_budget_that_exceeds_the_clip_is_refused():
    config = get_config()
    config.masks.short = mask(num_context=50, num_target=20)
    with pytest.raises(UserError, match=r"masks\.short.*64 tokens"):
        build.make_masks(config.masks, (4, 4, 4))


def test_unknown_size_names_the_known_ones():
    config = get_config()
    config.model.encoder.size = "larger"
    with pytest.raises(UserError, match=r"'larger' is unknown.*nano, tiny, small"):
        build.make_models(config)


def test_batch_that_the_devices_cannot_divide(config, tmp_path):
    config.batch_size = 12  # eight devices
    with pytest.raises(UserError, match="multiple of 8"):
        train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "list.csv"),
        ("", "list.csv"),
        ("gone.mp4 0\nlost.mp4 1\n", "gone.mp4"),
        ("a.mp4 cat\n", "list.csv:1"),
    ],
)
def test_list_that_cannot_be_used_leaves_no_workdir(config, tmp_path, content, message):
    path = tmp_path / "list.csv"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_folder_without_videos(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        open_source(str(tmp_path))


def test_workdir_of_another_config_is_kept(config, tmp_path):
    workdirs.claim(config, str(tmp_path / "run"))
    before = (tmp_path / "run" / "config.json").read_bytes()
    config.optim.learning_rate = 1.0
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0.000625 -> 1.0"):
        workdirs.require_no_other_run(config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_operational_keys_may_change_when_a_run_continues(config, tmp_path):
    workdirs.claim(config, str(tmp_path / "run"))
    config.data.num_workers = 3
    config.checkpoint.every_steps = 7
    config.model.remat = "full"
    config.accumulate_steps = 2
    config.evals.health.every_steps = 100
    with config.unlocked():
        del config.evals.world
    workdirs.require_no_other_run(config, str(tmp_path / "run"))


@pytest.mark.parametrize("term", ["variance", "covariance"])
def test_losses_of_all_clips_together_keep_their_microbatches(config, tmp_path, term):
    config.objective[f"{term}_weight"] = 0.1
    workdirs.claim(config, str(tmp_path / "run"))
    config.accumulate_steps = 2
    with pytest.raises(UserError, match="accumulate_steps: 1 -> 2"):
        workdirs.require_no_other_run(config, str(tmp_path / "run"))


def test_workdir_that_is_a_file(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        workdirs.require_no_other_run(config, str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", ["--config=configs/none.py", "--workdir=W"], "none.py"),
        (
            "train",
            ["--config=configs/world_tiny.py", "--workdir=W", "--config.optm.b1=1"],
            "optm",
        ),
        (
            "train",
            ["--config=configs/world_tiny.py", "--workdir=W", "--config.seed=x"],
            "seed",
        ),
        ("train", ["--config=configs/vjepa.py:vitx", "--workdir=W"], "'vitx' is no"),
        ("train", ["--config=configs/world_tiny.py"], "workdir"),
        ("train", ["--config=configs/world_tiny.py", "--workdir=W", "seed=1"], "seed"),
        ("probe", ["--config=configs/probe_world.py", "--workdir=W"], "W"),
        ("data.prepare", ["--config=configs/vjepa.py"], "data.path"),
    ],
)
def test_command_line_fails_with_one_line(
    tmp_path, request, module, arguments, message
):
    workdir = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            f"vjepa_jax.{module}",
            *(a.replace("=W", f"={workdir}") for a in arguments),
        ],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == cli.EXIT_USER_ERROR, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message.replace("W", str(workdir)) in errors[0]
    assert not workdir.exists()


def test_config_of_a_workdir_survives_json(config, tmp_path):
    workdirs.claim(config, str(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["masks"]["long"]["num_blocks"] == 2
    workdirs.require_no_other_run(config, str(tmp_path))


def test_config_of_an_earlier_release_takes_the_defaults_of_new_keys(config):
    with config.unlocked():
        config.streams.image = stream(path="images", masks={"one": mask(num_blocks=10)})
    saved = json.loads(json.dumps(config.to_dict()))
    del saved["teacher"]["step"], saved["model"]["predictor"]["mlp"], saved["ema"]
    del saved["masks"]["short"], saved["masks"]["long"]["token"]
    del saved["streams"]["image"]["weight"]
    del saved["streams"]["image"]["masks"]["one"]["mode"]
    found = restored(saved)
    default = get_config()
    assert found.teacher.step == -1
    assert found.model.predictor.mlp == ""
    assert found.ema == default.ema
    assert set(found.masks) == {"long"}  # the user's own names stay as they are
    assert found.masks.long.token == mask().token
    assert found.streams.image.weight == 1.0
    assert found.streams.image.masks.one.num_blocks == 10
    assert found.streams.image.masks.one.mode == "official"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda _: "",
        lambda _: "[]",
        lambda _: "3",
        lambda text: text.replace('"batch_size": 8', '"batch_size": "8"'),
        lambda text: text.replace('"batch_size": 8', '"batch_size": true'),
        lambda text: json.dumps(json.loads(text) | {"masks": {"short": 3}}),
        lambda text: json.dumps(json.loads(text) | {"streams": {"image": None}}),
        lambda text: json.dumps(json.loads(text) | {"evals": {"health": []}}),
        lambda text: json.dumps(json.loads(text) | {"model": "large"}),
    ],
)
def test_damaged_config_of_a_workdir_is_kept_and_named(config, tmp_path, change):
    workdirs.claim(config, str(tmp_path))
    file = tmp_path / "config.json"
    damaged = change(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    with pytest.raises(UserError, match=r"config\.json is not .* or is damaged") as e:
        workdirs.require_no_other_run(config, str(tmp_path))
    assert "rename it" in str(e.value) and "\n" not in str(e.value)
    assert file.read_text() == damaged
