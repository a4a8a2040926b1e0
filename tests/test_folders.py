"""Folders as people have them: captions in tables and text files, parts under other names, files of other
kinds, broken EXIF, colour profiles. What is not used is said."""

import io
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from memcontrol.commands.init import list_warnings, propose_study
from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.data.split import load_parts
from memcontrol.reading.decode import decode_image

N = 32


def fill(folder, n=N, start=0, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + n):
        pixels = np.random.default_rng(i).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24), Image.NEAREST).save(folder / f"{i:03}.{ending}")
    return folder


def load(folder, **keys):
    """Captions by name, the parts, and what was said."""
    said = []
    config = load_config({"name": "a", "data": {"path": str(folder), **keys}})
    split = load_parts(config.data, 32, 0, said.append)
    captions = {one.name: one.caption for images in split.parts.values() for one in images.records}
    return captions, split.parts, "; ".join(said)


def refused(folder, match, **keys):
    with pytest.raises(MemControlError, match=match) as caught:
        load(folder, **keys)
    assert "\n" not in str(caught.value)


def write_rows(column, separator=","):
    return f"file_name{separator}{column}\n" + "".join(f"{i:03}.png{separator}c {i}\n" for i in range(N))


def write_lines(column):
    return "".join(json.dumps({"file_name": f"{i:03}.png", column: f"c {i}"}) + "\n" for i in range(N))


TABLES = {
    "caption": {"metadata.jsonl": write_lines("caption")},
    "prompt": {"metadata.jsonl": write_lines("prompt")},
    "another case": {"Metadata.CSV": write_rows(" Text ")},
    "captions.csv": {"captions.csv": write_rows("description")},
    "semicolons": {"metadata.csv": write_rows("text", ";")},
    "tabs": {"metadata.tsv": write_rows("text", "\t")},
    "UTF-16": {"metadata.csv": write_rows("text").encode("utf-16")},
    "a list": {
        "metadata.json": json.dumps([{"file_name": f"{i:03}.png", "text": f"c {i}"} for i in range(N)])
    },
    "a mapping": {"metadata.json": json.dumps({f"{i:03}.png": {"caption": f"c {i}"} for i in range(N)})},
    "text files": {f"{i:03}.txt": f"c {i}\n" for i in range(N)},
    ".caption files": {f"{i:03}.caption": f"\ufeffc {i}" for i in range(N)},
}


@pytest.mark.parametrize("kind", TABLES)
def test_captions_are_read_however_they_are_stored(tmp_path, kind):
    fill(tmp_path)
    for name, content in TABLES[kind].items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    captions, _, said = load(tmp_path)
    assert captions["005.png"] == "c 5" and len(set(captions.values())) == N and not said


def test_the_column_of_captions_can_be_named_and_others_are_said(tmp_path):
    fill(tmp_path)
    rows = "".join(f"{i:03}.png,a {i},b {i},F{i}\n" for i in range(N))
    (tmp_path / "metadata.csv").write_text("file_name,caption,text,finding\n" + rows)
    captions, _, said = load(tmp_path)
    assert captions["003.png"] == "b 3" and "'caption' is not used (data.caption names another)" in said
    assert load(tmp_path, caption="Finding")[0]["003.png"] == "F3"
    refused(tmp_path, "data.caption is 'label': no column .*which have file_name, caption", caption="label")
    (tmp_path / "metadata.csv").write_text("file_name,finding\n000.png,x\n")
    captions, _, said = load(tmp_path)
    assert not any(captions.values()) and "columns file_name, finding and none of text" in said


TEXTS = {
    "a line break in quotes": '"FINDINGS: clear.\nIMPRESSION: normal."',
    "commas in quotes": '"frontal, adult"',
    "U+2028, NEL and a form feed": "a\u2028b\x85c\x0cd",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_kept_as_they_are(tmp_path, kind):
    fill(tmp_path)
    rows = "".join(f"{i:03}.png,{TEXTS[kind]}\n" for i in range(N))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows, encoding="utf-8")
    assert set(load(tmp_path)[0].values()) == {TEXTS[kind].strip('"')}
    (tmp_path / "metadata.csv").unlink()
    lines = "".join(
        json.dumps({"file_name": f"{i:03}.png", "text": TEXTS[kind]}, ensure_ascii=False) + "\n"
        for i in range(N)
    )
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    assert set(load(tmp_path)[0].values()) == {TEXTS[kind]}


def one_caption(value):
    return "".join(json.dumps({"file_name": f"{i:03}.png", "text": value}) + "\n" for i in range(N))


def test_several_captions_are_drawn_from_by_the_seed_and_nothing_is_nan(tmp_path):
    fill(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(one_caption(["a cat", "one cat", None]))
    captions, _, said = load(tmp_path)
    assert set(captions.values()) == {"a cat", "one cat"} and captions == load(tmp_path)[0]
    assert f"{N} images have several captions: each use of one in training draws one of them" in said
    records = [record for images in load(tmp_path)[1].values() for record in images.records]
    assert all({record.caption, *record.further} == {"a cat", "one cat"} for record in records)
    for nothing in (float("nan"), "NaN", "<NA>", "None", "N/A", "NULL", "null", "nan", "n/a", "NONE"):
        (tmp_path / "metadata.jsonl").write_text(one_caption(nothing))
        assert set(load(tmp_path)[0].values()) == {""}
    (tmp_path / "metadata.jsonl").write_text(one_caption([{"en": "a cat"}]))
    refused(tmp_path, "metadata.jsonl, row 1 has captions by name in 'text' \\(en\\)")
    rows = [{"file_name": f"{i:03}.png", "text": "", "caption": f"c {i}"} for i in range(N)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(tmp_path)[0]["003.png"] == "c 3"


def test_what_is_ambiguous_is_refused_with_its_place(tmp_path):
    fill(tmp_path)
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,text\n000.png,frontal, no finding\n")
    refused(tmp_path, r"row 1 \(line 2\) has more fields than there are columns; put texts that hold ','")
    table.write_text("file_name,text\n000.png,a\n001.png,b\n000.png,c\n")
    refused(tmp_path, "'000.png' has one caption in metadata.csv, row 1 and another in metadata.csv, row 3")
    table.write_text("file_name,text\n000.png,a\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "b"}\n')
    refused(tmp_path, "one caption in metadata.csv, row 1 and another in metadata.jsonl, row 1")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "001.png", "text": {"en": "a", "de": "b"}}\n')
    refused(tmp_path, r"metadata.jsonl, row 1 has captions by name in 'text' \(en, de\); put the one")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "000.txt").write_text("another")
    refused(tmp_path, "one caption in metadata.csv, row 1 and another in its text file")
    (tmp_path / "000.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "000.txt cannot be read: it is not UTF-8")


def test_tables_may_name_images_by_whole_paths_and_not_outside(tmp_path):
    images = fill(tmp_path / "images")
    (images / "metadata.jsonl").write_text(
        json.dumps({"file_name": str(images / "003.png"), "text": "t"}) + "\n"
    )
    captions, _, said = load(images)
    assert captions["003.png"] == "t" and f"{N - 1} of {N} images have no caption" in said
    fill(tmp_path / "other")
    (images / "metadata.jsonl").write_text('{"file_name": "../other/003.png", "text": "t"}\n')
    refused(images, "row 1 names '../other/003.png', which lies outside the folder")


def test_rows_and_text_files_of_no_image_are_counted(tmp_path):
    fill(tmp_path)
    (tmp_path / "metadata.csv").write_text(write_rows("text") + "gone.png,x\n")
    (tmp_path / "notes.txt").write_text("x")
    said = load(tmp_path)[2]
    assert (
        f"1 rows of the metadata name images that are not there, the first being metadata.csv, row {N + 1}"
        in said
    )
    assert "1 text files are of no image, such as notes.txt" in said


def test_kohyas_folders_name_a_subject_and_ask_for_no_repeats(tmp_path):
    fill(tmp_path / "10_sks dog")
    captions, _, said = load(tmp_path)
    assert set(captions.values()) == {"sks dog"}
    assert "the number in a folder's name such as '10_sks dog' is not used: all images are used alike" in said
    for i in range(N):
        (tmp_path / "10_sks dog" / f"{i:03}.txt").write_text(f"c {i}")
    assert load(tmp_path)[0]["10_sks dog/005.png"] == "c 5"
    fill(tmp_path / "2_dog", 4, 100)
    (tmp_path / "2_dog" / "100.txt").write_text("a dog")
    refused(tmp_path, "'10_sks dog', '2_dog' ask for different repeats")
    (tmp_path / "2_dog" / "100.txt").unlink()
    refused(tmp_path, "'10_sks dog', '2_dog' ask for different repeats")


def test_numbers_that_tell_folders_apart_are_kept(tmp_path):
    fill(tmp_path / "18_years", 16)
    fill(tmp_path / "19_years", 16, 100)
    assert set(load(tmp_path)[0].values()) == {"18_years", "19_years"}
    fill(tmp_path / "2019_june", 4, 200)
    fill(tmp_path / "0_cat", 4, 300)
    fill(tmp_path, 3, 400)
    captions, _, said = load(tmp_path)
    assert set(captions.values()) == {"18_years", "19_years", "2019_june", "0_cat", ""}
    assert f"3 of {len(captions)} images have no caption" in said


def test_folders_of_people_are_no_captions(tmp_path):
    for who in range(12):
        fill(tmp_path / f"patient{who:03}", 4, 10 * who)
    for rule in (r"(patient\d+)", "folder"):
        captions, _, said = load(tmp_path, group=rule)
        assert (
            set(captions.values()) == {""} and "names are those of data.group's groups, and are not" in said
        )


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Holdout", "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("training", "validation", "testing"),
        ("train", "dev", "test"),
        ("train_images", "val_images", "test_images"),
        ("train2017", "val2017", "test2017"),
        ("trainset", "Validation set", "test-data "),
    ],
    ids="/".join,
)
def test_parts_are_known_by_the_names_that_people_use(tmp_path, names):
    for start, (name, n) in zip((0, 100, 200), zip(names, (20, 12, 10))):
        fill(tmp_path / name, n, start)
    captions, parts, _ = load(tmp_path)
    assert {part: len(images) for part, images in parts.items()} == {"train": 20, "holdout": 12, "test": 10}
    assert all(record.name.startswith(f"{names[0]}/") for record in parts["train"].records)
    assert set(captions.values()) == {""}


@pytest.mark.parametrize("below", ["images/{}", "{}/cat"])
def test_parts_below_other_folders_are_not_pooled(tmp_path, below):
    for start, name in enumerate(("train", "val", "test")):
        for kind in ("dog", "cow"):
            place = below.format(name) if "images" in below else f"{kind}/{name}"
            fill(tmp_path / place, 12, 100 * start + (50 if kind == "cow" else 0))
    refused(tmp_path, "/test/, .*/train/, .*/val/: parts are folders at its top; move them there")


@pytest.mark.parametrize("column", ["partition", "Subset"])
def test_a_column_of_another_name_makes_parts_where_it_holds_nothing_else(tmp_path, column):
    fill(tmp_path)
    words = ["train", "val", "test"]
    rows = [f"{i:03}.png,c {i},{words[i % 3]}\n" for i in range(N)]
    (tmp_path / "metadata.csv").write_text(f"file_name,text,{column}\n" + "".join(rows))
    _, parts, _ = load(tmp_path)
    assert {record.name for record in parts["test"].records} == {f"{i:03}.png" for i in range(2, N, 3)}
    rows[5] = "005.png,c 5,left lung\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,text,{column}\n" + "".join(rows))
    assert len(load(tmp_path, train=12, holdout=10, test=10)[1]["train"]) == 12  # so it is none of parts


def test_a_column_makes_parts_and_what_is_ambiguous_is_refused(tmp_path):
    fill(tmp_path)
    words = ["Training", "valid", "test", ""]
    rows = "".join(f"{i:03}.png,c {i},{words[i % 3] if i < 30 else ''}\n" for i in range(N))
    (tmp_path / "metadata.csv").write_text("file_name,text,Split\n" + rows)
    _, parts, said = load(tmp_path)
    assert {record.name for record in parts["holdout"].records} == {f"{i:03}.png" for i in range(1, 30, 3)}
    assert "2 images are left out: they are in none of the parts, such as 030.png" in said
    (tmp_path / "metadata.csv").write_text("file_name,split\n000.png,train\n001.png,fold3\n")
    refused(tmp_path, "metadata.csv, row 2 has 'fold3' in column 'split'; allowed: train, training")
    (tmp_path / "metadata.csv").write_text("file_name,split\n000.png,train\n001.png,test\n")
    refused(tmp_path, "column 'split' of metadata.csv has train, test but no holdout")
    (tmp_path / "metadata.csv").unlink()
    fill(tmp_path / "val", 2, 50)
    fill(tmp_path / "dev", 2, 60)
    refused(tmp_path, "has dev/ and val/, which both are the part 'holdout'")


@pytest.mark.parametrize("ending", ["avif", "jp2", "jfif", "jpe", "ppm", "tga"])
def test_what_pillow_reads_is_used(tmp_path, ending):
    fill(fill(tmp_path), 8, 100, ending)
    assert len(load(tmp_path)[0]) == N + 8
    (tmp_path / f"100.{ending}").rename(tmp_path / "100.scan")
    if ending != "tga":  # which nothing but its name tells
        assert len(load(tmp_path)[0]) == N + 8


def test_what_is_left_out_is_counted_by_kind(tmp_path):
    fill(tmp_path / "cat")
    for ending in ("nii.gz", "bin"):
        (tmp_path / f"x.{ending}").write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to("/nowhere/x.png")
    fill(tmp_path.parent / f"{tmp_path.name} store", 16, 100)
    (tmp_path / "dog").symlink_to(tmp_path.parent / f"{tmp_path.name} store")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    captions, parts, said = load(tmp_path)
    assert len(captions) == N + 16 and set(captions.values()) == {"cat", "dog"}
    assert "1 file is left out: a link to a folder that is read already, such as cat/again" in said
    for reason in (".nii.gz is not read here (pip install nibabel, and", ".bin is no known"):
        assert f"1 file is left out: {reason}" in said
    assert "1 file is left out: a link that leads nowhere, such as gone.png" in said


_WITHOUT = """
import sys
for name in ("pillow_heif", "pillow_jxl", "pydicom"):
    sys.modules[name] = None
from pathlib import Path
from memcontrol.reading.folder import list_folder
for line in list_folder(Path(sys.argv[1])).describe_left_out():
    print(line)
"""
_DECODE = """
import sys
import numpy as np
from pathlib import Path
from memcontrol.reading.decode import decode_image
sys.stdout.buffer.write(np.asarray(decode_image(Path(sys.argv[1]))).tobytes())
"""


def run_script(script, path):
    return subprocess.run([sys.executable, "-c", script, path], stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize(
    "plugin, ending, how",
    [("pillow_heif", "heic", {"quality": 90}), ("pillow_jxl", "jxl", {"lossless": True})],
)
def test_a_plugin_reads_in_a_process_that_lists_no_folder(tmp_path, plugin, ending, how):
    module = pytest.importorskip(plugin, reason="pip install '.[formats]'")
    if plugin == "pillow_heif":
        module.register_heif_opener()
    low = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(low).resize((64, 64)).save(tmp_path / f"x.{ending}", **how)
    with Image.open(tmp_path / f"x.{ending}") as stored:
        wanted = np.asarray(stored).tobytes()
    assert run_script(_DECODE, tmp_path / f"x.{ending}") == wanted


def test_what_would_read_a_file_is_named_where_it_is_missing(tmp_path):
    for ending in ("heic", "jxl", "dcm"):
        (tmp_path / f"x.{ending}").write_bytes(b"x")
    said = run_script(_WITHOUT, tmp_path).decode()
    for reason in (
        ".dcm is not read here (pip install 'memcontrol[dicom]')",
        ".heic is not read here (pip install 'memcontrol[formats]')",
        ".jxl is not read here (pip install 'memcontrol[formats]')",
    ):
        assert f"1 file is left out: {reason}" in said


def make_exif(*entries):
    """An EXIF block of tags as they are given (CIPA DC-008, little endian)."""
    rows, body, base = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, data in sorted(entries):
        value = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack("<I", base + len(body))
        body += data if len(data) > 4 else b""
        rows += struct.pack("<HHI", tag, kind, count) + value
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", 0) + body


ODD = {
    "resolution as text": (0x11A, 2, 3, b"72\0"),
    "width as text": (0x100, 2, 4, b"640\0"),
    "negative resolution": (0x11A, 10, 1, struct.pack("<ii", -1, 2)),
}


@pytest.mark.parametrize("field", ODD)
def test_an_odd_exif_field_costs_nothing(tmp_path, field):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "x.jpg", exif=make_exif((0x112, 3, 1, struct.pack("<H", 6)), ODD[field]))
    assert decode_image(tmp_path / "x.jpg").size == (24, 32)
    image.save(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense")
    assert decode_image(tmp_path / "x.jpg").size == (32, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_as_pillow_turns_it(tmp_path, orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    for ending in ("png", "tif"):
        exif = Image.Exif()
        exif[0x112] = orientation
        image.save(tmp_path / f"x.{ending}", exif=exif)
        with Image.open(tmp_path / f"x.{ending}") as stored:
            wanted = np.asarray(ImageOps.exif_transpose(stored))
        assert (np.asarray(decode_image(tmp_path / f"x.{ending}")) == wanted).all()


def test_colour_profiles_are_brought_to_srgb_and_broken_ones_ignored(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    swapped = swap_red_and_green(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image.save(tmp_path / "x.png", icc_profile=swapped)
    wanted = ImageCms.profileToProfile(
        image, ImageCms.ImageCmsProfile(io.BytesIO(swapped)), ImageCms.createProfile("sRGB")
    )
    found = np.asarray(decode_image(tmp_path / "x.png")).astype(int)
    assert (found == np.asarray(wanted)).all() and np.abs(found - np.asarray(image)).max() > 20
    clear = image.convert("RGBA")
    clear.save(tmp_path / "x.png", icc_profile=swapped)
    assert (np.asarray(decode_image(tmp_path / "x.png")) == np.asarray(wanted)).all()
    image.save(tmp_path / "x.png", icc_profile=b"nonsense")
    assert (np.asarray(decode_image(tmp_path / "x.png")) == np.asarray(image)).all()


def swap_red_and_green(profile):
    """A profile whose first two primaries have changed places, under another name."""
    places = {
        profile[i : i + 4]: i for i in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)
    }
    content = bytearray(profile)
    content[places[b"rXYZ"] : places[b"rXYZ"] + 4], content[places[b"gXYZ"] : places[b"gXYZ"] + 4] = (
        b"gXYZ",
        b"rXYZ",
    )
    for name in ("sRGB", "s\0R\0G\0B", "\0s\0R\0G\0B"):
        content = content.replace(name.encode(), name.replace("s", "t", 1).encode())
    return bytes(content)


def test_parquet_is_read_and_a_broken_one_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    fill(tmp_path)
    names = [f"{i:03}.png" for i in range(N)]
    table = pyarrow.table({"file_name": names, "caption": [None, *(f"c {i}" for i in range(1, N))]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    captions, _, said = load(tmp_path)
    assert captions["005.png"] == "c 5" and captions["000.png"] == "" and "1 of 32 images" in said
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    refused(tmp_path, "metadata.parquet cannot be read: ")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("metadata.csv", "file_name,text,text\n000.png,a,b\n", "has the column 'text' 2 times; give each"),
        ("metadata.csv", "file_name, Text,text\n000.png,a,b\n", "has the column 'text' 2 times"),
        (
            "metadata.csv",
            'file_name,text\n000.png,a\n001.png,"b\n002.png,c\n',
            "row 2, from line 3 on: unexpected end of data; each quote that begins a text needs one",
        ),
        (
            "metadata.csv",
            f"file_name,text\n000.png,a\n001.png,{'w' * 200_000}\n",
            r"row 2, from line 3 on: field larger than field limit \(131072\); shorten the text",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "000.png", "text": "a"}\n\n{bad\n',
            "line 3 is no JSON .*column 2.; each is one such as",
        ),
        ("metadata.jsonl", '{"file_name": "000.png", "text": "a", "text": "b"}', "has 'text' 2 times"),
        ("captions.json", '{"000.png": "a", "000.png": "b"}', "an object has '000.png' 2 times"),
        ("captions.json", '{"000.png": {"text": {"en": "a"}}}', "captions by name in 'text'"),
    ],
)
def test_what_is_broken_in_a_table_is_named_with_its_place(tmp_path, name, content, words):
    fill(tmp_path)
    (tmp_path / name).write_text(content)
    refused(tmp_path, f"{name}.*{words}" if "by name" not in words else words)


def test_columns_without_a_name_may_be_several_and_tables_without_rows_are_said(tmp_path):
    fill(tmp_path)
    rows = "".join(f"{i:03}.png,c {i},,\n" for i in range(N))
    (tmp_path / "metadata.csv").write_text("file_name,text,,\n" + rows)
    assert load(tmp_path)[0]["003.png"] == "c 3"
    for content in ("", "file_name,text\n"):
        (tmp_path / "metadata.csv").write_text(content)
        assert "metadata.csv: a table without rows" in load(tmp_path)[2]


def find_source(folder):
    return load_parts(load_config({"name": "a", "data": str(folder)}).data, 32, 0).found["captions"]


def test_the_source_of_captions_is_what_a_person_has(tmp_path):
    fill(tmp_path)
    plain = {f"{i:03}.png": f"c {i}" for i in range(N)}
    (tmp_path / "captions.json").write_text(json.dumps(plain))
    assert find_source(tmp_path) == "captions.json"
    several = {name: {"caption": text} for name, text in plain.items()}
    (tmp_path / "captions.json").write_text(json.dumps(several))
    assert find_source(tmp_path) == "column 'caption' of captions.json"


def test_what_is_not_used_is_counted_in_split_json_by_kind(tmp_path):
    fill(tmp_path)
    rows = write_rows("text").replace("003.png,c 3", "003.png,NULL")
    (tmp_path / "metadata.csv").write_text(rows + "gone.png,x\nfar.png,y\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "x.bin").write_bytes(b"x")
    config = load_config({"name": "a", "data": str(tmp_path)})
    assert load_parts(config.data, 32, 0).found["left_out"] == {
        ".bin is no known picture": 1,
        "text file of no image": 1,
        "row of the metadata whose image is not there": 2,
        "image without a caption": 1,
    }


def test_pages_without_captions_are_counted_as_the_images_that_they_are(tmp_path):
    fill(tmp_path)
    pages = [Image.open(tmp_path / f"{i:03}.png").rotate(90) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "a.txt").write_text("a page")
    captions, _, said = load(tmp_path, pages="all")
    assert len(captions) == N + 3 and f"{N} of {N + 3} images have no caption" in said


def test_kohyas_regularization_images_are_left_out_by_name(tmp_path):
    fill(tmp_path / "a" / "img" / "10_sks dog")
    fill(tmp_path / "a" / "reg" / "1_dog", 8, 100)
    (tmp_path / "a" / "reg" / "1_dog" / "100.txt").write_text("a dog")
    captions, _, said = load(tmp_path / "a")
    assert len(captions) == N and set(captions.values()) == {"sks dog"}
    assert "9 files are left out: kohya's regularization images, which are not trained on" in said
    fill(tmp_path / "b" / "10_sks dog")
    fill(tmp_path / "b" / "1_reg", 8, 100)
    assert set(load(tmp_path / "b")[0].values()) == {"sks dog"}
    fill(tmp_path / "c" / "reg")
    fill(tmp_path / "c" / "cat", 8, 100)
    assert set(load(tmp_path / "c")[0].values()) == {"reg", "cat"}  # classes


def propose(folder, tmp_path):
    """What init says of a folder."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
    found = propose_study(str(folder), out, "a", "tiny", lambda title, done, total: None)
    return "; ".join([found.text, *list_warnings(found.seen)])


def test_init_says_what_a_search_leaves_out_of_parts_that_are_made(tmp_path):
    folder = tmp_path / "x"
    for start, name in enumerate(("train", "val", "test")):
        fill(folder / name, 12, 100 * start)
    fill(folder, 3, 300)
    said = propose(folder, tmp_path)
    assert "3 images are left out: they are in none of the parts, such as 300.png" in said
    (folder / "train" / "again.png").write_bytes((folder / "train" / "001.png").read_bytes())
    said = propose(folder, tmp_path)
    assert "the same pixels, which stay in one part: train/001.png, train/again.png" in said
    assert "twins: drop" not in said and "13 train, 12 holdout, 12 test" in said
    (folder / "test" / "same.png").write_bytes((folder / "train" / "000.png").read_bytes())
    said = propose(folder, tmp_path)
    assert "the same pixels, of which test/same.png is left out: test/same.png, train/000.png" in said
    assert "the same pixels, which stay in one part: train/001.png, train/again.png" in said
    assert "2 exact copies; 1 left out, as twins of images in another part" in said
    rows = [f"{i:03}.png,{['train', 'val', 'test', ''][i % 4]}\n" for i in range(48)]
    (fill(tmp_path / "y", 48) / "metadata.csv").write_text("file_name,split\n" + "".join(rows))
    assert "12 images are left out: they are in none of the parts" in propose(tmp_path / "y", tmp_path)


def test_init_says_which_images_are_plain_and_what_is_left_out_where_the_rest_is_too_few(tmp_path):
    folder = fill(tmp_path / "x")
    for i in range(4):
        Image.new("RGB", (24, 24), (i, i, i)).save(folder / f"black {i}.png")
    assert "4 images are plain (black frames, say)" in propose(folder, tmp_path)
    few = fill(tmp_path / "y", 23)
    for i in range(2):
        (few / f"gone{i}.png").symlink_to("/nowhere/x.png")
    (few / "x.bin").write_bytes(b"x")
    with pytest.raises(
        MemControlError,
        match=r"23 different images are too few.*; left out: 2 \(a link that leads nowhere\), 1",
    ):
        propose(few, tmp_path)
    for name in ("train", "val", "test"):
        fill(tmp_path / "z" / name, 12 if name != "val" else 3, len(name) * 100)
    (tmp_path / "z" / "x.bin").write_bytes(b"x")
    with pytest.raises(MemControlError, match=r"holdout has 3 images .*; left out: 1 \(.bin is no known"):
        propose(tmp_path / "z", tmp_path)


def test_a_folder_whose_name_is_no_utf8_is_read_and_its_study_written(tmp_path):
    folder = fill(tmp_path / os.fsdecode(b"bad\xff"))
    (folder / os.fsdecode(b"x\xff.png")).write_bytes((folder / "000.png").read_bytes())
    said = propose(folder, tmp_path)
    assert "1 file is left out: the name is not UTF-8" in said
    (study,) = tmp_path.glob("*.yaml")
    assert load_config(study).data.path == str(folder)
