"""Draw a result of benchmarks.attention or benchmarks.gpu: speed over sequence length, a panel for each problem.

    python -m benchmarks.plot benchmarks/results/h100-attention.json h100-attention.svg

A row of panels is one head width, forward before backward, full before causal. Needs matplotlib, which the extra
`bench` installs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from cupyflash._program.timing import OURS
from cupyflash._program.workload import DIRECTIONS

COLUMNS = 4
Lines = dict[str, list[tuple[int, float]]]  # contender to points (sequence length, TFLOP/s)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON that benchmarks.attention or benchmarks.gpu wrote")
    parser.add_argument("picture", type=Path, help="file to write; its ending names the format")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


def panels(result: dict[str, Any]) -> dict[tuple[Any, ...], Lines]:
    """(dtype, head width, direction, causal) to what is drawn there; dtypes in the result's order."""
    found: dict[tuple[Any, ...], Lines] = defaultdict(lambda: defaultdict(list))
    for cell in result["cells"]:
        work = cell["workload"]
        key = (work["dtype"], work["head_dim"], cell["direction"], work["causal"])
        for contender in cell["contenders"]:
            if contender.get("flops_per_second"):
                found[key][contender["name"]].append((work["seqlen"], contender["flops_per_second"] / 1e12))
    dtypes = list(dict.fromkeys(key[0] for key in found))
    order = sorted(found, key=lambda key: (dtypes.index(key[0]), key[1], DIRECTIONS.index(key[2]), key[3]))
    # One point is no curve.
    return {key: found[key] for key in order if max(map(len, found[key].values())) > 1}


def styles(drawn: dict[tuple[Any, ...], Lines]) -> dict[str, dict[str, Any]]:
    """One colour for each contender in all panels; ours are thick and on top."""
    names = dict.fromkeys(name for lines in drawn.values() for name in lines)
    return {
        name: {"color": f"C{i % 10}"} | ({"linewidth": 2.5, "zorder": 3} if name.startswith(OURS) else {})
        for i, name in enumerate(names)
    }


def draw(result: dict[str, Any], picture: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    drawn = panels(result)
    style = styles(drawn)
    rows = max(1, -(-len(drawn) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis, (key, lines) in zip(axes.flat, drawn.items(), strict=False):
        dtype, head_dim, direction, causal = key
        axis.set_title(f"{direction}, {dtype}, width {head_dim}{', causal' if causal else ''}", fontsize=9)
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name, **style[name])
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("sequence length")
        axis.set_ylabel("TFLOP/s")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.suptitle(result["device"], fontsize=10)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
