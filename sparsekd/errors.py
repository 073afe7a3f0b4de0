"""Every way in which sparsekd refuses, as one tree.

    SparseKDError
    ├── RecipeError          an unknown key, a bad value, settings that contradict each other
    ├── SourceError          documents or rows that cannot be read, an empty corpus, a tokenizer without EOS
    ├── ModelError           a model that cannot be opened, split into body and head, or distilled into
    ├── MismatchError        two inputs that do not belong together: tokenizer, vocabulary, rows, teacher, alignment
    └── CacheError           a cache that cannot be used
        ├── FormatError      a damaged, truncated, foreign or hostile file
        ├── VersionError     a file from a newer sparsekd
        ├── IncompleteError  shards are missing
        └── StorageError     the disk is, or would become, full

A message says what is wrong, both values where two disagree, and the way out. The command line prints it
without a traceback and exits with code 2.
"""


class SparseKDError(Exception):
    """Base of all errors that are the input's fault, not ours."""


class RecipeError(SparseKDError):
    """An unknown key, a bad value, or settings that contradict each other."""


class SourceError(SparseKDError):
    """Documents or rows that cannot be read or packed."""


class ModelError(SparseKDError):
    """A model that cannot be opened, split into body and head, or distilled into."""


class MismatchError(SparseKDError):
    """Two inputs that do not belong together."""


class CacheError(SparseKDError):
    """A cache that cannot be used."""


class FormatError(CacheError):
    """A damaged, truncated, foreign or hostile file."""


class VersionError(CacheError):
    """A file written by a newer sparsekd."""


class IncompleteError(CacheError):
    """A cache with missing shards."""


class StorageError(CacheError):
    """The disk is full, or would be before the work is done."""
