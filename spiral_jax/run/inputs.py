"""What a run trains on: its stores opened, or made of text, and checked against its model."""

from collections.abc import Sequence

from etils.epath import Path
from jax.sharding import NamedSharding

from spiral_jax.corpus.prepare import prepare_stores
from spiral_jax.data.examples import ExampleStream
from spiral_jax.data.pipeline import TrainBatches, WindowOrder, WindowReader, train_batches
from spiral_jax.data.prepared import PreparedData, open_folder, open_stores, storage_of
from spiral_jax.data.windows import num_windows
from spiral_jax.errors import SpiralError, require
from spiral_jax.parallel.process_rows import rows_of_process
from spiral_jax.parallel.processes import Processes
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import open_data


def prepare_data(
    config: RunConfig, workdir: Path, fingerprints: Sequence[str] | None, processes: Processes
) -> PreparedData:
    """Opens the stores of the configuration, or makes them of its text: on process 0, while the others wait.

    Args:
      config: the run's.
      workdir: the run's.
      fingerprints: of the stores that a resumed run began with.
      processes: the run's.

    Raises:
      SpiralError: data that is missing or broken, or that a process does not see.
    """
    if config.data.examples:
        examples = open_examples(config)
        return PreparedData((), None, examples.source.tokenizer, examples)
    if config.data.stores:
        return open_stores(config.data)
    if not fingerprints and config.data.tokenizer == "bpe":
        # Known before the text is read, which can take long.
        allowed = f"at least data.bpe_vocab_size, {config.data.bpe_vocab_size}"
        fits = config.model.vocab_size >= config.data.bpe_vocab_size
        require(fits, "model.vocab_size", config.model.vocab_size, allowed)

    storage = storage_of(config.data)

    def make() -> PreparedData:
        known = open_data(workdir, fingerprints, storage) if fingerprints else None
        return known or prepare_stores(config.data, workdir / "cache")

    if not processes.several:
        return make()
    data = make() if processes.is_main else None
    found = (str(Path(data.train[0].name).parent), data.fingerprints) if data else None
    folder, made = processes.from_main("preparation of data.paths", lambda: found)
    if data is None:
        data = open_folder(folder, config.data)
        if list(data.fingerprints) != made:
            raise SpiralError(f"{folder}: its tokens on process {processes.id} are not those of process 0")
    return data


def open_examples(config: RunConfig) -> ExampleStream:
    """The examples of `data.examples`.

    Raises:
      SpiralError: the first of them are not what they should be.
    """
    return ExampleStream(
        config.data.examples,
        seed=config.seed,
        length=config.train.sequence_length,
        vocab_size=config.model.vocab_size,
    )


def check_data(config: RunConfig, data: PreparedData) -> None:
    """Raises SpiralError if the data does not suit the model."""
    needed = data.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise SpiralError(
            f"model.vocab_size is {config.model.vocab_size}; allowed: at least {needed}, the ids of the tokenizer of "
            f"{data.sources[0].name}"
        )


def window_order(config: RunConfig, data: PreparedData) -> WindowOrder:
    """Which window of which source the run takes when.

    Raises:
      SpiralError: a source shorter than a window, or weights that cannot be kept exactly.
    """
    windows = [num_windows(source, config.train.sequence_length) for source in data.train]
    return WindowOrder(
        windows if data.examples is None else [data.examples.source.num_examples],
        batch_size=config.train.batch_size,
        seed=config.seed,
        weights=config.data.weights,
        stage_starts=config.data.stage_starts,
    )


def batches_of_process(
    config: RunConfig, data: PreparedData, order: WindowOrder, sharding: NamedSharding, first_step: int
) -> TrainBatches:
    """The rows of each batch that this process reads, from a step on.

    Args:
      config: the run's.
      data: the run's.
      order: which windows a step takes.
      sharding: of the batch, which says whose rows are whose.
      first_step: counted from 1.
    """
    part, parts = rows_of_process(sharding, config.train.batch_size)
    length, vocab_size = config.train.sequence_length, config.model.vocab_size
    examples = data.examples
    return train_batches(
        WindowReader(data.train, sequence_length=length, vocab_size=vocab_size) if examples is None else examples,
        order,
        start_step=first_step - 1,
        process_index=part,
        process_count=parts,
        read_threads=config.data.read_threads,
        prefetch_batches=config.data.prefetch_batches,
    )
