"""Partial results merged on NumPy, and the way back: see `merge`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._arrays import Array


def merge(outs: Sequence[Array], lses: Sequence[Array], out: Array, lse: Array) -> None:
    """Write out (..., rows, columns) and lse (..., rows) of partial results of these shapes.

    The weight of a part is exp(lse_n - lse), by way of the largest lse_n. A part of weight 0 is discarded by selection:
    what it holds may be anything.
    """
    accumulator = lse.dtype
    with np.errstate(all="ignore"):
        top = lses[0]
        for x in lses[1:]:
            top = np.maximum(top, x)
        shift = np.where(np.isfinite(top), top, 0).astype(accumulator)  # -inf - -inf and inf - inf would be NaN
        weights = [np.where(top == np.inf, x == np.inf, np.exp(x - shift)).astype(accumulator) for x in lses]
        total = weights[0].copy()
        for weight in weights[1:]:
            total += weight
        share = np.divide(1, np.where(total == 0, 1, total))
        acc_o = np.zeros(out.shape, accumulator)
        for x, weight in zip(outs, weights, strict=True):
            part = (weight * share)[..., None]
            acc_o += np.where(part == 0, 0, x * part)
        out[...] = acc_o
        lse[...] = np.where(top == np.inf, top, shift + np.log(total))


def merge_backward(
    dout: Array,
    outs: Sequence[Array],
    lses: Sequence[Array],
    out: Array,
    lse: Array,
    dlse: Array | None,
    douts: Sequence[Array],
    dlses: Sequence[Array],
) -> None:
    """Write dout_n = w_n dout and dlse_n = w_n (dout . out_n - delta), delta = dout . out - dlse."""
    accumulator = lse.dtype
    with np.errstate(all="ignore"):
        dout = dout.astype(accumulator)
        delta = _row_dots(dout, out)
        if dlse is not None:
            delta = delta - dlse
        for x, x_lse, dx, dx_lse in zip(outs, lses, douts, dlses, strict=True):
            weight = np.where(x_lse == lse, 1, np.exp(x_lse - lse)).astype(accumulator)
            weight[x_lse == -np.inf] = 0
            dx[...] = np.where(weight[..., None] == 0, 0, weight[..., None] * dout)
            dx_lse[...] = np.where(weight == 0, 0, weight * (_row_dots(dout, x) - delta))


def _row_dots(x: Array, y: Array) -> Array:
    """The scalar product of each row of x, of the accumulator's type, with that of y."""
    return np.einsum("...d,...d->...", x, y.astype(x.dtype))
