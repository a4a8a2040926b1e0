"""MemControl: search which parameters of a diffusion model to fine-tune, so that quality stays and memorization goes.

The commands are functions of the same names: `memcontrol.search("xrays.yaml")`, `memcontrol.front("xrays.yaml")`; see memcontrol.api.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memcontrol.api import audit, compare, dashboard, export, front, importance, init, load_adapter, pick, report, retrain, search, status
    from memcontrol.evidence import reward

__version__ = "0.1.0"
__all__ = [
    "audit", "compare", "dashboard", "export", "front", "importance", "init", "load_adapter", "pick", "report", "retrain", "reward", "search", "status",
]  # fmt: skip


def __getattr__(name: str):
    """Imported when asked for: `memcontrol --help` must be instant, and a reward brings numpy and torch."""
    if name not in __all__:
        raise AttributeError(f"module 'memcontrol' has no attribute '{name}'")
    from memcontrol import api

    if name == "reward":
        from memcontrol.evidence import reward

        return reward
    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
