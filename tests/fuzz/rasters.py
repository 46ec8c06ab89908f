"""Band files in every form that a TIFF can have, and ways to damage one."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Callable, NamedTuple

import numpy as np
import rasterio
import tifffile
from support import scene_numbers

SIDES = (1, 2, 7, 16, 31, 32, 33, 48)  # px, of tiles
INTERESTING = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 32, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
# Tags whose values decide how much is read, how, and from where.
WEIGHTY_TAGS = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339, 42113)


class Raster(NamedTuple):
    """A band file. `form` says what it is; `whole` whether it has to be read."""

    form: str
    content: bytes
    whole: bool


# --- Whole files ----------------------------------------------------------------------------------


def random_numbers(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Return (H, W, 5) stored values, float32, cut from a synthetic scene that is repeated as needed."""
    scene = scene_numbers(int(rng.integers(3)))
    repeated = np.tile(scene, (-(-shape[0] // scene.shape[0]), -(-shape[1] // scene.shape[1]), 1))
    return repeated[: shape[0], : shape[1]].copy()


def random_shape(rng: np.random.Generator) -> tuple[int, int]:
    """Return the size (H, W) of a tile; one in twenty is very long."""
    if rng.random() < 0.05:
        return (1, 5000) if rng.random() < 0.5 else (1500, 1)
    return int(rng.choice(SIDES)), int(rng.choice(SIDES))


def spoil_values(rng: np.random.Generator, values: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a name and what a band may hold: measurements, or values that no sensor gives."""
    height, width = values.shape
    kinds = {
        "measurements": values,
        "all nodata": np.zeros_like(values),
        "constant": np.full_like(values, 30000),
        "negative": -values,
        "not finite": np.where(rng.random(values.shape) < 0.3, rng.choice([np.nan, np.inf, -np.inf]), values),
        "huge fill": np.where(rng.random(values.shape) < 0.1, np.float32(-3.4e38), values),
        "noise": rng.integers(0, 65536, (height, width)).astype(np.float32),
    }
    weights = [0.6] + [0.4 / (len(kinds) - 1)] * (len(kinds) - 1)
    name = str(rng.choice(list(kinds), p=weights))
    return name, kinds[name].astype(np.float32)


def encode(values: np.ndarray, dtype: str, **options) -> bytes:
    """Return a TIFF by tifffile; `options` are those of its imwrite."""
    stream = BytesIO()
    with np.errstate(invalid="ignore", over="ignore"):
        stored = np.nan_to_num(values, posinf=0, neginf=0) if np.dtype(dtype).kind in "ui" else values
        stored = stored.astype(np.int64) if np.dtype(dtype).kind in "ui" else stored
        tifffile.imwrite(stream, stored.astype(dtype), photometric="minisblack", **options)
    return stream.getvalue()


def encode_by_gdal(values: np.ndarray, dtype: str, **options) -> bytes:
    """Return a GeoTIFF by GDAL, with the compressions that tifffile alone cannot write."""
    stored = np.nan_to_num(values, posinf=0, neginf=0) if np.dtype(dtype).kind in "ui" else values
    with rasterio.MemoryFile() as memory:
        profile = {"driver": "GTiff", "height": values.shape[0], "width": values.shape[1], "count": 1}
        with np.errstate(invalid="ignore"), memory.open(dtype=dtype, **profile, **options) as raster:
            raster.write(stored.astype(dtype), 1)
        return memory.read()


def whole_raster(rng: np.random.Generator, values: np.ndarray) -> Raster:
    """Return the values as one of many kinds of file that hold one band."""
    name, values = spoil_values(rng, values)
    by_gdal = bool(rng.random() < 0.35)
    dtype = str(rng.choice(["u2", "u2", "f4", "f4", "i2", "i4", "u4", "f8", "u1"]))
    options: dict = {}
    if by_gdal:
        dtype = np.dtype(dtype).name
        compress = str(rng.choice(["none", "deflate", "lzw"]))
        options["compress"] = compress
        if compress != "none" and rng.random() < 0.5:
            options["predictor"] = 2
        if rng.random() < 0.4:
            options |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
        if rng.random() < 0.3:
            options |= {"nodata": 0}
        if rng.random() < 0.2:
            options |= {"BIGTIFF": "YES"}
        if rng.random() < 0.2:
            options |= {"ENDIANNESS": "BIG"}
        content = encode_by_gdal(values, dtype, **options)
    else:
        options["byteorder"] = str(rng.choice(["<", ">"]))
        options["bigtiff"] = bool(rng.random() < 0.25)
        layout = rng.random()
        if layout < 0.25:
            options["tile"] = (16, 16)
        elif layout < 0.5:
            options["rowsperstrip"] = int(rng.integers(1, values.shape[0] + 1))
        if rng.random() < 0.3:
            options["compression"] = str(rng.choice(["zlib", "lzma"]))
        content = encode(values, dtype, **options)
        if rng.random() < 0.1:
            content = several_pages(values, dtype)
            options = {"pages": 3}
    return Raster(f"{name}, {dtype}, {options}", content, True)


def several_pages(values: np.ndarray, dtype: str) -> bytes:
    """Return a file whose first page is the band, followed by two smaller ones."""
    stream = BytesIO()
    with tifffile.TiffWriter(stream) as tiff:
        for step in (1, 2, 4):
            page = np.nan_to_num(values[::step, ::step], posinf=0, neginf=0)
            page = np.clip(page, 0, 255 if dtype == "u1" else 30000)
            tiff.write(page.astype(dtype), photometric="minisblack", metadata=None)
    return stream.getvalue()


# --- Damage ---------------------------------------------------------------------------------------

Damage = Callable[[np.random.Generator, bytes], bytes]


def truncate(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file as an interrupted copy leaves it."""
    return content[: int(rng.integers(len(content)))]


def flip_bits(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file with up to 20 bits flipped anywhere."""
    return _flip(rng, content, len(content))


def flip_head(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file with up to 20 bits flipped at its start, where most headers are."""
    return _flip(rng, content, min(len(content), 320))


def _flip(rng: np.random.Generator, content: bytes, end: int) -> bytes:
    damaged = bytearray(content)
    for position in rng.integers(end, size=int(rng.integers(1, 21))):
        damaged[position] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut_out(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file without some bytes in its middle."""
    start = int(rng.integers(len(content)))
    return content[:start] + content[start + int(rng.integers(1, 400)) :]


def insert_noise(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file with random bytes in its middle."""
    start = int(rng.integers(len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 400))) + content[start:]


def blank(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file with a part of it zeroed, as a disk that lost a block leaves it."""
    start = int(rng.integers(len(content)))
    length = int(rng.integers(1, 1 + len(content) // 2))
    return (content[:start] + b"\0" * length + content[start + length :])[: len(content)]


def rewrite_tag(rng: np.random.Generator, content: bytes) -> bytes:
    """Return the file with one or two entries of its first directory changed to values of weight."""
    order = "<" if content[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", content, 2)[0] != 42:  # a BigTIFF
        return flip_head(rng, content)
    damaged = bytearray(content)
    (directory,) = struct.unpack_from(order + "I", content, 4)
    (count,) = struct.unpack_from(order + "H", content, directory)
    entries = [directory + 2 + 12 * number for number in range(count)]
    weighty = [e for e in entries if struct.unpack_from(order + "H", content, e)[0] in WEIGHTY_TAGS] or entries
    for entry in rng.choice(weighty, size=int(rng.integers(1, 3))):
        value = int(rng.choice(INTERESTING)) if rng.random() < 0.7 else int(rng.integers(2**32))
        place = rng.random()
        if place < 0.15:
            struct.pack_into(order + "H", damaged, entry + 2, value & 0xFF)  # the type
        elif place < 0.3:
            struct.pack_into(order + "I", damaged, entry + 4, value)  # how many values
        else:
            _write_value(order, damaged, entry, value)
    return bytes(damaged)


def _write_value(order: str, content: bytearray, entry: int, value: int) -> None:
    short = struct.unpack_from(order + "H", content, entry + 2)[0] == 3
    struct.pack_into(order + ("H" if short else "I"), content, entry + 8, value & (0xFFFF if short else 0xFFFFFFFF))


def foreign(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a file that is no TIFF at all, or nothing."""
    kinds = [
        b"",
        b"\0" * len(content),
        b"<html><body>404 Not Found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x89PNG\r\n\x1a\n" + rng.bytes(100),
        b"II*\0",
        b"MM\0*\0\0\0\x08",
        b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        rng.bytes(int(rng.integers(1, 2000))),
        content[::-1],
        zlib.compress(content),
    ]
    return kinds[int(rng.integers(len(kinds)))]


def several_channels(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a colour image, or five bands in one file."""
    stream = BytesIO()
    channels, planar = int(rng.choice([2, 3, 5])), bool(rng.random() < 0.5)
    shape = (channels, 20, 24) if planar else (20, 24, channels)
    pixels = rng.integers(0, 60000, shape).astype(str(rng.choice(["u2", "f4"])))
    options = {"planarconfig": "separate" if planar else "contig", "photometric": "minisblack"}
    tifffile.imwrite(stream, pixels, **options)
    return stream.getvalue()


def other_size(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a whole band of another size."""
    return encode(rng.integers(1, 60000, (int(rng.integers(1, 60)), 61)).astype(np.float32), "u2")


def other_type(rng: np.random.Generator, content: bytes) -> bytes:
    """Return a band of a type that no measurement has."""
    kind = rng.integers(3)
    stream = BytesIO()
    pixels = rng.integers(0, 2, (20, 24))
    tifffile.imwrite(stream, pixels.astype(["bool", "complex64", "complex128"][kind]))
    return stream.getvalue()


DAMAGES: dict[str, Damage] = {
    damage.__name__.replace("_", " "): damage
    for damage in (
        truncate,
        flip_bits,
        flip_head,
        cut_out,
        insert_noise,
        blank,
        rewrite_tag,
        foreign,
        several_channels,
        other_size,
        other_type,
    )
}


def damaged_raster(rng: np.random.Generator, raster: Raster) -> Raster:
    """Return a raster after one kind of damage; it may still be one that can be read."""
    name = str(rng.choice(list(DAMAGES)))
    return Raster(f"{name} of {raster.form}", DAMAGES[name](rng, raster.content), False)


# --- Bombs ----------------------------------------------------------------------------------------


def bomb(side: int, dtype: str = "u1") -> bytes:
    """Return a small whole file of `side` x `side` px that are all alike, in deflated strips of 64 MB."""
    rows = max(1, 2**26 // (side * np.dtype(dtype).itemsize))
    strips, left = [], side
    packed: dict[int, bytes] = {}
    while left > 0:
        count = min(rows, left)
        if count not in packed:
            packed[count] = zlib.compress(np.full((count, side), 7, dtype).tobytes(), 9)
        strips.append(packed[count])
        left -= count
    return _tiff_of(strips, side, side, rows, 8 * np.dtype(dtype).itemsize)


def overfull(side: int = 64, megabytes: int = 4000) -> bytes:
    """Return a small file of `side` x `side` px whose only strip unpacks to `megabytes`.

    Its blocks stand for themselves, so one is packed and repeated; the checksum after them is not right.
    """
    packer = zlib.compressobj(9)
    million = b"\x07" * 2**20
    first, block = (packer.compress(million) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    strip = first + block * (megabytes - 1) + packer.flush()
    return _tiff_of([strip], side, side, side, 8)


def declared(side: int) -> bytes:
    """Return a file of some hundred bytes that declares `side` x `side` px without compression."""
    return _tiff_of([b"\x07" * 64], side, side, side, 8, compression=1)


def _tiff_of(strips: list[bytes], width: int, height: int, rows: int, bits: int, compression: int = 8) -> bytes:
    """Return a TIFF of these strips, each of `rows` rows."""
    offsets, position = [], 8
    for strip in strips:
        offsets.append(position)
        position += len(strip)
    counts = [len(strip) for strip in strips]
    tables = struct.pack(f"<{2 * len(strips)}I", *offsets, *counts)
    where = (position, position + 4 * len(strips)) if len(strips) > 1 else (offsets[0], counts[0])
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression)]
    tags += [(262, 3, 1, 1), (273, 4, len(strips), where[0]), (277, 3, 1, 1), (278, 4, 1, rows)]
    tags += [(279, 4, len(strips), where[1])]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = position + len(tables)
    return b"".join([struct.pack("<2sHI", b"II", 42, start), *strips, tables, directory, b"\0" * 4])
