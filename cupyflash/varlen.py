"""Attention of packed sequences: many of different lengths, one behind the other, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ._arrays import take
from ._options import Asked
from ._packed import PackedCall
from ._plan import Plan, Tile
from ._problem import read_wrt
from ._results import (
    AttentionGradients,
    as_given,
    check_flag,
    compute,
    differentiate,
    given_gradients,
    gradients_of,
    results_of,
    split_out,
)
from ._unrun import explain_call, prepare_call


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    mask_args: tuple[Any, ...] = (),
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Exact attention of sequences that lie one behind the other in packed arrays, each of a length of its own.

    Sequence b is rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of q, and rows ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]`` of k and v. Its result is that of ``attention`` on these rows alone.

    Parameters
    ----------
    q : array, shape (Tq, Hq, D)
        Queries of all sequences; dtypes, strides and places as for ``attention``.
    k : array, shape (Tk, Hk, D)
        Keys, of q's dtype. Hk divides Hq.
    v : array, shape (Tk, Hk, Dv)
        Values, of q's dtype.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 array, shape (B + 1,)
        Where sequences begin and end: from 0, ascending, at most Tq and Tk. Lengths may be 0. Each lies where q lies,
        or is a NumPy array, which is checked, and copied to the device. Offsets on a device are not checked, unless
        the environment has CUPYFLASH_CHECK=1, but no array is read or written outside, whatever they hold.
    max_seqlen_q, max_seqlen_k : int, optional
        Lengths that no sequence exceeds; rows beyond are not computed. None: the longest sequence, for which offsets
        on a device are copied to the host, which waits for the device.
    scale, softcap, sinks, precision, family, tile
        As for ``attention``.
    causal : bool or "top_left"
        True: row i of a sequence sees its keys j <= i + its keys - its queries. "top_left": j <= i.
    window : tuple of int or None, optional
        (left, right) beside the diagonal of each sequence, as for ``attention``.
    bias : array, optional
        As for ``attention``; it broadcasts to (B, Hq, max_seqlen_q, max_seqlen_k), by position in the sequence.
    mask : bool array or function, optional
        As for ``attention``: an array that broadcasts likewise, or a function mask(b, h, i, j, *mask_args) of the
        number of the sequence, the query head, and of query and key as they are counted in the sequence.
    mask_args, score_args : tuple of arrays and numbers, optional
        As for ``attention``.
    score : function, optional
        score(s, b, h, i, j, *score_args), as for ``attention``; b, h, i and j are those of ``mask``.
    alibi_slopes : array, optional
        Broadcasts to (B, Hq).
    q_offset : int or integer array that broadcasts to (B,), optional
        Places the diagonal of each sequence instead.
    segment_ids : pair of integer arrays, optional
        As for ``attention``; they broadcast to (B, max_seqlen_q) and (B, max_seqlen_k), by position in the sequence.
    dropout, seed
        As for ``attention``; the batch entry of a weight is the number of its sequence, and its row and key are
        counted in the sequence.
    out : array or pair of arrays, optional
        Where to write: out, or (out, lse), which implies ``return_lse``.
    return_lse : bool
        Return the log-sum-exp too.

    Returns
    -------
    array, shape (Tq, Hq, Dv), or AttentionResult
        With ``return_lse``, (out, lse), where lse has shape (Hq, Tq). Rows behind the last sequence have out 0 and
        lse -inf.

    Raises
    ------
    ValueError
        Shapes, values, options or offsets that do not fit, before anything is compiled or launched.
    TypeError
        Dtypes and objects that are not supported, likewise.

    Notes
    -----
    The CPU and GPU kernels walk every sequence as an entry of a batch whose rows begin at its offset: nothing is padded
    or copied. Block sizes may depend on the longest sequence, and so may the last bits of a result.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import attention_varlen
    >>> q = k = v = np.ones((5, 4, 8), np.float32)  # two sequences, of 2 and of 3
    >>> attention_varlen(q, k, v, np.array([0, 2, 5]), np.array([0, 2, 5]), causal=True).shape
    (5, 4, 8)
    """
    check_flag("return_lse", return_lse)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, None, None, q_offset, segment_ids, dropout,
        seed, "shd", precision, score, score_args, mask_args,
    )  # fmt: skip
    ours, lse = split_out(out)
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = PackedCall(q, k, v, asked, cu_seqlens, max_seqlens, out=ours)
    ours, lse, _ = compute(call, family, tile, ours, lse, bool(return_lse))
    return as_given(out, ours, lse, return_lse)


def attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dlse: Any = None,
    wrt: Iterable[str] | None = None,
    grads_out: AttentionGradients | None = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    mask_args: tuple[Any, ...] = (),
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    deterministic: bool = True,
) -> AttentionGradients:
    """Gradients of attention of packed sequences: the vector-Jacobian product with dout, and with dlse where given.

    Parameters
    ----------
    dout : array, shape (Tq, Hq, Dv)
        Gradient of a scalar with respect to out, in q's dtype.
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k : array and int
        What ``attention_varlen`` was called with.
    scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args : optional
        Likewise.
    q_offset, segment_ids, dropout, seed, precision : optional
        Likewise.
    out, lse : array
        What ``attention_varlen(..., return_lse=True)`` returned.
    dlse : array, shape (Hq, Tq), optional
        Gradient of the scalar with respect to lse.
    wrt, grads_out, family, tile, deterministic : optional
        As for ``attention_backward``.

    Returns
    -------
    AttentionGradients
        In the shapes of the inputs. Rows behind the last sequence have gradients 0.

    Raises
    ------
    ValueError, TypeError
        As for ``attention_varlen``.
    """
    check_flag("deterministic", deterministic)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, None, None, q_offset, segment_ids, dropout,
        seed, "shd", precision, score, score_args, mask_args,
    )  # fmt: skip
    names = read_wrt(wrt, asked.differentiable)
    given = given_gradients(grads_out, score_args)
    beside = {name: take(name, x) for name, x in results_of(dout, out, lse, dlse).items()}
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = PackedCall(q, k, v, asked, cu_seqlens, max_seqlens, beside=beside, out=beside["out"])
    gradients, _ = differentiate(call, family, tile, names, given, deterministic)
    return gradients_of(gradients | given, score_args)


def attention_varlen_vjp(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    mask_args: tuple[Any, ...] = (),
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> tuple[Any, Callable[..., AttentionGradients]]:
    """Attention of packed sequences and the function that pulls gradients back through it.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_lse : array, int and bool
        As for ``attention_varlen``.
    scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args : optional
        Likewise.
    q_offset, segment_ids, dropout, seed, precision : optional
        Likewise.
    family, tile : optional
        Likewise, for both directions.
    deterministic : bool
        As for ``attention_backward``.

    Returns
    -------
    out : array, or AttentionResult with ``return_lse``
    vjp : callable
        ``vjp(dout, dlse=None, wrt=None)`` returns AttentionGradients. It holds its arrays by reference: do not change
        them before the last call.

    Raises
    ------
    ValueError, TypeError
        As for ``attention_varlen``.
    """
    check_flag("deterministic", deterministic)
    options: dict[str, Any] = {
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "scale": scale, "causal": causal, "window": window,
        "softcap": softcap, "bias": bias, "mask": mask, "mask_args": mask_args, "alibi_slopes": alibi_slopes,
        "sinks": sinks, "score": score, "score_args": score_args, "q_offset": q_offset, "segment_ids": segment_ids,
        "dropout": dropout, "seed": seed, "precision": precision, "family": family, "tile": tile,
    }  # fmt: skip
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
    result = attention_varlen(q, k, v, *cu_seqlens, return_lse=True, **options)

    def vjp(dout: Any, dlse: Any = None, wrt: Iterable[str] | None = None) -> AttentionGradients:
        return attention_varlen_backward(
            dout, q, k, v, result.out, result.lse, *cu_seqlens, dlse=dlse, wrt=wrt, deterministic=deterministic,
            **options,
        )  # fmt: skip

    return (result if return_lse else result.out), vjp


def explain_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    mask_args: tuple[Any, ...] = (),
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    backward: bool = False,
    wrt: Iterable[str] | None = None,
    deterministic: bool = True,
    device: str | None = None,
) -> Plan:
    """How a call on packed sequences would run, as ``explain`` says it of dense ones. Nothing runs or is compiled.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for ``attention_varlen``: nothing of q, k, v is read, and of the offsets what the host must know.
    scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args
        As for ``attention_varlen``.
    q_offset, segment_ids, dropout, seed, precision, family, tile, out
        As for ``attention_varlen``.
    backward, wrt, deterministic, device
        As for ``explain``, of ``attention_varlen_backward``.

    Returns
    -------
    Plan
        Prints as a table. A grid, or a workspace, is that of sequences which are all as long as the longest, as far as
        lengths are not known.

    Raises
    ------
    ValueError, TypeError
        As for ``attention_varlen`` and ``explain``.
    """
    check_flag("deterministic", deterministic)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, None, None, q_offset, segment_ids, dropout,
        seed, "shd", precision, score, score_args, mask_args,
    )  # fmt: skip
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = PackedCall(q, k, v, asked, cu_seqlens, max_seqlens, out=split_out(out)[0], device=device)
    return explain_call(call, out, family, tile, backward, wrt, deterministic, asked.differentiable)


def prepare_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: Any = None,
    mask: Any = None,
    mask_args: tuple[Any, ...] = (),
    alibi_slopes: Any = None,
    sinks: Any = None,
    score: Any = None,
    score_args: tuple[Any, ...] = (),
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    backward: bool = True,
    wrt: Iterable[str] | None = None,
    deterministic: bool = True,
) -> None:
    """Compile what a call on packed sequences needs, without running it, as ``prepare`` does for dense ones.

    Kernels depend on the longest sequence, head widths, dtypes and options; neither on how many sequences there are
    nor on their lengths.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        As for ``attention_varlen``: nothing of q, k, v is read, and of the offsets what the host must know.
    scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args
        As for ``attention_varlen``.
    q_offset, segment_ids, dropout, seed, precision, family, tile, out
        As for ``attention_varlen``.
    backward, wrt, deterministic
        As for ``prepare``, of ``attention_varlen_backward``.

    Raises
    ------
    ValueError, TypeError
        As for ``attention_varlen``.
    """
    check_flag("deterministic", deterministic)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, None, None, q_offset, segment_ids, dropout,
        seed, "shd", precision, score, score_args, mask_args,
    )  # fmt: skip
    cu_seqlens, max_seqlens = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    call = PackedCall(q, k, v, asked, cu_seqlens, max_seqlens, out=split_out(out)[0])
    prepare_call(call, out, family, tile, backward, wrt, deterministic, asked.differentiable)
