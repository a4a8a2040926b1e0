"""MemControl: search which parameters of a diffusion model to fine-tune, so that quality stays and memorization goes."""

__version__ = "0.1.0"


def __getattr__(name):
    """`memcontrol.reward` marks a reward of a user's own; imported when it is asked for, since it brings numpy and torch."""
    if name == "reward":
        from memcontrol.evidence import reward

        return reward
    raise AttributeError(f"module 'memcontrol' has no attribute '{name}'")


def load_adapter(pipeline, path):
    """Puts an exported adapter into a diffusers pipeline; see memcontrol.exporting.load_adapter."""
    from memcontrol.exporting import load_adapter as load

    return load(pipeline, path)
