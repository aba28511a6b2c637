"""A few queries against a long cache of keys and values: decoding, speculative decoding, chunks of a prefill."""

from __future__ import annotations

from typing import Any

from . import _ready
from ._arrays import is_cupy
from ._decode_call import DecodeCall
from ._decoding import Extras, Rotary
from ._options import Asked, lengths_are_checked
from ._plan import Plan, Tile
from ._results import as_given, check_flag, check_out_of, compute, split_out


def decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    kv_lens: Any,
    *,
    page_table: Any = None,
    k_new: Any = None,
    v_new: Any = None,
    rotary: Any = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    num_splits: int | None = None,
    batch_invariant: bool = True,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Exact attention of the last T rows of each entry to all that its cache holds, new rows among it.

    Causal: of an entry with L rows, query t sits on row L - T + t, and sees it and those before.

    Parameters
    ----------
    q : array, shape (B, Hq, T, D)
        Queries: float16, bfloat16, float32 or float64, with any strides. T is small: 1, or a few for speculative
        decoding; a chunk of a prefill works too.
    k_cache, v_cache : array, shape (B, Hk, S, D) and (B, Hk, S, Dv), or (pages, page_size, Hk, D) and (..., Dv)
        Keys and values, of q's dtype, with any strides. With ``page_table`` they are paged, pages of any size.
    kv_lens : int or integer array, shape (B,)
        How many rows each entry has, before new ones. What lies beyond is never read. On a device int32 or int64, and
        not looked at unless the environment has CUPYFLASH_CHECK=1: there a length outside counts as the nearest inside.
    page_table : int32 array, shape (B, pages of an entry), optional
        Row j of entry b lies in row j % page_size of page ``page_table[b, j // page_size]``. Only those of rows that
        an entry has are read. Entries may share pages, but not a row that is new.
    k_new, v_new : array, shape (B, Hk, T, D) and (B, Hk, T, Dv), optional
        New rows: they are **written into the cache**, to rows kv_lens to kv_lens + T - 1 of each entry, and seen.
    rotary : Rotary, optional
        ``Rotary(cos, sin, interleaved=False)`` turns query t, and row t of k_new, at the row that it sits on, before
        all else, and rounds them once to q's dtype. Rows that the cache holds are turned already.
    scale, softcap, alibi_slopes, sinks, precision
        As for ``attention``.
    family : str, optional
        "sm80" (16-bit types, since compute capability 8.0) or "simt" for CuPy arrays, "cpu" for NumPy arrays. None
        lets the planner choose.
    tile : Tile, optional
        Block sizes, for NumPy arrays: on a GPU there is one tile for each width.
    window : pair of int or None, optional
        As for ``attention``; a query sees nothing to the right of the row that it sits on.
    score, score_args : optional
        As for ``attention``: ``score(s, b, h, i, j, *score_args)`` with query i, counted from 0 to T - 1, and row j of
        the entry. ``kv_lens`` among the arguments tells on which row a query sits.
    num_splits : int, optional
        Into how many parts a GPU splits an entry's rows at most. None: the planner chooses. NumPy arrays take all rows
        in one order, whatever it says.
    batch_invariant : bool
        True: parts depend on dtype, widths, the longest entry that the cache has room for and how long the entry is,
        so that an entry's bits do not depend on its batch. False lets the planner split as a GPU and the batch want
        it; NumPy arrays: no difference.
    out : array or pair of arrays, optional
        Where to write: out, or (out, lse), which implies ``return_lse``.
    return_lse : bool
        Return the log-sum-exp too.

    Returns
    -------
    array, shape (B, Hq, T, Dv), or AttentionResult
        With ``return_lse``, (out, lse), lse of shape (B, Hq, T). A query that would sit before the first row sees
        nothing: out 0, lse -inf, or the sink.

    Raises
    ------
    ValueError
        Shapes, values or options that do not fit, lengths beyond the cache, pages that do not exist, new rows that
        another entry has: before anything is written, compiled or launched.
    TypeError
        Dtypes and objects that are not supported, likewise.

    Notes
    -----
    Keys are split among thread blocks and their partial results merged as ``merge_attention`` does: FlashDecoding,
    Dao, Haziza, Massa and Sizov (2023). Paged caches: Kwon et al. (2023), arXiv:2309.06180.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import decode
    >>> rng = np.random.default_rng(0)
    >>> k_cache, v_cache = np.zeros((2, 1, 2, 64, 16), np.float32)        # one entry, room for 64 rows
    >>> q, k_new, v_new = rng.standard_normal((3, 1, 2, 1, 16)).astype(np.float32)
    >>> decode(q, k_cache, v_cache, 0, k_new=k_new, v_new=v_new).shape    # row 0 is in the cache now
    (1, 2, 1, 16)
    >>> bool((k_cache[:, :, 0] == k_new[:, :, 0]).all())
    True
    """
    check_flag("return_lse", return_lse)
    asked = Asked(
        scale=scale, causal=True, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        precision=precision, score=score, score_args=score_args,
    )  # fmt: skip
    extras = Extras(kv_lens, page_table, k_new, v_new, rotary, num_splits, batch_invariant)
    look, arrays = _ready.look(asked, q), {"q": q, "k": k_cache, "v": v_cache}
    tensors, options = _all_arrays(extras, look.arrays, arrays), _signed(look, extras, arrays)
    inputs, written = len(tensors), 0 if k_new is None else 2
    if isinstance(out, tuple) and len(out) == 2:
        tensors["out"], tensors["lse"] = out
    elif out is not None:
        tensors["out"] = out
    outputs = len(tensors) - inputs
    key = _ready.signature("decode", tensors, options, (family, tile, bool(return_lse)))
    if (done := _ready.run(key, tensors, written + outputs, look.numbers, apart=written)) is not None:
        return as_given(out, done["out"], done.get("lse"), return_lse)
    ours, lse = split_out(out)
    call = DecodeCall(q, k_cache, v_cache, asked, extras, out=ours, functions=look.functions)
    ours, lse, ready = compute(call, family, tile, ours, lse, bool(return_lse))
    made = (("out", ours), ("lse", lse))[outputs:]
    _ready.keep(key, tensors, ready, _ready.specs(made))
    return as_given(out, ours, lse, return_lse)


def _all_arrays(extras: Extras, sides: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Every array of a call by the name it has inside, those written last."""
    found = {"kv_lens": extras.kv_lens, **sides}
    if extras.page_table is not None:
        found["page_table"] = extras.page_table
    if isinstance(extras.rotary, Rotary):
        found["cos"], found["sin"], _ = extras.rotary
    if extras.k_new is not None:
        found["k_new"], found["v_new"] = extras.k_new, extras.v_new
    return arrays | found if extras.k_new is None else found | arrays


def _signed(look: _ready.Look, extras: Extras, arrays: dict[str, Any]) -> tuple[Any, ...] | None:
    """What calls with other options differ in; None where a call must be looked at each time."""
    rotary, splits = extras.rotary, extras.num_splits
    interleaved = rotary.interleaved if type(rotary) is Rotary else None
    if (
        look.options is None or lengths_are_checked()
        or not (rotary is None or type(interleaved) is bool)
        or not (splits is None or type(splits) is int) or type(extras.batch_invariant) is not bool
    ):  # fmt: skip
        return None
    names = (extras.page_table is not None, extras.k_new is not None)
    return (*look.options, interleaved, splits, extras.batch_invariant, names, _apart(extras, arrays))


def _apart(extras: Extras, arrays: dict[str, Any]) -> int | None:
    """How far the two caches that new rows go to lie from each other: it says whether they share memory."""
    k, v = arrays["k"], arrays["v"]
    return v.data.ptr - k.data.ptr if extras.k_new is not None and is_cupy(k) and is_cupy(v) else None


def explain_decode(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    kv_lens: Any,
    *,
    page_table: Any = None,
    k_new: Any = None,
    v_new: Any = None,
    rotary: Any = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    num_splits: int | None = None,
    batch_invariant: bool = True,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    device: str | None = None,
) -> Plan:
    """How ``decode`` would run: kernels, grids, splits, workspace. Nothing runs, is compiled or written.

    Parameters
    ----------
    q, k_cache, v_cache, kv_lens, page_table, k_new, v_new, rotary
        As for ``decode``: checked, not read.
    scale, window, softcap, alibi_slopes, sinks, score, score_args, num_splits, batch_invariant, precision, family
        As for ``decode``.
    tile, out
        As for ``decode``.
    device : str, optional
        Plan for a GPU such as "sm_90" instead of where the arrays lie.

    Returns
    -------
    Plan
        Prints as a table.

    Raises
    ------
    ValueError, TypeError
        As for ``decode``.
    """
    asked = Asked(
        scale=scale, causal=True, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        precision=precision, score=score, score_args=score_args,
    )  # fmt: skip
    extras = Extras(kv_lens, page_table, k_new, v_new, rotary, num_splits, batch_invariant)
    ours, lse = split_out(out)
    call = DecodeCall(q, k_cache, v_cache, asked, extras, out=ours, device=device)
    if ours is not None:
        check_out_of(call, ours, lse)
    return call.plan(family, tile)
