"""Owns the command line: arguments, printing, and how every command ends."""


def main() -> int:
    from memcontrol.cli.parser import main as run

    return run()
