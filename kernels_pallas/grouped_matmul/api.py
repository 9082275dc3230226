"""The surface of the grouped matrix product: checks, dispatch, nothing else."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Candidate
from kernels_pallas.grouped_matmul.chunked import grouped_matmul_chunked
from kernels_pallas.grouped_matmul.reference import grouped_matmul_reference

_IMPLEMENTATIONS: dict[str, Candidate[Callable[..., Array]]] = {
    "chunked": Candidate(grouped_matmul_chunked),
    "reference": Candidate(grouped_matmul_reference),
}


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int32[Array, " E"],
    *,
    row_align: int = 1,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """Multiplies each contiguous group of rows of lhs with its own matrix of rhs.

    Differentiable in lhs and rhs. Accumulates in float32.

    Args:
      lhs: Rows [M, K], group after group.
      rhs: One matrix [K, N] for each of E groups.
      group_sizes: Rows of each group [E] int32, 0 allowed, sum <= M.
      row_align: A promise that every group size, and M, is a multiple of this: blocks of rows
        then never straddle two groups.
      implementation: None for the best one on the arrays' platform, or "reference" | "chunked".

    Returns:
      [M, N] in lhs.dtype; rows past the last group are zero.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.
    """
    if lhs.shape[1] != rhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"grouped_matmul: lhs {lhs.shape}, rhs {rhs.shape} and group_sizes "
            f"{group_sizes.shape} do not fit [M, K] x [E, K, N] with [E] sizes"
        )
    if row_align < 1 or lhs.shape[0] % row_align:
        raise ValueError(
            f"grouped_matmul: {lhs.shape[0]} rows are no multiple of row_align {row_align}"
        )
    run = dispatch.resolve("grouped_matmul", implementation, _IMPLEMENTATIONS)
    return run(lhs, rhs, group_sizes, row_align)
