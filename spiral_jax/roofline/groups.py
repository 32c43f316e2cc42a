"""Which devices take part in a collective, from the three spellings of `replica_groups`."""

import math
import re
from collections.abc import Sequence

import numpy as np

from spiral_jax.roofline.hlo import UnreadableProgram, integers

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
    if mesh := re.fullmatch(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? *\{([^}]*)\}", text):
        return _groups(_mesh(mesh[1], mesh[2], mesh[3]))
    if iota := re.fullmatch(r"\[([\d,]+)\]<=(.*)", text):
        return _groups(_iota(iota[2]).reshape(integers(iota[1])))
    if text.startswith("{"):
        groups = tuple(integers(group) for group in re.findall(r"\{([\d, ]+)\}", text))
        return groups or (tuple(range(num_devices)),)
    raise UnreadableProgram(f"replica_groups {text[:200]!r} is of unknown form")


def cross(groups: Groups, part_of: Sequence[int]) -> bool:
    """Whether a group has members in several parts, such as slices; `part_of` gives that of each place of the mesh."""
    return any(len({part_of[device] for device in group}) > 1 for group in groups)


def _mesh(axes: str, device_ids: str | None, grouped_axes: str) -> np.ndarray:
    """The devices of a mesh [groups, members]."""
    sizes = {name.strip("'\" "): int(size) for name, size in re.findall(r"([^=,]+)=(\d+)", axes)}
    if not device_ids:
        devices = np.arange(math.prod(sizes.values()))
    else:
        devices = _iota(device_ids) if "[" in device_ids else np.array(integers(device_ids))
    # Parts of axes become axes: every axis is cut where one of its parts begins or ends.
    wanted = [
        (name, int(before or 1), int(extent or sizes[name]))
        for name, before, extent in re.findall(r"([^'\":,() ]+)['\"]?(?::\((\d+)\)(\d+))?", grouped_axes)
    ]
    shape: list[int] = []
    grouped: dict[int, tuple[int, int]] = {}
    for name, size in sizes.items():
        parts = [(place, before, extent) for place, (axis, before, extent) in enumerate(wanted) if axis == name]
        cuts = sorted({1, size, *(cut for _, before, extent in parts for cut in (before, before * extent))})
        for low, high in zip(cuts, cuts[1:], strict=False):
            for place, before, extent in parts:
                if before <= low < before * extent:
                    grouped[len(shape)] = (place, low)
            shape.append(high // low)
    inner = sorted(grouped, key=lambda axis: grouped[axis])
    outer = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in inner)
    return devices.reshape(shape).transpose(outer + inner).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """`[8,2]T(1,0)`: 0, 1, ... in that shape, transposed, flattened."""
    shape, _, order = text.partition("T")
    devices = np.arange(math.prod(integers(shape))).reshape(integers(shape))
    return (devices.transpose(integers(order)) if order else devices).reshape(-1)


def _groups(devices: np.ndarray) -> Groups:
    return tuple(map(tuple, devices.reshape(-1, devices.shape[-1]).tolist()))
