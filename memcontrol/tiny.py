"""Owns `python -m memcontrol.tiny`, which rebuilds the embedded base; see memcontrol.assets.build."""

from memcontrol.assets.build import build_from_command_line

if __name__ == "__main__":
    build_from_command_line()
