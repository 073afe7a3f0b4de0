"""Files that lie, break off or come from elsewhere: always an error of our tree, never a crash or a wrong row."""

from __future__ import annotations

import json
import shutil
import struct
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from crc32c import crc32c

from sparsekd.cache import CacheReader, CacheSpec, CacheWriter, RowRecord, verify
from sparsekd.codec import FlatTargets, codec_spec
from sparsekd.errors import CacheError, FormatError, IncompleteError, MismatchError, SparseKDError, VersionError
from sparsekd.files import canonical_json
from sparsekd.manifest import MANIFEST, shard_name
from sparsekd.shard import ShardReader

VOCAB, SEQ_LEN, ROUNDS = 20, 4, 3
INDEX = ("offsets", "crc32c", "input_hash", "id_rank")  # what a shard's own checksum covers beside its header
SPEC = CacheSpec(
    rows=2,
    seq_len=SEQ_LEN,
    shard_rows=2,
    logit_width=VOCAB,
    codec=codec_spec("raw24", rounds=ROUNDS, logit_width=VOCAB),
    sampler={},
    teacher={},
    tokenizer={},
    data={},
)


def make_record(row):
    targets = FlatTargets(
        ids=np.array([1, 2, 5, 19], np.uint32),
        values=np.array([1, 2, 3, 3], np.uint32),
        sizes=np.array([2, 1, 1]),
        rounds=ROUNDS,
    )
    masks = {"starts": np.arange(SEQ_LEN) == 0, "supervised": np.ones(SEQ_LEN, bool)}
    return RowRecord(input_ids=np.arange(SEQ_LEN) + row, targets=targets, **masks)


@pytest.fixture(scope="module", params=["raw24", "split"])
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "cache"
    codec = codec_spec(request.param, rounds=ROUNDS, logit_width=VOCAB)
    writer = CacheWriter(folder, replace(SPEC, codec=codec))
    writer.write(0, [make_record(0), make_record(1)])
    writer.finalize()
    return folder


@pytest.fixture
def cache(original, tmp_path):
    return shutil.copytree(original, tmp_path / "cache")


def rows_of(folder):
    """Everything that a reader can see of the rows."""
    with CacheReader(folder) as reader:
        rows = [reader[i] for i in range(len(reader))]
    parts = [(r.input_ids, r.starts, r.supervised, r.targets.ids, r.targets.weights) for r in rows]
    return [[part.tobytes() for part in row] for row in parts]


def taken_apart(file):
    """The safetensors header as a dict, and the data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def put_together(file, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def resealed(header, data, change=lambda ours: None):
    """The header with our own part changed and its checksum computed anew, as a clever attacker would."""
    ours = json.loads(header["__metadata__"]["sparsekd"])["header"]
    change(ours)
    parts = [bytes(data[slice(*header[name]["data_offsets"])]) for name in INDEX if name in header]
    crc = crc32c(canonical_json(ours) + b"".join(parts))
    header["__metadata__"]["sparsekd"] = canonical_json({"header": ours, "crc32c": crc}).decode()
    return header


def refuse(folder, words, error=FormatError):
    """Without a manifest that could notice: opening, reading and verifying all refuse."""
    (folder / MANIFEST).unlink(missing_ok=True)
    with pytest.raises(error, match=words):
        ShardReader(folder / shard_name(0)).close()
    with pytest.raises(CacheError):
        rows_of(folder)


# --- damage ---------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed_by_the_checksums_in_the_shard(cache):
    """Each bit of a shard in turn, without manifest or sha256: opening or reading a row raises FormatError."""
    (cache / MANIFEST).unlink()
    file = cache / shard_name(0)
    good = file.read_bytes()
    accepted = []
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        try:
            with ShardReader(file) as reader:
                for row in range(2):
                    reader.read_row(row)
            accepted.append(bit)
        except (FormatError, VersionError):
            pass
    assert accepted == []


def test_every_flipped_bit_is_reported_by_verify(cache):
    """A bit of every byte (all eight take long), with the manifest: a problem is listed, rows never differ."""
    file = cache / shard_name(0)
    good, rows = file.read_bytes(), rows_of(cache)
    for byte in range(len(good)):
        bad = bytearray(good)
        bad[byte] ^= 1 << byte % 8
        file.write_bytes(bad)
        assert verify(cache).problems, byte
        with suppress(SparseKDError):
            assert rows_of(cache) == rows


def test_every_flipped_bit_of_the_manifest_is_reported_by_verify(cache):
    """The manifest has no checksum: it must equal what the shards' headers give."""
    file = cache / MANIFEST
    good = file.read_bytes()
    for byte in range(len(good)):
        bad = bytearray(good)
        bad[byte] ^= 1 << byte % 8
        file.write_bytes(bad)
        with suppress(VersionError):
            assert verify(cache).problems, byte


def test_every_truncation_is_refused(cache):
    """A shard cut at any length, and one with bytes after its end, does not open."""
    file = cache / shard_name(0)
    good = file.read_bytes()
    for length in range(len(good)):
        file.write_bytes(good[:length])
        with pytest.raises(FormatError):
            ShardReader(file)
    file.write_bytes(good + b"\0")
    with pytest.raises(FormatError, match="its tensors end at"):
        ShardReader(file)


def test_an_empty_file_is_named(cache):
    """Zero bytes cannot be mapped into memory, and still get a sentence."""
    (cache / shard_name(0)).write_bytes(b"")
    refuse(cache, "shard-00000.safetensors: 0 bytes are too few")


def test_a_folder_in_a_shards_place_is_refused(cache):
    """Not even a file: still an error of ours."""
    (cache / shard_name(0)).unlink()
    (cache / shard_name(0)).mkdir()
    with pytest.raises(CacheError, match="cannot read"):
        CacheReader(cache)[0]


def test_swapped_rows_are_noticed(cache):
    """Two rows' blocks and checksums exchanged, index resealed: the row's number is in its checksum."""
    header, data = taken_apart(cache / shard_name(0))
    crcs = slice(*header["crc32c"]["data_offsets"])
    data[crcs] = data[crcs][4:] + data[crcs][:4]
    begin, end = header["payload"]["data_offsets"]
    middle = (begin + end) // 2
    data[begin:end] = data[middle:end] + data[begin:middle]
    put_together(cache / shard_name(0), resealed(header, data), data)
    (cache / MANIFEST).unlink()
    assert len(verify(cache).problems) == 2
    with pytest.raises(FormatError, match="row 0 has crc32c"):
        CacheReader(cache)[0]


# --- foreign files --------------------------------------------------------------------------------------


def test_a_foreign_safetensors_file_is_told_apart(cache):
    """A model's weights are a valid safetensors file and no shard."""
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(4)}, cache / shard_name(0))
    refuse(cache, "no sparsekd header; this is not a shard")
    save_file({"weight": np.zeros(4)}, cache / shard_name(0), {"sparsekd": "{}"})
    refuse(cache, "its sparsekd entry holds no header")


@pytest.mark.parametrize("data", [b"PK\x03\x04 zip", b"\x93NUMPY", b"PAR1" * 9, bytes(64), b"\xff" * 64, b"{}" * 40])
def test_other_formats_are_refused(cache, data):
    """Whatever the first eight bytes claim, no more than the file is read."""
    (cache / shard_name(0)).write_bytes(data)
    refuse(cache, "claims a header of|too few|JSON")


def test_a_newer_version_asks_for_an_upgrade(cache):
    """Before anything else is judged, for a newer format may look different everywhere."""
    header, data = taken_apart(cache / shard_name(0))
    header["new_tensor"] = {}
    resealed(header, data, lambda ours: ours.update(format_version=2))
    put_together(cache / shard_name(0), header, data)
    words = r"written by a newer sparsekd \(format 2, this one reads 1\); upgrade sparsekd"
    refuse(cache, words, VersionError)
    with pytest.raises(VersionError, match=words):
        CacheWriter(cache, SPEC)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]])
def test_a_version_that_is_no_number_is_refused(cache, version):
    """Only a whole number from 1 on is a version."""
    header, data = taken_apart(cache / shard_name(0))
    put_together(cache / shard_name(0), resealed(header, data, lambda h: h.update(format_version=version)), data)
    refuse(cache, "format_version is")


# --- headers that lie -----------------------------------------------------------------------------------


def set_tensor(name, **changes):
    return lambda header: header[name].update(changes)


def drop(name):
    return lambda header: header.pop(name)


TENSOR_LIES = {
    "a missing tensor": (drop("starts"), "holds the tensors"),
    "one tensor more": (lambda h: h.update(more=h["starts"]), "holds the tensors"),
    "another metadata key": (lambda h: h["__metadata__"].update(format="pt"), "no sparsekd header"),
    "a dtype": (set_tensor("offsets", dtype="F64"), "offsets has dtype 'F64', expected I64"),
    "a dtype that is a list": (set_tensor("offsets", dtype=["I64"]), "offsets has dtype"),
    "a huge shape": (set_tensor("payload", shape=[2**61]), "payload needs 2305843009213693952 bytes"),
    "an enormous shape": (set_tensor("payload", shape=[10**300]), "payload has shape"),
    "a negative shape": (set_tensor("payload", shape=[-5]), "payload has shape"),
    "a shape of floats": (set_tensor("payload", shape=[5.0]), "payload has shape"),
    "a shape of booleans": (set_tensor("payload", shape=[True]), "payload has shape"),
    "two dimensions": (set_tensor("payload", shape=[1, 5]), "payload has shape"),
    "no dimensions": (set_tensor("payload", shape=[]), "payload has shape"),
    "a million dimensions": (set_tensor("starts", shape=[2] * 10**6), "starts has shape"),
    "other rows": (set_tensor("crc32c", shape=[3]), r"crc32c has shape \[3\], expected \[2\]"),
    "negative offsets": (set_tensor("offsets", data_offsets=[-8, 16]), "offsets has shape"),
    "reversed offsets": (set_tensor("offsets", data_offsets=[24, 0]), "offsets needs 24 bytes"),
    "offsets beyond": (set_tensor("offsets", data_offsets=[2**40, 2**40 + 24]), "a hole or an overlap"),
    "an overlap": (set_tensor("crc32c", data_offsets=[0, 8]), "a hole or an overlap"),
    "three offsets": (set_tensor("offsets", data_offsets=[0, 8, 24]), "offsets has shape"),
    "no offsets": (set_tensor("offsets", data_offsets=None), "offsets has shape"),
    "a tensor that is a number": (lambda h: h.update(offsets=7), "offsets is declared as 7"),
    "an unknown property": (set_tensor("offsets", stride=1), "offsets is declared as"),
}


@pytest.mark.parametrize("lie", TENSOR_LIES)
def test_tensors_that_lie_are_refused(cache, lie):
    """Names, types, shapes and places of the tensors are checked before anything is read by them."""
    change, words = TENSOR_LIES[lie]
    header, data = taken_apart(cache / shard_name(0))
    change(header)
    put_together(cache / shard_name(0), header, data)
    refuse(cache, words)


def test_a_hole_between_tensors_is_refused(cache):
    """Bytes that no tensor owns could hide anything."""
    header, data = taken_apart(cache / shard_name(0))
    last = max((each for name, each in header.items() if "__" not in name), key=lambda t: t["data_offsets"])
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]
    put_together(cache / shard_name(0), header, data + bytes(8))
    refuse(cache, "a hole or an overlap")


HEADER_LIES = {
    "rows": ({"rows": 3}, r"offsets has shape \[3\], expected \[4\]"),
    "no rows": ({"rows": 0}, "header rows is 0"),
    "rows that are a string": ({"rows": "2"}, "header rows is '2'"),
    "rows without end": ({"rows": 2**80}, "header rows is"),
    "a first row below zero": ({"first_row": -1}, "header first_row is -1"),
    "a spec that is a list": ({"spec": []}, "header spec.seq_len is None"),
    "another seq_len": ({"spec": {"seq_len": 2**40}}, "starts has shape"),
    "another format": ({"format": "other"}, "format is 'other', expected 'sparsekd-cache'"),
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_our_own_header_is_not_trusted_either(cache, lie):
    """With a fresh checksum: numbers of the header must agree with the file's arrays."""
    changes, words = HEADER_LIES[lie]
    header, data = taken_apart(cache / shard_name(0))
    put_together(cache / shard_name(0), resealed(header, data, lambda ours: ours.update(changes)), data)
    refuse(cache, words)


SPEC_LIES = {
    "another width": lambda ours: ours["spec"].update(logit_width=3),
    "both widths": lambda ours: (ours["spec"].update(logit_width=3), ours["spec"]["codec"].update(logit_width=3)),
    "rounds": lambda ours: ours["spec"]["codec"].update(rounds=2),
    "another codec": lambda ours: ours["spec"].update(codec={"name": "prob40", "logit_width": VOCAB}),
    "no codec": lambda ours: ours["spec"].pop("codec"),
    "a codec from elsewhere": lambda ours: ours["spec"]["codec"].update(name="__import__"),
    "a codec that is a list": lambda ours: ours["spec"].update(codec=[]),
    "a codec without width": lambda ours: ours["spec"]["codec"].pop("logit_width"),
    "more shards than rows": lambda ours: ours["spec"].update(rows=2**47, shard_rows=1),
    "another shard": lambda ours: ours.update(shard=1),
    "a shard below zero": lambda ours: ours.update(shard=-1),
    "another first row": lambda ours: ours.update(first_row=2),
    "no engine": lambda ours: ours.pop("engine"),
    "statistics": lambda ours: ours["stats"].update(pairs=-1),
    "no statistics": lambda ours: ours["stats"].clear(),
    "one key more": lambda ours: ours.update(extra=1),
    "another convention": lambda ours: ours.update(position_convention="target p is of token p"),
}


@pytest.mark.parametrize("lie", SPEC_LIES)
def test_a_cache_does_not_open_on_a_spec_that_lies(cache, lie):
    """The index is sound and resealed; identity, limits and places must still fit, at once and in our words."""
    header, data = taken_apart(cache / shard_name(0))
    put_together(cache / shard_name(0), resealed(header, data, SPEC_LIES[lie]), data)
    with pytest.raises((CacheError, MismatchError)):
        rows_of(cache)
    (cache / MANIFEST).unlink()
    with pytest.raises(CacheError):
        rows_of(cache)


@pytest.mark.parametrize(
    "offsets",
    [
        [0, -1, None],
        [0, 2**62, None],
        [1, 20, None],
        [0, None, 0],
        [-(2**63), 2**63 - 1, None],
        [0, 2**63 - 1, -(2**63)],
        [2**63 - 1, 2**63 - 1, 2**63 - 1],
    ],
)
def test_hostile_row_offsets_are_refused(cache, offsets):
    """Offsets that fall, overflow or leave the payload, under a correct checksum."""
    header, data = taken_apart(cache / shard_name(0))
    place = slice(*header["offsets"]["data_offsets"])
    end = np.frombuffer(data[place], "<i8")[-1]
    data[place] = np.array([end if each is None else each for each in offsets], "<i8").tobytes()
    put_together(cache / shard_name(0), resealed(header, data), data)
    refuse(cache, "blocks span|ends at")


def test_moved_row_borders_are_noticed(cache):
    """Ascending offsets that cut the payload elsewhere: each row's own checksum refuses."""
    header, data = taken_apart(cache / shard_name(0))
    place = slice(*header["offsets"]["data_offsets"])
    offsets = np.frombuffer(data[place], "<i8").copy()
    offsets[1] += 3
    data[place] = offsets.tobytes()
    put_together(cache / shard_name(0), resealed(header, data), data)
    (cache / MANIFEST).unlink()
    with pytest.raises(FormatError, match="row 1 has crc32c"):
        CacheReader(cache)[1]


# --- JSON -----------------------------------------------------------------------------------------------

JSON_TEXTS = {
    "a header beyond the cap": (b" " * 8, "claims a header of"),
    "deep nesting": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "deep nesting, unfinished": (b'{"a":' * 200_000, "nested too deeply|JSON cannot be read"),
    "duplicate keys": (b'{"a": 1, "a": 1}', "a key is there twice"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "JSON cannot be read"),
    "no object": (b"[1, 2]", "no JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "JSON cannot be read"),
    "nothing": (b"", "JSON cannot be read"),
    "two texts": (b"{} {}", "JSON cannot be read"),
}


@pytest.mark.parametrize("text", JSON_TEXTS)
def test_json_tricks_are_refused(cache, text):
    """Whatever Python's parser would forgive or fall over."""
    content, words = JSON_TEXTS[text]
    put_together(cache / shard_name(0), content, b"")
    if "cap" in text:
        (cache / shard_name(0)).write_bytes(struct.pack("<Q", 2**24 + 1) + b" " * (2**24 + 9))
    refuse(cache, words)


@pytest.mark.parametrize(
    "text",
    [
        '{"header":{"format":"sparsekd-cache","format_version":1,"x":1e999},"crc32c":0}',
        '{"a":NaN}',
        "[" * 100_000,
        '"\\ud800"',
        "",
    ],
)
def test_json_tricks_inside_our_entry_are_refused(cache, text):
    """The inner text goes through the same parser, and must be canonical."""
    header, data = taken_apart(cache / shard_name(0))
    header["__metadata__"]["sparsekd"] = text
    put_together(cache / shard_name(0), header, data)
    refuse(cache, "holds no header|canonical|not JSON|nested too deeply|cannot be read")


def test_a_header_in_another_form_is_refused(cache):
    """The same values with a space: nobody writes that, so somebody edited it."""
    header, data = taken_apart(cache / shard_name(0))
    header["__metadata__"]["sparsekd"] = header["__metadata__"]["sparsekd"].replace(":", ": ", 1)
    put_together(cache / shard_name(0), header, data)
    refuse(cache, "not in canonical form")


# --- manifests ------------------------------------------------------------------------------------------

MANIFEST_LIES = {
    "a path": lambda m: m["shards"][0].update(file="../../etc/passwd"),
    "an absolute path": lambda m: m["shards"][0].update(file="/etc/passwd"),
    "fewer shards": lambda m: m["shards"].clear(),
    "a shard of another kind": lambda m: m["shards"].__setitem__(0, 7),
    "more rows": lambda m: m["shards"][0].update(rows=3),
    "endless rows": lambda m: m["spec"].update(rows=2**47),
    "endless rows in one shard": lambda m: m["spec"].update(rows=2**47, shard_rows=2**47),
    "pairs": lambda m: m["shards"][0].update(pairs=1),
    "no spec": lambda m: m.pop("spec"),
    "a spec of another kind": lambda m: m.update(spec="x"),
    "statistics": lambda m: m.update(stats=None),
    "another teacher": lambda m: m["spec"].update(teacher={"id": "other"}),
    "one key more": lambda m: m.update(extra=1),
    "a foreign format": lambda m: m.update(format="x"),
}


@pytest.mark.parametrize("lie", MANIFEST_LIES)
def test_a_manifest_that_lies_is_refused(cache, lie):
    """At open where the manifest contradicts itself, at the first row where it contradicts a shard."""
    manifest = json.loads((cache / MANIFEST).read_bytes())
    MANIFEST_LIES[lie](manifest)
    (cache / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((FormatError, MismatchError)):
        CacheReader(cache)[0]
    assert verify(cache).problems


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"format": NaN}', b"null"])
def test_a_manifest_that_is_none_is_refused(cache, text):
    """Reported by verify as well, which goes on with the shards' headers."""
    (cache / MANIFEST).write_bytes(text)
    with pytest.raises(FormatError, match=MANIFEST):
        CacheReader(cache)
    report = verify(cache)
    assert report.rows == 2
    assert len(report.problems) == 1


def test_a_folder_of_nothing_is_no_cache(tmp_path):
    """Neither an empty folder nor a missing one opens."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(IncompleteError, match="no cache here"):
            CacheReader(folder)
        with pytest.raises(IncompleteError, match="no cache here"):
            verify(folder)


def test_random_garbage_in_the_middle_is_noticed(cache):
    """Runs of random bytes anywhere in the file, resealed or not."""
    rng = np.random.default_rng(0)
    file = cache / shard_name(0)
    good, rows = file.read_bytes(), rows_of(cache)
    for _ in range(300):
        start, length = int(rng.integers(len(good))), int(rng.integers(1, 40))
        bad = good[:start] + rng.bytes(length) + good[start + length :]
        file.write_bytes(bad)
        try:
            assert rows_of(cache) == rows
        except SparseKDError:
            continue
        assert bad == good
