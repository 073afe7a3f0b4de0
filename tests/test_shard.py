"""One shard file: the same bytes every time, whole or absent, one range per row, locally and over fsspec."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from safetensors import safe_open

import sparsekd.files as files
from sparsekd.errors import FormatError, StorageError
from sparsekd.files import canonical_json, remove_stale_files, sha256_file, strict_json, write_atomically
from sparsekd.shard import FORMAT, FORMAT_VERSION, ShardReader, ShardRow, hash_ids, write_shard

SEQ_LEN = 11


def make_header(rows=3, first_row=6):
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "first_row": first_row, "rows": rows}
    return header | {"spec": {"seq_len": SEQ_LEN}, "note": "größe"}


def make_rows(count=3):
    rng = np.random.default_rng(count)
    return [
        ShardRow(
            block=rng.bytes(10 + 7 * row),
            input_hash=int(rng.integers(2**63)) * 2 + 1,
            starts=rng.random(SEQ_LEN) < 0.2,
            supervised=rng.random(SEQ_LEN) < 0.8,
        )
        for row in range(count)
    ]


@pytest.fixture
def shard(tmp_path):
    write_shard(tmp_path / "shard", make_header(), make_rows())
    return tmp_path / "shard"


def assert_holds(path, rows):
    with ShardReader(path) as reader:
        assert len(reader) == len(rows)
        for row in reversed(range(len(rows))):
            found = reader.read_row(row)
            assert found.block == rows[row].block
            assert found.input_hash == rows[row].input_hash
            np.testing.assert_array_equal(found.starts, rows[row].starts)
            np.testing.assert_array_equal(found.supervised, rows[row].supervised)


def test_rows_come_back_as_they_were_written(shard):
    """Blocks, hashes and masks, for a row length that is no multiple of eight."""
    assert_holds(shard, make_rows())
    with ShardReader(shard) as reader:
        assert reader.header == make_header()


def test_an_empty_block_is_a_block(tmp_path):
    """A shard whose payload is empty still opens: a payload of zero bytes is no special case."""
    rows = [ShardRow(block=b"", input_hash=0, starts=np.zeros(SEQ_LEN, bool), supervised=np.ones(SEQ_LEN, bool))]
    write_shard(tmp_path / "shard", make_header(1), rows)
    assert_holds(tmp_path / "shard", rows)


def test_the_same_rows_give_the_same_bytes(tmp_path, shard):
    """Twenty writings, one content: resuming can promise identical files."""
    for _ in range(20):
        write_shard(tmp_path / "again", make_header(), make_rows())
        assert (tmp_path / "again").read_bytes() == shard.read_bytes()


def test_the_safetensors_library_reads_a_shard(shard):
    """It is a plain safetensors file: names, types and our single metadata key."""
    with safe_open(shard, "np") as file:
        assert set(file.metadata()) == {"sparsekd"}
        assert set(file.keys()) == {"payload", "offsets", "crc32c", "input_hash", "starts", "supervised"}
        assert file.get_tensor("offsets").tolist() == [0, 10, 27, 51]
        assert file.get_tensor("input_hash").dtype == np.uint64
        assert file.get_tensor("starts").shape == (3, 2)


def test_the_row_number_is_part_of_a_rows_checksum(tmp_path):
    """The same rows as another shard have other checksums, so a renamed shard cannot pass."""
    for name, first in (("a", 0), ("b", 3)):
        write_shard(tmp_path / name, make_header(first_row=first), make_rows())
    with safe_open(tmp_path / "a", "np") as one, safe_open(tmp_path / "b", "np") as other:
        assert not np.isin(one.get_tensor("crc32c"), other.get_tensor("crc32c")).any()


def test_input_hash_is_what_the_format_page_says():
    """blake2b over little-endian uint32, first eight bytes, little-endian; by hand for the ids 1, 2, 258."""
    data = bytes.fromhex("01000000 02000000 02010000")
    assert hash_ids(np.array([1, 2, 258])) == int.from_bytes(hashlib.blake2b(data).digest()[:8], "little")
    assert hash_ids(np.array([1, 2, 258], np.uint32)) != hash_ids(np.array([2, 1, 258], np.uint32))


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_outside_are_index_errors(shard, row):
    """A shard counts its own rows from 0."""
    with ShardReader(shard) as reader, pytest.raises(IndexError, match=f"row {row} of a shard of 3"):
        reader.read_row(row)


def test_a_header_that_promises_other_rows_is_not_written(tmp_path):
    """Three rows under a header of two would be unreadable."""
    with pytest.raises(ValueError, match="header says 2 rows, got 3"):
        write_shard(tmp_path / "shard", make_header(2), make_rows(3))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("width", [None, True, 0, 2**24 + 1])
def test_ranks_of_no_vocabulary_are_refused(tmp_path, width):
    """What a table of ids would allocate is checked before it is read."""
    header = make_header() | {"spec": {"seq_len": SEQ_LEN} | ({} if width is None else {"logit_width": width})}
    write_shard(tmp_path / "shard", header, make_rows(), id_rank=b"")
    with pytest.raises(FormatError, match=f"shard: has an id_rank, but logit_width={width}"):
        ShardReader(tmp_path / "shard")


# --- over fsspec ----------------------------------------------------------------------------------------


def test_a_remote_row_is_one_range_request_of_its_own_size(shard, monkeypatch):
    """After opening, a row costs one request for exactly its block."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/remote/shard", shard.read_bytes())
    assert_holds("memory://remote/shard", make_rows())
    with ShardReader("memory://remote/shard") as reader:
        requests, plain = [], type(memory).cat_file

        def counted(self, path, start=None, end=None, **kwargs):
            requests.append(end - start)
            return plain(self, path, start, end, **kwargs)

        monkeypatch.setattr(type(memory), "cat_file", counted)
        reader.read_row(1)
    assert requests == [len(make_rows()[1].block)]
    assert sha256_file("memory://remote/shard") == sha256_file(shard)


def test_local_urls_are_paths_too(shard):
    """file:// goes through fsspec and finds the same rows."""
    assert_holds(f"file://{shard}", make_rows())


def test_missing_files_and_unknown_schemes_are_told_apart(tmp_path):
    """A missing file is FileNotFoundError, which the cache turns into advice; a bad URL is ours."""
    for path in (tmp_path / "none", f"file://{tmp_path}/none", "memory://none/none"):
        with pytest.raises(FileNotFoundError):
            ShardReader(path)
    with pytest.raises(StorageError, match="cannot read nonsense://x"):
        ShardReader("nonsense://x")


def test_a_file_is_hashed_to_its_end(tmp_path):
    """Files are read in parts of 4 MiB: one that ends at a part's end, or a little beyond one."""
    for size in (0, 2**22, 2**22 + 1, 2**23 + 5):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "file").write_bytes(data)
        assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# --- all or nothing -------------------------------------------------------------------------------------


def full_disk(descriptor, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(shard, monkeypatch, call):
    """Whichever call fails: the error says what is kept and what to do, and the folder is as it was."""
    before = shard.read_bytes()
    monkeypatch.setattr(files.os, call, lambda *_: full_disk(None, None))
    with pytest.raises(StorageError, match=r"no space left for .*shard.*kept.*run the same command again"):
        write_shard(shard, make_header(first_row=0), make_rows())
    assert os.listdir(shard.parent) == ["shard"]
    assert shard.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be synced there")
def test_a_power_cut_finds_the_old_file_or_the_whole_new_one(tmp_path, monkeypatch):
    """The bytes are on the disk before they have their name, and the folder that says so before the call returns."""
    calls, sync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        found = os.fstat(descriptor)
        calls.append("folder" if found.st_ino == tmp_path.stat().st_ino else found.st_size)
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (calls.append("name"), replace(*paths)))
    write_atomically(tmp_path / "file", bytes(100))
    assert calls == [100, "name", "folder"]


def test_a_disk_that_fills_up_midway_leaves_no_half_file(tmp_path, monkeypatch):
    """Half of the bytes are accepted, then the disk is full."""
    plain = os.write

    def half(descriptor, data):
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "full")
        return plain(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(files.os, "write", half)
    with pytest.raises(StorageError):
        write_atomically(tmp_path / "file", bytes(1000))
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    """The system may take fewer bytes than offered; all arrive in the end."""
    plain = os.write
    monkeypatch.setattr(files.os, "write", lambda descriptor, data: plain(descriptor, data[:7]))
    write_atomically(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    """Not only full disks: the reason and the path are in the message."""
    with pytest.raises(StorageError, match=r"cannot write .*none.*No such file"):
        write_atomically(tmp_path / "none" / "file", b"x")


_KILLED = """
import os, sys, signal
import sparsekd.files as files
files.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(sys.argv[1], bytes(1000))
"""


def test_a_killed_writer_leaves_no_shard_and_its_remains_are_cleared(tmp_path):
    """kill -9 before the rename: only a temporary file is there, and the next writer removes it."""
    result = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "shard")], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "shard").exists()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".shard.")
    remove_stale_files(tmp_path)
    assert os.listdir(tmp_path) == []


def test_files_of_writers_at_work_are_left_alone(tmp_path):
    """A living process's file stays, and another host's for an hour; names of others are never touched."""
    mine = tmp_path / files._temporary_name("shard")
    other = tmp_path / ".shard.elsewhere.1.0123abcd.tmp"
    foreign = tmp_path / ".something.tmp"
    for path in (mine, other, foreign):
        path.touch()
    remove_stale_files(tmp_path)
    assert mine.exists()
    assert other.exists()
    for path in (other, foreign):
        os.utime(path, (time.time() - 4000,) * 2)
    remove_stale_files(tmp_path)
    assert not other.exists()
    assert foreign.exists()


# --- JSON -----------------------------------------------------------------------------------------------


def test_canonical_json_is_one_text_per_value():
    """Sorted, without spaces, ASCII; and it reads back."""
    assert canonical_json({"b": 1, "a": ["ö", None]}) == b'{"a":["\\u00f6",null],"b":1}'
    assert strict_json(canonical_json({"a": "ö"}), "here") == {"a": "ö"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


def test_strict_json_says_where():
    """The message begins with the file."""
    with pytest.raises(FormatError, match=r"^here: its JSON cannot be read: .*there twice among \['a', 'a'\]"):
        strict_json(b'{"a": 1, "a": 2}', "here")
