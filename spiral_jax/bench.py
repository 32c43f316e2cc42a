"""Times training, decoding, the loader or the tokenizer on this machine.

python -m spiral_jax.bench --subject=loader                         batches from a synthetic store
python -m spiral_jax.bench --subject=loader --store=STORE           from a store of yours, a path or URL
python -m spiral_jax.bench --subject=loader --store=STORE --remote=URL
                                                                    the same store from a URL, every batch compared
python -m spiral_jax.bench --subject=tokenizer --input=FILE --tokenizer=tokenizer.json
python -m spiral_jax.bench --subject=decoding                       four models of equal width, with and without a cache
python -m spiral_jax.bench --subject=training --peers=torch         train steps beside PyTorch's, of equal shape
python -m spiral_jax.bench --subject=training --peers=nanodo --nanodo=FOLDER
                                                                    beside nanodo's, from a clone of it
python -m spiral_jax.bench --subject=operations                     what such a step is made of, beside PyTorch's
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from spiral_jax import __version__, command
from spiral_jax.data.storage import is_url
from spiral_jax.errors import SpiralError, require
from spiral_jax.hardware import usable_cores
from spiral_jax.parallel.heap import keep_freed_memory
from spiral_jax.run.provenance import processor

_PACKAGES = ("numpy", "jax", "grain", "tokenizers", "fsspec", "aiohttp")


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("subject", "loader", [*_TIMERS], "what to time", flag_values=values)
    flags.DEFINE_string("store", "", "token store or Megatron dataset; default: a synthetic one", flag_values=values)
    flags.DEFINE_string("remote", "", "loader: a URL of the same store, to read instead", flag_values=values)
    flags.DEFINE_integer("sequence_length", 4096, "predictions per window", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "windows per step", 1, flag_values=values)
    flags.DEFINE_integer("read_threads", None, "default: 2 per core", 1, flag_values=values)
    flags.DEFINE_integer("prefetch_batches", None, "default: 2 per thread", 1, flag_values=values)
    flags.DEFINE_float("seconds", 10.0, "length of a repeat of the loader", 0.0, flag_values=values)
    flags.DEFINE_integer("repeats", 3, "the median of as many is printed", 1, flag_values=values)
    flags.DEFINE_multi_string("input", [], "tokenizer: file to tokenise; may be repeated", flag_values=values)
    flags.DEFINE_string("tokenizer", "", "tokenizer: the tokenizer.json", flag_values=values)
    flags.DEFINE_integer("width", 768, "decoding: of the models", flag_values=values)
    flags.DEFINE_integer("layers", 12, "decoding: of the transformer, a multiple of 6", flag_values=values)
    flags.DEFINE_integer("new_tokens", 256, "decoding: to add to every prompt", flag_values=values)
    flags.DEFINE_list("texts", ["1", "8"], "decoding: texts at a time, each to be timed", flag_values=values)
    flags.DEFINE_integer("prompt_tokens", 64, "decoding: of the longest prompt", flag_values=values)
    flags.DEFINE_list("sizes", ["1.2m", "27m"], "training, operations: of 1.2m, 27m", flag_values=values)
    flags.DEFINE_list("families", ["vanilla"], "training: of vanilla, loop, spiral_b, spiral_l", flag_values=values)
    flags.DEFINE_list("peers", [], "training: of torch, torch.compile, nanodo; decoding: torch", flag_values=values)
    flags.DEFINE_string("nanodo", "", "training: folder of a clone of nanodo, for the peer", flag_values=values)
    flags.DEFINE_bool("unroll", True, "training: model.unroll", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON only", flag_values=values)


def main(values: flags.FlagValues) -> None:
    report = _TIMERS[values.subject](values)
    report = {"subject": values.subject, **report, "machine": machine()}
    print(json.dumps(report, indent=2) if values.json else as_text(report))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "spiral_jax": __version__,
        **packages,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report as lines; of several repeats the median, and the range in brackets."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict) and value.keys() == {"median", "min", "max"}:
            value = f"{_number(value['median'])}  ({_number(value['min'])} to {_number(value['max'])})"
        elif isinstance(value, dict):
            value = ", ".join(f"{name} {_number(item)}" for name, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(_number, value))
        lines.append(f"{key.replace('_', ' '):<24} {_number(value)}")
    return "\n".join(lines)


def _time_loader(values: flags.FlagValues) -> dict[str, Any]:
    from spiral_jax.benchmarks import loader

    if values.remote:
        require(is_url(values.remote), "--remote", values.remote, "a URL, as in http://127.0.0.1:8000/store")
        allowed = "the path of the store that --remote reads from a URL"
        require(bool(values.store) and not is_url(values.store), "--store", values.store, allowed)
    threads = values.read_threads or 2 * usable_cores()
    settings = loader.LoaderSettings(
        sequence_length=values.sequence_length,
        batch_size=values.batch_size,
        read_threads=threads,
        prefetch_batches=values.prefetch_batches or 2 * threads,
        seconds=values.seconds,
        repeats=values.repeats,
    )
    store = os.path.expanduser(values.store)
    if values.remote:
        return loader.measure_remote(values.remote, store, settings)
    if store:
        return loader.measure(store, settings)
    with tempfile.TemporaryDirectory() as folder:
        loader.write_synthetic_store(Path(folder, "synthetic"))
        return loader.measure(str(Path(folder, "synthetic")), settings)


def _time_tokenizer(values: flags.FlagValues) -> dict[str, Any]:
    if not values.input or not values.tokenizer:
        raise SpiralError("--subject is 'tokenizer'; allowed: with --input=FILE and --tokenizer=tokenizer.json")
    for path in (*values.input, values.tokenizer):
        if not os.path.isfile(os.path.expanduser(path)):
            raise SpiralError(f"{path} does not exist; allowed: files for --input and --tokenizer")
    from spiral_jax.benchmarks import tokenizing

    inputs = [os.path.expanduser(path) for path in values.input]
    return tokenizing.measure(inputs, os.path.expanduser(values.tokenizer), values.repeats)


def _time_decoding(values: flags.FlagValues) -> dict[str, Any]:
    from spiral_jax.benchmarks import decoding

    are_counts = all(re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", count) for count in values.texts)
    require(are_counts, "--texts", ",".join(values.texts), "numbers from 1 on, as in 1,8")
    settings = decoding.DecodingSettings(
        batch_sizes=tuple(map(int, values.texts)),
        width=values.width,
        layers=values.layers,
        new_tokens=values.new_tokens,
        prompt_tokens=values.prompt_tokens,
        repeats=values.repeats,
        peer="torch" in values.peers,
    )
    check_peers(values.peers, ["torch"])
    return decoding.measure(settings, report=_say)


def _time_training(values: flags.FlagValues) -> dict[str, Any]:
    from spiral_jax.benchmarks import nanodo, training
    from spiral_jax.benchmarks.families import FAMILIES

    _check_among("sizes", values.sizes, training.SIZES)
    _check_among("families", values.families, FAMILIES)
    check_peers(values.peers, training.PEERS)
    folder = os.path.expanduser(values.nanodo)
    if "nanodo" in values.peers:
        nanodo.check_folder(folder)
    settings = training.TrainingSettings(
        sizes=tuple(values.sizes),
        families=tuple(values.families),
        peers=tuple(values.peers),
        repeats=values.repeats,
        unroll=values.unroll,
        nanodo=folder,
    )
    return training.measure(settings, report=_say)


def _check_among(flag: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    for found in values:
        require(found in allowed, f"--{flag}", found, ", ".join(allowed))


def check_peers(peers: Iterable[str], allowed: Iterable[str]) -> None:
    """Whether there are such peers, and what they need.

    Raises:
      SpiralError: unknown, or not installed.
    """
    _check_among("peers", peers, allowed)
    for peer in peers:
        for package in ("torch", "transformers") if peer.startswith("torch") else ():
            if importlib.util.find_spec(package) is None:
                raise SpiralError(f"--peers is {peer!r}, but {package} is not installed; pip install 'spiral_jax[hf]'")


def _time_operations(values: flags.FlagValues) -> dict[str, Any]:
    check_peers(["torch"], ["torch"])
    from spiral_jax.benchmarks import operations

    _check_among("sizes", values.sizes, operations.SIZES)
    return operations.measure(tuple(values.sizes), values.repeats, _say)


_TIMERS = {
    "loader": _time_loader,
    "tokenizer": _time_tokenizer,
    "decoding": _time_decoding,
    "training": _time_training,
    "operations": _time_operations,
}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    keep_freed_memory()
    command.run("bench", __doc__, define, main)
