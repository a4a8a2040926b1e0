"""MemControl: search which parameters of a diffusion model to fine-tune, so that quality stays and
memorization goes.

The commands are functions of the same names: `memcontrol.search("xrays.yaml")`,
`memcontrol.front("xrays.yaml")`; see memcontrol.commands.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from memcontrol.core.version import __version__ as __version__

if TYPE_CHECKING:
    from memcontrol.commands.audit import audit
    from memcontrol.commands.compare import compare
    from memcontrol.commands.dashboard import dashboard
    from memcontrol.commands.export import export, load_adapter
    from memcontrol.commands.front import front
    from memcontrol.commands.importance import importance
    from memcontrol.commands.init import init
    from memcontrol.commands.pick import pick
    from memcontrol.commands.report import report
    from memcontrol.commands.retrain import retrain
    from memcontrol.commands.search import search
    from memcontrol.commands.status import status
    from memcontrol.scoring.own_rewards import reward

__all__ = [
    "audit",
    "compare",
    "dashboard",
    "export",
    "front",
    "importance",
    "init",
    "load_adapter",
    "pick",
    "report",
    "retrain",
    "reward",
    "search",
    "status",
]
_ELSEWHERE = {"load_adapter": "memcontrol.commands.export", "reward": "memcontrol.scoring.own_rewards"}


def __getattr__(name: str):
    """Imported when asked for: `memcontrol --help` must be instant, and a reward brings numpy and torch."""
    if name not in __all__:
        raise AttributeError(f"module 'memcontrol' has no attribute '{name}'")
    return getattr(import_module(_ELSEWHERE.get(name, f"memcontrol.commands.{name}")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Face(ModuleType):
    """Keeps `memcontrol.search` the command: importing the package of that name would put itself in its
    place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
