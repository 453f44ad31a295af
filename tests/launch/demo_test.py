"""The demo's script starts the right commands with flags that they accept."""

import json
import pathlib
import shutil
import subprocess

import pytest
from absl import flags
from ml_collections import config_flags

from vjepa_jax.evals import hook

ROOT = pathlib.Path(__file__).parents[2]
OVERRIDE = "--config.world.path=a folder"
# Stands for the interpreter: writes down its arguments and runs nothing.
RECORDER = """\
#!/usr/bin/env python3
import json, sys
with open("commands", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Arguments of every interpreter that the script starts, in order."""
    root = tmp_path_factory.mktemp("demo")
    (root / "launch").mkdir()
    (root / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "launch/demo.sh", root / "launch")
    (root / "launch/setup.sh").write_text('cd "$(dirname "$0")/.."\n')
    interpreter = root / ".venv/bin/python"
    interpreter.write_text(RECORDER)
    interpreter.chmod(0o755)
    subprocess.run([root / "launch/demo.sh", OVERRIDE], check=True)
    lines = (root / "commands").read_text().splitlines()
    return [json.loads(line) for line in lines]


def parse(command):
    """Return the config that a command's flags give."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(command)
    return values.config


def test_it_renders_trains_probes_and_reports(commands):
    assert [command[:2] for command in commands] == [
        ["-m", f"vjepa_jax.{name}"]
        for name in ("prepare", "train", "probe", "probe", "report")
    ]
    given = [OVERRIDE in command for command in commands]
    assert given == [True, True, False, False, False]


def test_training_takes_its_evaluations(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse(commands[1])
    assert config.world.path == "a folder"
    assert config.world.physics_pairs > 0  # what the pairs are rendered from
    asked = {name for name, entry in config.evals.items() if entry.every_steps}
    assert asked == {"health", "physics"}
    for name in asked:
        assert config.total_steps % config.evals[name].every_steps == 0
        hook.load(name, config.evals[name])


def test_probes_are_of_the_run_that_was_trained(commands, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = [flag for command in commands[1:] for flag in command]
    workdirs = {flag for flag in given if flag.startswith("--workdir")}
    assert workdirs == {"--workdir=runs/demo"}
    names = [parse(command).evaluation for command in commands[2:4]]
    assert names == ["world", "physics"]
