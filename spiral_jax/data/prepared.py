"""Opens what a run trains on: token stores and Megatron datasets, local or remote, and their tokenizer."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from spiral_jax.data.config import DataConfig
from spiral_jax.data.megatron.tokens import MegatronTokens, is_megatron
from spiral_jax.data.storage import LOCAL, Storage, is_url, join
from spiral_jax.data.store import MANIFEST, TokenStore
from spiral_jax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
)
from spiral_jax.data.windows import TokenSource
from spiral_jax.errors import SpiralError


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What a run trains on.

    Attributes:
      train: where the training windows come from, at least one source.
      validation: what is held out, or None.
      tokenizer: what the ids of all of them mean.
    """

    train: tuple[TokenSource, ...]
    validation: TokenStore | None
    tokenizer: Tokenizer

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """One per training source: what a checkpoint records to notice that the data changed."""
        return tuple(source.fingerprint for source in self.train)


def storage_of(config: DataConfig) -> Storage:
    """How a configuration wants files to be opened."""
    cache_dir = os.path.expanduser(config.cache_dir)
    return Storage(config.retry_seconds, cache_dir, config.cache_gigabytes)


def open_stores(config: DataConfig) -> PreparedData:
    """Opens `config.stores` and what is validated on.

    Raises:
      SpiralError: a store that is missing or damaged, stores of different tokenizers, or no tokenizer.
    """
    storage = storage_of(config)
    places = [place if is_url(place) else os.path.abspath(os.path.expanduser(place)) for place in config.stores]
    sources = tuple(open_source(place, storage) for place in places)
    held_out = config.validation_store or _validation_beside(places, storage)
    validation = _open_store(held_out, storage) if held_out else None
    tokenizer = _tokenizer_for(config, places, sources, storage)
    for store in (*sources, validation):
        if isinstance(store, TokenStore):
            store.check_tokenizer(tokenizer)
    return PreparedData(sources, validation, tokenizer)


def open_folder(folder: str | os.PathLike) -> PreparedData:
    """Opens what `corpus.prepare` wrote: train/, perhaps validation/, and a tokenizer.

    Raises:
      SpiralError: Something is missing or damaged.
    """
    return open_stores(DataConfig(stores=(str(folder),)))


def open_source(place: str, storage: Storage = LOCAL) -> TokenSource:
    """Opens one entry of `data.stores`.

    Args:
      place: a token store, a folder with a token store `train/`, a Megatron `.idx`, or a folder with one.
      storage: how to open files.

    Raises:
      SpiralError: it is none of these, or damaged.
    """
    for folder in (join(place, "train"), place):
        if storage.exists(join(folder, MANIFEST)):
            return TokenStore.open(folder, storage)
    if is_megatron(place, storage):
        return MegatronTokens.open(place, storage)
    found = "" if is_url(place) or os.path.exists(place) else " does not exist"
    raise SpiralError(
        f"data.stores: {place}{found or ': holds no tokens'}; allowed: a folder with a token store train/ "
        "(python -m spiral_jax.prepare makes one), a token store, a Megatron .idx file or a folder with one"
    )


def _open_store(place: str, storage: Storage) -> TokenStore:
    for folder in (join(place, "validation"), place):
        if storage.exists(join(folder, MANIFEST)):
            return TokenStore.open(folder, storage)
    raise SpiralError(f"data.validation_store: {place} holds no token store; python -m spiral_jax.prepare makes one")


def _validation_beside(places: Sequence[str], storage: Storage) -> str:
    beside = (join(place, "validation") for place in places)
    return next((place for place in beside if storage.exists(join(place, MANIFEST))), "")


def _tokenizer_for(
    config: DataConfig, places: Sequence[str], sources: Sequence[TokenSource], storage: Storage
) -> Tokenizer:
    if config.tokenizer not in ("bytes", "bpe"):
        return configured_tokenizer(config)
    stores = [source for source in sources if isinstance(source, TokenStore)]
    if stores and stores[0].manifest.tokenizer_fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    folders = [
        source.name.rpartition("/")[0] if isinstance(source, MegatronTokens) else place
        for place, source in zip(places, sources, strict=True)
    ]
    for folder in folders:
        if has_tokenizer(folder, storage):
            return load_tokenizer(folder, storage, separator=config.separator)
    raise SpiralError(
        f"{folders[0]}: there is no tokenizer.json; allowed: a tokenizer in the store, or data.tokenizer=FILE"
    )


def configured_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, which is not `bpe`.

    Raises:
      SpiralError: No such file, or not a tokenizer.json.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = Path(config.tokenizer).expanduser()
    if not path.is_file():
        raise SpiralError(
            f'data.tokenizer: no file {config.tokenizer}; allowed: "bytes", "bpe" or the path of a tokenizer.json'
        )
    return HuggingFaceTokenizer.from_file(path, separator=config.separator)
