"""Owns bases of the Hugging Face Hub: the commit that a name stands for, and its files in the Hub's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from memcontrol.core.errors import MemControlError


def find_commit(name: str, revision: str | None) -> str:
    """The commit that a branch or tag stands for: the Hub's, or the cache's where the Hub cannot be asked.
    Raises MemControlError where neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    try:
        return Path(hf_hub_download(name, "model_index.json", revision=revision)).parent.name
    except RevisionNotFoundError:
        raise MemControlError(
            f"base '{name}' has no revision '{revision}'; give a branch, tag or commit"
        ) from None
    except LocalEntryNotFoundError:
        refuse_uncached(name, revision)


def refuse_uncached(name: str, revision: str | None = None) -> NoReturn:
    from huggingface_hub import constants

    of_revision = f" --revision {revision}" if revision else ""
    raise MemControlError(
        f"base '{name}'{f' at {revision}' if revision else ''} is not, or not all, in the Hub's cache "
        f"({constants.HF_HUB_CACHE}) and the Hub cannot be asked: run `hf download {name}{of_revision}` "
        "where there is a network, and copy the cache, or give a folder"
    )


def is_offline() -> bool:
    """Whether the Hub may not be asked, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def list_hub_files(name: str, commit: str) -> list[str]:
    """Names of its files; where the Hub cannot be asked, of those in the cache."""
    from huggingface_hub import hf_hub_download, list_repo_files

    if not is_offline():
        try:
            return list_repo_files(name, revision=commit)
        except Exception:  # of whichever library it asks with: the cache is asked next
            pass
    found = hf_hub_download(name, "model_index.json", revision=commit, local_files_only=True)
    return list_files(Path(found).parent)


def list_files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]


def download(name: str, commit: str, variant: str | None, left_out: dict[str, Any]) -> str:
    """The folder of the cache that holds all that the pipeline needs."""
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.download(name, revision=commit, variant=variant, **left_out))


def read_hub_card(name: str, commit: str) -> str | None:
    """README.md, of the Hub or its cache; None where neither gives it."""
    from huggingface_hub import hf_hub_download

    try:
        found = Path(hf_hub_download(name, "README.md", revision=commit))
        return found.read_text(encoding="utf-8", errors="replace")
    except Exception:  # of whichever library it asks with: a card is no condition of an export
        return None
