"""The command line as a new and as a hostile user meets it: one sentence, exit code 2, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import folder_bytes

from sparsekd import capture as capture_module
from sparsekd import cli, console


class Shell:
    """Runs `sparsekd WORDS` in this process and keeps what it wrote."""

    def __init__(self, monkeypatch, capsys) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, line, **paths):
        """(exit code, stdout, stderr); {name} in the line stands for a path."""
        words = [word.format(**paths) for word in line.split()]
        self._monkeypatch.setattr(sys, "argv", ["sparsekd", *words])
        self._capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        out, err = self._capsys.readouterr()
        return code, out, err

    def refused(self, line, **paths):
        """The one sentence on stderr of a line that is refused."""
        code, _, err = self(line, **paths)
        assert code == 2, err
        assert err.startswith("sparsekd: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert "Errno" not in err
        return err.removeprefix("sparsekd: ").strip()


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def zoo(world, tmp_path_factory):
    """Inputs that are wrong in one way each; {name} in a command line."""
    home = tmp_path_factory.mktemp("zoo")
    paths = {name: home / name for name in ("newer", "cut", "flipped", "mess", "empty_folder", "texts", "noeos")}
    for name in ("newer", "cut", "flipped"):
        shutil.copytree(world.cache, paths[name])
    manifest = json.loads((paths["newer"] / "manifest.json").read_text())
    (paths["newer"] / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    shard = paths["cut"] / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    shard = paths["flipped"] / "shard-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-700] ^= 1
    shard.write_bytes(content)
    for name in ("mess", "empty_folder", "texts"):
        paths[name].mkdir()
    (paths["mess"] / "notes.txt").write_text("mine")
    (paths["texts"] / "one.txt").write_text("The cat sees the dog. " * 60)
    shutil.copytree(f"{world.rows}/tokenizer", paths["noeos"])
    config = json.loads((paths["noeos"] / "tokenizer_config.json").read_text())
    (paths["noeos"] / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    for name, content in {"empty.jsonl": "", "blank": "  \n", "afile": "x", "list": "- a\n", "bad": "a: [1\n"}.items():
        (home / name).write_text(content)
        paths[name] = home / name
    (home / "binary").write_bytes(b"\xff\xfe\x00")
    (home / "long.jsonl").write_text(json.dumps({"text": "The cat sees the dog. " * 400}) + "\n")
    paths |= {"binary": home / "binary", "long": home / "long.jsonl", "empty": home / "empty.jsonl", "home": home}
    return {name: str(path) for name, path in (paths | vars(world)).items()}


PACK = "pack source={corpus} tokenizer={rows}/tokenizer seq_len=32 out=o"
CAPTURE = "capture rows={rows} teacher={teacher} out=o device=cpu"

REFUSALS = [
    # sources and tokenizers
    ("pack source={home}/no.jsonl tokenizer=train seq_len=32 out=o", "no.jsonl does not exist; the nearest folder"),
    ("pack source={empty} tokenizer=train seq_len=32 out=o", "holds no document; give files"),
    ("pack source={blank} tokenizer=train seq_len=32 out=o", "1 are blank, 0 have no response; give others"),
    ("pack source={binary} tokenizer=train seq_len=32 out=o", "not UTF-8: byte 0xff at offset 0; convert it"),
    ("pack source={home}/no*.txt tokenizer=train seq_len=32 out=o", "no*.txt' matches no file; the nearest folder"),
    ("pack source={empty_folder} tokenizer=train seq_len=32 out=o", "holds no file; give one with documents"),
    ("pack source={texts} tokenizer=train vocab_size=300 seq_len=32 out=o", "set heldout=0, give more documents"),
    (f"{PACK} tokenizer={{noeos}}", "has no EOS token, so documents would run together; set"),
    (f"{PACK} tokenizer=./none", "the tokenizer folder none does not exist; give one"),
    (f"{PACK} field=body", "has no field 'body'; it has 'text'"),
    (f"{PACK} text_by=page", "text_by='page' is unknown; it is one of document, paragraph, line"),
    # sizes and names of pack
    (f"{PACK} seq_len=0", "seq_len=0 leaves no next token to predict; it is at least 2"),
    (f"{PACK} seq_len=-5", "seq_len=-5 leaves no next token"),
    (f"{PACK} seed=-1", "seed=-1 is outside [0, 2^64)"),
    (f"{PACK} heldout=1.5", "heldout=1.5 is outside [0, 1)"),
    (f"{PACK} limit_tokens=0", "limit_tokens=0 keeps nothing; leave it out"),
    (f"{PACK} tokenizer=train vocab_size=9", "vocab_size=9 is below 257"),
    (f"{PACK} seq_length=32", "pack has no setting 'seq_length'; did you mean 'seq_len'?"),
    # what a program writes into
    (f"{PACK} out={{afile}}", "afile is a file, not a folder; give another out=FOLDER"),
    (f"{PACK} out={{afile}}/below", "afile is a file, not a folder; give another out=FOLDER"),
    (f"{PACK} out={{mess}}", "mess is not empty and holds no packed rows; give another out=FOLDER"),
    (f"{PACK} out={{cache}}", "cache holds 'sparsekd-cache', not 'sparsekd-rows'"),
    ("pack source={corpus} tokenizer=train vocab_size=300 seq_len=64 heldout=0.1 out={rows}",
     "was packed with seq_len=32, these settings have 64; choose another out="),
    (f"{CAPTURE} out={{afile}}", "afile is a file, not a folder; give another out=FOLDER"),
    (f"{CAPTURE} out={{mess}}", "mess is not empty and holds no cache but notes.txt; give another out=FOLDER"),
    (f"{CAPTURE} out={{rows}}", "is not empty and holds no cache but heldout_ids.npy"),
    (f"{CAPTURE} out=s3://bucket/cache", "a cache is written to a local folder, not to s3://bucket/cache"),
    (
        f"{CAPTURE} out={{cache}} shard_rows=40 sampler=random_sampling sampler.rounds=21",
        "=20, this capture has sampler.rounds=21",
    ),
    # rows and teachers
    ("capture", "capture needs rows=...; sparsekd capture --settings lists all"),
    (f"{CAPTURE} rows={{home}}/none", "none does not exist; make packed rows with `sparsekd pack`"),
    (f"{CAPTURE} rows={{mess}}", "holds no packed rows (no manifest.json)"),
    (f"{CAPTURE} rows={{afile}}", "is a file; give a folder that `sparsekd pack` wrote"),
    (f"{CAPTURE} rows={{cache}}", "holds 'sparsekd-cache', not 'sparsekd-rows'; give a folder"),
    (f"{CAPTURE} split=test", "has no split 'test'; it has train, heldout"),
    (f"{CAPTURE} teacher={{home}}/none", "no model at {home}/none: the folder does not exist; give one"),
    (f"{CAPTURE} teacher={{rows}}", "as a causal language model: Unrecognized model"),
    # samplers, codecs, devices, sizes
    (f"{CAPTURE} sampler=topk", "unknown sampler 'topk'; there are random_sampling, systematic, top_k"),
    (f"{CAPTURE} sampler.rouns=3", "has no parameter 'rouns'; it has: rounds"),
    (f"{CAPTURE} sampler.rounds=0", "sampler.rounds=0 is out of range: 1 to"),
    (f"{CAPTURE} sampler.rounds=many", "sampler.rounds='many' is not a whole number; its default is 50"),
    (f"{CAPTURE} sampler.rounds=1.5", "sampler.rounds=1.5 is not a whole number"),
    (f"{CAPTURE} sampler.rounds=true", "sampler.rounds=True is not a whole number"),
    (f"{CAPTURE} codec=zip", "codec='zip' is unknown; there are raw24"),
    (f"{CAPTURE} sampler=top_k codec=raw24", "holds counts, sampler top_k with these parameters gives weights; take"),
    (f"{CAPTURE} codec=prob24", "holds weights, sampler systematic with these parameters gives counts; take raw"),
    (f"{CAPTURE} sampler.rounds=2000 codec=raw24", "codec raw24 holds 1 to 64 rounds, but rounds=2000"),
    (f"{CAPTURE} dtype=fp8", "dtype='fp8' is not one of float32, bfloat16, float16"),
    (f"{CAPTURE} device=banana", "device='banana' is not one of cpu, cuda, cuda:N"),
    (f"{CAPTURE} device=meta", "device='meta' is not one of cpu, cuda, cuda:N"),
    (f"{CAPTURE} device=cuda:63", "device='cuda:63' is not there: torch finds"),
    (f"{CAPTURE} seed=-1", "seed=-1 is outside [0, 2^64)"),
    (f"{CAPTURE} seed=99999999999999999999", "seed=99999999999999999999 is outside [0, 2^64)"),
    (f"{CAPTURE} batch_size=0", "batch_size=0 is too small; give at least 1"),
    (f"{CAPTURE} batch_size=-3", "batch_size=-3 is too small"),
    (f"{CAPTURE} shard_rows=0", "shard_rows=0 is too small"),
    (f"{CAPTURE} limit_rows=0", "limit_rows=0 is too small"),
    (f"{CAPTURE} threads=0", "threads=0 is too small"),
    (f"{CAPTURE} shard_rows=40 --shard-range 5:2", "shard_range='5:2' is not a:b with 0 <= a < b <= 8"),
    (f"{CAPTURE} shard_rows=40 --shard-range 3", "shard_range='3' is not a:b"),
    (f"{CAPTURE} shard_rows=40 shard_range=0:99", "shard_range='0:99' is not a:b"),
    # recipes
    ("pack -c {home}/none.yaml", "cannot read the recipe {home}/none.yaml: No such file or directory"),
    ("pack -c {list}", "holds a list; write key: value lines"),
    ("pack -c {bad}", "bad is not YAML"),
    ("pack nonsense", "'nonsense' is not key=value"),
    # caches
    ("verify {home}/none", "no cache here"),
    ("verify {afile}", "Not a directory"),
    ("verify {newer}", "written by a newer sparsekd (format 99, this one reads 1); upgrade sparsekd"),
    ("verify {rows}", "rows: no cache here"),
    ("verify {cache} --teacher {home}/none", "no model at"),
    ("inspect {home}/none", "no cache here"),
    ("inspect {rows} --row 99999", "row=99999 is not in {rows}; its rows are 0 to"),
    ("inspect {newer}", "written by a newer sparsekd"),
    ("inspect {cut}", "shard-00002.safetensors: its tensors end at"),
    ("inspect {cache} --row 99999", "row=99999 is not in {cache}; its rows are 0 to"),
    ("inspect {cache} --row 1 --positions 0", "greater than or equal to 1; sparsekd inspect --help shows"),
    ("inspect nosuch://place", "Protocol not known: nosuch"),
    # students and evaluation
    ("train cache={home}/none student=tiny out=o", "no cache here"),
    ("train cache={newer} student=tiny out=o", "written by a newer sparsekd"),
    ("train cache={rows} student=tiny out=o", "expected 'sparsekd-cache'; give a cache, as `sparsekd capture`"),
    ("train cache={cache} student=tiny out=o method=magic", "method='magic' is not one of ce, cached, full_kd"),
    ("train cache={cache} student=tiny out=o schedule=magic", "schedule='magic' is not one of cosine, constant"),
    ("train cache={cache} student=tiny out=o device=banana", "device='banana' is not one of cpu, cuda"),
    ("train cache={cache} student=tiny out=o dtype=fp8", "dtype='fp8' is not one of float32, bfloat16"),
    ("train cache={cache} student=tiny out=o batch_size=0", "batch_size=0"),
    ("train cache={cache} student=tiny out=o epochs=-1", "epochs=-1"),
    ("train cache={cache} student=tiny out=o seed=-1", "seed=-1"),
    ("train cache={cache} student=tiny out={mess}", "mess is not empty and holds no training run; give another out="),
    ("train cache={cache} student=tiny out={afile}", "afile is a file"),
    ("train cache={cache} student=tiny student.hidden_size=0 out=o", "hidden_size=0 is not a whole number of at least"),
    ("train cache={cache} student=tiny student.hidden_size=33 out=o", "hidden_size=33 is not a multiple of"),
    ("train cache={cache} student=tiny student.hiden_size=8 out=o", "unknown student setting 'hiden_size'; there are"),
    ("train cache={cache} student=huge out=o", "student='huge' is not one of tiny, mini"),
    ("evaluate model={home}/none rows={rows}", "no model at"),
    ("evaluate model={teacher} rows={rows} split=test", "has no split 'test'; it has train, heldout"),
    ("evaluate model={teacher} rows={cache}", "holds 'sparsekd-cache', not 'sparsekd-rows'"),
    ("evaluate model={teacher} rows={rows} device=banana", "device='banana' is not one of cpu, cuda"),
    # the rest
    ("report {home}/none", "no results in"),
    ("demo o --profile huge", "profile='huge' is not one of smoke, quick, full"),
    ("demo out=o profile=huge", "profile='huge' is not one of smoke, quick, full"),
    ("packk", "No such command 'packk'"),
    ("inspect", "Missing argument 'folder'; sparsekd inspect --help shows what there is"),
    ("inspect {cache} --rwo 3", "No such option: --rwo"),
    ("pack --seq-len 32", "No such option: --seq-len; settings have no dashes: seq_len=VALUE; sparsekd pack --help"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), REFUSALS, ids=[line for line, _ in REFUSALS])
def test_a_mistake_is_answered_in_one_sentence(shell, zoo, tmp_path, line, words):
    """Exit code 2, one line on stderr that says what is wrong and what to do, and nothing is left behind."""
    before = sorted(path.name for path in tmp_path.rglob("*"))
    message = shell.refused(line, **zoo)
    for name in ("home", "cache", "rows"):
        words = words.replace(f"{{{name}}}", zoo[name])
    assert words in message
    left = [name for name in sorted(path.name for path in tmp_path.rglob("*")) if name not in before]
    assert [name for name in left if name not in ("o", "tokenizer") and "token" not in name] == []


def test_no_command_at_all_is_answered_with_the_help(shell):
    """The verbs on stdout, and nothing on stderr beside them."""
    code, out, err = shell("")
    assert (code, err) == (2, "")
    assert "Usage: sparsekd" in out


def test_rows_beyond_the_teachers_context_are_refused(shell, zoo, tmp_path):
    """Both lengths and the way out are named before the teacher runs."""
    line = "pack source={long} tokenizer={rows}/tokenizer seq_len=128 heldout=0 out=rows128"
    assert shell(line, **zoo)[0] == 0
    message = shell.refused("capture rows=rows128 teacher={teacher} out=o device=cpu", **zoo)
    assert message == "seq_len=128 is beyond the teacher's context of 64 tokens; re-pack with seq_len=64"


def test_a_refused_capture_leaves_foreign_folders_as_they_are(shell, zoo):
    """Capturing into rows, or into somebody's notes, changes no byte of them."""
    before = folder_bytes(zoo["rows"]), folder_bytes(zoo["mess"])
    shell.refused(f"{CAPTURE} out={{rows}}", **zoo)
    shell.refused(f"{CAPTURE} out={{mess}}", **zoo)
    assert (folder_bytes(zoo["rows"]), folder_bytes(zoo["mess"])) == before


def test_verify_names_the_damaged_shard(shell, zoo):
    """A flipped bit and a cut file are each told by their shard's name, and how to mend them."""
    for name, shard in (("flipped", "shard-00003"), ("cut", "shard-00002")):
        code, out, err = shell(f"verify {{{name}}}", **zoo)
        assert code == 2
        assert shard in out
        assert re.search(r"\d problems in \d shards; run the same capture to mend them", err)
        assert not set(re.findall(r"shard-\d+", out)) - {shard}


def test_verify_says_that_all_is_well(shell, zoo):
    """A sound cache passes, and draws again bit for bit under its own teacher."""
    code, out, _ = shell("verify {cache} --teacher {teacher} --rows 4", **zoo)
    assert code == 0
    assert "every checksum holds" in out
    assert "4 rows drawn again" in out
    assert "identical bit for bit" in out


def test_a_folder_without_the_right_to_write_is_refused(shell, zoo, monkeypatch):
    """The right is asked for before the teacher runs (as root every folder may be written, hence the stand-in)."""
    monkeypatch.setattr("sparsekd.checks.os.access", lambda *_: False)
    assert "cannot write in o: permission denied; give another out=FOLDER" in shell.refused(CAPTURE, **zoo)


def test_an_error_of_the_system_is_one_sentence_too(shell, zoo, monkeypatch):
    """A full disk, or a file that goes away, names the file and the reason."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device", "cache/x")

    monkeypatch.setattr(capture_module, "_make_shards", fail)
    assert shell.refused(CAPTURE, **zoo) == "cache/x: No space left on device"


def test_a_bug_is_not_hidden(shell, zoo, monkeypatch):
    """What is not the input's fault keeps its traceback."""
    monkeypatch.setattr(capture_module, "_make_shards", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shell(CAPTURE, **zoo)


def test_an_interrupt_says_that_work_is_kept(shell, zoo, monkeypatch):
    """Ctrl-C ends with 130; the same command then goes on to the same bytes."""
    real, calls = capture_module.Teacher.draw, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*args)

    line = f"{CAPTURE} shard_rows=40 batch_size=8 sampler=random_sampling sampler.rounds=20 threads=1"
    monkeypatch.setattr(capture_module.Teacher, "draw", interrupted)
    code, _, err = shell(line, **zoo)
    assert code == 130
    assert "interrupted; what is written is kept, run the same command to go on" in err
    assert 0 < len(list(Path("o").glob("*.safetensors"))) < 8
    monkeypatch.setattr(capture_module.Teacher, "draw", real)
    assert shell(line, **zoo)[0] == 0
    assert folder_bytes("o") == folder_bytes(zoo["cache"])


def test_the_whole_way_by_command_line(shell, zoo, tmp_path):
    """pack -> capture -> inspect -> train -> evaluate, with a recipe file; each verb ends with its numbers."""
    Path("c.yaml").write_text(f"rows: rows\nteacher: {zoo['teacher']}\nout: cache\nsampler: random_sampling\n")
    Path("empty.jsonl").write_text('{"text": ""}\n' * 3)
    source = "pack source=[empty.jsonl,{corpus}]"
    line = f"{source} tokenizer={{rows}}/tokenizer seq_len=32 heldout=0.1 limit_tokens=3000 out=rows"
    code, out, err = shell(line, **zoo)
    assert (code, err) == (0, "")
    assert out.endswith("left out: 3 blank\n")
    assert re.search(r"train: \d+ rows, [\d,]+ tokens, \d+ documents\n +heldout: \d+ rows", out)
    code, out, err = shell("capture -c c.yaml sampler.rounds=12 device=cpu")
    assert (code, err) == (0, "")
    assert re.search(r"[\d,]+ tokens, \d+\.\d ids and \d+\.\d bytes per token in \d+ shards", out)
    assert "rounds=12" in shell("inspect cache")[1]
    code, out, err = shell(
        "train cache=cache student=tiny student.hidden_size=32 student.intermediate_size=64 out=student "
        "eval_rows=rows max_steps=6 eval_steps=3 log_steps=2 batch_size=4 device=cpu"
    )
    assert code == 0
    assert re.search(r"cached: 6 steps, 768 tokens, train loss \d\.\d+, [\d,]+ tokens/s", out)
    assert re.search(r"step 2/6  loss \d\.\d+", err)  # a line per log where nobody watches
    assert re.search(r"step 3/6  held-out loss \d\.\d+", err)
    assert "it/s" not in err
    code, out, _ = shell("evaluate model=student rows=rows teacher={teacher} device=cpu", **zoo)
    assert code == 0
    for name in ("loss", "acceptance", "perplexity", "bits_per_byte", "ece"):
        assert re.search(rf"{name} +\d+\.\d+", out)
    assert json.loads(Path("student/evaluation.json").read_text())["perplexity"] > 1


def test_a_partial_capture_says_so(shell, zoo):
    """A worker's share is made; the cache is complete when the others are."""
    line = f"{CAPTURE} shard_rows=40 sampler=random_sampling sampler.rounds=20"
    assert "others are still missing" in shell(f"{line} --shard-range 0:2", **zoo)[1]
    assert "bytes per token in 8 shards" in shell(f"{line} --shard-range 2:8", **zoo)[1]


@pytest.mark.parametrize("verb", ["pack", "capture", "train", "evaluate"])
def test_settings_are_listed(shell, verb):
    """--settings prints them and does nothing else; --help gives an example and says where they are."""
    code, out, _ = shell(f"{verb} --settings")
    assert code == 0
    assert f"settings of {verb}" in out
    assert "required" in out
    code, out, _ = shell(f"{verb} --help")
    assert code == 0
    assert f"sparsekd {verb} --settings" in " ".join(out.split())


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    """Unit, rate and time left on a terminal; nothing at all in a log file."""
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with console.Bar("tok") as bar:
            bar(500, 1000, shard="0")
            bar(1000, 1000, shard="1")
        assert ("tok/s" in stream.getvalue()) is drawn
        assert ("1.00k/1.00k" in stream.getvalue()) is drawn


def test_the_module_runs_and_a_closed_pipe_is_no_error(world):
    """`python -m sparsekd inspect CACHE | head -1` ends quietly."""
    line = f"set -o pipefail; {sys.executable} -m sparsekd inspect {world.cache} --row 0 --positions 31 | head -c 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout == "r"
    assert done.stderr == ""
