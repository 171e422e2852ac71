"""Downloads against a server on this machine that misbehaves as it is told to."""
import contextlib
import hashlib
import io
import random
import re
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

import data
from data import SPLITS, checkpoint_folder, download, hub_url, read_dialogues

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@dataclass
class Reply:
    """One answer of the server's. After `only` so many bytes of the body it hangs up or, with `stall`, falls silent."""
    body: bytes = BODY
    status: int = 200
    headers: dict = field(default_factory=dict)
    ranges: bool = True             # honours Range
    only: int | None = None
    stall: bool = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.seen.append((self.path, self.headers))
        script = self.server.pages.get(self.path, [Reply(b"", 404)])
        reply = script.pop(0) if len(script) > 1 else script[0]         # the last one goes for every further request
        if reply.stall and reply.only is None:
            return self.server.over.wait(30)                            # never answers at all
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and reply.ranges and reply.status == 200 else 0
        body, headers, status = reply.body[start:], dict(reply.headers), reply.status
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(reply.body) - 1}/{len(reply.body)}"
        if start >= len(reply.body) > 0:
            body, status, headers["Content-Range"] = b"", 416, f"bytes */{len(reply.body)}"
        headers["Content-Length"] = len(body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = body[:reply.only]
        with contextlib.suppress(ConnectionError):
            for piece in (body[i:i + 50_000] for i in range(0, len(body), 50_000)):
                self.wfile.write(piece)
        if reply.stall:
            self.server.over.wait(30)
        self.close_connection = reply.only is not None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_PROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)       # it waits between tries: not here
    return tmp_path / "cache"


@pytest.fixture
def server(cache, monkeypatch):
    """server.pages: path -> its replies, one per request; server.seen: what was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.seen, server.over = {}, [], threading.Event()
    server.url, server.elsewhere = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(server, cache):
    """Replies of the server's to one address -> the path of what a download of it brought."""
    def fetch(*replies, part=None, sha256=None):
        cache.mkdir(exist_ok=True)
        if part is not None:
            (cache / "file.part").write_bytes(part)
        server.pages["/file"] = list(replies)
        return download(server.url + "/file", cache / "file", sha256)
    return fetch


def paths(server):
    return [path for path, _ in server.seen]


def redirect(location, status=302, **headers):
    return Reply(b"", status, {"Location": location} | headers)


# ------------------------------------------------------------------------------------------------- one file

@pytest.mark.parametrize("stall", [False, True], ids=["cut", "stalled"])
def test_a_broken_transfer_is_continued_where_it_broke(server, fetch, monkeypatch, stall):
    """And a server that is busy at first is asked again."""
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    replies = Reply(b"busy", 503), Reply(only=200_000, stall=stall), Reply(only=50_000), Reply()
    assert fetch(*replies).read_bytes() == BODY
    busy, first, second, third = [int(headers["Range"][6:-1]) for _, headers in server.seen]
    assert busy == first == 0 and 100_000 < second <= 200_000 < third + 50_000
    assert fetch(Reply(b"other")).read_bytes() == BODY and len(server.seen) == 4        # it is there: nobody is asked


@pytest.mark.parametrize("part, replies", [
    (BODY[:1_000], [Reply()]),                                          # what an earlier run left
    (b"x" * 1_000, [Reply(only=200_000, ranges=False), Reply(ranges=False)]),   # the server sends all of it each time
    (BODY + b"x", [Reply()])], ids=["continued", "Range ignored", "416, too much"])
def test_a_partial_file_is_completed_or_begun_again(fetch, part, replies):
    assert fetch(*replies, part=part).read_bytes() == BODY


@pytest.mark.parametrize("reply", [Reply(only=0), Reply(b"busy", 503), Reply(stall=True)], ids=["cut", "busy", "mute"])
def test_a_server_that_is_no_help_is_given_up(server, fetch, cache, monkeypatch, reply):
    """With the way to do it by hand."""
    monkeypatch.setattr(data, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match=f"cannot download {server.url}/file.*{re.escape(str(cache / 'file'))}") as error:
        fetch(reply)
    assert not isinstance(error.value, FileNotFoundError) and not (cache / "file").exists()


@pytest.mark.parametrize("announced, known", [("0" * 64, None), (SHA256, "0" * 64)])
def test_a_wrong_checksum_is_said_and_the_file_deleted(server, fetch, cache, announced, known):
    server.pages["/store"] = [Reply()]
    with pytest.raises(OSError, match=f"SHA-256 {SHA256}, expected {'0' * 64}.*deleted"):
        fetch(redirect("/store", **{"X-Linked-Etag": f'"{announced}"'}), sha256=known)
    assert not (cache / "file").exists() and not (cache / "file.part").exists()
    assert fetch(redirect("/store", **{"X-Linked-Etag": f'"{"0" * 40}"'})).read_bytes() == BODY      # git's, no SHA-256


def test_no_token_is_ever_sent(server, cache, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("".join(f"machine {host} login me password secret\n"
                                             for host in ("127.0.0.1", "localhost")))
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.delenv("NETRC", raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "secret")
    server.pages = {"/plain": [Reply()], "/file": [redirect("/renamed")],
                    "/renamed": [redirect(server.elsewhere + "/plain")]}
    requests.get(server.url + "/plain")
    assert "Authorization" in server.seen.pop()[1]                      # requests alone would send it
    download(hub_url("file"), cache / "file")
    assert paths(server) == ["/file", "/renamed", "/plain"]
    sent = [header for _, headers in server.seen for header in headers.items()]
    assert not any("secret" in value or name in ("Authorization", "Cookie") for name, value in sent)


def test_a_file_that_several_want_at_once_is_whole_for_each(server, cache):
    server.pages["/file"] = [Reply()]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: download(server.url + "/file", cache / "file"), range(4)))
    assert [path.read_bytes() for path in paths] == [BODY] * 4


# ------------------------------------------------------------------------------------------------- checkpoints and data

TOKENIZER = {"vocab.json": b"{}", "merges.txt": b"#version\n"}
UNUSED = {"vocab.json": b"unused", "merges.txt": b"unused", "pytorch_model.bin": b"unused"}


@pytest.mark.parametrize("name, repository, files", [
    ("gpt2", "gpt2", {"tokenizer.json": b"{}", "model.safetensors": BODY} | UNUSED),
    ("dialogpt-small", "microsoft/DialoGPT-small", TOKENIZER | {"pytorch_model.bin": BODY, "added_tokens.json": b"{}"}),
    ("one/my.gpt", "one/my.gpt", TOKENIZER | {"model.safetensors": BODY, "tokenizer_config.json": b"{}"})])
def test_a_checkpoint_is_fetched_once_as_the_repository_has_it(server, name, repository, files):
    files = {"config.json": b"{}"} | files
    server.pages |= {f"/{repository}/resolve/main/{file}": [Reply(body)] for file, body in files.items()}
    folder = checkpoint_folder(name)
    there = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".part"}
    assert there == {file: body for file, body in files.items() if body != b"unused"}
    server.pages.clear()
    server.seen.clear()
    assert checkpoint_folder(name) == folder and not server.seen        # from now on without a network


def test_a_busy_server_is_no_reason_for_other_weights(server):
    pages = {"config.json": Reply(b"{}"), "tokenizer.json": Reply(b"{}"), "model.safetensors": Reply(b"", 503)}
    server.pages = {f"/gpt2/resolve/main/{file}": [reply] for file, reply in pages.items()}
    with pytest.raises(OSError, match="cannot download .*model.safetensors"):
        checkpoint_folder("gpt2")


@pytest.mark.parametrize("name", ["gpt-2", "../no-such", "https://example.org/x"])
def test_an_unknown_model_is_refused_without_asking_anyone(server, name):
    with pytest.raises(ValueError, match="tiny-gpt2.*dialogpt-large.*owner/name"):
        checkpoint_folder(name)
    assert server.seen == []


def test_a_repository_that_does_not_exist_is_named(server):
    with pytest.raises(FileNotFoundError, match="no-one/no-gpt has no public config.json"):
        checkpoint_folder("no-one/no-gpt")


def zipped(split):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr(f"{split}/dialogues_{split}.txt", f"I am {split} . __eou__ Hello , hello , hello ! __eou__\n")
    return file.getvalue()


def test_dailydialog_is_read_from_its_zips_and_nothing_is_unpacked(server, cache, tmp_path, monkeypatch):
    zips = {split: zipped(split) for split in SPLITS}
    server.pages = {f"/datasets/roskoN/dailydialog/resolve/main/{split}.zip": [Reply(zips[split])] for split in SPLITS}
    with pytest.raises(OSError, match="c5179ab5a9a86a77b9d29114087c6b82cc4cb366abea25a43a0c24be761133f7"):
        read_dialogues("dailydialog")                                   # it is not the published train.zip
    monkeypatch.setitem(data.DAILYDIALOG_SHA256, "train", hashlib.sha256(zips["train"]).hexdigest())
    expected = {split: [[f"I am {split}.", "Hello, hello, hello!"]] for split in SPLITS}
    assert read_dialogues("dailydialog") == expected == read_dialogues("dailydialog")   # the second time from the cache
    assert len(server.seen) == 4
    files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {f"{split}.zip" for split in SPLITS}
    broken = cache / "dailydialog/validation.zip"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(ValueError, match=re.escape(str(broken)) + ".*delete it"):
        read_dialogues("dailydialog")
