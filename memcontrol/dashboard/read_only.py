"""Owns how optuna-dashboard looks where it is read-only: without the buttons that would be refused."""

from __future__ import annotations

from memcontrol.dashboard.guard import App
from memcontrol.dashboard.rewriting import rewrite_answers

_ICONS = (  # on buttons that write: edit, upload, create, rename, delete, fail a trial
    "EditIcon",
    "UploadFileIcon",
    "AddBoxIcon",
    "DriveFileRenameOutlineIcon",
    "DeleteIcon",
    "StopCircleIcon",
)
_BUTTONS = ", ".join(f'button:has([data-testid="{icon}"])' for icon in _ICONS)
# the card around the upload button; one that would have nothing else in it goes with it
_CARD = '.MuiCard-root:has([data-testid="UploadFileIcon"])'
_CARDS = f'{_CARD}:not(:has(.MuiCard-root)), {_CARD}:not(:has([data-testid="DownloadIcon"]))'
_STYLE = f"<style>{_BUTTONS}, {_CARDS} {{ display: none !important; }}</style></head>".encode()


def hide_buttons(app: App) -> App:
    """The app with pages on which nothing that writes is to be seen; that it is refused is the guard's."""
    return rewrite_answers(app, ("text/html",), lambda page: page.replace(b"</head>", _STYLE, 1))
