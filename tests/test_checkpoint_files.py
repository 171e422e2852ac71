"""Checkpoint folders: every published layout loads with transformers' logits; broken and hostile files are refused."""
import json
import tracemalloc
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from model import DTYPES, GPT, read_safetensors, replace, write_safetensors
from test_model import assert_same_logits, random_gpt2

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
ONE = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def edit_config(folder, **changes):
    """Write changes into config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@contextmanager
def refused(path, match=None):
    """What happens inside must be refused in one short sentence that names the file, using little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            yield caught
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first time, this makes torch import 70 MB of itself, which `refused` should not count."""
    torch.empty(1, device="meta").normal_()


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with config.json, transformers' model, and its tensors, to be changed and saved."""
    model = random_gpt2(n_embd=12, n_head=3, n_layer=2, n_inner=None, vocab_size=30, n_positions=20)
    model.config.save_pretrained(tmp_path)
    return tmp_path, model, dict(model.transformer.state_dict())


def save_safetensors(tensors, folder):
    path = folder / "model.safetensors"
    safetensors.torch.save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path)


def save_zip(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")


def save_legacy(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


# -------------------------------------------------------------------------------------------------- sound checkpoints


@pytest.mark.parametrize("save, prefix, dtype", [
    (save_safetensors, "", torch.float32), (save_zip, "transformer.", torch.float16),
    (save_legacy, "module.transformer.", torch.bfloat16)])
def test_every_published_layout(save, prefix, dtype, checkpoint):
    """GPT-2's files have bare names, DialoGPT's a prefix; old ones also store masks, the output layer and n_ctx."""
    folder, model, tensors = checkpoint
    tensors = {prefix + name: t.to(dtype) for name, t in tensors.items()}
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 20, 20, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=dtype)
    save(tensors | {"lm_head.weight": tensors[f"{prefix}wte.weight"]}, folder)
    edit_config(folder, n_positions=None, n_ctx=20)
    gpt = GPT.from_pretrained(folder)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32} and not gpt.training
    assert_same_logits(gpt, model.to(dtype).float())


def test_tied_weights_under_either_name(checkpoint):
    folder, model, tensors = checkpoint
    words = tensors.pop("wte.weight")
    save_safetensors(tensors | {"lm_head.weight": words}, folder)
    assert_same_logits(GPT.from_pretrained(folder), model)
    save_safetensors(tensors | {"wte.weight": words, "lm_head.weight": words + 1}, folder)
    with refused(folder, "two different tensors for wte.weight"):
        GPT.from_pretrained(folder)


def test_shards(checkpoint):
    """A lost one is missed."""
    folder, model, _ = checkpoint
    model.save_pretrained(folder, max_shard_size="5KB")
    assert_same_logits(GPT.from_pretrained(folder), model)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.unlink()
    with refused(folder, r"missing '(h\.|ln_f|w)"):
        GPT.from_pretrained(folder)


EVERY_KIND = {**{f"kind.{name}": (torch.arange(15).view(3, 5) * 1.7).to(dtype) for name, dtype in DTYPES.items()},
              "scalar": torch.tensor(-1e4), "empty": torch.zeros(0, 7), "names may hold \"é\n\0": torch.arange(4.0)}


def test_safetensors_equal_the_library(tmp_path):
    """What it writes we read, and what we write it reads, transposed views too. The tensors may be modified."""
    path, kinds = tmp_path / "a.safetensors", EVERY_KIND
    safetensors.torch.save_file(kinds, path, metadata={"format": "pt"})
    for _ in range(2):
        for found in (dict(read_safetensors(path)), safetensors.torch.load_file(path)):
            assert found.keys() == kinds.keys()
            for name, t in found.items():
                assert t.dtype == kinds[name].dtype and torch.equal(t, kinds[name]), name
                t.zero_()
        kinds = EVERY_KIND | {"view": torch.arange(6.0).view(2, 3).t()}
        write_safetensors(path, kinds)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}              # transformers asks for it


# ---------------------------------------------------------------------------------------------------- sound but unfit

@pytest.mark.parametrize("changes, more, complaint", [
    ({"vocab_size": 31}, {}, r"wte.weight has shape \[30, 12\].*\[31, 12\]"), ({"n_layer": 3}, {}, "missing .*'h.2"),
    ({"n_layer": 1}, {}, "unexpected .*'h.1"),
    ({"vocab_size": 10**7, "n_embd": 99_999}, {}, "has shape"),         # four terabytes: the shapes are compared first
    ({}, {"h.0.mlp.c_fc.weight": torch.ones(48, 12)}, "h.0.mlp.c_fc.weight has shape"),         # as nn.Linear stores it
    ({}, {"ln_f.bias": torch.ones(12) / 0}, "ln_f.bias holds NaN or inf"),
    ({}, {"\x1b[31m": torch.ones(2)}, r"unexpected '\\x1b")])
def test_weights_that_do_not_fit_the_configuration_are_refused(changes, more, complaint, checkpoint):
    folder, _, tensors = checkpoint
    save_safetensors(tensors | more, folder)
    edit_config(folder, **changes)
    with refused(folder, complaint):
        GPT.from_pretrained(folder)


NUMBERS = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"]


@pytest.mark.parametrize("key, values", [
    ("model_type", ["gpt_neo"]), ("activation_function", ["gelu"]), ("tie_word_embeddings", [False]),
    ("scale_attn_weights", [False]), ("scale_attn_by_inverse_layer_idx", [True]), ("reorder_and_upcast_attn", [True]),
    ("add_cross_attention", [True]), ("n_inner", [0, 1.5, 10**12, "12"]),
    *((key, [None, 0, -1, 1.5, 10**12, True, "12"]) for key in NUMBERS),
    ("layer_norm_epsilon", [0, 1, float("nan"), True, "1e-5"]), ("n_head", [5])])       # 5 does not divide the width
def test_settings_that_are_refused(key, values, checkpoint):
    """There are no weights in the folder: a configuration is judged before they are opened."""
    folder, _, _ = checkpoint
    for value in values:
        edit_config(folder, **{key: value})
        with refused(folder / "config.json", key):
            GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe{}", b"PK\3\4", b"<html>", b"[" * 100_000],
                         ids=lambda content: repr(content[:12]))
def test_files_of_something_else_are_refused(name, content, checkpoint):
    (checkpoint[0] / name).write_bytes(content)
    with refused(checkpoint[0] / name):
        GPT.from_pretrained(checkpoint[0])


# ------------------------------------------------------------------------------------------------- hostile safetensors

def layout(header, data=bytes(24), length=None):
    """The bytes of a safetensors file: header (an object, or bytes in its place), data, and what the length claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes):
    return layout({"a": ONE | changes})


def two(first, second, size):
    return layout({name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
                   for name, (begin, end) in (("a", first), ("b", second))}, bytes(size))


HOSTILE = {
    "truncated": one()[:-1], "trailing": one() + b"\0", "header too long": layout({"a": ONE}, length=1000),
    "nearly 2**64": layout({"a": ONE}, length=2**64 - 1), "header too short": layout({"a": ONE}, length=20),
    "not UTF-8": layout(b'{"\xff": 1}'), "a list": layout(b"[]"), "depth": layout(b'{"a":' * 100_000),
    "entry is empty": layout({"a": {}}), "dtype unknown": one(dtype="F31"), "dtype is a list": one(dtype=["F32"]),
    "shape too small": one(shape=[2, 2]), "negative": one(shape=[-2, -3]), "shape of floats": one(shape=[2.0, 3.0]),
    "overflow around a zero": layout({"a": ONE | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, b""),
    "many huge numbers": one(shape=[2**62] * 3000), "a terabyte": one(shape=[2**38], data_offsets=[0, 2**40]),
    "offsets out of the file": one(shape=[2, 4], data_offsets=[0, 32]), "in reverse": one(data_offsets=[24, 0]),
    "one offset": one(data_offsets=[24]), "the same bytes twice": two([0, 10], [0, 10], 10),
    "overlap": two([0, 10], [9, 20], 20), "gap": two([0, 10], [11, 20], 20)}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors_are_refused(case, tmp_path):
    """The reference library refuses them, too."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[case])
    with refused(path):
        list(read_safetensors(path))
    with pytest.raises(SafetensorError):
        safetensors.torch.load_file(path)


# ----------------------------------------------------------------------------------------------------- hostile pickles

class Malice:
    """What runs on unpickling: creates the file "pwned" in the working folder."""

    def __reduce__(self):
        return open, ("pwned", "w")


ODD = {
    "code": lambda w: Malice(), "code among weights": lambda w: w | {"ln_f.bias": Malice()}, "a list": lambda w: [w],
    "a number among tensors": lambda w: w | {"epoch": 3}, "a numbered tensor": lambda w: w | {0: torch.ones(2)},
    "sparse": lambda w: w | {"wte.weight": w["wte.weight"].to_sparse()},
    "no data": lambda w: w | {"wte.weight": w["wte.weight"].to("meta")},
    "four bytes in a large shape": lambda w: w | {"wte.weight": torch.ones(1).expand(30, 12)}}


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("case", ODD)
def test_a_pickle_of_anything_but_weights_is_refused(save, case, checkpoint, monkeypatch):
    folder, _, tensors = checkpoint
    monkeypatch.chdir(folder)
    save(ODD[case](tensors), folder)
    with refused(folder / "pytorch_model.bin") as caught:
        GPT.from_pretrained(folder)
    assert not (folder / "pwned").exists()
    assert "weights_only" not in str(caught.value)              # torch's own message advises to switch the check off


# ------------------------------------------------------------------------------------------------------- atomic writes

@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("torch"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file(error, tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert (tmp_path / "a").read_bytes() == b"old"          # nobody sees half of a file
        raise error

    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError):
        replace(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
