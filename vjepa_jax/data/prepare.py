"""Make the dataset of a config ready: render the synthetic world that it names.

python -m vjepa_jax.data.prepare --config=configs/world_tiny.py
"""

import sys

from vjepa_jax import cli
from vjepa_jax.data import render
from vjepa_jax.default_config import UserError, validate


def main() -> None:
    """Run the command line."""
    config = _CONFIG.value
    validate(config)
    if not config.world.path:
        raise UserError("config.world.path is empty: this config names no world")
    rendered = render.render_world(config.world)
    state = "rendered" if rendered else "complete already"
    print(f"world in {config.world.path}: {state}", file=sys.stderr)


if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    cli.run(main)
