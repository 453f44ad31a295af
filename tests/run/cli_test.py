"""Commands explain themselves, and mistakes on the command line get one clear line."""

import logging
import os
import pathlib
import subprocess
import sys

import pytest

from vjepa_jax.run import cli

ROOT = pathlib.Path(__file__).parents[2]
SMOKE = f"--config={ROOT}/configs/vjepa2.py:vitl16,smoke"


def run(*command, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, env=env
    )


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("train", ["--config", "--workdir", "--num_processes"]),
        ("prepare", ["--config", "--data", "--output"]),
        ("data.prepare", ["--config", "--data", "--output"]),
        ("check", ["--config", "--data", "--deep"]),
        ("data.check", ["--config", "--data", "--deep"]),
        ("make_list", ["--table", "--output", "--class"]),
        ("surprise", ["--workdir", "--video", "--output"]),
    ],
)
def test_help_explains_the_command_and_its_own_flags(module, shown):
    done = run("-m", f"vjepa_jax.{module}", "--help")
    assert done.returncode == 0, done.stderr
    usage, _, flags = done.stdout.partition("\nflags:\n")
    assert f"python -m vjepa_jax.{module.removeprefix('data.')} --" in usage
    for flag in shown:
        assert f"\n  {flag}:" in flags or f"\n  --[no]{flag[2:]}:" in flags
    assert "--alsologtostderr" not in flags  # one of absl's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [SMOKE, "--config.optim.lerning_rate=3"],
            'unknown key "lerning_rate" in --config.optim: did you mean '
            '"learning_rate"?',
        ),
        (
            [SMOKE, "--config.optm.learning_rate=3"],
            'unknown key "optm" in --config: did you mean "optim"?',
        ),
        ([SMOKE, "--config.nonsense=3"], 'unknown key "nonsense" in --config'),
        (
            [SMOKE, "--config.optim.learning_rate=abc"],
            "flag --config.optim.learning_rate=abc: could not convert string to float: "
            "'abc'",
        ),
        (
            ["--config=nowhere.py"],
            "the config cannot be loaded: [Errno 2] No such file or directory: "
            "'nowhere.py'",
        ),
    ],
)
def test_wrong_config_flags_get_one_line(arguments, message):
    done = run("-m", "vjepa_jax.prepare", *arguments)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_other_key_errors_keep_their_message():
    assert cli._unknown_key("'missing'", ["train", "--config.other=1"]) is None
    assert cli._unknown_key("no video in 'folder'", ["--config.folder=1"]) is None


USES_JAX = """
from vjepa_jax.run import cli
def main():
    import jax
    print(jax.devices())
cli.run(main)
"""


def test_a_missing_tpu_library_is_not_logged():
    done = run("-c", USES_JAX, JAX_PLATFORMS="")
    assert done.returncode == 0
    assert "libtpu" not in done.stderr


def test_other_lines_about_backends_are_logged(caplog, monkeypatch):
    monkeypatch.setattr(cli.app, "run", lambda *_, **__: None)
    logger = logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(logger, "filters", [])
    cli.run(print)
    lines = [
        "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so: none",
        "Unable to initialize backend 'tpu': the TPU is in use",
        "Unable to initialize backend 'cuda': no device",
    ]
    with caplog.at_level(logging.INFO, logger.name):
        for line in lines:
            logger.info(line)
    assert caplog.messages == lines[1:]


def test_every_path_of_a_command_line_may_begin_at_home(tmp_path):
    home = {"HOME": str(tmp_path)}
    done = run("-m", "vjepa_jax.report", "--workdir=~/run", **home)
    assert done.returncode == 2
    assert f"{tmp_path}/run" in done.stderr
    (tmp_path / "mine.py").write_text(
        "from vjepa_jax.config.defaults import get_config as default\n"
        "def get_config(size): return default()\n"
    )
    config = "--config=~/mine.py:small"
    done = run("-m", "vjepa_jax.check", config, "--config.data.path=~/films", **home)
    assert done.returncode == 2
    assert f"{tmp_path}/films" in done.stderr
