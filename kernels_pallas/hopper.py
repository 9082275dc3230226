"""What the kernels for Hopper share: layouts of registers and of shared memory."""

from __future__ import annotations

import math
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

type Ref = Any  # Pallas' references have no public type.

LOG2E = math.log2(math.e)
# Registers of a warp group as its matrix products leave them, and one vector of each axis.
MATRIX = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def tiled(itemsize: int) -> tuple[Any, ...]:
    """Transforms of shared memory that TMA writes and matrix products read: tiles of eight rows of
    128 bytes, for elements of `itemsize` bytes.
    """
    # mypy takes these classes for abstract.
    return (
        plgpu.TilingTransform((8, 128 // itemsize)),  # type: ignore[abstract]
        plgpu.SwizzleTransform(128),  # type: ignore[abstract]
    )
