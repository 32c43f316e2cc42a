"""Names of TPU slices, their published numbers, and devices that are only described."""

import importlib.util
import os

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, GIB
from spiral_jax.roofline.slices import Slice, describe_devices, parse_slice


@pytest.mark.parametrize(
    ("text", "topology", "chips", "devices", "hosts"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64, 16),
        # TensorCores, two a chip, though the two are one device.
        ("v5p-128", "v5p:4x4x4", 64, 64, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144, 1536),
        ("v4-8", "v4:2x2x1", 4, 4, 1),
        ("v4-512", "v4:4x8x8", 256, 256, 64),
        # Chips.
        ("v5litepod-16", "v5e:4x4", 16, 16, 4),
        ("v5e-16", "v5e:4x4", 16, 16, 4),
        ("v6e-1", "v6e:1x1", 1, 1, 1),
        ("v6e-256", "v6e:16x16", 256, 256, 64),
        ("V6E:2x4", "v6e:2x4", 8, 8, 2),
        # TensorCores, each of them a device.
        ("tpu7x-16", "tpu7x:2x2x2", 8, 16, 2),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128, 16),
    ],
)
def test_names(text, topology, chips, devices, hosts):
    found = parse_slice(text)
    assert (str(found), found.chips, found.devices, found.hosts) == (topology, chips, devices, hosts)
    assert parse_slice(str(found)) == found
    assert parse_slice(found.accelerator_type) == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # The compiler would take this shape.
        ("v5p:4x4x5", ["shape 4x4x5", "v5p:4x4x4 (v5p-128)", "v5p:4x4x8 (v5p-256)"]),
        ("v5p:4x4", ["shape 4x4", "v5p:2x2x4"]),
        ("v5e:2x2x1", ["shape 2x2x1", "v5e:2x2 (v5litepod-4)"]),
        ("v5e:32x32", ["v5e:16x16"]),
        ("v4-4", ["4 (TensorCores", "v4:2x2x1 (v4-8)"]),
        ("v5e-12", ["12 (chips)", "v5e:2x4", "v5e:4x4"]),
        ("v5p-0", ["v5p-8"]),
        ("v3-8", ["'v3'", "v4, v5e, v5p, v6e, tpu7x"]),
        ("v5p", ["v5p:4x4x4", "v5p-128"]),
        ("", ["v5p:4x4x4", "v5p-128"]),
        ("v5p:4x4x4x", ["v5p:4x4x4"]),
    ],
)
def test_what_nobody_rents_out_names_the_flag_and_what_there_is(text, words):
    with pytest.raises(SpiralError) as error:
        parse_slice(text)
    message = str(error.value)
    assert message.startswith(f"--topology is {text!r}") and "\n" not in message
    for word in words:
        assert word in message


def test_a_type_names_one_shape():
    """The number of chips would not, if two shapes had it."""
    for generation in GENERATIONS:
        counts = [Slice(generation, shape).chips for shape in generation.shapes]
        assert len(set(counts)) == len(counts), generation.name


def test_numbers_of_a_device():
    v5p, tpu7x = parse_slice("v5p-8"), parse_slice("tpu7x-8")
    assert (v5p.peak_flops, v5p.hbm_bandwidth) == (459e12, 2765e9)
    # Half a chip.
    assert (tpu7x.peak_flops, tpu7x.hbm_bandwidth) == (1153.5e12, 3690e9)
    # Google's pages give both directions of all links of a chip: 1200 GB/s on 3 axes, 400 and 800 GB/s on 2.
    for name, total in {"v5p:4x4x4": 1200e9, "tpu7x:4x4x4": 1200e9, "v5e:16x16": 400e9, "v6e:16x16": 800e9}.items():
        assert 2 * sum(parse_slice(name).ring_bandwidths()) == total, name
    for generation in GENERATIONS:
        # Capacity is what the compiler can use of 32, 16, 95, 32 and 2 x 96 GiB.
        nominal = {"v4": 32, "v5e": 16, "v5p": 96, "v6e": 32, "tpu7x": 96}[generation.name] * GIB
        assert 0.95 * nominal < generation.hbm_bytes < nominal


def test_rings_close_where_whole_cubes_or_a_whole_side_of_the_pod_is_rented():
    link = 1e11
    assert parse_slice("v5p:2x2x1").ring_bandwidths() == (link, link, 0)
    assert parse_slice("v5p:2x4x4").ring_bandwidths() == (link, link, link)
    assert parse_slice("v5p:4x4x4").ring_bandwidths() == (2 * link, 2 * link, 2 * link)
    assert parse_slice("v6e:8x16").ring_bandwidths() == (link, 2 * link)


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpiralError, match=r"--topology needs libtpu.*pip install 'spiral_jax\[tpu\]'"):
        describe_devices(parse_slice("v5e-4"))


@pytest.mark.parametrize("text", ["v4-16", "v5e-8", "v5p-16", "v6e-8", "tpu7x-16"])
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
    assert len({device.process_index for device in devices}) == 3 * 2


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
