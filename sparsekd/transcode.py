"""Transcode: a cache in, a cache in another tokenizer's vocabulary out, without the teacher.

cache + student's tokenizer -> every row's text in the student's tokens, every draw rewritten -> cache
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache as remember
from pathlib import Path
from typing import Any

import numpy as np

from sparsekd import vocab
from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord
from sparsekd.checks import check_at_least
from sparsekd.codec import CODECS, CURVES, codec_spec
from sparsekd.errors import MismatchError, RecipeError, SourceError
from sparsekd.fates import Answers
from sparsekd.files import canonical_json, is_url
from sparsekd.folder import expected_row_bytes
from sparsekd.making import parse_shard_range
from sparsekd.manifest import shard_name, weights_codec
from sparsekd.open_kernel import Counts, added, kernel_of
from sparsekd.order import permute
from sparsekd.pair import pair_of
from sparsekd.redraw import UNRESOLVED
from sparsekd.retokenise import retokenise
from sparsekd.set_table import SetTable, write_table
from sparsekd.transcoding import (
    CHUNK_TOKENS,
    Settings,
    count_sets,
    renumbered,
    sizes_of,
    sum_counts,
    transcode_records,
)

# Positions that a realised draw is followed, by `unresolved`. Inside sets the text's own tokens are the default: a
# teacher that knows its text less well than the student's tokenizer does underrates the joints (docs/LOG.md).
CHAIN = {"kernel": 3, "point": 3, "drop": 3, "set": 0}
# Rows that seq_len is chosen from, and that the survey counts.
SURVEY_ROWS = 256
# The teacher's tokens that a kernel is counted on at most, in rows spread over the cache.
KERNEL_TOKENS = 2**23


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A cache, two tokenizers and how one becomes the other; each process opens its own, with the same counts."""

    reader: CacheReader
    answers: Answers
    settings: Settings
    spec: CacheSpec
    counts: Counts | None


def transcode(
    *,
    cache: str | Path,
    tokenizer: str,
    out: str | Path | None = None,
    unresolved: str = "set",
    chain: int | None = None,
    seq_len: int | None = None,
    codec: str | None = None,
    workers: int = 1,
    shard_range: str | None = None,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Rewrite a cache into the vocabulary of `tokenizer`, so that a student of another family can be trained on it.

    Every drawn token is read as the student's tokenizer would read it after the student's text so far. A tokenizer that
    differs from the teacher's in the numbers of its ids only gives the same targets bit for bit. Run it again to
    resume; any number of workers makes the same bytes.

    Args:
        cache: captured from the teacher; it must carry the teacher's tokenizer (`capture` puts it there).
        tokenizer: the student's, a folder or an id: byte-level BPE or SentencePiece (BPE, Unigram).
        out: the folder that takes the new cache.
        unresolved: what becomes of a draw that more text might make a longer token: set (all tokens that it may become;
            which of them it is, the text tells where the draw came true: see `redraw`. `train` then takes the loss of
            prefix_sets), kernel (spread over these tokens, by what such draws became elsewhere in the cache's rows, see
            `open_kernel`: biased as far as that depends on the context), point (the token as it stands: biased) or drop
            (left out, the position's other draws take its weight: biased).
        chain: how many positions a realised draw is followed to resolve it; default: 3, with sets 0: what is inside the
            realised draw's set is then told by the text's own token, else by the teacher's next draws.
        seq_len: tokens of a new row; default: the longest of some rows, so that next to nothing is cut.
        codec: how weights are kept: split_weight_unbiased (about a byte an id, to 2.2 % without bias: 0.2 % of the
            variance of 50 draws) or prob40 (5 bytes an id, to 0.034 %; the default only where weights may be above 2,
            that is of draws at another temperature that are not self-normalised and of positions kept unevenly, or
            ids are 2^20 and more). A renumbered cache keeps its own.
        workers: processes.
        shard_range: "a:b" makes only the shards a .. b-1.
        dry_run: only count, on some rows, what the change of tokenizer costs.
        progress: called with (shards done, shards) after each.

    Returns:
        survey (shares counted on some rows, see `survey`), and manifest unless dry_run or shards of others are missing.

    Raises:
        RecipeError: an unknown name, or a setting outside its range.
        SourceError: a tokenizer that cannot be opened, or of another family.
        MismatchError: a cache without ids or tokenizer, or control tokens that the student's tokenizer does not have.
    """
    check_at_least(1, workers=workers)
    check_at_least(2, seq_len=seq_len)
    if unresolved not in UNRESOLVED:
        raise RecipeError(f"unresolved={unresolved!r} is not one of {', '.join(UNRESOLVED)}")
    chain = CHAIN[unresolved] if chain is None else chain
    check_at_least(0, chain=chain)
    if out is None and not dry_run:
        raise RecipeError("transcode needs out=FOLDER, or dry_run=true to see what it would cost")
    words = (str(cache), tokenizer, unresolved, chain, seq_len, codec)
    _jobs.clear()  # folders may have changed since the last call
    _writer.cache_clear()
    job = _jobs[words] = open_job(*words, kernel_rows=SURVEY_ROWS if dry_run else None)
    result: dict[str, Any] = {"survey": survey(job)}
    if dry_run or out is None:
        return result
    writer = CacheWriter(out, job.spec)
    vocab.load_tokenizer(tokenizer).save_pretrained(Path(out) / "tokenizer")
    if "sets" in job.spec.data["transcoded"]:
        write_table(job.answers.sets.table, out)
    todo = writer.missing(parse_shard_range(shard_range, job.spec.shards))
    for done, _ in enumerate(_made(words, job.counts, str(out), todo, workers), 1):
        if progress:
            progress(done, len(todo))
    if all((Path(out) / shard_name(shard)).exists() for shard in range(job.spec.shards)):
        result["manifest"] = writer.finalize()
    return result


def _made(words: tuple[Any, ...], counts: Counts | None, out: str, todo: list[int], workers: int) -> Iterator[int]:
    """Make the shards, one or several at a time; their numbers as they are done. Nobody counts anew."""
    if workers == 1 or len(todo) < 2:
        yield from (make_shard(words, out, shard) for shard in todo)
        return
    spawn, workers = multiprocessing.get_context("spawn"), min(workers, len(todo))
    with ProcessPoolExecutor(workers, spawn, initializer=_open, initargs=(words, counts)) as pool:
        futures = [pool.submit(make_shard, words, out, shard) for shard in todo]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make_shard(words: tuple[Any, ...], out: str, shard: int) -> int:
    """One shard of the job that the words describe, and its number."""
    job = _jobs[words]
    writer = _writer(words, out)
    writer.write(shard, [record for part, _ in transcoded(job, job.spec.shard_range(shard)) for record in part])
    return shard


_jobs: dict[tuple[Any, ...], Job] = {}


def _open(words: tuple[Any, ...], counts: Counts | None) -> None:
    _jobs[words] = open_job(*words, counts=counts)


@remember
def _writer(words: tuple[Any, ...], out: str) -> CacheWriter:
    return CacheWriter(out, _jobs[words].spec)


# --- the job --------------------------------------------------------------------------------------------


def open_job(
    cache: str,
    tokenizer: str,
    unresolved: str,
    chain: int,
    seq_len: int | None,
    codec: str | None = None,
    *,
    counts: Counts | None = None,
    kernel_rows: int | None = None,
) -> Job:
    """The cache, both tokenizers, and the identity of the cache that will come of them.

    For `unresolved="kernel"`, `counts` are those of the cache's rows (`count_rows`), taken here if they are not given:
    of `kernel_rows` of them at most.
    """
    reader, student = CacheReader(cache), vocab.load_tokenizer(tokenizer)
    if CODECS[reader.spec.codec["name"]].holds == CURVES:
        raise MismatchError(
            f"{cache} holds sorted curves, which have no ids to rewrite; train on it with ULD, or capture with another "
            "sampler"
        )
    if "sets" in (reader.spec.data.get("transcoded") or {}):
        raise MismatchError(
            f"{cache} was transcoded and holds sets of tokens, which cannot be rewritten again; transcode what it "
            "was made from"
        )
    pair = pair_of(_own_tokenizer(cache, reader), student, reader.spec.logit_width)
    if codec is not None and pair.same is not None:
        raise RecipeError(f"{cache} is only renumbered, and keeps its codec; leave codec={codec} out")
    answers = Answers(pair=pair)
    size = reader.spec.seq_len if pair.same is not None else seq_len or _seq_len(reader, answers)
    settings = Settings(seq_len=size, unresolved=unresolved, chain=chain)
    has_sets = unresolved == "set" and pair.same is None
    if unresolved == "kernel" and pair.same is None:
        counts = counts or count_rows(reader, answers, chain, kernel_rows)
        answers.kernel = kernel_of(counts, answers.sets.table)
    table = answers.sets.table if has_sets else None
    spec = _spec(reader.spec, student, settings, table, counts, codec, renumbers=pair.same is not None)
    return Job(reader=reader, answers=answers, settings=settings, spec=spec, counts=counts)


def count_rows(reader: CacheReader, answers: Answers, chain: int, limit: int | None = None) -> Counts:
    """What open draws that came became in the cache's rows, or in `KERNEL_TOKENS` of them; equal in any process."""
    most = min(len(reader), limit or max(1, KERNEL_TOKENS // reader.spec.seq_len))
    parts = _chunks(_some_rows(reader, most), reader)
    return added([count_sets([reader.record(row) for row in part], answers, chain) for part in parts])


def _own_tokenizer(cache: str, reader: CacheReader) -> Any:
    """The tokenizer in the cache's folder, if it is the one that the cache names."""
    if is_url(cache):
        raise RecipeError(f"transcode reads a local cache; copy {cache} here first")
    folder, wanted = Path(cache) / "tokenizer", reader.spec.tokenizer.get("hash")
    if not folder.is_dir():
        raise SourceError(f"{cache} carries no tokenizer; put the teacher's into {folder} (tokenizer.save_pretrained)")
    opened = vocab.load_tokenizer(folder)
    if (found := vocab.fingerprint(opened)) != wanted:
        raise MismatchError(
            f"{folder} has hash {found[:12]}, the cache was made with {str(wanted)[:12]}; put that one there"
        )
    return opened


def _seq_len(reader: CacheReader, answers: Answers) -> int:
    """The longest of some rows in the student's tokens, up to a multiple of 8."""
    rows = [reader.record(row) for row in _survey_rows(reader)]
    sizes = sizes_of(rows, answers.pair)
    given = [(r.input_ids[:size].astype(np.int64), r.starts[:size]) for r, size in zip(rows, sizes, strict=True)]
    longest = max(len(row.ids) for row in retokenise(given, answers.pair, answers.contexts))
    return max(2, -(-longest // 8) * 8)


def _survey_rows(reader: CacheReader) -> list[int]:
    return _some_rows(reader, min(SURVEY_ROWS, len(reader)))


def _some_rows(reader: CacheReader, count: int) -> list[int]:
    return sorted(permute(np.arange(count), len(reader), seed=0).tolist())


def _chunks(rows: range | list[int], reader: CacheReader) -> Iterator[range | list[int]]:
    """Rows that are held in memory together."""
    size = max(1, CHUNK_TOKENS // reader.spec.seq_len)
    return (rows[first : first + size] for first in range(0, len(rows), size))


def _spec(
    spec: CacheSpec,
    student: Any,
    settings: Settings,
    sets: SetTable | None,
    counts: Counts | None,
    codec: str | None,
    *,
    renumbers: bool,
) -> CacheSpec:
    """The new cache's identity: its rows are no longer those that were packed, and it says what was done to them.

    A cache that is only renumbered keeps its codec.
    """
    bos, eos = vocab.document_ends(student)
    size = vocab.vocab_size(student)
    described = {"hash": vocab.fingerprint(student), "vocab_size": size, "name": vocab.name_of(student)}
    made = {"from_tokenizer": spec.tokenizer.get("name"), "from_fingerprint": spec.data.get("fingerprint")}
    if not renumbers:
        made |= {"unresolved": settings.unresolved, "chain": settings.chain}
    width = size if sets is None else sets.width()
    made |= {} if sets is None else {"sets": sets.described()}
    made |= {} if counts is None else {"kernel": counts.sha256()}
    rows = [spec.data.get("fingerprint"), spec.rows, spec.seq_len, described["hash"], settings.seq_len]
    return CacheSpec(
        rows=spec.rows,
        seq_len=settings.seq_len,
        shard_rows=spec.shard_rows,
        logit_width=width,
        codec=spec.codec | {"logit_width": size}
        if renumbers
        else codec_spec(weights_codec(codec, width, [spec]), logit_width=width, rounds=None),
        sampler=spec.sampler | ({} if renumbers else {"unbiased": False}),
        teacher=spec.teacher,
        tokenizer=described | {"eos_id": eos, "bos_id": bos},
        data=spec.data | {"fingerprint": hashlib.sha256(canonical_json(rows)).hexdigest(), "transcoded": made},
        capture=spec.capture,
    )


def transcoded(job: Job, rows: range | list[int]) -> Iterator[tuple[list[RowRecord], dict[str, float]]]:
    """The rows in chunks, in the student's vocabulary, with what was counted."""
    for part in _chunks(rows, job.reader):
        records = [job.reader.record(row) for row in part]
        if (same := job.answers.pair.same) is not None:
            yield [renumbered(record, same) for record in records], {}
        else:
            yield transcode_records(records, job.answers, job.settings)


def survey(job: Job) -> dict[str, Any]:
    """What the change of tokenizer costs, counted on some rows.

    shared_starts, identical_spans: of the student's tokens, those that start where (cover what) a teacher's token does.
    covered: of the positions, those that get targets. accepted, rejected, short, dropped: of the draws' mass, where
    there is any; open: what is decided by `unresolved`; label: at positions that learn the text's token instead, which
    no draw leads to. noise: variance of a target over that of the same number of
    draws that nothing is rejected of. cut: tokens beyond seq_len. lost: tokens of text that does not come back.
    padding: of the rows. ids_per_position: where there are targets. bytes_per_token, tokens_per_teacher_token, and what
    the cache had: from_bytes_per_token.
    """
    pair, rows = job.answers.pair, _survey_rows(job.reader)
    parts = list(transcoded(job, rows))
    records = [record for made, _ in parts for record in made]
    spent = job.reader.stats["payload_bytes"] / job.reader.stats["tokens"]
    if pair.same is not None:
        return {"same": True, "seq_len": job.settings.seq_len, "from_bytes_per_token": spent, "bytes_per_token": spent}
    counts = sum_counts([found for _, found in parts])
    size = len(records) * expected_row_bytes(records, job.spec.codec, job.spec.shard_rows)
    tokens, spoken = max(counts["student_tokens"], 1), max(counts["spoken"], 1)
    shares = {name: counts[name] / spoken for name in ("accepted", "rejected", "short", "dropped", "open", "label")}
    return {
        "same": False,
        "rows": len(rows),
        "seq_len": job.settings.seq_len,
        "tokens_per_teacher_token": counts["student_tokens"] / max(counts["teacher_tokens"], 1),
        "shared_starts": counts["shared_starts"] / tokens,
        "identical_spans": counts["identical_spans"] / tokens,
        "covered": counts["covered"] / max(counts["positions"], 1),
        **shares,
        "noise": counts["noise"] / max(counts["covered"], 1),
        "cut": counts["cut"] / tokens,
        "lost": counts["lost_tokens"] / tokens,
        "padding": 1 - max(0.0, (tokens - counts["cut"])) / (len(rows) * job.settings.seq_len),
        "ids_per_position": sum(len(r.targets.ids) for r in records) / max(counts["covered"], 1),
        "from_bytes_per_token": spent,
        "bytes_per_token": size / tokens,
    }
