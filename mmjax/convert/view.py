"""How a tensor of a checkpoint and a parameter hold the same numbers, in both directions."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

type Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """How one tensor and one place in a parameter hold the same numbers.

    Attributes:
      groups: Sizes of the axes that each dimension of the tensor is made of.
      order: For each dimension of the parameter, its axis among all of `groups`, flattened.
      part: The axis that the parameter has not, and the index on it; None where there is none.
    """

    groups: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    part: tuple[int, int] | None

    @classmethod
    def of(cls, axes: str, sizes: Mapping[str, int], part: int | None = None) -> View:
        """Reads "(h c k) d -> d h c k".

        Args:
          axes: The tensor's axes in order, those of one dimension in parentheses, and the
            parameter's.
          sizes: Of each axis.
          part: Index on the tensor's axis p, if the parameter has it not.
        """
        source, target = axes.split(" -> ")
        dims = re.findall(r"\(.*?\)|\S", source)
        groups = [dim.strip("()").replace(" ", "") for dim in dims]
        flat = "".join(groups)
        return cls(
            tuple(tuple(sizes[axis] for axis in group) for group in groups),
            tuple(flat.index(axis) for axis in target.split()),
            None if part is None else (flat.index("p"), part),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(group) for group in self.groups)

    @property
    def param_shape(self) -> tuple[int, ...]:
        """Of the parameter, without the stacked axes."""
        return tuple(self._axes[axis] for axis in self.order)

    @property
    def file_order(self) -> list[int]:
        """The parameter's dimensions in the order in which the tensor holds them."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(size for group in self.groups for size in group)

    @property
    def lead(self) -> int:
        """Size of the tensor's first axis, along which it can be cut."""
        return self.groups[0][0]

    @property
    def lead_axis(self) -> int:
        """The parameter's dimension that is the tensor's first axis."""
        return self.order.index(0)

    def cut(self, count: int) -> View:
        """The view of `count` places of the tensor's first axis."""
        first, *others = self.groups
        return dataclasses.replace(self, groups=((count, *first[1:]), *others))

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """The slice `index` of the parameter.

        Args:
          tensor: The tensor, or anything that reads slices of it: only the rows and columns that
            hold the wanted numbers are asked for.
          index: One slice for each dimension of the parameter, without steps.
        """
        wanted = [range(size) for size in self._axes]
        for axis, cut in zip(self.order, index, strict=True):
            wanted[axis] = wanted[axis][cut]
        part = [] if self.part is None else [self.part[0]]
        if self.part is not None:
            axis, place = self.part
            wanted[axis] = range(place, place + 1)
        first = itertools.accumulate(map(len, self.groups), initial=0)
        spans = zip(self.groups, first, strict=False)  # the last of `first` is the end
        covers = [_cover(group, wanted[i : i + len(group)]) for group, i in spans]
        block = np.asarray(tensor[tuple(cover.rows for cover in covers)])
        block = block.reshape([size for cover in covers for size in cover.sizes])
        block = block[tuple(cut for cover in covers for cut in cover.cuts)]
        return block.transpose(*part, *self.order)[(0,) * len(part)]

    def whole(self, value: np.ndarray) -> np.ndarray | None:
        """The tensor of a value that lies in its order already; None of one that does not."""
        if self.part is not None:
            return None
        axes = value.transpose(np.argsort(self.order))
        return axes.reshape(self.shape) if axes.flags.c_contiguous else None

    def write(self, tensor: np.ndarray, value: np.ndarray) -> None:
        """Puts the whole parameter's value into the tensor's array."""
        axes = tensor.reshape(self._axes)
        if self.part is None:
            copy_into(axes.transpose(self.order), value)
        else:
            copy_into(axes.transpose(self.part[0], *self.order)[self.part[1]], value)


# Rows and columns of the blocks in which arrays are transposed: a block of either side stays in
# the processor's cache. Four times as fast as NumPy's way through rows of kilobytes.
_BLOCK = 256


def copy_into(target: np.ndarray, value: np.ndarray) -> None:
    """`target[...] = value`; of one dtype as plain integers, which NumPy copies without its lock.

    bfloat16 is a foreign dtype to NumPy, which holds the interpreter while it copies those.
    """
    if value.dtype == target.dtype:
        plain = f"u{value.dtype.itemsize}"
        target, value = target.view(plain), value.view(plain)
    row, column = _fastest(target), _fastest(value)
    if row == column or target.size < _BLOCK**2:
        target[...] = value
        return
    cut = [slice(None)] * target.ndim
    for i in range(0, target.shape[row], _BLOCK):
        cut[row] = slice(i, i + _BLOCK)
        for j in range(0, target.shape[column], _BLOCK):
            cut[column] = slice(j, j + _BLOCK)
            target[tuple(cut)] = value[tuple(cut)]


def _fastest(array: np.ndarray) -> int:
    """The axis along which neighbours lie side by side; -1 if no axis is longer than one."""
    strides = {abs(array.strides[i]): i for i in range(array.ndim) if array.shape[i] > 1}
    return strides[min(strides)] if strides else -1


class _Cover(NamedTuple):
    """What to read of one tensor dimension: its rows, the sizes of the axes in them, the cuts."""

    rows: slice
    sizes: list[int]
    cuts: list[slice]


def _cover(group: tuple[int, ...], wanted: list[range]) -> _Cover:
    """The fewest contiguous rows that hold the wanted part of the axes `group`."""
    strides = [math.prod(group[i + 1 :]) for i in range(len(group))]
    # Below the first axis of which several are wanted, all is read and cut afterwards.
    several = next((i for i, r in enumerate(wanted) if len(r) > 1), len(group) - 1)
    below = several + 1
    start = sum(r.start * stride for r, stride in zip(wanted[:below], strides, strict=False))
    return _Cover(
        slice(start, start + len(wanted[several]) * strides[several]),
        [len(r) for r in wanted[:below]] + list(group[below:]),
        [slice(None)] * below + [slice(r.start, r.stop) for r in wanted[below:]],
    )
