"""What the tests of train.py and evaluate.py share: a small model, a few dialogues, and runs trained with them once."""
import contextlib
import functools
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from conftest import ROOT
import evaluate
import train
from model import GPT, GPTConfig

torch.set_num_threads(1)         # more are slower at this size, and very slow where other programs run
TEMPORARY = tempfile.TemporaryDirectory(prefix="prompt-tests-")         # goes when Python ends


def write_small(folder):
    """Write a checkpoint of random weights, 32 wide, and a few of the sample dialogues -> the flags to train with."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=512, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape) * 0.2)              # large enough that it talks
    gpt.save_pretrained(folder / "gpt")
    words = json.loads((ROOT / "tiny/tiny-gpt2/vocab.json").read_text(encoding="utf-8"))        # 256 bytes, merges
    vocab = {word: i for word, i in words.items() if i < 511} | {"<|endoftext|>": 511}
    merges = (ROOT / "tiny/tiny-gpt2/merges.txt").read_text(encoding="utf-8").splitlines()[:1 + 255]
    (folder / "gpt/vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "gpt/merges.txt").write_text("\n".join(merges), encoding="utf-8")
    lines = {split: (ROOT / f"tiny/dialogues/{split}.txt").read_text(encoding="utf-8").splitlines()
             for split in ("train", "validation", "test")}
    some = {"train": lines["train"][:12], "validation": lines["validation"][:3],
            "test": lines["test"][:3] + lines["train"][:1]}         # so that some queries of the test are seen
    (folder / "data").mkdir()
    for split, dialogues in some.items():
        (folder / f"data/{split}.txt").write_text("\n".join(dialogues), encoding="utf-8")
    return ["--model", folder / "gpt", "--data", folder / "data", "--max-query", 16, "--max-response", 16,
            "--batch-size", 8, "--epochs", 2, "--dtype", "float32"]


SMALL = write_small(Path(TEMPORARY.name))
MODEL, DATA = SMALL[1], SMALL[3]


def start(method, *flags, **streams):
    """Run train.py with the small model."""
    return run(train, "--method", method, *SMALL, *flags, **streams)


@functools.cache
def finished(method, *flags):
    """The folder of a run that nothing disturbed. It is shared: look, don't touch."""
    folder = Path(tempfile.mkdtemp(dir=TEMPORARY.name)) / method
    ok(start(method, *flags, "--out", folder))
    return folder


def run(program, *arguments, stdin=b"", **streams):
    """Run train or evaluate with these arguments, in this process -> status, out, err. Bugs raise."""
    files = [io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", write_through=True) for text in (stdin, b"", b"")]
    streams = dict(zip(("stdin", "stdout", "stderr"), files)) | streams
    with mock.patch.multiple(sys, argv=[program.__file__, *map(str, arguments)], **streams):
        try:
            evaluate.run_command(program.main)
            status = 0
        except SystemExit as end:
            status = end.code or 0
    out, err = (file.buffer.getvalue().decode("utf-8") for file in files[1:])
    return SimpleNamespace(status=status, out=out, err=err)


def ok(ended):
    assert (ended.status, ended.err) == (0, "")
    return ended


def failed(ended, status, *words):
    """It ended with this status and one sentence with these words in it."""
    assert ended.status == status, ended.out + ended.err
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    for word in words:
        assert str(word) in ended.err
    return ended


@contextlib.contextmanager
def on_call(owner, name, number, action):
    """Just before the number-th call of owner.name, do something first."""
    function, calls = getattr(owner, name), itertools.count(1)

    def stand_in(*args, **options):
        if next(calls) == number:
            action()
        return function(*args, **options)
    with mock.patch.object(owner, name, stand_in):
        yield


def interrupt(*_):
    raise KeyboardInterrupt


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def results_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def log_of(folder):
    """log.jsonl without the clock."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines_of(folder / "log.jsonl")]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_run(folder, other):
    """To the bit."""
    for file in ("best.pt", "generations.jsonl", "results.json"):
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file
    assert log_of(folder) == log_of(other)
