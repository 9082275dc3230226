"""Strict JAX, eight CPU devices, and array annotations that are checked at every call."""

import gc
import os
import tempfile
from pathlib import Path

import jax
import jaxtyping
import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config):
    # tests/gpu runs on a machine with a GPU and with what that machine has installed.
    if any("gpu" in Path(str(arg)).parts for arg in config.args):
        return
    # Tests spend their time compiling what runs for milliseconds: a quarter of it is LLVM's.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    _compile_once(config)
    # Python looks for cycles after every 700 new objects, of which tracing makes thousands.
    gc.set_threshold(50_000, 20, 20)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Flax annotates nnx.State with typing.Hashable, which beartype calls deprecated.
    config.addinivalue_line(
        "filterwarnings", "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning"
    )
    jaxtyping.install_import_hook(["kernels_pallas", "mmjax"], "beartype.beartype")


def _compile_once(config):
    """Tests build the same tiny models: a process compiles a program once, and forgets it after.

    A folder for each process, since JAX writes its entries without a lock.
    """
    folder = tempfile.TemporaryDirectory(prefix="mmjax-compiled-")
    config.add_cleanup(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def golden():
    """The folder of the golden data; its README says what each field is."""
    return GOLDEN
