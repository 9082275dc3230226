"""Compiling for TPUs that are not here, and what the compiler says about memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from mmjax.plan.chips import PlanError, Topology
from mmjax.plan.estimate import complete_mesh
from mmjax.plan.job import Job
from mmjax.plan.programs import make_program
from mmjax.sharding import make_mesh

# XLA's word for a program that does not fit.
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step; bytes are of one device.

    Attributes:
      arguments: Parameters, optimizer, cache and batch.
      temporaries: Everything between them and the results, at the worst moment.
      results: That take new memory, beside those that take an argument's.
      program: Code and constants.
      kernels: Mosaic kernels in the program, by name.
      seconds: Of each stage.
    """

    arguments: int
    temporaries: int
    results: int
    program: int
    kernels: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def peak(self) -> int:
        """Bytes of HBM that the program takes."""
        return self.arguments + self.temporaries + self.results + self.program


def find_compiler() -> Path | None:
    """libtpu.so: where TPU_LIBRARY_PATH says, as an installed package, or where make put it."""
    candidates = [Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"]
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.submodule_search_locations:
        candidates.insert(0, Path(spec.submodule_search_locations[0]) / "libtpu.so")
    if os.environ.get("TPU_LIBRARY_PATH"):
        candidates.insert(0, Path(os.environ["TPU_LIBRARY_PATH"]))
    return next((path for path in candidates if path.is_file()), None)


def compile_ahead(
    job: Job,
    topology: Topology,
    mesh: Mapping[str, int],
    report: Callable[[str], None] = lambda _: None,
) -> Compiled:
    """Compiles a job's step for a topology, on any machine.

    Args:
      job: What a step does.
      topology: Of TPUs.
      mesh: Size of each axis.
      report: Told the name of each stage as it begins.

    Raises:
      PlanError: there is no compiler for these chips, or the program does not fit.
      ShardingError: the mesh does not divide the model.
    """
    sizes = complete_mesh(mesh, topology)
    described = make_mesh(sizes, described_devices(topology))
    program = make_program(job, described)
    seconds: dict[str, float] = {}

    def timed(stage: str, do: Callable[[], Any]) -> Any:
        report(stage)
        start = time.monotonic()
        result = do()
        seconds[stage] = time.monotonic() - start
        return result

    step = jax.jit(
        program.run, out_shardings=program.out, donate_argnums=(0,) if program.donate else ()
    )
    with jax.sharding.use_abstract_mesh(described.abstract_mesh):
        traced = timed("trace", lambda: step.trace(*program.args))
        lowered = timed("lower", lambda: traced.lower(lowering_platforms=("tpu",)))
        kernels = _kernels(lowered.as_text())
        compiled = timed("compile", lambda: _compile(lowered, topology))
    memory = compiled.memory_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
        kernels,
        seconds,
    )


def _compile(lowered: jax.stages.Lowered, topology: Topology) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        needed = re.search(r"\(?([\d.]+[KMG])\)? exceeds available HBM \(([\d.]+[KMG])", str(error))
        said = f"{needed[1]} of {needed[2]}" if needed else str(error).splitlines()[0]
        raise PlanError(
            f"compiled for {topology.name}, a step does not fit: {said} a device; take more chips, "
            "a smaller batch, or another mesh"
        ) from error


def described_devices(topology: Topology) -> list[Any]:
    """Descriptions of a topology's devices.

    Raises:
      PlanError: no compiler for them, or one that does not know the topology.
    """
    if not topology.chip.is_tpu:
        raise PlanError(
            f"{topology.chip.name} programs compile only where such a GPU is; say --no-compile"
        )
    library = find_compiler()
    if library is None:
        raise PlanError(
            "compiling ahead needs libtpu: `pip install libtpu` (x86-64 Linux), or say --no-compile"
        )
    # libtpu is to ask nobody where it runs, to share a machine, and to keep its log to itself.
    for name, value in {
        "TPU_LIBRARY_PATH": str(library),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    chip = topology.chip.name
    # A v4 chip's two cores are one device, as on real ones; without this they are two.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v4" else {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{chip}:{'x'.join(map(str, topology.shape))}"
    try:
        with _quiet():
            described = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"libtpu does not know {name}: {str(error).splitlines()[0]}") from error
    return list(described.devices)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr, where libtpu deplores that this is no TPU's own machine."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _kernels(text: str) -> dict[str, int]:
    """Calls of Mosaic kernels in a lowered program, by the kernel's name."""
    found: dict[str, int] = {}
    for call in re.finditer(r"@tpu_custom_call\b.*?(?:kernel_name = \"([^\"]*)\"|$)", text, re.M):
        name = call[1] or "unnamed"
        found[name] = found.get(name, 0) + 1
    return found
