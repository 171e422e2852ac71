"""Downloads against a server on this machine that misbehaves as it is told to."""
import contextlib
import hashlib
import io
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

import data
from conftest import ROOT
from data import checkpoint_folder, download, hub, read_dialogues, read_zip

BODY = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
SPLITS = ("train", "validation", "test")


@dataclass
class Reply:
    """One answer of the server's. After `only` so many bytes of the body it hangs up or, with `stall`, falls silent."""
    body: bytes = BODY
    status: int = 200
    headers: dict = field(default_factory=dict)
    length: bool = True             # with Content-Length
    chunked: bool = False
    ranges: bool = True             # honours Range
    only: int | None = None
    stall: bool = False
    pause: float = 0                # seconds after each piece


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
        if reply.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif reply.length:
            headers["Content-Length"] = len(body)
        else:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = body[:reply.only]
        with contextlib.suppress(ConnectionError):
            for piece in (body[i:i + 50_000] for i in range(0, len(body), 50_000)):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if reply.chunked else piece)
                time.sleep(reply.pause)
            if reply.chunked and reply.only is None:
                self.wfile.write(b"0\r\n\r\n")
        if reply.stall:
            self.server.over.wait(30)
        self.close_connection = reply.only is not None or "Connection" in headers


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_PROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(requests.adapters.Retry, "sleep", lambda *_: None)      # it waits between retries: not here
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


def ranges(server):
    return [headers.get("Range") for _, headers in server.seen]


def paths(server):
    return [path for path, _ in server.seen]


def redirect(location, status=302, **headers):
    return Reply(b"", status, {"Location": location} | headers)


# ------------------------------------------------------------------------------------------------- one file

@pytest.mark.parametrize("reply", [Reply(), Reply(length=False), Reply(chunked=True), Reply(pause=0.01), Reply(b"")],
                         ids=["plain", "no Content-Length", "chunked", "slow", "empty"])
def test_a_file_arrives_whole_and_is_asked_for_once(server, fetch, cache, reply):
    assert fetch(reply).read_bytes() == fetch(Reply(b"other")).read_bytes() == reply.body
    assert ranges(server) == [None] and not (cache / "file.part").exists()


def test_a_renamed_repository_and_another_host_are_followed(server, cache):
    server.pages = {"/gpt2/resolve/main/big": [redirect("/openai-community/gpt2/resolve/main/big", 307)],
                    "/openai-community/gpt2/resolve/main/big":
                        [redirect(server.elsewhere + "/store", **{"X-Linked-Etag": f'"{SHA256}"'})],
                    "/store": [Reply(only=200_000), Reply()]}
    assert download(hub("gpt2/resolve/main/big"), cache / "big").read_bytes() == BODY
    assert paths(server) == 2 * list(server.pages)
    assert ranges(server)[-1] is not None                               # the cut is mended behind the redirects too


@pytest.mark.parametrize("kind", [{}, {"chunked": True}], ids=["plain", "chunked"])
def test_a_cut_connection_is_continued_where_it_broke(server, fetch, kind):
    assert fetch(Reply(only=200_000, **kind), Reply(only=50_000, **kind), Reply(**kind)).read_bytes() == BODY
    first, second, third = ranges(server)
    assert first is None
    assert 100_000 < int(second[6:-1]) <= 200_000 < int(third[6:-1]) + 50_000


@pytest.mark.parametrize("part, replies", [
    (BODY[:1_000], [Reply()]),                                          # what an earlier run left
    (b"x" * 1_000, [Reply(ranges=False)]),                              # the server ignores Range and sends all of it
    (BODY[:9], [Reply(only=200_000, ranges=False), Reply(ranges=False)]),
    (BODY, [Reply()]), (BODY + b"x", [Reply()]),                        # 416: nothing follows
    (b"", [Reply()])], ids=["continued", "ignored", "cut and ignored", "416, all there", "416, too much", "empty"])
def test_a_partial_file_is_completed_or_begun_again(fetch, part, replies):
    assert fetch(*replies, part=part).read_bytes() == BODY


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, fetch, status):
    assert fetch(Reply(b"busy", status), Reply(b"busy", status), Reply()).read_bytes() == BODY
    assert len(server.seen) == 3


@pytest.mark.parametrize("reply", [Reply(only=0), Reply(b"busy", 503), Reply(stall=True), Reply(only=0, stall=True)],
                         ids=["cut at once", "busy", "no answer", "no body"])
def test_a_server_that_never_answers_is_given_up(server, fetch, cache, monkeypatch, reply):
    """With the way to do it by hand."""
    monkeypatch.setattr(data, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match=f"cannot download {server.url}/file.*{re.escape(str(cache / 'file'))}") as error:
        fetch(reply)
    assert not isinstance(error.value, FileNotFoundError) and not (cache / "file").exists()


def test_a_stalled_server_is_left_and_asked_again(fetch, monkeypatch):
    monkeypatch.setattr(data, "TIMEOUT", 0.2)
    assert fetch(Reply(stall=True), Reply(only=200_000, stall=True), Reply()).read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_missing_file_is_said_at_once(server, fetch, status):
    with pytest.raises(FileNotFoundError, match=f"{server.url}/file.*{status}.*name"):
        fetch(Reply(b"no", status))
    assert len(server.seen) == 1


@pytest.mark.parametrize("status, headers", [(302, {"Location": "/file"}), (302, {"Location": "ftp://localhost/x"}),
                                             (418, {})], ids=["circle", "ftp", "teapot"])
def test_other_nonsense_is_an_error_with_the_address(server, fetch, status, headers):
    with pytest.raises(OSError, match=server.url):
        fetch(Reply(b"", status, headers))


@pytest.mark.parametrize("announced, known", [("0" * 64, None), (None, "0" * 64), (SHA256, "0" * 64)],
                         ids=["announced", "known", "known against announced"])
def test_a_wrong_checksum_is_said_and_the_file_deleted(server, fetch, cache, announced, known):
    server.pages["/store"] = [Reply()]
    headers = {"X-Linked-Etag": f'"{announced}"'} if announced else {}
    with pytest.raises(OSError, match=f"SHA-256 {SHA256}, expected {'0' * 64}.*deleted"):
        fetch(redirect("/store", **headers), sha256=known)
    assert not (cache / "file").exists() and not (cache / "file.part").exists()
    assert fetch(Reply(headers={"X-Linked-Etag": f'"{SHA256}"'})).read_bytes() == BODY


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
    download(hub("file"), cache / "file")
    assert paths(server) == ["/file", "/renamed", "/plain"]
    sent = [header for _, headers in server.seen for header in headers.items()]
    assert not any("secret" in value or name in ("Authorization", "Cookie") for name, value in sent)


# ------------------------------------------------------------------------------------------------- several processes

CHILD = """if True:
    import sys, data, requests
    print("ready", flush=True)
    sys.stdin.readline()
    data.download(*sys.argv[1:])"""


@pytest.fixture
def child(server, cache):
    """Starts a process that has imported all it needs, and downloads the file as soon as it reads a line."""
    def start():
        return subprocess.Popen([sys.executable, "-c", CHILD, server.url + "/file", cache / "file"], cwd=ROOT,
                                text=True, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE))
    return start


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_fetch_a_file_once(server, cache, child):
    server.pages["/file"] = [Reply(pause=0.05)]
    processes = [child(), child()]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 2
    for p in processes:
        go(p)
    assert [(p.communicate()[1].count("Traceback"), p.returncode) for p in processes] == [(0, 0)] * 2
    assert (cache / "file").read_bytes() == BODY and len(server.seen) == 1


def test_a_killed_download_is_continued(server, cache, child, fetch):
    body = BODY * 10
    server.pages["/file"] = [Reply(body, only=2_900_000, stall=True)]
    part = cache / "file.part"
    with child() as process:
        process.stdout.readline()
        go(process)
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        process.kill()
    assert fetch(Reply(body)).read_bytes() == body
    assert ranges(server)[0] is None and ranges(server)[1].startswith("bytes=")


# ------------------------------------------------------------------------------------------------- checkpoints and data

TOKENIZER = {"vocab.json": b"{}", "merges.txt": b"#version\n"}
UNUSED = dict.fromkeys(("tokenizer.json", "pytorch_model.bin"), b"unused")
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) for i in (1, 2)}
INDEX = json.dumps({"weight_map": dict(zip(("wte.weight", "wpe.weight", "ln_f.bias"), [*SHARDS, *SHARDS]))}).encode()


@pytest.mark.parametrize("name, repository, files", [
    ("gpt2", "gpt2", TOKENIZER | {"model.safetensors": BODY}),
    ("gpt2", "gpt2", TOKENIZER | {"model.safetensors": BODY} | UNUSED),
    ("dialogpt-small", "microsoft/DialoGPT-small",
     TOKENIZER | {"pytorch_model.bin": BODY, "tokenizer_config.json": b"{}"}),
    ("one/my.gpt", "one/my.gpt", {"tokenizer.json": b"{}", "model.safetensors": BODY, "added_tokens.json": b"{}"}),
    ("a/b", "a/b", TOKENIZER | {"model.safetensors.index.json": INDEX} | SHARDS),
    ("a/b", "a/b", TOKENIZER | {"pytorch_model.bin.index.json": INDEX} | SHARDS)],
    ids=["safetensors", "both", "pickle", "tokenizer.json", "shards", "pickled shards"])
def test_a_checkpoint_is_fetched_once_as_the_repository_has_it(server, name, repository, files):
    files = {"config.json": b"{}"} | files
    server.pages |= {f"/{repository}/resolve/main/{file}": [Reply(body)] for file, body in files.items()}
    folder = checkpoint_folder(name)
    there = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".lock"}
    assert there == {file: body for file, body in files.items() if body != b"unused"}
    server.pages.clear()
    server.seen.clear()
    assert checkpoint_folder(name) == folder and not server.seen        # from now on without a network


def test_a_busy_server_is_no_reason_for_other_weights(server):
    pages = {"config.json": Reply(b"{}"), "tokenizer.json": Reply(b"{}"), "model.safetensors": Reply(b"", 503),
             "pytorch_model.bin": Reply()}
    server.pages = {f"/gpt2/resolve/main/{file}": [reply] for file, reply in pages.items()}
    with pytest.raises(OSError, match="model.safetensors"):
        checkpoint_folder("gpt2")
    assert "/gpt2/resolve/main/pytorch_model.bin" not in paths(server)


@pytest.mark.parametrize("name", ["gpt-2", "a/b/c", "../no-such", "owner/", "https://example.org/x", "a b/c"])
def test_an_unknown_model_is_refused_without_asking_anyone(server, name):
    with pytest.raises(ValueError, match="tiny-gpt2.*dialogpt-large.*owner/name"):
        checkpoint_folder(name)
    assert server.seen == []


def test_a_repository_that_does_not_exist_is_named(server):
    with pytest.raises(FileNotFoundError, match="no-one/no-gpt.*name"):
        checkpoint_folder("no-one/no-gpt")


@pytest.mark.parametrize("use, name, file", [(checkpoint_folder, "gpt2", "models/gpt2/config.json"),
                                             (read_dialogues, "dailydialog", "dailydialog/train.zip"),
                                             (read_dialogues, "multiwoz", "multiwoz/train/dialogues_001.json")])
def test_without_a_network_the_error_says_which_file_to_put_where(cache, monkeypatch, use, name, file):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    monkeypatch.setattr(data, "MULTIWOZ", nowhere)
    with pytest.raises(OSError, match=f"{nowhere}/.*{re.escape(str(cache / file))}"):
        use(name)
    (cache / file).write_bytes(b"by hand")
    assert download("http://unused", cache / file).read_bytes() == b"by hand"


def test_without_a_home_the_variable_is_named(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("DYNAMIC_PROMPT_CACHE", raising=False)
    monkeypatch.setattr(data.Path, "home", homeless)
    with pytest.raises(OSError, match="DYNAMIC_PROMPT_CACHE"):
        checkpoint_folder("gpt2")


def zipped(split):
    """A zip as the Hub has it, with more in it than is wanted."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr(f"{split}/dialogues_emotion_{split}.txt", "0 0")
        archive.writestr(f"{split}/dialogues_{split}.txt", f"I am {split} . __eou__ Hello , hello , hello ! __eou__\n")
    return file.getvalue()


@pytest.fixture
def zips(server):
    zips = {split: zipped(split) for split in SPLITS}
    server.pages = {f"/datasets/roskoN/dailydialog/resolve/main/{split}.zip": [Reply(zips[split])] for split in SPLITS}
    return zips


def test_dailydialog_is_read_from_its_zips_and_nothing_is_unpacked(server, zips, tmp_path, monkeypatch):
    monkeypatch.setitem(data.DAILYDIALOG_SHA256, "train", hashlib.sha256(zips["train"]).hexdigest())
    for _ in range(2):                                                  # the second time from the cache
        expected = {split: [[f"I am {split} .", "Hello , hello , hello !"]] for split in SPLITS}
        assert read_dialogues("dailydialog") == expected
    assert paths(server) == list(server.pages)
    files = {file.name for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"}
    assert files == {f"{split}.zip" for split in SPLITS}


def test_another_train_zip_than_the_published_one_is_refused(zips):
    with pytest.raises(OSError, match="c5179ab5a9a86a77b9d29114087c6b82cc4cb366abea25a43a0c24be761133f7"):
        read_dialogues("dailydialog")


def test_a_broken_zip_is_refused_by_name(tmp_path):
    path, whole = tmp_path / "train.zip", zipped("train")
    path.write_bytes(whole)
    assert b"I am train" in read_zip(path, "train/dialogues_train.txt")
    middle = whole.index(b"train/dialogues_train.txt") + 40
    for broken in b"", whole[:-9], whole[:200], b"PK" + bytes(99), whole[:middle] + b"????" + whole[middle + 4:]:
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_zip(path, "train/dialogues_train.txt")


def test_multiwoz_is_fetched_file_by_file(server, monkeypatch):
    monkeypatch.setattr(data, "MULTIWOZ", server.url)
    numbers = {"train": range(1, 18), "dev": (1, 2), "test": (1, 2)}
    names = [f"/{split}/dialogues_{i:03}.json" for split in numbers for i in numbers[split]]
    for name in names:
        turns = [{"speaker": "USER", "utterance": name}, {"speaker": "SYSTEM", "utterance": "yes"}]
        server.pages[name] = [Reply(json.dumps([{"dialogue_id": "D1.json", "turns": turns}]).encode())]
    splits = read_dialogues("multiwoz")
    assert paths(server) == names == [query for split in splits.values() for query, _ in split]
