"""Students with another tokenizer than their teacher's: every method on the same text, judged in bits per byte.

The student's tokenizer is trained on the teacher's text with half as many tokens again, so that its tokens are often
longer than the teacher's. All arms read the same rows of text in the same order; the ceiling is the same cache, learnt
by a student with the teacher's own tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsekd.files import write_json
from sparsekd.lab import SETTINGS, Arm, Lab
from sparsekd.reproduction import Cell, Column, Finding, Reproduction, Result, Settings, Table, over
from sparsekd.tables import METRICS, USES, Claim, Outcomes, drawn, judge, lab_of, plot_arms, scale_of
from sparsekd.teacher_tables import texts_of, write_documents

# The student's vocabulary over the teacher's.
VOCABULARY = 1.5
# What the teacher's own text goes on from: this share of each row of real text.
PROMPT = 0.25
GOAL = 70.0  # % of the way from CE to the ceiling that transcoded sets are to close
DRAWS = drawn(50)
CURVES = Arm(label="Sorted curves", sampler={"name": "sorted_curve"})

CE, CEILING, CE_THEIRS = "CE", "KD, teacher's tokenizer", "CE, teacher's tokenizer"
TEXT = "CE on the teacher's text"
POINT, SETS = "Transcoded, point", "Transcoded, sets"
KERNEL = "Transcoded, kernel"
POINT_CE, KERNEL_CE, SETS_DRAWS = f"{POINT}, half CE", f"{KERNEL}, half CE", f"{SETS}, draws inside"
# Labels of the arms that learn from sorted curves, and what they are trained with.
CROSS: dict[str, dict[str, Any]] = {
    "ULD by index, λ = 1.5": {"method": "uld", "align": "index", "kd_weight": 1.5},
    "ULD by bytes, λ = 0.5": {"method": "uld", "align": "bytes", "kd_weight": 0.5},
    "ALM": {"method": "alm"},
}
# What transcoded arms are trained with. Inside a set the text's token tells, or the teacher's next draws (chain=3).
TRANSCODED: dict[str, dict[str, Any]] = {
    POINT: {},
    POINT_CE: {"ce_weight": 0.5},
    KERNEL: {},
    KERNEL_CE: {"ce_weight": 0.5},
    SETS: {},
    SETS_DRAWS: {},
}
LABELS = (CE, TEXT, *CROSS, *TRANSCODED, CE_THEIRS, CEILING)
BEST = SETS
CLAIMS = tuple(
    Claim(better=BEST, worse=each, metric="bits") for each in LABELS if each not in (BEST, CE_THEIRS, CEILING)
)
COLUMNS = (
    Column(name="LM loss", unit="nats/token", form=".3f"),
    Column(name="bits per byte", form=".3f"),
    Column(name="CE to ceiling", unit="%", form=".0f"),
    Column(name="of KD's own gain", unit="%", form=".0f"),
    Column(name="acceptance", unit="%", form=".1f"),
)
# Held-out rows whose positions acceptance is taken at: about 80 of each.
ACCEPTANCE_ROWS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The teacher's knowledge in both vocabularies, and held-out text in both.

    Attributes:
        tokenizer: the student's, a folder.
        seq_len: of the student's rows, which hold the text of the teacher's.
        caches: by arm's label.
        exams: held-out text in the student's and the teacher's tokens, for `evaluate`.
        survey: what transcoding cost.
    """

    tokenizer: str
    seq_len: int
    caches: Mapping[str, str]
    exams: tuple[dict[str, Any], dict[str, Any]]
    survey: Mapping[str, Any]


def crosstok(folder: Path, settings: Settings) -> Result:
    """Train every arm and judge it on the same held-out text."""
    lab = _lab(folder, settings)
    world = make_world(lab)
    outcomes = run_arms(lab, world)
    bits = {name: None if o.diverged() else _bits(outcomes, name) for name, o in outcomes.items()}
    kept = acceptances(lab, world, outcomes)
    return Result(
        ours=Table(columns=COLUMNS, rows={name: (*cells(outcomes, name), over(kept[name])) for name in LABELS}),
        scale=scale_of(
            lab_of(folder, settings),
            "tokens shared by teacher and student; another tokenizer is its poster's future work",
        )
        + f" The student's tokenizer has {world.survey['vocab_size']:,} entries and makes "
        f"{world.survey['tokens_per_teacher_token']:.2f} tokens of one of the teacher's.",
        findings=(_goal(outcomes), *(judge(outcomes, claim) for claim in CLAIMS), _cost(world.survey), ACCEPTANCE),
        data={"bits": bits, "acceptance": kept},
    )


def _lab(folder: Path, settings: Settings) -> Lab:
    """Students in a folder of their own (they sit another exam), over the rows and the teacher of the other tables."""
    shared = lab_of(folder, settings)
    sizes = replace(SETTINGS[settings.profile], seeds=tuple(range(settings.seeds)))
    home = folder.parent / "crosstok-lab"
    return Lab(home, sizes, rows=shared.rows(), teacher=shared.teacher(), say=settings.say)


def run_arms(lab: Lab, world: World) -> Outcomes:
    """Outcomes by label."""
    reads = {"tokenizer": world.tokenizer, "max_length": world.seq_len}
    theirs = [Arm(label=CE_THEIRS, train={"method": "ce"}), replace(DRAWS, label=CEILING)]
    own = [
        *(Arm(label=label, train={"method": "ce"}) for label in (CE, TEXT)),
        *(Arm(label=label, train=how | reads) for label, how in CROSS.items()),
        *(Arm(label=label, train=how) for label, how in TRANSCODED.items()),
    ]
    found = [lab.run(own, caches=dict(world.caches), exam=world.exams[0])]
    found.append(lab.run(theirs, caches=dict(world.caches), exam=world.exams[1]))
    return {outcome.arm.label: outcome for each in found for outcome in each}


# --- what the students learn from and are judged on -----------------------------------------------------------------


def make_world(lab: Lab) -> World:
    """Tokenizer, caches and exams; what is there already is kept."""
    home = lab.folder / "world"
    tokenizer = student_tokenizer(lab, home / "tokenizer")
    draws, curves = lab.cache(DRAWS), lab.cache(CURVES)
    lab.say("  lab: transcoding")
    sets, survey = _transcoded(draws, tokenizer, home / "cache-sets", unresolved="set")
    size = survey["seq_len"]
    inside, _ = _transcoded(draws, tokenizer, home / "cache-inside", unresolved="set", chain=3, seq_len=size)
    kernel, _ = _transcoded(draws, tokenizer, home / "cache-kernel", unresolved="kernel", seq_len=size)
    point, _ = _transcoded(draws, tokenizer, home / "cache-point", unresolved="point", seq_len=size)
    written = teachers_text(lab, home)
    said, _ = _transcoded(written, tokenizer, home / "cache-text", unresolved="point", seq_len=size)
    caches = {CE: sets, TEXT: said, CE_THEIRS: draws, CEILING: draws} | dict.fromkeys(CROSS, curves)
    caches |= {SETS: sets, SETS_DRAWS: inside, POINT: point, POINT_CE: point, KERNEL: kernel, KERNEL_CE: kernel}
    # As much text before a held-out token as the teacher's rows have.
    length = max(2, min(size, round(lab.seq_len() * survey["tokens_per_teacher_token"])))
    ours = _exam(lab, home / "heldout-student", tokenizer, length)
    theirs = _exam(lab, home / "heldout-teacher", f"{lab.rows()}/tokenizer", lab.seq_len())
    return World(
        tokenizer=tokenizer,
        seq_len=size,
        caches=caches,
        exams=(ours, theirs),
        survey=survey,
    )


def student_tokenizer(lab: Lab, path: Path) -> str:
    """A byte-level BPE of the lab's training text, `VOCABULARY` times as large as the teacher's tokenizer."""
    from sparsekd import vocab

    if not (path / "tokenizer.json").exists():
        size = vocab.vocab_size(vocab.load_tokenizer(f"{lab.rows()}/tokenizer"))
        vocab.train_tokenizer(texts_of(lab.rows()), round(VOCABULARY * size)).save_pretrained(path)
    return str(path)


def _transcoded(cache: str, tokenizer: str, out: Path, **settings: Any) -> tuple[str, dict[str, Any]]:
    """(the cache in the student's vocabulary, its survey)."""
    from sparsekd import vocab
    from sparsekd.transcode import transcode

    record = out.with_suffix(".json")
    if not record.exists():
        # Weights as they are: what the page compares is the targets, not what a codec rounds.
        survey = transcode(cache=cache, tokenizer=tokenizer, out=out, codec="prob40", **settings)["survey"]
        write_json(record, survey | {"vocab_size": vocab.vocab_size(vocab.load_tokenizer(tokenizer))})
    return str(out), json.loads(record.read_text())


def _exam(lab: Lab, rows: Path, tokenizer: str, seq_len: int) -> dict[str, Any]:
    """The text of the lab's first held-out rows in a tokenizer's tokens: all of it counts, so bytes are the same."""
    from sparsekd.rows import pack

    source = rows.parent / "heldout.jsonl"
    if not source.exists():
        write_documents(texts_of(lab.rows(), "heldout", limit_rows=3 * lab.settings.eval_rows), source)
    pack(source=str(source), tokenizer=tokenizer, seq_len=seq_len, heldout=0.0, out=rows, progress=False)
    return {"rows": str(rows), "split": "train"}


def teachers_text(lab: Lab, home: Path) -> str:
    """A cache, in the teacher's tokens, of rows that the teacher wrote on from the first quarter of real ones."""
    from sparsekd.capture import capture
    from sparsekd.rows import pack

    source, rows, cache = home / "written.jsonl", home / "written", home / "cache-written"
    if not source.exists():
        lab.say("  lab: the teacher writes")
        write_documents(written(lab), source)
    pack(
        source=str(source),
        tokenizer=f"{lab.rows()}/tokenizer",
        seq_len=lab.seq_len(),
        heldout=0.0,
        out=rows,
        progress=False,
    )
    if not (cache / "manifest.json").exists():
        sampler = {"name": "top_k", "k": 1}  # only its rows are read
        capture(rows=rows, teacher=lab.teacher(), out=cache, sampler=sampler, batch_size=32, device=lab.settings.device)
    return str(cache)


def written(lab: Lab, batch_size: int = 100) -> list[str]:
    """Text drawn from the teacher at temperature 1, one for each of the lab's training rows."""
    import torch

    from sparsekd.models import open_model
    from sparsekd.packed import RowsReader

    model = open_model(lab.teacher(), device=lab.settings.device)
    texts = []
    with RowsReader(lab.rows()) as reader, torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, count = reader.tokenizer(), min(len(reader), lab.settings.student_rows)
        prompt = max(1, round(PROMPT * reader.seq_len))
        for first in range(0, count, batch_size):
            ids = reader.batch(range(first, min(first + batch_size, count))).input_ids[:, :prompt]
            given = torch.from_numpy(ids.astype("int64")).to(model.device)
            out = model.generate(given, do_sample=True, top_k=0, max_new_tokens=reader.seq_len - prompt)
            texts += tokenizer.batch_decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


# --- acceptance -----------------------------------------------------------------------------------------------------


def acceptances(lab: Lab, world: World, outcomes: Outcomes) -> dict[str, list[float]]:
    """Mean acceptance in % by label and seed (see `cross_acceptance`), kept beside each student; [] if it diverged."""
    found: dict[str, list[float]] = {}
    exam: Any = None
    for label, outcome in outcomes.items():
        found[label] = []
        for seed in () if outcome.diverged() else lab.settings.seeds:
            folder = lab.student_folder(outcome.arm, seed, world.caches[label])
            if not (folder / "acceptance.json").exists():
                exam = exam or _open_exam(lab, world)
                write_json(folder / "acceptance.json", _accepted(exam, folder, own=label in (CE_THEIRS, CEILING)))
            found[label].append(100 * json.loads((folder / "acceptance.json").read_text())["acceptance"])
    return found


def _open_exam(lab: Lab, world: World) -> Any:
    from sparsekd.cross_acceptance import open_exam

    lab.say("  lab: acceptance where both tokenizers begin a token")
    return open_exam(
        teacher=lab.teacher(),
        tokenizer=world.tokenizer,
        count=ACCEPTANCE_ROWS,
        device=lab.settings.device,
        **world.exams[1],
    )


def _accepted(exam: Any, folder: Path, *, own: bool) -> dict[str, Any]:
    from sparsekd.cross_acceptance import cross_acceptance, own_acceptance
    from sparsekd.models import open_model

    accepted_P = (own_acceptance if own else cross_acceptance)(exam, open_model(str(folder)))
    return {"acceptance": float(accepted_P.mean()), "positions": len(accepted_P)}


# --- what is found --------------------------------------------------------------------------------------------------


def _bits(outcomes: Outcomes, label: str) -> list[float]:
    return [METRICS["bits"][1](each) for each in outcomes[label].evaluations]


def cells(outcomes: Outcomes, label: str) -> tuple[Cell | str | None, ...]:
    """Loss, bits per byte and both shares of an arm."""
    if outcomes[label].diverged():
        return ("diverged", None, None, None)
    own = label not in (CE_THEIRS, CEILING)
    return (
        over(outcomes[label].losses()),
        over(_bits(outcomes, label)),
        share(outcomes, label, CE, CEILING),
        share(outcomes, label, CE_THEIRS, CEILING) if own else None,
    )


def share(outcomes: Outcomes, label: str, start: str, end: str) -> Cell | None:
    """% of the mean gain from `start` to `end` by which an arm lies below CE, in bits per byte, by seed."""
    first, last, ce, own = (_bits(outcomes, name) for name in (start, end, CE, label))
    reach = sum(a - b for a, b in zip(first, last, strict=True)) / len(first)
    return over([100 * (a - b) / reach for a, b in zip(ce, own, strict=True)]) if reach > 0 else None


def _goal(outcomes: Outcomes) -> Finding:
    """Whether transcoded sets close `GOAL` of the way from CE to the ceiling."""
    diverged = outcomes[BEST].diverged()
    way = None if diverged else share(outcomes, BEST, CE, CEILING)
    gain = None if diverged else share(outcomes, BEST, CE_THEIRS, CEILING)
    if way is None or gain is None:
        return Finding(text=f"There is no way from CE to the ceiling to close, or {BEST} diverged.", holds=False)
    return Finding(
        text=f"{BEST}: {way.mean:.0f} % of the way from CE to the same cache in the teacher's own tokenizer (goal: "
        f"{GOAL:.0f} %), and {gain.mean:.0f} % of what that cache gains over CE there, which leaves out what the "
        f"vocabularies differ by.",
        holds=way.mean >= GOAL,
    )


ACCEPTANCE = Finding(
    text="Acceptance is taken where both tokenizers begin a token. The teacher's whole distribution goes through the "
    "transcoder; a set counts as much as the student gives to all of its tokens, so it is an upper bound where a set "
    "has several. Students with the teacher's tokenizer: exact, of the teacher's tokens at the same bytes."
)


def _cost(survey: Mapping[str, Any]) -> Finding:
    return Finding(
        text=f"Transcoding: {survey['covered']:.0%} of the student's positions have targets, of the mass of their "
        f"draws {survey['rejected']:.1%} is rejected and {survey['open']:.1%} is a set; "
        f"{survey['label']:.1%} of the positions learn the text's own token, which no draw leads to; a target is "
        f"{survey['noise']:.2f} times as noisy, and takes {survey['bytes_per_token']:.0f} bytes a token "
        f"({survey['from_bytes_per_token']:.0f} in the teacher's)."
    )


def plot_bits(result: Result) -> Any:
    """Bits per byte by arm, and the ceiling (line)."""
    return plot_arms(result, "bits", paint, "held-out text, bits per byte", ceiling=CEILING)


def paint(name: str) -> str:
    """The palette's name for an arm."""
    fixed = {CE: "ce", CE_THEIRS: "ce", TEXT: "ce", CEILING: "full-kd"}
    return "rs" if name in TRANSCODED else fixed.get(name, "topk")


CROSSTOK = Reproduction(
    title="A student with another tokenizer",
    source="beyond the paper: its poster's cross-tokenizer offline KD",
    claim="A cache rewritten into the student's vocabulary, open draws as sets, does most of what the teacher's own "
    "tokenizer allows, and more than ULD or ALM.",
    run=crosstok,
    plot=plot_bits,
    uses=USES,
)
