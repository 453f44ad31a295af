"""What a config's program is made of."""

import jax.numpy as jnp
import pytest
from step_setup import one_device

from vjepa_jax.config.defaults import get_config
from vjepa_jax.program import build


@pytest.fixture
def config():
    config = get_config()
    config.batch_size = 8
    config.data.num_frames = 4
    config.data.resolution = 32
    config.model.encoder.size = "nano"
    config.model.predictor.update(depth=1, width=32, num_heads=2)
    return config


def test_models_compute_in_the_configs_dtype_but_on_cpus(config):
    for platform in (None, "gpu", "tpu"):
        encoder, predictor = build.make_models(config, platform)
        assert encoder.dtype == predictor.dtype == jnp.bfloat16
    program = build.make_program(config, one_device())
    objective = program.objective
    assert objective.encoder.dtype == objective.predictor.dtype == jnp.float32
    assert " in float32;" in program.summary
