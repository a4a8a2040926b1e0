"""Owns DICOM files: their pixels as a viewer shows them, and whose they are. No other header is read or kept.

Pixels go through the modality's rescale and the window, or look-up table, that the file asks for; without one
the bits that are recorded are the range. MONOCHROME1 is inverted.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from memcontrol.core.errors import MemControlError

PATIENT = "PatientID"  # the rule of data.group that asks for it
_MARK, _OFFSET = b"DICM", 128
_PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle"


@cache
def can_read_dicom() -> bool:
    return importlib.util.find_spec("pydicom") is not None


def is_dicom(path: Path) -> bool:
    """By the mark that each such file has."""
    try:
        with path.open("rb") as file:
            file.seek(_OFFSET)
            return file.read(len(_MARK)) == _MARK
    except OSError:
        return False


def decode_dicom(path: Path) -> Image.Image:
    """RGB. Raises MemControlError; whatever a broken file makes pydicom raise is for the caller."""
    import pydicom

    data = pydicom.dcmread(path)
    if int(data.get("NumberOfFrames") or 1) > 1:
        raise MemControlError(
            f"image {path} has {data.NumberOfFrames} frames; store those that are meant as files of their own"
        )
    try:
        values = data.pixel_array
    except (RuntimeError, NotImplementedError) as error:
        syntax = _name_syntax(data)
        raise MemControlError(
            f"image {path} is compressed as {syntax}, which is not read here; {_PLUGINS}"
        ) from error
    return _show(values, data)


def _name_syntax(data: Any) -> str:
    """Of the compression, where it is one that is known."""
    from pydicom.uid import AllTransferSyntaxes

    known = data.file_meta.get("TransferSyntaxUID")
    return known.name if known in AllTransferSyntaxes else "something unknown"


def _show(values: np.ndarray, data: Any) -> Image.Image:
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    if data.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(values, data)
        return Image.fromarray((colours >> 8 if colours.dtype.itemsize > 1 else colours).astype(np.uint8))
    if data.SamplesPerPixel > 1:  # pydicom has made RGB of it
        return Image.fromarray((values >> max(0, data.BitsStored - 8)).astype(np.uint8), "RGB")
    rescaled = apply_modality_lut(values, data)
    low, high = _find_range(data)
    shares = (np.asarray(apply_voi_lut(rescaled, data), np.float64) - low) / max(high - low, 1e-12)
    shares = 1 - shares if data.PhotometricInterpretation == "MONOCHROME1" else shares
    return Image.fromarray((255 * shares.clip(0, 1)).round().astype(np.uint8)).convert("RGB")


def _find_range(data: Any) -> tuple[float, float]:
    """The values that are shown as darkest and lightest, after rescaling (DICOM PS3.3, C.11.1 and C.11.2)."""
    if data.get("VOILUTSequence"):
        return 0.0, 2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
    if data.get("ModalityLUTSequence"):
        return 0.0, 2.0 ** data.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    bits, is_signed = data.BitsStored, data.PixelRepresentation == 1
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if is_signed else (0.0, 2.0**bits - 1)
    slope, intercept = float(data.get("RescaleSlope", 1) or 1), float(data.get("RescaleIntercept", 0) or 0)
    low, high = sorted((low * slope + intercept, high * slope + intercept))
    return low, high


def read_patient(path: Path) -> str:
    """A name for the patient that says nothing, a digest of PatientID; empty where there is none."""
    import pydicom

    found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[PATIENT]).get(PATIENT)
    text = str(found or "").strip()
    return f"patient {hashlib.sha256(text.encode()).hexdigest()[:12]}" if text else ""
