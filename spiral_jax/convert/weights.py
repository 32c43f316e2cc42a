"""Safetensors on disk as the Hugging Face hub lays them out: one file, or shards and an index."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from spiral_jax.data.json_files import read_json_object, write_json
from spiral_jax.errors import SpiralError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What the hub and `transformers` split at.
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the tensors in their order; the same tensors give the same bytes.

    Args:
      folder: where to; it exists.
      tensors: by name.
      max_shard_bytes: of tensors in a file; a larger tensor has a file to itself.

    Raises:
      SpiralError: the disk is full, or cannot be written.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    many = len(shards) > 1
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)] if many else [FILE]
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})  # `transformers` 4 refuses files without it
        except safetensors.SafetensorError as error:
            raise SpiralError(f"{folder / name} cannot be written ({' '.join(str(error).split())})") from error
        (folder / name).chmod(0o644)  # the library makes it private
    if many:
        files = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        write_json(folder / INDEX, index)


class Weights(Mapping):
    """The tensors of a folder by name, each read from its file when it is asked for, as NumPy arrays.

    Attributes:
      shapes: of all of them, from the files' headers.
    """

    def __init__(self, folder: Path):
        """Opens the files and reads what is in them.

        Raises:
          SpiralError: a file that is missing, damaged or not as the index says, a tensor that is there twice, or of a
            dtype that is not a float.
        """
        self._files: dict[Path, Any] = {}
        self._names: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        expected = _weight_map(folder)
        for path in sorted({*expected.values()}) if expected else [folder / FILE]:
            file = self._files[path] = _open(path)
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self._names:
                    raise SpiralError(f"{path} has {name}, as {self._names[name].name} has; allowed: once")
                header = file.get_slice(name)
                dtype, self.shapes[name] = header.get_dtype(), tuple(header.get_shape())
                if dtype not in _DTYPES and not name.endswith(("attention.bias", "attention.masked_bias")):
                    raise SpiralError(f"{path}: {name} is of type {dtype}; allowed: {', '.join(_DTYPES.values())}")
                self._names[name] = path
        for name, path in expected.items():
            if self._names.get(name) != path:
                raise SpiralError(f"{folder / INDEX}: weight_map has {path.name} for {name}; allowed: the file with it")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._names[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weight_map(folder: Path) -> dict[str, Path]:
    """Each tensor's file as the index has it; nothing if there is a single file, which goes before an index."""
    if (folder / FILE).is_file():
        return {}
    path = folder / INDEX
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f"{pickled[0]}, a pickle, which could run any code" if pickled else "no weights"
        raise SpiralError(f"{folder} has {found}; allowed: {FILE}, or {INDEX} with its files")
    files = read_json_object(path).get("weight_map")
    if not (isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values())):
        raise SpiralError(f"{path}: weight_map is no object of tensors to files; allowed: one")
    for file in files.values():
        if file != Path(file).name:
            raise SpiralError(f"{path}: weight_map has {file!r}; allowed: names of files beside it")
    return {name: folder / file for name, file in files.items()}


def _open(path: Path) -> Any:
    if not path.is_file():
        raise SpiralError(f"{path} does not exist; allowed: the files that {INDEX} names")
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SpiralError(f"{path} is damaged or no safetensors file ({reason})") from error
