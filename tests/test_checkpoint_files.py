"""Checkpoint files from strangers: sound ones load as the reference library loads them, all others are refused."""
import json
import os
import pickle
import random
import tracemalloc
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from model import DTYPES, GPT, GPTConfig, is_conv1d, read_safetensors, replace, write_safetensors

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
SHAPE = {"vocab_size": 11, "n_positions": 8, "n_embd": 6, "n_layer": 1, "n_head": 3}
ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NASTY = [                               # what a stranger may put where a header has something else
    None, True, -1, 0, 1, 0.5, 1e300, 2**31, 2**63, 2**64, 10**30, "", "F16", "I32", "F7", [], {}, [[]], [-1],
    [6, 6, 0], [0, 2**62, 2**62, 2**62], [2**32, 2**32], [0, 1e9], [0, 2**40], [3, 2, 1], ["6"], "\x1b[31m", "\ud800"]


def layout(header, data=b"", length=None):
    """The bytes of a safetensors file: header (an object, or bytes in its place), data, and what the length claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@contextmanager
def refused(path, match=None):
    """What happens inside must be refused in one short printable sentence that names the file, using little memory."""
    with little_memory(), pytest.raises(ValueError, match=match) as caught:
        yield caught
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@contextmanager
def little_memory(limit=4_000_000):
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first time, this makes torch import 70 MB of itself, which `little_memory` should not count."""
    torch.empty(1, device="meta").normal_()


@pytest.fixture(scope="module")
def tensors():
    """A GPT-2's weights as they stand in a file."""
    torch.manual_seed(0)
    state = GPT(GPTConfig(**SHAPE)).state_dict()
    return {name: t.t().contiguous() if is_conv1d(name) else t for name, t in state.items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


# ------------------------------------------------------------------------------------------------ sound safetensors

EVERY_KIND = {
    **{f"kind.{name}": (torch.arange(15).view(3, 5) * 1.7).to(dtype) for name, dtype in DTYPES.items()},
    "scalar": torch.tensor(-1e4), "empty": torch.zeros(0, 7), "names may hold \"é\n\0": torch.arange(4.0)}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(EVERY_KIND, path, metadata={"format": "pt"})
    assert_same_tensors(dict(read_safetensors(path)), EVERY_KIND)


def test_the_library_reads_what_we_write(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, EVERY_KIND | {"view": torch.arange(6.0).view(2, 3).t()})
    assert_same_tensors(safetensors.torch.load_file(path), EVERY_KIND | {"view": torch.arange(6.0).view(2, 3).t()})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}              # transformers asks for it


def test_tensors_may_be_modified_and_outlive_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(layout({"a": ONE}, bytes(24)))
    (_, t), = read_safetensors(path)
    path.unlink()
    assert torch.equal(t.add_(1), torch.ones(2, 3))


# ----------------------------------------------------------------------------------------------- broken safetensors

def one(**changes):
    return layout({"a": ONE | changes}, bytes(24))


def two(first, second, data):
    return layout({"a": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
                   "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second}}, bytes(data))


BROKEN = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "length beyond the file": layout({"a": ONE}, bytes(24), length=1000),
    "length of a header and one byte more": layout({"a": ONE}, length=len(json.dumps({"a": ONE})) + 1),
    "length just under the cap": layout({"a": ONE}, bytes(24), length=99_999_999),
    "length of nearly 2**64": layout({"a": ONE}, bytes(24), length=2**64 - 1),
    "length too small": layout({"a": ONE}, bytes(24), length=20),
    "not UTF-8": layout(b'{"\xff": 1}'),
    "UTF-16": layout(json.dumps({"a": ONE}).encode("utf-16"), bytes(24)),
    "text": layout(b"hello"),
    "a list": layout(b"[]"),
    "a number": layout(b"1"),
    "two objects": layout(b"{}{}"),
    "depth": layout(b'{"a":' * 100_000),
    "digits": layout(b'{"a":' + b"9" * 10_000 + b"}"),
    "entry is a list": layout({"a": [ONE]}, bytes(24)),
    "entry is empty": layout({"a": {}}, bytes(24)),
    "entry lacks its offsets": layout({"a": {"dtype": "F32", "shape": [2, 3]}}, bytes(24)),
    "dtype unknown": one(dtype="F31"),
    "dtype in lower case": one(dtype="f32"),
    "dtype is a list": one(dtype=["F32"]),
    "dtype too wide for its bytes": one(dtype="F64"),
    "shape too small for its bytes": one(shape=[2, 2]),
    "shape negative": one(shape=[-2, -3]),
    "shape of floats": one(shape=[2.0, 3.0]),
    "shape of booleans": one(shape=[True, 6]),
    "shape of text": one(shape=["2", "3"]),
    "shape is a number": one(shape=6),
    "shape is null": one(shape=None),
    "shape overflows to its bytes": one(shape=[2**62, 4], data_offsets=[0, 0]),
    "shape overflows around a zero": layout({"a": ONE | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}),
    "shape of many huge numbers": one(shape=[2**62] * 3000),
    "offsets promise a terabyte": one(shape=[2**38], data_offsets=[0, 2**40]),
    "offsets beyond the file": one(shape=[2, 4], data_offsets=[0, 32]),
    "offsets in reverse": one(data_offsets=[24, 0]),
    "offsets negative": one(data_offsets=[-24, 0]),
    "offsets of floats": one(data_offsets=[0.0, 24.0]),
    "one offset": one(data_offsets=[24]),
    "three offsets": one(data_offsets=[0, 24, 24]),
    "overlap": two([0, 10], [9, 20], 20),
    "the same bytes twice": two([0, 10], [0, 10], 10),
    "gap": two([0, 10], [11, 20], 20),
    "gap in front": two([1, 10], [10, 20], 20),
    "trailing byte": two([0, 10], [10, 20], 21),
    "missing byte": two([0, 10], [10, 20], 19),
}
STRICTER = {                            # the library lets these pass; in a GPT-2 checkpoint they can only be a mistake
    "a name twice": layout(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2), bytes(24)),
    "a key too many": one(offsets=[0, 24]),
}


@pytest.mark.parametrize("case", [*BROKEN, *STRICTER])
def test_broken_files_are_refused(case, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((BROKEN | STRICTER)[case])
    with refused(path):
        list(read_safetensors(path))
    if case in BROKEN:
        with pytest.raises(SafetensorError):
            safetensors.torch.load_file(path)


def test_a_header_over_100_mb_is_not_even_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(layout(b"", length=100_000_001))
    os.truncate(path, 200_000_000)                              # sparse: takes no room on the disk
    with refused(path, match="100 MB"):
        list(read_safetensors(path))


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\ud800"])
@pytest.mark.parametrize("dtype", ["F32", "I32"])
def test_names_cannot_break_the_sentence(name, dtype, folder):
    """A stranger's names end up in errors: control characters and lone surrogates must not reach the terminal."""
    (folder / "model.safetensors").write_bytes(layout({name: ONE | {"dtype": dtype}}, bytes(24)))
    with refused(folder):
        GPT.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------------------- fuzz

def flip(r, good):
    for _ in range(r.choice([1, 1, 2, 8])):
        good[r.randrange(len(good))] ^= 1 << r.randrange(8)
    return good


def flip_header(r, good):
    """The same, among the bytes where it hurts."""
    end = 8 + int.from_bytes(good[:8], "little")
    return flip(r, good[:end]) + good[end:]


def truncate(r, good):
    return good[:r.randrange(len(good))]


def insert(r, good):
    at = r.randrange(r.choice([12, 1500, len(good)]))
    good[at:at] = r.choice([r.randbytes(r.randint(1, 9)), bytes(r.randint(1, 9)), b'"', b"[", b",", b"9", b"\\ud800"])
    return good


def splice(r, good):
    """Cut out a piece, or write one place's bytes over another's."""
    a, b, n = r.randrange(len(good)), r.randrange(len(good)), r.randint(1, 40)
    good[a:a + n] = r.choice([b"", good[b:b + n]])
    return good


def edit_length(r, good):
    n = int.from_bytes(good[:8], "little")
    n = r.choice([n + r.randint(-20, 20), r.randrange(2 * n), r.getrandbits(r.randint(1, 64))])
    return n.to_bytes(8, "little") + good[8:]


def edit_header(r, good):
    """Sound JSON with something else in it."""
    end = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:end])
    name, other = r.sample(sorted(header), 2)
    field = r.choice(["dtype", "shape", "data_offsets"])
    change = r.choice(["entry", "field", "number", "rename", "swap", "borrow", "drop"])
    if change == "entry":
        header[name] = r.choice(NASTY)
    elif change == "field":
        header[name][field] = r.choice(NASTY)
    elif change == "number":
        numbers = header[name][r.choice(["shape", "data_offsets"])]
        numbers[r.randrange(len(numbers))] = r.choice([*NASTY, *range(30)])
    elif change == "rename":
        header[r.choice(["", "x", "transformer." + other, name + "\0", "__metadata__"])] = header.pop(name)
    elif change == "swap":
        header[name], header[other] = header[other], header[name]
    elif change == "borrow":
        header[name][field] = header[other][field]
    else:
        del header[name]
    return layout(header, good[end:])


@pytest.mark.parametrize("mutate", [flip, flip_header, truncate, insert, splice, edit_length, edit_header])
def test_mutated_safetensors(mutate, tensors, folder):
    """300 mutations of each kind: each is refused with a ValueError, or loads the same names and shapes as before."""
    path, good = folder / "model.safetensors", safetensors.torch.save(tensors)
    for seed in range(300):
        path.write_bytes(mutate(random.Random(seed), bytearray(good)))
        try:
            with little_memory(limit=100_000):
                found = dict(read_safetensors(path))
        except ValueError as error:
            assert str(path) in str(error), seed
            continue
        theirs = safetensors.torch.load(path.read_bytes())              # what we accept, the library reads the same
        assert {name: raw(t) for name, t in found.items()} == {name: raw(t) for name, t in theirs.items()}, seed
        if kinds(found) != kinds(tensors):                              # a sound file, but of another model
            with pytest.raises(ValueError):
                GPT.from_pretrained(folder)


def raw(t):
    return t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()


def kinds(tensors):
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("mutate", [flip, truncate, insert, splice])
def test_mutated_pickles(mutate, zipped, tensors, folder):
    """100 mutations of each kind, of torch's new and old format: each is refused with a ValueError, or loads."""
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    for seed in range(100):
        path.write_bytes(mutate(random.Random(seed), bytearray(good)))
        try:
            state = GPT.from_pretrained(folder).state_dict()
        except ValueError as error:
            assert str(path) in str(error), seed
        except Exception as error:
            pytest.fail(f"seed {seed}: {error!r}")
        else:
            assert state.keys() == tensors.keys()


# ------------------------------------------------------------------------------------------------ pytorch_model.bin

class Malice:
    """What runs on unpickling: creates the file "pwned" in the working folder."""

    def __reduce__(self):
        return open, ("pwned", "w")


def save_plain(thing, path):
    path.write_bytes(pickle.dumps(thing))


def save_zip(thing, path):
    torch.save(thing, path)


def save_legacy(thing, path):
    torch.save(thing, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_plain, save_zip, save_legacy])
@pytest.mark.parametrize("hidden", [False, True], ids=["bare", "beside the weights"])
def test_a_pickle_that_would_run_code_is_refused(save, hidden, tensors, folder, monkeypatch):
    monkeypatch.chdir(folder)
    save(tensors | {"ln_f.bias": Malice()} if hidden else Malice(), folder / "pytorch_model.bin")
    with refused(folder / "pytorch_model.bin") as caught:
        GPT.from_pretrained(folder)
    assert not (folder / "pwned").exists()
    assert "weights_only" not in str(caught.value)              # torch's own message advises to switch the check off


ODD = {
    "a list": lambda w: [w],
    "a nested dictionary": lambda w: {"model": w},
    "a number among tensors": lambda w: w | {"epoch": 3},
    "a numbered tensor": lambda w: w | {0: torch.ones(2)},
    "a sparse tensor": lambda w: w | {"wte.weight": w["wte.weight"].to_sparse()},
    "a tensor without data": lambda w: w | {"wte.weight": w["wte.weight"].to("meta")},
    "a terabyte out of four bytes": lambda w: w | {"lm_head.weight": torch.zeros(1).half().expand(10**6, 10**6)},
    "complex numbers": lambda w: w | {"wte.weight": w["wte.weight"].to(torch.complex64)},
}


@pytest.mark.parametrize("case", ODD)
def test_a_pickle_of_anything_but_weights_is_refused(case, tensors, folder):
    torch.save(ODD[case](tensors), folder / "pytorch_model.bin")
    with refused(folder / "pytorch_model.bin"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"\0", b"hello", b"PK\3\4", b"<html>Not found</html>", bytes(5000)])
def test_a_file_that_is_no_pickle_is_refused(content, folder):
    (folder / "pytorch_model.bin").write_bytes(content)
    with refused(folder / "pytorch_model.bin"):
        GPT.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------ config.json

@pytest.mark.parametrize("key", [*SHAPE, "n_inner"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 1e300, float("nan"), 10**12, 10**30, True, "12", [12], {}], ids=repr)
def test_absurd_numbers_are_refused(key, value, folder):
    """There are no weights in the folder: a configuration is judged before they are opened."""
    (folder / "config.json").write_text(json.dumps(SHAPE | {key: value}))
    with refused(folder / "config.json", match=key):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("key", SHAPE)
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_missing_numbers_are_refused(key, absent, folder):
    config = SHAPE | {key: None}
    if absent:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with refused(folder / "config.json", match=key):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("epsilon", [0, -1e-5, 1e300, 10**400, float("nan"), True, "1e-5", [1e-5]], ids=repr)
def test_absurd_epsilons_are_refused(epsilon, folder):
    (folder / "config.json").write_text(json.dumps(SHAPE | {"layer_norm_epsilon": epsilon}))
    with refused(folder / "config.json", match="layer_norm_epsilon"):
        GPT.from_pretrained(folder)


def test_heads_must_divide_the_width(folder):
    (folder / "config.json").write_text(json.dumps(SHAPE | {"n_head": 4}))
    with refused(folder / "config.json", match="n_embd 6 .* 4 heads"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"12", b"null", b"\xff\xfe{}", b"[" * 100_000,
                                     b'{"n_embd":' + b"9" * 10_000 + b"}"], ids=lambda content: repr(content[:12]))
def test_a_config_that_is_no_json_object_is_refused(content, folder):
    (folder / "config.json").write_bytes(content)
    with refused(folder / "config.json"):
        GPT.from_pretrained(folder)


def test_a_config_cannot_make_us_allocate(tensors, folder):
    """Numbers within the limits still ask for four terabytes; the shapes in the file are compared first."""
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SHAPE | {"vocab_size": 10**7, "n_embd": 99_999}))
    with refused(folder / "model.safetensors", match="shape"):
        GPT.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- atomic writes

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file(error, tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a").read_bytes() == b"old"          # nobody sees half of a file
        raise error

    with pytest.raises(type(error)):
        replace(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_full_disk_leaves_the_last_good_checkpoint(folder):
    resource = pytest.importorskip("resource")
    gpt = GPT(GPTConfig(**SHAPE))
    gpt.save_pretrained(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    gpt.ln_f.bias.data.fill_(7)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError):
            gpt.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
