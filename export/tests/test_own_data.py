"""Own data: every form that it comes in, what careless and hostile people bring, splits, order, bad pictures and kept features."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import random
import re
import struct
import subprocess
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from blip2_export.check import random_checkpoint
from blip2_export.scenes import dataset, drawing
from blip2_export.train.own import (
    aside,
    batches,
    features,
    hardware,
    loop,
    order,
    pictures,
    prints,
    questions,
    records,
    sets,
    split,
    stages,
    together,
)
from blip2_export.train.own.bad import Bad
from blip2_export.train.own.batches import Batches, Part, Sizes
from blip2_export.train.own.order import Order
from blip2_export.train.own.pictures import Look, Sight
from blip2_export.train.own.records import Record
from blip2_export.train.own.run import Schedule
from blip2_export.train.own.sources import DataError, File, Member

LOOK = Look(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
SIGHT = Sight(LOOK)


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Smooth, so that it survives being saved anew."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    kept = io.BytesIO()
    image.save(kept, kind, **more)
    return kept.getvalue()


def write_pictures(folder: Path, *names: str) -> None:
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(picture(n)))


def said(found: list[Record]) -> dict[str, list[str]]:
    return {record.key: record.captions for record in found}


def write(file: Path, what: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(what if isinstance(what, str) else json.dumps(what))
    return file


# Forms


COCO = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "a blue star"},
        {"id": 2, "image_id": 3, "caption": "a red ring"},
        {"id": 2, "image_id": 7, "caption": "one star"},
    ],
}
WANTED = {"a.png": ["a red ring"], "b.png": ["a blue star", "one star"]}
ROWS = [
    {"image": "b.png", "caption": ["a blue star", "one star"]},
    {"image": "a.png", "caption": "a red ring", "image_id": "coco_3"},
]
LISTS = {
    "captions.json": json.dumps(COCO),
    "karpathy.json": json.dumps(ROWS),
    "flat.json": json.dumps([{"image": n, "caption": c} for n in WANTED for c in WANTED[n]]),
    "rows.jsonl": "\n".join(json.dumps({"file_name": n, "text": c}) for n in WANTED for c in WANTED[n]) + "\n\n",
    "rows.csv": "image,caption\na.png,a red ring\nb.png,a blue star\nb.png,one star\n",
    "rows.tsv": "file_name\ttext\na.png\ta red ring\nb.png\ta blue star\nb.png\tone star\n",
    "results.csv": "image_name| comment_number| comment\na.png| 0| a red ring\nb.png| 0| a blue star\nb.png| 1| one star\n",
    "results.token": "a.png#0\ta red ring\nb.png#0\ta blue star\nb.png#1\tone star\n",
    "captions.txt": "image,caption\na.png,a red ring\nb.png,a blue star\nb.png,one star\n",
    "raw.csv": 'raw,split,filename\n"[""a red ring""]",train,a.png\n"[""a blue star"", ""one star""]",train,b.png\n',
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_every_list_says_the_same(tmp_path: Path, name: str, mark: bytes, end: bytes) -> None:
    (tmp_path / name).write_bytes(mark + LISTS[name].encode().replace(b"\n", end))
    found = records.read(tmp_path / name)
    assert said(found) == WANTED
    assert [record.source for record in found] == [File(tmp_path / "a.png"), File(tmp_path / "b.png")]
    assert records.passed_over(found) == ""


def test_a_list_of_a_spreadsheet_in_utf16_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("image\tcaption\na.png\tein Stück Käse\n".encode("utf-16"))
    assert said(records.read(tmp_path / "rows.csv")) == {"a.png": ["ein Stück Käse"]}


def test_folders_are_read_by_their_list_or_by_texts_beside_pictures(tmp_path: Path) -> None:
    write(tmp_path / "hub" / "metadata.jsonl", LISTS["rows.jsonl"])
    write(tmp_path / "table" / "metadata.csv", "file_name,text\na.png,a red ring\nb.png,a blue star\nb.png,one star\n")
    assert said(records.read(tmp_path / "hub")) == said(records.read(tmp_path / "table")) == WANTED
    write_pictures(tmp_path / "beside", "a.png", "in/b.PNG", "alone.png", "._a.png")
    write(tmp_path / "beside" / "a.txt", "a red ring\r\n\r\n")
    write(tmp_path / "beside" / "in" / "b.txt", "a blue star\none star")
    write(tmp_path / "beside" / "._a.txt", "\0\0")
    found = records.read(tmp_path / "beside")
    assert said(found) == {"a.png": ["a red ring"], "in/b.PNG": ["a blue star", "one star"]}
    latin = os.fsencode(tmp_path / "beside") + "/Stück".encode("latin-1")
    Path(os.fsdecode(latin + b".png")).write_bytes(encoded(picture()))
    Path(os.fsdecode(latin + b".txt")).write_text("a piece")
    (found,) = (record for record in records.read(tmp_path / "beside") if record.captions == ["a piece"])
    assert found.key == r"St\xfcck.png" and found.source.read(), "keys are written down"


def test_a_folder_of_parts_says_which_to_name(tmp_path: Path) -> None:
    write(tmp_path / "train" / "metadata.jsonl", LISTS["rows.jsonl"])
    write(tmp_path / "validation" / "metadata.jsonl", LISTS["rows.jsonl"])
    with pytest.raises(DataError, match=r"its lists are in train, validation; name .*train instead"):
        records.read(tmp_path)


def test_karpathys_parts_are_kept_apart(tmp_path: Path) -> None:
    parts = {"a.png": "train", "b.png": "restval", "c.png": "val", "d.png": "test"}
    images = [
        {"filepath": "x", "filename": name, "split": part, "sentences": [{"raw": f"it is {name}"}, {"raw": "it"}]}
        for name, part in parts.items()
    ]
    write(tmp_path / "dataset.json", {"images": images, "dataset": "coco"})
    found = records.read(tmp_path / "dataset.json")
    assert said(found)["x/a.png"] == ["it is a.png", "it"]
    train, held_out = split.by_share(found, 0.5)
    assert [record.key for record in train] == ["x/a.png", "x/b.png"]
    assert [record.key for record in held_out] == ["x/c.png"]


VQA = {
    "data_subtype": "train2014",
    "questions": [
        {"image_id": 9, "question": "What is it?", "question_id": 90},
        {"image_id": 9, "question": "Is it red?", "question_id": 91},
        {"image_id": 25, "question": "How many?", "question_id": 250},
        {"image_id": 25, "question": "Who knows?", "question_id": 251},
    ],
}
ANSWERS = {
    "annotations": [
        {"question_id": 90, "answers": [{"answer": "ring"}] * 7 + [{"answer": "circle"}] * 3},
        {"question_id": 91, "answers": [{"answer": "yes"}] * 10},
        {"question_id": 250, "answers": [{"answer": "2"}] * 9 + [{"answer": " "}]},
    ]
}


def test_vqav2_is_read_with_the_annotations_beside_it(tmp_path: Path) -> None:
    file = write(tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json", VQA)
    with pytest.raises(DataError, match="name their answers with --answers"):
        records.read(file)
    notes = write(tmp_path / "v2_mscoco_train2014_annotations.json", ANSWERS)
    for found in (records.read(file), records.read(file, None, notes)):
        first, second = found
        assert (first.key, second.key) == ("COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg")
        assert first.questions[0].answers == (("ring", 0.7), ("circle", 0.3)) and first.questions[0].people == 10
        assert second.questions[0].answers == (("2", 1.0),)
        assert second.refused == ["a question without an answer"]
    newer = write(tmp_path / "newer.json", {**VQA, "data_subtype": "train2017"})
    assert records.read(newer, None, notes)[0].key == "000000000009.jpg"
    odd = write(tmp_path / "odd.json", {**VQA, "questions": [{**VQA["questions"][0], "image_id": "nine"}]})  # type: ignore[dict-item,index]
    with pytest.raises(DataError, match=r"odd\.json: a row is in none of the forms"):
        records.read(odd, None, notes)


def test_rows_of_questions_in_plain_forms(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "What?", "answer": "ring"},
        {"image": "a.png", "question": "Is it?", "answers": ["yes", "yes", "no", {"answer": "yes"}, None]},
        {"image": "a.png", "question": None, "answer": "x"},
        {"image": "a.png", "question": "Nothing?", "answer": 7},
    ]
    found = records.read(write(tmp_path / "rows.json", rows))
    assert [question.text for question in found[0].questions] == ["What?", "Is it?"]
    assert found[0].questions[1].answers == (("yes", 0.75), ("no", 0.25))
    assert found[0].refused == ["a question that is missing", "a question without an answer"]


# What careless and hostile people bring


BAD_CAPTIONS = [None, 7, "", "  \n", "...", "x" * 100_000, "\ud800 half", ["nested"], {"a": 1}]


def test_captions_that_cannot_be_learnt_are_passed_over_and_counted(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": ["a red ring", *BAD_CAPTIONS]}, {"image": "b.png", "caption": None}]
    found, told = batches.usable(records.read(write(tmp_path / "rows.json", rows)))
    assert said(found) == {"a.png": ["a red ring"]}
    assert "10 texts are passed over" in told and "3 missing" in told and "the first is that of a.png" in told
    assert "3 empty" in told and "2 not text" in told


def test_json_lines_may_hold_separators_of_unicode(tmp_path: Path) -> None:
    row = json.dumps({"image": "a.png", "caption": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
    assert said(records.read(tmp_path / "rows.jsonl")) == {"a.png": ["one\u2028two\x85three"]}


def test_fields_of_a_table_may_hold_line_ends_and_quotation_marks(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([("image", "caption"), ("a.png", 'a "red"\nring, round')])
    write(
        tmp_path / "results.csv", 'image_name| comment_number| comment\na.png| 0| "red", it says\nb.png| 4   A dog .\n'
    )
    assert said(records.read(tmp_path / "rows.csv")) == {"a.png": ['a "red"\nring, round']}
    found = records.read(tmp_path / "results.csv")
    assert said(found) == {"a.png": ['"red", it says'], "b.png": []} and found[1].refused == ["missing"]
    write(tmp_path / "cut.csv", "image,caption\na.png,a red ring, near a star\nb.png,a box, \n")
    found = records.read(tmp_path / "cut.csv")
    assert said(found) == {"a.png": [], "b.png": ["a box"]} and found[0].refused == ["in a row of too many fields"]


ODD = {
    "latin.csv": ("image,caption\na.png,ein Stück\n".encode("latin-1"), "not UTF-8 .byte 0xfc at 26.*iconv"),
    "cut.json": (b'[{"image": "a.png", "capt', "not valid JSON"),
    "deep.json": (b"[" * 200_000, "not valid JSON"),
    "number.json": (b"7", "holds 7, neither an object nor a list"),
    "rows.json": (b"[7]", "a row is 7, not an object"),
    "nameless.json": (b'[{"caption": "x"}]', "names no picture"),
    "numbered.json": (b'[{"image": 3, "caption": "x"}]', "names no picture"),
    "mute.json": (b'[{"image": "a.png"}]', "has no caption"),
    "empty.json": (b"", "not valid JSON"),
    "none.json": (b"[]", "no picture with a caption"),
    "other.json": (b'{"a": 1}', "neither COCO captions"),
    "boxes.json": (b'{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', "annotations have no caption"),
    "twice.json": (
        b'{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
        "two pictures have the id 1",
    ),
    "unnamed.json": (b'{"images": [{"id": 1, "file_name": null}], "annotations": []}', "with the id 1 has no name"),
    "shape.json": (b'{"images": 7, "annotations": 8}', "none of the forms"),
    "line.jsonl": (b'{"image": "a", "caption": "x"}\n{"image"', "line 2: not valid JSON"),
    "bare.csv": (b"", "no picture"),
    "unnamed.csv": (b"a,b\n1,2\n", "line 2: a row names no picture"),
    "nul.json": (b'[{"image": "a\\u0000.png", "caption": "x"}]', "can be no file's name"),
    "half.json": (b'[{"image": "\\ud800.png", "caption": "x"}]', "can be no file's name"),
    "row.token": (b"a.png#0\tx\nno entry\n", "line 2 is not NAME#N"),
    "table.parquet": (b"PAR1", "only .json, .jsonl"),
}


@pytest.mark.parametrize("name", ODD)
def test_files_that_cannot_be_used_are_refused_with_a_sentence(tmp_path: Path, name: str) -> None:
    data, why = ODD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=why):
        records.read(tmp_path / name)


@pytest.mark.parametrize("name", ["../b.png", "/etc/hostname", "x/../../b.png", ".."])
def test_lists_do_not_choose_files_beyond_their_folder(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "in" / "rows.json", [{"image": name, "caption": "it"}])
    with pytest.raises(DataError, match=r"is not in .*--images"):
        records.read(file)


def test_names_from_the_top_are_fine_below_the_folder_that_was_named(tmp_path: Path) -> None:
    write_pictures(tmp_path, "p/a.png")
    file = write(tmp_path / "in" / "rows.json", [{"image": str(tmp_path / "p" / "a.png"), "caption": "it"}])
    (found,) = records.read(file, tmp_path)
    assert found.source.size()


def test_pictures_that_are_not_there_are_told_and_most_of_them_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "zero.png").write_bytes(b"")
    rows = [{"image": name, "caption": "it is there"} for name in ("a.png", "b.png", "gone.png", "zero.png")]
    found = sets.there(tmp_path, records.read(write(tmp_path / "rows.json", rows)))
    assert [record.key for record in found] == ["a.png", "b.png"]
    assert "2 of 4 pictures are not there, or empty; the first is gone.png" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"2 of 3 .*--images"):
        sets.there(tmp_path, [record for record in records.read(tmp_path / "rows.json") if record.key != "a.png"])


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    source = File(tmp_path / "a.png")
    assert source.size() is None
    with pytest.raises(OSError, match="no file"):
        source.read()


# Shards


def add(archive: tarfile.TarFile, name: str, data: bytes, **more: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def write_shard(file: Path, keys: list[str], kind: str = "txt") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for n, key in enumerate(keys):
            text = f"it is {key}"
            add(archive, f"{key}.{kind}", (json.dumps({"caption": text}) if kind == "json" else text + "\n").encode())
            add(archive, f"{key}.png", encoded(picture(n + 100 * len(key))))
    return file


def test_shards_by_braces_patterns_and_folders_say_the_same(tmp_path: Path) -> None:
    for n in range(3):
        write_shard(tmp_path / f"s-{n:03}.tar", [f"{n}{i}" for i in range(4)], "json" if n == 1 else "txt")
    ways = ["", "s-{000..002}.tar", "s-{000,001,002}.tar", "s-*.tar", "s-00{0..1}.tar"]
    found = [said(records.read(tmp_path / way)) for way in ways]
    assert found[0] == found[1] == found[2] == found[3] and len(found[0]) == 12 and len(found[4]) == 8
    assert found[0]["s-001.tar/12"] == ["it is 12"]
    for folder in "ab":
        write_shard(tmp_path / "more" / folder / "s.tar", ["x"])
    assert list(said(records.read(tmp_path / "more" / "{a,b}" / "s.tar"))) == ["a/s.tar/x", "b/s.tar/x"]
    with pytest.raises(DataError, match=r"s-003.tar: there is no such shard \(2 of 5 are missing\)"):
        records.read(tmp_path / "s-{000..004}.tar")
    with pytest.raises(DataError, match="more than 100000 shards"):
        records.read(tmp_path / "s-{0..999999999999}.tar")


def test_pictures_of_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", ["x", "y"])
    with tarfile.open(tmp_path / "a.tar") as opened:
        wanted = {name: opened.extractfile(f"{name}.png").read() for name in "xy"}  # type: ignore[union-attr]
    found = records.read(tmp_path / "a.tar")
    assert {record.key[-1]: record.source.read() for record in found} == wanted


def test_compressed_shards_are_unpacked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_shard(tmp_path / "plain" / "a.tar", ["x", "y"]).read_bytes()
    packed = tmp_path / "packed" / "a.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(plain))
    with pytest.raises(DataError, match=r"unpack it to \.tar"):
        records.read(packed)
    for _ in range(2):
        found = records.read(packed, work=tmp_path / "work")
        assert [record.source.read() for record in found] == [r.source.read() for r in records.read(tmp_path / "plain")]
    assert capsys.readouterr().err.count("unpacking") == 1
    packed.write_bytes(gzip.compress(plain)[:-200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        records.read(packed, work=tmp_path / "work")
    packed.write_bytes(gzip.compress(bytes(70 << 20)))
    with pytest.raises(DataError, match="more than 50 times its size"):
        records.read(packed, work=tmp_path / "work")
    assert len(list((tmp_path / "work" / "unpacked").iterdir())) == 1, "what is not whole is not kept"


def test_a_hostile_archive_neither_writes_nor_leaves_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(picture(99)))
    shard = tmp_path / "in" / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("../../up", "/etc/top", "fine"):
            add(archive, f"{name}.png", encoded(picture(1)))
            add(archive, f"{name}.txt", b"a caption")
        for name, kind in (
            ("soft", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("pipe", tarfile.FIFOTYPE),
            ("node", tarfile.CHRTYPE),
        ):
            add(archive, f"{name}.png", b"", type=kind, linkname="../../secret.png")
            add(archive, f"{name}.txt", b"a caption")
        add(archive, "holes.png", b"0\n", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9000000"})
        add(archive, "holes.txt", b"a caption")
        add(archive, "mute.png", encoded(picture(2)))
        add(archive, "long.png", encoded(picture(3)))
        add(archive, "long.txt", b"x" * ((1 << 20) + 1))
        add(archive, "latin.png", encoded(picture(3)))
        add(archive, "latin.txt", "Stück".encode("latin-1"))
        add(archive, "odd.png", encoded(picture(3)))
        add(archive, "odd.json", b"{")
    before = sorted(tmp_path.rglob("*"))
    found = {record.key: record for record in records.read(shard)}
    assert sorted(tmp_path.rglob("*")) == before
    usable = {key for key, record in found.items() if record.captions}
    assert usable == {"a.tar/../../up", "a.tar/etc/top", "a.tar/fine"}
    for key in usable:
        assert isinstance(found[key].source, Member) and LOOK.pixels(found[key].source.read()).shape == (3, 16, 16)
    refused = {key.removeprefix("a.tar/"): record.refused[0] for key, record in found.items() if record.refused}
    assert set(refused) == {"holes", "mute", "long", "latin", "odd"}
    assert refused["holes"] == "a picture that is stored with holes" and refused["mute"] == "no text beside the picture"


def test_names_that_come_again_are_samples_of_their_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for n in range(3):
            add(archive, "x.png", encoded(picture(n)))
            add(archive, "x.txt", f"number {n}".encode())
    found = records.read(tmp_path / "a.tar")
    assert said(found) == {f"a.tar/x{end}": [f"number {n}"] for n, end in enumerate(("", "~2", "~3"))}
    assert [LOOK.pixels(record.source.read()).tolist() for record in found] == [
        LOOK.pixels(encoded(picture(n))).tolist() for n in range(3)
    ]


def test_a_shard_that_is_cut_off_or_damaged_is_refused(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "a.tar", ["x", "y", "z"]).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512
    for n in (*range(1, end, 333), end // 512 * 512):
        (tmp_path / "a.tar").write_bytes(whole[:n])
        with pytest.raises(DataError, match=r"a\.tar: (it is no tar archive, or is cut off|it has no end)"):
            records.read(tmp_path / "a.tar")
    rng = random.Random(5)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.tar").write_bytes(bytes(damaged))
        try:
            for record in records.read(tmp_path / "a.tar"):
                assert record.source.size() <= len(whole)  # type: ignore[operator]
        except DataError:
            continue


# Pictures


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(picture(3, (30, 20)), "JPEG", exif=exif, quality=95)


KINDS: dict[str, tuple[bytes, Image.Image]] = {
    "rgb": (encoded(picture(1)), picture(1)),
    "one pixel": (encoded(picture(1, (1, 1))), picture(1, (1, 1))),
    "cmyk": (encoded(picture(1, mode="CMYK"), "TIFF"), picture(1, mode="CMYK").convert("RGB")),
    "grey": (encoded(picture(1, mode="L")), picture(1, mode="L").convert("RGB")),
    "bits": (encoded(picture(1, mode="1")), picture(1, mode="1").convert("RGB")),
    "alpha": (encoded(picture(1).convert("RGBA")), picture(1)),
    "palette": (encoded(picture(1, mode="P"), transparency=3), picture(1, mode="P").convert("RGB")),
    "several frames": (
        encoded(picture(1), "GIF", save_all=True, append_images=[picture(2)]),
        Image.open(io.BytesIO(encoded(picture(1), "GIF"))).convert("RGB"),
    ),
    "turned": (turned(6), Image.open(io.BytesIO(turned(1))).transpose(Image.Transpose.ROTATE_270)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_are_seen_as_they_are(kind: str) -> None:
    data, wanted = KINDS[kind]
    small = np.asarray(wanted.resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
    assert np.allclose(LOOK.pixels(data).transpose(1, 2, 0), (small - LOOK.mean) / LOOK.std, atol=1e-5)


def bomb(width: int, height: int) -> bytes:
    """A small file that says that it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


DAMAGED = {
    "no bytes": (b"", "it has no bytes"),
    "text": (b"<html>not found</html>", "it is no picture"),
    "cut off": (encoded(picture(1, (300, 300)), "JPEG", quality=95)[:2000], "truncated"),
    "head alone": (encoded(picture(1))[:30], "."),
    "bomb": (bomb(9500, 9500), "9500×9500 pixels, more than 89478485"),
    "large bomb": (bomb(60_000, 60_000), "."),
    "16 bits of grey": (encoded(Image.fromarray(np.full((4, 4), 40_000, np.uint16))), "more than 8 bits"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is no picture"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_pictures_that_cannot_be_used_give_way(tmp_path: Path, kind: str) -> None:
    data, why = DAMAGED[kind]
    (tmp_path / "bad.png").write_bytes(data)
    write_pictures(tmp_path, "a.png", "b.png")
    found = [Record(name, File(tmp_path / name), ["it"]) for name in ("a.png", "bad.png", "b.png")]
    made = Batches(Order([order.Part(found)]), SIGHT, Sizes(3))
    parts = [made.parts(step, lambda records, *_: [record.key for record in records])[0] for step in range(4)]
    for part in parts:
        assert part.pixels.shape == (3, 3, 16, 16) and "bad.png" not in part.said and list(part.bad) == ["bad.png"]
        for key, pixels in zip(part.said, part.pixels, strict=True):
            assert torch.equal(pixels, torch.from_numpy(LOOK.pixels((tmp_path / key).read_bytes())))
    assert re.search(why, parts[0].bad["bad.png"]) and "0x" not in parts[0].bad["bad.png"]
    again = [made.parts(step, lambda records, *_: [record.key for record in records])[0].said for step in range(4)]
    assert again == [part.said for part in parts]


def test_a_line_of_bad_pictures_ends_it(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no")
    made = Batches(Order([order.Part([Record("bad.png", File(tmp_path / "bad.png"), ["it"])])]), SIGHT, Sizes(2))
    with pytest.raises(DataError, match=r"one after another cannot be read, the first is bad\.png"):
        made.parts(0, lambda *_: None)


def test_bad_pictures_are_told_once_counted_over_resumption_and_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(*keys: int) -> Part:
        return Part(torch.empty(0), None, {f"{key}.png": "truncated" for key in keys})

    bad = Bad(tmp_path / "bad.jsonl", 240, 0.05)
    assert list(bad.note(part(1, 2))) == ["1.png", "2.png"] and bad.note(part(2)) == {}
    other = Bad(tmp_path / "bad.jsonl", 240, 0.05)
    assert list(other.note(part(2, 3))) == ["3.png"]
    bad.note(part(*range(4, 13)))
    assert len(bad.known) == 12, "those of the other process count as well"
    bad.end()
    assert "12 of 240 pictures cannot be read, such as 1.png (truncated)" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"13 of 240 pictures cannot be read.*, more than 12; mend the data"):
        bad.note(part(13))
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 13
    with (tmp_path / "bad.jsonl").open("a") as torn:
        torn.write('{"picture": "14.p')
    Bad(tmp_path / "bad.jsonl", 999, 0.05).note(part(15))
    assert len(Bad(tmp_path / "bad.jsonl", 999, 0.05).known) == 13, "all but the line that a full disk cut"
    assert len(Bad(tmp_path / "few.jsonl", 4, 0.0).note(part(*range(10)))) == 10


# Order


def numbered(n: int, name: str = "r", shard: int = 0) -> list[Record]:
    """Of shards that have so many records each, or of files."""
    return [
        Record(
            f"{name}{i}", Member(Path(f"{name}{i // shard}.tar"), i, 1) if shard else File(Path(f"{name}{i}")), ["it"]
        )
        for i in range(n)
    ]


def test_an_epoch_sees_every_record_once_and_the_next_in_another_order() -> None:
    for found in (numbered(37), numbered(1), numbered(100, shard=7)):
        line = [Order([order.Part(found)], 3).at(place).key for place in range(3 * len(found))]
        epochs = [line[i : i + len(found)] for i in range(0, len(line), len(found))]
        assert all(sorted(epoch) == sorted(record.key for record in found) for epoch in epochs)
        assert len(found) == 1 or len({tuple(epoch) for epoch in epochs}) == 3


def test_sets_come_by_their_weights_and_each_is_seen_whole() -> None:
    parts = [order.Part(numbered(50, "a"), 1), order.Part(numbered(7, "b"), 3), order.Part(numbered(900, "c"), 0.5)]
    made = Order(parts, 1)
    line = [made.at(place).key for place in range(9000)]
    counts = Counter(key[0] for key in line)
    for part, name in zip(parts, "abc", strict=True):
        assert abs(counts[name] - 9000 * part.weight / 4.5) <= 9, "to a thousandth"
        own = [key for key in line if key[0] == name]
        n = len(part.records)
        for first in range(0, len(own) - n, n):
            assert len(set(own[first : first + n])) == n
    spread = Counter(key[0] for key in line[:300])
    assert abs(spread["b"] - 200) < 40, "they are mixed, not one after another"


def test_weights_and_sets_that_cannot_be_meant_are_refused() -> None:
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="weight"):
            Order([order.Part(numbered(2), weight)])
    with pytest.raises(DataError, match="no record"):
        Order([order.Part([])])
    assert Order([order.Part(numbered(2), 1e-9), order.Part(numbered(2, "b"), 1)]).at(0)


def test_shards_are_mixed_a_few_at_a_time() -> None:
    line = [record.key for record in Order([order.Part(numbered(640, shard=10))], 2).batch(0, 640)]
    shards_of = [[int(key[1:]) // 10 for key in line[i : i + 160]] for i in range(0, 640, 160)]
    assert all(len(set(some)) == 16 for some in shards_of), "sixteen files are read at a time"
    assert len(set(itertools.chain(*map(set, shards_of)))) == 64
    assert all(len(set(some[:40])) > 8 for some in shards_of), "and all of them are mixed"


class Steps(Dataset[list[Any]]):
    def __init__(self, made: Batches, n: int) -> None:
        self.made, self.n = made, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> list[Any]:
        return self.made.parts(step, seen)


def seen(records: list[Record], chances: Any, numbers: torch.Tensor) -> list[tuple[str, float, float]]:
    return [(r.key, chance.random(), float(n[0])) for r, chance, n in zip(records, chances, numbers, strict=True)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Two shards and a folder, with a picture that cannot be read."""
    folder = tmp_path_factory.mktemp("line")
    write_shard(folder / "s-0.tar", [f"a{i}" for i in range(9)])
    write_shard(folder / "s-1.tar", [f"b{i}" for i in range(9)])
    write_pictures(folder / "p", *[f"{i}.png" for i in range(5)])
    (folder / "p" / "3.png").write_bytes(b"no picture")
    rows = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(5)]
    parts = [
        order.Part(records.read(folder / "s-{0..1}.tar"), 2),
        order.Part(records.read(write(folder / "p" / "rows.json", rows)), 1),
    ]
    return Batches(Order(parts, 4), Sight(LOOK, augments=True), Sizes(4), 4)


def test_a_run_goes_on_mid_shard_and_with_any_number_of_workers(made: Batches) -> None:
    whole = [made.parts(step, seen)[0] for step in range(14)]
    assert any(part.bad for part in whole)
    for workers, first in ((0, 5), (1, 9), (3, 3)):
        loader = DataLoader(
            Steps(made, 14),
            batch_size=None,
            sampler=range(first, 14),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        for part, (other,) in zip(whole[first:], loader, strict=True):
            assert part.said == other.said and torch.equal(part.pixels, other.pixels) and part.bad == other.bad


def test_two_processes_see_halves_of_what_one_sees(made: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [made.parts(step, seen)[0] for step in range(6)]
    halves = []
    monkeypatch.setattr(together, "size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(together, "rank", lambda rank=rank: rank)
        halves.append([made.parts(step, seen)[0] for step in range(6)])
    for part, *two in zip(whole, *halves, strict=True):
        assert [row for half in two for row in half.said] == part.said
        assert torch.equal(torch.cat([half.pixels for half in two]), part.pixels)
    monkeypatch.setattr(together, "size", lambda: 3)
    with pytest.raises(DataError, match="multiple of 3"):
        Batches(made.order, SIGHT, Sizes(4))


def test_parts_that_are_computed_one_after_another_are_the_same_step(made: Batches) -> None:
    cut = Batches(made.order, Sight(LOOK, augments=True), Sizes(4, accumulate=2), 4)
    for step in range(4):
        one, two = made.parts(step, seen), cut.parts(step, seen)
        assert [row for part in two for row in part.said] == one[0].said
        assert torch.equal(torch.cat([part.pixels for part in two]), one[0].pixels)


def test_a_set_smaller_than_the_batch_and_one_record_alone_make_steps(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png", "b.png")
    for names in (["a.png"], ["a.png", "b.png"]):
        found = [Record(name, File(tmp_path / name), ["it"]) for name in names]
        part = Batches(Order([order.Part(found)]), SIGHT, Sizes(5)).parts(0, seen)[0]
        assert len(part.pixels) == 5 and {row[0] for row in part.said} == set(names)


def test_pictures_of_one_name_in_two_sets_are_two_pictures(tmp_path: Path) -> None:
    found = [Record("1.png", File(tmp_path / folder / "1.png"), ["it"]) for folder in "ab"]
    say = batches.captioned(lambda texts: (torch.zeros(len(texts), 1), torch.ones(len(texts), 1)))
    a, b, a2 = say([*found, found[0]], [random.Random(0)] * 3, torch.rand(3, 2)).picture.tolist()
    assert a != b and a == a2


def test_augmented_pictures_are_parts_of_at_least_half_the_area() -> None:
    # Each pixel says where it is; so what is left tells what was cut.
    x, y = np.meshgrid(np.arange(256), np.arange(256))
    data = encoded(Image.fromarray(np.stack([x, y, x], -1).astype(np.uint8)))
    look = Look(64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    areas, mirrored = [], 0
    for n in range(150):
        pixels = look.pixels(data, random.Random(n)) * 255
        wide, high = pixels[0].max() - pixels[0].min(), pixels[1].max() - pixels[1].min()
        areas.append(float(wide * high) / 255**2)
        assert 0.70 < wide / high < 1.43
        mirrored += int(pixels[0, 0, 0] > pixels[0, 0, -1])
    assert 0.46 < min(areas) < 0.56 and 0.9 < max(areas) <= 1 and 50 < mirrored < 100
    # So wide that no part of half the area is nearly square.
    wide = encoded(Image.fromarray(np.stack([x] * 3, -1).astype(np.uint8)).resize((256, 64)))
    kept = look.pixels(wide, random.Random(7))[0] * 255
    assert kept.max() - kept.min() == pytest.approx(85, abs=4) and kept.mean() == pytest.approx(127.5, abs=2)
    assert np.array_equal(look.pixels(data, random.Random(7)), look.pixels(data, random.Random(7)))


# Splits and copies


def test_a_share_is_held_out_by_name_and_stays_so_as_data_grows() -> None:
    train, held_out = split.by_share(numbered(4000), 0.1)
    assert 330 < len(held_out) < 470 and len(train) + len(held_out) == 4000
    _, fewer = split.by_share(numbered(2000), 0.1)
    assert {r.key for r in fewer} == {r.key for r in held_out} & {r.key for r in numbered(2000)}
    assert split.by_share(numbered(10), 0.0)[1] == []


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self) -> bytes:
        return self.data

    def size(self) -> int:
        return len(self.data)


def of_bytes(*data: bytes) -> list[Record]:
    return [Record(str(n), Bytes(each), ["it"]) for n, each in enumerate(data)]


def test_copies_are_noticed_however_they_were_saved() -> None:
    """Smaller, squashed, in another format, and coarse; and nothing else is taken for a copy."""
    image = picture(5, (320, 240))
    ways = [
        encoded(image),
        encoded(image, "JPEG", quality=90),
        encoded(image, "JPEG", quality=30),
        encoded(image, "WEBP", quality=60),
        encoded(image.resize((160, 120), Image.Resampling.LANCZOS), "JPEG"),
        encoded(image.resize((224, 224), Image.Resampling.BICUBIC), "JPEG"),
        encoded(image.resize((545, 408), Image.Resampling.BICUBIC)),
    ]
    others = [encoded(picture(seed, (320, 240))) for seed in range(6, 40)]
    found = split.copies(of_bytes(*ways, *others, b"no picture"), of_bytes(ways[0], b"nor this"))
    assert found.tolist() == [True] * len(ways) + [False] * (len(others) + 1)


def test_scenes_that_differ_are_no_copies() -> None:
    scenes = [np.asarray(drawing.draw(drawing.sample_scene(random.Random(f"copies {n}")), 96)) for n in range(120)]
    found = of_bytes(*(encoded(Image.fromarray(scene)) for scene in scenes))
    assert not split.copies(found[:60], found[60:]).any()
    assert split.copies(found, found[:7]).tolist() == [n < 7 for n in range(120)]
    coarse = of_bytes(*(encoded(Image.fromarray(scene), "JPEG", quality=50) for scene in scenes))
    assert split.copies(coarse, found).mean() > 0.9, "even grounds leave the noise of JPEG alone to be told apart"


def test_what_was_made_of_a_picture_is_kept_until_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(encoded(picture(n // 2, (96, 96))) + b" " * n)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    found = [Record(name, File(tmp_path / name), ["it"]) for name in ("0.png", "2.png", "bad.png", "1.png")]
    plain, read = prints._print, list[int]()
    monkeypatch.setattr(prints, "_print", lambda data: read.append(len(data)) or plain(data))
    keep = tmp_path / "work" / "prints.npz"

    def copies() -> tuple[list[bool], int]:
        read.clear()
        return split.copies(found[:3], found[3:], keep=keep).tolist(), len(read)

    assert copies() == ([True, False, False], 4)
    assert copies() == ([True, False, False], 1), "what could not be read may be there now"
    (tmp_path / "2.png").write_bytes(encoded(picture(0, (96, 96))) + b"   ")
    assert copies() == ([True, True, False], 2)
    keep.write_bytes(keep.read_bytes()[:-40])
    assert copies() == ([True, True, False], 4) and not list(keep.parent.glob("*.part"))


def test_of_too_many_pictures_bytes_alone_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(5, (96, 96)))
    two = of_bytes(data, encoded(picture(5, (96, 96)), "JPEG", quality=95))
    assert split.copies(two, of_bytes(data)).tolist() == [True, True]
    monkeypatch.setattr(split, "MOST", 2)
    assert split.copies(two, of_bytes(data)).tolist() == [True, False]


def test_a_picture_that_any_set_holds_out_is_learnt_from_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        rows = [{"image": f"{name}{i}.png", "caption": f"number {i}"} for i in range(12)]
        write(tmp_path / name / "rows.json", rows)
        for i in range(12):
            # The sets hold the same pictures under other names, one of them saved anew.
            kind = {"kind": "PNG"} if name == "a" else {"kind": "JPEG", "quality": 90}
            (tmp_path / name / f"{name}{i}.png").write_bytes(encoded(picture(i, (64, 64)), **kind))
    data = [(tmp_path / name / "rows.json", 1.0) for name in "ab"]
    setup = stages.Setup(data, tmp_path, tmp_path / "work", held_out=0.3)
    found = sets.learnt(setup, batches.usable)
    numbers = [{int(record.key[1:-4]) for record in side} for side in (found.train, found.held_out)]
    assert found.held_out and not numbers[0] & numbers[1]
    assert "are held out under another name, and not learnt" in capsys.readouterr().err
    own = stages.Setup(data[:1], tmp_path, tmp_path / "work", held_out=data[1][0])
    with pytest.raises(DataError, match="nothing is left to learn from"):
        sets.learnt(own, batches.usable)


def test_a_file_that_is_mostly_refused_is_another_file(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": text} for text in ("fine", None, "", 7)]
    setup = stages.Setup([(write(tmp_path / "rows.json", rows), 1.0)], tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"3 texts are passed over .*1 are left, fewer than half"):
        sets.learnt(setup, batches.usable)


def test_every_set_has_pictures_in_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As COCO's parts have; what is held out as well. One folder is that of all."""
    sets_ = []
    for number, part in enumerate(("train", "mine", "val")):
        (tmp_path / part).mkdir()
        for i in range(2):
            (tmp_path / part / f"{part}{i}.png").write_bytes(encoded(picture(10 * number + i)))
        rows = [{"image": f"{part}{i}.png", "caption": "a ring"} for i in range(2)]
        sets_.append((write(tmp_path / "lists" / f"{part}.json", rows), 1.0))
    folders = tuple(tmp_path / part for part in ("train", "mine"))
    said = stages.Setup(sets_[:2], tmp_path, tmp_path / "work", images=folders, held_out=sets_[2][0])
    with pytest.raises(DataError, match="2 of 2 pictures are not there"):
        sets.learnt(said, batches.usable)
    found = sets.learnt(replace(said, held_out_images=tmp_path / "val"), batches.usable)
    assert [record.key for record in found.train] == ["train0.png", "train1.png", "mine0.png", "mine1.png"]
    assert [record.key for record in found.held_out] == ["val0.png", "val1.png"]
    with pytest.raises(
        DataError, match="--images names 3 folders for 2 sets; name one for all, or one for each --data"
    ):
        sets.learnt(replace(said, images=(*folders, tmp_path)), batches.usable)
    capsys.readouterr()
    alone = replace(said, data=sets_[:1], images=folders[:1], held_out=0.001)
    assert not sets.learnt(alone, batches.usable).held_out
    assert "0 of 2 pictures held out, for which ones follows from their names" in capsys.readouterr().err


def test_rows_for_another_command_are_told_which(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png")
    said = {"caption": "a ring"}, {"question": "what is it?", "answer": "a ring"}
    for row, usable, wanted in zip(
        said, (questions.usable, batches.usable), ("stage1` and `stage2", "vqa"), strict=True
    ):
        setup = stages.Setup([(write(tmp_path / "rows.json", [{"image": "a.png", **row}]), 1.0)], tmp_path, tmp_path)
        with pytest.raises(DataError, match=f"{wanted}` learn"):
            sets.learnt(setup, usable)


# Features that are kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    random_checkpoint.write(folder / "opt", "odd-3", seed=4)
    dataset.write_dataset(folder / "data", 14, 0, 64)
    return folder


def setup(folder: Path, work: str, **more: Any) -> stages.Setup:
    usual = {"schedule": Schedule(4, warmup=1), "sizes": Sizes(4), "workers": 0, "measure_every": 4, "held_out": 0.3}
    return stages.Setup([(folder / "data", 1.0)], folder / "opt", folder / work, **{**usual, "samples": 0, **more})


def weights(work: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = loop.read(work / "stage1.pt")["model"]
    return found


def losses(work: Path) -> list[Any]:
    rows = [json.loads(line) for line in (work / "stage1.jsonl").read_text().splitlines()]
    return [(row.get("itc"), row.get("itm"), row.get("itg"), row.get("held_out")) for row in rows if "step" in row]


def test_kept_features_give_the_same_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages.train_stage1(setup(folder, "plain"), None)
    for work in ("filled", "read"):
        more = {"features": folder / "cache", "features_type": "float32", "workers": 2}
        stages.train_stage1(setup(folder, work, **more), None)
        assert losses(folder / work) == losses(folder / "plain")
        one, other = weights(folder / work), weights(folder / "plain")
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert "features of 14 pictures take at most 0.00 GiB as float32" in capsys.readouterr().err
    entries = list((folder / "cache").glob("*/??/*.npy"))
    assert len(entries) == 14 and not list((folder / "cache").glob("*/??/.*"))
    stages.train_stage1(setup(folder, "half", features=folder / "cache"), None)
    one, other = weights(folder / "half"), weights(folder / "plain")
    apart = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert 0 < apart < 1e-3, "float16 is nearly the same"


def test_kept_features_refuse_what_does_not_go_with_them(folder: Path) -> None:
    with pytest.raises(DataError, match="--cache-features goes with pictures that stay as they are"):
        stages.train_stage1(setup(folder, "w1", features=folder / "c", augment=True), None)
    with pytest.raises(DataError, match="more than the 1e-06 GiB of --cache-most"):
        stages.train_stage1(setup(folder, "w2", features=folder / "c", features_most=1e-6), None)
    with pytest.raises(DataError, match="the image encoder is trained"):
        stages.train_questions(setup(folder, "w3", features=folder / "c"), folder / "out", 28)


class Small(torch.nn.Module):
    """As much of an encoder as features need."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patches = torch.nn.Conv2d(3, 6, 8, 8)
        self.calls: list[int] = []

    class config:
        patch_size, hidden_size = 8, 6

        @staticmethod
        def to_dict() -> dict[str, int]:
            return {"patch_size": 8, "hidden_size": 6}

    def forward(self, pixels: torch.Tensor) -> Any:
        self.calls.append(len(pixels))
        found = self.patches(pixels).flatten(2).transpose(1, 2)
        whole = torch.cat([found.mean(1, keepdim=True), found], 1)
        return type("Output", (), {"last_hidden_state": whole})


def test_an_entry_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    shelf = features.Shelf(tmp_path, Small(), LOOK, "no", "float32")
    shelf.begin(2, 1.0)
    row = torch.rand(shelf.shape)
    assert torch.equal(shelf.put("ab" * 32, row), row) and torch.equal(shelf.get("ab" * 32), row)  # type: ignore[arg-type]
    (entry,) = shelf.folder.glob("??/*.npy")
    data = entry.read_bytes()
    for broken in (b"", data[:50], data[:-1], b"\0" * len(data), encoded(picture(1))):
        entry.write_bytes(broken)
        assert shelf.get("ab" * 32) is None
    np.save(entry, np.zeros((2, 2), np.float32))
    assert shelf.get("ab" * 32) is None
    half = features.Shelf(tmp_path, Small(), LOOK, "no")
    with pytest.raises(DataError, match="beyond what float16 holds; take --cache-type float32"):
        half.put("ab" * 32, 70_000 * torch.ones(half.shape))


def test_a_kill_while_an_entry_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = features.Shelf(tmp_path, Small(), LOOK, "no")
    shelf.begin(2, 1.0)

    def dies(out: Any, _: Any) -> None:
        out.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(features.np, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        shelf.put("ab" * 32, torch.rand(shelf.shape))
    assert shelf.get("ab" * 32) is None and not list(shelf.folder.glob("??/*.npy"))


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = features.Shelf(tmp_path, Small(), LOOK, "no")
    gone = subprocess.Popen(["true"])
    gone.wait()
    file = shelf.folder / "ab" / "entry.npy"
    file.parent.mkdir(parents=True)
    mine, other = aside.beside(file), file.with_name(f".entry.npy.elsewhere.{gone.pid}.part")
    monkeypatch.setattr(os, "getpid", lambda: gone.pid)
    left = aside.beside(file)
    for each in (mine, other, left, file):
        each.write_bytes(b"half")
    shelf.begin(2, 1.0)
    assert sorted(file.parent.iterdir()) == sorted([mine, other, file])


def test_a_full_disk_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shelf = features.Shelf(tmp_path, Small(), LOOK, "no", "float32")
    shelf.begin(2, 1.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.np, "save", full)
    row = torch.rand(shelf.shape)
    assert torch.equal(shelf.put("ab" * 32, row), row) and torch.equal(shelf.put("cd" * 32, row), row)
    assert capsys.readouterr().err.count("no more features are kept") == 1


def test_another_encoder_size_look_or_precision_has_a_folder_of_its_own(tmp_path: Path) -> None:
    shelves = [
        features.Shelf(tmp_path, Small(), LOOK, "no"),
        features.Shelf(tmp_path, Small(1), LOOK, "no"),
        features.Shelf(tmp_path, Small(), Look(24, LOOK.mean, LOOK.std), "no"),
        features.Shelf(tmp_path, Small(), Look(16, LOOK.std, LOOK.mean), "no"),
        features.Shelf(tmp_path, Small(), LOOK, "bf16"),
        features.Shelf(tmp_path, Small(), LOOK, "no", "float32"),
        features.Shelf(tmp_path, hardware.held(Small().requires_grad_(False), "bf16"), LOOK, "no"),
    ]
    assert len({shelf.folder for shelf in shelves}) == len(shelves)
    assert features.Shelf(tmp_path, Small(), LOOK, "no").folder == shelves[0].folder


def test_rows_that_are_known_and_those_that_are_not_come_in_their_places(tmp_path: Path) -> None:
    write_pictures(tmp_path, *[f"{i}.png" for i in range(5)])
    found = [Record(f"{i}.png", File(tmp_path / f"{i}.png"), ["it"]) for i in range(5)]
    model = Small()
    shelf = features.Shelf(tmp_path / "cache", model, LOOK, "no", "float32")
    shelf.begin(5, 1.0)
    eye, plain = features.Eye(model, torch.device("cpu"), shelf), features.Eye(model, torch.device("cpu"))

    def looked(which: list[int], memory: features.Shelf | None) -> Part:
        looker = pictures.Looker(Sight(LOOK, memory=memory), lambda _: found[0])
        one = looker.looked([found[i] for i in which], [random.Random(0)] * len(which))
        return Part(one.pixels, None, one.bad, one.kept)

    for which, fresh in (([1, 3, 1, 4], 4), ([0, 1, 2, 3], 2), ([3, 2, 1, 0], 0), ([4, 4, 4, 4], 0)):
        part = looked(which, shelf)
        assert len(part.pixels) == fresh
        assert torch.equal(eye(part), plain(looked(which, None)))
    assert [n for n in model.calls if n] == [4] * len(model.calls), "a batch has always one size"
