"""Write the diagrams of the docs beside this file, as SVG.

python docs/pictures/diagrams.py
"""

import pathlib

from svg import Picture

_FOLDER = pathlib.Path(__file__).parent
_CELL = 13  # side of a token
_SIDE = 4  # tokens along each side of a frame
# Hidden tokens: a block of space, the same at all time steps, as in V-JEPA.
_HIDDEN = {(row, column) for row in (0, 1, 2) for column in (1, 2)}


def _grid(p: Picture, x: int, y: int, style, *, only=None) -> None:
    """Draw the tokens of three time steps; `only` leaves out the others."""
    for step in range(3):
        left, top = x + step * 62, y
        for row in range(_SIDE):
            for column in range(_SIDE):
                place = (row, column)
                if only and not only(place):
                    continue
                p.box(
                    left + column * _CELL,
                    top + row * _CELL,
                    _CELL,
                    _CELL,
                    style(place) if callable(style) else style,
                    radius=1,
                )


def method() -> Picture:
    """Return the training step: from a clip to the loss."""
    p = Picture(960, 430, "One training step: clip, tokens, masks, encoders, loss")
    # Clip
    for i in range(4):
        p.box(28 + i * 9, 170 + i * 9, 74, 74, "plain", radius=2)
    for i in range(4):
        p.circle(72 + i * 14, 220 + i * 12, 6, "orange" if i == 3 else "plain")
    p.text(78, 290, "clip", bold=True, size=14)
    p.text(78, 307, "uint8\n[B, T, H, W, 3]", size=11.5, style="muted")
    # Tokens
    p.arrow((146, 214), (176, 214))
    _grid(p, 184, 188, "plain")
    p.text(274, 290, "tokens", bold=True, size=14)
    p.text(274, 307, "each 2 frames x 16 x 16 px,\n[B, N, D]", size=11.5, style="muted")
    # Upper path: target
    p.arrow((274, 176), (274, 88), (352, 88))
    p.text(286, 78, "all tokens", size=11.5, style="muted", anchor="start")
    p.label(
        356, 54, 150, 68, "target encoder", "EMA of the encoder,\nno gradient", "blue"
    )
    p.arrow((510, 88), (676, 88))
    p.text(593, 78, "features, layer-normalised", size=11.5, style="muted")
    _grid(p, 680, 62, "blue", only=lambda c: c in _HIDDEN)
    p.text(770, 40, "targets at hidden tokens", size=11.5, style="muted")
    # Lower path: context encoder, predictor
    p.arrow((374, 214), (404, 214))
    p.text(391, 204, "mask", size=11.5, style="muted")
    _grid(p, 412, 188, lambda c: "hidden" if c in _HIDDEN else "green")
    p.text(500, 270, "visible (green), hidden (grey)", size=11.5, style="muted")
    p.arrow((500, 282), (500, 338), (318, 338), (318, 352))
    p.text(410, 330, "visible tokens", size=11.5, style="muted")
    p.label(228, 356, 180, 56, "encoder", "trained; sees the context only", "green")
    p.arrow((412, 384), (516, 384))
    p.text(464, 375, "context", size=11.5, style="muted")
    p.label(520, 356, 180, 56, "predictor", "context + mask tokens", "purple")
    p.arrow((704, 384), (770, 384), (770, 318))
    _grid(p, 680, 240, "purple", only=lambda c: c in _HIDDEN)
    p.text(770, 308, "predictions of hidden tokens", size=11.5, style="muted")
    # Loss
    p.label(725, 158, 90, 40, "L1 loss", style="orange")
    p.arrow((770, 116), (770, 154))
    p.arrow((770, 230), (770, 202))
    # EMA
    p.arrow((224, 384), (14, 384), (14, 30), (431, 30), (431, 50), dash="5 4")
    p.text(180, 22, "EMA of the weights, after each update", size=11.5, style="muted")
    return p


# The order of imports, as `tests/architecture_test.py` has it, from the bottom up.
ROOMS = (
    {"base": "errors, files, host memory: what everyone needs"},
    {
        "config": "defaults, ranges,\nsaved configs",
        "models": "encoder, predictor, heads,\nattention; arrays only",
    },
    {
        "parallel": "mesh, sharding,\nprocesses",
        "objective": "masks, losses, optimiser,\nstate, step",
        "weights": "official and\nHugging Face files",
    },
    {"program": "from a config to models and a compiled, sharded step"},
    {"data": "files -> clips -> batches; knows no models and no masks"},
    {
        "world": "the synthetic world:\nscenes, physics, rendering",
        "run": "checkpoint, metrics,\nworkdir, watchdog",
    },
    {"evals": "one file or folder per evaluation of a frozen model"},
    {"report": "the page that shows a run"},
)


def rooms() -> Picture:
    """Return the rooms of the package, in the order of their imports."""
    row_height, left, right = 68, 20, 780
    p = Picture(
        800, 96 + row_height * len(ROOMS), "Rooms of the package, from commands to base"
    )
    p.label(
        left,
        16,
        right - left,
        44,
        "commands",
        "train  probe  report  convert  compile_check  prepare  check  make_list",
        "orange",
    )
    colours = {
        "models": "green",
        "objective": "green",
        "program": "green",
        "data": "blue",
    }
    for index, row in enumerate(reversed(ROOMS)):
        y = 72 + index * row_height
        width = (right - left - 12 * (len(row) - 1)) / len(row)
        for i, (name, detail) in enumerate(row.items()):
            x = left + i * (width + 12)
            style = colours.get(name, "plain")
            p.label(round(x), y, round(width), row_height - 12, name, detail, style)
    p.text(
        400,
        84 + row_height * len(ROOMS),
        "A file imports its own room and rooms of lower rows.",
        size=12,
        style="muted",
    )
    return p


def host() -> Picture:
    """Return the processes and threads of one host, and what passes between them."""
    p = Picture(960, 430, "Processes and threads of one host during training")
    p.label(20, 150, 118, 90, "videos", "files, shards,\ngs://, TFDS")
    # Worker processes
    p.box(176, 30, 230, 340, "page", dash="5 4")
    p.text(291, 50, "data.num_workers processes", size=12, style="muted")
    for i in range(3):
        p.label(
            192,
            64 + i * 98,
            198,
            84,
            f"worker {i}",
            "read, decode (PyAV),\ncrop, resize",
            "blue",
        )
    p.text(291, 362, "each notes the record it works on", size=11.5, style="muted")
    p.arrow((142, 195), (172, 195))
    # Shared memory
    p.label(440, 150, 110, 90, "/dev/shm", "batches,\nuint8", "purple")
    p.arrow((394, 106), (495, 106), (495, 146))
    p.arrow((394, 204), (436, 204))
    p.arrow((394, 302), (495, 302), (495, 244))
    # Main process
    p.box(584, 30, 206, 380, "page", dash="5 4")
    p.text(687, 50, "training process", size=12, style="muted")
    p.label(
        600,
        64,
        174,
        56,
        "drawing thread",
        "next batch of Grain;\nits wait can time out",
        "blue",
    )
    p.label(
        600,
        142,
        174,
        120,
        "main thread",
        "start the step\nnext batch -> device\nread the last metrics\n"
        "checkpoint, evaluate",
        "green",
    )
    p.label(600, 284, 174, 46, "threads: Orbax", "write the checkpoint")
    p.label(600, 340, 174, 56, "other threads", "watchdog, signals,\ncopies to gs://")
    p.arrow((554, 172), (574, 172), (574, 92), (596, 92))
    p.arrow((687, 124), (687, 138))
    p.arrow((687, 266), (687, 280))
    # Devices, files
    p.label(
        826,
        142,
        114,
        120,
        "devices",
        "one batch ahead\nof the step;\nstate is donated",
        "orange",
    )
    p.arrow((778, 188), (822, 188), both=False)
    p.arrow((822, 222), (778, 222))
    p.text(800, 180, "batch", size=11, style="muted")
    p.text(800, 238, "metrics", size=11, style="muted")
    p.label(
        826,
        284,
        114,
        112,
        "workdir",
        "checkpoints/\nmetrics.jsonl\ntensorboard/\nstacks_*.txt",
    )
    p.arrow((778, 307), (822, 307))
    p.arrow((778, 368), (822, 368))
    return p


def mesh() -> Picture:
    """Return the mesh: how batch and state are split, and what devices exchange."""
    p = Picture(960, 400, "The mesh of data x fsdp, and what devices exchange")
    p.text(450, 30, "mesh.data=2, mesh.fsdp=4: eight devices", size=14, bold=True)
    for row in range(2):
        for column in range(4):
            x, y = 130 + column * 164, 62 + row * 140
            p.box(x, y, 148, 88, "plain")
            p.box(x + 10, y + 12, 128, 28, "blue", radius=4)
            p.text(x + 74, y + 31, f"batch {row * 4 + column + 1}/8", size=12)
            p.box(x + 10, y + 48, 128, 28, "green", radius=4)
            p.text(x + 74, y + 67, f"state {column + 1}/4", size=12)
        p.text(
            118, 110 + row * 140, f"data {row}", size=12, style="muted", anchor="end"
        )
        # Along a row
        y = 160 + row * 140
        p.arrow((134, y), (766, y), both=True)
        p.text(
            450,
            y + 16,
            "fsdp: all-gather each layer's parameters, reduce-scatter gradients",
            size=11.5,
            style="muted",
        )
    p.arrow((790, 70), (790, 290), both=True)
    p.text(
        804,
        150,
        "data: all-reduce\ngradients; may\ncross slices and\nslower links",
        size=11.5,
        style="muted",
        anchor="start",
    )
    p.text(
        450,
        350,
        "State: parameters, moments, EMA target, in fp32. Biases, norms, mask tokens\n"
        "are replicated. Each device computes whole layers: no activations move.",
        size=12,
        style="muted",
    )
    return p


PICTURES = {"method": method, "rooms": rooms, "host": host, "mesh": mesh}


def main() -> None:
    """Write all pictures."""
    for name, draw in PICTURES.items():
        (_FOLDER / f"{name}.svg").write_text(draw().render())


if __name__ == "__main__":
    main()
