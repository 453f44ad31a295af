"""Test set-up: eight devices on any machine.

The variables must be set before jax is first imported, hence the imports' order.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

from absl import flags

# Grain's workers read absl flags, which only an absl entry point parses.
flags.FLAGS.mark_as_parsed()
