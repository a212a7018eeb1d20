"""core.files: the old content or the new one, whatever happens; locks, full disks, damaged files."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from transfuse.core import files
from transfuse.core.errors import BadInput, CorruptFile, Unavailable
from transfuse.core.files import (
    atomic_dir,
    atomic_write,
    check_writable,
    disk_guard,
    locked,
    read_tensors,
    sha256_file,
    sha256_json,
    write_tensors,
)

FORK = multiprocessing.get_context("fork")
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def killed(function, *arguments):
    """Run `function` in a process that must end by SIGKILL."""
    child = FORK.Process(target=function, args=arguments)
    child.start()
    child.join(20)
    assert child.exitcode == -signal.SIGKILL


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def fill(folder, text):
    for name in ("a", "b"):
        (folder / name).write_text(text)


def content(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


# --- atomic_write ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "raw"), [("é\n", "é\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write_makes_folders_and_replaces(tmp_path, data, raw):
    path = tmp_path / "deep" / "er" / "file"
    for _ in range(2):
        atomic_write(path, data)
        assert path.read_bytes() == raw
        assert path.stat().st_mode & 0o777 == 0o644
        assert names(path.parent) == ["file"]


def test_modes_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", "private")
        with atomic_dir(tmp_path / "out"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")])
def test_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        atomic_write(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    monkeypatch.undo()
    atomic_write(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, "old"])
def test_write_that_is_killed_leaves_the_old_state(tmp_path, step, before):
    path = tmp_path / "file"
    if before:
        path.write_text(before)

    def run():
        setattr(os, step, die)
        atomic_write(path, "new" * 10_000)

    killed(run)
    assert (path.read_text() if path.exists() else None) == before
    atomic_write(path, "new")  # what the killed process left is no hindrance
    assert path.read_text() == "new"


def test_write_to_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(_):
        raise NO_SPACE

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match=r"file: the disk is full; free space"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_write_where_a_file_or_folder_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in ("file/below", "file/far/below", "folder"):
        with pytest.raises(BadInput, match="cannot be written; choose a folder"):
            atomic_write(tmp_path / path, "x")
    assert names(tmp_path) == ["file", "folder"]


def test_readers_see_whole_files_only(tmp_path):
    path, texts = tmp_path / "file", {"a" * 50_000, "b" * 70_000}
    atomic_write(path, min(texts))
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        for text in texts:
            atomic_write(path, text)
    stop.set()
    reader.join()
    assert seen and seen <= texts


# --- atomic_dir --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", [True, False])
def test_dir_appears_whole_and_replaces(tmp_path, monkeypatch, exchange):
    if not exchange:  # as on systems that cannot swap two folders
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    target = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with atomic_dir(target, mark="a") as work:
            assert work.parent == target.parent
            fill(work, text)
            assert not target.exists() or content(target) == {"a": "first", "b": "first"}
        assert content(target) == {"a": text, "b": text}
        assert target.stat().st_mode & 0o777 == 0o755
        assert names(target.parent) == ["out"]


def test_dir_keeps_what_is_no_earlier_result(tmp_path):
    """A folder of other things is refused before any work, not emptied."""
    target = tmp_path / "models"
    (target / "mine").mkdir(parents=True)
    lost = r"holds files, and no transfuse\.json: they would be lost; choose"
    with pytest.raises(BadInput, match=lost), atomic_dir(target):
        raise AssertionError("the work was begun")
    assert names(tmp_path) == ["models"] and names(target) == ["mine"]
    (target / "mine").rmdir()
    for _ in range(2):  # an empty folder, then an earlier result
        with atomic_dir(target) as work:
            (work / "transfuse.json").write_text("{}")
    (target / "mine").mkdir()
    with atomic_dir(target, mark=None):
        pass
    assert not names(target)


@pytest.mark.parametrize("before", ["file", "link", "dangling"])
def test_dir_replaces_what_is_no_folder(tmp_path, before):
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("")
    if before == "file":
        target.write_text("old")
    else:
        target.symlink_to(elsewhere if before == "link" else tmp_path / "nowhere")
    if before == "dangling":
        with pytest.raises(BadInput, match="cannot be written"), atomic_dir(target, mark="a") as work:
            fill(work, "new")
        assert target.is_symlink()
    else:
        with atomic_dir(target, mark="a") as work:
            fill(work, "new")
        assert content(target) == {"a": "new", "b": "new"} and not target.is_symlink()
    assert names(tmp_path) == ["elsewhere", "out"] and names(elsewhere) == ["kept"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("stop"), SystemExit(1)])
@pytest.mark.parametrize("before", [None, "old"])
def test_dir_that_fails_leaves_the_old_state(tmp_path, before, error):
    target = tmp_path / "out"
    if before:
        target.mkdir()
        fill(target, before)
    with pytest.raises(type(error)), atomic_dir(target, mark="a") as work:
        (work / "a").write_text("half")
        raise error
    assert names(tmp_path) == (["out"] if before else [])
    assert not before or content(target) == {"a": "old", "b": "old"}
    with atomic_dir(target, mark="a") as work:
        fill(work, "new")
    assert content(target) == {"a": "new", "b": "new"}


@pytest.mark.parametrize("call", [1, 2])
def test_dir_puts_the_old_folder_back(tmp_path, monkeypatch, call):
    """Where folders cannot be swapped there are two renames, and the second may fail."""
    target, count, replace = tmp_path / "out", 0, os.replace
    target.mkdir()
    fill(target, "old")

    def fail(source, sink):
        nonlocal count
        count += 1
        if count == call:
            raise RuntimeError("stop")
        replace(source, sink)

    monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RuntimeError, match="stop"), atomic_dir(target, mark="a") as work:
        fill(work, "new")
    assert content(target) == {"a": "old", "b": "old"} and names(tmp_path) == ["out"]


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("step", ["body", "replace", "exchange", "rmtree"])
def test_dir_that_is_killed_leaves_one_whole_state(tmp_path, before, step):
    target = tmp_path / "out"
    if before:
        target.mkdir()
        fill(target, before)

    def run():
        if step == "replace":
            os.replace = die
        elif step == "exchange":
            files._exchanged = die
        elif step == "rmtree":
            shutil.rmtree = die
        with atomic_dir(target, mark="a") as work:
            (work / "a").write_text("new")
            if step == "body":
                die()
            (work / "b").write_text("new")
        die()  # swapped in one step: os.replace was never called

    killed(run)
    finished = step == "rmtree" or (step == "replace" and before) or (step == "exchange" and not before)
    wanted = "new" if finished else before
    assert target.exists() == (wanted is not None)
    assert wanted is None or content(target) == {"a": wanted, "b": wanted}
    with atomic_dir(target, mark="a") as work:
        fill(work, "newest")
    assert content(target) == {"a": "newest", "b": "newest"}


def test_dir_is_never_missing_while_it_is_replaced(tmp_path):
    target = tmp_path / "out"
    with atomic_dir(target, mark="a") as work:
        fill(work, "0")
    missing, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            if not os.path.exists(target):
                missing.append(time.time())

    watcher = threading.Thread(target=look)
    watcher.start()
    for i in range(100):
        with atomic_dir(target, mark="a") as work:
            fill(work, str(i))
    stop.set()
    watcher.join()
    assert not missing


@pytest.mark.parametrize(
    "error", [NO_SPACE, SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_dir_on_a_full_disk(tmp_path, error):
    with pytest.raises(Unavailable, match="out: the disk is full"), atomic_dir(tmp_path / "out") as work:
        (work / "a").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_dir_never_takes_the_current_folders_place(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "mine").write_text("kept")
    monkeypatch.chdir(tmp_path / "deep" / "er")
    for path in (".", "..", tmp_path, tmp_path / "deep" / "er"):
        with pytest.raises(BadInput, match="holds the current folder; choose"), atomic_dir(path) as work:
            fill(work, "new")
    assert names(tmp_path) == ["deep", "mine"] and Path.cwd() == tmp_path / "deep" / "er"
    with atomic_dir("out") as work:
        fill(work, "new")
    assert names(Path.cwd()) == ["out"]


# --- disk_guard, check_writable ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OSError(errno.ENOSPC, "x"), Unavailable, "disk is full; free space or choose another folder"),
        (OSError(errno.EDQUOT, "x"), Unavailable, "disk is full"),
        (OSError(errno.EACCES, "x"), BadInput, "cannot be written; choose a folder you can write to"),
        (OSError(errno.EPERM, "x"), BadInput, "cannot be written"),
        (OSError(errno.EROFS, "x"), BadInput, "cannot be written"),
        (OSError(errno.ENOTDIR, "x"), BadInput, "cannot be written"),
        (OSError(errno.EEXIST, "x"), BadInput, "cannot be written"),
        (OSError(errno.EISDIR, "x"), BadInput, "cannot be written"),
        (SafetensorError("Error while serializing: I/O error: full (os error 28)"), Unavailable, "is full"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), BadInput, "cannot be written"),
    ],
)
def test_disk_guard_says_what_to_do(error, kind, says):
    with pytest.raises(kind, match=says) as caught, disk_guard(Path("here/out")):
        raise error
    assert "here/out" in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        OSError("without a number"),
        ValueError("(os error 28)"),
        SafetensorError("header too small"),
        BadInput("a", 1, "is wrong", "mend it"),
        KeyboardInterrupt(),
    ],
)
def test_disk_guard_lets_other_errors_through(error):
    with pytest.raises(type(error)) as caught, disk_guard(Path("out")):
        raise error
    assert caught.value is error


def test_disk_guard_does_not_blame_its_path_for_other_files(tmp_path):
    for name in ("there", "elsewhere"):
        (tmp_path / name).mkdir()
    for guard in (disk_guard, atomic_dir, locked):
        for attempt in (lambda: os.mkdir(tmp_path / "elsewhere"), lambda: open(__file__ + "/below")):  # noqa: SIM115
            with pytest.raises((FileExistsError, NotADirectoryError)), guard(tmp_path / "there" / "out"):
                attempt()
        with pytest.raises(BadInput, match="out' cannot be written"), guard(tmp_path / "there" / "out"):
            os.mkdir(tmp_path / "there")


def test_check_writable(tmp_path, monkeypatch):
    assert check_writable(tmp_path) == tmp_path
    assert check_writable(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert names(tmp_path) == []  # it only looks
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match=r"^output = .* is not a folder; give a folder path"):
            check_writable(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_writable("~/out") == tmp_path / "out"
    assert check_writable("~nobody-at-all/out") == Path("~nobody-at-all/out")
    monkeypatch.chdir(tmp_path)
    assert check_writable("out") == Path("out")


def test_check_writable_asks_the_nearest_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(BadInput, match=r"^folder = .*deep' cannot be written; choose a folder"):
        check_writable(tmp_path / "new" / "deep", "folder")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


# --- locks -------------------------------------------------------------------------------------------------


def test_lock_lets_one_process_in(tmp_path):
    lock, log = tmp_path / "deep" / "lock", tmp_path / "log"

    def work(name):
        with locked(lock):
            for word in ("in", "out"):
                with open(log, "a") as stream:
                    stream.write(f"{name} {word}\n")
                time.sleep(0.05)

    children = [FORK.Process(target=work, args=(str(i),)) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    lines = log.read_text().split()
    assert sorted(lines[::4]) == ["0", "1", "2", "3"]
    assert lines[::4] == lines[2::4] and set(lines[1::4]) == {"in"} and set(lines[3::4]) == {"out"}


def test_lock_keeps_threads_apart(tmp_path):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        with locked(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_lock_ends_with_its_holder(tmp_path):
    lock = tmp_path / "lock"
    with pytest.raises(KeyError), locked(lock):
        raise KeyError

    def hold():
        with locked(lock):
            die()

    killed(hold)
    with locked(lock):
        assert lock.exists()


def test_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"), locked(tmp_path / "file" / "lock"):
        pass


# --- checksums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 7, 3 << 20])
def test_sha256_file(tmp_path, monkeypatch, size):
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # as on Python 3.10
    assert sha256_file(str(tmp_path / "file")) == hashlib.sha256(data).hexdigest()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=40)
@given(VALUES, VALUES)
def test_sha256_json_is_a_function_of_the_value(a, b):
    assert sha256_json(a) == sha256_json(json.loads(json.dumps(a)))
    assert (sha256_json(a) == sha256_json(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    )


def test_sha256_json_ignores_the_order_of_keys_only():
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": (1, 2), "a": 1})
    assert sha256_json([1, 2]) != sha256_json([2, 1])
    assert sha256_json({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert sha256_json(Path("a")) == sha256_json("a")


# --- safetensors -------------------------------------------------------------------------------------------


@pytest.fixture
def tensors():
    return {
        "whole": torch.arange(6.0).reshape(2, 3),
        "turned": torch.arange(6).reshape(2, 3).T,  # not contiguous
        "part": torch.arange(10.0)[3:5],  # of a larger storage
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "number": torch.tensor(3),
        "none": torch.empty(0, 4),
        "learnt": torch.ones(2, requires_grad=True),
    }


def test_tensors_round_trip(tmp_path, tensors):
    path = tmp_path / "deep" / "x.safetensors"
    metadata = {"text": "1", "number": 1, "list": [None, 0.5], "unicode": "Ünal"}
    write_tensors(path, tensors, metadata)
    found, read = read_tensors(path)
    assert read == metadata and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach())
        assert not found[name].requires_grad
    write_tensors(path, {"a": torch.zeros(1)})
    assert read_tensors(path)[1] == {} and names(path.parent) == ["x.safetensors"]


def test_metadata_of_others_stays_text(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"format": "pt", "broken": '{"a'})
    assert read_tensors(str(path))[1] == {"format": "pt", "broken": '{"a'}


def test_tensors_that_share_memory_are_written_in_full(tmp_path):
    base = torch.arange(12.0)
    given = {"tied": base, "again": base, "start": base[:8], "end": base[4:], "turned": base.view(3, 4).T}
    write_tensors(tmp_path / "t.safetensors", given)
    found, _ = read_tensors(tmp_path / "t.safetensors")
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)


def test_truncated_tensors_are_named(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"a": 1})
    data = path.read_bytes()
    for size in (*range(0, len(data), 13), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CorruptFile, match=r"x\.safetensors' is not a readable safetensors file"):
            read_tensors(path)
    path.write_bytes(data)
    assert len(read_tensors(path)[0]) == len(tensors)


def test_other_files_are_refused_unopened(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "x.safetensors"
    body = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()  # a pickle that would leave a file behind
    for data in (body, b"PK\x03\x04" + body, b"{}", b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(CorruptFile, match="restore it or make it again"):
            read_tensors(path)
    assert not mark.exists()
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(BadInput, match="does not exist; give a safetensors file"):
            read_tensors(missing)


def test_write_tensors_on_a_full_disk_keeps_the_old_file(tmp_path, tensors, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1)})

    def full(_):
        raise NO_SPACE

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="disk is full"):
        write_tensors(path, tensors)
    assert torch.equal(read_tensors(path)[0]["a"], torch.ones(1)) and names(tmp_path) == ["x.safetensors"]
