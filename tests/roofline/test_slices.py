"""Devices that are only described."""

import importlib.util
import os

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, Slice, parse_slice
from spiral_jax.roofline.slices import describe_devices


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpiralError, match=r"--topology needs libtpu.*pip install 'spiral_jax\[tpu\]'"):
        describe_devices(parse_slice("v5e-4"))


@pytest.mark.parametrize("text", ["v4-16", "v5e-8", "v5e-16", "v5p-16", "v6e-8", "tpu7x-16"])
def test_described_devices(text, libtpu):
    chips = parse_slice(text)
    devices = describe_devices(chips)
    assert len(devices) == chips.devices
    assert {device.device_kind for device in devices} == {chips.generation.device_kind}
    assert len({tuple(device.coords) for device in devices}) == chips.chips
    assert len({device.process_index for device in devices}) == chips.hosts


def test_several_slices(libtpu):
    devices = describe_devices(parse_slice("v5e-8"), num_slices=3)
    assert [device.slice_index for device in devices] == [0] * 8 + [1] * 8 + [2] * 8
    assert len({device.process_index for device in devices}) == 3


def test_what_the_user_set_stays(libtpu, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    describe_devices(parse_slice("v5e-4"))
    assert (os.environ["TPU_WORKER_HOSTNAMES"], os.environ["TPU_SKIP_MDS_QUERY"]) == ("127.0.0.1", "1")


def test_every_shape_can_be_described(libtpu):
    for generation in GENERATIONS:
        for shape in generation.shapes:
            chips = Slice(generation, shape)
            if chips.chips <= 1024:
                assert len(describe_devices(chips)) == chips.devices
