"""Published numbers of accelerators, and names of TPU slices."""

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, GIB, Slice, parse_slice, peak_bytes, peak_flops, region_of


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("NVIDIA A10G", None),
    ],
)
def test_peak_flops_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


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
        # One host drives all eight, though hosts of larger slices have four.
        ("V6E:2x4", "v6e:2x4", 8, 8, 1),
        ("v5litepod-8", "v5e:2x4", 8, 8, 1),
        ("v5litepod-4", "v5e:2x2", 4, 4, 1),
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


def test_zones_and_images():
    """The launcher's part of the table; regions are what a bucket has to be in."""
    assert region_of("us-central1-a") == "us-central1" and region_of("us-south1-ai1b") == "us-south1"
    for generation in GENERATIONS:
        assert generation.zones and len(set(generation.zones)) == len(generation.zones)
        assert all(region_of(zone).count("-") == 1 for zone in generation.zones)
        # No image of a VM: only GKE rents it out.
        assert bool(generation.runtime) == (generation.name != "tpu7x")
    assert len({g.runtime for g in GENERATIONS}) == len(GENERATIONS)


def test_the_message_names_the_flag_that_was_given():
    with pytest.raises(SpiralError, match=r"^--accelerator is 'v5p-127', but no v5p slice has 127 \(TensorCores"):
        parse_slice("v5p-127", "--accelerator")


@pytest.mark.parametrize(
    "stats, peak",
    [
        (None, None),
        ({}, None),
        ({"bytes_in_use": 1}, None),
        ({"peak_bytes_in_use": 3, "bytes_limit": 9}, 3),  # GPUs
        ({"peak_bytes_in_use": 3, "bytes_reserved": 1, "peak_bytes_reserved": 27}, 30),  # TPUs
    ],
)
def test_the_most_that_a_device_has_held(stats, peak):
    assert peak_bytes(stats) == peak
