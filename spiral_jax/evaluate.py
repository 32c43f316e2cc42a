"""Scores a run: exact loss, perplexity and bits per byte. Every token is predicted once, after a separator.

python -m spiral_jax.evaluate --workdir=runs/quickstart                 on the run's own validation text
python -m spiral_jax.evaluate --workdir=runs/quickstart --input=FILE    on a UTF-8 text file, or on a token store
python -m spiral_jax.evaluate --workdir=DIR --stride=64 --json          overlapping windows; JSON on stdout
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
from absl import flags

from spiral_jax import command
from spiral_jax.checkpoint import restore_for_inference
from spiral_jax.config import RunConfig
from spiral_jax.data.files import find_documents, read_text
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.data.windows import TokensInMemory, TokenSource
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.perplexity import score
from spiral_jax.metrics import duration
from spiral_jax.runs import run_directory, tokenizer_of, validation_store_of
from spiral_jax.sharding import MeshConfig, make_mesh
from spiral_jax.training.step import make_program


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "directory of the run", flag_values=values)
    flags.DEFINE_string("input", "", "text file or token store; default: the run's validation text", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint to score; default: the newest", flag_values=values)
    flags.DEFINE_integer("stride", None, "advance of the windows; default: the sequence length", flag_values=values)
    flags.DEFINE_integer("batch_size", None, "windows at a time; default: a micro-batch", flag_values=values)
    flags.DEFINE_bool("json", False, "print JSON only", flag_values=values)


def main(values: flags.FlagValues) -> None:
    workdir = run_directory(values.workdir)
    config = on_these_devices(RunConfig.load(workdir / "config.json"), values.batch_size)
    tokenizer = tokenizer_of(workdir)
    source, utf8_bytes = open_input(values.input, workdir, tokenizer, config)

    program = make_program(config, make_mesh(config.mesh))
    params, step = restore_for_inference(workdir, program.abstract_state.params, values.step)
    show = Progress() if not values.json else lambda done, total: None
    result = score(
        program.eval_step,
        params,
        source,
        utf8_bytes=utf8_bytes,
        separator_id=tokenizer.separator_id,
        sequence_length=config.train.sequence_length,
        batch_size=config.train.batch_size,
        put=program.put,
        stride=values.stride,
        progress=show,
    )
    report = {
        "input": source.name,
        "step": step,
        "tokens": result.tokens,
        "utf8_bytes": utf8_bytes,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
    }
    if values.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{source.name}: {result.tokens:,} tokens, {utf8_bytes:,} bytes, checkpoint of step {step}")
    print(f"loss {result.loss:.4f} nats per token")
    print(f"perplexity {result.perplexity:.4f}")
    print(f"bits per byte {result.bits_per_byte:.4f}")


class Progress:
    """Batches done and time left, on stderr every few seconds."""

    def __init__(self, seconds: float = 5.0):
        self._seconds = seconds
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._seconds:
            left = (now - self._start) / done * (total - done)
            print(f"scored {done} of {total} batches, ETA {duration(left)}", file=sys.stderr, flush=True)
            self._last = now


def on_these_devices(config: RunConfig, batch_size: int | None) -> RunConfig:
    """The run's configuration with a mesh of the devices here and a batch that divides over it.

    Raises:
      SpiralError: a batch size below 1.
    """
    batch_size = config.train.batch_size // config.train.accumulation if batch_size is None else batch_size
    if batch_size < 1:
        raise SpiralError(f"--batch_size is {batch_size}; allowed: 1 or more")

    def on(mesh: MeshConfig) -> RunConfig:
        data, fsdp, _ = mesh.shape(jax.device_count())
        rows = -(-batch_size // (data * fsdp)) * data * fsdp
        train = dataclasses.replace(config.train, batch_size=rows, accumulation=1)
        changed = dataclasses.replace(config, mesh=mesh, train=train)
        changed.check_mesh(jax.device_count())
        return changed

    try:
        return on(config.mesh)
    except SpiralError:
        return on(MeshConfig())  # the run was trained on other devices: replicas fit any number


def open_input(flag: str, workdir: Path, tokenizer: Tokenizer, config: RunConfig) -> tuple[TokenSource, int]:
    """The tokens to score and the UTF-8 bytes they stand for.

    Raises:
      SpiralError: no such input, empty or undecodable text, a store of another tokenizer.
    """
    path = Path(flag).expanduser()
    if flag and not path.is_dir():
        documents = find_documents((flag,), field="--input")
        if len(documents) > 1:
            raise SpiralError(f"--input {flag}: matches {len(documents)} files; allowed: one text file or token store")
        text = read_text(documents[0])
        tokens_N = tokenizer.encode(text)
        if not tokens_N.size:
            raise SpiralError(f"--input {flag}: the file is empty")
        return TokensInMemory(flag, tokens_N), len(text.encode())
    store = TokenStore.open(path) if flag else validation_store_of(workdir)
    store.check_tokenizer(tokenizer)
    store.check_vocab_size(config.model.vocab_size)
    return store, store.utf8_bytes


if __name__ == "__main__":
    command.run("evaluate", __doc__, define, main)
