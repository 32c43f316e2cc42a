"""Which devices take part in a collective, in the three spellings of `replica_groups`."""

import math
import re
from collections.abc import Sequence

import numpy as np

from spiral_jax.roofline.hlo import UnreadableProgram

Groups = tuple[tuple[int, ...], ...]


def parse_groups(text: str, num_devices: int) -> Groups:
    """Places of the devices (in the order of the program's mesh) of every group.

    Args:
      text: `{{0,1},{2,3}}`; `[2,8]<=[16]` with an optional transpose such as `[8,2]T(1,0)`; or
        `mesh['a'=2,'b'=8] {'b'}`, the axes along which a group extends, parts of axes as `'b':(2)4` (its middle axis
        of extent 4, if b is cut into 2 x 4 x the rest), and the mesh's devices as `, device_ids=(...)` if not 0, 1, ...
      num_devices: the members of the one group that `{}` stands for.

    Raises:
      UnreadableProgram: another spelling.
    """
    text = text.strip()
    if text.startswith("mesh"):
        return _mesh(text)
    if "<=" in text:
        shape, _, devices = text.partition("<=")
        return _groups(_iota(devices).reshape(_ints(shape)))
    if text.startswith("{"):
        groups = tuple(_ints(group) for group in re.findall(r"\{([\d, ]+)\}", text))
        return groups or (tuple(range(num_devices)),)
    raise UnreadableProgram(f"replica_groups {text[:200]!r} is of unknown form")


def cross(groups: Groups, part_of: Sequence[int]) -> bool:
    """Whether a group has members in several parts, such as slices; `part_of` gives that of each place of the mesh."""
    return any(len({part_of[device] for device in group}) > 1 for group in groups)


def _mesh(text: str) -> Groups:
    found = re.fullmatch(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? *\{([^}]*)\}", text)
    if not found:
        raise UnreadableProgram(f"replica_groups {text[:200]!r} is of unknown form")
    sizes = {name.strip("'\" "): int(size) for name, size in re.findall(r"([^=,]+)=(\d+)", found[1])}
    if not found[2]:
        devices = np.arange(math.prod(sizes.values()))
    else:
        devices = _iota(found[2]) if "[" in found[2] else np.array(_ints(found[2]))
    # Parts of axes become axes: every axis is cut where one of its parts begins or ends.
    axes = [re.fullmatch(r"\s*(.*?)(?::\((\d+)\)(\d+))?\s*", axis) for axis in found[3].split(",") if axis.strip()]
    wanted = [(a[1].strip("'\" "), int(a[2] or 1), int(a[3] or sizes[a[1].strip("'\" ")])) for a in axes]
    shape, grouped = [], {}
    for name, size in sizes.items():
        cuts = {1, size}
        for axis, before, extent in wanted:
            if axis == name:
                cuts |= {before, before * extent}
        cuts = sorted(cuts)
        for low, high in zip(cuts, cuts[1:], strict=False):
            for place, (axis, before, extent) in enumerate(wanted):
                if axis == name and before <= low < before * extent:
                    grouped[len(shape)] = (place, low)
            shape.append(high // low)
    inner = sorted(grouped, key=grouped.get)
    outer = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in inner)
    return _groups(devices.reshape(shape).transpose(outer + inner).reshape(-1, members))


def _iota(text: str) -> np.ndarray:
    """`[8,2]T(1,0)`: 0, 1, ... in that shape, transposed, flattened."""
    shape, _, order = text.partition("T")
    devices = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (devices.transpose(_ints(order)) if order else devices).reshape(-1)


def _groups(devices: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in group) for group in devices.reshape(-1, devices.shape[-1]))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
