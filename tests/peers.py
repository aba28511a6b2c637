"""Attention of other libraries, asked for the same options as ours: for test_peers.

A Question is one computation in our words and in a peer's. Peers get the same numbers in float32 or float64, on the
host or through DLPack on a device, and answer with NumPy arrays in our layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupyflash._program.contenders import as_jax, as_torch
from cupyflash.testing.functions import SCORES

BATCH, HEADS, HEADS_K, ROWS, KEYS, WIDTH = 2, 4, 2, 33, 47, 24


@dataclass(frozen=True)
class Question:
    """One computation.

    Attributes
    ----------
    options : dict
        Ours.
    other : dict
        What makes options that are almost the same of them: a test must tell their results apart.
    ask : callable
        Of the library's module and its arrays by name: what the peer gets beside q, k, v.
    """

    options: dict[str, Any]
    other: dict[str, Any]
    ask: Callable[[Any, dict[str, Any]], Any]

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays among options, by name; score_args as "score_args[0]" and so on."""
        found = {}
        for name, x in self.options.items():
            parts = {f"{name}[{n}]": part for n, part in enumerate(x)} if isinstance(x, tuple) else {name: x}
            found |= {part: y for part, y in parts.items() if isinstance(y, np.ndarray)}
        return found


class Answer(NamedTuple):
    """A peer's results; gradients by the name of what they are of."""

    out: np.ndarray
    lse: np.ndarray | None
    gradients: dict[str, np.ndarray]


Inputs = tuple[np.ndarray, ...]  # q, k, v, dout


# ------------------------------------------------------------------------------------------------------ what is asked

RNG = np.random.default_rng(20)
MASK = RNG.random((BATCH, 1, ROWS, KEYS)) < 0.7
MASK[..., 3] = True
OTHER_MASK = MASK.copy()
OTHER_MASK[1, 0, 5, 3] = False
BIAS = RNG.standard_normal((HEADS, ROWS, KEYS)).astype(np.float32)
OTHER_BIAS = BIAS.copy()
OTHER_BIAS[2, 7, 9] += 1
KEY_BIAS = RNG.standard_normal((BATCH, 1, 1, KEYS)).astype(np.float32)
SLOPES = np.array([0.5, 0.25, 0.125, -0.0625], np.float32)
TABLE = RNG.standard_normal((HEADS, 9)).astype(np.float32)
GAIN = RNG.uniform(-1.5, 1.5, (BATCH, KEYS)).astype(np.float32)
LESS = RNG.standard_normal(ROWS).astype(np.float32)
IDS = np.minimum(np.arange(ROWS) // 9, 3), np.minimum(np.arange(KEYS) // 11, 3)
OTHER_IDS = IDS[0], np.minimum(np.arange(KEYS) // 11, 2)
Q_LENS, KV_LENS = np.array([33, 20]), np.array([9, 47])
OFFSET = KEYS - ROWS


def scored(name: str, *args: Any) -> dict[str, Any]:
    return {"score": SCORES[name].function, "score_args": args}


def grid(lib: Any, x: dict[str, Any]) -> tuple[Any, Any]:
    """Rows and keys as torch counts them, on the device of q."""
    where = x["q"].device
    return lib.arange(ROWS, device=where)[:, None], lib.arange(KEYS, device=where)[None, :]


def by_pair(make: Callable[[Any, Any, Any, dict[str, Any]], Any]) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
    """What SDPA gets where a mask or bias is made of i and j."""
    return lambda lib, x: {"attn_mask": make(lib, *grid(lib, x), x)}


SDPA = {
    "plain": Question({}, {"causal": True}, lambda lib, x: {}),
    "scale": Question({"scale": -0.7}, {"scale": 0.7}, lambda lib, x: {"scale": -0.7}),
    "causal, from the top": Question({"causal": "top_left"}, {"causal": True}, lambda lib, x: {"is_causal": True}),
    "causal": Question({"causal": True}, {"causal": "top_left"}, by_pair(lambda lib, i, j, x: j <= i + OFFSET)),
    "window": Question(
        {"window": (6, 9)}, {"window": (6, 10)},
        by_pair(lambda lib, i, j, x: (i + OFFSET - j <= 6) & (j - i - OFFSET <= 9)),
    ),
    "mask": Question({"mask": MASK}, {"mask": OTHER_MASK}, lambda lib, x: {"attn_mask": x["mask"].bool()}),
    "bias": Question({"bias": BIAS}, {"bias": OTHER_BIAS}, lambda lib, x: {"attn_mask": x["bias"]}),
    "bias of keys": Question({"bias": KEY_BIAS}, {"bias": KEY_BIAS[::-1]}, lambda lib, x: {"attn_mask": x["bias"]}),
    "segments": Question(
        {"segment_ids": IDS}, {"segment_ids": OTHER_IDS},
        lambda lib, x: {"attn_mask": x["segment_ids[0]"][:, None] == x["segment_ids[1]"]},
    ),
    "slopes": Question(
        {"alibi_slopes": SLOPES}, {"q_offset": OFFSET + 1},
        by_pair(lambda lib, i, j, x: -x["alibi_slopes"][:, None, None] * abs(i + OFFSET - j)),
    ),
    "distance": Question(
        scored("distance", SLOPES), {"score_args": (SLOPES * np.float32(1.01),)},
        by_pair(lambda lib, i, j, x: x["score_args[0]"][:, None, None] * (j - i)),
    ),
    "relative": Question(
        scored("relative", TABLE), {"score_args": (TABLE[::-1],)},
        by_pair(lambda lib, i, j, x: x["score_args[0]"][:, (j - i + 4).clamp(0, 8)]),
    ),
}  # fmt: skip

FLEX = {
    "distance": Question(
        scored("distance", SLOPES), {"score_args": (SLOPES * np.float32(1.01),)},
        lambda lib, x: (lambda s, b, h, i, j: s + x["score_args[0]"][h] * (j - i), None),
    ),
    "slopes": Question(
        {"alibi_slopes": SLOPES}, {"q_offset": OFFSET + 1},
        lambda lib, x: (lambda s, b, h, i, j: s - x["alibi_slopes"][h] * (i + OFFSET - j).abs(), None),
    ),
    "relative": Question(
        scored("relative", TABLE), {"score_args": (TABLE[::-1],)},
        lambda lib, x: (lambda s, b, h, i, j: s + x["score_args[0]"][h, (j - i + 4).clamp(0, 8)], None),
    ),
    "gain": Question(
        scored("gain", GAIN, LESS), {"score_args": (GAIN, LESS[::-1])},
        lambda lib, x: (lambda s, b, h, i, j: s * x["score_args[0]"][b, j] - x["score_args[1]"][i], None),
    ),
    "softcap": Question(
        {"softcap": 2.0}, {"softcap": 2.01}, lambda lib, x: (lambda s, b, h, i, j: 2 * lib.tanh(s / 2), None)
    ),
    "capped": Question(
        scored("capped"), {"softcap": 4.5}, lambda lib, x: (lambda s, b, h, i, j: 5 * lib.tanh(s / 5), None)
    ),
    "window": Question(
        {"causal": True, "window": (8, None)}, {"window": (9, None)},
        lambda lib, x: (None, lambda b, h, i, j: (j <= i + OFFSET) & (i + OFFSET - j <= 8)),
    ),
    "documents": Question(
        {"segment_ids": IDS}, {"segment_ids": OTHER_IDS},
        lambda lib, x: (None, lambda b, h, i, j: x["segment_ids[0]"][i] == x["segment_ids[1]"][j]),
    ),
    "mask function": Question(
        {"mask": lambda b, h, i, j: (i - j + h) % 7 < 5}, {"mask": lambda b, h, i, j: (i - j - h) % 7 < 5},
        lambda lib, x: (None, lambda b, h, i, j: (i - j + h) % 7 < 5),
    ),
    "in this order": Question(
        {"causal": True, "softcap": 2.0, "bias": BIAS, **scored("relative", TABLE)}, {"scale": 0.25},
        lambda lib, x: (
            lambda s, b, h, i, j:
                2 * lib.tanh(s / 2) + x["bias"][h, i, j] + x["score_args[0]"][h, (j - i + 4).clamp(0, 8)],
            lambda b, h, i, j: j <= i + OFFSET,
        ),
    ),
}  # fmt: skip

JAX = {
    "plain": Question({}, {"causal": True}, lambda lib, x: {}),
    "causal, from the top": Question({"causal": "top_left"}, {"causal": True}, lambda lib, x: {"is_causal": True}),
    "mask": Question({"mask": MASK}, {"mask": OTHER_MASK}, lambda lib, x: {"mask": x["mask"].astype(bool)}),
    "bias": Question({"bias": BIAS[None]}, {"bias": OTHER_BIAS[None]}, lambda lib, x: {"bias": x["bias"]}),
    "bias of keys": Question({"bias": KEY_BIAS}, {"bias": KEY_BIAS[::-1]}, lambda lib, x: {"bias": x["bias"]}),
    "window": Question(
        {"q_offset": 0, "window": (6, 9)}, {"window": (6, 10)}, lambda lib, x: {"local_window_size": (6, 9)}
    ),
    "causal window and a bias": Question(
        {"causal": "top_left", "window": (8, None), "bias": BIAS[None]}, {"window": (9, None)},
        lambda lib, x: {"is_causal": True, "local_window_size": (8, 0), "bias": x["bias"]},
    ),
    "lengths": Question(
        {"q_lens": Q_LENS, "kv_lens": KV_LENS}, {"kv_lens": KV_LENS - [0, 1]},
        lambda lib, x: {"query_seq_lengths": x["q_lens"], "key_value_seq_lengths": x["kv_lens"]},
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- who answers it


def leaves(arrays: dict[str, Any], differentiable: Callable[[Any], bool]) -> tuple[str, ...]:
    """What gradients are asked for: q, k, v and floats beside them, of which slopes have none here."""
    return tuple(name for name, x in arrays.items() if name != "alibi_slopes" and differentiable(x))


def torch_sdpa(inputs: Inputs, beside: dict[str, Any], question: Question) -> Answer:
    import torch

    *qkv, dout = map(as_torch, inputs)
    x = dict(zip("qkv", qkv, strict=True)) | {name: as_torch(y) for name, y in beside.items()}
    x = {name: y.to(dout.dtype) if y.is_floating_point() else y for name, y in x.items()}
    names = leaves(x, lambda y: y.is_floating_point())
    for name in names:
        x[name] = x[name].detach().requires_grad_()
    more = question.ask(torch, x)
    out = torch.nn.functional.scaled_dot_product_attention(*(x[name] for name in "qkv"), enable_gqa=True, **more)
    grads = torch.autograd.grad(out, [x[name] for name in names], dout)
    return Answer(of_torch(out), None, {name: of_torch(y) for name, y in zip(names, grads, strict=True)})


def torch_flex(inputs: Inputs, beside: dict[str, Any], question: Question) -> Answer:
    """Gradients of q, k, v alone, and only on a device: on the CPU FlexAttention has none."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *qkv, dout = map(as_torch, inputs)
    x = dict(zip("qkv", qkv, strict=True)) | {name: as_torch(y) for name, y in beside.items()}
    score_mod, mask_mod = question.ask(torch, x)
    mask = None
    if mask_mod is not None:
        mask = create_block_mask(mask_mod, BATCH, HEADS, ROWS, KEYS, device=dout.device)
    if dout.is_cuda:
        qkv = [y.detach().requires_grad_() for y in qkv]
    out, lse = flex_attention(*qkv, score_mod=score_mod, block_mask=mask, enable_gqa=True, return_lse=True)
    grads = torch.autograd.grad(out, qkv, dout) if dout.is_cuda else ()
    return Answer(of_torch(out), of_torch(lse), dict(zip("qkv", map(of_torch, grads), strict=False)))


def of_torch(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy()


def jax_dot_product(inputs: Inputs, beside: dict[str, Any], question: Question) -> Answer:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others use this device, too
    import jax

    q, k, v, dout = (as_jax(x).swapaxes(1, 2) for x in inputs)
    x = {"q": q, "k": k, "v": v} | {name: as_jax(y) for name, y in beside.items()}
    names = leaves(x, lambda y: jax.numpy.issubdtype(y.dtype, jax.numpy.floating))

    def out_of(*values: Any) -> Any:
        given = x | dict(zip(names, values, strict=True))
        more = question.ask(jax.numpy, given)
        return jax.nn.dot_product_attention(*(given[name] for name in "qkv"), return_residual=True, **more)

    with jax.default_matmul_precision("highest"):
        (out, lse), pull = jax.vjp(out_of, *(x[name] for name in names))
        grads = dict(zip(names, pull((dout, jax.numpy.zeros_like(lse))), strict=True))
    grads |= {name: grads[name].swapaxes(1, 2) for name in "qkv"}
    return Answer(
        np.asarray(out.swapaxes(1, 2)), np.asarray(lse.swapaxes(1, 2)), {n: np.asarray(y) for n, y in grads.items()}
    )


PEERS: dict[str, tuple[str, Callable[..., Answer], dict[str, Question]]] = {
    "sdpa": ("torch", torch_sdpa, SDPA),
    "flex": ("torch", torch_flex, FLEX),
    "jax": ("jax", jax_dot_product, JAX),
}
