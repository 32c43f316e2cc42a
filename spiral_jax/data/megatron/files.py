"""The files of a Megatron dataset: which index a place stands for, and which files hold its tokens.

Parts are named as `utils/shard_memmap.py` of EleutherAI/pythia names them: NAME-00000-of-00020.bin to
NAME-00020-of-00020.bin, where the number at the end is that of the last part: there are 21 (the last one may be
empty). Sets where it is the number of parts are read, too: which one it is, the index tells by the size. Parts are
bytes cut anywhere, and put end to end they are NAME.bin.
"""

import os
import re

from spiral_jax.data.storage import LOCAL, Storage, is_url, join, on_this_machine
from spiral_jax.errors import SpiralError

_PART = re.compile(r"(?P<prefix>.*)-(?P<number>\d{1,6})-of-(?P<last>\d{1,6})\.bin", re.DOTALL)
_USUAL_INDEX = "document.idx"


def is_megatron(place: str, storage: Storage = LOCAL) -> bool:
    """Whether a place is a Megatron dataset: an `.idx` or `.bin` file, or a folder with an `.idx`."""
    place = str(place)
    return place.endswith((".idx", ".bin")) or bool(_indices_at(place, storage))


def find_index(place: str, storage: Storage) -> str:
    """Returns the path or URL of the `.idx` of a dataset; `place` is what `MegatronTokens.open` takes.

    Raises:
      SpiralError: there is none, or several.
    """
    found = _indices_at(place, storage)
    if len(found) == 1:
        return found[0]
    if len(found) > 1:
        raise SpiralError(f"{place} holds {', '.join(found)}; allowed: a folder with one .idx, or the path of one")
    if place.endswith(".bin"):
        raise SpiralError(f"{place[:-4]}.idx does not exist; allowed: a .bin, or its parts, beside its .idx")
    raise SpiralError(
        f"{place} holds no Megatron dataset; allowed: an .idx or its .bin, their prefix, or a folder with one .idx"
    )


def _indices_at(place: str, storage: Storage) -> list[str]:
    """The indices that a place may stand for."""
    if place.endswith(".idx"):
        return [place]
    if place.endswith(".bin"):
        part = _PART.fullmatch(place)
        beside = [f"{place[:-4]}.idx"] + ([f"{part['prefix']}.idx"] if part else [])
        return [name for name in beside if storage.exists(name)][:1]
    index = f"{place.rstrip('/')}.idx"
    # A host or bucket is no prefix: with a suffix it would be another one.
    is_prefix = not is_url(place) or "/" in place.partition("://")[2].rstrip("/")
    if is_prefix and storage.exists(index):
        return [index]
    names = [name for name in _list(place) if name.endswith(".idx")]
    if not names and is_url(place) and storage.exists(join(place, _USUAL_INDEX)):
        names = [_USUAL_INDEX]
    return [join(place, name) for name in names]


def find_tokens(index: str, place: str, storage: Storage) -> tuple[list[str], str]:
    """Finds the tokens of a dataset.

    Args:
      index: the `.idx`.
      place: what it was found by; where files cannot be listed, a part here says how many parts there are.
      storage: how to ask for files.

    Returns:
      The single `.bin`, or else the parts in order; and the part with the last number if it does not exist, which is
      as it should be where that number is the number of parts.

    Raises:
      SpiralError: neither, a part is missing, or there are parts of several sets.
    """
    prefix = index[:-4]
    if storage.exists(f"{prefix}.bin"):
        return [f"{prefix}.bin"], ""
    folder = prefix[: len(prefix) - len(re.split(r"[/\\]", prefix)[-1])]
    names = [place] if _PART.fullmatch(place) else [folder + name for name in _list(folder or ".")]
    lasts = sorted({part["last"] for name in names if (part := _PART.fullmatch(name)) and part["prefix"] == prefix})
    if len(lasts) != 1:
        found = f"has parts of {len(lasts)} sets (-of-{', -of-'.join(lasts)})" if lasts else "does not exist"
        hint = ", or the URL of one of them" if is_url(index) else ""
        raise SpiralError(f"{prefix}.bin {found}; allowed: it, or the parts {prefix}-00000-of-NNNNN.bin{hint}")
    last = lasts[0]
    parts = [f"{prefix}-{number:0{len(last)}}-of-{last}.bin" for number in range(int(last) + 1)]
    absent = [part for part in parts if not storage.exists(part)]
    gaps = [part for part in absent if part != parts[-1]]
    if gaps:
        more = f" and {len(gaps) - 4} more" if len(gaps) > 4 else ""
        raise SpiralError(f"{', '.join(gaps[:4])}{more} do not exist; allowed: all parts of {prefix}.bin")
    return [part for part in parts if part not in absent], absent[0] if absent else ""


def _list(folder: str) -> list[str]:
    """Names in a folder, sorted; none where there is no folder, or a URL that cannot be listed."""
    here = on_this_machine(folder)
    if here is not None:
        return sorted(os.listdir(here)) if os.path.isdir(here) else []
    try:
        from spiral_jax.data.remote.blob import file_system_of

        files, path = file_system_of(folder)
        return sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in files.ls(path, detail=False))
    except Exception:  # each kind of storage has its own
        return []
