"""Meshes of devices as the training jobs take them: their text, axes and order."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxsoft.training import MeshError, parse_mesh
from jaxsoft.training.mesh import usable_mesh


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`mesh` must be axes with their sizes, such as data=2,vocab=4, got ''."),
        ("data", "must be axes with their sizes"),
        ("data=0", "must be axes with their sizes"),
        ("data=-1,vocab=1", "must be axes with their sizes"),
        ("data=1,", "must be axes with their sizes"),
        ("data=1;vocab=1", "must be axes with their sizes"),
        ("data=" + "9" * 5000, "must be axes with their sizes"),
        ("model=1", "must have the axes data and vocab, each once, got 'model=1'."),
        ("data=1,data=1", "must have the axes data and vocab, each once"),
        ("vocab=99", "must multiply to the number of devices"),
    ],
)
def test_text_of_a_mesh_is_checked(text, message):
    with pytest.raises(MeshError) as caught:
        parse_mesh(text)
    assert message in str(caught.value)


def test_a_mesh_has_both_axes(one_device):
    devices = np.asarray(jax.devices()[:1])
    for mesh in (None, Mesh(devices, ("vocab",)), parse_mesh(" data=1 ")):
        assert dict(usable_mesh(mesh, 4).shape) == {"data": 1, "vocab": 1}
    with pytest.raises(MeshError, match="the axes data and vocab, got 'model'"):
        usable_mesh(Mesh(devices, ("model",)), 4)


def test_devices_stay_along_their_axes():
    devices = np.asarray(jax.devices()).reshape(4, 2)
    mesh = usable_mesh(Mesh(devices, ("vocab", "data")), 4)
    assert mesh.axis_names == ("data", "vocab")
    np.testing.assert_array_equal(mesh.devices, devices.T)
