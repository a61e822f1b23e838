"""Zstandard frames, put together by hand from raw and run-length blocks.

So the bytes of the vectors depend on no version of a compressor.
"""

from __future__ import annotations

RUN = 60  # runs of one byte at least this long become run-length blocks


def block(kind: int, size: int, body: bytes, last: bool) -> bytes:
    """Return one block of a frame: kind 0 is raw, 1 is run-length."""
    return (int(last) | kind << 1 | size << 3).to_bytes(3, "little") + body


def blocks(content: bytes) -> bytes:
    """Return content as raw blocks, with run-length blocks for long runs of one byte."""
    parts: list[tuple[int, int, bytes]] = []
    begin = at = 0
    limit = 1 << 17
    while at < len(content):
        run = 1
        if content[at : at + RUN] == content[at : at + 1] * RUN:
            run = len(content) - at - len(content[at:].lstrip(content[at : at + 1]))
            run = min(run, limit)
        if run > 1 or at - begin == limit:
            parts += [(0, at - begin, content[begin:at])] if at > begin else []
            begin = at
        if run > 1:
            parts.append((1, run, content[at : at + 1]))
            begin = at + run
        at += run
    if begin < at or not parts:
        parts.append((0, at - begin, content[begin:at]))
    return b"".join(block(*part, part is parts[-1]) for part in parts)


def frame(content: bytes, stated: int | None = None) -> bytes:
    """Return a single-segment frame of content, stating its size or a wrong one."""
    size = len(content) if stated is None else stated
    if size < 256:
        head = b"\x20" + size.to_bytes(1, "little")
    elif size < 256 + 65536:
        head = b"\x60" + (size - 256).to_bytes(2, "little")
    else:
        head = b"\xa0" + size.to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd" + head + blocks(content)


def windowed_frame(content: bytes, window_log: int, stated: int | None = None) -> bytes:
    """Return a frame with a window of 2^window_log bytes and a stated size of 8 bytes."""
    size = len(content) if stated is None else stated
    head = b"\xc0" + bytes([window_log - 10 << 3]) + size.to_bytes(8, "little")
    return b"\x28\xb5\x2f\xfd" + head + blocks(content)


def smaller(content: bytes) -> bytes:
    """Return content as a frame if that is smaller, else plain."""
    return min(content, frame(content), key=len)
