"""Draw a result of benchmarks.gpu: speed over sequence length, a panel for each dtype, head width and direction.

    python -m benchmarks.plot benchmarks/results/h200.json h200.png

Needs matplotlib, which the extra `bench` installs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON that benchmarks.gpu wrote")
    parser.add_argument("picture", type=Path, help="file to write; its ending names the format")
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


def panels(result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]]:
    """(dtype, head width, causal, direction) to contender to points (sequence length, TFLOP/s)."""
    found: dict[tuple[Any, ...], dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for cell in result["cells"]:
        work = cell["workload"]
        key = (work["dtype"], work["head_dim"], work["causal"], cell["direction"])
        for contender in cell["contenders"]:
            if contender.get("flops_per_second"):
                found[key][contender["name"]].append((work["seqlen"], contender["flops_per_second"] / 1e12))
    # One point is no curve.
    return {key: lines for key, lines in found.items() if max(map(len, lines.values())) > 1}


def draw(result: dict[str, Any], picture: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    drawn = panels(result)
    columns = 4
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (key, lines) in zip(axes.flat, drawn.items(), strict=False):
        dtype, head_dim, causal, direction = key
        axis.set_title(f"{direction}, {dtype}, width {head_dim}{', causal' if causal else ''}", fontsize=9)
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("sequence length")
        axis.set_ylabel("TFLOP/s")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
