"""Lists of small integers <-> bytes: one class byte each, squeezed by zstd, and whole raw bytes below it.

    data = encode_ints([sizes, steps])           # two streams of values below MOST_VALUE
    values, used = decode_ints(data, most=1000)  # [sizes + steps] uint32, one after another

A class says how large a value is; its low bytes are as good as random and are stored as they are. Against classes with
2 mantissa bits and bit-packed rests (what pcodec does inside) this costs 1 % and decodes 2.5 times as fast in numpy.

Shapes: T values of all streams.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import compiled
from .errors import FormatError

if TYPE_CHECKING:
    import zstandard

Array = NDArray[Any]

_BYTE, _TWO = 128, 240  # the first classes with one raw byte, and with two
_WIDE = _BYTE + 256 * (_TWO - _BYTE)  # 28,800: the first value that takes two
MOST_VALUE = _WIDE + 65536 * (256 - _TWO)  # 1,077,376: above every id and count of 20 bits
MOST_VALUES = 2**26  # of one list: what a reader allocates for a hostile block stays below 2 GiB

FIRST = np.concatenate(
    [np.arange(_BYTE), _BYTE + 256 * np.arange(_TWO - _BYTE), _WIDE + 65536 * np.arange(256 - _TWO)]
).astype(np.uint32)
_local = threading.local()  # zstd contexts are costly to make and not for two threads at once


def encode_ints(streams: Sequence[Array]) -> bytes:
    """u32 length of a zstd frame, the frame (T class bytes), then the raw bytes: all lows, then all seconds.

    Each stream ends a zstd block, so each has a Huffman table of its own. Values must be below MOST_VALUE.
    """
    parts = [_classes(stream) for stream in streams]
    raw = [low for _, low, _ in parts] + [second for _, _, second in parts]
    return join_ints([classes for classes, _, _ in parts], raw)


def join_ints(blocks: Sequence[Any], raw: Sequence[Any]) -> bytes:
    """The list of what `_classes` makes: the class bytes of each zstd block, and the raw bytes, as buffers."""
    frame = _compress(blocks)
    return b"".join([struct.pack("<I", len(frame)), frame, *raw])


def _classes(values: Array) -> tuple[bytes, bytes, bytes]:
    """Class bytes of one stream, its low bytes, its second bytes."""
    values = np.asarray(values, np.uint32)
    classes = values.astype(np.uint8)
    big = np.flatnonzero(values >= _BYTE)
    over = values[big]
    two = over >= _WIDE
    over -= np.where(two, np.uint32(_WIDE), np.uint32(_BYTE))
    classes[big] = np.where(two, _TWO + (over >> 16), _BYTE + (over >> 8))
    return classes.tobytes(), over.astype(np.uint8).tobytes(), (over[two] >> 8).astype(np.uint8).tobytes()


def decode_ints(data: bytes, most: int) -> tuple[Array, int]:
    """[T] uint32 values and the number of bytes they took; FormatError for damaged bytes or more than `most` values."""
    classes, end = read_classes(data, most)
    values, fast = np.empty(len(classes), np.uint32), compiled.kernels()
    used = fast.ints(classes, np.frombuffer(data, np.uint8), end, FIRST, values) if fast else -1
    return (values, used) if used >= 0 else fill_values(values, classes, data, end)


def read_classes(data: bytes, most: int) -> tuple[Array, int]:
    """[T] uint8 classes, out of their zstd frame, and where the raw bytes begin; FormatError as `decode_ints`."""
    content, end = read_frame(data, most)
    return np.frombuffer(content, np.uint8), end


def read_frame(data: bytes, most: int) -> tuple[bytes, int]:
    """`read_classes`, as bytes."""
    if len(data) < 4:
        raise FormatError(f"{len(data)} bytes cannot hold the length of a zstd frame; the file is damaged")
    end = 4 + struct.unpack_from("<I", data)[0]
    if end > len(data):
        raise FormatError(f"a zstd frame ends at byte {end} of {len(data)}; the file is damaged")
    content = _decompress(data[4:end], min(most, MOST_VALUES))
    compiled.kernels(len(content))
    return content, end


def fill_values(values: Array, classes: Array, data: bytes, end: int) -> tuple[Array, int]:
    """The values [T], filled, and where their raw bytes, which begin at `end`, end."""
    FIRST.take(classes, out=values, mode="clip")
    big = np.flatnonzero(classes >= _BYTE)
    two = big[classes[big] >= _TWO]
    used = end + len(big) + len(two)
    if used > len(data):
        raise FormatError(f"{used - end} raw bytes are needed, {len(data) - end} follow; the file is damaged")
    raw = np.frombuffer(data, np.uint8, used - end, end)
    values[big] += raw[: len(big)]
    values[two] += raw[len(big) :].astype(np.uint32) << np.uint32(8)
    return values, used


def zstd_version() -> str:
    """The version of libzstd that compresses here: frames of two versions may differ, what they decode to may not."""
    import zstandard

    return ".".join(map(str, zstandard.ZSTD_VERSION))


def _compress(streams: Sequence[Any]) -> bytes:
    """One frame with its content size; every stream ends a block."""
    import zstandard

    writer = _compressor().compressobj(size=sum(map(len, streams)))
    pieces = []
    for stream in streams[:-1]:
        pieces += [writer.compress(stream), writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    pieces += [writer.compress(stream) for stream in streams[-1:]]
    return b"".join([*pieces, writer.flush()])


def _compressor() -> zstandard.ZstdCompressor:
    """Every parameter is pinned: a level means other parameters in other versions of zstd.

    Huffman coding does all the work here, long matches catch constant columns. A target_length above 0 would switch
    Huffman coding off.
    """
    import zstandard

    if not hasattr(_local, "compressor"):
        parameters = zstandard.ZstdCompressionParameters(
            window_log=17,
            hash_log=12,
            chain_log=12,
            search_log=1,
            min_match=7,
            target_length=0,
            strategy=zstandard.STRATEGY_FAST,
            write_content_size=True,
            write_checksum=False,
        )
        _local.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    found: zstandard.ZstdCompressor = _local.compressor
    return found


def _decompress(frame: bytes, most: int) -> bytes:
    """The content of exactly one frame, whose declared size is checked before anything is allocated."""
    import zstandard

    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size > most:  # an undeclared size reads as 2^64 - 1
            raise FormatError(f"a zstd frame declares {size} values, at most {most} fit here; the file is damaged")
        content: bytes = _local.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"a zstd frame cannot be read ({error}); the file is damaged") from None
    if len(content) != size:
        raise FormatError(f"a zstd frame holds {len(content)} values, declares {size}; the file is damaged")
    return content
