"""The surface of norms of few rows: dispatch, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Float32

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Candidate
from kernels_pallas.row_norm import mosaic_gpu
from kernels_pallas.row_norm.reference import (
    Routed,
    add_norm_route_reference,
    row_norm_reference,
)


def row_norm(
    x: Float[Array, "N D"],
    scale: Float[Array, " D"],
    eps: float,
    *,
    row_align: int = 1,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """x / sqrt(mean(x²) + eps) · scale of the few rows of a decode step, without a gradient.

    Args:
      x: Rows [N, D].
      scale: [D].
      eps: Added to the mean square.
      row_align: Rows of zeros fill the result up to a multiple of so many.
      implementation: None for the best one on the arrays' platform, or "reference" | "mosaic_gpu".

    Returns:
      [R, D] in x.dtype, with float32 statistics, cast down before the scale.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.
    """
    target = dispatch.target(x, scale)
    candidates: dict[str, Candidate[Callable[..., Any]]] = {
        "mosaic_gpu": Candidate(
            mosaic_gpu.row_norm_mosaic_gpu, target.why_not_hopper() or mosaic_gpu.why_not_norm(x)
        ),
        "reference": Candidate(row_norm_reference),
    }
    run = dispatch.resolve("row_norm", implementation, candidates)
    normed: jax.Array = run(x, scale, eps, row_align=row_align)
    return normed


def add_norm_route(
    x: Float[Array, "X D"],
    out: Float[Array, "Y D"] | Float32[Array, "P Y D"],
    scale: Float[Array, " D"],
    router: Float32[Array, "D E"],
    real: Bool[Array, " N"],
    *,
    scales: tuple[float, float],
    eps: float,
    top_k: int,
    row_align: int = 1,
    implementation: str | None = None,
) -> Routed:
    """The sum α x + β out of a decode step's rows, its norm, and the experts that the norm visits.

    A softmax over the experts in float32; the top k, the first of equals first, renormalised to
    sum 1. Without a gradient.

    Args:
      x: The residual [X, D]; rows past the first N are ignored, here and in out.
      out: What is added to it [Y, D]; or [P, Y, D] float32, the parts whose sum is added, which
        saves the kernel that would sum them.
      scale: Of the norm [D].
      router: Matrix of the router [D, E].
      real: Rows that visit an expert [N].
      scales: α and β.
      eps: Of the norm.
      top_k: Experts a row visits.
      row_align: `normed` is filled up to a multiple of so many rows, which saves who multiplies it
        in tiles a copy.
      implementation: As for `row_norm`.

    Raises:
      kernels_pallas.dispatch.UnavailableError: the named implementation cannot run.

    Source: MiniMax-01 (arXiv 2501.08313), sections 2.1 and 2.4.
    """
    candidates: dict[str, Candidate[Callable[..., Any]]] = {
        "mosaic_gpu": Candidate(mosaic_gpu.add_norm_route_mosaic_gpu, why_not_fused(x, router)),
        "reference": Candidate(add_norm_route_reference),
    }
    run = dispatch.resolve("add_norm_route", implementation, candidates)
    static = {"scales": scales, "eps": eps, "top_k": top_k, "row_align": row_align}
    routed: Routed = run(x, out, scale, router, real, **static)
    return routed


def why_not_fused(x: jax.Array, router: jax.Array) -> str | None:
    """Why no kernel does all of `add_norm_route` for these rows here; None where one does."""
    return dispatch.target(x, router).why_not_hopper() or mosaic_gpu.why_not_route(x, router)
