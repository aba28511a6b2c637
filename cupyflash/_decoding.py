"""What a decoding call has beside its Problem: caches, pages, new rows, rotary; every user-facing error about them.

The Problem is that of attention with lengths: q (batch, Hq, T, D), and keys and values (batch, Hk, capacity, D) of
which entry b has the first kv_lens[b]; causal, each entry's last query on its last key. What is there beside it, and
where the keys lie, is a Decoding.

    contiguous cache   (batch, Hk, capacity, D): row j of entry b lies at [b, :, j]
    paged cache        (pages, page_size, Hk, D): it lies at [page_table[b, j // page_size], j % page_size]

Canonical, both have heads before rows: (batch, Hk, capacity, D) and (pages, Hk, page_size, D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ._arrays import DTYPES, Array, check_beside, elements_overlap, is_cupy, misaligned, share_memory, take
from ._options import lengths_are_checked


class Rotary(NamedTuple):
    """Rotary positions: rows of queries and new keys are turned by the angles of the key that they sit on. [1]_

    Parameters
    ----------
    cos, sin : array, shape (positions, R / 2)
        Cosines and sines of each position's angles, of any float dtype. The first R columns of a row are turned.
    interleaved : bool
        True: columns 2 n and 2 n + 1 are a pair. False: n and n + R / 2 are.

    References
    ----------
    .. [1] Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
    """

    cos: Any
    sin: Any
    interleaved: bool = False


@dataclass(frozen=True)
class Decoding:
    """What a decoding call has beside its Problem, without arrays.

    Attributes
    ----------
    page_size : int
        Rows of a page; 0: the cache is contiguous.
    pages, table_columns : int
        Pages of the cache, and pages that an entry may have.
    appends : bool
        New rows go behind each entry's.
    rotary_dim : int
        Columns that are turned; 0: none.
    positions : int
        Rows of cos and sin.
    angle : str
        Their dtype.
    num_splits : int or None
        Into how many parts the keys of an entry are split at most; None: the planner's choice.
    """

    page_size: int = 0
    pages: int = 0
    table_columns: int = 0
    appends: bool = False
    rotary_dim: int = 0
    positions: int = 0
    interleaved: bool = False
    angle: str = "float32"
    num_splits: int | None = None
    batch_invariant: bool = True


class Splits(NamedTuple):
    """How a GPU cuts the keys that an entry's queries see.

    Attributes
    ----------
    length : int
        Keys of a split at least: of a long entry they are as many as ``number`` splits need.
    number : int
        Splits at most, each with a partial result; 1: no such results.
    blocks : int
        Thread blocks that take the splits in turn: the batch decides, and no bit depends on it.
    """

    length: int = 0
    number: int = 1
    blocks: int = 1


ONE_SPLIT = Splits()


class Extras(NamedTuple):
    """The arguments of a decoding call that others don't have, as they came."""

    kv_lens: Any
    page_table: Any = None
    k_new: Any = None
    v_new: Any = None
    rotary: Any = None
    num_splits: Any = None
    batch_invariant: Any = True


class _Like(NamedTuple):
    """The shape and dtype of an array that lies in pages."""

    shape: tuple[int, ...]
    dtype: np.dtype


def take_rotary(rotary: Any) -> dict[str, Array]:
    if not isinstance(rotary, Rotary):
        raise TypeError(f"rotary is a {type(rotary).__name__}: pass cupyflash.Rotary(cos, sin, interleaved=False)")
    if not isinstance(rotary.interleaved, (bool, np.bool_)):
        raise TypeError(f"rotary.interleaved={rotary.interleaved!r}: interleaved is True or False")
    return {"cos": take("rotary.cos", rotary.cos), "sin": take("rotary.sin", rotary.sin)}


def read_decoding(extras: Extras, inputs: dict[str, Array]) -> Decoding:
    """Shapes and dtypes of q, the cache, its page table and new rows."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    paged = extras.page_table is not None
    where = "(pages, page_size, Hk, D)" if paged else "(batch, Hk, capacity, D)"
    for name, x, axes in (("q", q, "(batch, Hq, T, D)"), ("k_cache", k, where), ("v_cache", v, where)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape}: it has 4 axes, {axes}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k_cache.shape={k.shape}, v_cache.shape={v.shape}: they have the same {where[:-4]})")
    if not paged and len(k) != len(q):
        raise ValueError(f"k_cache.shape={k.shape}, q.shape={q.shape}: a contiguous cache has an entry for each of q's")
    if paged and k.shape[1] == 0:
        raise ValueError(f"k_cache.shape={k.shape}: a page has at least one row")
    _check_types(inputs)
    decoding = Decoding(appends=_appends(extras, inputs), **_read_splits(extras))
    if paged:
        table = inputs["page_table"]
        if table.dtype != np.int32:
            raise TypeError(f"page_table.dtype={table.dtype}: page numbers are int32")
        if table.ndim != 2 or len(table) != len(q):
            raise ValueError(f"page_table.shape={table.shape}: it is (batch, pages of an entry), batch {len(q)}")
        decoding = replace(decoding, page_size=k.shape[1], pages=k.shape[0], table_columns=table.shape[1])
    if extras.rotary is not None:
        decoding = replace(decoding, **_read_rotary(extras.rotary, inputs, q.shape[-1]))
    return decoding


def _check_types(inputs: dict[str, Array]) -> None:
    q = inputs["q"]
    for name, argument in (("k", "k_cache"), ("v", "v_cache"), ("k_new", "k_new"), ("v_new", "v_new")):
        if name in inputs and inputs[name].dtype != q.dtype:
            raise TypeError(f"q.dtype={q.dtype}, {argument}.dtype={inputs[name].dtype}: these share one dtype")


def _appends(extras: Extras, inputs: dict[str, Array]) -> bool:
    """Whether there are new rows, of the right shapes."""
    if (extras.k_new is None) != (extras.v_new is None):
        raise ValueError("k_new without v_new, or v_new without k_new: a new row has both")
    if extras.k_new is None:
        return False
    q, heads = inputs["q"], inputs["k"].shape[1 if extras.page_table is None else 2]
    for name, cache in (("k_new", inputs["k"]), ("v_new", inputs["v"])):
        shape = (len(q), heads, q.shape[2], cache.shape[3])
        if inputs[name].shape != shape:
            raise ValueError(f"{name}.shape={inputs[name].shape}: with this q and cache it is {shape}")
    return True


def _read_splits(extras: Extras) -> dict[str, Any]:
    splits, invariant = extras.num_splits, extras.batch_invariant
    if not isinstance(invariant, (bool, np.bool_)):
        raise TypeError(f"batch_invariant={invariant!r}: batch_invariant is True or False")
    if splits is None:
        return {"batch_invariant": bool(invariant)}
    if isinstance(splits, (bool, np.bool_)) or not isinstance(splits, (int, np.integer)):
        raise TypeError(f"num_splits={splits!r}: num_splits is an integer or None")
    if splits < 1:
        raise ValueError(f"num_splits={splits}: num_splits is at least 1")
    return {"batch_invariant": bool(invariant), "num_splits": int(splits)}


def _read_rotary(rotary: Rotary, inputs: dict[str, Array], width: int) -> dict[str, Any]:
    cos, sin = inputs["cos"], inputs["sin"]
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype not in DTYPES:
            raise TypeError(f"rotary.{name}.dtype={x.dtype}: it is float16, bfloat16, float32 or float64")
    if cos.dtype != sin.dtype:
        raise TypeError(f"rotary.cos.dtype={cos.dtype}, rotary.sin.dtype={sin.dtype}: these share one dtype")
    if cos.ndim != 2 or cos.shape != sin.shape:
        raise ValueError(f"rotary.cos.shape={cos.shape}, rotary.sin.shape={sin.shape}: both are (positions, R / 2)")
    positions, pairs = cos.shape
    if not 1 <= pairs <= width // 2:
        raise ValueError(f"rotary.cos.shape[1]={pairs}: with q.shape[-1]={width} it lies between 1 and {width // 2}")
    if positions < 1:
        raise ValueError(f"rotary.cos.shape={cos.shape}: there is at least one position")
    found = {"rotary_dim": 2 * pairs, "positions": positions, "angle": str(cos.dtype)}
    return found | {"interleaved": bool(rotary.interleaved)}


def as_entries(cache: Array, decoding: Decoding, batch: int) -> Any:
    """The cache's dtype, and the shape of all keys that entries may have."""
    if not decoding.page_size:
        return cache
    pages, page_size, heads, width = cache.shape
    capacity = decoding.table_columns * page_size if pages else 0
    return _Like((batch, heads, capacity, width), cache.dtype)


def read_lens(extras: Extras, place: int | None, batch: int, rows: int, capacity: int, paged: bool) -> Array | None:
    """kv_lens as int64, (batch,), where the host knows them; checked either way."""
    lens: Any = extras.kv_lens
    if isinstance(lens, (int, np.integer)) and not isinstance(lens, (bool, np.bool_)):
        lens = np.asarray(lens, np.int64)
    elif not is_cupy(lens):
        lens = take("kv_lens", lens)
    check_beside("kv_lens", lens, place)
    if lens.dtype.kind not in "iu" or (lens.dtype.itemsize < 4 and not isinstance(lens, np.ndarray)):
        raise TypeError(f"kv_lens.dtype={lens.dtype}: lengths are integers, int32 or int64 on a device")
    if lens.shape not in ((), (1,), (batch,)):
        raise ValueError(f"kv_lens.shape={lens.shape}: it is a number for each entry of the batch, shape ({batch},)")
    most = capacity - (rows if extras.k_new is not None else 0)
    size = f"page_table has {capacity} rows an entry" if paged else f"the cache has {capacity} rows"
    if most < 0:
        raise ValueError(f"{size}: {rows} new rows do not fit")
    values = known(lens)
    if values is None:
        return None
    if values.size and not 0 <= int(values.min()) <= int(values.max()) <= most:
        new = f", of which {rows} are for new ones" if extras.k_new is not None else ""
        raise ValueError(f"kv_lens holds {int(values.min())} to {int(values.max())}: {size}{new}")
    return np.broadcast_to(values.astype(np.int64), (batch,))


def known(x: Array) -> np.ndarray | None:
    """The numbers, where the host has them or is asked to look at them."""
    if isinstance(x, np.ndarray):
        return x
    found: np.ndarray | None = x.get() if lengths_are_checked() else None
    return found


def check_written(name: str, cache: Array, inputs: dict[str, Array]) -> None:
    """A cache that gets new rows is writeable, has each element once, and shares none with another input."""
    if isinstance(cache, np.ndarray) and not cache.flags.writeable:
        raise ValueError(f"{name} is read-only (flags.writeable=False): new rows are written into it")
    if not isinstance(cache, np.ndarray) and (why := misaligned(cache)):
        raise ValueError(f"{name}: {why}, and kernels write whole elements")
    if elements_overlap(cache):
        raise ValueError(f"{name}.strides={cache.strides} with shape {cache.shape}: two of its elements share memory")
    for other, y in inputs.items():
        if other != name and share_memory(cache, y):
            raise ValueError(f"{name} shares memory with {other}: new rows would overwrite it")


def check_pages(table: np.ndarray, total: np.ndarray, decoding: Decoding) -> None:
    """Every page that an entry's rows lie in exists."""
    used = np.arange(decoding.table_columns) < -(-total[:, None] // decoding.page_size)
    wrong = used & ((table < 0) | (table >= decoding.pages))
    if wrong.any():
        b, n = (int(i[0]) for i in np.nonzero(wrong))
        raise ValueError(
            f"page_table[{b}, {n}]={table[b, n]}: the cache has pages 0 to {decoding.pages - 1}, and entry {b} has "
            f"{total[b]} rows in pages of {decoding.page_size}"
        )


def check_new_rows(table: np.ndarray, lens: np.ndarray, count: int, decoding: Decoding) -> None:
    """A new row's place is no other entry's: neither a new one nor one that it has."""
    if not count or not len(lens):
        return
    size = decoding.page_size
    rows = lens[:, None] + np.arange(count)
    pages = np.take_along_axis(table, rows // size, axis=1)
    written = pages.astype(np.int64) * size + rows % size  # (batch, count)
    places, counts = np.unique(written, return_counts=True)
    columns = np.arange(decoding.table_columns)
    held = np.clip(lens[:, None] - columns * size, 0, size)  # rows of each page that are an entry's own already
    theirs = np.isin(table, pages) & (held > 0)
    for b, n in zip(*np.nonzero(theirs), strict=True):
        first = int(table[b, n]) * size
        hit = places[(places >= first) & (places < first + held[b, n])]
        if hit.size:
            _raise_shared(int(hit[0]), size, int(b))
    if (counts > 1).any():
        place = int(places[counts > 1][0])
        _raise_shared(place, size, int(np.nonzero(written == place)[0][-1]))


def _raise_shared(place: int, size: int, entry: int) -> None:
    raise ValueError(
        f"row {place % size} of page {place // size} gets a new row, and is entry {entry}'s: give entries that grow "
        "pages of their own"
    )
