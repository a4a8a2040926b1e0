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
_ENDINGS = (".dcm", ".dicom")
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")  # of the file's meta data, of the first elements
_PLUGINS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle"
_NOT_BY_PLUGIN = "does not support"  # what pydicom says of Pillow and 12 bits, say


@cache
def can_read_dicom() -> bool:
    return importlib.util.find_spec("pydicom") is not None


def is_dicom(path: Path) -> bool:
    """By the mark that such a file has; one of the ending may lack it and begin with its first elements."""
    try:
        with path.open("rb") as file:
            head = file.read(_OFFSET + len(_MARK))
    except OSError:
        return False
    is_bare = path.suffix.lower() in _ENDINGS and head[:2] in _FIRST_GROUPS
    return head[_OFFSET:] == _MARK or is_bare


class DicomFile:
    """A file whose pixels are not read as yet. Whatever a broken one makes pydicom raise is for the
    caller."""

    def __init__(self, path: Path):
        import pydicom
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

        self.path, self.data = path, pydicom.dcmread(path, force=True)
        if "PixelData" not in self.data:
            raise MemControlError(
                f"image {path} is DICOM without a picture (a report or an index, say); remove it, or set "
                "data.skip_unreadable=true (audit: --skip-unreadable)"
            )
        if "TransferSyntaxUID" not in self.data.file_meta:
            implicit, _ = self.data.original_encoding
            self.data.file_meta.TransferSyntaxUID = (
                ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
            )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return int(self.data.Columns), int(self.data.Rows)

    @property
    def n_frames(self) -> int:
        return int(self.data.get("NumberOfFrames") or 1)

    @property
    def patient(self) -> str:
        """A name for the patient that says nothing, a digest of PatientID; empty where there is none."""
        text = str(self.data.get(PATIENT) or "").strip()
        return f"patient {hashlib.sha256(text.encode()).hexdigest()[:12]}" if text else ""

    def show(self, frame: int) -> Image.Image:
        """A frame, from 0 on, as RGB. Raises MemControlError."""
        from pydicom.pixels import pixel_array

        try:
            values = pixel_array(self.data, index=frame)
        except (RuntimeError, NotImplementedError) as error:
            if _can_decode(self.data) and _NOT_BY_PLUGIN not in str(error):
                raise  # so it is broken
            syntax = f"{_name_syntax(self.data)} of {self.data.BitsStored} bits"
            raise MemControlError(
                f"image {self.path} is compressed as {syntax}, which is not read here ({_PLUGINS}); install "
                "them, or set data.skip_unreadable=true (audit: --skip-unreadable)"
            ) from error
        return _show(values, self.data)


def _can_decode(data: Any) -> bool:
    """Whether what reads its compression is installed."""
    from pydicom.pixels import get_decoder

    try:
        return get_decoder(data.file_meta.TransferSyntaxUID).is_available
    except NotImplementedError:
        return False


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
