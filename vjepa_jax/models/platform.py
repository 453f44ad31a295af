"""For which kind of device a function is being compiled."""

import jax


def platform() -> str:
    """Return `cpu`, `gpu` or `tpu`: of the mesh that is set, else the default one.

    The step is also compiled for described devices from machines without them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
