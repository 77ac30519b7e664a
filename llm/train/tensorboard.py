"""TensorBoard's event files, written without TensorBoard: scalars alone, as parts of a run directory.

A file is a TFRecord stream (tensorflow.org/tutorials/load_data/tfrecord) of ``Event`` messages (event.proto and
summary.proto in TensorFlow's sources). TensorBoard reads all files of a folder in the order of their names.
"""

from __future__ import annotations

import struct

from crc32c import crc32c


def header(at: float) -> bytes:
    """What a file begins with. ``at``: seconds since the epoch."""
    return _record(_fixed64(1, struct.pack("<d", at)) + _bytes(3, b"brain.Event:2"))


def scalars(values: dict[str, float], step: int, at: float) -> bytes:
    """One event: the numbers of ``step``, by tag."""
    summary = b"".join(
        _bytes(1, _bytes(1, tag.encode()) + _key(2, 5) + struct.pack("<f", value)) for tag, value in values.items()
    )
    return _record(_fixed64(1, struct.pack("<d", at)) + _key(2, 0) + _varint(step) + _bytes(5, summary))


def file_name(part: int) -> str:
    """``events.out.tfevents.`` in the name is what TensorBoard looks for."""
    return f"events.out.tfevents.{part:06d}"


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    """CRC-32C, turned and moved as TFRecord wants it, so that the checksum of a checksum is not a constant."""
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _key(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fixed64(number: int, data: bytes) -> bytes:
    return _key(number, 1) + data


def _bytes(number: int, data: bytes) -> bytes:
    return _key(number, 2) + _varint(len(data)) + data
