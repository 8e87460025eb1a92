"""Draws the pictures of this folder and what Pillow makes of them. `python tests/pictures/make.py` rewrites all files.

For each `NAME.EXT` there are `NAME.rgb.png`, what `ImageOps.exif_transpose(Image.open(…)).convert("RGB")` gives, and
`NAME.SIDE.png`, that picture after a bicubic resize to SIDE × SIDE. Where something is transparent there is also
`NAME.white.png`, what the image processors of `transformers` lay over white, and for the shapes of `square.json`
`NAME.square.KEY.png`, what they make of the picture before its values are rescaled.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tiffs
from by_hand import (
    EXIF,
    XMP,
    adam7,
    bmp_files,
    chunk,
    exif,
    gif,
    jpeg_with,
    noise,
    noise_bytes,
    png,
    png_with,
    pnm_files,
    raw_profile,
    webp_beside,
    webp_with,
    xmp,
)
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
    for old in [p for p in HERE.iterdir() if p.is_file() and p.suffix != ".py"]:
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
    tiffs.draw(HERE, photo(21, 18, 1), photo(21, 18, 2))
    small.save(HERE / "pnm_rgb.ppm")
    small.convert("L").save(HERE / "pnm_grey.pgm")
    small.convert("1").save(HERE / "pnm_1bit.pbm")
    sixteen_bit(small).save(HERE / "pnm_grey16.pgm")
    plain_pnm(small)
    (HERE / "pnm_dark.pgm").write_bytes(b"P5 4 1 100\n" + bytes([0, 33, 99, 100]))
    for name, channels, colour in (("rgb", 3, 2), ("rgba", 4, 6), ("grey_alpha", 2, 4)):
        sixteen_bit_png(HERE / f"png_{name}16.png", channels, colour)
    transparent(small)
    tiny = photo(23, 14, 3)
    for files in (turned(tiny), unusual_jpegs(tiny), frames_on_canvases(), damaged(tiny)):
        for name, file in files:
            (HERE / name).write_bytes(file)
    for name, file in bmp_files():
        (HERE / f"bmp_{name}.bmp").write_bytes(file)
    for name, file in pnm_files():
        (HERE / f"pnm_{name}").write_bytes(file)
    for depth, colour, channels in ((1, 0, 1), (4, 3, 1), (8, 2, 3), (16, 0, 1), (16, 6, 4)):
        file = adam7(
            noise(depth, (9, 11, channels), 1 << depth), depth, colour, noise_bytes(3, 48) if colour == 3 else None
        )
        (HERE / f"png_interlaced_{colour}_{depth}bit.png").write_bytes(file)
    drawn = sorted(path for path in HERE.iterdir() if path.is_file() and path.suffix != ".py")
    assert len({path.stem for path in drawn}) == len(drawn), "expectations need names of their own"
    for path in drawn:
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
    path.write_bytes(png((7, 5), 16, colour, [row.tobytes() for row in values], key))


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
            value = struct.pack(">H", key * 85 if depth == 2 else key)
            (HERE / f"png_grey_key_{depth}bit_{key}.png").write_bytes(
                png((64 // depth, len(rows)), depth, 0, rows, value)
            )
    palette = np.random.default_rng(5).integers(0, 256, 48).astype(np.uint8).tobytes()
    for depth in (1, 2, 4):
        file = png((64 // depth, len(rows)), depth, 3, rows, b"\x40\xff\x90", palette[: 3 << depth])
        (HERE / f"png_palette_{depth}bit.png").write_bytes(file)
    (HERE / "png_palette_short.png").write_bytes(png((8, len(rows)), 8, 3, rows, b"\xff\0", palette))
    for name, options in (
        ("lossy", {"quality": 70}),
        ("lossless", {"lossless": True}),
        ("exact", {"lossless": True, "exact": True}),
    ):
        with_alpha(picture).save(HERE / f"webp_alpha_{name}.webp", **options)
    frames = [with_alpha(picture), with_alpha(picture.rotate(180))]
    frames[0].save(HERE / "webp_animated_alpha.webp", save_all=True, append_images=frames[1:], lossless=True)
    dots = Image.fromarray((np.indices((28, 33)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGBA")
    dots.putalpha(Image.radial_gradient("L").resize(dots.size))
    dots.save(HERE / "dots.png")
    photo(19, 150, 6).save(HERE / "tall.png")
    photo(300, 1, 7).save(HERE / "line.png")


def turned(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Orientation wherever Pillow finds it, and where it finds none."""
    jpeg, plain, webp = encoded(picture, "JPEG"), encoded(picture, "PNG"), encoded(picture, "WEBP", lossless=True)
    for order, name in (("<", "little"), (">", "big")):
        for kind in (
            "byte",
            "short",
            "long",
            "signed_byte",
            "signed_short",
            "signed_long",
            "rational",
            "float",
            "double",
        ):
            yield f"turned_{kind}_{name}.jpg", jpeg_with(jpeg, EXIF + exif(order, kind, 6))
    six, three = EXIF + exif("<", "short", 6), EXIF + exif(">", "short", 3)
    yield "turned_several.jpg", jpeg_with(jpeg, EXIF + exif("<", "short", 8, n_values=3))
    yield "turned_0.jpg", jpeg_with(jpeg, EXIF + exif("<", "short", 0))
    yield "turned_9.jpg", jpeg_with(jpeg, EXIF + exif("<", "short", 9))
    yield "turned_by_the_first.jpg", jpeg_with(jpeg, six, three)
    yield "turned_twice_marked.jpg", jpeg_with(jpeg, EXIF + six)
    yield "turned_xmp.jpg", jpeg_with(jpeg, XMP + xmp(5))
    yield "turned_xmp_element.jpg", jpeg_with(jpeg, XMP + xmp(7, element=True))
    yield "turned_exif_before_xmp.jpg", jpeg_with(jpeg, XMP + xmp(6), EXIF + exif("<", "short", 1))
    yield "turned_behind.png", png_with(plain, (b"eXIf", exif("<", "long", 6)), behind=True)
    yield (
        "turned_profile.png",
        png_with(plain, (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile(six)))),
    )
    yield "turned_xmp_text.png", png_with(plain, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(8)))
    yield "turned_xmp_packed.png", png_with(plain, (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(2))))
    yield "turned_long.webp", webp_with(webp, picture.size, (b"EXIF", exif(">", "long", 6)))
    yield "turned_marked.webp", webp_with(webp, picture.size, (b"EXIF", three))
    yield "turned_xmp_chunk.webp", webp_with(webp, picture.size, (b"XMP ", xmp(4)))


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def unusual_jpegs(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    inks = encoded(picture.convert("CMYK"), "JPEG", quality=95)
    adobe = inks.index(b"\xff\xee")
    yield "jpeg_cmyk_unmarked.jpg", inks[:adobe] + inks[adobe + 16 :]
    yield "jpeg_ycck.jpg", inks[: adobe + 15] + b"\2" + inks[adobe + 16 :]
    plain = encoded(picture, "JPEG", quality=95)
    bare = plain[:2] + plain[20:]
    yield "jpeg_rgb.jpg", encoded(picture, "JPEG", quality=95, keep_rgb=True)
    yield "jpeg_bare.jpg", bare
    for transform in (0, 1):
        yield (
            f"jpeg_adobe_{transform}.jpg",
            bare[:2] + b"\xff\xee\0\x0eAdobe\0d\0\0\0\0" + bytes([transform]) + bare[2:],
        )
    yield "jpeg_restarts.jpg", encoded(picture, "JPEG", restart_marker_blocks=1)
    yield "jpeg_coarse.jpg", encoded(picture, "JPEG", qtables=[[9 * (place + 1) for place in range(64)]] * 2)


def frames_on_canvases() -> Iterator[tuple[str, bytes]]:
    """First frames that do not cover their canvas, or do not lie on it."""
    colours, greys = noise_bytes(5, 24), bytes(value for value in range(8) for _ in range(3))
    boxes = {"small": (1, 2, 3, 2), "beyond": (4, 3, 5, 4), "outside": (8, 9, 3, 2)}
    for name, box in boxes.items():
        yield f"gif_{name}.gif", gif((6, 5), box, colours, background=5)
        yield f"gif_{name}_transparent.gif", gif((6, 5), box, colours, background=5, transparent=3)
    yield "gif_local.gif", gif((6, 5), boxes["small"], colours, local=noise_bytes(6, 24), transparent=3)
    yield "gif_local_greys.gif", gif((6, 5), boxes["small"], colours, local=greys)
    yield "gif_greys.gif", gif((6, 5), boxes["small"], None, transparent=3)
    yield "gif_interlaced.gif", gif((12, 21), (1, 2, 9, 17), colours, interlaced=True)
    yield "gif_no_screen.gif", gif((0, 0), (0, 0, 6, 5), colours)
    for name, picture in (("opaque", photo(10, 8, 8)), ("transparent", with_alpha(photo(10, 8, 8)))):
        frame = encoded(picture, "WEBP", lossless=True, exact=True)
        yield f"webp_beside_{name}.webp", webp_beside(frame, picture.size, (20, 15))
    yield "webp_beside_lossy.webp", webp_beside(encoded(with_alpha(photo(10, 8, 8)), "WEBP"), (10, 8), (20, 15))
    yield "webp_beside_no_alpha.webp", webp_beside(frame, (10, 8), (20, 15), flags=2)


def damaged(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    """What Pillow opens nevertheless."""
    jpeg, plain = encoded(picture, "JPEG", quality=95), encoded(picture, "PNG")
    yield "damaged_end_is_zeros.jpg", jpeg[:-2] + bytes(300)
    yield "damaged_end_is_text.jpg", jpeg[:-2] + b"no end marker " * 20
    yield "damaged_no_end.png", plain[:-12]
    yield "damaged_no_sum.png", plain[:-16]
    yield "damaged_half_a_sum.png", plain[:-18]
    yield "damaged_sum_of_a_late_chunk.png", plain[:-12] + chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    data = zlib.decompress(plain[plain.index(b"IDAT") + 4 : -16])
    yield (
        "damaged_rows_missing.png",
        plain[: plain.index(b"IDAT") - 4] + chunk(b"IDAT", zlib.compress(data[:-70])) + plain[-12:],
    )
    yield "damaged_no_trailer.gif", gif((6, 5), (0, 0, 6, 5), noise_bytes(5, 24), trailer=b"")[:-1]
    for name, file in (("jpg", jpeg), ("png", plain), ("gif", gif((6, 5), (0, 0, 6, 5), noise_bytes(5, 24)))):
        yield f"{name}_followed_by_more.{name}", file + b"and more " * 20


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
