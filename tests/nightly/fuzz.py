"""Files that are broken at random: a result, or one line, never anything else.

`[FUZZED_IMAGES=10000] [FUZZED_TABLES=1000] python -m pytest tests/nightly/fuzz.py`
"""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_dicom import RAMP, write

from memcontrol.core.errors import MemControlError
from memcontrol.data.index import examine_files
from memcontrol.reading.captions import find_captions
from memcontrol.reading.decode import decode_image
from memcontrol.reading.folder import list_folder
from memcontrol.reading.parts import assign_parts
from memcontrol.reading.tables import read_tables

N_IMAGES = int(os.environ.get("FUZZED_IMAGES", "10000"))
N_TABLES = int(os.environ.get("FUZZED_TABLES", "1000"))
FORMATS = (
    "PNG",
    "JPEG",
    "TIFF",
    "GIF",
    "BMP",
    "WEBP",
    "AVIF",
    "JPEG2000",
    "PPM",
    "TGA",
    "16-bit PNG",
    "DICOM",
)


def make_file(kind, folder):
    pixels = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    if kind == "DICOM":
        return write(folder / "x.dcm", np.round(RAMP * 4095), WindowCenter=2000, WindowWidth=900).read_bytes()
    buffer = io.BytesIO()
    if kind == "16-bit PNG":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 16).save(buffer, "PNG")
        return buffer.getvalue()
    exif = Image.Exif()
    exif[0x112], exif[0x131] = 6, "made by hand"
    extra = {"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF") else {}
    Image.fromarray(pixels).save(buffer, kind, **extra)
    return buffer.getvalue()


def mutate(content, rng):
    """Some bytes changed, cut off, repeated, or taken out."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        if len(found) < 4:
            break
        at, n = int(rng.integers(len(found))), int(rng.integers(1, 9))
        way = rng.integers(5)
        if way == 0:
            found[at : at + n] = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
        elif way == 1:
            found[at] ^= 1 << int(rng.integers(8))
        elif way == 2:
            del found[at : at + n]
        elif way == 3:
            found[at:at] = found[at : at + n]
        else:
            del found[max(at, len(found) // 2) :]
    return bytes(found)


def examine(path):
    """Raises what cannot be read."""
    for error in examine_files(path.parent, [path.name], pages="all").failures.values():
        raise error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_broken_image_is_read_or_refused_in_a_line(kind, tmp_path):
    content, path = make_file(kind, tmp_path), tmp_path / "broken"
    for number in range(N_IMAGES // len(FORMATS)):
        path.write_bytes(mutate(content, np.random.default_rng([FORMATS.index(kind), number])))
        for read in (decode_image, examine):
            try:
                read(path)
            except MemControlError as error:
                assert "\n" not in str(error), (kind, number)


LINES = [{"file_name": f"{i}.png", "text": f"a caption, {i}", "split": "train", "n": i / 3} for i in range(8)]
TABLES = {
    "metadata.jsonl": "\n".join(map(json.dumps, LINES)),
    "metadata.json": json.dumps(LINES),
    "metadata.csv": "file_name,text,split\n"
    + "".join(f'{i}.png,"a ""caption"", {i}",val\n' for i in range(8)),
    "captions.tsv": "file_name\ttext\n" + "".join(f"{i}.png\ta caption {i}\n" for i in range(8)),
    "0.txt": "a caption\nof two lines",
}


@pytest.mark.parametrize("name", TABLES)
def test_broken_metadata_is_read_or_refused_in_a_line(name, tmp_path):
    for i in range(8):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    for number in range(N_TABLES // len(TABLES)):
        rng = np.random.default_rng([list(TABLES).index(name), number])
        (tmp_path / name).write_bytes(mutate(TABLES[name].encode(), rng))
        try:
            listing = list_folder(tmp_path)
            tables = read_tables(tmp_path, listing.tables)
            find_captions(tmp_path, listing.images, listing.texts, tables, None)
            assign_parts(tmp_path, listing.images, tables)
        except MemControlError as error:
            assert "\n" not in str(error), (name, number)
