"""Draws the pictures of docs/options.md: who sees whom under each option that hides pairs.

    python docs/pictures/options.py

Nothing is drawn by hand: with q = 0 and v = the identity, row i of `attention` is the weights of query i, and what has
a weight is visible.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupyflash import attention

FOLDER = Path(__file__).parent
Q_IDS, KV_IDS = np.array([0, 0, 0, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 1, 1, 2, 2])
EVERY_THIRD = (np.arange(8)[:, None] - np.arange(8)) % 3 == 0
LENGTHS = {"q_lens": np.array([5, 3]), "kv_lens": np.array([8, 5])}


class Panel(NamedTuple):
    """One call: its options as text and as arguments, and the lengths."""

    title: str
    options: dict[str, Any]
    seqlen_q: int = 8
    seqlen_k: int = 8
    entry: int | None = None  # one of two batch entries, with lengths of their own
    shades: bool = False  # weights as shades, not only whether there is one


PICTURES: dict[str, tuple[Panel, ...]] = {
    "causal": (
        Panel("causal=True", {"causal": True}, 5, 8),
        Panel('causal="top_left"', {"causal": "top_left"}, 5, 8),
        Panel("causal=True, q_offset=1", {"causal": True, "q_offset": 1}, 5, 8),
        Panel("causal=True", {"causal": True}, 8, 5),
    ),
    "window": (
        Panel("window=(2, 1)", {"window": (2, 1)}),
        Panel("causal=True, window=(2, None)", {"causal": True, "window": (2, None)}),
        Panel("window=(None, 1)", {"window": (None, 1)}),
        Panel("window=(2, 1)", {"window": (2, 1)}, 5, 8),
    ),
    "mask": (
        Panel("mask = (i - j) % 3 == 0", {"mask": EVERY_THIRD}),
        Panel("causal=True, mask=mask", {"causal": True, "mask": EVERY_THIRD}),
    ),
    "segments": (
        Panel("segment_ids=(q_ids, kv_ids)", {"segment_ids": (Q_IDS, KV_IDS)}),
        Panel("causal=True, (q_ids, q_ids)", {"causal": True, "segment_ids": (Q_IDS, Q_IDS)}),
    ),
    "lens": (
        Panel("entry 0: q_lens 5, kv_lens 8", LENGTHS, 5, 8, entry=0),
        Panel("entry 1: q_lens 3, kv_lens 5", LENGTHS, 5, 8, entry=1),
        Panel("entry 1, causal=True", LENGTHS | {"causal": True}, 5, 8, entry=1),
        Panel("entry 1, window=(2, 0)", LENGTHS | {"window": (2, 0)}, 5, 8, entry=1),
    ),
    "alibi": (
        Panel("slope 0.5", {"alibi_slopes": np.array([0.5])}, shades=True),
        Panel("slope 0.5, causal=True", {"alibi_slopes": np.array([0.5]), "causal": True}, shades=True),
        Panel("slope 0.5", {"alibi_slopes": np.array([0.5])}, 5, 8, shades=True),
    ),
}


def weights(panel: Panel) -> np.ndarray[Any, Any]:
    """The weights of each query on each key: (seqlen_q, seqlen_k)."""
    batch = () if panel.entry is None else (2,)
    q, k = np.zeros((*batch, 1, panel.seqlen_q, 1)), np.zeros((*batch, 1, panel.seqlen_k, 1))
    out: np.ndarray[Any, Any] = attention(q, k, np.eye(panel.seqlen_k)[None], **panel.options)
    return out[(0,) if panel.entry is None else (panel.entry, 0)]


def draw(name: str) -> Path:
    """One picture, a panel for each call."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = PICTURES[name]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        p = weights(panel)
        axis.imshow(p / p.max() if panel.shades else np.where(p > 0, 0.6, 0), cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(panel.seqlen_k))
        axis.set_yticks(range(panel.seqlen_q))
        for side, count in ((axis.set_xticks, panel.seqlen_k), (axis.set_yticks, panel.seqlen_q)):
            side(np.arange(count + 1) - 0.5, minor=True)
        axis.grid(which="minor", color="0.8", linewidth=0.6)
        axis.tick_params(which="both", length=0, labelsize=7)
        axis.set_title(panel.title, fontsize=7, family="monospace")
        axis.set_xlabel("key j", fontsize=7)
        axis.set_ylabel("query i", fontsize=7)
    figure.tight_layout()
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    for picture in PICTURES:
        print(draw(picture))
