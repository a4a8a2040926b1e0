"""DICOM against pydicom's own way, by kind, bits and sign; patients as groups; what is not read is a line."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from commands import run
from PIL import Image
from pydicom.data import get_testdata_files
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.data.index import examine_files
from memcontrol.data.split import load_parts
from memcontrol.reading.decode import decode_image
from memcontrol.reading.folder import list_folder

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


def write(path, values, bits=12, kind="MONOCHROME2", patient="", **tags):
    """A file of whole numbers [H, W]."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.PhotometricInterpretation, data.SamplesPerPixel = patient, kind, 1
    data.Rows, data.Columns = values.shape
    signed = bool((values < 0).any())
    data.BitsAllocated, data.BitsStored, data.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    data.PixelRepresentation = int(signed)
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.astype(f"<{'i' if signed else 'u'}{data.BitsAllocated // 8}").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def decode(path):
    return np.asarray(decode_image(path)).astype(float)[..., 0]


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_recorded_bits_are_the_range_and_monochrome1_is_inverted(tmp_path, bits, kind):
    path = write(tmp_path / "a.dcm", np.round(RAMP * (2**bits - 1)), bits, kind)
    wanted = 255 * (RAMP if kind == "MONOCHROME2" else 1 - RAMP)
    assert np.abs(decode(path) - wanted).max() <= 1.01
    no_ending = path.rename(tmp_path / "IM0001")
    assert np.abs(decode(no_ending) - wanted).max() <= 1.01


def test_signed_rescaled_and_windowed_values_by_hand(tmp_path):
    """CT-like: Hounsfield units of a window from -150 to 250 (DICOM PS3.3, C.11.2.1.2)."""
    stored = np.round(RAMP * 4095)
    path = write(
        tmp_path / "a.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=50, WindowWidth=400
    )
    wanted = 255 * (((stored - 1024 - 49.5) / 399) + 0.5).clip(0, 1)
    assert np.abs(decode(path) - wanted).max() <= 0.51
    path = write(tmp_path / "b.dcm", np.round(RAMP * 4095) - 2048, 12)
    assert np.abs(decode(path) - 255 * RAMP).max() <= 1.01


def list_monochrome():
    found = []
    for name in get_testdata_files("*.dcm"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(name, stop_before_pixels=True, force=True)
        is_grey = str(data.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
        if is_grey and "NumberOfFrames" not in data and is_inside_the_wheel(name):
            found.append(name)
    return sorted(found)


def is_inside_the_wheel(name):
    return Path(pydicom.__file__).parent in Path(name).parents


@pytest.mark.filterwarnings("ignore")
def test_files_of_pydicoms_wheel_are_its_values_on_a_scale(tmp_path):
    """Each is an affine map of apply_voi_lut's values, falling for MONOCHROME1, to a grey."""
    n_compared = 0
    for name in list_monochrome():
        data = pydicom.dcmread(name, force=True)
        try:
            values = np.asarray(apply_voi_lut(apply_modality_lut(data.pixel_array, data), data), float)
        except Exception:  # what needs a plugin that is not here, or is broken on purpose
            with pytest.raises(MemControlError):
                decode_image(Path(name))
            continue
        found = decode(Path(name))
        if np.ptp(found) < 20:
            continue
        slope, offset = np.polyfit(values.ravel(), found.ravel(), 1)
        inside = (found > 0) & (found < 255)
        assert np.abs(slope * values + offset - found)[inside].max(initial=0) <= 1.0, name
        assert (slope < 0) == (data.PhotometricInterpretation == "MONOCHROME1"), name
        n_compared += 1
    assert n_compared >= 5


def test_patients_are_groups_under_names_that_say_nothing(tmp_path):
    for i in range(48):
        pixels = np.random.default_rng(i).integers(0, 4096, (24, 24))
        write(tmp_path / "x" / f"{i:03}.dcm", pixels, patient=f"P{i // 2}")
    config = load_config({"name": "a", "data": {"path": str(tmp_path / "x"), "group": "PatientID"}})
    split = load_parts(config.data, 32, 0)
    homes = {}
    for part, images in split.parts.items():
        for record in images.records:
            assert record.group.startswith("patient ") and "P" not in record.group
            homes.setdefault(record.group, set()).add(part)
    assert len(homes) == 24 and all(len(parts) == 1 for parts in homes.values())
    for path in sorted((tmp_path / "x").iterdir()):  # a folder for each patient is no caption
        home = tmp_path / "by patient" / f"P{int(path.stem) // 2}"
        home.mkdir(parents=True, exist_ok=True)
        (home / path.name).hardlink_to(path)
    apart = load_config({"name": "a", "data": {"path": str(tmp_path / "by patient"), "group": "PatientID"}})
    split = load_parts(apart.data, 32, 0)
    assert {caption for images in split.parts.values() for caption in images.captions} == {""}
    said = run("init", tmp_path / "x", cwd=tmp_path, check=True)
    assert "group: PatientID" in (tmp_path / "x.yaml").read_text().replace('"', ""), said.stderr


def test_frames_are_refused_or_images_of_their_own(tmp_path):
    values = np.round(RAMP * 4095)
    write(tmp_path / "a.dcm", np.concatenate([values, values[:, ::-1]]), NumberOfFrames=2, Rows=64)
    with pytest.raises(MemControlError, match="1 files have several pages or frames, such as .*a.dcm with 2"):
        examine_files(tmp_path, ["a.dcm"])
    first, second = examine_files(tmp_path, ["a.dcm"], pages="all").images
    shown = [np.asarray(decode_image(tmp_path / name)) for name in (first, second)]
    assert (shown[0] == shown[1][:, ::-1]).all() and (shown[0] != shown[1]).any()
    assert (shown[0] == np.asarray(decode_image(write(tmp_path / "b.dcm", values)))).all()


def test_a_file_without_a_preamble_is_read_and_one_without_a_picture_is_said(tmp_path):
    values = np.round(RAMP * 4095)
    whole = write(tmp_path / "a.dcm", values)
    wanted = decode(whole)
    bare = tmp_path / "bare.dcm"
    bare.write_bytes(whole.read_bytes()[132:])
    assert (decode(bare) == wanted).all()
    data = pydicom.dcmread(whole)
    start = whole.read_bytes().index(b"\x08\x00\x16\x00")  # SOPClassUID, the first after the meta data
    bare.write_bytes(whole.read_bytes()[start:])
    assert (decode(bare) == wanted).all()
    del data.PixelData
    data.save_as(tmp_path / "report.dcm")
    with pytest.raises(MemControlError, match="report.dcm is DICOM without a picture"):
        decode_image(tmp_path / "report.dcm")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "png.dcm")
    assert "png.dcm" in list_folder(tmp_path).images


def test_patients_that_some_files_do_not_say_are_groups_of_their_own(tmp_path):
    for i in range(40):
        values = np.random.default_rng(i).integers(0, 4096, (24, 24))
        write(tmp_path / "x" / f"{i:03}.dcm", values, patient=f"P{i // 2}" if i < 30 else "")
    said = run("init", tmp_path / "x", cwd=tmp_path, check=True).stderr
    assert "10 images say no PatientID, such as 030.dcm: each is a group of its own" in said
    config = load_config(tmp_path / "x.yaml")
    assert config.data.group == "PatientID"
    parts = load_parts(config.data, 32, 0).parts
    groups = [set(images.groups) for images in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 25


def test_what_is_broken_or_has_no_patient_is_refused_in_one_line(tmp_path):
    values = np.round(RAMP * 4095)
    (tmp_path / "b.dcm").write_bytes(write(tmp_path / "c.dcm", values).read_bytes()[:900])
    with pytest.raises(MemControlError, match="b.dcm cannot be decoded"):
        decode_image(tmp_path / "b.dcm")
    for i in range(30):
        write(tmp_path / "x" / f"{i}.dcm", values + i)
    config = load_config({"name": "a", "data": {"path": str(tmp_path / "x"), "group": "PatientID"}})
    with pytest.raises(MemControlError, match="data.group is 'PatientID', and no image says one"):
        load_parts(config.data, 32, 0)


@pytest.mark.filterwarnings("ignore")
def test_compression_that_is_not_read_is_named_with_what_reads_it(tmp_path):
    """Twelve bits of JPEG, which Pillow cannot read (its modes have 8), also where it is skipped."""
    (name,) = get_testdata_files("JPEG-lossy.dcm")
    if "pylibjpeg" in pydicom.pixels.get_decoder(pydicom.uid.JPEGExtended12Bit).available_plugins:
        pytest.skip("pylibjpeg reads it")
    for i in range(32):
        write(tmp_path / f"{i:03}.dcm", np.random.default_rng(i).integers(0, 4096, (24, 24)))
    (tmp_path / "a;b.dcm").write_bytes(Path(name).read_bytes())
    what = r"a;b.dcm is compressed as JPEG Extended .* of 12 bits, which is not read here \(pip install pylib"
    config = load_config({"name": "a", "data": str(tmp_path)})
    with pytest.raises(MemControlError, match=what):
        load_parts(config.data, 32, 0)
    said = []
    load_parts(config.data.model_copy(update={"skip_unreadable": True}), 32, 0, said.append)
    (skipped,) = [line for line in said if line.startswith("skipped: ")]
    assert skipped.endswith("pylibjpeg-rle)") and "a;b.dcm is compressed" in skipped
