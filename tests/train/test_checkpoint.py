"""Checkpoints: which are kept, where they go, and what becomes of damaged ones."""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmjax.config import ConfigError
from mmjax.sharding import make_mesh
from tests.train.test_job import Killed, Run, killing
from train.checkpoint import Checkpoints, check_sums
from train.config import CheckpointConfig, JobConfig
from train.metrics import read_metrics

# Orbax leaves the coroutines of a restore that failed to the collector, after their loop is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Here, where the warning is expected, and not in whatever test comes later."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return read_metrics(Run(tmp_path_factory.mktemp("straight")).go().job.workdir)


@pytest.fixture
def killed(tmp_path):
    """A workdir with checkpoints 3 and 6, killed at step 8."""
    with pytest.raises(Killed):
        Run(tmp_path, step=killing(8)).go()
    return tmp_path


def files(workdir, step, pattern):
    found = [f for f in (workdir / "checkpoints" / str(step)).rglob(pattern) if f.is_file()]
    assert found
    return found


def truncate(workdir, step):
    for file in files(workdir, step, "state/**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose(workdir, step):
    for file in files(workdir, step, "state/**/d/*"):
        file.unlink()


def scramble(workdir, step):
    for file in files(workdir, step, "state/**/d/*"):
        file.write_bytes(bytes(b ^ 0x55 for b in file.read_bytes()))


def lose_metadata(workdir, step):
    for file in files(workdir, step, "state/_METADATA"):
        file.unlink()


def lose_data(workdir, step):
    shutil.rmtree(workdir / "checkpoints" / str(step) / "data")


def garble_json(workdir, step):
    for file in files(workdir, step, "data/metadata"):
        file.write_text("{")


def change_values(workdir, step):
    """What no reader notices: every file is whole, but an array is another."""
    for file in files(workdir, step, "sums/metadata"):
        sums = json.loads(file.read_text())
        name = next(name for name in sums if "sum" in name)
        file.write_text(json.dumps(sums | {name: sums[name] ^ 1}))


DAMAGES = [truncate, lose, scramble, lose_metadata, lose_data, garble_json, change_values]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(killed, straight, capsys, damage):
    damage(killed, 6)
    run = Run(killed).go()
    told = capsys.readouterr().err
    assert "checkpoint 6 in " in told
    assert "is damaged: " in told
    assert "going on from checkpoint 3, the last one that is whole" in told
    assert read_metrics(killed) == straight
    assert run.checkpoints == [3, 6, 9, 10]
    # Step 6 was saved anew, and is whole.
    for step in (9, 10):
        shutil.rmtree(killed / "checkpoints" / str(step))
    Run(killed).go()
    assert "damaged" not in capsys.readouterr().err
    assert read_metrics(killed) == straight


def test_job_does_not_start_anew_where_all_checkpoints_are_damaged(killed):
    for step in (3, 6):
        lose(killed, step)
    with pytest.raises(ConfigError, match=r"no checkpoint in .* can be read; bring one back"):
        Run(killed).go()


def test_checkpoint_of_another_dtype_is_whole_and_does_not_fit(killed, capsys):
    other = Run(killed)
    params = {"sum": other.job.state.params["sum"].astype(jnp.float32)}
    other.job.state = other.job.state._replace(params=params)
    with pytest.raises(ConfigError, match=r"'sum'\] is int32\[\] there, float32\[\] in the job"):
        other.go()
    assert "damaged" not in capsys.readouterr().err


def test_checkpoint_that_was_not_finished_is_told_and_removed(killed, straight, capsys):
    unfinished = killed / "checkpoints" / "9.orbax-checkpoint-tmp"
    shutil.copytree(killed / "checkpoints" / "6", unfinished)
    Run(killed).go()
    assert "9.orbax-checkpoint-tmp was not finished" in capsys.readouterr().err
    assert not unfinished.exists()
    assert read_metrics(killed) == straight


def with_checkpoints(workdir, **changes):
    run = Run(workdir)
    run.job.cfg = JobConfig("sft", 10, checkpoint=CheckpointConfig(every=1, **changes))
    return run.go()


def test_latest_ones_are_kept_and_some_for_good(tmp_path):
    assert with_checkpoints(tmp_path, keep=2, keep_every=4).checkpoints == [4, 8, 9, 10]


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_checkpoints_go_where_the_config_says(tmp_path, form):
    place = tmp_path / "elsewhere"
    run = Run(tmp_path / "work")
    checkpoint = CheckpointConfig(every=5, path=form.format(place))
    run.job.cfg = JobConfig("sft", 5, checkpoint=checkpoint)
    run.go()
    assert (place / "5").is_dir()
    assert not (tmp_path / "work" / "checkpoints").exists()
    again = Run(tmp_path / "work")
    again.job.cfg = JobConfig("sft", 7, checkpoint=checkpoint)
    again.go()
    assert again.steps == list(range(1, 8))


@pytest.mark.parametrize("place", ["ftp://host/run", "{}/file", "{}/file/below"])
def test_place_that_cannot_be_reached(tmp_path, place):
    (tmp_path / "file").write_text("")
    path = place.format(tmp_path)
    with pytest.raises(ConfigError, match=rf"checkpoint.path '{path}' cannot be reached"):
        Checkpoints(tmp_path, CheckpointConfig(path=path))


# Check sums.


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_change_of_a_bit_changes_the_sum(data):
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "int32", "uint32", "bool"]))
    values = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(jnp.dtype(dtype))
    other = values.copy()
    raw = other.view(np.uint8).reshape(-1)
    at = data.draw(st.integers(0, raw.size - 1))
    raw[at] ^= 1 if dtype == "bool" else 1 << data.draw(st.integers(0, 7))
    assert check_sums({"x": jnp.asarray(values)}) != check_sums({"x": jnp.asarray(other)})


def test_sums_tell_order_and_do_not_depend_on_the_mesh():
    x = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
    assert check_sums({"x": x}) != check_sums({"x": x.T})
    mesh = make_mesh({"data": 4, "model": 2})
    for spec in (P("data", "model"), P("model"), P()):
        spread = jax.device_put(x, NamedSharding(mesh, spec))
        assert check_sums({"x": spread}) == check_sums({"x": x})
