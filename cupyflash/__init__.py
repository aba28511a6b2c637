"""cupyflash: exact attention with gradients for NumPy and CuPy arrays, without PyTorch."""

from ._decoding import Rotary
from ._plan import Plan, Tile
from ._results import AttentionGradients, AttentionResult
from ._tuned import TuningCacheWarning
from ._tuning import TunedKernel, Tuning, tune
from ._version import __version__
from .attention import attention, attention_backward, attention_vjp, explain, prepare
from .decode import decode, explain_decode
from .merge import MergeGradients, merge_attention, merge_attention_backward
from .varlen import (
    attention_varlen,
    attention_varlen_backward,
    attention_varlen_vjp,
    explain_varlen,
    prepare_varlen,
)

__all__ = [
    "AttentionGradients",
    "AttentionResult",
    "MergeGradients",
    "Plan",
    "Rotary",
    "Tile",
    "TunedKernel",
    "Tuning",
    "TuningCacheWarning",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_varlen_vjp",
    "attention_vjp",
    "decode",
    "explain",
    "explain_decode",
    "explain_varlen",
    "merge_attention",
    "merge_attention_backward",
    "prepare",
    "prepare_varlen",
    "tune",
]
