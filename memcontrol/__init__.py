"""MemControl: search which parameters of a diffusion model to fine-tune, so that quality stays and
memorization goes.

The commands are functions of the same names: `memcontrol.search("xrays.yaml")`,
`memcontrol.front("xrays.yaml")`; see memcontrol.commands.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from memcontrol.core.errors import refuse_windows as _refuse_windows
from memcontrol.core.version import __version__ as __version__

if TYPE_CHECKING:
    from memcontrol import estimate as estimate
    from memcontrol import models as models
    from memcontrol import rewards as rewards
    from memcontrol.commands.audit import audit
    from memcontrol.commands.clean import clean
    from memcontrol.commands.compare import compare
    from memcontrol.commands.dashboard import dashboard
    from memcontrol.commands.doctor import doctor
    from memcontrol.commands.export import export
    from memcontrol.commands.fork import fork
    from memcontrol.commands.front import front
    from memcontrol.commands.importance import importance
    from memcontrol.commands.init import init
    from memcontrol.commands.operate import drop, enqueue, stop
    from memcontrol.commands.pick import pick
    from memcontrol.commands.recipe import recipe
    from memcontrol.commands.report import report
    from memcontrol.commands.retrain import retrain
    from memcontrol.commands.search import search
    from memcontrol.commands.status import status
    from memcontrol.commands.trials import trials
    from memcontrol.core.errors import MemControlError
    from memcontrol.model.saved_adapter import load_adapter
    from memcontrol.scoring.own_rewards import reward

__all__ = [
    "MemControlError",
    "audit",
    "clean",
    "compare",
    "dashboard",
    "doctor",
    "drop",
    "enqueue",
    "export",
    "fork",
    "front",
    "importance",
    "init",
    "load_adapter",
    "pick",
    "recipe",
    "report",
    "retrain",
    "reward",
    "search",
    "status",
    "stop",
    "trials",
]
_ELSEWHERE = {
    "MemControlError": "memcontrol.core.errors",
    "drop": "memcontrol.commands.operate",
    "enqueue": "memcontrol.commands.operate",
    "stop": "memcontrol.commands.operate",
    "load_adapter": "memcontrol.model.saved_adapter",
    "reward": "memcontrol.scoring.own_rewards",
}
_MODULES = ("estimate", "models", "rewards")  # for scripts; in __all__ they would hide their own imports


def __getattr__(name: str):
    """Imported when asked for: `memcontrol --help` must be instant, and a reward brings numpy and torch."""
    if name in _MODULES:
        return import_module(f"memcontrol.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'memcontrol' has no attribute '{name}'")
    if name != "MemControlError":
        _refuse_windows()
    return getattr(import_module(_ELSEWHERE.get(name, f"memcontrol.commands.{name}")), name)


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "__version__"]


class _Face(ModuleType):
    """Keeps `memcontrol.search` the command: importing the package of that name would put itself in its
    place. So `from memcontrol.search.sampler import Sampler` works, `import memcontrol.search.sampler as s`
    does not."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
