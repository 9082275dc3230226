"""How a mesh lies on the devices of real TPU topologies."""

import numpy as np
import pytest

from mmjax.plan import parse_topology
from mmjax.plan.ahead import described_devices
from mmjax.sharding import ShardingError, make_mesh
from tests.tpu_aot.programs import NEEDS_COMPILER

pytestmark = NEEDS_COMPILER


def test_the_expert_axis_is_a_line_of_the_torus():
    mesh = make_mesh({"data": 16, "expert": 16}, described_devices(parse_topology("v6e:16x16")))
    for row in mesh.devices.reshape(16, 16):
        places = np.array([device.coords for device in row])
        assert (np.ptp(places, axis=0) > 0).sum() == 1, places


def test_slices_lie_along_data():
    devices = described_devices(parse_topology("2*v5p:2x2x2"))
    mesh = make_mesh({"data": 4, "expert": 4}, devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(4, 4)
    assert (slices == [[0] * 4] * 2 + [[1] * 4] * 2).all()
    with pytest.raises(ShardingError, match="2 slices lie along data, whose size 1"):
        make_mesh({"expert": 16}, devices)
