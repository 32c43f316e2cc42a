"""Opens what a run trains on: token stores and Megatron datasets, local or remote, and their tokenizer."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

from spiral_jax.data.config import DataConfig
from spiral_jax.data.examples import ExampleStream
from spiral_jax.data.megatron.tokens import MegatronTokens, is_megatron
from spiral_jax.data.storage import LOCAL, Storage, absolute, expanded, is_url, join
from spiral_jax.data.store import MANIFEST, TokenStore
from spiral_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, has_tokenizer, load_tokenizer
from spiral_jax.data.windows import TokenSource
from spiral_jax.errors import SpiralError, require


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What a run trains on.

    Attributes:
      train: where the training windows come from; none with `examples`, otherwise at least one source.
      validation: what is held out, or None.
      tokenizer: what the ids of all of them mean.
      examples: what brings its own targets and weights, and is trained on instead of `train`; None for none.
    """

    train: tuple[TokenSource, ...]
    validation: TokenStore | None
    tokenizer: Tokenizer
    examples: ExampleStream | None = None

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """One per training source: what a checkpoint records to notice that the data changed."""
        return tuple(source.fingerprint for source in self.sources)

    @property
    def sources(self) -> tuple[TokenSource | ExampleStream, ...]:
        """All that is trained on."""
        return self.train if self.examples is None else (self.examples,)


def storage_of(config: DataConfig) -> Storage:
    """How a configuration wants files to be opened."""
    cache_dir = str(expanded("data.cache_dir", config.cache_dir)) if config.cache_dir else ""
    return Storage(config.retry_seconds, cache_dir, config.cache_gigabytes)


def open_stores(config: DataConfig) -> PreparedData:
    """Opens `config.stores` and what is validated on.

    Raises:
      SpiralError: a store that is missing or damaged, stores of different tokenizers, or no tokenizer.
    """
    storage = storage_of(config)
    places = [absolute(place) for place in config.stores]
    sources = tuple(open_source(place, storage) for place in places)
    validation = _open_validation(config.validation_store, places, storage)
    if config.tokenizer in ("bytes", "bpe"):
        tokenizer = tokenizer_beside(places, sources, storage, separator=config.separator)
    else:
        tokenizer = configured_tokenizer(config)
    if tokenizer is None:
        raise SpiralError(f"{places[0]} has no tokenizer.json; allowed: one in the store, or data.tokenizer=FILE")
    for store in (*sources, validation):
        if isinstance(store, TokenStore):
            store.check_tokenizer(tokenizer)
    return PreparedData(sources, validation, tokenizer)


def open_folder(folder: str | os.PathLike, like: DataConfig | None = None) -> PreparedData:
    """Opens what `corpus.prepare` wrote: train/, perhaps validation/, and a tokenizer.

    Args:
      folder: a path, or a URL.
      like: whose way of reading from URLs is taken; None for the usual one.

    Raises:
      SpiralError: something is missing or damaged.
    """
    like = like or DataConfig()
    reads = {field: getattr(like, field) for field in ("retry_seconds", "cache_dir", "cache_gigabytes")}
    return open_stores(DataConfig(stores=(str(folder),), **reads))


def open_source(place: str, storage: Storage = LOCAL, *, field: str = "data.stores") -> TokenStore | MegatronTokens:
    """Opens one entry of `data.stores`.

    Args:
      place: a token store, a folder with a token store `train/`, a Megatron `.idx`, or a folder with one.
      storage: how to open files.
      field: what named the place, for errors.

    Raises:
      SpiralError: it is none of these, or damaged.
    """
    store = next(stores_in([join(place, "train"), place], storage), None)
    if store is not None:
        return store
    if is_megatron(place, storage):
        return MegatronTokens.open(place, storage)
    found = "holds no tokens" if is_url(place) or os.path.exists(place) else "does not exist"
    raise SpiralError(
        f"{field} is {place!r}, which {found}; allowed: a folder with a token store train/ "
        "(python -m spiral_jax.prepare makes one), a token store, a Megatron .idx file or a folder with one"
    )


def stores_in(folders: Sequence[str], storage: Storage) -> Iterator[TokenStore]:
    """Those of some folders that are token stores, opened one after the other."""
    for folder in folders:
        if storage.exists(join(folder, MANIFEST)):
            yield TokenStore.open(folder, storage)


def _open_validation(place: str, places: Sequence[str], storage: Storage) -> TokenStore | None:
    """The store of `data.validation_store`, or the first beside one of `data.stores`."""
    folders = [join(place, "validation"), place] if place else [join(beside, "validation") for beside in places]
    found = next(stores_in(folders, storage), None)
    if place and found is None:
        found_there = f"data.validation_store is {place!r}, which holds no token store"
        raise SpiralError(f"{found_there}; allowed: one that python -m spiral_jax.prepare makes")
    return found


def tokenizer_beside(
    places: Sequence[str], sources: Sequence[TokenSource], storage: Storage = LOCAL, *, separator: str
) -> Tokenizer | None:
    """The tokenizer of the first source that has one: in its place, or beside a Megatron index. None where none has."""
    stores = [source for source in sources if isinstance(source, TokenStore)]
    if stores and stores[0].manifest.tokenizer_fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    for place, source in zip(places, sources, strict=True):
        folder = source.name.rpartition("/")[0] if isinstance(source, MegatronTokens) else place
        if has_tokenizer(folder, storage):
            return load_tokenizer(folder, storage, separator=separator)
    return None


def configured_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, which is not `bpe`.

    Raises:
      SpiralError: no such file, or not a tokenizer.json.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    path = expanded("data.tokenizer", config.tokenizer)
    require(path.is_file(), "data.tokenizer", config.tokenizer, '"bytes", "bpe" or the path of a tokenizer.json')
    return HuggingFaceTokenizer.from_file(path, separator=config.separator)
