"""Trains a BPE in a thread: the library says nothing for as long as it takes, and hears no Ctrl-C."""

import concurrent.futures
import time
from collections.abc import Sequence

from spiral_jax.corpus.exclusive import Check
from spiral_jax.data.tokenizers import Tokenizer, train_bpe
from spiral_jax.progress import Report, duration, in_thread

_SECONDS_BETWEEN_CHECKS, _SECONDS_BETWEEN_LINES = 0.1, 5.0


def train_with_progress(texts: Sequence[str], size: int, report: Report, check: Check) -> Tokenizer:
    """As `train_bpe`, with a line now and then.

    Args:
      texts: what to train on.
      size: number of entries.
      report: called with a line.
      check: called often; raises to stop. The thread then works on, but keeps no process that ends.
    """
    done = in_thread("training a BPE", lambda: train_bpe(texts, size))
    begin = said = time.monotonic()
    while not concurrent.futures.wait([done], _SECONDS_BETWEEN_CHECKS).done:
        check()
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            report(f"data: training the BPE, {duration(said - begin)} so far")
    return done.result()
