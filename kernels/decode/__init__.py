"""One new token a sequence in few launches: a decode step beside its matrix products and NSA's own kernels.

Everything reads lengths and slots from device memory, so that a CUDA graph captured once serves every step. The PyTorch
definitions are in `reference.py`; the kernels need CUDA (or, in tests, Triton's interpreter).
"""

from plumbline.kernels.decode.attention import decode_attention
from plumbline.kernels.decode.pointwise import add_rms_norm, rotate_and_append, rotate_and_gate, silu_mul
from plumbline.kernels.decode.sampling import State, draw_tokens

__all__ = [
    "State",
    "add_rms_norm",
    "decode_attention",
    "draw_tokens",
    "rotate_and_append",
    "rotate_and_gate",
    "silu_mul",
]
