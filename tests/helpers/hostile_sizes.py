"""Pictures that claim to be larger than any machine's memory."""

import struct
import zlib


def png(side: int) -> bytes:
    """Return a small PNG of a huge black square, one bit per pixel."""
    header = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + side // 8) * side), 9)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


def sample_entry(content: bytes) -> int:
    """Return where it starts; the first box of the file contains the same word."""
    return content.index(b"avc1", content.index(b"stsd"))


def with_frame_side(content: bytes, side: int) -> bytes:
    """Change the frame size in the H.264 parameters of an MP4, `moov` at its end."""
    boxes = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avcC")
    # The set follows version, profile, level, two counts and its own length.
    start = content.index(b"avcC") + 4 + 6
    (old_length,) = struct.unpack_from(">H", content, start)
    old = content[start + 2 : start + 2 + old_length]
    new = _sized_parameters(old, side // 16)
    changed = bytearray(content)
    changed[start : start + 2 + old_length] = struct.pack(">H", len(new)) + new
    for place in (*map(content.index, boxes), sample_entry(content)):
        at = place - 4
        (length,) = struct.unpack_from(">I", content, at)
        struct.pack_into(">I", changed, at, length + len(new) - old_length)
    return bytes(changed)


def _sized_parameters(parameters: bytes, num_blocks: int) -> bytes:
    """Rewrites an H.264 baseline sequence parameter set for square frames.

    Args:
      parameters: the set, from its header byte on.
      num_blocks: side in macroblocks of 16 pixels.
    """
    # Header, profile, constraints, level: 4 bytes. What follows are Exp-Golomb codes.
    # 00 00 is written as 00 00 03, so that it does not look like a start code.
    plain = parameters.replace(b"\0\0\3", b"\0\0")
    bits = "".join(f"{byte:08b}" for byte in plain[4:])
    position = 0

    def read() -> int:
        nonlocal position
        zeros = bits.index("1", position) - position
        code = int(bits[position + zeros : position + 2 * zeros + 1], 2)
        position += 2 * zeros + 1
        return code - 1

    def code(value: int) -> str:
        digits = f"{value + 1:b}"
        return "0" * (len(digits) - 1) + digits

    kept = [read() for _ in range(3)]  # id, bits of frame numbers, kind of order
    if kept[2] == 0:
        kept.append(read())
    kept.append(read())  # reference frames
    written = "".join(map(code, kept))
    written += bits[position]  # gaps allowed
    position += 1
    read(), read()  # width and height
    written += code(num_blocks - 1) * 2
    # No fields, 8x8 inference, neither cropping nor usability information; the end.
    written += "1" + "1" + "0" + "0" + "1"
    written += "0" * (-len(written) % 8)
    data = int(written, 2).to_bytes(len(written) // 8, "big")
    for last in range(4):
        pattern = b"\0\0" + bytes([last])
        data = data.replace(pattern, b"\0\0\3" + bytes([last]))
    return plain[:4] + data
