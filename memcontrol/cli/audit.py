"""Owns `memcontrol audit`: what it asks and prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from memcontrol.cli.arguments import add_command, make_whole_parser
from memcontrol.core.console import make_console, print_json, say


def add_audit(subparsers) -> None:
    audit = add_command(
        subparsers, "audit", _run_audit, "how much a model or a folder of images copies a training set"
    )
    source = audit.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        metavar="PIPELINE_OR_RUN",
        help="a run folder, or a pipeline (folder or Hub id) to sample from",
    )
    source.add_argument("--images", type=Path, metavar="DIR", help="a folder of generated images")
    audit.add_argument(
        "--train",
        type=Path,
        metavar="DIR",
        help="the training images, with captions if there are any (default for a run: its own)",
    )
    audit.add_argument(
        "--holdout",
        type=Path,
        metavar="DIR",
        help="real images of the same kind, never trained on (default for a run: its own)",
    )
    audit.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="further real images, from which the line of copies is drawn (default for a run: its own)",
    )
    audit.add_argument(
        "--out",
        type=Path,
        default=Path("audit"),
        help="folder for audit.json and audit.html (default: audit)",
    )
    audit.add_argument(
        "--extractor",
        default="auto",
        help="the feature network, as rewards.extractor names one; auto: efficientnet-lite0 for photographs, "
        "where it is installed, else tiny, which knows characters (default: auto)",
    )
    _add_base(audit)
    _add_sampling(audit)
    _add_reading(audit)
    audit.add_argument("--json", action="store_true", help="print audit.json on stdout as well")


def _add_reading(audit: argparse.ArgumentParser) -> None:
    audit.add_argument(
        "--group",
        metavar="RULE",
        help="who is in an image: a column of the metadata, a pattern on its path whose first group is the "
        "name, such as '(p\\d+)_', or folder",
    )
    audit.add_argument(
        "--twins",
        choices=("refuse", "drop", "keep"),
        default="refuse",
        help="held-out images that are nearly training images (default: refuse)",
    )
    audit.add_argument(
        "--fit",
        choices=("crop", "pad", "squash"),
        help="how images that are not square become so (default: each way, where shapes differ)",
    )
    audit.add_argument(
        "--pages",
        choices=("refuse", "first", "all"),
        default="refuse",
        help="files of several pages or frames: refuse them, take the first, or make each an image (default: "
        "refuse)",
    )
    audit.add_argument(
        "--max-pixels",
        type=make_whole_parser(1),
        metavar="N",
        help="width times height beyond which an image is refused (default: 178,956,970)",
    )
    audit.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="skip images that cannot be decoded instead of stopping",
    )


def _add_base(audit: argparse.ArgumentParser) -> None:
    known = audit.add_argument_group("where the base is known, also what an attacker can tell")
    known.add_argument("--base", metavar="PIPELINE", help="what --model was fine-tuned from")
    known.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        help="a LoRA file, whoever trained it, put on --model as its base",
    )
    known.add_argument(
        "--strength", type=float, default=1.0, metavar="S", help="how far it is put on (default: 1)"
    )


def _add_sampling(audit: argparse.ArgumentParser) -> None:
    sampling = audit.add_argument_group("sampling from a pipeline")
    sampling.add_argument(
        "--samples", type=make_whole_parser(8), metavar="N", help="images to sample (default: 256)"
    )
    sampling.add_argument(
        "--attacked",
        type=make_whole_parser(0),
        metavar="N",
        help="captions for an extraction attack, 10 images each (default: 0)",
    )
    sampling.add_argument("--steps", type=make_whole_parser(1), help="sampling steps (default: 20)")
    sampling.add_argument("--guidance", type=float, help="guidance scale (default: 1)")
    sampling.add_argument("--seed", type=int, help="of captions and noise (default: 0)")


def _run_audit(args: argparse.Namespace) -> int:
    from memcontrol.auditing.attack import SAMPLING
    from memcontrol.auditing.audited import AuditSource
    from memcontrol.commands.audit import audit_source
    from memcontrol.view.audit_page import check_audit_folder, write_audit
    from memcontrol.view.live import Steps, shorten_path

    check_audit_folder(args.out)
    given = {name: getattr(args, name) for name in SAMPLING}
    sampling = {name: value for name, value in given.items() if value is not None}
    with Steps(make_console()) as steps:
        source = AuditSource(
            args.images,
            args.train,
            args.holdout,
            args.model,
            args.skip_unreadable,
            sampling,
            args.group,
            args.twins,
            args.fit,
            args.calibration,
            args.pages,
            args.max_pixels,
            args.base,
            args.lora,
            args.strength,
        )
        audited = audit_source(source, args.extractor, steps.show, steps.warn)
        found = audited.found
        write_audit(found, audited.read_copies(), args.out)
    if args.json:
        print_json(found)
    (sys.stderr if args.json else sys.stdout).write(
        "\n".join(filter(None, (found["verdict"], found["membership"]))) + "\n"
    )
    say(make_console(), f"report: {shorten_path(args.out / 'audit.html')}")
    return 0
