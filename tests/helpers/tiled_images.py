"""AVIF images that consist of tiles, as pictures of phones in HEIC do."""

import io
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

_SIDE = 64  # of a tile; codecs of still images refuse smaller ones


def tiled_avif(colours: list[tuple[int, int, int]]) -> bytes:
    """Return the bytes of an AVIF image of 2 x 2 tiles, each of one colour."""
    tiles = [_encode(colour) for colour in colours]
    metadata = dict(_boxes(dict(_boxes(tiles[0]))[b"meta"][4:]))
    properties = dict(_boxes(dict(_boxes(metadata[b"iprp"]))[b"ipco"]))
    contents = [dict(_boxes(tile))[b"mdat"] for tile in tiles]
    head = _head(properties, contents, start=0)
    head = _head(properties, contents, start=len(head) + 8)
    return head + _box(b"mdat", *contents)


def _encode(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    pixels = np.full((_SIDE, _SIDE, 3), colour, np.uint8)
    Image.fromarray(pixels).save(file, "AVIF")
    return file.getvalue()


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    while content:
        size, kind = struct.unpack_from(">I4s", content)
        yield kind, content[8:size]
        content = content[size:]


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, kind) + content


def _full_box(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)


def _head(properties: dict[bytes, bytes], contents: list[bytes], start: int) -> bytes:
    """Return all boxes before the tiles: item 1 is the grid, items 2 to 5 its tiles."""
    tiles = range(2, 6)
    sizes = [
        _full_box(b"ispe", struct.pack(">II", side, side))
        for side in (_SIDE, 2 * _SIDE)
    ]
    shared = [_box(kind, properties[kind]) for kind in (b"pixi", b"av1C")]
    # Numbers of properties: 1 and 2 are sizes, 3 the bits, 4 the codec, without which
    # (128) a tile cannot be decoded.
    used = [struct.pack(">HBBB", 1, 2, 2, 3)]
    used += [struct.pack(">HBBBB", tile, 3, 1, 3, 128 | 4) for tile in tiles]
    names = [_full_box(b"infe", struct.pack(">HH5s", 1, 0, b"grid"), version=2)]
    names += [
        _full_box(b"infe", struct.pack(">HH5s", tile, 0, b"av01"), version=2, flags=1)
        for tile in tiles
    ]
    places = [struct.pack(">HHHHII", 1, 1, 0, 1, 0, 8)]  # in `idat`
    for tile, content in zip(tiles, contents, strict=True):
        places.append(struct.pack(">HHHHII", tile, 0, 0, 1, start, len(content)))
        start += len(content)
    return _box(b"ftyp", b"avif\0\0\0\0avifmif1miaf") + _full_box(
        b"meta",
        _full_box(b"hdlr", struct.pack(">I4s13x", 0, b"pict")),
        _full_box(b"pitm", struct.pack(">H", 1)),
        _full_box(b"iloc", struct.pack(">BBH", 0x44, 0, 5), *places, version=1),
        _full_box(b"iinf", struct.pack(">H", 5), *names),
        _full_box(b"iref", _box(b"dimg", struct.pack(">HH4H", 1, 4, *tiles))),
        _box(
            b"iprp",
            _box(b"ipco", *sizes, *shared),
            _full_box(b"ipma", struct.pack(">I", 5), *used),
        ),
        _box(b"idat", struct.pack(">4B2H", 0, 0, 1, 1, 2 * _SIDE, 2 * _SIDE)),
    )
