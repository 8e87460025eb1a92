"""Draws the pictures of this folder and what Pillow makes of them. `python tests/pictures/make.py` rewrites all files.

For each `NAME.EXT` there are `NAME.rgb.png`, what `ImageOps.exif_transpose(Image.open(…)).convert("RGB")` gives, and
`NAME.SIDE.png`, that picture after a bicubic resize to SIDE × SIDE. Where something is transparent there is also
`NAME.white.png`, what the image processors of `transformers` lay over white, and for the shapes of `square.json`
`NAME.square.KEY.png`, what they make of the picture before its values are rescaled.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil
from transformers.image_transforms import convert_to_rgb

HERE = Path(__file__).parent
SIDES = {"photo": 224, "wide": 97, "tiny": 224, "exif_6": 31}
ORIENTATION = 0x0112
# What a bundle says of resizing, and the settings of the processor that does the same.
SQUARES: dict[str, tuple[dict, dict]] = {
    "shortest": (
        {"size": 24, "resize": {"shortest_edge": 24}, "center_crop": True},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True},
    ),
    "odd": (
        {"size": 21, "resize": {"shortest_edge": 32}, "center_crop": True},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 21, "width": 21}, "do_center_crop": True},
    ),
    "padded": (
        {"size": 40, "resize": {"shortest_edge": 17}, "center_crop": True},
        {"size": {"shortest_edge": 17}, "crop_size": {"height": 40, "width": 40}, "do_center_crop": True},
    ),
    "exact": (
        {"size": 24, "resize": {"exact": {"width": 31, "height": 17}}, "center_crop": True},
        {"size": {"width": 31, "height": 17}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True},
    ),
    "keep": (
        {"size": 26, "resize": "keep", "center_crop": True},
        {"do_resize": False, "crop_size": {"height": 26, "width": 26}, "do_center_crop": True},
    ),
    "square": ({"size": 24, "resize": "square"}, {"size": {"height": 24, "width": 24}}),
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SQUARED = ["exif_5", "exif_6", "wide", "tiny", "tall", "line", "png_palette_alphas", "dots"]


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours, hard edges and fine noise, as a camera gives them."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / rng.uniform(9, 40) + y / rng.uniform(9, 60) + k) for k in range(3)]
    picture = Image.fromarray(np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        at = [rng.uniform(0, width), rng.uniform(0, height)]
        size = rng.uniform(0.05, 0.3) * min(width, height)
        pen.ellipse([at[0], at[1], at[0] + size, at[1] + size], fill=tuple(rng.randrange(256) for _ in range(3)))
    grain = noise.normal(0, 6, (height, width, 3))
    picture = picture.filter(ImageFilter.GaussianBlur(0.7))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def with_alpha(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def sixteen_bit(picture: Image.Image) -> Image.Image:
    grey = np.asarray(picture.convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 257 + 100)


def oriented(k: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = k
    return exif


def main() -> None:
    for old in [p for p in HERE.iterdir() if p.suffix != ".py"]:
        old.unlink()
    small, other = photo(45, 37, 1), photo(45, 37, 2)
    photo(320, 240, 3).save(HERE / "photo.jpg", quality=90)
    photo(301, 50, 4).save(HERE / "wide.png")
    photo(3, 2, 5).save(HERE / "tiny.png")
    small.save(HERE / "jpeg_444.jpg", quality=95, subsampling=0)
    small.save(HERE / "jpeg_422.jpg", quality=85, subsampling=1)
    small.save(HERE / "jpeg_420.jpg", quality=75, subsampling=2)
    small.save(HERE / "jpeg_progressive.jpg", quality=85, progressive=True)
    small.convert("L").save(HERE / "jpeg_grey.jpg", quality=90)
    small.convert("CMYK").save(HERE / "jpeg_cmyk.jpg", quality=95)
    for k in range(1, 9):
        small.save(HERE / f"exif_{k}.jpg", quality=95, subsampling=0, exif=oriented(k))
    small.save(HERE / "png_exif.png", exif=oriented(6))
    small.save(HERE / "webp_exif.webp", lossless=True, exif=oriented(8))
    small.save(HERE / "tiff_exif.tiff", exif=oriented(3))
    small.save(HERE / "png_rgb.png")
    with_alpha(small).save(HERE / "png_rgba.png")
    small.convert("L").save(HERE / "png_grey.png")
    with_alpha(small).convert("LA").save(HERE / "png_grey_alpha.png")
    small.convert("1").save(HERE / "png_1bit.png")
    small.quantize(13).save(HERE / "png_palette.png")
    small.quantize(13).save(HERE / "png_palette_transparent.png", transparency=4)
    small.quantize(200).save(HERE / "png_palette_alphas.png", transparency=bytes(range(0, 200)))
    sixteen_bit(small).save(HERE / "png_grey16.png")
    small.convert("L").save(HERE / "png_grey_transparent.png", transparency=7)
    small.quantize(60).save(HERE / "gif_plain.gif")
    frames = [p.quantize(30) for p in (small, other)]
    frames[0].save(HERE / "gif_animated.gif", save_all=True, append_images=frames[1:], transparency=3)
    small.save(HERE / "webp_lossless.webp", lossless=True)
    small.save(HERE / "webp_lossy.webp", quality=80)
    with_alpha(small).save(HERE / "webp_alpha.webp", lossless=True, exact=True)
    small.save(HERE / "webp_animated.webp", lossless=True, save_all=True, append_images=[other])
    small.save(HERE / "bmp_rgb.bmp")
    small.quantize(40).save(HERE / "bmp_palette.bmp")
    small.convert("1").save(HERE / "bmp_1bit.bmp")
    small.convert("L").save(HERE / "bmp_grey.bmp")
    with_alpha(small).save(HERE / "bmp_rgba.bmp")
    small.save(HERE / "tiff_raw.tiff")
    small.save(HERE / "tiff_lzw.tiff", compression="tiff_lzw")
    small.save(HERE / "tiff_deflate.tiff", compression="tiff_deflate")
    small.save(HERE / "tiff_packbits.tiff", compression="packbits")
    small.convert("L").save(HERE / "tiff_grey.tiff")
    small.convert("1").save(HERE / "tiff_1bit.tiff")
    small.convert("CMYK").save(HERE / "tiff_cmyk.tiff")
    with_alpha(small).save(HERE / "tiff_rgba.tiff")
    sixteen_bit(small).save(HERE / "tiff_grey16.tiff")
    small.save(HERE / "pnm_rgb.ppm")
    small.convert("L").save(HERE / "pnm_grey.pgm")
    small.convert("1").save(HERE / "pnm_1bit.pbm")
    sixteen_bit(small).save(HERE / "pnm_grey16.pgm")
    plain_pnm(small)
    (HERE / "pnm_dark.pgm").write_bytes(b"P5 4 1 100\n" + bytes([0, 33, 99, 100]))
    for name, channels, colour in (("rgb", 3, 2), ("rgba", 4, 6), ("grey_alpha", 2, 4)):
        sixteen_bit_png(HERE / f"png_{name}16.png", channels, colour)
    transparent(small)
    for path in sorted(HERE.iterdir()):
        if path.suffix != ".py":
            expected(path)
    (HERE / "square.json").write_text(json.dumps({key: facts for key, (facts, _) in SQUARES.items()}, indent=1) + "\n")


def plain_pnm(picture: Image.Image) -> None:
    """The ASCII form, which Pillow reads but does not write."""
    values = " ".join(map(str, np.asarray(picture).ravel()))
    (HERE / "pnm_ascii.ppm").write_text(f"P3\n# a comment\n{picture.width} {picture.height}\n255\n{values}\n")


def sixteen_bit_png(path: Path, channels: int, colour: int, key: bytes | None = None) -> None:
    """16 bits a channel, which Pillow reads but does not write."""
    values = np.random.default_rng(channels).integers(0, 65536, (5, 7, channels)).astype(">u2")
    values[1:3, 2:5] = 3, *[77] * (channels - 1)
    png(path, (7, 5), 16, colour, [row.tobytes() for row in values], key)


def png(path: Path, size: tuple[int, int], depth: int, colour: int, rows: list[bytes], *more: bytes | None) -> None:
    """With a `tRNS` and a `PLTE`."""
    key, palette = [*more, None, None][:2]
    path.write_bytes(
        PNG_SIGNATURE
        + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
        + (chunk(b"PLTE", palette) if palette else b"")
        + (chunk(b"tRNS", key) if key else b"")
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def transparent(picture: Image.Image) -> None:
    """Every way in which a picture is partly transparent, that the pictures above do not have."""
    picture = picture.resize((23, 19))
    picture.paste((200, 3, 77), (4, 5, 13, 11))
    picture.save(HERE / "png_colour_key.png", transparency=(200, 3, 77))
    picture.save(HERE / "png_exif_colour_key.png", transparency=(200, 3, 77), exif=oriented(5))
    sixteen_bit_png(HERE / "png_colour_key16.png", 3, 2, struct.pack(">3H", 3, 77, 77))
    sixteen_bit_png(HERE / "png_colour_key16_low.png", 3, 2, struct.pack(">3H", 0, 0, 0))
    sixteen_bit_png(HERE / "png_grey_key16.png", 1, 0, struct.pack(">H", 3))
    rows = [bytes(range(start, start + 32, 4)) for start in range(0, 220, 40)]
    for depth in (1, 2, 4):
        for key in (0, 1):
            path = HERE / f"png_grey_key_{depth}bit_{key}.png"
            png(path, (64 // depth, len(rows)), depth, 0, rows, struct.pack(">H", key * 85 if depth == 2 else key))
    palette = np.random.default_rng(5).integers(0, 256, 48).astype(np.uint8).tobytes()
    for depth in (1, 2, 4):
        png(HERE / f"png_palette_{depth}bit.png", (64 // depth, len(rows)), depth, 3, rows, b"\x40\xff\x90", palette[:3 << depth])
    png(HERE / "png_palette_short.png", (8, len(rows)), 8, 3, rows, b"\xff\0", palette)
    for name, options in (("lossy", {"quality": 70}), ("lossless", {"lossless": True}), ("exact", {"lossless": True, "exact": True})):
        with_alpha(picture).save(HERE / f"webp_alpha_{name}.webp", **options)
    frames = [with_alpha(picture), with_alpha(picture.rotate(180))]
    frames[0].save(HERE / "webp_animated_alpha.webp", save_all=True, append_images=frames[1:], lossless=True)
    dots = Image.fromarray((np.indices((28, 33)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGBA")
    dots.putalpha(Image.radial_gradient("L").resize(dots.size))
    dots.save(HERE / "dots.png")
    photo(19, 150, 6).save(HERE / "tall.png")
    photo(300, 1, 7).save(HERE / "line.png")


def expected(path: Path) -> None:
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
    rgb = upright.convert("RGB")
    save(rgb, path.with_suffix(".rgb.png"))
    if upright.has_transparency_data:
        save(Image.fromarray(convert_to_rgb(upright, return_numpy=True)), path.with_suffix(".white.png"))
    side = SIDES.get(path.stem)
    if side:
        save(rgb.resize((side, side), Image.Resampling.BICUBIC), path.with_suffix(f".{side}.png"))
    if path.stem in SQUARED:
        for key, (_, settings) in SQUARES.items():
            kind = CLIPImageProcessorPil if "do_center_crop" in settings else BlipImageProcessorPil
            values = kind(do_rescale=False, do_normalize=False, **settings)(upright)["pixel_values"][0]
            save(Image.fromarray(np.moveaxis(values, 0, -1)), path.with_suffix(f".square.{key}.png"))


def save(picture: Image.Image, path: Path) -> None:
    """Colours alone: what is left of a transparent one would be read again."""
    picture.info.clear()
    picture.save(path, optimize=True)


if __name__ == "__main__":
    main()
