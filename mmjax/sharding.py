"""Mesh, logical axes and the one table that maps them to the mesh's."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "context", "expert", "model")


class ShardingError(ValueError):
    """A mesh that the devices or the model do not fit; the message names both."""


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis, and of single parameters.

    No two logical axes of one array may share a mesh axis. Expert weights leave `expert` out of
    d_model's axes, because it already holds their experts.

    Attributes:
      tensors: Exceptions, (pattern, mesh axes of each dimension behind those of stacked layers):
        ("head.*", ((), ("data", "model"))) for parameters whose name `fnmatch` finds alike. The
        first that matches holds.
    """

    batch: tuple[str, ...] = ("data", "expert")
    sequence: tuple[str, ...] = ("context",)
    vocab: tuple[str, ...] = ("model",)
    d_model: tuple[str, ...] = ("data", "context", "expert")
    heads: tuple[str, ...] = ("model",)
    kv_heads: tuple[str, ...] = ("model",)
    experts: tuple[str, ...] = ("expert",)
    ffn: tuple[str, ...] = ("model",)
    norm: tuple[str, ...] = ()
    tensors: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()

    def __post_init__(self) -> None:
        every = {axis: getattr(self, axis) for axis in LOGICAL_AXES}
        every |= {pattern: sum(entries, ()) for pattern, entries in self.tensors}
        for name, axes in every.items():
            unknown = sorted(set(axes) - set(MESH_AXES))
            if unknown:
                known = ", ".join(MESH_AXES)
                raise ShardingError(
                    f"sharding of {name}: unknown mesh axis {unknown}; known: {known}"
                )

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ShardingRules:
        """Rules for parameters from a config's section, the rest as by default.

        Args:
          values: Logical axes of parameters to mesh axes (a name, several, or none), and `tensors`,
            a list of pairs. How a batch lies is not open to choice: the parallel layers are written
            for it.

        Raises:
          ShardingError: an unknown key, with the nearest known one, or a value of another form.
        """
        known = [name for name in cls.__dataclass_fields__ if name not in ("batch", "sequence")]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                raise ShardingError(f"unknown key sharding.{key}; did you mean sharding.{near}?")
        rules: dict[str, Any] = {
            key: _axes(values[key], f"sharding.{key}") for key in values if key != "tensors"
        }
        rules["tensors"] = tuple(_exception(pair) for pair in values.get("tensors") or ())
        return cls(**rules)

    def spec(self, axes: Sequence[str | None], *, of: str = "array") -> PartitionSpec:
        """The physical axes of logical ones.

        Args:
          axes: Logical axis of each dimension, None for a whole one.
          of: Name of the array, for messages.

        Raises:
          ShardingError: unknown logical axis, or a mesh axis wanted twice.
        """
        entries: list[tuple[str, ...]] = []
        for axis in axes:
            if axis is not None and axis not in LOGICAL_AXES:
                known = ", ".join(LOGICAL_AXES)
                raise ShardingError(f"{of}: unknown logical axis {axis!r}; known: {known}")
            entries.append(() if axis is None else getattr(self, axis))
        if "experts" in axes:
            taken = set(self.experts)
            entries = [
                tuple(m for m in entry if axis == "experts" or m not in taken)
                for axis, entry in zip(axes, entries, strict=True)
            ]
        return _checked(entries, f"{of}: logical axes {tuple(axes)}")

    def exception(self, name: str, dims: int) -> PartitionSpec | None:
        """The physical axes of a parameter that `tensors` names; None if it names none.

        Args:
          name: Of the parameter.
          dims: Its dimensions, those of stacked layers not counted.

        Raises:
          ShardingError: the pattern has another number of dimensions, or a mesh axis twice.
        """
        found = (pair for pair in self.tensors if fnmatch.fnmatchcase(name, pair[0]))
        pattern, entries = next(found, (None, ()))
        if pattern is None:
            return None
        if len(entries) != dims:
            raise ShardingError(
                f"sharding of {pattern} has {len(entries)} dimensions, {name} has {dims} behind "
                "those of stacked layers"
            )
        return _checked(entries, f"{name}: {entries}")


def _axes(value: Any, of: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(name, str) for name in names):
        raise ShardingError(f"{of} = {value!r} names no mesh axes; known: {', '.join(MESH_AXES)}")
    return names


def _exception(pair: Any) -> tuple[str, tuple[tuple[str, ...], ...]]:
    match pair:
        case (str(pattern), list() | tuple() as entries):
            return pattern, tuple(_axes(entry, f"sharding of {pattern}") for entry in entries)
    raise ShardingError(
        f"sharding.tensors: {pair!r} is no pair of a pattern and the mesh axes of each dimension, "
        'such as ("head.kernel", ("data", None))'
    )


def _checked(entries: Sequence[tuple[str, ...]], of: str) -> PartitionSpec:
    flat = [m for entry in entries for m in entry]
    twice = sorted({m for m in flat if flat.count(m) > 1})
    if twice:
        raise ShardingError(f"{of} want mesh axis {twice} twice")
    return PartitionSpec(*(entry or None for entry in entries))


LOGICAL_AXES = tuple(f.name for f in dataclasses.fields(ShardingRules) if f.name != "tensors")
DEFAULT_RULES = ShardingRules()
# To serve, weights are whole but for their experts, heads, ffn and vocabulary: gathering them anew
# for each token would take longer than reading them.
SERVING_RULES = ShardingRules(d_model=())


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in "data=16,expert=32", for `make_mesh`.

    Raises:
      ShardingError: text of another form.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        try:
            sizes[axis.strip()] = int(size)
        except ValueError:
            raise ShardingError(
                f"mesh {text!r}: {part!r} is no AXIS=SIZE; write it as data=16,expert=32"
            ) from None
    return sizes


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all four axes, those not named of size 1.

    Neighbours along an axis are near each other: on TPUs in the slice's torus, elsewhere in the
    order of processes, so that the outer axes cross hosts first. Several TPU slices, which only the
    data-centre network joins, lie along `data`.

    Args:
      shape: Size of each axis, e.g. {"data": 4, "expert": 2}; at most one may be -1, which takes
        the devices that are left.
      devices: Devices to use; None for all.

    Raises:
      ShardingError: unknown axis, sizes that do not multiply to the number of devices, or a size of
        `data` that is no multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = dict(shape or {"data": len(devices)})
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise ShardingError(f"unknown mesh axis {unknown}; known: {', '.join(MESH_AXES)}")
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    if sizes.count(-1) == 1:
        fixed = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // max(fixed, 1)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        wanted = ",".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise ShardingError(
            f"mesh {wanted} needs {math.prod(sizes)} devices, there are {len(devices)}; "
            "change the sizes, or give one axis -1 to take what is left"
        )
    return Mesh(_grid(devices, sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _grid(devices: list[Any], sizes: list[int]) -> np.ndarray:
    """The devices in the shape of the mesh."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *others = sizes
    if data % slices:
        raise ShardingError(
            f"{slices} slices lie along data, whose size {data} is no multiple of {slices}; "
            "change it"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others),
        (slices, *(1 for _ in others)),
        devices,
        allow_split_physical_axes=True,
    )


def param_shardings(
    params: nnx.State, mesh: Mesh | AbstractMesh, rules: ShardingRules = DEFAULT_RULES
) -> nnx.State:
    """The sharding of each parameter, in the same tree.

    Args:
      params: Parameters, or their shapes, with `axes` metadata.
      mesh: From `make_mesh`, or its axes alone.
      rules: Logical to physical axes.

    Raises:
      ShardingError: lists every parameter that the mesh does not divide, or a pattern of
        `rules.tensors` that no parameter matches.
    """
    problems: list[str] = []
    _check_patterns(rules, params)

    def one(path: tuple[Any, ...], variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        name = ".".join(map(str, path))
        shape = variable.get_value().shape
        axes = variable.get_metadata("axes")
        spec = rules.exception(name, len(axes)) or rules.spec(axes, of=name)
        stacked = (None,) * (len(shape) - len(axes))  # layers are stacked in front
        spec = PartitionSpec(*stacked, *spec)
        problems.extend(_undivided(name, shape, spec, mesh))
        return variable.replace(NamedSharding(mesh, spec))

    shardings = nnx.from_flat_state([(p, one(p, v)) for p, v in nnx.to_flat_state(params)])
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" * (len(problems) > 5))
        raise ShardingError(f"the mesh does not divide the model: {shown}")
    return shardings


def _check_patterns(rules: ShardingRules, params: nnx.State) -> None:
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
    for pattern, _ in rules.tensors:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]
            raise ShardingError(
                f"sharding of {pattern} concerns no parameter; the nearest name is {near}"
            )


def _undivided(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> list[str]:
    found = []
    for dim, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        names = (entry,) if isinstance(entry, str) else entry or ()  # a spec unwraps one name
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            axes = "·".join(f"{axis}={mesh.shape[axis]}" for axis in names)
            found.append(f"{name} dimension {dim} of size {size} over {axes}")
    return found


def active_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh` if it spreads arrays: with our axes and several devices.

    Inside `jax.shard_map` arrays are local, and there is none.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if _ours(mesh) and mesh.size > 1 else None


def replicas(mesh: Mesh) -> list[Mesh]:
    """The parts of a mesh along `data`: each holds a whole model, if that is not spread over it."""
    return [
        Mesh(mesh.devices[i : i + 1], mesh.axis_names, axis_types=mesh.axis_types)
        for i in range(mesh.shape["data"])
    ]


def on_replica(params: nnx.State, replica: Mesh) -> nnx.State:
    """Parameters as they lie on a replica already, without a copy.

    Args:
      params: On the whole mesh, not spread over `data`.
      replica: One of `replicas`, with a device of this process.
    """
    devices = set(replica.devices.flat)

    def part(x: jax.Array) -> jax.Array:
        assert isinstance(x.sharding, NamedSharding)
        where = NamedSharding(replica, x.sharding.spec)
        shards = [shard.data for shard in x.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(x.shape, where, shards)

    placed: nnx.State = jax.tree.map(part, params)
    return placed


def _ours(mesh: AbstractMesh) -> bool:
    return set(MESH_AXES) <= set(mesh.axis_names) and not mesh.manual_axes


def activation_spec(
    mesh: Mesh | AbstractMesh, shape: Sequence[int], axes: Sequence[str | None]
) -> PartitionSpec:
    """The physical axes of an activation, without those that do not divide its size.

    A single prompt stays whole on a mesh that spreads a batch.

    Args:
      mesh: The mesh in force.
      shape: Of the activation.
      axes: Logical axis of each dimension, None for a whole one.
    """

    def dividing(size: int, entry: tuple[str, ...]) -> tuple[str, ...]:
        kept: tuple[str, ...] = ()
        for axis in entry:
            if size % math.prod(mesh.shape[a] for a in (*kept, axis)) == 0:
                kept = (*kept, axis)
        return kept

    spec = DEFAULT_RULES.spec(axes, of="activation")
    entries = ((e,) if isinstance(e, str) else e or () for e in spec)
    fitting = [dividing(size, entry) for size, entry in zip(shape, entries, strict=True)]
    return PartitionSpec(*(entry or None for entry in fitting))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its logical axes under the mesh of `jax.set_mesh`; else nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _ours(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, axes))
