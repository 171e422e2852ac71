"""Checkpoint folders: every published layout loads with transformers' logits; broken and hostile files are refused."""
import json
import tracemalloc
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import DTYPES, GPT, GPTConfig, read_config, read_safetensors, write_atomically, write_safetensors
from test_model import assert_same_logits, random_gpt2

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextmanager
def refused(path, match=None):
    """What happens inside must be refused in one short text that names the file."""
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert str(caught.value).count(str(path)) == 1 and len(str(caught.value)) < 1000
    assert "weights_only" not in str(caught.value)              # torch's own message advises to switch the check off


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with config.json, transformers' model, and its tensors, to be changed and saved."""
    model = random_gpt2(n_embd=12, n_head=3, n_layer=2, n_inner=None, vocab_size=30, n_positions=20)
    model.config.save_pretrained(tmp_path)
    return tmp_path, model, dict(model.transformer.state_dict())


def save_safetensors(tensors, path):
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors" if path.is_dir() else path)


def save_zip(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")


def save_legacy(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


# -------------------------------------------------------------------------------------------------- sound checkpoints

@pytest.mark.parametrize("save, prefix, dtype, head", [
    (save_safetensors, "", torch.float32, "lm_head.weight"), (save_zip, "transformer.", torch.float16, None),
    (save_legacy, "module.transformer.", torch.bfloat16, "module.lm_head.decoder.weight")])
@pytest.mark.parametrize("words", [True, False], ids=["wte", "head alone"])
def test_every_published_layout(save, prefix, dtype, head, words, checkpoint):
    """GPT-2's files have bare names, DialoGPT's a prefix; old ones also store masks and the output layer; of two tied
    tensors either may be the one that is kept, and they may not differ."""
    folder, model, tensors = checkpoint
    tensors = {prefix + name: t.to(dtype) for name, t in tensors.items()}
    for i in range(2):
        tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 20, 20, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=dtype)
    if head:
        tensors[head] = tensors[f"{prefix}wte.weight"] if words else tensors.pop(f"{prefix}wte.weight")
    save(tensors, folder)
    gpt = GPT.from_pretrained(folder)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32} and not gpt.training
    assert_same_logits(gpt, model.to(dtype).float())
    gpt.save_pretrained(folder / "new")
    assert_same_logits(gpt, GPT2LMHeadModel.from_pretrained(folder / "new").eval())
    if head and words:
        save(tensors | {head: tensors[head] + 1}, folder)
        with refused(folder, "two different tensors for wte.weight"):
            GPT.from_pretrained(folder)


def test_the_index_says_which_shards_count(checkpoint):
    """A shard of another save beside them does no harm; a lost one is missed."""
    folder, model, _ = checkpoint
    model.save_pretrained(folder, max_shard_size="5KB")
    shards = sorted(folder.glob("*.safetensors"))
    (folder / "model-00001-of-00099.safetensors").write_bytes(b"another save's")
    assert_same_logits(GPT.from_pretrained(folder), model)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        GPT.from_pretrained(folder)


def test_what_config_json_does_not_say_is_gpt2_smalls(tmp_path):
    """An end of text that is no token of the vocabulary is its last one."""
    (tmp_path / "config.json").write_text("{}")
    config, theirs = read_config(tmp_path / "config.json"), GPT2Config()
    assert config.eos_token_id == theirs.eos_token_id and config == GPTConfig(**{
        name: getattr(theirs, name) for name in vars(config).keys() & vars(theirs).keys() - {"eos_token_id"}})
    for eos, expected in ((None, 29), ([13], 29), (30, 29), (-1, 29), ("13", 29), (13, 13), (0, 0)):
        edit_config(tmp_path, vocab_size=30, eos_token_id=eos)
        assert read_config(tmp_path / "config.json").eos_token_id == expected


def test_safetensors_equal_the_library(tmp_path):
    """What it writes we read, and what we write it reads, transposed views too. The tensors may be modified."""
    path = tmp_path / "a.safetensors"
    kinds = {name: (torch.arange(15).view(3, 5) * 1.7).to(dtype) for name, dtype in DTYPES.items()}
    kinds |= {"scalar": torch.tensor(-1e4), "names may hold \"é\n\0": torch.arange(4.0)}
    kinds |= {"view": torch.ones(3, 5).tril().t()}
    for write in write_safetensors, lambda path, kinds: save_safetensors(kinds, path):
        write(path, kinds)
        for found in (dict(read_safetensors(path)), safetensors.torch.load_file(path)):
            assert found.keys() == kinds.keys()
            for name, t in found.items():
                assert t.dtype == kinds[name].dtype and torch.equal(t, kinds[name]), name
                t.zero_()


# -------------------------------------------------------------------------------------------- unfit and hostile files

@pytest.mark.parametrize("changes, more, complaint", [
    ({"vocab_size": 31}, {}, "size mismatch for wte.weight"), ({"n_layer": 3}, {}, r"Missing key.*h\.2\."),
    ({"n_layer": 1}, {}, r"Unexpected key.*h\.1\."),
    ({"vocab_size": 10**7 - 1, "n_embd": 99_999}, {}, "size mismatch"),         # four terabytes: shapes come first
    ({}, {"h.0.mlp.c_fc.weight": torch.ones(48, 12)}, "mismatch for h.0.mlp.c_fc.weight"),  # as nn.Linear stores it
    ({}, {"ln_f.bias": torch.ones(12) / 0}, "ln_f.bias holds NaN or inf"),
    ({}, {"wpe.weight": torch.full((20, 12), torch.nan)}, "wpe.weight holds NaN or inf")], ids=str)
def test_weights_that_do_not_fit_the_configuration_are_refused(changes, more, complaint, checkpoint):
    folder, _, tensors = checkpoint
    save_safetensors(tensors | more, folder)
    edit_config(folder, **changes)
    with refused(folder, f"(?s){complaint}"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [
    ("model_type", "gpt_neo"), ("activation_function", "gelu"), ("tie_word_embeddings", False),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
    ("add_cross_attention", True), ("n_head", 5)])                              # 12 is no multiple of 5
def test_settings_that_are_refused(key, value, checkpoint):
    """There are no weights in the folder: a configuration is judged before they are opened."""
    edit_config(checkpoint[0], **{key: value})
    with refused(checkpoint[0] / "config.json", key):
        GPT.from_pretrained(checkpoint[0])


def one(data=bytes(24), length=None, **changes):
    """The bytes of a safetensors file: what the length claims, a header with one tensor, data."""
    text = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


class Malice:
    """What runs on unpickling: creates the file "pwned" in the working folder."""

    def __reduce__(self):
        return open, ("pwned", "w")


CONTENTS = [b"", b"[]", b"\xff\xfe{}", b"PK\3\4", b"<html>", b"[" * 100_000, b"version https://git-lfs.github.com/"]
HOSTILE = {
    **{f"{name} {content[:12]}": (name, content) for content in CONTENTS
       for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")},
    **{f"safetensors {name}": ("model.safetensors", content) for name, content in {
        "truncated": one(bytes(23)), "nearly 2**64": one(length=2**64 - 1), "header too long": one(length=1000),
        "header too short": one(length=20), "dtype unknown": one(dtype="F8_E4M3"), "dtype a list": one(dtype=["F32"]),
        "shape too small": one(shape=[2, 2]), "negative": one(shape=[-2, -3]), "huge": one(shape=[2**62] * 3000),
        "out of the file": one(shape=[2**38], data_offsets=[0, 2**40]), "in reverse": one(data_offsets=[24, 0]),
        "one offset": one(data_offsets=[24])}.items()},
    **{f"pickle, {name}": ("pytorch_model.bin", change) for name, change in {
        "code": lambda w: Malice(), "code inside": lambda w: w | {"ln_f.bias": Malice()}, "a list": lambda w: [w],
        "a number among tensors": lambda w: w | {"epoch": 3}, "a numbered tensor": lambda w: w | {0: torch.ones(2)},
        "sparse": lambda w: w | {"wte.weight": w["wte.weight"].to_sparse()},
        "no data": lambda w: w | {"wte.weight": w["wte.weight"].to("meta")},
        "four bytes in a large shape": lambda w: w | {"wte.weight": torch.ones(1).expand(30, 12)}}.items()}}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_of_something_else_are_refused(case, checkpoint, monkeypatch):
    (folder, _, tensors), (name, content) = checkpoint, HOSTILE[case]
    monkeypatch.chdir(folder)
    for save in (None,) if isinstance(content, bytes) else (save_zip, save_legacy):
        save(content(tensors), folder) if save else (folder / name).write_bytes(content)
        with refused(folder / name):
            GPT.from_pretrained(folder)
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("content", [one(length=2**40), one(shape=[2**38], data_offsets=[0, 2**40])])
def test_no_more_memory_is_asked_for_than_the_file_has(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    tracemalloc.start()
    with refused(tmp_path / "a.safetensors"):
        read_safetensors(tmp_path / "a.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------- atomic writes

class Full:
    """A file that fails at the second piece that is written into it."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def write(self, data):
        if self.file.tell():
            raise self.error
        return self.file.write(data)


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file(error, tmp_path):
    """A full disk and Ctrl-C come out as such, though torch.save makes a RuntimeError of them."""
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "a", lambda file: torch.save(torch.ones(3), Full(file, error)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
