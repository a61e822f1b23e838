"""Compiles the kernels for two generations of GPUs, without one."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsedelta.live import triton_kernels
from sparsedelta.live.fused import _BLOCK

CONSTANT = "constexpr"


def compile_for(capability: int, kernel: Any, signature: dict[str, str], **constants: Any) -> None:
    """Compile a kernel to the machine code of a GPU."""
    names = {**signature, **dict.fromkeys(constants, CONSTANT)}
    source = ASTSource(fn=kernel, signature=names, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    sys.stdout.write("compiled\n" if compiled.asm["cubin"] else "nothing\n")


for capability, width in itertools.product((80, 90), triton_kernels.INTEGERS):
    element = f"*i{8 * width}"
    compile_for(
        capability, triton_kernels.compare,
        {"before": element, "now": element, "n": "i32", "words": "*i32", "counts": "*i32"},
        n_block=_BLOCK,
    )  # fmt: skip
    compile_for(
        capability, triton_kernels.collect,
        {"now": element, "words": "*i32", "firsts": "*i64", "index": "*i32", "values": element},
        n_block=_BLOCK,
    )  # fmt: skip
    for integer in (tl.int32, tl.int64):
        compile_for(
            capability, triton_kernels.scatter, {"table": "*i64", "n_tensors": "i32"},
            element=triton_kernels.INTEGERS[width], integer=integer, n_steps=9, n_block=_BLOCK,
        )  # fmt: skip
