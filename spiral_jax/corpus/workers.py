"""Tokenises pieces, in this process or in several: `python -m spiral_jax.corpus.workers TASK` is one of them.

A worker is a program of its own and not a `multiprocessing` process, because those import the main module again: jax
with it, and a script without `if __name__ == "__main__"` would start itself. Its standard input has a line of JSON
per piece, followed by the content of the piece if it has any; its standard output answers with a line of JSON.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import spiral_jax
from spiral_jax.corpus.parts import Part, encode_piece
from spiral_jax.corpus.pieces import Piece
from spiral_jax.corpus.sources import Source
from spiral_jax.corpus.texts import NotText
from spiral_jax.data.config import DataConfig
from spiral_jax.data.tokenizers import load_tokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.hardware import usable_cores

_SECONDS_BETWEEN_CHECKS = 0.2


def num_workers(configured: int) -> int:
    """How many processes `data.workers` asks for: 0 is as many as this process may use cores."""
    return configured or usable_cores()


def encode_pieces(
    pieces: Iterable[Piece], tokenizer_folder: Path, folder: Path, config: DataConfig, check: Callable[[], None]
) -> Generator[tuple[Piece, Part], None, None]:
    """Tokenises pieces into parts; at most two per worker are in memory at a time.

    Args:
      pieces: the work; asked for as workers come free.
      tokenizer_folder: what `load_tokenizer` takes.
      folder: where parts are.
      config: how text becomes tokens, and on how many workers; a single one, or a single piece, needs no other process.
      check: called now and then; raises to stop the work.

    Yields:
      Pieces and what they came to, as they are finished.

    Raises:
      SpiralError: the first that a piece raised, or a worker died.
    """
    pieces, workers = iter(pieces), num_workers(config.workers)
    first = list(itertools.islice(pieces, 2))
    pieces = itertools.chain(first, pieces)
    if workers > 1 and len(first) > 1:
        fields = ("text_field", "invalid", "validation_fraction", "longest_record")
        recipe = {field: getattr(config, field) for field in fields}
        task = {"tokenizer_folder": str(tokenizer_folder), "folder": str(folder), "config": recipe}
        yield from _encode_on_workers(pieces, task, workers, check)
    elif first:
        tokenizer = load_tokenizer(tokenizer_folder)
        for piece in pieces:
            check()
            yield piece, encode_piece(piece, tokenizer, config, folder, check)


def worker_command() -> tuple[list[str], dict[str, str]]:
    """How a worker is started: command line, without its task, and environment."""
    paths = [str(Path(spiral_jax.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    single = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    # -P: a file in the current folder must not stand in for a module.
    command = [sys.executable, "-P", "-m", "spiral_jax.corpus.workers"]
    return command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | single


def _encode_on_workers(
    pieces: Iterator[Piece], task: dict[str, Any], workers: int, check: Callable[[], None]
) -> Iterator[tuple[Piece, Part]]:
    processes: list[subprocess.Popen[bytes]] = []
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    pending: dict[concurrent.futures.Future[Part], Piece] = {}

    def start() -> None:
        command, environment = worker_command()
        process = subprocess.Popen(
            [*command, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            process_group=0,  # Ctrl-C is for the parent, which decides what becomes of the workers
        )
        processes.append(process)
        idle.put(process)

    def encode(piece: Piece) -> Part:
        process = idle.get()
        try:
            return _ask(process, piece)
        finally:
            idle.put(process)

    def finished() -> Iterator[tuple[Piece, Part]]:
        check()
        done, _ = concurrent.futures.wait(pending, _SECONDS_BETWEEN_CHECKS, concurrent.futures.FIRST_COMPLETED)
        for future in done:
            yield pending.pop(future), future.result()

    # A thread per worker gives it one piece after the other and waits for the answers.
    threads = concurrent.futures.ThreadPoolExecutor(workers)
    try:
        for piece in pieces:
            if len(processes) < workers:
                start()
            pending[threads.submit(encode, piece)] = piece
            while len(pending) >= 2 * workers:
                yield from finished()
        while pending:
            yield from finished()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        threads.shutdown()
        for process in processes:
            with contextlib.suppress(BrokenPipeError), process:
                pass  # leaving closes the pipes and waits


def _ask(process: subprocess.Popen[bytes], piece: Piece) -> Part:
    """Has a worker encode a piece.

    Raises:
      SpiralError: what the worker raised, or it died.
    """
    assert process.stdin and process.stdout
    message = dataclasses.asdict(piece) | {"content": len(piece.content)}
    answer = b""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(message).encode("ascii") + b"\n")
        process.stdin.write(piece.content)
        process.stdin.flush()
        answer = process.stdout.readline()
    if not answer.endswith(b"\n"):
        status = process.wait()
        reason = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        hint = " (the machine may be out of memory: fewer data.workers need less)" if status == -signal.SIGKILL else ""
        raise SpiralError(f"data.workers: a worker ended with {reason}{hint}; run it again to go on")
    result = json.loads(answer)
    if "error" in result:
        raise (NotText if result["not_text"] else SpiralError)(result["error"])
    if "defect" in result:
        raise RuntimeError(f"a worker failed on piece {piece.name}:\n{result['defect']}")
    return Part.from_json(result)


def main() -> None:
    """Encodes what comes on standard input, until its end: then the parent is gone, and so is the process at once."""
    inbox: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    # A stray print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="ascii")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def read() -> None:
        try:
            while line := sys.stdin.buffer.readline():
                message = json.loads(line)
                content = sys.stdin.buffer.read(message["content"])
                if len(content) < message["content"]:
                    break
                sources = tuple(Source(**source) for source in message["sources"])
                inbox.put(Piece(**message | {"sources": sources, "content": content}))
        finally:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    task = json.loads(sys.argv[1])
    tokenizer, config = load_tokenizer(task["tokenizer_folder"]), DataConfig(**task["config"])
    while True:
        piece = inbox.get()
        try:
            part = encode_piece(piece, tokenizer, config, Path(task["folder"]))
            result = dataclasses.asdict(part)
        except SpiralError as error:
            result = {"error": str(error), "not_text": isinstance(error, NotText)}
        except Exception:
            result = {"defect": traceback.format_exc()}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
