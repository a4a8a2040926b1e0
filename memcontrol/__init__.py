"""MemControl: search which parameters of a diffusion model to fine-tune, so that quality stays and memorization goes."""

__version__ = "0.1.0"


def load_adapter(pipeline, path):
    """Puts an exported adapter into a diffusers pipeline; see memcontrol.export.load_adapter."""
    from memcontrol.export import load_adapter as load

    return load(pipeline, path)
