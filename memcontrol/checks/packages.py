"""Owns whether Python and the packages here are those that memcontrol needs, by what their metadata says:
importing all of them would take ten seconds."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from memcontrol.checks.finding import FAIL, OK, WARN, Finding

_OWN_NAME = "memcontrol"
_TOLD = ("torch", "diffusers", "transformers", "peft", "optuna")  # whose versions are told where all is well
_BESIDE_TORCH = ("torchvision", "torchaudio")  # built for one version of it each


@dataclass(frozen=True)
class _Unmet:
    """A requirement that is missing (`installed` None) or out of range, and the package that has it."""

    needed: Requirement
    by: str
    installed: str | None

    def __str__(self) -> str:
        have = f"{self.needed.name} {self.installed}" if self.installed else f"{self.needed.name} is missing"
        by = "" if self.by == _OWN_NAME else f", says {self.by}"
        return f"{have} (needed: {str(self.needed.specifier) or 'any'}{by})"

    @property
    def is_sure(self) -> bool:
        """Whether nothing works without it. What others say of versions is stricter than they are."""
        return self.by == _OWN_NAME or self.installed is None


def check_python() -> Finding:
    wanted, here = _find_wanted_python(), platform.python_version()
    if SpecifierSet(wanted).contains(here, prereleases=True):
        return Finding("python", OK, f"{here} (needed: {wanted})")
    cure = "python3.12 -m venv .venv, and install memcontrol there"
    return Finding("python", FAIL, f"{here} (needed: {wanted})", cure)


def _find_wanted_python() -> str:
    try:
        return importlib.metadata.metadata(_OWN_NAME)["Requires-Python"] or ">=3.11"
    except importlib.metadata.PackageNotFoundError:
        return ">=3.11"


def check_packages() -> Finding:
    """All that memcontrol needs, and what that needs in turn."""
    if _find_version(_OWN_NAME) is None:
        text = "memcontrol is not installed as a package here, so that what it needs is not known"
        return Finding("packages", WARN, text, "pip install -c constraints.txt .")
    unmet = list(_list_unmet())
    if not unmet:
        versions = ", ".join(f"{name} {_find_version(name)}" for name in _TOLD)
        return Finding("packages", OK, f"all that is needed is here: {versions}")
    state = FAIL if any(one.is_sure for one in unmet) else WARN
    wanted = dict.fromkeys(f"{one.needed.name}{one.needed.specifier}" for one in unmet)
    return Finding("packages", state, "; ".join(map(str, unmet)), f"pip install {shlex.join(wanted)}")


def _list_unmet() -> Iterator[_Unmet]:
    todo, seen = [(_OWN_NAME, "")], {(_OWN_NAME, "")}
    while todo:
        name, extra = todo.pop(0)
        for needed in _read_requirements(name, extra):
            installed = _find_version(needed.name)
            if installed is None or not needed.specifier.contains(installed, prereleases=True):
                yield _Unmet(needed, name, installed)
                continue
            further = {(needed.name, extra) for extra in ("", *needed.extras)} - seen
            seen |= further
            todo += sorted(further)


def _read_requirements(name: str, extra: str) -> list[Requirement]:
    """Those that hold here, of a package or of an extra of it."""
    needed = map(Requirement, importlib.metadata.requires(name) or [])
    return [one for one in needed if one.marker is None or one.marker.evaluate({"extra": extra})]


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch() -> Finding:
    """Whether it can be imported, is built for what this machine has, and has nothing beside it that is built
    for another."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        return Finding("torch", FAIL, f"cannot be imported: {reason}", "pip install --force-reinstall torch")
    for name in _BESIDE_TORCH:
        if text := _find_mismatch(name, torch.__version__):
            cure = f"pip uninstall {name} (rewards.extractor: inception alone needs torchvision)"
            return Finding("torch", FAIL, text, cure)
    return _check_build(torch)


def _find_mismatch(name: str, version: str) -> str:
    """How a package that is built for one version of torch is not built for this one; empty where it is, or
    is not here. Where it is not, transformers and diffusers cannot be imported."""
    if _find_version(name) is None:
        return ""
    for needed in _read_requirements(name, ""):
        if needed.name == "torch" and not needed.specifier.contains(version, prereleases=True):
            return (
                f"{name} {_find_version(name)} is built for torch {needed.specifier}, and {version} is here"
            )
    return ""


def _check_build(torch) -> Finding:
    from memcontrol.execution.local import list_gpus

    version, gpus = torch.__version__, list_gpus()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old, which is told below
        is_used = torch.cuda.is_available()
    said = f"{version}, built for {built}"
    if is_used or not gpus:
        return Finding("torch", OK, said)
    if not (torch.version.cuda or torch.version.hip):
        text = (
            f"{said}, and this machine has {len(gpus)} GPU{'s' if len(gpus) > 1 else ''}: nothing uses them"
        )
        plain = version.partition("+")[0]
        cure = f"pip install --force-reinstall torch=={plain}, from the index of your CUDA's builds"
        return Finding("torch", WARN, text, cure)
    text = f"{said}, finds none of the {len(gpus)} GPUs here: their driver is too old for it, or not running"
    return Finding(
        "torch", WARN, text, "nvidia-smi (shows the driver); then update it, or install an older build"
    )
