"""Kernels for GPUs in Triton. Only ``fused`` imports this module, and only on a GPU, where PyTorch brings Triton along."""

from __future__ import annotations

import triton
import triton.language as tl

# Types of pointers that the kernels read from a table, by the bytes of an element.
INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def compare(before, now, n, words, counts, n_block: tl.constexpr):
    """Write one bit for each element, which is 1 where two tensors differ, and the number of ones of each block.

    Args:
        before: (n,) integers.
        now: the same.
        n: number of elements.
        words: (n_blocks · n_block / 32,) int32, receives the bits.
        counts: (n_blocks,) int32.
        n_block: elements of a block, a power of two and at least 32.
    """
    block = tl.program_id(0).to(tl.int64)
    at = block * n_block + tl.arange(0, n_block)
    inside = at < n
    one = tl.load(before + at, mask=inside, other=0)
    other = tl.load(now + at, mask=inside, other=0)
    differs = (one != other).to(tl.int32)
    tl.store(counts + block, tl.sum(differs, axis=0))
    bits = tl.reshape(differs, (n_block // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(words + block * (n_block // 32) + tl.arange(0, n_block // 32), tl.sum(bits, axis=1))


@triton.jit
def collect(now, words, firsts, index, values, n_block: tl.constexpr):
    """Write the numbers of the elements whose bits are 1, in order, and the elements.

    Args:
        now: the elements.
        words: as ``compare`` writes them.
        firsts: (n_blocks,) int64, where the first one of each block is written.
        index: receives numbers.
        values: receives elements.
        n_block: as in ``compare``.
    """
    block = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, n_block)
    word = tl.load(words + block * (n_block // 32) + inner // 32)
    differs = (word >> (inner % 32)) & 1
    to = tl.load(firsts + block) + tl.cumsum(differs, axis=0) - differs
    at = block * n_block + inner
    is_one = differs != 0
    tl.store(index + to, at.to(index.dtype.element_ty), mask=is_one)
    tl.store(values + to, tl.load(now + at, mask=is_one, other=0), mask=is_one)


@triton.jit
def scatter(
    table,
    n_tensors,
    element: tl.constexpr,
    integer: tl.constexpr,
    n_steps: tl.constexpr,
    n_block: tl.constexpr,
):
    """Write values at flat indices of many tensors.

    Args:
        table: (n_tensors, 5) int64: the number of a tensor's first block, how many values it gets, and the addresses of
            its memory, of the indices and of the values.
        n_tensors: number of tensors.
        element: type of the elements.
        integer: type of the indices.
        n_steps: 2^n_steps is at least ``n_tensors``.
        n_block: values of a block.
    """
    block = tl.program_id(0)
    low = block * 0  # the last tensor whose first block is not above this one
    high = low + n_tensors
    for _ in range(n_steps):
        middle = (low + high) // 2
        is_right = tl.load(table + 5 * middle) <= block
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    entry = table + 5 * low
    at = (block - tl.load(entry)) * n_block + tl.arange(0, n_block)
    inside = at < tl.load(entry + 1)
    memory = tl.load(entry + 2).to(tl.pointer_type(element))
    index = tl.load(entry + 3).to(tl.pointer_type(integer))
    values = tl.load(entry + 4).to(tl.pointer_type(element))
    where = tl.load(index + at, mask=inside, other=0)
    tl.store(memory + where, tl.load(values + at, mask=inside, other=0), mask=inside)
