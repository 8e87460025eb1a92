"""Draws the pictures of this folder and what Pillow makes of them. `python tests/pictures/make.py` rewrites all files.

For each `NAME.EXT` there are `NAME.rgb.png`, what `ImageOps.exif_transpose(Image.open(…)).convert("RGB")` gives, and
`NAME.SIDE.png`, that picture after a bicubic resize to SIDE × SIDE.
"""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import tiffs
from PIL import Image, ImageDraw, ImageFilter, ImageOps

HERE = Path(__file__).parent
SIDES = {"photo": 224, "wide": 97, "tiny": 224, "exif_6": 31}
ORIENTATION = 0x0112


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
    tiffs.draw(HERE, small, other)
    small.save(HERE / "pnm_rgb.ppm")
    small.convert("L").save(HERE / "pnm_grey.pgm")
    small.convert("1").save(HERE / "pnm_1bit.pbm")
    sixteen_bit(small).save(HERE / "pnm_grey16.pgm")
    plain_pnm(small)
    (HERE / "pnm_dark.pgm").write_bytes(b"P5 4 1 100\n" + bytes([0, 33, 99, 100]))
    for name, channels, colour in (("rgb", 3, 2), ("rgba", 4, 6), ("grey_alpha", 2, 4)):
        sixteen_bit_png(HERE / f"png_{name}16.png", channels, colour)
    for path in sorted(HERE.iterdir()):
        if path.suffix != ".py":
            expected(path)


def plain_pnm(picture: Image.Image) -> None:
    """The ASCII form, which Pillow reads but does not write."""
    values = " ".join(map(str, np.asarray(picture).ravel()))
    (HERE / "pnm_ascii.ppm").write_text(f"P3\n# a comment\n{picture.width} {picture.height}\n255\n{values}\n")


def sixteen_bit_png(path: Path, channels: int, colour: int) -> None:
    """16 bits a channel, which Pillow reads but does not write."""
    values = np.random.default_rng(channels).integers(0, 65536, (5, 7, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def expected(path: Path) -> None:
    with Image.open(path) as opened:
        rgb = ImageOps.exif_transpose(opened).convert("RGB")
    rgb.save(path.with_suffix(".rgb.png"), optimize=True)
    side = SIDES.get(path.stem)
    if side:
        rgb.resize((side, side), Image.Resampling.BICUBIC).save(path.with_suffix(f".{side}.png"), optimize=True)


if __name__ == "__main__":
    main()
