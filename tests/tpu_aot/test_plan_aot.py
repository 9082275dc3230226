"""Whole steps compiled for TPUs that are not here, as `mmjax plan` does it, at a small size."""

import json

import pytest

from mmjax import cli
from mmjax.plan import Job, PlanError, counts, estimate, parse_topology
from mmjax.plan.ahead import compile_ahead
from tests.tpu_aot.programs import NEEDS_COMPILER, SMALL

pytestmark = NEEDS_COMPILER
CASES = [
    ("train", "v5p:2x2x1", {"data": 2, "expert": 2}),
    ("prefill", "v5e:2x4", {"data": 2, "expert": 2, "model": 2}),
    ("decode", "v6e:2x4", {"data": 2, "expert": 2, "model": 2}),
]


@pytest.mark.parametrize(("kind", "topology", "mesh"), CASES)
def test_step(kind, topology, mesh):
    # Without remat: every layer that is computed again is compiled again.
    job, chips = Job(kind, SMALL, 8, 128, "none"), parse_topology(topology)
    stages = []
    program = compile_ahead(job, chips, mesh, stages.append)
    print(program)
    assert stages == ["trace", "lower", "compile"]
    assert program.peak < chips.chip.hbm
    counted = estimate(job, chips, mesh).memory
    held = sum(counted.get(name, 0) for name in ("parameters", "optimizer", "cache"))
    # Beside these the program takes tokens, and pads small arrays to whole tiles.
    assert held <= program.arguments <= 1.1 * held + 2**18
    # What is donated comes back in its own memory; only metrics or logits are new.
    assert program.results <= 4 * SMALL.vocab_size * job.batch + 2**12


def test_what_does_not_fit_is_told():
    job = Job("decode", SMALL, 8192, 2**17)
    chips, mesh = parse_topology("v5e:2x4"), {"data": 4, "model": 2}
    assert counts.memory(job, mesh | {"context": 1, "expert": 1}, [])["cache"] > chips.chip.hbm
    with pytest.raises(
        PlanError, match=r"compiled for v5e:2x4, a step does not fit: .*G of 15.75G"
    ):
        compile_ahead(job, chips, mesh)


def test_command_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    flags = ["--topology", "v5e:2x2", "--job", "decode", "--mesh", "data=4", "--length", "128"]
    assert cli.main(["plan", "--config", str(tmp_path), *flags]) == 0
    told = capsys.readouterr()
    for said in ("compiled for v5e:2x2", "peak, compiled", "kernels:"):
        assert said in told.out
    assert "error" not in told.err
