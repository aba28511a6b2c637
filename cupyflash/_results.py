"""What calls return and write into, and the two ways from a checked Call to it: for dense and packed arrays alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arrays import Array, same_place, take
from ._call import Call
from ._plan import Tile
from ._problem import GRADIENTS, check_gradient_out, check_out, check_results
from ._score_args import GRADIENT_ARGS, argument_name, argument_place
from ._terms import float_args

if TYPE_CHECKING:
    from ._cpu import Small
    from ._launch import Ready


class AttentionResult(NamedTuple):
    """What ``attention(..., return_lse=True)`` returns: the output and its log-sum-exp."""

    out: Any
    lse: Any


class AttentionGradients(NamedTuple):
    """Gradients by name, None where not asked for. Use the names: later versions may add fields at the end.

    dq, dk, dv, dbias and dsinks have the shape and dtype of q, k, v, bias and sinks. dscore_args is a tuple as long as
    score_args, with the gradients of the floats among them, None for the others.
    """

    dq: Any = None
    dk: Any = None
    dv: Any = None
    dbias: Any = None
    dsinks: Any = None
    dscore_args: Any = None


# ---------------------------------------------------------------------------------------------------------- forward


def compute(
    call: Call, family: str | None, tile: Tile | None, out: Array | None, lse: Array | None, pair: bool
) -> tuple[Array, Array | None, Ready | Small | None]:
    """Out and lse of a call, into the arrays of ``out=`` where there are some; lse only for a ``pair``.

    The last of the three is what calls like this one can run again, if anything.
    """
    if out is not None:
        check_out_of(call, out, lse)
    plan = call.plan(family, tile)
    out, lse = call.allocate(out, lse, pair)
    return out, lse, call.forward(plan, out, lse)


def as_given(given: Any, out: Array, lse: Array | None, pair: bool) -> Any:
    """What the forward returns: the user's own objects of ``out=``, of which ours may be views, or new arrays."""
    if isinstance(given, tuple):
        return AttentionResult(*given)
    out = out if given is None else given
    return AttentionResult(out, lse) if pair else out


def split_out(out: Any) -> tuple[Array | None, Array | None]:
    """The arrays of ``out=``: neither, out alone, or out and lse."""
    if out is None:
        return None, None
    if not isinstance(out, tuple):
        return take("out", out), None
    if len(out) != 2:
        raise ValueError(f"out is a tuple of {len(out)}: out= is an array or the pair (out, lse)")
    return take("out[0]", out[0]), take("out[1]", out[1])


def check_out_of(call: Call, out: Array, lse: Array | None) -> None:
    same_place({"q": call.inputs["q"], "out": out} | ({} if lse is None else {"out[1]": lse}))
    check_out(call.problem, out, lse, call.named())

# --------------------------------------------------------------------------------------------------------- backward


def differentiate(
    call: Call,
    family: str | None,
    tile: Tile | None,
    names: frozenset[str],
    given: dict[str, Any],
    deterministic: bool,
) -> tuple[dict[str, Array], Ready | None]:
    """The gradients of a call, "dq" and so on, into the arrays of ``grads_out=`` that are given.

    The other of the two is what calls like this one can run again, if anything.
    """
    check_results(call.problem, call.inputs)
    taken = _check_grads_out(call, names, given)
    plan = call.plan(family, tile, names, deterministic)
    gradients = {f"d{name}": _gradient(call, name, taken) for name in _inputs_of(call, names)}
    return gradients, call.backward(plan, gradients)


def _inputs_of(call: Call, names: frozenset[str]) -> list[str]:
    """What has a gradient among what ``names`` asks for, by its name among the call's inputs."""
    args = [argument_name("score_args", n) for n in float_args(call.problem.options)]
    return [x for name in GRADIENTS if name in names for x in (args if name == "score_args" else (name,))]


def gradients_among(tensors: dict[str, Array], names: frozenset[str]) -> dict[str, Array]:
    """The gradients that ``names`` asks for among all tensors of a backward, by name."""
    found = {f"d{name}": tensors[f"d{name}"] for name in names if name != "score_args"}
    args = {name: x for name, x in tensors.items() if (place := argument_place(name)) and place[0] == GRADIENT_ARGS}
    return found | args


def gradients_of(gradients: dict[str, Any], score_args: tuple[Any, ...]) -> AttentionGradients:
    """What the backward returns, from gradients by name."""
    found = {name: x for name, x in gradients.items() if not argument_place(name)}
    if len(found) < len(gradients):
        places = (argument_name(GRADIENT_ARGS, n) for n in range(len(score_args)))
        found[GRADIENT_ARGS] = tuple(gradients.get(place) for place in places)
    return AttentionGradients(**found)


def given_gradients(grads_out: object, score_args: Any = ()) -> dict[str, Any]:
    """The arrays of ``grads_out=`` by name, as they came; those of dscore_args, one for each of score_args, apart."""
    if grads_out is None:
        return {}
    if not isinstance(grads_out, AttentionGradients):
        raise TypeError(f"grads_out is a {type(grads_out).__name__}: pass cupyflash.AttentionGradients(dq=..., ...)")
    found = {name: x for name, x in grads_out._asdict().items() if x is not None}
    args = found.pop(GRADIENT_ARGS, ())
    if not isinstance(args, tuple) or (args and len(args) != len(score_args)):
        seen = f"of {len(args)}" if isinstance(args, tuple) else f"{args!r}"
        raise ValueError(f"grads_out.dscore_args is {seen}: it is a tuple with one entry for each of score_args")
    return found | {argument_name(GRADIENT_ARGS, n): x for n, x in enumerate(args) if x is not None}


def results_of(dout: Any, out: Any, lse: Any, dlse: Any) -> dict[str, Any]:
    """What a backward gets beside q, k, v, by name, as it came."""
    found = {"dout": dout, "out": out, "lse": lse}
    return found if dlse is None else found | {"dlse": dlse}


def _check_grads_out(call: Call, names: frozenset[str], given: dict[str, Any]) -> dict[str, Array]:
    """The arrays of ``grads_out=`` by input name, checked."""
    taken: dict[str, Array] = {}
    others = dict(call.inputs)
    for gradient, x in given.items():
        name = gradient[1:]
        if name not in call.inputs or name not in _inputs_of(call, names):
            raise ValueError(f"grads_out.{gradient} is given, but wrt={tuple(sorted(names))} leaves {name!r} out")
        x = take(f"grads_out.{gradient}", x)
        same_place({"q": call.inputs["q"], f"grads_out.{gradient}": x})
        check_gradient_out(name, x, call.inputs[name], others)
        taken[name] = others[f"grads_out.{gradient}"] = x
    return taken


def _gradient(call: Call, name: str, taken: dict[str, Array]) -> Array:
    if name in taken:
        return taken[name]
    like = call.inputs[name]
    return call.empty(like.shape, like.dtype)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r}: {name} is True or False")
