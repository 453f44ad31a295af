"""Time the update of V-JEPA by model size, alone or beside the same in PyTorch.

    python benchmarks/step.py --sizes=tiny,small,base --batch_size=2
    python benchmarks/step.py --sizes=small --batch_size=2 --peer

Clips of 16 x 224 x 224, V-JEPA 2's rotary positions and predictor, both mask types with
their usual token counts; bf16 on accelerators, fp32 on CPUs. The steps of both programs
alternate, each in a process of its own: in one, on a CPU, ours took a third longer than
alone. Prints a Markdown table of medians, and the fastest step in brackets; `ratio` is
the median of PyTorch's time over ours, pair by pair.
"""

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import time
import types

# PyTorch needs the memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import flax.linen as nn
import jax
import numpy as np

from vjepa_jax.base.host_memory import keep_freed_memory
from vjepa_jax.config import defaults, rules
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build, compilation, flops


def make_config(options: argparse.Namespace, size: str):
    """Return the config of a size: V-JEPA 2's at 16 x 224 x 224."""
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
    """The compiled step and its state: call it for one step."""

    def __init__(self, config):
        """Compiles."""
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
        """Run one update; return its loss, so that it has ended."""
        self.state, metrics = self.step(self.state, self.batch)
        return float(metrics["train/loss"])

    def peak_gib(self) -> float:
        """Memory of a step on one device, as the compiler plans it."""
        return compilation.memory_of(self.step).peak / compilation.GIB


class Peer:
    """The same step in PyTorch, in another process: call it for one step."""

    def __init__(self, ours: Ours):
        """Starts the process."""
        program, config = ours.program, ours.program.config
        shape = program.video_shapes[defaults.MAIN_STREAM]
        masks = program.objective.streams[defaults.MAIN_STREAM].masks.values()
        arguments = (
            _size(program.objective.encoder),
            _size(program.objective.predictor),
            shape[:3],
            program.grids[defaults.MAIN_STREAM],
            [(m.num_context, m.num_target) for m in masks],
            config.batch_size,
            config.model.dtype,
            "cuda" if jax.default_backend() == "gpu" else "cpu",
        )
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, arguments), daemon=True).start()
        theirs.close()  # ours of their end: else their death would not be seen

    def __call__(self) -> float:
        """Run one update; return its loss."""
        try:
            self._pipe.send(True)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise SystemExit(
                "error: PyTorch's process ended, see above; or leave out --peer"
            ) from None

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(False)


def _size(module: nn.Module) -> types.SimpleNamespace:
    """Return the numbers of a module, which itself cannot go to another process."""
    fields = dataclasses.asdict(module)
    return types.SimpleNamespace(
        **{k: v for k, v in fields.items() if isinstance(v, int)}
    )


def _serve(pipe, arguments: tuple) -> None:
    import step_peer

    keep_freed_memory()
    step = step_peer.Peer(*arguments)
    while pipe.recv():
        pipe.send(step())


def measure(steps: list, warmup: int, count: int) -> list[list[float]]:
    """Time steps in alternation: seconds of each call of each step."""
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
    parser.add_argument("--peer", action="store_true", help="PyTorch beside it")
    options = parser.parse_args()
    keep_freed_memory()
    device = jax.devices()[0]
    peak = flops.peak_flops(device.device_kind)
    print(
        f"{jax.device_count()} x {device.device_kind}, batch {options.batch_size}, "
        f"{options.dtype}\n"
        "| size | s/step | clips/s | model TFLOP/s | MFU | peak GiB | compile s "
        "| PyTorch s/step | ratio |\n" + "|---" * 9 + "|"
    )
    for size in options.sizes.split(","):
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
            "-",
            "-",
        ]
        if options.peer:
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            theirs = times[1]
            cells[-2] = f"{statistics.median(theirs):.3f} ({min(theirs):.3f})"
            cells[-1] = f"{ratio:.2f}"
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
