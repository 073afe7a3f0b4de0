"""What a student of another vocabulary trains on: a cache of sorted curves, laid over the student's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekd import models, vocab
from sparsekd.cache import CacheReader, check_alignment
from sparsekd.codec import CODECS, COUNTS, CURVES
from sparsekd.errors import MismatchError, RecipeError, SourceError
from sparsekd.overlay import OverlaidRows
from sparsekd.packed import RowsReader
from sparsekd.pair import pair_of
from sparsekd.prompted import PromptedRows
from sparsekd.training_set import TrainingSet


def open_cross_set(
    cache: str | None, tokenizer: str | None, student: Any, max_length: int | None, *, allow_biased: bool = False
) -> TrainingSet:
    """The rows of a cache of sorted curves in the tokens of `tokenizer` (default: the student checkpoint's own).

    Rows are cut to `max_length` student tokens, by default twice as many as the teacher's have. Of an encoder-decoder
    checkpoint they are the answers in the cache's rows, with their prompts. `allow_biased` takes counts for curves.

    Raises:
        RecipeError: no cache or tokenizer given, or a cache of sampled targets.
        CacheError, SourceError, MismatchError: what is there cannot be trained on.
    """
    if cache is None:
        raise RecipeError("method=uld and method=alm need cache=FOLDER of sampler=sorted_curve")
    reader = CacheReader(cache)
    holds = CODECS[reader.spec.codec["name"]].holds
    if holds != CURVES and not (allow_biased and holds == COUNTS):
        raise RecipeError(
            f"{cache} holds {holds} of sampler {reader.spec.sampler.get('name')}; ULD sorts the teacher's "
            "probabilities, and sorted draws are far too steep (20 to 370 % more loss, however many rows): capture "
            "with sampler=sorted_curve, or measure what the bias does to a cache of counts by allow_biased=true"
        )
    check_alignment(reader)
    reader.close()  # data loader workers open files of their own
    theirs = vocab.load_tokenizer(Path(cache) / "tokenizer")
    if (found := vocab.fingerprint(theirs)) != reader.spec.tokenizer["hash"]:
        raise MismatchError(f"{cache}/tokenizer has hash {found[:12]}, the cache {reader.spec.tokenizer['hash'][:12]}")
    own = vocab.load_tokenizer(tokenizer_of(tokenizer, student))
    described: dict[str, Any] = {
        "hash": vocab.fingerprint(own),
        "vocab_size": vocab.vocab_size(own),
        "name": vocab.name_of(own),
    }
    spec, length = reader.spec, max_length or 2 * reader.spec.seq_len
    kind = PromptedRows if models.is_encoder_decoder(student) else OverlaidRows
    return TrainingSet(
        rows=kind(reader, pair_of(theirs, own, spec.logit_width), length),
        home=Path(cache),
        seq_len=length,
        logit_width=described["vocab_size"],
        id_max=described["vocab_size"] - 1,
        tokenizer=described,
        fingerprint=spec.data.get("fingerprint"),
        identity={
            "rows": spec.data.get("fingerprint"),
            "sampler": spec.sampler,
            "teacher": spec.teacher.get("weights"),
            "tokenizer": described["hash"],
        },
    )


def tokenizer_of(tokenizer: str | None, student: Any) -> str:
    """Where the student's tokenizer is: as given, else beside its checkpoint."""
    if tokenizer is not None:
        return tokenizer
    if isinstance(student, str) and student not in models.FAMILY:
        return student
    raise RecipeError(f"student={student!r} brings no tokenizer: give tokenizer=PATH, the one that it is to have")


def open_cross_heldout(eval_rows: str | None, data: TrainingSet) -> RowsReader | None:
    """Held-out rows in the student's tokens, of any length that it reads."""
    if eval_rows is None:
        return None
    if isinstance(data.rows, PromptedRows):
        raise RecipeError(
            f"eval_rows={eval_rows} are packed rows, which an encoder-decoder student does not read; leave it out and "
            "judge the student with `sparsekd answer`"
        )
    heldout = RowsReader(eval_rows, "heldout")
    wanted = data.tokenizer["hash"]
    if heldout.tokenizer_hash != wanted:
        raise MismatchError(
            f"tokenizer differs: the student has {wanted[:12]}, {eval_rows} was packed with "
            f"{heldout.tokenizer_hash[:12]}; pack the same documents with the student's tokenizer"
        )
    if heldout.seq_len > data.seq_len:
        raise MismatchError(
            f"{eval_rows} has seq_len={heldout.seq_len}, the student reads {data.seq_len}; raise max_length"
        )
    if not len(heldout):
        raise SourceError(f"{eval_rows} has no held-out rows; pack with heldout above 0, or leave eval_rows out")
    return heldout
