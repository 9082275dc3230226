"""The engine on a mesh of two processes: each of them gets what one process would."""

import json
import subprocess

import numpy as np
import pytest

from tests.processes import end, start

pytestmark = pytest.mark.slow


def test_two_processes_draw_what_one_does(tmp_path):
    """Prompts with a common prefix, samples that go to the host and come back, new weights."""
    told = []
    for processes in (1, 2):
        running = start(
            ["-m", "tests.mmjax.engine_process"],
            processes=processes,
            devices=4,
            cache=tmp_path,
            stdout=subprocess.PIPE,
        )
        codes, said = end(running)
        assert codes == [0] * processes
        told += [json.loads(out.splitlines()[-1]) for out, _ in said]
    one, *two = told
    assert one["preemptions"] > 0
    assert two[0] == two[1]
    assert two[0]["preemptions"] == one["preemptions"]
    for what in ("first", "second"):
        for mine, other in zip(two[0][what], one[what], strict=True):
            assert mine[:2] == other[:2]
            np.testing.assert_allclose(mine[2], other[2], atol=2e-5)
    assert two[0]["unseeded"] != one["unseeded"]
