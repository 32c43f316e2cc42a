"""Continues texts with the model of a run, or of an exported or Hugging Face folder.

python -m spiral_jax.generate --workdir=runs/quickstart --prompt="The spiral"          streams the text
python -m spiral_jax.generate --workdir=DIR --prompt=A --prompt=B --temperature=0.8    several at a time
python -m spiral_jax.generate --workdir=DIR --input=prompts.txt --json                 a prompt per line
python -m spiral_jax.generate --workdir=DIR --input=- < prompts.jsonl                  lines, or objects with `prompt`

Texts go to stdout, in the order of the prompts; speed, memory and how often each level ran go to stderr. With --json
stdout has a JSON object per text.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from spiral_jax import command
from spiral_jax.convert.folder import is_huggingface, read_config
from spiral_jax.data.json_files import for_stdout
from spiral_jax.data.plain_text import decoded, lines_of
from spiral_jax.data.storage import expanded
from spiral_jax.data.tokenizers import Tokenizer, load_tokenizer
from spiral_jax.decoding.decoder import Decoder, Request, Token, bytes_per_row, has_stop, text_before_stop
from spiral_jax.decoding.sampling import SamplingSettings
from spiral_jax.errors import SpiralError, require
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import Dtype, ModelConfig
from spiral_jax.parallel.heap import keep_freed_memory
from spiral_jax.parallel.mesh import MeshConfig, check_divisible, make_mesh
from spiral_jax.parallel.placed_model import PlacedModel, place
from spiral_jax.run import own_code
from spiral_jax.run.directory import RUN_OR_EXPORT, check_dtype, read_model, read_model_of, run_directory, tokenizer_of
from spiral_jax.run.reading import SavedRun, reading


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run, or an exported folder", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default: the newest", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue; may be repeated", flag_values=values)
    flags.DEFINE_string("input", "", "file of prompts, - for standard input", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 128, "the most tokens to add", flag_values=values)
    flags.DEFINE_integer("max_length", None, "most tokens in all; default: as in training", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "draw among so many likeliest tokens; 0 for all", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "draw among the likeliest with this probability together", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the first prompt; the next one has the next seed", flag_values=values)
    flags.DEFINE_multi_string("stop_token", [], "token that ends a text, besides the separator", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "text that ends a text and is not shown", flag_values=values)
    flags.DEFINE_integer("batch_size", 8, "texts at a time", flag_values=values)
    flags.DEFINE_string("dtype", None, "to compute in; default: the run's", flag_values=values)
    flags.DEFINE_list("mesh", ["1", "1", "1"], "devices along data,fsdp,tensor", flag_values=values)
    flags.DEFINE_bool("json", False, "a JSON object per text", flag_values=values)


def main(values: flags.FlagValues) -> None:
    folder = run_directory(values.workdir, allowed=RUN_OR_EXPORT)
    with contextlib.nullcontext() if is_huggingface(folder) else reading(folder, values.step) as saved:
        tokenizer, max_length = tokenizer_and_length(folder, saved)
        requests, prompts = requests_of(values, tokenizer, max_length)
        stop_ids = [tokenizer.separator_id, *(stop_id(tokenizer, text) for text in values.stop_token)]
        mesh = mesh_of(values.mesh)
        placed, params = open_model(folder, saved, values.step, values.dtype, mesh)
    model = placed.model
    # No longer than the longest text can get: attention reads the whole cache.
    longest = max(len(request.prompt) for request in requests) + values.max_new_tokens
    rows = min(values.batch_size, len(requests))
    decoder = Decoder(model, mesh, rows=rows, capacity=longest, num_ids=tokenizer.vocab_size, stop_ids=stop_ids)
    compiling = time.monotonic()
    few = min(2, values.max_new_tokens)  # the second is the first that a step makes
    for _ in decoder.run(params, [dataclasses.replace(x, max_new_tokens=few) for x in requests[: decoder.rows]]):
        pass
    print(f"compiled in {time.monotonic() - compiling:.1f} s", file=sys.stderr, flush=True)

    shown = Shown(tokenizer, [text for _, text in prompts], values.stop, values.json)
    begin = first = time.monotonic()
    for token in decoder.run(params, requests):
        if shown.tokens == 0:
            first = time.monotonic()
        shown.add(token)
    seconds = time.monotonic() - begin
    print(report(model.config, decoder, requests, shown.tokens, first - begin, seconds), file=sys.stderr, flush=True)


def requests_of(
    values: flags.FlagValues, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Request], list[tuple[str, str]]]:
    """What the flags ask for, and the prompts: where each stands, and its text.

    Args:
      values: the flags.
      tokenizer: of the model.
      max_length: tokens that it was trained with at a time.
    """
    prompts = read_prompts(values.prompt, values.input)
    settings = sampling_of(values)
    for flag, least in (("max_new_tokens", 1), ("batch_size", 1), ("max_length", 2)):
        value = values[flag].value
        require(value is None or value >= least, f"--{flag}", value, f"{least} or more")
    capacity = max_length if values.max_length is None else values.max_length
    require("" not in values.stop, "--stop", "", "a text")
    requests = [
        Request(
            encode(tokenizer, place, text, values.max_new_tokens, capacity),
            values.max_new_tokens,
            dataclasses.replace(settings, seed=(settings.seed + number) % 2**32),
            functools.partial(has_stop, tokenizer, stops=values.stop) if values.stop else None,
        )
        for number, (place, text) in enumerate(prompts)
    ]
    return requests, prompts


def tokenizer_and_length(folder: epath.Path, saved: SavedRun | None) -> tuple[Tokenizer, int]:
    """What a model's texts are made of, and the tokens it was trained with at a time."""
    if saved is None:
        return load_tokenizer(folder), read_config(folder)[1]
    own_code.check_registered(folder, saved.meta["config"])
    return tokenizer_of(folder), saved.meta["config"]["train"]["sequence_length"]


def read_prompts(flag: Sequence[str], path: str) -> list[tuple[str, str]]:
    """(where it stands, text) of every prompt.

    Raises:
      SpiralError: none or both given, a file that cannot be read, a broken line.
    """
    if not flag and not path:
        raise SpiralError("--prompt or --input is missing; allowed: one of them")
    if flag:
        require(not path, "--input", path, "none beside --prompt")
        return [(f"--prompt {number}", text) for number, text in enumerate(flag, start=1)]
    try:
        content = sys.stdin.buffer.read() if path == "-" else expanded("--input", path).read_bytes()
        lines = lines_of(decoded(content))
    except OSError as error:
        raise SpiralError(f"--input {path} cannot be read ({error.strerror}); allowed: a file, or -") from None
    except UnicodeDecodeError as error:
        raise SpiralError(f"--input {path} is not UTF-8 at byte {error.start}; allowed: UTF-8 text") from None
    if not lines:
        raise SpiralError(f"--input {path} is empty; allowed: a prompt per line")
    # From standard input the first line says which of the two it is.
    objects = path.endswith(".jsonl") or (path == "-" and lines[0].lstrip().startswith('{"prompt"'))
    places = [f"--input {path}:{number}" for number in range(1, len(lines) + 1)]
    texts = list(map(prompt_of, places, lines)) if objects else lines
    return list(zip(places, texts, strict=True))


def prompt_of(place: str, line: str) -> str:
    """The `prompt` of a JSON object, or SpiralError."""
    try:
        text = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise SpiralError(f"{place} is no JSON object with a text `prompt`; allowed: one on every line")
    return text


def sampling_of(values: flags.FlagValues) -> SamplingSettings:
    """The flags' settings; the errors name flags."""
    try:
        return SamplingSettings(values.temperature, values.top_k, values.top_p, values.seed)
    except SpiralError as error:
        raise SpiralError(f"--{error}") from None


def encode(tokenizer: Tokenizer, place: str, text: str, max_new_tokens: int, capacity: int) -> np.ndarray:
    """Tokens of a prompt.

    Raises:
      SpiralError: none, or more than there is room for.
    """
    ids = tokenizer.encode(text)
    if not len(ids):
        raise SpiralError(f"{place} is empty; allowed: at least one token")
    if len(ids) + max_new_tokens > capacity:
        raise SpiralError(
            f"{place} has {len(ids)} tokens and {max_new_tokens} to add (--max_new_tokens); allowed: {capacity} "
            "together (--max_length, the model's sequence length by default)"
        )
    return ids


def stop_id(tokenizer: Tokenizer, text: str) -> int:
    """The token with this text.

    Raises:
      SpiralError: there is none.
    """
    found = tokenizer.token_id(text)
    if found is None:
        raise SpiralError(f"--stop_token is {text!r}; allowed: the text of one token (--stop takes any text)")
    return found


def is_count(text: str) -> bool:
    """Whether a text is a number from 1 on, of digits as int() takes them."""
    return re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", text) is not None


def mesh_of(flag: Sequence[str]) -> Mesh:
    """The mesh of --mesh, over the first devices.

    Raises:
      SpiralError: not three numbers, or more devices than there are.
    """
    ok = len(flag) == 3 and all(is_count(size) for size in flag)
    require(ok, "--mesh", ",".join(flag), "data,fsdp,tensor, as in 1,1,8")
    sizes, here = [int(size) for size in flag], jax.device_count()
    require(math.prod(sizes) <= here, "--mesh", ",".join(flag), f"a product of at most {here}, the devices here")
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


def open_model(
    folder: epath.Path, saved: SavedRun | None, step: int | None, dtype: Dtype | None, mesh: Mesh
) -> tuple[PlacedModel, Any]:
    """The model on a mesh, and its parameters there.

    Raises:
      SpiralError: no such checkpoint, or a model that cannot be cut like this.
    """
    if saved is None:
        config, params = read_model(folder, step=step, dtype=dtype)
    else:
        config, params = read_model_of(saved, dtype=dtype)
    check_dtype(config.dtype, "--dtype")
    command.compute_in(config.dtype)
    data, fsdp, tensor = mesh.devices.shape
    check_divisible((data, fsdp, tensor), config, data * fsdp, 1)
    placed = place(config, mesh, backend_for(mesh, config))
    return placed, jax.device_put(params, placed.param_shardings)


class Shown:
    """Puts texts on stdout in the order of their prompts: the first one unfinished as it grows, the others whole.

    Attributes:
      tokens: new tokens so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], stops: Sequence[str], as_json: bool):
        self.tokens = 0
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._stops = stops
        self._as_json = as_json
        self._ids: list[list[int]] = [[] for _ in prompts]
        self._end = [""] * len(prompts)
        self._current = 0
        self._sent = 0  # characters of the current text
        self._show_prompt()

    def add(self, token: Token) -> None:
        """Takes one token."""
        self.tokens += 1
        self._ids[token.request].append(token.id)
        self._end[token.request] = token.end
        if token.request != self._current:
            return
        # When a text ends, the next ones may be there already.
        while self._current < len(self._prompts):
            self._show_text()
            if not self._end[self._current]:
                return
            self._current, self._sent = self._current + 1, 0
            self._show_prompt()

    def _show_prompt(self) -> None:
        if self._current < len(self._prompts) and not self._as_json:
            number = f"=== {self._current + 1}\n" if len(self._prompts) > 1 else ""
            print(number + self._prompts[self._current], end="", flush=True)

    def _show_text(self) -> None:
        ids, end, prompt = self._ids[self._current], self._end[self._current], self._prompts[self._current]
        if not end and self._as_json:
            return
        text = text_before_stop(self._tokenizer, ids, self._stops)
        if self._as_json:
            found = {"prompt": prompt, "text": text, "ids": ids, "end": end}
            print(for_stdout(json.dumps(found, ensure_ascii=False)), flush=True)
            return
        if not end:
            # What may yet turn out to be something else: part of a character, which shows as this one, or of a stop.
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            text = text[: len(text) - max((len(stop) - 1 for stop in self._stops), default=0)]
        print(text[self._sent :], end="\n" if end else "", flush=True)
        self._sent = max(self._sent, len(text))


def report(
    config: ModelConfig, decoder: Decoder, requests: Sequence[Request], tokens: int, first: float, seconds: float
) -> str:
    """Speed, memory, and how often the core ran at each resolution, as lines."""
    counts, row_bytes = decoder.counts(), bytes_per_row(config, decoder.capacity)
    read = sum(len(request.prompt) for request in requests)
    lines = [
        f"prompts      {read:,} tokens in {len(requests):,} prompts, first new token after {first:.2f} s",
        f"generated    {tokens:,} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s "
        f"({decoder.rows} at a time)",
        f"memory       {row_bytes / decoder.capacity:,.0f} bytes a token, "
        f"{row_bytes * decoder.rows / 1e6:,.1f} MB in all",
    ]
    if counts.tokens and counts.runs:
        each = ", ".join(
            f"chunks of {level.chunk}: {runs:,}" if level.chunk > 1 else f"every token: {runs:,}"
            for level, runs in zip(config.schedule, counts.runs, strict=True)
        )
        lines.append(
            f"core         {sum(counts.runs) / counts.tokens:.2f} runs a token ({each} for {counts.tokens:,} tokens), "
            f"{counts.core_calls / counts.steps:.2f} passes over its weights a step"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    keep_freed_memory()
    command.run("generate", __doc__, define, main)
