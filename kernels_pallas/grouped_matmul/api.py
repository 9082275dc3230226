"""The surface of the grouped matrix product: checks, dispatch, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from kernels_pallas import dispatch, tuning
from kernels_pallas.dispatch import Candidate
from kernels_pallas.grouped_matmul import mosaic_gpu, mosaic_tpu
from kernels_pallas.grouped_matmul.chunked import grouped_matmul_chunked
from kernels_pallas.grouped_matmul.listed import listed_ffn_through
from kernels_pallas.grouped_matmul.reference import grouped_matmul_reference
from kernels_pallas.grouped_matmul.swiglu import swiglu_through, weighted

type _Shaped = jax.Array | jax.ShapeDtypeStruct


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
        then never straddle two groups. "chunked" gains by it, the kernels do not need it.
      implementation: None for the best one on the arrays' platform, or "reference" | "chunked" |
        "mosaic_tpu" | "mosaic_gpu".

    Returns:
      [M, N] in lhs.dtype; rows past the last group are zero.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.
    """
    _check("grouped_matmul", lhs, {"rhs": rhs}, group_sizes, row_align)
    target = dispatch.target(lhs, rhs)

    def on_tpu(*args: Any) -> jax.Array:
        return mosaic_tpu.grouped_matmul_mosaic_tpu(*args[:-1])

    def on_gpu(*args: Any) -> jax.Array:
        passes = gpu_passes("forward", lhs, rhs, target)
        return mosaic_gpu.grouped_matmul_mosaic_gpu(*args[:-1], passes)

    not_tpu, not_gpu = _why_not(target, lhs, rhs)
    candidates: dict[str, Candidate[Callable[..., Array]]] = {
        "mosaic_tpu": Candidate(on_tpu, not_tpu),
        "mosaic_gpu": Candidate(on_gpu, not_gpu),
        "chunked": Candidate(grouped_matmul_chunked),
        "reference": Candidate(grouped_matmul_reference),
    }
    run = dispatch.resolve("grouped_matmul", implementation, candidates)
    return run(lhs, rhs, group_sizes, row_align)


def grouped_swiglu(
    lhs: Float[Array, "M K"],
    w1: Float[Array, "E K N"],
    w3: Float[Array, "E K N"],
    group_sizes: Int32[Array, " E"],
    *,
    row_weights: Float[Array, "M 1"] | None = None,
    row_align: int = 1,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """silu(lhs w1) (lhs w3), with the matrices of each contiguous group of rows.

    Differentiable in lhs, w1, w3 and row_weights. The kernels keep both products for the backward,
    in lhs.dtype, and compute nothing twice; `jax.checkpoint` keeps them if its policy keeps what
    `kernels_pallas.numerics.product` marks, and otherwise has them computed again.

    Args:
      lhs: Rows [M, K], group after group.
      w1: One matrix [K, N] for each of E groups, of the gate.
      w3: As w1, of what is gated.
      group_sizes: Rows of each group [E] int32, 0 allowed, sum <= M.
      row_weights: What each row of the result is multiplied with [M, 1]; None for nothing. A sum
        over experts weighted here needs none of their outputs for its gradient.
      row_align: As for `grouped_matmul`.
      implementation: As for `grouped_matmul`.

    Returns:
      [M, N] in lhs.dtype; rows past the last group are zero.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together.

    Source: GLU Variants Improve Transformer (arXiv 2002.05202), eq. 6, without its last product.
    """
    _check("grouped_swiglu", lhs, {"w1": w1, "w3": w3}, group_sizes, row_align)
    if row_weights is not None and row_weights.shape != (lhs.shape[0], 1):
        raise ValueError(
            f"grouped_swiglu: row_weights {row_weights.shape} for {lhs.shape[0]} rows; "
            "expected [M, 1]"
        )
    target = dispatch.target(lhs, w1, w3)

    def on_tpu(*args: Any) -> jax.Array:
        out = mosaic_tpu.grouped_swiglu_mosaic_tpu(*args[:-2])
        return out if row_weights is None else weighted(out, row_weights)

    def on_gpu(*args: Any) -> jax.Array:
        passes = gpu_passes("swiglu", lhs, w1, target)
        return mosaic_gpu.grouped_swiglu_mosaic_gpu(*args[:-1], passes)

    not_tpu, not_gpu = _why_not(target, lhs, w1, w3)
    candidates: dict[str, Candidate[Callable[..., Array]]] = {
        "mosaic_tpu": Candidate(on_tpu, not_tpu),
        "mosaic_gpu": Candidate(on_gpu, not_gpu),
        "chunked": Candidate(swiglu_through(grouped_matmul_chunked)),
        "reference": Candidate(swiglu_through(grouped_matmul_reference)),
    }
    run = dispatch.resolve("grouped_swiglu", implementation, candidates)
    return run(lhs, w1, w3, group_sizes, row_weights, row_align)


# Rows that `listed_ffn` takes: as many as a kernel multiplies with a matrix at least.
LISTED_ROWS = 64
# What the kernel fills its rows up to a multiple of.
LISTED_ALIGN = mosaic_gpu.ROW_ALIGN


def listed_ffn(
    x: Float[Array, "N D"],
    w1: Float[Array, "E D F"],
    w3: Float[Array, "E D F"],
    w2: Float[Array, "E F D"],
    groups: Int32[Array, " T"],
    *,
    implementation: str | None = None,
) -> Float[Array, "T N D"]:
    """(silu(x w1_g) (x w3_g)) w2_g for each listed group g, all rows through each.

    For the few rows of a decoding step, where reading the matrices is all there is to do: rows of
    which only some belong to a group cost it nothing, and nothing has to be sorted. Without a
    gradient.

    Args:
      x: Rows [N, D], at most `LISTED_ROWS`.
      w1: One matrix [D, F] for each of E groups, of the gate.
      w3: As w1, of what is gated.
      w2: One matrix [F, D] for each group.
      groups: [T] int32, in any order; E for none, whose result is zero.
      implementation: As for `grouped_matmul`.

    Returns:
      [T, N, D] in x.dtype.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
      ValueError: shapes that do not fit together, or too many rows.
    """
    _check_listed(x, w1, w3, w2)
    target = dispatch.target(x, w1, w3, w2)
    hidden = jax.ShapeDtypeStruct((x.shape[0], w2.shape[1]), x.dtype)
    not_tpu, not_gpu = (
        a or b
        for a, b in zip(_why_not(target, x, w1, w3), _why_not(target, hidden, w2), strict=True)
    )

    def on_gpu(*args: Any) -> jax.Array:
        return mosaic_gpu.listed_ffn_mosaic_gpu(*args, target.cores)

    def on_tpu(*args: Any) -> jax.Array:
        product, swiglu = mosaic_tpu.grouped_matmul_mosaic_tpu, mosaic_tpu.grouped_swiglu_mosaic_tpu
        return listed_ffn_through(product, swiglu)(*args)

    def through(product: Callable[..., Array]) -> Callable[..., Array]:
        aligned = functools.partial(product, row_align=1)
        swiglu = functools.partial(swiglu_through(product), row_weights=None, row_align=1)
        return listed_ffn_through(aligned, swiglu)

    candidates: dict[str, Candidate[Callable[..., Array]]] = {
        "mosaic_tpu": Candidate(on_tpu, not_tpu),
        "mosaic_gpu": Candidate(on_gpu, not_gpu),
        "chunked": Candidate(through(grouped_matmul_chunked)),
        "reference": Candidate(through(grouped_matmul_reference)),
    }
    return dispatch.resolve("listed_ffn", implementation, candidates)(x, w1, w3, w2, groups)


def _check_listed(x: jax.Array, w1: jax.Array, w3: jax.Array, w2: jax.Array) -> None:
    experts, inner, hidden = w1.shape
    if w3.shape != w1.shape or w2.shape[:2] != (experts, hidden) or x.shape[1] != inner:
        raise ValueError(
            f"listed_ffn: x {x.shape}, w1 {w1.shape}, w3 {w3.shape} and w2 {w2.shape} do not fit "
            "[N, D], [E, D, F] twice and [E, F, D]"
        )
    if x.shape[0] > LISTED_ROWS:
        raise ValueError(f"listed_ffn takes at most {LISTED_ROWS} rows, got {x.shape[0]}")


def gains_by_align(lhs: _Shaped, *matrices: _Shaped) -> bool:
    """Whether groups padded to whole blocks of rows are faster on the device in context: where no
    kernel takes arrays of these shapes.
    """
    return None not in _why_not(dispatch.target(), lhs, *matrices)


def _why_not(target: dispatch.Target, *arrays: _Shaped) -> tuple[str | None, str | None]:
    """Why the kernels for TPU and Hopper cannot take lhs and matrices; None where they can."""
    return (
        target.why_not_tpu() or mosaic_tpu.why_not(*arrays),
        target.why_not_hopper() or mosaic_gpu.why_not(*arrays),
    )


def shape_key(what: str, lhs: _Shaped, rhs: _Shaped) -> str:
    """The name of a pass at a shape in the files of tuned blocks; rows up to a power of two."""
    rows = 1 << max(lhs.shape[0] - 1, 0).bit_length()
    groups, inner, columns = rhs.shape
    return tuning.shape_key(M=rows, K=inner, N=columns, E=groups, **{"pass": what})


def gpu_passes(
    forward: str, lhs: _Shaped, rhs: _Shaped, target: dispatch.Target
) -> mosaic_gpu.Passes:
    """Blocks tuned for this shape on this GPU, or the default; forward: "forward" | "swiglu"."""

    def blocks(what: str) -> mosaic_gpu.Blocks:
        key = shape_key(what, lhs, rhs)
        fields = tuning.tuned(target.kind, "grouped_matmul", "mosaic_gpu", key)
        if fields is not None:
            return mosaic_gpu.Blocks(**fields)
        rows, (groups, inner, columns) = lhs.shape[0], rhs.shape
        across = inner if what == "d_lhs" else columns
        return mosaic_gpu.default_blocks(what, rows, groups, across, target.cores)

    return mosaic_gpu.Passes(blocks(forward), blocks("d_lhs"), blocks("d_rhs"), target.cores)


def _check(
    op: str,
    lhs: jax.Array,
    matrices: dict[str, jax.Array],
    group_sizes: jax.Array,
    row_align: int,
) -> None:
    shapes = {x.shape for x in matrices.values()}
    groups, inner, _ = next(iter(shapes))
    if len(shapes) > 1 or lhs.shape[1] != inner or group_sizes.shape != (groups,):
        names = ", ".join(f"{name} {x.shape}" for name, x in matrices.items())
        raise ValueError(
            f"{op}: lhs {lhs.shape}, {names} and group_sizes {group_sizes.shape} do not fit "
            f"[M, K] x [E, K, N] with [E] sizes"
        )
    if row_align < 1 or lhs.shape[0] % row_align:
        raise ValueError(f"{op}: {lhs.shape[0]} rows are no multiple of row_align {row_align}")
