"""The public functions. Each one checks, plans and launches; the work is in the modules of those names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import _ready
from ._arrays import take
from ._call import Call
from ._options import Asked
from ._plan import Plan, Tile
from ._problem import read_wrt
from ._results import (
    AttentionGradients,
    as_given,
    check_flag,
    compute,
    differentiate,
    given_gradients,
    gradients_among,
    gradients_of,
    results_of,
    split_out,
)
from ._unrun import explain_call, prepare_call


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    q_lens: Any = None,
    kv_lens: Any = None,
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    layout: str = "hsd",
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Exact attention: out = softmax(scale * q k^T) v, in memory that grows with the sequence, not its square.

    The logit of query row i and key j is score(softcap(scale * q_i . k_j) - slope |d_i - j| + bias_ij), with i's
    diagonal d_i, and -inf where the pair is hidden: by causal, window, mask, segment_ids, q_lens or kv_lens.

    NumPy arrays are computed on the CPU, CuPy arrays on their device and CuPy's current stream. Objects with
    ``__dlpack__`` or ``__cuda_array_interface__`` are read in place.

    Parameters
    ----------
    q : array, shape (..., Hq, Sq, D)
        Queries: float16, bfloat16 (ml_dtypes), float32 or float64. A 2-D array is one head.
    k : array, shape (..., Hk, Sk, D)
        Keys, of q's dtype. Query head h reads head h // (Hq // Hk), so Hk divides Hq.
    v : array, shape (..., Hk, Sk, Dv)
        Values, of q's dtype. The leading axes of q, k, v broadcast as in ``numpy.matmul``, without a copy.
    scale : float, optional
        Factor on q k^T; any finite number. None is 1/sqrt(D).
    causal : bool or "top_left"
        True: query row i sees keys j <= d_i. The diagonal d_i is i + Sk - Sq (bottom-right), with lengths
        i + kv_len - q_len. "top_left": d_i = i, and causal.
    window : pair of int or None, optional
        (left, right): row i sees keys d_i - left <= j <= d_i + right, with causal on or off. Each is at least 0; None
        is no bound. [1]_
    softcap : float, optional
        Caps scaled products: s becomes softcap * tanh(s / softcap). Finite and above 0. [2]_
    bias : array, broadcasts to (..., Hq, Sq, Sk), optional
        Added to the logits, float16, bfloat16, float32 or float64 whatever q is. -inf hides a pair.
    mask : boolean array, broadcasts to (..., Hq, Sq, Sk), or callable, optional
        True where row i may see key j. A function is called as ``mask(b, h, i, j, *mask_args)``, as ``score`` is.
    mask_args : tuple of arrays and numbers
        What a mask function gets beside positions.
    alibi_slopes : array, broadcasts to (..., Hq), optional
        Adds -slope * abs(d_i - j). Any float dtype; has no gradient. [3]_
    sinks : array, shape (Hq,), optional
        One logit for each query head, which joins the denominator of the softmax and has no value. Any float dtype;
        neither scaled nor capped. [4]_ [5]_
    score : callable, optional
        ``score(s, b, h, i, j, *score_args)`` takes the place of the logit s behind softcap, alibi_slopes and bias, at
        the pair of query i and key j of query head h and entry b of the flattened leading axes. Written in NumPy's
        terms; on a GPU it is traced to CUDA C, and differentiated by s. -inf hides a pair. Rules: docs/score.md.
    score_args : tuple of arrays and numbers
        What a score function gets beside s and positions: up to 8 arrays of up to 4 axes. Floats have a gradient.
    q_lens, kv_lens : int or integer array over the leading axes, optional
        How many rows and keys each batch entry has, from 0 to Sq and Sk. What lies beyond is never used; there out is 0
        and lse -inf. Arrays on a device are not looked at unless CUPYFLASH_CHECK=1 is in the environment: there a
        length outside counts as the nearest inside.
    q_offset : int or integer array over the leading axes, optional
        Places the diagonal, with causal on or off: d_i = i + q_offset. An array may hold one offset for each
        batch entry; it lies where q lies, or is a NumPy array, which is copied to the device. Not with "top_left".
    segment_ids : pair of integer arrays, optional
        (q_ids, kv_ids), which broadcast to (..., Sq) and (..., Sk): row i sees key j where their ids are equal.
    dropout : float
        Probability that a weight is dropped, at least 0 and below 1; what is kept is divided by 1 - dropout. lse is
        that of all weights. Which pairs are kept is a function of seed, batch entry, head, i and j alone. [6]_
    seed : int or array of int64 or uint64 without axes, optional
        From 0 to 2**64 - 1; needed with dropout above 0.
    layout : "hsd" or "shd"
        Order of the last three axes of q, k, v and out: (heads, seqlen, head_dim) or (seqlen, heads, head_dim).
    precision : None, "highest" or "ieee"
        Arithmetic of products. float64 takes None, 16-bit types None or "highest". 16-bit types may run on tensor
        cores: with None these round P, and in the backward dS, once to q's dtype; with "highest" each is the sum of
        two numbers of that dtype, off by 2**-17 of itself in bfloat16 and 2**-23 in float16, which takes half as many
        products again and more. float32 with "highest" may run on tensor cores, as sums of three bfloat16 numbers
        each, as exactly as IEEE arithmetic for numbers of at least 2**-102. Everything else computes with IEEE fused
        multiply-adds of the accumulation type (float64 for float64, on tensor cores where there are any, else float32).
    family : str, optional
        Kernel family to insist on: "sm90", "sm80" or "simt" for CuPy arrays, "cpu" for NumPy arrays. None lets the
        planner choose.
    tile : Tile, optional
        Block sizes for this call instead of the planner's.
    out : array or pair of arrays, optional
        Where to write: out, or (out, lse), which implies ``return_lse``. out has q's dtype, or float32 for
        16-bit q, which then leaves the result unrounded. Any strides, but no element shared with an input.
    return_lse : bool
        Return the log-sum-exp too.

    Returns
    -------
    array, shape (..., Hq, Sq, Dv), or AttentionResult
        In q's layout and dtype. With ``return_lse``, (out, lse) where lse has shape (..., Hq, Sq) in every layout
        and is the natural logarithm of the sum of exp(logit) over visible keys, and the sink: float32, float64 for
        float64. A row that sees no key has out 0 and lse -inf, or the sink.

    Raises
    ------
    ValueError
        Shapes, values or options that do not fit, before anything is compiled or launched.
    TypeError
        Dtypes and objects that are not supported, likewise.

    Notes
    -----
    The online softmax of Milakov and Gimelshein (2018), arXiv:1805.02867, over blocks as in FlashAttention-2,
    Dao (2023), arXiv:2307.08691, algorithm 1. Inputs are never written. The same call gives the same bits,
    whatever the batch, strides or layout. Hidden pairs are discarded by selection: a NaN or inf of their logits reaches
    nothing. Each option with an example: docs/options.md.

    References
    ----------
    .. [1] Beltagy, Peters and Cohan (2020), "Longformer", arXiv:2004.05150.
    .. [2] Gemma Team (2024), "Gemma 2", arXiv:2408.00118.
    .. [3] Press, Smith and Lewis (2021), "Train Short, Test Long" (ALiBi), arXiv:2108.12409.
    .. [4] Xiao et al. (2023), "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.
    .. [5] OpenAI (2025), "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925: sinks as learned logits.
    .. [6] Philox 4x32-10: Salmon, Moraes, Dror and Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3".

    Examples
    --------
    >>> import numpy as np
    >>> from cupyflash import attention
    >>> q = k = v = np.ones((2, 4, 8), np.float32)
    >>> attention(q, k, v).shape
    (2, 4, 8)
    """
    check_flag("return_lse", return_lse)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, q_offset, segment_ids,
        dropout, seed, layout, precision, score, score_args, mask_args,
    )  # fmt: skip
    look = _ready.look(asked, q)
    tensors = {"q": q, "k": k, "v": v, **look.arrays}
    inputs = len(tensors)
    if isinstance(out, tuple) and len(out) == 2:
        tensors["out"], tensors["lse"] = out
    elif out is not None:
        tensors["out"] = out
    outputs = len(tensors) - inputs
    key = _ready.signature("forward", tensors, look.options, (family, tile, bool(return_lse)))
    if (done := _ready.run(key, tensors, outputs, look.numbers)) is not None:
        return as_given(out, done["out"], done.get("lse"), return_lse)
    ours, lse = split_out(out)
    call = Call(q, k, v, asked, out=ours, functions=look.functions)
    ours, lse, ready = compute(call, family, tile, ours, lse, bool(return_lse))
    made = (("out", ours), ("lse", lse))[outputs:]
    _ready.keep(key, tensors, ready, _ready.specs(made))
    return as_given(out, ours, lse, return_lse)


def attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
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
    q_lens: Any = None,
    kv_lens: Any = None,
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    layout: str = "hsd",
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    deterministic: bool = True,
) -> AttentionGradients:
    """Gradients of attention: the vector-Jacobian product with dout, and with dlse where given.

    The attention matrix is computed again, block by block, from q, k and lse; nothing of size Sq x Sk is stored.

    Parameters
    ----------
    dout : array, shape of out
        Gradient of a scalar with respect to out, in q's dtype.
    q, k, v : array
        What ``attention`` was called with.
    out, lse : array
        What ``attention(..., return_lse=True)`` returned. out may be float32 for 16-bit q.
    dlse : array, shape of lse, optional
        Gradient of the scalar with respect to lse. It is not read where lse is -inf.
    wrt : tuple of {"q", "k", "v", "bias", "sinks", "score_args"}, optional
        Which gradients to compute. None: those of q, k, v, and of bias, sinks and float score_args where given.
    grads_out : AttentionGradients, optional
        Arrays to write into; None entries are allocated. Each has its input's shape and dtype.
    scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args
        What ``attention`` was called with.
    q_lens, kv_lens, q_offset, segment_ids, dropout, seed, layout, precision
        What ``attention`` was called with: the seed too.
    family, tile : optional
        As for ``attention``, for this call's kernels.
    deterministic : bool
        True: the same bits on every run. False permits dq to differ from run to run where that is faster: for heads
        wider than 128 in the "sm90" family, which then adds its parts in the order in which they arrive; and it permits
        gradients of score_args whose index is none of b, h, i, j, a constant, j - i plus a constant, clipped or not.

    Returns
    -------
    AttentionGradients
        dq, dk, dv, dbias, dsinks, and the entries of dscore_args, a tuple with one for each of score_args: shape,
        layout and dtype of their inputs, summed over broadcast axes and over the query heads of a group in the
        accumulation type, in a fixed order. None where ``wrt`` leaves one out, and for integers and booleans. dbias is
        0 at hidden pairs; dq of rows beyond q_lens, and dk, dv of keys beyond kv_lens, are 0.

    Raises
    ------
    ValueError, TypeError
        As for ``attention``; ValueError if ``wrt`` names what the call does not have, or if a gradient of score_args
        has no fixed order and ``deterministic`` asks for one.

    Notes
    -----
    With p = exp(s - lse), dp = dout v^T, delta = sum_d dout out - dlse and ds = p (dp - delta): dv = p^T dout,
    dq = scale ds k, dk = scale ds^T q. FlashAttention-2, Dao (2023), arXiv:2307.08691, algorithm 2. dbias is ds; dsinks
    is the sum over rows of -exp(sink - lse) delta. score multiplies ds by its slope, in dbias too; softcap by its own,
    1 - tanh(scale q.k / softcap)^2, in dq and dk; dropout multiplies dp, and p in dv, by 0 or 1 / (1 - dropout).
    """
    check_flag("deterministic", deterministic)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, q_offset, segment_ids,
        dropout, seed, layout, precision, score, score_args, mask_args,
    )  # fmt: skip
    names = read_wrt(wrt, asked.differentiable)
    given = given_gradients(grads_out, score_args)
    look = _ready.look(asked, q)
    tensors = results_of(dout, out, lse, dlse) | {"q": q, "k": k, "v": v, **look.arrays, **given}
    more = (family, tile, bool(deterministic), names, tuple(given))
    key = _ready.signature("backward", tensors, look.options, more)
    if (done := _ready.run(key, tensors, len(given), look.numbers)) is not None:
        return gradients_of(gradients_among(done, names), score_args)
    beside = {name: take(name, x) for name, x in results_of(dout, out, lse, dlse).items()}
    call = Call(q, k, v, asked, beside=beside, out=beside["out"], functions=look.functions)
    gradients, ready = differentiate(call, family, tile, names, given, deterministic)
    made = tuple((name, x) for name, x in gradients.items() if name not in given)
    _ready.keep(key, tensors, ready, _ready.specs(made))
    return gradients_of(gradients | given, score_args)


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    q_lens: Any = None,
    kv_lens: Any = None,
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    layout: str = "hsd",
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> tuple[Any, Callable[..., AttentionGradients]]:
    """Attention and the function that pulls gradients back through it.

    Parameters
    ----------
    q, k, v, scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args
        As for ``attention``.
    q_lens, kv_lens, q_offset, segment_ids, dropout, seed, layout, precision, family, tile, return_lse
        As for ``attention``.
    deterministic
        As for ``attention_backward``.

    Returns
    -------
    out : array, or AttentionResult with ``return_lse``
    vjp : callable
        ``vjp(dout, dlse=None, wrt=None)`` returns AttentionGradients. It holds all arrays, out and lse among them, by
        reference: do not change them before the last call.

    Raises
    ------
    ValueError, TypeError
        As for ``attention``.
    """
    check_flag("deterministic", deterministic)
    options: dict[str, Any] = {
        "scale": scale, "causal": causal, "window": window, "softcap": softcap, "bias": bias, "mask": mask,
        "mask_args": mask_args, "alibi_slopes": alibi_slopes, "sinks": sinks, "score": score, "score_args": score_args,
        "q_lens": q_lens, "kv_lens": kv_lens, "q_offset": q_offset,
        "segment_ids": segment_ids, "dropout": dropout, "seed": seed, "layout": layout, "precision": precision,
        "family": family, "tile": tile,
    }  # fmt: skip
    result = attention(q, k, v, return_lse=True, **options)

    def vjp(dout: Any, dlse: Any = None, wrt: Iterable[str] | None = None) -> AttentionGradients:
        return attention_backward(dout, q, k, v, *result, dlse=dlse, wrt=wrt, deterministic=deterministic, **options)

    return (result if return_lse else result.out), vjp


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    q_lens: Any = None,
    kv_lens: Any = None,
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    layout: str = "hsd",
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    backward: bool = False,
    wrt: Iterable[str] | None = None,
    deterministic: bool = True,
    device: str | None = None,
) -> Plan:
    """How a call would run: family, tile, grid, shared memory, workspace, copies. Nothing runs or is compiled.

    Parameters
    ----------
    q, k, v, scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args
        As for ``attention``.
    q_lens, kv_lens, q_offset, segment_ids, dropout, seed, layout, precision, family, tile, out
        As for ``attention``.
    backward : bool
        Explain ``attention_backward`` instead.
    wrt, deterministic : optional
        As for ``attention_backward``; they need ``backward=True``.
    device : str, optional
        Plan for a GPU of this architecture, such as "sm_90", instead of where the arrays lie. It needs no GPU, and
        NumPy arrays do.

    Returns
    -------
    Plan
        Prints as a table.

    Raises
    ------
    ValueError, TypeError
        As for ``attention``; ValueError for an unknown ``device``, and for a tile that does not fit it.
    """
    check_flag("deterministic", deterministic)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, q_offset, segment_ids,
        dropout, seed, layout, precision, score, score_args, mask_args,
    )  # fmt: skip
    call = Call(q, k, v, asked, out=split_out(out)[0], device=device)
    return explain_call(call, out, family, tile, backward, wrt, deterministic, asked.differentiable)


def prepare(
    q: Any,
    k: Any,
    v: Any,
    *,
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
    q_lens: Any = None,
    kv_lens: Any = None,
    q_offset: Any = None,
    segment_ids: tuple[Any, Any] | None = None,
    dropout: float = 0.0,
    seed: Any = None,
    layout: str = "hsd",
    precision: str | None = None,
    family: str | None = None,
    tile: Tile | None = None,
    out: Any = None,
    backward: bool = True,
    wrt: Iterable[str] | None = None,
    deterministic: bool = True,
) -> None:
    """Compile what a call needs, without running it: for latency, and before a CUDA graph is captured.

    Parameters
    ----------
    q, k, v, scale, causal, window, softcap, bias, mask, mask_args, alibi_slopes, sinks, score, score_args
        As for ``attention``.
    q_lens, kv_lens, q_offset, segment_ids, dropout, seed, layout, precision, family, tile, out
        As for ``attention``.
    backward : bool
        Prepare ``attention_backward`` too, for the gradients in ``wrt``.
    wrt, deterministic : optional
        As for ``attention_backward``.

    Raises
    ------
    ValueError, TypeError
        As for ``attention``.
    """
    check_flag("deterministic", deterministic)
    asked = Asked(
        scale, causal, window, softcap, bias, mask, alibi_slopes, sinks, q_lens, kv_lens, q_offset, segment_ids,
        dropout, seed, layout, precision, score, score_args, mask_args,
    )  # fmt: skip
    call = Call(q, k, v, asked, out=split_out(out)[0])
    prepare_call(call, out, family, tile, backward, wrt, deterministic, asked.differentiable)
