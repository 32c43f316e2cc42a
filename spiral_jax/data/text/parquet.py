"""Parquet files: a row is a document. Needs the extra `parquet`."""

from collections.abc import Iterator

from spiral_jax.data.text.spans import Invalid, Span, Text, checked_text, listing
from spiral_jax.errors import SpiralError

_ROWS_PER_BATCH = 256


def read_rows(span: Span, text_field: str) -> Iterator[Text | Invalid]:
    """Reads the documents of a range of row groups.

    Raises:
      SpiralError: As `open_parquet`, or the file is damaged.
    """
    with open_parquet(span.path, text_field) as file:
        stop = file.num_row_groups if span.rows_to is None else span.rows_to
        row = sum(file.metadata.row_group(group).num_rows for group in range(span.rows_from))
        try:
            for batch in file.iter_batches(
                _ROWS_PER_BATCH, row_groups=list(range(span.rows_from, stop)), columns=[text_field], use_threads=False
            ):
                for row, value in enumerate(batch.column(0), row + 1):  # noqa: B020
                    try:
                        text = checked_text(value.as_py(), text_field)
                    except UnicodeDecodeError as error:
                        yield Invalid(span.path, f'row {row}: column "{text_field}" is not UTF-8 ({error.reason})')
                    except ValueError as error:
                        yield Invalid(span.path, f"row {row}: {error}")
                    else:
                        if text:
                            yield Text(text)
        except (OSError, ValueError) as error:  # from one of which the errors of pyarrow derive
            raise SpiralError(f"{span.path}: cannot be read ({' '.join(str(error).split())})") from error


def open_parquet(path: str, text_field: str):
    """Opens a parquet file that has a column of text.

    Returns:
      A `pyarrow.parquet.ParquetFile`.

    Raises:
      SpiralError: No parquet file, no such column, not a column of strings, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SpiralError(f"{path}: needs the package pyarrow; pip install 'spiral_jax[parquet]'") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise SpiralError(f"{path}: not a parquet file ({' '.join(str(error).split())})") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise SpiralError(f'{path}: no column "{text_field}" (data.text_field); columns: {listing(schema.names)}')
    kind = schema.field(text_field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise SpiralError(f'{path}: column "{text_field}" is of type {kind}; allowed: string')
    return file
