"""Files that Pillow reads but does not write, byte by byte; `make.py` writes them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
ORIENTATION = 0x0112


def noise(seed: int, shape: tuple[int, ...], below: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape)


def noise_bytes(seed: int, n_bytes: int, below: int = 256) -> bytes:
    return noise(seed, (n_bytes,), below).astype(np.uint8).tobytes()


# PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: tuple[int, int], depth: int, colour: int, rows: list[bytes], *more: bytes | None, interlaced: int = 0
) -> bytes:
    """With a `tRNS` and a `PLTE`."""
    key, palette = [*more, None, None][:2]
    return (
        PNG_SIGNATURE
        + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced))
        + (chunk(b"PLTE", palette) if palette else b"")
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def adam7(values: np.ndarray, depth: int, colour: int, palette: bytes | None = None) -> bytes:
    """`[height, width, channels]`, in the seven passes of an interlaced file."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [
        packed(values[y, x::step].ravel(), depth)
        for x, first, step, down in passes
        for y in range(first, values.shape[0], down)
        if x < values.shape[1]
    ]
    return png((values.shape[1], values.shape[0]), depth, colour, rows, None, palette, interlaced=1)


def packed(values: np.ndarray, depth: int) -> bytes:
    if depth >= 8:
        return values.astype(">u2" if depth == 16 else np.uint8).tobytes()
    bits = (values[:, None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.ravel().astype(np.uint8)).tobytes()


def png_with(file: bytes, *chunks: tuple[bytes, bytes], behind: bool = False) -> bytes:
    """Before or behind the pixels."""
    at = len(file) - 12 if behind else 33
    return file[:at] + b"".join(chunk(*each) for each in chunks) + file[at:]


# Orientation


def exif(order: str, kind: str, value: float, n_values: int = 1) -> bytes:
    """A directory with one entry: `order` is `<` or `>`, `kind` names a type of TIFF."""
    number, code = {
        "byte": (1, "B"),
        "short": (3, "H"),
        "long": (4, "L"),
        "rational": (5, "LL"),
        "signed_byte": (6, "b"),
        "signed_short": (8, "h"),
        "signed_long": (9, "l"),
        "float": (11, "f"),
        "double": (12, "d"),
    }[kind]
    data = struct.pack(order + code, *([value, 1] if len(code) == 2 else [value])) * n_values
    head = struct.pack(order + "2sHLHHHL", b"II" if order == "<" else b"MM", 42, 8, 1, ORIENTATION, number, n_values)
    if len(data) <= 4:
        return head + data.ljust(4, b"\0") + bytes(4)
    return head + struct.pack(order + "L", 26) + bytes(4) + data


def xmp(orientation: int, element: bool = False) -> bytes:
    said = (
        f"><tiff:Orientation>{orientation}</tiff:Orientation></a>"
        if element
        else f' tiff:Orientation="{orientation}"/>'
    )
    return f"<a{said}".encode()


def jpeg_with(file: bytes, *segments: bytes) -> bytes:
    written = b"".join(b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
    return file[:2] + written + file[2:]


def webp_with(file: bytes, size: tuple[int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    flags = sum({b"EXIF": 8, b"XMP ": 4}[kind] for kind, _ in chunks)
    more = [riff(kind, data) for kind, data in chunks]
    return riff(b"RIFF", b"WEBP" + extended(flags, size) + file[12:] + b"".join(more))


def raw_profile(data: bytes) -> bytes:
    """EXIF in a text, as ImageMagick once stored it."""
    return b"\nexif\n%8d\n" % len(data) + data.hex().encode() + b"\n"


# WebP


def riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def extended(flags: int, size: tuple[int, int]) -> bytes:
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    return riff(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def webp_beside(frame: bytes, size: tuple[int, int], canvas: tuple[int, int], flags: int = 0x12) -> bytes:
    """An animation whose first frame is smaller than its canvas and blends with nothing."""
    at = [2, 1, size[0] - 1, size[1] - 1, 100]
    still = frame[12:] if frame[12:16] != b"VP8X" else frame[30:]
    animated = b"".join(number.to_bytes(3, "little") for number in at) + b"\0" + still
    body = extended(flags, canvas) + riff(b"ANIM", bytes([10, 20, 30, 255, 0, 0])) + riff(b"ANMF", animated)
    return riff(b"RIFF", b"WEBP" + body)


# GIF


def gif(screen: tuple[int, int], box: tuple[int, int, int, int], palette: bytes | None, **more: object) -> bytes:
    """One frame of eight colours at left, top, width, height; `transparent`, `local`, `interlaced`, `background`, `trailer`."""
    local, key = more.get("local"), more.get("transparent")
    file = (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x82 if palette else 0, more.get("background", 0), 0)
        + (palette or b"")
    )
    if key is not None:
        file += b"\x21\xf9\x04" + bytes([2 << 2 | 1, 0, 0, key]) + b"\0"
    flags = (0x82 if local else 0) | (0x40 if more.get("interlaced") else 0)
    file += b"," + struct.pack("<HHHHB", *box, flags) + (local or b"")
    return file + uncompressed_lzw(noise(7, (box[2] * box[3],), 8)) + more.get("trailer", b";")


def uncompressed_lzw(indices: np.ndarray) -> bytes:
    """Codes of four bits; the table is cleared before they would grow."""
    codes = [8]
    for place, index in enumerate(indices):
        codes += [int(index)] + ([8] if place % 6 == 5 else [])
    codes += [9] + [0] * (len(codes) % 2 == 0)
    data = bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))
    return (
        b"\x03"
        + b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255))
        + b"\0"
    )


# BMP


def bmp(bits: int, data: bytes, palette: bytes = b"", compression: int = 0, **more: object) -> bytes:
    """7 × 5; `masks`, `header_size`, `top_down`."""
    header_size, masks = more.get("header_size", 40), more.get("masks", b"")
    height = -5 if more.get("top_down") else 5
    header = struct.pack(
        "<IiiHHIIiiII", header_size, 7, height, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0
    )
    if header_size == 12:
        header = struct.pack("<IHHHH", 12, 7, height, 1, bits)
    header = (header + masks).ljust(header_size, b"\0")
    offset = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def bmp_rows(bits: int) -> bytes:
    return noise_bytes(bits, (7 * bits + 31) // 32 * 4 * 5)


def bmp_palette(n_colours: int, entry_size: int = 4) -> bytes:
    colours = noise(3, (n_colours, 3)).astype(np.uint8)
    return b"".join(bytes(colour) + bytes(entry_size - 3) for colour in colours)


def bmp_files() -> Iterator[tuple[str, bytes]]:
    def masks(*each: int) -> bytes:
        return struct.pack("<4I", *each)

    yield "rgb555", bmp(16, bmp_rows(16))
    yield "rgb565", bmp(16, bmp_rows(16), compression=3, masks=masks(0xF800, 0x7E0, 0x1F, 0), header_size=108)
    yield "rgb565_v1", bmp(16, bmp_rows(16), compression=3, masks=masks(0xF800, 0x7E0, 0x1F, 0)[:12])
    yield "top_down", bmp(24, bmp_rows(24), top_down=True)
    yield "os2", bmp(4, bmp_rows(4), bmp_palette(16, 3), header_size=12)
    yield "os2_v2", bmp(8, bmp_rows(8), bmp_palette(200), header_size=64)
    yield "bgra", bmp(32, bmp_rows(32), compression=3, masks=masks(0xFF0000, 0xFF00, 0xFF, 0xFF000000), header_size=124)
    yield "abgr", bmp(32, bmp_rows(32), compression=3, masks=masks(0xFF000000, 0xFF0000, 0xFF00, 0xFF), header_size=56)
    yield "bgar", bmp(32, bmp_rows(32), compression=3, masks=masks(0xFF000000, 0xFF00, 0xFF, 0xFF0000), header_size=108)
    yield "xbgr", bmp(32, bmp_rows(32), compression=3, masks=masks(0xFF000000, 0xFF0000, 0xFF00, 0), header_size=52)
    yield "rgbx", bmp(32, bmp_rows(32))
    runs = b"\3\1\4\2\0\0\7\5\0\0\0\3abc\0\4\6\0\0\2\5\0\2\3\1\2\7\0\1"
    yield "runs8", bmp(8, runs, bmp_palette(256), compression=1)
    yield (
        "runs4",
        bmp(
            4,
            b"\7\x12\0\0\3\x45\4\x67\0\0\0\7\x12\x34\x56\x70\0\0\7\x33\0\0\3\x22\4\x11\0\1",
            bmp_palette(16),
            compression=2,
        ),
    )
    greys = b"".join(bytes([value, value, value, 0]) for value in range(100))
    yield "few_greys", bmp(8, bmp_rows(8), greys)
    yield "last_row_unpadded", bmp(24, bmp_rows(24)[:-3])


# PNM


def pnm_files() -> Iterator[tuple[str, bytes]]:
    for most in (1, 100, 255, 257, 1000, 65535):
        big = noise(most, (72,), most + 1)
        yield f"colours_{most}.ppm", b"P6 6 4 %d\n" % most + big.astype(">u2" if most > 255 else np.uint8).tobytes()
        yield f"greys_{most}.pgm", b"P5 6 4 %d\n" % most + big[:24].astype(">u2" if most > 255 else np.uint8).tobytes()
        yield f"letters_{most}.ppm", b"P3 6 4 %d\n" % most + b" ".join(b"%d" % value for value in big)
    yield "letters_comment.pbm", b"P1 # bits\n6 2 # and\n0 1 0 # more\n1 1 0\n101010"
    floats = np.random.default_rng(1).uniform(-9, 300, 24)
    yield "floats.pfm", b"Pf\n6 4\n-1.0\n" + floats.astype("<f4").tobytes()
    yield "floats_big_endian.pfm", b"Pf\n6 4\n1.0\n" + floats.astype(">f4").tobytes()
