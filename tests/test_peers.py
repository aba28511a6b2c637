"""Ours beside other libraries' attention, where these are installed: the same options, the same numbers.

Each side is held against the specification, in float64: ours within its own bound, a peer within that of any
computation in its type, which holds for every order of summation. For a peer's gradients that is no promise, as it may
take P from a softmax and delta from a sum over keys, where the bound starts from an lse and an out that are given; but
on the CPU torch's and JAX's stay below a twentieth of it, their out and lse too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from peers import BATCH, HEADS, HEADS_K, KEYS, PEERS, ROWS, WIDTH, Answer, Question

from cupyflash import attention, attention_backward, explain
from cupyflash.testing import bounds, data, reference

NAMES = [(peer, name) for peer, (_, _, questions) in PEERS.items() for name in questions]
EVERY_QUESTION = pytest.mark.parametrize(("peer", "name"), NAMES, ids=[f"{peer}: {name}" for peer, name in NAMES])


def inputs(dtype: Any) -> list[np.ndarray]:
    """q, k, v and dout."""
    shapes = data.Shapes(
        (BATCH, HEADS, ROWS, WIDTH), (BATCH, HEADS_K, KEYS, WIDTH), (BATCH, HEADS_K, KEYS, WIDTH),
        (BATCH, HEADS, ROWS, WIDTH),
    )  # fmt: skip
    return list(data.draw("normal", np.random.default_rng(21), shapes, dtype)[:4])


def place(xp: Any, x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(place(xp, y) for y in x)
    return xp.asarray(x) if isinstance(x, np.ndarray) else x


def ask(peer: str, name: str, x: list[np.ndarray], xp: Any) -> Answer:
    """The peer's answer, from the same numbers in a type of 32 or 64 bits."""
    module, answer, questions = PEERS[peer]
    library = pytest.importorskip(module)
    if xp is not np and module == "torch" and not library.cuda.is_available():
        pytest.skip("torch without CUDA")
    if xp is not np and module == "jax" and library.default_backend() != "gpu":
        pytest.skip("JAX without a GPU")
    wide = np.float64 if x[0].dtype == np.float64 else np.float32
    if module == "jax" and wide is np.float64:
        pytest.skip("JAX computes softmax in float32")
    beside = questions[name].arrays()
    if module == "jax" or xp is not np:  # 64 bits are not JAX's, and booleans not every DLPack's
        narrow = {np.dtype(np.int64): np.int32, np.dtype(bool): np.uint8}
        beside = {name: y.astype(narrow.get(y.dtype, y.dtype)) for name, y in beside.items()}
    return answer(
        tuple(place(xp, y.astype(wide)) for y in x), {n: place(xp, np.ascontiguousarray(y)) for n, y in beside.items()},
        questions[name],
    )  # fmt: skip


def judge_ours(xp: Any, x: list[np.ndarray], options: dict[str, Any]) -> bounds.Report:
    """Out, lse and all gradients of ours."""
    q, k, v, dout = place(xp, tuple(x))
    here = {name: place(xp, y) for name, y in options.items()}
    out, lse = attention(q, k, v, return_lse=True, **here)
    grads = attention_backward(dout, q, k, v, out, lse, **here)
    forward, backward = explain(q, k, v, **here), explain(q, k, v, backward=True, **here)
    out, lse, *grads = (data.to_numpy(y) if hasattr(y, "shape") else y for y in (out, lse, *grads))
    if grads[5] is not None:
        grads[5] = tuple(None if y is None else data.to_numpy(y) for y in grads[5])
    return bounds.check_forward(
        *x[:3], out, lse, chain_d=forward.chain_d, chain_k=forward.chain_k, block_n=min(forward.block_n, KEYS),
        p_dtype=x[0].dtype if forward.rounds_p else None, **options,
    ) + bounds.check_backward(
        x[3], *x[:3], out, lse, grads, chain_d=backward.chain_d, chain_k=backward.chain_k, chain_q=backward.chain_q,
        p_dtype=x[0].dtype if backward.rounds_p else None, **options,
    )  # fmt: skip


def judge_peer(got: Answer, x: list[np.ndarray], options: dict[str, Any]) -> tuple[bounds.Report, bounds.Report]:
    """Out and lse, and the gradients, from its out and the specification's lse."""
    wide = got.out.dtype
    q, k, v, dout = (y.astype(wide) for y in x)
    rows = np.arange(ROWS) < options.get("q_lens", np.array(ROWS))[..., None]
    lse = reference.forward(q, k, v, **options).lse.astype(wide)
    forward = bounds.check_forward(q, k, v, got.out, got.lse, where=rows[..., None, :], **options)
    if not got.gradients:
        return forward, bounds.Report(())
    args = tuple(got.gradients.get(f"score_args[{n}]") for n in range(len(options.get("score_args", ()))))
    grads = [got.gradients.get(name) for name in ("q", "k", "v", "bias", "sinks")]
    backward = bounds.check_backward(
        dout, q, k, v, got.out, lse, [*grads, args if any(y is not None for y in args) else None], **options
    )
    return forward, backward


@pytest.mark.parametrize("dtype", data.DTYPES, ids=str)
@EVERY_QUESTION
def test_the_same_numbers(peer, name, dtype, backend):
    """Both sides answer what the specification says."""
    x, options = inputs(dtype), PEERS[peer][2][name].options
    forward, backward = judge_peer(ask(peer, name, x, backend.xp), x, options)
    assert forward.ok, f"{peer}\n{forward}"
    assert backward.ok, f"{peer}\n{backward}"
    assert len(backward.worst) >= 3 or (peer == "flex" and backend.name == "numpy")
    ours = judge_ours(backend.xp, x, options)
    assert ours.ok, ours
    assert len(ours.worst) >= 5


@EVERY_QUESTION
def test_what_is_almost_the_same_is_told_apart(peer, name):
    """The peer's answer is none to a question that differs in one pair, one length or one percent."""
    question: Question = PEERS[peer][2][name]
    x = inputs(np.float32)
    forward, backward = judge_peer(ask(peer, name, x, np), x, question.options | question.other)
    assert not forward.ok
    assert not backward.worst or not backward.ok
