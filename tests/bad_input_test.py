"""What a user gets wrong costs one clear line and exit code 2, and changes nothing."""

import json
import subprocess
import sys

import pytest
import video_files

from vjepa_jax import build, cli
from vjepa_jax.data import sources
from vjepa_jax.default_config import UserError, get_config, mask, validate
from vjepa_jax.train import check_workdir, claim_workdir, train_and_evaluate


@pytest.fixture
def config(tmp_path):
    """A config that would train, on a list of one video."""
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
    ("key", "value", "mend"),
    [
        ("batch_size", 0, "positive"),
        ("data.resolution", 100, "multiple of model.encoder.patch_size=16"),
        ("data.num_frames", 15, "multiple of model.encoder.tubelet_size=2"),
        ("model.dtype", "float16", "known: float32, bfloat16"),
        ("model.remat", "some", "known: none"),
        ("model.predictor.num_heads", 5, "divisor of model.predictor.width=384"),
        ("masks.short.mode", "fair", "known: official, unbiased"),
        ("masks.short.spatial_scale", (0.5, 0.1), "low <= high"),
        ("masks.short.num_blocks", 0, "max_temporal_keep < 1"),
        ("ema.start", 1.5, "from 0 to 1"),
    ],
)
def test_value_out_of_range_names_key_value_and_mend(key, value, mend):
    config = get_config()
    config.data.path = "videos"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        validate(config)
    assert f"config.{key}={value!r}" in str(error.value)
    assert mend in str(error.value)
    assert "\n" not in str(error.value)


def test_mask_budget_that_exceeds_the_clip_is_refused():
    config = get_config()
    config.masks.short = mask(num_context=50, num_target=20)
    with pytest.raises(UserError, match=r"masks\.short.*64 tokens"):
        build.make_masks(config, (4, 4, 4))


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
        sources.open_source(str(tmp_path))


def test_workdir_of_another_config_is_kept(config, tmp_path):
    claim_workdir(config, str(tmp_path / "run"))
    before = (tmp_path / "run" / "config.json").read_bytes()
    config.optim.learning_rate = 1.0
    with pytest.raises(UserError, match=r"optim\.learning_rate: 0.000625 -> 1.0"):
        check_workdir(config, str(tmp_path / "run"))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_operational_keys_may_change_when_a_run_continues(config, tmp_path):
    claim_workdir(config, str(tmp_path / "run"))
    config.data.num_workers = 3
    config.checkpoint.every_steps = 7
    config.model.remat = "full"
    check_workdir(config, str(tmp_path / "run"))


def test_workdir_that_is_a_file(config, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        check_workdir(config, str(tmp_path / "run"))
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
        ("train", ["--config=configs/world_tiny.py"], "workdir"),
        ("train", ["--config=configs/world_tiny.py", "--workdir=W", "seed=1"], "seed"),
        ("probe", ["--config=configs/probe_world.py", "--workdir=W"], "W"),
        ("data.prepare", ["--config=configs/vitl16.py"], "data.path"),
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
    claim_workdir(config, str(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["masks"]["long"]["num_blocks"] == 2
    check_workdir(config, str(tmp_path))
