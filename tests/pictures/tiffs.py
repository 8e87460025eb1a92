"""TIFF files of every kind that Pillow reads: those that it writes itself, the others byte by byte."""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

TYPES = {"H": 3, "I": 4, "B": 1, "f": 11, "Q": 16}
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, ROWS, STRIP_BYTES, PLANAR = 273, 277, 278, 279, 284
PREDICTOR, COLOR_MAP, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES = 317, 320, 322, 323, 324, 325
EXTRA, FORMAT, JPEG_TABLES, JPEG_STREAM, COEFFICIENTS, SUBSAMPLING, RANGE = 338, 339, 347, 513, 529, 530, 532

Tags = dict[int, tuple[str, Sequence[float]]]


def draw(folder: Path, small: Image.Image, other: Image.Image) -> None:
    by_pillow(folder, small, other)
    greys(folder, small)
    colours(folder, small)
    alphas(folder, small)
    arrangements(folder, small)
    jpegs(folder, small)


def by_pillow(folder: Path, small: Image.Image, other: Image.Image) -> None:
    def save(name: str, picture: Image.Image, **options: object) -> None:
        picture.save(folder / f"tiff_{name}.tiff", **options)

    for mode, name in (("LAB", "lab"), ("LA", "grey_alpha"), ("F", "float"), ("I", "int"), ("YCbCr", "ycbcr")):
        source = small.convert("L") if mode in "LAFI" else small
        save(name, source.convert("RGBA").convert("LA") if mode == "LA" else source.convert(mode))
    save("palette", small.quantize(40))
    for compression in ("group3", "group4", "tiff_ccitt"):
        save(compression, small.convert("1"), compression=compression)
    for compression in ("zstd", "lzma", "jpeg"):
        save(compression, small, compression=compression)
    save("jpeg_ycbcr", small.convert("YCbCr"), compression="jpeg")
    save("jpeg_grey", small.convert("L"), compression="jpeg")
    save("jpeg_cmyk", small.convert("CMYK"), compression="jpeg")
    save("lzw_ycbcr", small.convert("YCbCr"), compression="tiff_lzw")
    save("lab_deflate", small.convert("LAB"), compression="tiff_deflate")
    save("bigtiff", small, big_tiff=True)
    save("pages", small, save_all=True, append_images=[other])
    save("strips", small, compression="tiff_lzw", strip_size=200)
    save("predictor", small, compression="tiff_lzw", tiffinfo={PREDICTOR: 2})


def greys(folder: Path, small: Image.Image) -> None:
    grey = np.asarray(small.convert("L"))
    height, width = grey.shape
    deep = np.random.default_rng(7).integers(-400, 700, grey.shape)
    kinds = [
        ("<i2", 2, "int16"),
        (">i2", 2, "int16_big"),
        (">u2", 1, "uint16_big"),
        ("<u4", 1, "uint32"),
        (">i4", 2, "int32_big"),
    ]
    for dtype, sample_format, name in kinds:
        values = deep.astype(dtype) if sample_format == 2 else np.abs(deep).astype(dtype)
        tags: Tags = {BITS: ("H", [values.itemsize * 8]), PHOTOMETRIC: ("H", [1]), FORMAT: ("H", [sample_format])}
        write(folder / f"tiff_{name}.tiff", (width, height), tags, [values.tobytes()], order=dtype[0])
    for order, photometric in (("<", 1), (">", 0)):
        reals = (deep * 0.77).astype(f"{order}f4")
        tags = {BITS: ("H", [32]), PHOTOMETRIC: ("H", [photometric]), FORMAT: ("H", [3])}
        write(folder / f"tiff_float_{photometric}.tiff", (width, height), tags, [reals.tobytes()], order=order)
        if order == ">":
            continue  # Pillow takes what libtiff has turned for unturned
        tags |= {COMPRESSION: ("H", [8]), PREDICTOR: ("H", [3])}
        data = zlib.compress(b"".join(float_differences(row) for row in reals))
        write(folder / f"tiff_float_predictor_{photometric}.tiff", (width, height), tags, [data], order=order)
    for dtype in ("<u2", ">u2"):
        values = np.abs(deep).astype(dtype)
        differences = np.diff(values, axis=1, prepend=0).astype(dtype)
        tags = {BITS: ("H", [16]), PHOTOMETRIC: ("H", [1]), COMPRESSION: ("H", [8]), PREDICTOR: ("H", [2])}
        write(
            folder / f"tiff_predictor16_{'big' if dtype[0] == '>' else 'little'}.tiff",
            (width, height),
            tags,
            [zlib.compress(differences.tobytes())],
            order=dtype[0],
        )
    for bits in (1, 2, 4, 8):
        for photometric in (0, 1, 3):
            for fill_order in (1, 2):
                if fill_order == 2 and ((photometric == 3 and bits < 8) or (photometric, bits) == (0, 8)):
                    continue  # Pillow has names for these, but no unpacker
                packed = pack(grey >> (8 - bits), bits)
                tags = {BITS: ("H", [bits]), PHOTOMETRIC: ("H", [photometric]), FILL_ORDER: ("H", [fill_order])}
                if photometric == 3:
                    tags[COLOR_MAP] = ("H", colour_map(1 << bits))
                data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in packed) if fill_order == 2 else packed
                write(folder / f"tiff_{bits}bit_{photometric}_{fill_order}.tiff", (width, height), tags, [data])
    twelve = pack(grey.astype(np.uint16) * 2, 12)
    write(folder / "tiff_12bit.tiff", (width, height), {BITS: ("H", [12]), PHOTOMETRIC: ("H", [1])}, [twelve])
    white_first = (np.abs(deep)).astype("<u2").tobytes()
    write(
        folder / "tiff_uint16_white.tiff", (width, height), {BITS: ("H", [16]), PHOTOMETRIC: ("H", [0])}, [white_first]
    )
    write(
        folder / "tiff_int8.tiff",
        (width, height),
        {BITS: ("H", [8]), PHOTOMETRIC: ("H", [1]), FORMAT: ("H", [2])},
        [grey.tobytes()],
    )


def colours(folder: Path, small: Image.Image) -> None:
    noise = np.random.default_rng(8)
    size = (small.width, small.height)
    for order in "<>":
        for n_samples, photometric, name in ((3, 2, "rgb"), (4, 5, "cmyk")):
            values = noise.integers(0, 65536, (small.height, small.width, n_samples)).astype(f"{order}u2")
            tags: Tags = {BITS: ("H", [16] * n_samples), PHOTOMETRIC: ("H", [photometric]), SAMPLES: ("H", [n_samples])}
            end = "big" if order == ">" else "little"
            write(folder / f"tiff_{name}16_{end}.tiff", size, tags, [values.tobytes()], order=order)
            tags[COMPRESSION] = ("H", [8])
            write(
                folder / f"tiff_{name}16_{end}_deflate.tiff", size, tags, [zlib.compress(values.tobytes())], order=order
            )
    ycbcr = np.asarray(small.convert("YCbCr"))
    for across, down in ((1, 1), (2, 1), (2, 2), (4, 1), (1, 2), (4, 4)):
        tags = {
            BITS: ("H", [8] * 3),
            PHOTOMETRIC: ("H", [6]),
            SAMPLES: ("H", [3]),
            COMPRESSION: ("H", [8]),
            SUBSAMPLING: ("H", [across, down]),
        }
        data = zlib.compress(blocks(ycbcr, across, down))
        write(folder / f"tiff_ycbcr_{across}{down}.tiff", size, tags, [data])
    tags |= {RANGE: ("f", [16, 235, 128, 240, 128, 240]), COEFFICIENTS: ("f", [0.2126, 0.7152, 0.0722])}
    write(folder / "tiff_ycbcr_range.tiff", size, tags, [data])


def alphas(folder: Path, small: Image.Image) -> None:
    noise = np.random.default_rng(9)
    size = (small.width, small.height)
    cases = [
        (2, 3, [0]),
        (2, 3, [1]),
        (2, 3, [2]),
        (2, 3, None),
        (2, 3, [999]),
        (2, 3, [0, 0]),
        (2, 3, [1, 0]),
        (2, 3, [2, 0, 0]),
        (1, 1, [0]),
        (1, 1, [2]),
        (3, 1, [0]),
        (3, 1, [2]),
        (5, 4, [0]),
        (5, 4, [0, 0]),
    ]
    for photometric, n_colours, extra in cases:
        n_samples = n_colours + (len(extra) if extra else 1)
        values = noise.integers(0, 256, (small.height, small.width, n_samples)).astype(np.uint8)
        values[:3, :, n_colours] = 0
        values[3:6, :, n_colours] = 255
        tags: Tags = {BITS: ("H", [8] * n_samples), PHOTOMETRIC: ("H", [photometric]), SAMPLES: ("H", [n_samples])}
        if extra:
            tags[EXTRA] = ("H", extra)
        if photometric == 3:
            tags[COLOR_MAP] = ("H", colour_map(256))
        name = "".join(map(str, extra)) if extra else "none"
        write(folder / f"tiff_extra_{photometric}_{name}.tiff", size, tags, [values.tobytes()])
        if photometric == 2 and extra in ([1], [2], [0]):
            deep = values.astype(">u2") * 256 + 3
            write(
                folder / f"tiff_extra16_{name}.tiff", size, tags | {BITS: ("H", [16] * 4)}, [deep.tobytes()], order=">"
            )
            planes = [zlib.compress(values[..., plane].tobytes()) for plane in range(n_samples)]
            tags |= {PLANAR: ("H", [2]), COMPRESSION: ("H", [8])}
            write(folder / f"tiff_extra_planes_{name}.tiff", size, tags, planes)


def arrangements(folder: Path, small: Image.Image) -> None:
    rgb = np.asarray(small)
    size = (small.width, small.height)
    tags: Tags = {BITS: ("H", [8] * 3), PHOTOMETRIC: ("H", [2]), SAMPLES: ("H", [3])}
    codecs: list[tuple[str, int, Callable[[bytes], bytes]]] = [
        ("raw", 1, bytes),
        ("deflate", 8, zlib.compress),
        ("lzma", 34925, lambda data: lzma.compress(data, format=lzma.FORMAT_XZ)),
    ]
    for name, compression, squeeze in codecs:
        for order, big in (("<", True), (">", False)):  # Pillow knows BigTIFF in one order
            end = "big" if order == ">" else "little"
            packed = tags | {COMPRESSION: ("H", [compression])}
            tiles = [squeeze(tile.tobytes()) for tile in cut(rgb, 16)]
            write(
                folder / f"tiff_tiles_{name}_{end}.tiff",
                size,
                packed | {TILE_WIDTH: ("I", [16]), TILE_LENGTH: ("I", [16])},
                tiles,
                order=order,
                big=big,
            )
            planes = [
                squeeze(np.ascontiguousarray(rgb[top : top + 5, :, plane]).tobytes())
                for plane in range(3)
                for top in range(0, small.height, 5)
            ]
            write(
                folder / f"tiff_planes_{name}_{end}.tiff",
                size,
                packed | {PLANAR: ("H", [2]), ROWS: ("I", [5])},
                planes,
                order=order,
                big=big,
            )
    strips = [rgb[top : top + 7].tobytes() for top in range(0, small.height, 7)]
    write(folder / "tiff_strips_raw.tiff", size, tags | {ROWS: ("H", [7])}, strips)
    for turn in (5, 6, 7, 8):
        write(folder / f"tiff_turned_{turn}.tiff", size, tags | {274: ("H", [turn])}, [rgb.tobytes()])
    bits = small.convert("1")
    with io.BytesIO() as file:
        bits.save(file, "TIFF", compression="group3", tiffinfo={292: 5})
        (folder / "tiff_group3_2d.tiff").write_bytes(file.getvalue())
    for compression in ("group3", "group4"):
        bits.save(folder / f"tiff_{compression}_reversed.tiff", compression=compression, tiffinfo={FILL_ORDER: 2})


def jpegs(folder: Path, small: Image.Image) -> None:
    """Tiles and strips with tables of their own, and a whole file inside, as before the revision of 1995."""
    size = (small.width, small.height)
    tags: Tags = {
        BITS: ("H", [8] * 3),
        PHOTOMETRIC: ("H", [6]),
        SAMPLES: ("H", [3]),
        COMPRESSION: ("H", [7]),
        SUBSAMPLING: ("H", [2, 2]),
    }
    tiles = [jpeg(Image.fromarray(tile), subsampling=2) for tile in cut(np.asarray(small), 16)]
    write(folder / "tiff_jpeg_tiles.tiff", size, tags | {TILE_WIDTH: ("I", [16]), TILE_LENGTH: ("I", [16])}, tiles)
    for subsampling, (across, down) in ((0, (1, 1)), (1, (2, 1)), (2, (2, 2))):
        stream = jpeg(small, subsampling=subsampling)
        old = tags | {
            COMPRESSION: ("H", [6]),
            SUBSAMPLING: ("H", [across, down]),
            JPEG_STREAM: ("I", [8]),
            514: ("I", [len(stream)]),
        }
        write(folder / f"tiff_old_jpeg_{across}{down}.tiff", size, old, [stream])


def jpeg(picture: Image.Image, subsampling: int) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, "JPEG", quality=85, subsampling=subsampling)
        return file.getvalue()


def cut(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)), mode="edge")
    return [
        np.ascontiguousarray(padded[y : y + side, x : x + side])
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]


def blocks(ycbcr: np.ndarray, across: int, down: int) -> bytes:
    height, width = ycbcr.shape[:2]
    padded = np.pad(ycbcr, ((0, -height % down), (0, -width % across), (0, 0)), mode="edge")
    out = bytearray()
    for y in range(0, height, down):
        for x in range(0, width, across):
            block = padded[y : y + down, x : x + across]
            out += block[..., 0].tobytes() + bytes([int(block[..., 1].mean()), int(block[..., 2].mean())])
    return bytes(out)


def pack(values: np.ndarray, bits: int) -> bytes:
    digits = (values[..., None].astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(digits.reshape(values.shape[0], -1).astype(np.uint8), axis=1).tobytes()


def colour_map(n_colours: int) -> list[int]:
    return [int(value) for value in np.random.default_rng(n_colours).integers(0, 65536, 3 * n_colours)]


def float_differences(row: np.ndarray) -> bytes:
    """TIFF technical note 3: most significant bytes first, each as its difference from the byte to the left."""
    planes = np.frombuffer(row.astype(">f4").tobytes(), np.uint8).reshape(-1, 4).T.ravel()
    return np.diff(planes, prepend=np.uint8(0)).astype(np.uint8).tobytes()


def write(
    path: Path, size: tuple[int, int], tags: Tags, chunks: list[bytes], order: str = "<", big: bool = False
) -> None:
    """A file with its chunks first, then what does not fit into the directory, then the directory."""
    head = 16 if big else 8
    places = [head + sum(map(len, chunks[:index])) for index in range(len(chunks))]
    is_tiled = TILE_WIDTH in tags
    all_tags: Tags = {WIDTH: ("I", [size[0]]), HEIGHT: ("I", [size[1]])} | tags
    all_tags[TILE_OFFSETS if is_tiled else STRIP_OFFSETS] = ("I", places)
    all_tags[TILE_BYTES if is_tiled else STRIP_BYTES] = ("I", [len(chunk) for chunk in chunks])
    body = b"".join(chunks)
    count, offset, room = ("Q", "Q", 8) if big else ("H", "I", 4)
    table = struct.pack(order + count, len(all_tags))
    for tag, (kind, values) in sorted(all_tags.items()):
        data = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(data) > room:
            body += b"\0" * (len(body) % 2)
            place, body = struct.pack(order + offset, head + len(body)), body + data
        else:
            place = data.ljust(room, b"\0")
        table += struct.pack(order + "HH" + offset, tag, TYPES[kind], len(values)) + place
    mark = b"II" if order == "<" else b"MM"
    first = struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), head + len(body))
    path.write_bytes(mark + first + body + table + struct.pack(order + offset, 0))
