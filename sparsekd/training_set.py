"""What a student trains on, and the refusals: rows, student, teacher and evaluation must belong together."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsekd import heads, models, vocab
from sparsekd.cache import CacheReader, check_alignment
from sparsekd.errors import MismatchError, RecipeError, SourceError
from sparsekd.overlay import OverlaidRows
from sparsekd.packed import RowsReader
from sparsekd.prefix_sets import PrefixSets
from sparsekd.set_table import read_table


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """Opened rows (with targets, or plain) and what must fit to them.

    `identity` is what a resumed run compares; `logit_width` is the width of a new student; `origin` is the fingerprint
    of the rows that had the text first, where a cache was transcoded or rows were repacked.
    """

    rows: CacheReader | RowsReader | OverlaidRows
    home: Path
    seq_len: int
    logit_width: int
    id_max: int
    tokenizer: dict[str, Any]
    fingerprint: str | None
    identity: dict[str, Any]
    origin: str | None = None

    def close(self) -> None:
        """Let the files go (they are opened again when a row is read)."""
        if not isinstance(self.rows, RowsReader):
            self.rows.close()


def open_training_set(
    method: str,
    cache: str | None,
    rows: str | None,
    *,
    normalize: bool | None = None,
    allow_misaligned: bool = False,
) -> TrainingSet:
    """The cache, behind its alignment canary, or plain rows.

    `normalize` is the reader's (for importance draws); `allow_misaligned` takes what `sparsekd misalign` made.

    Raises:
        RecipeError: both or none given, or no targets for method "cached".
        MismatchError, CacheError, SourceError: what is there cannot be trained on.
    """
    if (cache is None) == (rows is None):
        raise RecipeError("give cache=FOLDER, or rows=FOLDER for method=ce or full_kd (one of them, not both)")
    if cache is not None:
        return _from_cache(cache, normalize, allow_misaligned)
    if normalize is not None:
        raise RecipeError(f"normalize={str(normalize).lower()} is about a cache's targets; give cache=FOLDER")
    if method == "cached":
        raise RecipeError("method=cached needs cache=FOLDER; rows=FOLDER alone has no targets")
    return _from_rows(Path(str(rows)))


def _from_cache(cache: str, normalize: bool | None, allow_misaligned: bool) -> TrainingSet:
    reader = CacheReader(cache, normalize=normalize)
    _check_misaligned(cache, reader, allow_misaligned)
    check_alignment(reader)
    reader.close()  # data loader workers open files of their own
    spec = reader.spec
    fingerprint = spec.data.get("fingerprint")
    described = sets_of(reader)
    sets = described["vocab_size"] if described else None
    return TrainingSet(
        rows=reader,
        home=Path(cache),
        seq_len=spec.seq_len,
        logit_width=sets or spec.logit_width,
        id_max=min(reader.stats["id_max"], sets - 1) if sets else reader.stats["id_max"],
        tokenizer=spec.tokenizer,
        fingerprint=fingerprint,
        identity={"rows": fingerprint, "sampler": spec.sampler, "teacher": spec.teacher.get("weights")},
        origin=spec.data.get("like") or (spec.data.get("transcoded") or {}).get("from_fingerprint") or fingerprint,
    )


def sets_of(rows: CacheReader | Any) -> dict[str, Any] | None:
    """What a transcoded cache whose ids may stand for sets of tokens says of them (see `set_table`); else None."""
    made = rows.spec.data.get("transcoded") if isinstance(rows, CacheReader) else None
    return made.get("sets") if made else None


def open_prefix_sets(data: TrainingSet) -> PrefixSets | None:
    """The sets that the cache's ids may stand for, or None.

    Raises:
        SourceError, MismatchError, FormatError: the cache has no table of them, or another one.
    """
    described = sets_of(data.rows)
    if described is None or not isinstance(data.rows, CacheReader):
        return None
    table = read_table(data.rows.path, described)
    order, first, last = (torch.from_numpy(each) for each in (table.order, table.first, table.last))
    return PrefixSets(vocab_size=table.vocab_size, order=order, first=first, last=last)


def _check_misaligned(cache: str, reader: CacheReader, allowed: bool) -> None:
    made_for = reader.spec.data.get("misaligned")
    if made_for is None:
        return
    what = (
        f"{cache} is misaligned: its targets were made for rows {str(made_for['fingerprint'])[:12]} "
        f"(seed={made_for['seed']}, seq_len={made_for['seq_len']}), its rows are "
        f"{str(reader.spec.data.get('fingerprint'))[:12]} (seed={reader.spec.data.get('seed')}, "
        f"seq_len={reader.spec.seq_len})"
    )
    if not allowed:
        raise MismatchError(f"{what}; capture these rows, or set allow_misaligned=true to measure what that costs")
    logging.getLogger(__name__).warning("WARNING: %s; the student learns from the wrong contexts", what)


def _from_rows(path: Path) -> TrainingSet:
    reader = RowsReader(path)
    tokenizer = reader.manifest["tokenizer"]
    return TrainingSet(
        rows=reader,
        home=path,
        seq_len=reader.seq_len,
        logit_width=tokenizer["vocab_size"],
        id_max=tokenizer["vocab_size"] - 1,
        tokenizer=tokenizer,
        fingerprint=reader.fingerprint,
        identity={"rows": reader.fingerprint},
        origin=_origin_of(reader),
    )


# --- who fits to it -------------------------------------------------------------------------------------


def check_student(model: Any, student: Any, data: TrainingSet, *, under_teacher: bool) -> None:
    """Refuse a student that cannot read these rows, or (`under_teacher`) is wider than its online teacher.

    Raises:
        MismatchError: context, vocabulary or tokenizer, with both values.
    """
    models.check_context(model, data.seq_len, "student")
    width, tokens = heads.logit_width(model), data.tokenizer["vocab_size"]
    models.check_width(model, tokens, "the student", "take a student of the same tokenizer")
    if width <= data.id_max:  # draws of ids that are no tokens: the collator leaves them out
        models.shared_width((data.logit_width, width), tokens, "the cache's teacher and the student")
    if under_teacher and width > data.logit_width:
        raise MismatchError(
            f"vocabulary differs: the teacher makes {data.logit_width} logits, the student {width}; take a student no "
            "wider than its teacher"
        )
    if isinstance(student, str) and student not in models.FAMILY:
        models.check_own_tokenizer(student, data.tokenizer["hash"], "student", "take a student of the same tokenizer")


def open_tokenizer(tokenizer: str | None, data: TrainingSet) -> Any:
    """The tokenizer to save beside the student: the one given, else the training set's own, else None."""
    if tokenizer is not None:
        way_out = "give the one that the rows were packed with"
        models.check_own_tokenizer(tokenizer, data.tokenizer["hash"], "tokenizer", way_out)
        return vocab.load_tokenizer(tokenizer)
    folder = data.home / "tokenizer"
    return vocab.load_tokenizer(folder) if folder.is_dir() else None


def open_teacher(teacher: str | None, data: TrainingSet, *, dtype: str, device: str) -> tuple[Any, TrainingSet]:
    """An online teacher, and the training set with the teacher's number of logits.

    A cache knows how many there must be. Plain rows know their tokenizer only: the teacher may be padded beyond it.
    """
    if teacher is None:
        raise RecipeError("method=full_kd runs the teacher online: give teacher=MODEL")
    model = models.open_model(teacher, dtype=dtype, device=device)
    way_out = "pack the rows with the teacher's tokenizer"
    models.check_own_tokenizer(teacher, data.tokenizer["hash"], "teacher", way_out)
    models.check_context(model, data.seq_len, "teacher")
    width, of_cache = heads.logit_width(model), isinstance(data.rows, CacheReader)
    if width != data.logit_width and (of_cache or width < data.logit_width):
        raise MismatchError(
            f"vocabulary differs: the training set has {data.logit_width} logits, teacher {teacher} makes {width}; "
            f"give {'the teacher of the cache' if of_cache else 'a teacher of the same tokenizer'}"
        )
    return model, replace(data, logit_width=width)


def open_heldout(eval_rows: str | None, data: TrainingSet) -> RowsReader | None:
    """The held-out rows of the same packing.

    Raises:
        MismatchError: rows of another tokenizer, length or corpus.
        SourceError: no held-out rows.
    """
    if eval_rows is None:
        return None
    heldout = RowsReader(eval_rows, "heldout")
    _check_same_packing(heldout, data)
    trained_on = heldout.manifest["splits"].get("train", {}).get("fingerprint")
    if trained_on != data.fingerprint and _origin_of(heldout) != data.origin:
        raise MismatchError(
            f"rows differ: the training set was made from rows {str(data.fingerprint)[:12]}, {eval_rows} holds "
            f"{str(trained_on)[:12]}; evaluate on the rows that were captured (of a transcoded cache: on what "
            "`sparsekd repack` makes of them in the student's tokens), or capture these"
        )
    if not len(heldout):
        raise SourceError(f"{eval_rows} has no held-out rows; pack with heldout above 0, or leave eval_rows out")
    return heldout


def _check_same_packing(rows: RowsReader, data: TrainingSet) -> None:
    wanted = data.tokenizer["hash"]
    if rows.tokenizer_hash != wanted:
        raise MismatchError(
            f"tokenizer differs: the training set was made with {wanted[:12]}, {rows.path} with "
            f"{rows.tokenizer_hash[:12]}; pack both with one tokenizer"
        )
    if rows.seq_len > data.seq_len or (rows.seq_len < data.seq_len and not _is_transcoded(data)):
        raise MismatchError(
            f"packing differs: the training set has seq_len={data.seq_len}, {rows.path} has {rows.seq_len}; "
            f"re-pack with seq_len={data.seq_len}"
        )


def _is_transcoded(data: TrainingSet) -> bool:
    return isinstance(data.rows, CacheReader) and "transcoded" in data.rows.spec.data


def _origin_of(rows: RowsReader) -> str | None:
    """The fingerprint of the training rows that hold the text, in whatever tokens (see `repack`)."""
    train = rows.manifest["splits"].get("train", {})
    found: str | None = train.get("like", train.get("fingerprint"))
    return found
