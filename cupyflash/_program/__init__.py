"""The program `python -m cupyflash`: demo, info, bench, selftest, tune."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from .._tuned import enabled
from .._workers import worker_count
from . import bench, demo, info, selftest, tune

COMMANDS = (demo, info, bench, selftest, tune)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 where a check failed, 2 where it can't run as asked."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        worker_count()
        enabled()
    except ValueError as error:  # a bad environment variable, which every command would meet
        parser.error(str(error))
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cupyflash",
        description="Exact attention for NumPy and CuPy arrays: try it, look, time, test.",
    )
    parser.add_argument("--version", action="version", version=f"cupyflash {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON for machines on stdout")
        command.set_defaults(run=module.run)
    return parser
