"""From a Spec to a loaded kernel: a prelude of named constants, the kernel's text with its words inlined, NVRTC.

CuPy keys its disk cache by the text it compiles, not by included files; so includes are inlined here, under
``#line`` marks that make compiler messages point at the real file.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ._arrays import BFLOAT16, import_cupy
from ._params import PARAMS_BYTES
from ._params_decode import DECODE_PARAMS_BYTES
from ._params_merge import MERGE_PARAMS_BYTES
from ._score_args import FUNCTION_ARGS_BYTES
from ._tma import MAPPED_PARAMS_BYTES

_INCLUDE = re.compile(r'^\s*#include "([\w.]+)"\s*$')
# Kernels that carry a struct of their own, by the first word of their names: what its size is called.
_OWN_PARAMS = {
    "combine": ("MERGE_PARAMS_BYTES", MERGE_PARAMS_BYTES), "decode": ("DECODE_PARAMS_BYTES", DECODE_PARAMS_BYTES)
}  # fmt: skip
_C_TYPES = {
    np.dtype(np.float16): "Float16",
    BFLOAT16: "Bfloat16",
    np.dtype(np.float32): "float",
    np.dtype(np.float64): "double",
}
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for. Each field is one named line of the prelude.

    Lengths, strides, head counts and the unpadded widths are run-time values in Params, so that few kernels
    serve all problems.
    """

    kernel: str
    element: np.dtype  # q, k, v, dout
    output: np.dtype  # out
    accumulator: np.dtype  # products, softmax, lse, delta
    gradient: np.dtype  # dq, dk, dv as the kernel stores them
    head_dim: int  # padded
    head_dim_v: int  # padded
    dim_chunk: int
    block_m: int
    block_n: int
    num_stages: int
    num_warps: int
    causal: bool
    scale_sign: int = 1  # of the softmax scale: -1, 0 or 1
    overlap: bool = False  # of the products of one block with the softmax of another, inside a warp or warpgroup
    min_blocks: int = 1  # thread blocks that share a multiprocessor, and so its registers
    # sm90 family only:
    q_stages: int = 1  # buffers of Q
    take_turns: bool = False  # two consumers issue their products in turn
    # sm80 family only:
    q_held: int = 0  # of Q's steps of 16 columns, how many stay in registers
    pack_heads: bool = False  # rows of a tile are queries of all heads that share a kv head
    split_p: bool = False  # P, and dS, in two parts, whose sum is exact beyond what one of them holds
    # what a logit is made of, and who sees whom:
    window: bool = False
    lens: bool = False
    packed: bool = False  # entries lie one behind the other, and have lengths of their own
    softcap: bool = False
    alibi: bool = False
    slope: np.dtype = FLOAT32
    has_bias: bool = False
    bias: np.dtype = FLOAT32
    has_mask: bool = False
    has_score: bool = False
    score_text: str = ""  # its CUDA C, behind kernels/traced.cuh
    mask_function: bool = False
    mask_text: str = ""
    segments: bool = False
    sinks: bool = False
    sink: np.dtype = FLOAT32
    dropout: bool = False
    sum_rows: bool = False  # bwd_bias_*: of dbias
    sum_cols: bool = False
    sum_heads: bool = False
    # bwd_sm90 and its preparation:
    gradient_q: np.dtype = FLOAT32  # dq as it is stored
    deterministic: bool = True  # dq is added up in a fixed order
    want_dq: bool = True
    want_dk: bool = True
    want_dv: bool = True

    def prelude(self) -> str:
        """The constants as C++, one line each; also the debug dump."""
        lines = ["struct Float16;", "struct Bfloat16;"]
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.dtype):
                lines.append(f"using {field.name.capitalize()} = {_C_TYPES[value]};")
            elif isinstance(value, bool):
                lines.append(f"constexpr bool {field.name.upper()} = {str(value).lower()};")
            elif isinstance(value, int):
                lines.append(f"constexpr int {field.name.upper()} = {value};")
        lines.append(f"constexpr int PARAMS_BYTES = {PARAMS_BYTES}, MAPPED_PARAMS_BYTES = {MAPPED_PARAMS_BYTES};")
        lines.append(f"constexpr int FUNCTION_ARGS_BYTES = {FUNCTION_ARGS_BYTES};")
        if (own := _OWN_PARAMS.get(self.kernel.split("_")[0])) is not None:
            lines.append(f"constexpr int {own[0]} = {own[1]};")
        return "\n".join(lines) + "\n"


def kernels_dir() -> Path:
    """The folder of the CUDA sources: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "kernels", here.parent / "kernels"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no kernels folder in {here} or {here.parent}: the installation is incomplete")


_TRACED = "traced.cuh"  # the word that a call's functions follow


@lru_cache(maxsize=64)
def kernel_text(kernel: str, functions: str = "") -> str:
    """The text of kernels/<kernel>.cu with every word it includes inlined once, and with a call's functions."""
    lines: list[str] = []
    seen: set[str] = set()

    def inline(name: str) -> None:
        seen.add(name)
        lines.append(f'#line 1 "kernels/{name}"')
        for number, line in enumerate((kernels_dir() / name).read_text(encoding="utf-8").splitlines(), 1):
            include = _INCLUDE.match(line)
            if include:
                if include[1] not in seen:
                    inline(include[1])
                lines.append(f'#line {number + 1} "kernels/{name}"')
            elif line.strip() != "#pragma once":
                lines.append(line)
            else:
                lines.append("")
        if name == _TRACED:
            lines.extend(functions.splitlines())

    inline(f"{kernel}.cu")
    return "\n".join(lines) + "\n"


def source(spec: Spec) -> str:
    """All that is compiled for a Spec."""
    return spec.prelude() + kernel_text(spec.kernel, spec.score_text + spec.mask_text)


OPTIONS = ("-std=c++17",)


def options(spec: Spec) -> tuple[str, ...]:
    """NVRTC's, beside those that CuPy adds; of two architectures it takes sm_90a, where Hopper's own words exist."""
    return (*OPTIONS, "-arch=sm_90a") if spec.kernel.endswith("_sm90") else OPTIONS


_loaded: dict[tuple[int, Spec], Any] = {}
_lock = threading.Lock()


def load(spec: Spec, smem: int, device: int) -> Any:
    """The kernel of a Spec on a device (which is current), compiled at first use; any thread may ask."""
    function = _loaded.get((device, spec))
    if function is not None:
        return function
    with _lock:
        function = _loaded.get((device, spec))
        if function is None:
            module = import_cupy().RawModule(code=source(spec), options=options(spec))
            function = module.get_function(spec.kernel)
            if smem > 48 * 1024:  # beyond what every launch may have, a kernel opts in
                function.max_dynamic_shared_size_bytes = smem
            _loaded[device, spec] = function
    return function
