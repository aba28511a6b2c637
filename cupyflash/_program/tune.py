"""Time the tiles of a problem on this GPU and keep the fastest for later calls and processes.

Winners are kept for all problems of a class: kernel, dtype, head widths, causal or not, lengths up to the next power
of two. `explain` and `bench` then use them; CUPYFLASH_TUNING=0 leaves every tile to the planner.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from .. import _tuned
from .._planner import GPU_FAMILIES
from .._tuning import Tuning, tune
from . import backend as backends
from .bench import positive
from .machine import first_line
from .terminal import as_json
from .workload import DTYPE_NAMES, Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tune`."""
    parser.add_argument("--family", choices=GPU_FAMILIES, help="the planner's choice if not given")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="float16")
    parser.add_argument("--seqlen", type=positive, nargs="+", default=[4096], metavar="S", help="4096 if not given")
    parser.add_argument("--head-dim", type=positive, default=64, metavar="D", help="64 if not given")
    parser.add_argument("--head-dim-v", type=positive, metavar="DV", help="as --head-dim if not given")
    parser.add_argument("--heads", type=positive, default=16, metavar="H", help="16 if not given")
    parser.add_argument("--batch", type=positive, default=4, metavar="B", help="4 if not given")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--forward-only", action="store_true", help="leave the backward's kernels as they are")


def run(args: argparse.Namespace) -> int:
    """The command."""
    backend = backends.choose("cupy")
    if backend is None:
        return 2
    found: list[Tuning] = []
    for seqlen in args.seqlen:
        work = Workload(
            args.batch, args.heads, seqlen, args.head_dim, args.dtype, args.causal, head_dim_v=args.head_dim_v
        )
        q, k, v, _ = work.arrays(backend.xp)
        try:
            found.append(tune(q, k, v, causal=work.causal, family=args.family, backward=not args.forward_only))
        except ValueError as error:  # the family does not take the problem, say
            print(f"{work}: {first_line(error)}", file=sys.stderr)
            return 2
        if not args.json:
            print(found[-1], flush=True)
        del q, k, v
        backend.free()
    if args.json:
        print(as_json(as_dict(found)))
    elif not _tuned.enabled():
        print(f"{_tuned.VARIABLE}=0: nothing is kept")
    return 0


def as_dict(found: list[Tuning]) -> dict[str, Any]:
    """For JSON."""
    kernels = [asdict(kernel) for tuning in found for kernel in tuning.kernels]
    for kernel in kernels:
        kernel["path"] = None if kernel["path"] is None else str(kernel["path"])
    return {"command": "tune", "device": found[0].device, "kernels": kernels}
