"""Time V-JEPA's update by model size, alone or beside the same update in PyTorch.

    python benchmarks/step.py --sizes=tiny,small,base --batch_size=2
    python benchmarks/step.py --sizes=small --batch_size=2 --peer

Clips of 16 x 224 x 224, V-JEPA 2's rotary positions and predictor, both mask types with
their usual token counts; bf16 on accelerators, fp32 on CPUs. The steps of both programs
alternate, each in its own process: in a common process, on a CPU, ours took a third
longer than alone. Prints a Markdown table of medians, the fastest step in brackets;
`ratio` is the median over pairs of steps of PyTorch's time / ours.
"""

import argparse
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
import types

# PyTorch needs device memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import flax.linen as nn
import jax
import markdown
import numpy as np

from vjepa_jax.base.host_memory import keep_freed_memory
from vjepa_jax.config import defaults, rules
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build, compilation, flops


def make_config(options: argparse.Namespace, size: str) -> ConfigDict:
    """Return the config of V-JEPA 2 with an encoder size, at 16 x 224 x 224."""
    config = defaults.get_config()
    config.data.path = "none"
    config.batch_size = options.batch_size
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.model.pos_embed = "rope"
    config.model.scale_init = True
    config.model.encoder.size = size
    config.model.predictor.num_heads = 12
    config.model.dtype = options.dtype
    config.model.remat = options.remat
    config.model.attention = options.attention
    config.model.scan_layers = options.scan_layers
    rules.validate(config)
    return config


class Ours:
    """The compiled step and its state; a call runs one step."""

    def __init__(self, config: ConfigDict):
        """Compile the step."""
        self.mesh = sharding.make_mesh(**config.mesh)
        self.program = build.make_program(config, self.mesh)
        with sharding.use(self.mesh):
            lowered = self.program.lower()
            self.step, self.compile_secs = compilation.compile_step(lowered)
            self.state = self.program.make_state()
        shape = self.program.video_shapes[defaults.MAIN_STREAM]
        video = np.random.default_rng(0).integers(
            0, 256, (config.batch_size, *shape), dtype=np.uint8
        )
        self.batch = sharding.shard_batch({"video": video}, self.mesh)

    def __call__(self) -> float:
        """Run one update and wait for its loss."""
        self.state, metrics = self.step(self.state, self.batch)
        return float(metrics["train/loss"])

    def peak_gib(self) -> float:
        """Return the memory of a step on one device, as planned by the compiler."""
        return compilation.memory_of(self.step).peak / compilation.GIB


class Peer:
    """The same step in PyTorch, in another process; a call runs one step."""

    def __init__(self, ours: Ours):
        """Start the process."""
        program, config = ours.program, ours.program.config
        shape = program.video_shapes[defaults.MAIN_STREAM]
        masks = program.objective.streams[defaults.MAIN_STREAM].masks.values()
        sizes = types.SimpleNamespace(
            encoder=_size(program.objective.encoder),
            predictor=_size(program.objective.predictor),
            clip=shape[:3],
            grid=program.grids[defaults.MAIN_STREAM],
            masks=[(m.num_context, m.num_target) for m in masks],
            batch_size=config.batch_size,
        )
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        arguments = sizes, config.model.dtype, device
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, arguments), daemon=True).start()
        theirs.close()  # our copy: while it is open, a dead process causes no EOFError

    def __call__(self) -> float:
        """Run one update and wait for its loss."""
        try:
            self._pipe.send(True)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise SystemExit(
                "error: PyTorch's process ended, see its output above; or omit --peer"
            ) from None

    def close(self) -> None:
        """End the process."""
        self._pipe.send(False)


def _size(module: nn.Module) -> types.SimpleNamespace:
    """Return a module's integer fields; the module itself cannot be pickled."""
    fields = dataclasses.asdict(module)
    return types.SimpleNamespace(
        **{k: v for k, v in fields.items() if isinstance(v, int)}
    )


def _serve(pipe: multiprocessing.connection.Connection, arguments: tuple) -> None:
    import step_peer

    keep_freed_memory()
    step = step_peer.Peer(*arguments)
    while pipe.recv():
        pipe.send(step())


def measure(steps: list, warmup: int, count: int) -> list[list[float]]:
    """Time steps in turns; return the seconds of each step's calls after warm-up."""
    times: list[list[float]] = [[] for _ in steps]
    for i in range(warmup + count):
        for step, of_step in zip(steps, times, strict=True):
            began = time.perf_counter()
            step()
            if i >= warmup:
                of_step.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Run the command line."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="small", help="of models/registry.py")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="none")
    parser.add_argument(
        "--scan_layers", action=argparse.BooleanOptionalAction, default=True
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="time PyTorch, too")
    options = parser.parse_args()
    keep_freed_memory()
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind)
    print(
        f"{jax.device_count()} x {device.device_kind}, batch {options.batch_size}, "
        f"{options.dtype}"
    )

    def row(size: str) -> list[str]:
        ours = Ours(make_config(options, size))
        peers = [Peer(ours)] if options.peer else []
        times = measure([ours, *peers], options.warmup, options.steps)
        for peer in peers:
            peer.close()
        seconds = statistics.median(times[0])
        rate = ours.program.step_flops / seconds
        cells = [
            size,
            f"{seconds:.3f} ({min(times[0]):.3f})",
            f"{options.batch_size / seconds:.2f}",
            f"{rate / 1e12:.3f}",
            f"{rate / peak / jax.device_count():.1%}" if peak else "-",
            f"{ours.peak_gib():.2f}",
            f"{ours.compile_secs:.0f}",
        ]
        if not peers:
            return [*cells, "-", "-"]
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        seconds = statistics.median(times[1])
        return [*cells, f"{seconds:.3f} ({min(times[1]):.3f})", f"{ratio:.2f}"]

    columns = ["size", "s/step", "clips/s", "model TFLOP/s", "MFU", "peak GiB"]
    columns += ["compile s", "PyTorch s/step", "ratio"]
    markdown.print_table(columns, map(row, options.sizes.split(",")))


if __name__ == "__main__":
    main()
