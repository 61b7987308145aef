"""Prompts from parquet files, and from data sets of the `datasets` package.

Both packages are optional and imported on use. Rows are numbered from 1 and read a batch at a time. Where the text of a
reader's error could quote a row, messages give its type alone.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ray_probe.data.rows import Row, check_id_field, check_regular_file, id_of, no_field, place, unreadable
from ray_probe.errors import ConfigError, PromptsError, bad_value, cut
from ray_probe.system.versions import how_to_install

DATASETS_PREFIX = "datasets:"
ROWS_AT_ONCE = 1000
_NEED = "datasets:OWNER/NAME:SPLIT, datasets:OWNER/NAME:CONFIG:SPLIT or datasets:DIRECTORY:SPLIT"


class DatasetRef(NamedTuple):
    """The data set that `data.prompts: datasets:...` names.

    Attributes:
        name: a directory, or `owner/name` on the hub.
        config: its configuration (subset), or None.
        split: its split; None: the only one.
    """

    name: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, prompts: str) -> "DatasetRef":
        """Parses `datasets:NAME[:[CONFIG:]SPLIT]`. Raises ConfigError."""
        name, *parts = prompts.removeprefix(DATASETS_PREFIX).split(":")
        if not name.strip() or len(parts) > 2 or not all(parts):
            raise ConfigError(bad_value("data.prompts", prompts, f"need {_NEED}"))
        return cls(name, parts[0] if len(parts) == 2 else None, parts[-1] if parts else None)

    def absolute(self) -> str:
        """Returns the reference, a directory with its absolute path."""
        name = str(Path(self.name).resolve()) if os.path.isdir(self.name) else self.name
        return DATASETS_PREFIX + ":".join(part for part in (name, self.config, self.split) if part)


def rows_of_parquet(path: Path, source: str, field: str, id_field: str | None) -> Iterator[Row]:
    """Yields rows of a parquet file from the columns `field` and `id_field`."""
    parquet = _extra("pyarrow.parquet", str(path))
    check_regular_file(path, "a parquet file")
    try:
        file = parquet.ParquetFile(path)
        columns = list(file.schema_arrow.names)
        if columns.count(field) != 1:
            twice = f"several columns are called {field!r}; rename all but one"
            raise PromptsError(f"{source}: {twice if field in columns else no_field(field, columns)}")
        check_id_field(id_field, columns, source)
        wanted = [field] if id_field is None or id_field not in columns else [field, id_field]
        line = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted, use_threads=False):
            for index in range(batch.num_rows):
                line += 1
                where = place(source, line)
                item = {name: _plain(batch.column(name)[index], where) for name in wanted}
                yield Row(line, id_of(item, line, where, id_field), item[field])
    except (OSError, _arrow_errors()) as error:
        raise unreadable(str(path), error, "a parquet file") from None


def rows_of_dataset(
    ref: DatasetRef, source: str, field: str, id_field: str | None, local_files_only: bool
) -> Iterator[Row]:
    """Yields rows of one split of a data set; never runs code that comes with it."""
    datasets = _extra("datasets", source)
    split = _split(_opened(datasets, ref, source, local_files_only), ref, source)
    columns = split.column_names  # None: known only after reading
    if columns is not None and field in columns:
        check_id_field(id_field, columns, source)
        split = split.select_columns([name for name in (field, id_field) if name in columns])
    line = 0
    for batch in _batches(datasets, split, source):
        if field not in batch:
            raise PromptsError(f"{source}: {no_field(field, columns or list(batch))}")
        check_id_field(id_field, columns or list(batch), source)
        for index in range(len(batch[field])):
            line += 1
            item = {str(name): batch[name][index] for name in (field, id_field) if name in batch}
            yield Row(line, id_of(item, line, place(source, line), id_field), item[field])


def _extra(module: str, prompts: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".", 1)[0]
        remedy = f"reading it needs the package {package}; {how_to_install('datasets')}"
        raise ConfigError(bad_value("data.prompts", prompts, remedy)) from None


def _arrow_errors() -> type[Exception]:
    error: type[Exception] = importlib.import_module("pyarrow").ArrowException
    return error


def _plain(value: Any, where: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise PromptsError(f"{where}: a text is not UTF-8; write the file again from valid Unicode") from None


@contextlib.contextmanager
def _quiet(datasets: Any, offline: bool = False) -> Iterator[None]:
    """Turns off progress bars, log lines (they could quote a row) and the network."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    before, config = datasets.config.HF_HUB_OFFLINE, datasets.config
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _opened(datasets: Any, ref: DatasetRef, source: str, local_files_only: bool) -> Any:
    """Returns all splits of a data set, or the one that `save_to_disk` wrote."""
    local = os.path.isdir(ref.name)
    if not local and (ref.name.count("/") != 1 or ref.name.startswith(("/", "."))):
        remedy = f"no such directory, and not the OWNER/NAME of a data set; need {_NEED}"
        raise PromptsError(bad_value("data.prompts", source, remedy))
    saved = any(Path(ref.name, name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        with _quiet(datasets, local_files_only):
            if local and saved:
                return datasets.load_from_disk(ref.name)
            if not local:
                return datasets.load_dataset(ref.name, ref.config)
            with tempfile.TemporaryDirectory() as locks:  # local files are read where they lie
                return datasets.load_dataset(ref.name, ref.config, streaming=True, cache_dir=locks)
    except Exception as error:  # readers raise any error of their parsers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        remedy = "check its name, configuration and files"
        if not local and local_files_only:
            remedy = "download it first, or set model.local_files_only to false"
        raise PromptsError(bad_value("data.prompts", source, f"it cannot be loaded ({reason}); {remedy}")) from None


def _split(loaded: Any, ref: DatasetRef, source: str) -> Any:
    if not isinstance(loaded, dict):  # one split, saved by itself
        only = None if loaded.split is None else str(loaded.split)
        if ref.split in (None, only):
            return loaded
        there = "it has no splits" if only is None else f"it has only the split {only!r}"
        raise PromptsError(bad_value("data.prompts", source, f"{there}; leave {':' + str(ref.split)!r} out"))
    if ref.split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if ref.split not in loaded:
        wrong = "name one of its splits" if ref.split is None else f"no split {ref.split!r}; name one of those there"
        raise PromptsError(bad_value("data.prompts", source, f"{wrong}: {cut(', '.join(loaded))}"))
    return loaded[ref.split]


def _batches(datasets: Any, split: Any, source: str) -> Iterator[dict[str, list[Any]]]:
    batches = split.iter(ROWS_AT_ONCE)
    while True:
        try:
            with _quiet(datasets):
                batch = next(batches, None)
        except Exception as error:
            remedy = f"cannot be read to its end ({type(error).__name__}); check that its files have one schema"
            raise PromptsError(bad_value("data.prompts", source, remedy)) from None
        if batch is None:
            return
        yield batch
