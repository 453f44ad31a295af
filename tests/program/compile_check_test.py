"""A step is compiled for devices that may not exist, and its cost is reported.

Without libtpu, the devices of this machine stand for the described ones.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from vjepa_jax import compile_check
from vjepa_jax.base.errors import UserError
from vjepa_jax.config import defaults, rules
from vjepa_jax.config.defaults import mask, stream
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build, compilation, hlo, step_report, topologies
from vjepa_jax.run import cli

ROOT = pathlib.Path(__file__).parents[2]


def small_config(**changes):
    config = defaults.get_config()
    config.update_from_flattened_dict(
        {
            "batch_size": 16,
            "mesh.fsdp": 4,
            "data.num_frames": 4,
            "data.resolution": 64,
            "model.encoder.size": "2x64x2x128",
            "model.predictor.depth": 1,
            "model.predictor.width": 32,
            "model.predictor.num_heads": 2,
            "model.dtype": "float32",
        }
        | changes
    )
    with config.unlocked():
        config.masks = ConfigDict({"short": mask(group_size=2)})
    return config


@pytest.fixture(scope="module")
def report():
    config = compile_check.with_file_names(small_config())
    rules.validate(config)
    return compile_check.check_step(config, jax.devices())


def test_report_counts_what_the_step_costs(report):
    config = small_config()
    program = build.make_program(config, sharding.make_mesh(2, 4))
    assert report.model_flops == program.step_flops / 8
    # More than the model's matmuls: covariances, which are large here, and blockwise
    # attention, which computes scores twice.
    assert 1.0 < report.executed_flops / report.model_flops < 1.6
    assert not report.unknown and not report.failure and report.fits
    assert dict(report.mesh) == {"data": 2, "fsdp": 4}
    assert report.clips_per_device == 2
    assert report.batch_bytes == 2 * 4 * 64 * 64 * 3
    state = sum(decision.device_bytes for decision in program.decisions)
    held = report.memory.arguments - report.batch_bytes
    assert state <= held < state + 2**16  # each array is rounded up
    assert report.memory.peak >= report.memory.arguments
    assert report.ideal_secs is None  # of a CPU it is unknown
    assert report.compile_secs > 0


def test_report_is_printed_and_stored_in_full(report):
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["fits"] and stored["memory"]["peak"] == report.memory.peak
    text = str(report)
    for part in ("8 x cpu", "mesh {'data': 2, 'fsdp': 4}", "its limit is unknown"):
        assert part in text
    failed = str(dataclasses.replace(report, failure="too large"))
    assert "does not fit: too large" in failed and "executed" not in failed


def test_the_next_batch_must_fit_too(report):
    needed = report.memory.peak + report.batch_bytes
    for limit, fits in ((needed, True), (needed - 1, False)):
        at_limit = dataclasses.replace(report, limit_bytes=limit)
        assert at_limit.fits == fits
        assert ("does not fit into" in str(at_limit)) != fits


def gathered(kind, *dims, count=3):
    shapes = tuple(hlo.Shape("f32", d) for d in dims)
    return hlo.Collective(kind, shapes, count, "op")


def test_collectives_of_activations_are_found(report):
    """Parameters and gradients are exchanged as stacks, layers or parts of them."""
    config = small_config()
    config.model.encoder.size = "2x1024x16x4096"
    program = build.make_program(config, sharding.make_mesh(2, 4))
    heads = (16, 64)
    collectives = [
        gathered("all-gather", (1, 1024, 4096)),
        gathered("all-gather", (2, 4096, 1024), (1024, 3072)),
        gathered("all-gather", (*heads, 1024)),  # the output projection
        gathered("all-gather", (512, 1024)),  # the first of two rounds
        gathered("reduce-scatter", (1024, 4096)),
        gathered("reduce-scatter", (1024, 4224)),  # padded
        gathered("all-reduce", (1, 256, 4096), (1024,)),
        gathered("all-reduce", (), (7, 9)),
        gathered("send", (256, 4096)),
        gathered("collective-permute", (3 * 32, 4096)),  # rows on the fourth device
        gathered("collective-permute", (3 * 32 + 1, 4096)),
        gathered("all-gather", (2, 2048, 1024)),  # clips, tokens, channels
        gathered("all-to-all", (16, 512, 512), count=5),
    ]
    work = hlo.DeviceWork(1.0, 0.0, 0.0, tuple(collectives), ("while.3",), {"sort": 2})
    full = step_report.complete_report(report, program, report.memory, work, 1.0)
    found = {(t.purpose, t.kind): t.bytes for t in full.traffic}
    assert found == {
        ("parameters", "all-gather"): 3 * 4 * 1024 * (4096 + 2 * 4096 + 3072 + 1536),
        ("gradients", "reduce-scatter"): 3 * 4 * 1024 * (4096 + 4224),
        ("gradients", "all-reduce"): 3 * 4 * (256 * 4096 + 1024),
        ("gradients", "send"): 3 * 4 * 256 * 4096,
        ("gradients", "collective-permute"): 3 * 4 * 96 * 4096,
        ("activations", "collective-permute"): 3 * 4 * 97 * 4096,
        ("small", "all-reduce"): 3 * 4 * (1 + 63),
        ("activations", "all-gather"): 3 * 4 * 2 * 2048 * 1024,
        ("activations", "all-to-all"): 5 * 4 * 16 * 512 * 512,
    }
    assert [line.split()[0] for line in full.largest_activations] == [
        "all-to-all",
        "all-gather",
        "collective-permute",
    ]
    assert full.unknown == ("loop while.3", "2 x sort")


@pytest.mark.parametrize("image_batch", [0, 24])
def test_search_finds_the_largest_batch(monkeypatch, rng, image_batch, report):
    most, tried = int(rng.integers(0, 40)), []

    def fake_check(config, devices, **options):
        assert options == {"fast": True} and len(devices) == 8
        clips = config.batch_size // 8 // config.accumulate_steps
        if image_batch:
            assert config.streams.image.batch_size * 16 == config.batch_size * 24
        tried.append(clips)
        failure = "" if clips <= most else "too large"
        return dataclasses.replace(report, clips_per_device=clips, failure=failure)

    monkeypatch.setattr(compile_check, "check_step", fake_check)
    monkeypatch.setattr(topologies, "memory_limit", lambda device: 2**30)
    config = small_config(accumulate_steps=2)
    unit = 1
    if image_batch:
        unit = 2  # 16 to 24 is 2 to 3
        with config.unlocked():
            config.streams.image = stream(batch_size=image_batch)
    best = compile_check.find_largest_batch(config, jax.devices(), fast=True)
    assert best.fits == (most >= unit)
    assert best.clips_per_device == max(most // unit, 1) * unit
    assert len(tried) == len(set(tried)) <= 2 * int(np.log2(most + 1)) + 2
    assert config.batch_size == 16  # the config is unchanged


def test_search_needs_to_know_the_memory():
    with pytest.raises(UserError, match=r"kind cpu .*leave out --search"):
        compile_check.find_largest_batch(small_config(), jax.devices())


# ------------------------------------------------------------------------ topologies


def test_topologies_are_named_by_layout_and_by_machine():
    assert (
        topologies.parse_topology("v5e-16")
        == topologies.parse_topology("v5e:4x4")
        == ("v5e", "4x4")
    )
    assert topologies.parse_topology("v5p-32") == ("v5p", "2x2x4")  # 32 cores, 16 chips
    assert topologies.parse_topology("h100:1x8") == ("h100", "1x8")
    for name in ("v5e", "v5e:", "v5e:4by4", "v9-8", "v5e-17", ""):
        with pytest.raises(UserError, match="--list"):
            topologies.parse_topology(name)
    table = topologies.list_topologies()
    for chip, known in topologies.CHIPS.items():
        assert chip in table
        for name, layout in known.slices.items():
            assert f"{name} " in table and f"{chip}:{layout} " in table
            cores = 2 if chip in ("v4", "v5p") else 1
            devices = np.prod([int(n) for n in layout.split("x")])
            assert int(name.rpartition("-")[2]) == cores * devices


def test_memory_limit_is_known_by_device_kind():
    device = types.SimpleNamespace(device_kind="TPU v5 lite")
    assert topologies.memory_limit(device) == int(15.75 * 2**30)
    assert topologies.memory_limit(jax.devices()[0]) is None
    real = types.SimpleNamespace(
        device_kind="another", memory_stats=lambda: {"bytes_limit": 7}
    )
    assert topologies.memory_limit(real) == 7


def test_local_devices_are_not_multiplied():
    assert topologies.make_devices(topologies.LOCAL) == jax.devices()
    with pytest.raises(UserError, match="leave out --num_slices"):
        topologies.make_devices(topologies.LOCAL, 2)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"
)
def test_missing_compiler_is_named():
    with pytest.raises(UserError, match="libtpu"):
        topologies.make_devices("v5e-16")


# ----------------------------------------------------------------------- compilation


@pytest.mark.parametrize(
    ("changes", "fsdp", "ways"),
    [
        ({}, 2, ("mesh.fsdp=-1", "remat=dots_no_batch", "accumulate_steps=2")),
        ({"model.remat": "attention"}, 8, ("remat=full", "accumulate_steps=2")),
        ({"model.remat": "full", "batch_size": 8}, 8, ()),
        ({"batch_size": 48, "accumulate_steps": 3}, 8, ("remat=dots", "_steps=6")),
    ],
)
def test_out_of_memory_errors_name_what_to_change(changes, fsdp, ways):
    config, mesh = small_config(**changes), sharding.make_mesh(-1, fsdp)
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (22.44G) exceeds available HBM (15.75G).\nmore"
    )
    with (
        pytest.raises(UserError) as error,
        compilation.explain_out_of_memory(config, mesh),
    ):
        raise jax.errors.JaxRuntimeError(text)
    message = str(error.value)
    assert "22.44G" in message and "more" not in message and "\n" not in message
    for way in (*ways, f"a smaller batch_size than {config.batch_size}"):
        assert way in message
    for absent in ("mesh.fsdp", "remat=", "_steps="):
        assert (absent in message) == any(absent in way for way in ways), message


def test_other_errors_of_jax_pass():
    mesh = sharding.make_mesh()
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        compilation.explain_out_of_memory(small_config(), mesh),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_compiled_programs_are_kept(tmp_path):
    """In a new process: jax has one cache per process."""
    code = (
        "import sys, jax; from vjepa_jax.program import compilation;"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0);"
        "compilation.use_cache(sys.argv[1]);"
        "jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8)))"
    )
    folder = tmp_path / "new" / "cache"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, env=environment, check=True)
    assert any(path.stat().st_size > 0 for path in folder.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"config\.compilation_cache=.*file"):
        compilation.use_cache(str(tmp_path / "file" / "cache"))


# ------------------------------------------------------------------ the command itself


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vjepa_jax.compile_check", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_topologies_are_listed():
    done = command("--list")
    assert done.returncode == 0 and "v5e:4x4" in done.stdout


def test_an_unknown_topology_gives_one_line():
    done = command("--config=configs/vjepa2.py:vitl16", "--topology=v5e-17")
    assert done.returncode == cli.EXIT_USER_ERROR
    (line,) = [t for t in done.stderr.splitlines() if t.startswith("error: ")]
    assert "v5e-17" in line and "Traceback" not in done.stderr


@pytest.mark.parametrize(("limit", "code"), [(2**40, None), (2**10, 1)])
def test_exit_code_shows_whether_it_fits(
    limit, code, report, monkeypatch, tmp_path, capsys
):
    values = {
        "CONFIG": small_config(),
        "TEACHER": None,
        "TOPOLOGY": "local",
        "NUM_SLICES": 1,
        "FAST": False,
        "SEARCH": False,
        "LIST": False,
        "JSON": str(tmp_path / "report.json"),
        "HLO": "",
    }
    for name, value in values.items():
        flag = types.SimpleNamespace(value=value)
        monkeypatch.setattr(compile_check, f"_{name}", flag, raising=False)
    limited = dataclasses.replace(report, limit_bytes=limit)
    monkeypatch.setattr(compile_check, "check_step", lambda *_, **__: limited)
    if code is None:
        compile_check.main()
    else:
        with pytest.raises(SystemExit) as ended:
            compile_check.main()
        assert ended.value.code == code == compile_check.EXIT_DOES_NOT_FIT
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["fits"] == (code is None) and stored["topology"] == "local"
    assert ("--config.accumulate_steps=2" in capsys.readouterr().out) == (code == 1)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_step_compiles_for_tpus_that_are_not_here(tmp_path):
    """Over two slices, with the attention kernel, as on a pod."""
    path = tmp_path / "report.json"
    done = command(
        "--config=configs/vjepa2.py:vitl16,smoke",
        "--topology=v5e:2x2",
        "--num_slices=2",
        "--config.model.dtype=bfloat16",
        "--config.mesh.fsdp=0",
        "--fast",
        f"--json={path}",
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads(path.read_text())
    assert stored["fits"] and stored["mesh"] == {"data": 2, "fsdp": 4}
    assert stored["devices"] == 8 and stored["device_kind"] == "TPU v5 lite"
    assert stored["kernel_flops"] > 0 and not stored["unknown"]
    assert not stored["largest_activations"]
