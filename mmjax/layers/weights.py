"""How weights are made and used: initialisers with logical axes, products in their precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.numerics import einsum32, product
from mmjax.sharding import active_mesh

# Parts of a product of up to so many rows, see `project_in_parts`.
PARTS, PARTED_ROWS = 8, 16
# One row times a matrix takes XLA on a GPU up to three times as long as two rows.
ROW_ALIGN = 2


def weight(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: str,
    *,
    fan_in: int,
    fan_out: int,
    gain: float = 1.0,
) -> nnx.Param[jax.Array]:
    """A Xavier-normal parameter, std gain·sqrt(2 / (fan_in + fan_out)).

    Args:
      rngs: Source of randomness.
      shape: Of the parameter.
      axes: Logical axis of each dimension, see `mmjax.sharding`.
      dtype: Of the parameter.
      fan_in: Inputs that each output sums over.
      fan_out: Outputs that each input feeds.
      gain: DeepNorm's factor for the weights that write to the residual.

    Source: MiniMax-01 (arXiv 2501.08313), section 4.2: Xavier initialisation.
    """
    std = gain * (2 / (fan_in + fan_out)) ** 0.5
    return normal(rngs, shape, axes, dtype, std)


def normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: str,
    std: float,
) -> nnx.Param[jax.Array]:
    """A parameter drawn from N(0, std²)."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def ones(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str) -> nnx.Param[jax.Array]:
    """A parameter of ones, for norm scales."""
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def side_by_side(*params: nnx.Param[jax.Array]) -> nnx.Param[jax.Array]:
    """Weights [D, *out] of one input as one matrix [D, all their outputs], to serve."""
    matrices = [param[...].reshape(param.shape[0], -1) for param in params]
    return nnx.Param(jnp.concatenate(matrices, axis=1), axes=("d_model", None))


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x times kernel in x.dtype with float32 accumulation.

    The product is left flat, [..., all output dimensions together]: XLA's element-wise loops on
    CPUs are several times slower over short inner dimensions.

    Args:
      x: [..., D].
      kernel: [*D, *out], leading dimensions that multiply to D, then those of the output.

    Returns:
      [..., prod(out)] in x.dtype.
    """
    return product(_matmul(x, kernel.reshape(x.shape[-1], -1)))


def project_in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, K] times kernel for few rows, as parts [P, B, D] float32 whose sum is the product.

    Each part is over its own stretch of K: a GPU has more to do at once, and what comes next can
    sum them in passing.
    """
    rows, inner = x.shape
    parts = PARTS if rows <= PARTED_ROWS and inner % PARTS == 0 else 1
    each = x.reshape(rows, parts, -1).swapaxes(0, 1)
    return einsum32("pbk,pkd->pbd", each, kernel.reshape(parts, inner // parts, -1), x.dtype)


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return einsum32("...d,df->...f", x, kernel, x.dtype).astype(x.dtype)


def _matmul_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x, kernel), (x, kernel)


def _matmul_backward(
    residuals: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The products autodiff would make, but that of the kernel is asked for as [D, F]: as [F, D]
    # it has XLA transpose d_out on CPUs, usually the wider of the two, and its result.
    x, kernel = residuals
    d_x = einsum32("...f,df->...d", d_out, kernel, x.dtype).astype(x.dtype)
    if active_mesh() is None:  # Flattened, rows that are spread over two axes would be gathered.
        x, d_out = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    rows = "abc"[: x.ndim - 1]
    d_kernel = einsum32(f"{rows}d,{rows}f->df", x, d_out, x.dtype).astype(kernel.dtype)
    return d_x, d_kernel


_matmul.defvjp(_matmul_forward, _matmul_backward)
