"""Tokenizer, dialogues, pairs, splits: against transformers' and tokenizers' own, by hand, and by properties."""
import functools
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from conftest import ROOT, SHARED
from data import (TINY, encode_pairs, group_by_length, load_splits, load_tokenizer, make_pairs, parse_text, query_key,
                  read_dialogues, take_fraction)

SPLITS = ("train", "validation", "test")
EOT = "<|endoftext|>"
ODD = ["", EOT, f" {EOT}", " ", "  ", "\n", " \n\n x", "\x00", "\u2028", "\x85", "\u00a0", "\r\n", "'ll", "'LL",
       "I'd've", "é", "e\u0301", "👩‍👧", "שלום", "ไทย", "中文", "١٢", "3.14", "½", "a", "-", "...", "# #", "##", "\ufeff",
       "\u200b", "[PAD]"]


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs ../shared/{name}")
    return SHARED / name


@functools.cache
def dialogues_of(name):
    return read_dialogues(name if name == "sample" else shared(name))


def turns_of(name, n=None):
    return sorted({turn for split in SPLITS for dialogue in dialogues_of(name)[split][:n] for turn in dialogue})


# --------------------------------------------------------------------------------------------------------- tokenizer

@functools.cache
def trained(merges=150, special=(EOT,), text=None):
    """A byte-level tokenizer of one's own, as the Hugging Face course makes it: special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=256 + merges + len(special), special_tokens=list(special),
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text or turns_of("sample", 40), trainer)
    return tokenizer


def write_vocabulary(folder, merges=("h e", "Ġ t"), header="#version: 0.2\n", newline="\n", last="\n", mark="", **more):
    """GPT-2's two files in small: the 256 bytes, some merges, <|endoftext|>."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + [EOT]
    folder.mkdir(exist_ok=True)
    text = (mark + header + "\n".join(merges) + last).replace("\n", newline)
    (folder / "merges.txt").write_bytes(text.encode())
    (folder / "vocab.json").write_text(mark + json.dumps(dict(zip(words, range(999))) | more), encoding="utf-8")
    return folder


@functools.cache
def letters():
    """A tokenizer without merges: a token per letter, so that lengths can be counted by eye."""
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(write_vocabulary(Path(folder), merges=()))


def same_ids(ours, theirs, texts):
    """theirs: transformers' or tokenizers'. Special tokens that stand in a text are text to us."""
    theirs = theirs if isinstance(theirs, Tokenizer) else theirs.backend_tokenizer
    theirs.encode_special_tokens = True                 # transformers' split_special_tokens
    texts = [*texts, *ODD]
    ids = [ours.encode_ordinary(text) for text in texts]
    assert ids == [encoding.ids for encoding in theirs.encode_batch_fast(texts)]
    assert [ours.decode(row) for row in ids] == texts


@pytest.mark.parametrize("name, data", [("tiny-gpt2", "sample"), ("gpt2-bpe", "dailydialog")])
def test_tokens_are_those_of_transformers_on_every_turn(name, data):
    folder = shared(name) if name == "gpt2-bpe" else TINY / name
    ours, theirs = load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)
    assert ours.n_vocab == len(theirs) and ours.eot_token == theirs.eos_token_id
    same_ids(ours, theirs, turns_of(data))


@pytest.mark.parametrize("form", ["CRLF and marks", "tokenizer.json"])
def test_every_form_of_the_real_vocabulary_is_one_tokenizer(tmp_path, form):
    folder = shared("gpt2-bpe")
    if form == "tokenizer.json":
        GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path)
        assert not (tmp_path / "vocab.json").exists()
    else:
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes().replace(b"\n", b"\r\n"))
    plain, other = load_tokenizer(folder), load_tokenizer(tmp_path)
    words = plain.token_byte_values()
    assert len(words) == 50_256 and other.token_byte_values() == words
    assert list(map(other.encode_single_token, words)) == list(map(plain.encode_single_token, words))
    assert other.eot_token == plain.eot_token == 50_256


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer(TINY / "tiny-gpt2"), GPT2Tokenizer.from_pretrained(TINY / "tiny-gpt2")


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(ODD)).map("".join))
def test_tokens_are_those_of_transformers_on_any_text(tiny, text):
    ours, theirs = tiny
    assert ours.encode_ordinary(text) == theirs(text, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("form", [
    {"header": ""}, {"newline": "\r\n"}, {"last": ""}, {"last": "\n\n"}, {"mark": "\ufeff"},
    {"header": "", "last": "", "newline": "\r\n", "mark": "\ufeff"}], ids=str)
@pytest.mark.parametrize("merges", [("h e", "Ġ t"), ("# #", "## #", "h e"), ("# v", "#v e"), ()], ids=str)
def test_every_way_of_writing_merges_is_one_tokenizer(tmp_path, merges, form):
    ours = load_tokenizer(write_vocabulary(tmp_path, merges, **form))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8-sig"))
    theirs = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert len(ours.token_byte_values()) == 256 + len(merges)
    same_ids(ours, theirs, ["he the", "#### #version: ###", "#version"])


@pytest.mark.parametrize("special", [(EOT,), (EOT, "[PAD]", "<s>"), ("[PAD]", EOT)], ids=str)
@pytest.mark.parametrize("form", ["two files", "pairs", "strings", "AutoTokenizer"])
def test_tokenizers_of_ones_own(tmp_path, special, form):
    """Special tokens first; two files, or tokenizer.json alone, whose merges were once strings."""
    theirs = trained(special=special)
    whole = json.loads(theirs.to_str())
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    assert vocab[special[0]] == 0
    if form == "two files":
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    elif form == "AutoTokenizer":                       # transformers 5 writes tokenizer.json, and reads it again
        PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token=EOT).save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    else:
        whole["model"]["merges"] = merges if form == "strings" else [merge.split() for merge in merges]
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.eot_token == vocab[EOT] and ours.special_tokens_set == set(special)
    same_ids(ours, theirs, turns_of("sample", 40))


@pytest.mark.parametrize("seed", range(8))
def test_tokenizers_trained_on_random_letters(tmp_path, seed):
    """Few letters make many merges that overlap: tiktoken merges in the order of ids, GPT-2 in that of merges.txt."""
    chance = random.Random(seed)
    text = ["".join(chance.choices("aab b#'1é", k=60)) for _ in range(120)]
    theirs = trained(merges=200, text=tuple(text[:60]))
    theirs.save(str(tmp_path / "tokenizer.json"))
    same_ids(load_tokenizer(tmp_path), theirs, text)


def test_tokens_added_with_transformers(tmp_path):
    """As every DialoGPT tutorial does: [PAD] added, the embeddings resized. tokenizer.json, and version 4's files."""
    theirs, added = GPT2Tokenizer.from_pretrained(TINY / "tiny-gpt2"), {"[PAD]": 4096, "<speaker1>": 4097}
    theirs.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<speaker1>"]})
    theirs.save_pretrained(tmp_path / "new")
    shutil.copytree(TINY / "tiny-gpt2", tmp_path / "old")
    (tmp_path / "old/added_tokens.json").write_text(json.dumps(added))
    assert theirs.get_added_vocab() == added | {EOT: 4095} and not (tmp_path / "new/vocab.json").exists()
    for folder in (tmp_path / "new", tmp_path / "old"):
        ours = load_tokenizer(folder)
        assert (ours.n_vocab, ours.eot_token, ours.special_tokens_set) == (4098, 4095, {EOT, *added})
        same_ids(ours, theirs, ["Hello [PAD] <speaker1>there"])


def test_a_vocabulary_changed_on_disk_is_read_anew(tmp_path):
    assert len(load_tokenizer(write_vocabulary(tmp_path)).encode_ordinary("hehe")) == 2
    assert len(load_tokenizer(write_vocabulary(tmp_path, merges=["h e", "he he"])).encode_ordinary("hehe")) == 1


def tokenizer_json(folder, **change):
    """tokenizer.json of a sound tokenizer, but for a change; a key like model__dropout goes one deeper."""
    whole = json.loads(trained(merges=5).to_str())
    for key, value in change.items():
        *outer, key = key.split("__")
        inner = functools.reduce(lambda d, k: d[k], outer, whole)
        inner.pop(key) if value is ... else inner.update({key: value})
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": EOT}}, {"Sequence": {"id": "A"}}]}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "add_prefix_space": False}


@pytest.mark.parametrize("change, name", [
    ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"), ({"pre_tokenizer__use_regex": False}, "use_regex"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"), ({"pre_tokenizer": None}, "pre_tokenizer"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}}, "pre_tokenizer"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer"), ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"post_processor": TEMPLATE}, "post_processor"), ({"post_processor": ROBERTA}, "post_processor"),
    ({"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}}, "post_processor"),
    ({"model__type": "WordPiece"}, "type"), ({"model__dropout": 0.1}, "dropout"),
    ({"model__ignore_merges": True}, "ignore_merges"), ({"model__continuing_subword_prefix": "##"}, "subword_prefix"),
    ({"model__end_of_word_suffix": "</w>"}, "word_suffix"), ({"model": ...}, "tokenizer.json"),
    ({"model__vocab": None}, "tokenizer.json"), ({"model__merges": {"a b": 1}}, "ab"),
    ({"model__merges": [["a"]]}, "tokenizer.json"), ({"model__merges": [1]}, "tokenizer.json"),
    ({"added_tokens": [3]}, "tokenizer.json"), ({"added_tokens": [{"id": 0, "content": "a"}]}, "a")], ids=range(22))
def test_settings_that_would_change_the_ids_are_refused_by_name(tmp_path, change, name):
    assert load_tokenizer(tokenizer_json(tmp_path)).eot_token == 0
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.*{re.escape(name)}"):
        load_tokenizer(tokenizer_json(tmp_path, **change))


@pytest.mark.parametrize("setting", ["add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case"])
def test_settings_in_tokenizer_config_are_refused_by_name(tmp_path, setting):
    config = write_vocabulary(tmp_path) / "tokenizer_config.json"
    config.write_text(json.dumps({setting: False, "model_max_length": 1024}))
    assert load_tokenizer(tmp_path).n_vocab == 259
    config.write_text(json.dumps({setting: True}))
    with pytest.raises(ValueError, match=setting):
        load_tokenizer(tmp_path)


def test_a_missing_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + ".*vocab.json and merges.txt, or tok"):
        load_tokenizer(tmp_path)
    (write_vocabulary(tmp_path) / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "merges.txt"))):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"h": None}, "h"), ({"h": 1, "i": 1}, "same id"), ({EOT: 3}, "same id"), ({EOT: -1}, "endoftext"),
    ({"he": "1"}, "he"), ({"h": True}, "h"), ({"new": 2**31}, "new"), ({"he": 257, "Ġt": 256}, "rise"),
    ({"he": 300, "Ġt": 299}, "rise"), ({"a": ...}, "no 'a'"), ({"Ġ": ...}, "no '.u0120'"), ({"he": ...}, "no 'he'"),
    ({EOT: ...}, "no <.endoftext.>")], ids=str)
def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(tmp_path, change, words):
    vocab = json.loads((write_vocabulary(tmp_path) / "vocab.json").read_text(encoding="utf-8")) | change
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for word, i in vocab.items() if i is not ...}))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{words}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer.json"])
def test_a_damaged_vocabulary_is_refused_or_harmless(tmp_path, file):
    """Random changes to a file: each gives a ValueError that names the folder, or a tokenizer that loses nothing."""
    write_vocabulary(tmp_path) if file != "tokenizer.json" else tokenizer_json(tmp_path)
    chance, refused, whole = random.Random(0), 0, (tmp_path / file).read_bytes()

    def damaged():
        i, j = chance.randrange(len(whole)), chance.choice([0, 1, 1, 5])
        return whole[:i] + chance.randbytes(chance.randrange(3)) + whole[i + j:]

    for content in [b"", b"[]", b"{}", b"[" * 100_000, b"null", *(damaged() for _ in range(150))]:
        (tmp_path / file).write_bytes(content)
        try:
            tokenizer = load_tokenizer(tmp_path)
            assert tokenizer.decode(tokenizer.encode_ordinary("the hé 👩‍👧")) == "the hé 👩‍👧"
        except ValueError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert 0 < refused < 155


def test_data_is_read_without_requests():
    code = """if True:
        import sys
        sys.modules["requests"] = None
        import data
        data.load_tokenizer(data.checkpoint_folder("tiny-gpt2"))
        print(len(data.read_dialogues("sample")["train"]))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "800\n"


# ------------------------------------------------------------------------------------------------- the text format

def parsed(text):
    return parse_text(text if isinstance(text, bytes) else text.encode(), "train.txt")


@pytest.mark.parametrize("text, dialogues", [
    ("a __eou__ b\nc __eou__ d", [["a", "b"], ["c", "d"]]),
    ("a __eou__ b __eou__\nc __eou__ d __eou__ \n", [["a", "b"], ["c", "d"]]),              # __eou__ at line ends
    ("\ufeffa __eou__ b\n", [["a", "b"]]),                                                  # byte order mark
    ("a __eou__ b\r\nc __eou__ d\r\n", [["a", "b"], ["c", "d"]]),                           # CRLF
    ("\n \n\r\na __eou__ b\n\n__eou__ __eou__\n\t\n", [["a", "b"]]),                        # blank lines
    ("hello\na __eou__ b\n", [["hello"], ["a", "b"]]),                                      # one turn
    ("a __eou__ __eou__ c __eou__ d", [["a", "", "c", "d"]]),                               # an empty turn stays
    ("__eou__ a __eou__ b\n", [["", "a", "b"]]),                                            # at the beginning, too
    ("a __eou__ \u200b \u200d __eou__ c", [["a", "", "c"]]),                                # an invisible one, too
    ("a__eou__b", [["a", "b"]]),                                                            # no spaces
    ("a\x00b __eou__ \x00c\n", [["a\x00b", "\x00c"]]),                                      # NUL
    ("a\u2028b\x0cc\x0bd\x85e __eou__ f\u2029g\rh", [["a\u2028b\x0cc\x0bd\x85e", "f\u2029g\rh"]]),
    ("👩‍👧 e\u0301 __eou__ \u202bשלום, عالم\u202c\n", [["👩‍👧 e\u0301", "\u202bשלום, عالم\u202c"]]),
    (f"a{EOT}b __eou__ {EOT}", [[f"a{EOT}b", EOT]]),
    ("a _eou_ __EOU__ __eou_ b __eou__ c", [["a _eou_ __EOU__ __eou_ b", "c"]]),            # what is no separator
])
def test_oddities_of_the_text_format(text, dialogues):
    assert parsed(text) == dialogues


def test_what_is_invisible():
    invisible = ["\u200b", "\u200c\u200d", "\ufeff\ufeff", "\u2060", "\u00ad", "\u180e", "\u3164", "\u115f\u1160",
                 "\u2800", "\uffa0", "\u00a0", "\u3000", "\ufe0f", "\u0301", "\u202e", "\U000e0020", "\x00", "\x1b"]
    shown = [".", "?", "♥", "👍🏽", "ก็", "ন", "。", "1", "\u0301a", "a\u200b", "…"]
    assert parsed(" __eou__ ".join(["x", *invisible, *shown])) == [["x", *[""] * len(invisible), *shown]]


@pytest.mark.parametrize("gap", ["", " ", "\u200b", "\u3164"])
@pytest.mark.parametrize("place", range(8))
def test_an_empty_turn_never_flips_the_roles(gap, place):
    """Customer and clerk take turns, one of them silent once: nobody answers himself, and silence makes no pair."""
    turns = [who for _ in range(4) for who in ("customer", "clerk")]
    turns[place] = gap
    dialogue = parsed(" __eou__ ".join(turns) + " __eou__")
    assert make_pairs(dialogue) == [(["customer"], "clerk")] * 3
    sliding = make_pairs(dialogue, sliding=True)
    assert {(query, response) for [query], response in sliding} <= {("customer", "clerk"), ("clerk", "customer")}
    assert len(sliding) == (6 if place in (0, 7) else 5)


@pytest.mark.parametrize("text", ["", "\n\r\n", "A: Hi!\nB: Hello.\n", "Hi!\tHello.\n", '"Hi!","Hello."\n', "__EOU__"])
def test_another_format_is_told_how_it_should_look(text):
    with pytest.raises(ValueError, match=r"^train\.txt .*__eou__.* __eou__ Fine, thanks\. __eou__ "):
        parsed(text)


@pytest.mark.parametrize("line, content", [
    (1, b"\xff\xfea __eou__ b\n"), (2, b"a __eou__ b\n\xc3( __eou__ b\n"), (1, "a __eou__ é".encode("latin-1")),
    (3, b"\xef\xbb\xbfa __eou__ b\r\n\r\nb __eou__ \xf0\x9f\x91"), (4, b"\n\n\na\xed\xa0\x80 __eou__\n")])
def test_invalid_utf8_is_refused_with_file_and_line(line, content):
    with pytest.raises(ValueError, match=rf"^train\.txt, line {line}\b.*UTF-8"):
        parsed(content)


# ------------------------------------------------------------------------------------------------- folders and files

def write(folder, **texts):
    """Files of one folder: train="..." makes train.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    return folder


def test_both_layouts_of_a_folder(tmp_path):
    texts = {split: f"{split} __eou__ b\n" for split in SPLITS}
    write(tmp_path / "own", **texts)
    for split in SPLITS:
        write(tmp_path / "daily" / split, **{f"dialogues_{split}": texts[split]})
    expected = {split: [[split, "b"]] for split in SPLITS}
    assert read_dialogues(tmp_path / "own") == read_dialogues(str(tmp_path / "daily")) == expected


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("text", ["one turn __eou__\nand another\n", "a __eou__ \u200b __eou__ c"])
def test_a_split_without_a_pair_is_refused_by_name(tmp_path, split, text):
    with pytest.raises(ValueError, match=f"{split}.txt.*pair"):
        read_dialogues(write(tmp_path, **{s: "a __eou__ b" for s in SPLITS} | {split: text}))


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="validation.txt"):
        read_dialogues(write(tmp_path, train="a __eou__ b", test="a __eou__ b"))
    with pytest.raises(FileNotFoundError, match="no-such-data.*sample.*dailydialog.*multiwoz"):
        read_dialogues("no-such-data")


@pytest.mark.parametrize("n, sizes", [(3, [1, 1, 1]), (10, [8, 1, 1]), (57, [47, 5, 5])])
def test_one_file_is_split_by_the_seed(tmp_path, n, sizes):
    write(tmp_path, all="".join(f"q{i} __eou__ r{i}\n" for i in range(n)))
    one, again, other = (read_dialogues(tmp_path / "all.txt", seed) for seed in (0, 0, 1))
    assert [len(one[split]) for split in SPLITS] == sizes
    assert sorted(itertools.chain(*one.values())) == sorted([f"q{i}", f"r{i}"] for i in range(n))
    assert one == again and one["test"] + one["train"] != other["test"] + other["train"]


def test_dailydialog_has_its_published_counts():
    dialogues = dialogues_of("dailydialog")
    assert [len(dialogues[split]) for split in SPLITS] == [11_118, 1_000, 1_000]
    assert [sum(map(len, dialogues[split])) for split in SPLITS] == [87_170, 8_069, 7_740]
    assert len(make_pairs(dialogues["test"])) == 3_700


# ------------------------------------------------------------------------------------------------- MultiWOZ

def said(*turns):
    """("U", text) and ("S", text) in MultiWOZ 2.2's schema, with the frames of the official files."""
    frame = {"actions": [], "service": "hotel", "slots": [], "state": {"slot_values": {"hotel-area": ["east"]}}}
    speakers = {"U": "USER", "S": "SYSTEM"}
    return {"dialogue_id": "D1.json", "services": ["hotel"],
            "turns": [{"frames": [frame], "speaker": speakers.get(who, who), "turn_id": str(i), "utterance": text}
                      for i, (who, text) in enumerate(turns)]}


GOOD = said(("U", "a"), ("S", "b"))


def multiwoz(folder, **files):
    """A folder in MultiWOZ's layout; train_002=... puts that (bytes, or anything JSON) in train/dialogues_002.json."""
    for name, contents in ({f"{split}_001": [GOOD] for split in ("train", "dev", "test")} | files).items():
        split, number = name.split("_")
        (folder / split).mkdir(exist_ok=True)
        contents = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        (folder / split / f"dialogues_{number}.json").write_bytes(contents)
    return folder


def test_multiwoz_is_read_turn_for_turn():
    splits = read_dialogues(shared("multiwoz"))
    for split, name in zip(SPLITS, ("train", "dev", "test")):
        official = [dialogue["turns"] for file in sorted((SHARED / "multiwoz" / name).glob("*.json"))
                    for dialogue in json.loads(file.read_bytes())]
        pairs = [(a["utterance"].strip(), b["utterance"].strip()) for turns in official
                 for a, b in zip(turns, turns[1:]) if (a["speaker"], b["speaker"]) == ("USER", "SYSTEM")]
        assert [(query, response) for [query], response in make_pairs(splits[split])] == pairs
    assert [len(splits[split]) for split in SPLITS] == [800, 199, 1_000]


def test_multiwoz_alternates_from_the_users_first_turn(tmp_path):
    """Who goes on speaking still speaks; who is silent keeps his place."""
    dialogue = said(("S", "Welcome!"), ("U", " hi "), ("U", "a room?"), ("S", ""), ("U", "please"),
                    ("S", "yes"), ("S", "two"), ("U", "bye"))
    folder = multiwoz(tmp_path, train_010=[GOOD], train_002=[dialogue])
    expected = ["hi a room?", "", "please", "yes two", "bye"]
    assert read_dialogues(folder)["train"] == [["a", "b"], expected, ["a", "b"]]


@pytest.mark.parametrize("broken", [
    {}, {"turns": None}, {"turns": {"0": "hi"}}, {"turns": [{"speaker": "USER"}]}, {"turns": [{"utterance": "hi"}]},
    said(("U", "a"), ("user", "b")), said(("U", "a"), ("S", None)), said(("U", "a"), ("S", ["b"])),
    said(("U", "half an emoji: \ud83d"), ("S", "b"))], ids=range(9))
def test_a_dialogue_that_breaks_the_schema_is_named_with_its_file(tmp_path, broken):
    with pytest.raises(ValueError, match="dialogues_002.json.*dialogue 2 .*D2.json"):
        read_dialogues(multiwoz(tmp_path, dev_002=[GOOD, broken | {"dialogue_id": "D2.json"}]))


@pytest.mark.parametrize("contents", [b"", b"[{", b'["\xff"]', b"{}", b"[" * 100_000, [], ["hello"], [said()],
                                      [said(("S", "b"))]], ids=range(9))
def test_a_file_without_dialogues_or_pairs_is_named(tmp_path, contents):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "dev"))):
        read_dialogues(multiwoz(tmp_path, dev_001=contents))


# ----------------------------------------------------------------------------------------- pairs, splits, batches

def test_fractions_are_nested_seeded_and_in_order():
    dialogues = [[str(i), "b"] for i in range(1_000)]
    subsets = [take_fraction(dialogues, f, seed=1) for f in (0.0001, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
    assert [len(s) for s in subsets] == [1, 100, 200, 300, 500, 700, 1_000]
    for small, large in itertools.pairwise(subsets):
        assert [d for d in large if d in small] == small
    assert subsets[-1] == dialogues
    assert take_fraction(dialogues, 0.1, seed=1) == subsets[1] != take_fraction(dialogues, 0.1, seed=2)


def test_pairs():
    assert make_pairs([["a", "b", "c", "d", "e"], ["f"], ["g", "h"]]) == [(["a"], "b"), (["c"], "d"), (["g"], "h")]
    assert make_pairs([list("abcd"), ["f"]], sliding=True) == [(["a"], "b"), (["b"], "c"), (["c"], "d")]
    assert make_pairs([list("abcdef")], turns=4) == [(["a"], "b"), (list("abc"), "d"), (list("bcde"), "f")]
    assert make_pairs([list("abcd")], turns=2, sliding=True) == [(["a"], "b"), (list("ab"), "c"), (list("bc"), "d")]


@pytest.mark.parametrize("limit, query, response", [
    (99, "abcd|ef|", "ghij|"), (8, "abcd|ef|", "ghij|"), (7, "bcd|ef|", "ghij|"), (5, "d|ef|", "ghij|"),
    (4, "|ef|", "ghij"), (3, "ef|", "ghi"), (1, "|", "g")])
def test_a_long_query_keeps_its_end_and_a_long_response_its_start(limit, query, response):
    [encoded] = encode_pairs([(["abcd", "ef"], "ghij")], letters(), limit, limit)
    assert [letters().decode(ids).replace(EOT, "|") for ids in encoded] == [query, response]


def test_a_query_is_a_string_or_a_list_of_turns():
    assert encode_pairs([("Hi!", "Hello.")], letters()) == encode_pairs([(["Hi!"], "Hello.")], letters())
    [(query, response)] = encode_pairs([([f"a{EOT}b", EOT], f"{EOT}c")], letters())
    assert (letters().decode(query), letters().decode(response)) == (f"a{EOT}b{EOT}{EOT}{EOT}", f"{EOT}c{EOT}")
    assert (query.count(letters().eot_token), response.count(letters().eot_token)) == (2, 1)    # our own separators


def test_cutting_a_long_turn_before_it_is_tokenized_changes_nothing(tiny):
    for turns in read_dialogues("sample")["test"][:20]:
        turn = " ".join(turns * 5)
        ids = tiny[0].encode_ordinary(turn) + [tiny[0].eot_token]
        assert encode_pairs([([turn], turn)], tiny[0], 5, 5) == [(ids[-5:], ids[:5])]
    [(query, _)] = encode_pairs([("word " * 2_000_000, "b")], letters(), 8)             # ten megabytes
    assert letters().decode(query) == f"d word {EOT}"


def test_two_queries_are_the_same_by_their_words():
    same = [["How are you?"], ["how are you"], ["  HOW   are, you?!"], ["How—are\nyou…"]]
    assert len(set(map(query_key, same))) == 1
    others = [["how are you", ""], ["how", "are you"], ["howareyou"], ["how are you 2"], ["hów are you"]]
    assert len({query_key(query) for query in same + others}) == 1 + len(others)
    assert query_key(["ÄÖ 中文?"]) == query_key(["äö  中文"])


def settings_of(folder, fraction=1.0, seed=0):
    return {"data": str(folder), "turns": 1, "pairs": "steps", "fraction": fraction, "seed": seed, "max_query": 8,
            "max_response": 8}


def test_seen_means_in_the_full_training_split_whatever_the_fraction(tmp_path):
    folder = write(tmp_path, train="".join(f"q{i} __eou__ r{i}\n" for i in range(10)), validation="a __eou__ b",
                   test="q0 __eou__ x\nnew __eou__ r1\nQ9 ?! __eou__ x\nr3 __eou__ q3\n")
    splits = load_splits(settings_of(folder, fraction=0.1), letters())
    assert splits.seen == [True, False, True, False]                    # to be a response there is not enough
    sizes = {"train": 1, "validation": 1, "test": 4}
    assert {split: len(pairs) for split, pairs in splits.pairs.items()} == sizes
    assert {split: len(examples) for split, examples in splits.examples.items()} == sizes
    assert load_splits(settings_of(folder), letters()).seen == splits.seen


def test_splits_know_the_dialogues_and_the_tokenizer_they_were_made_of(tmp_path):
    config = settings_of(write(tmp_path / "data", **{s: f"{s} __eou__ b" for s in SPLITS}))
    config["dialogues"] = load_splits(config, letters()).fingerprint
    assert load_splits(config, letters()).fingerprint == config["dialogues"]
    with pytest.raises(ValueError, match="changed since"):
        load_splits(config, load_tokenizer(write_vocabulary(tmp_path / "other", merges=("t e", "t r"))))
    write(tmp_path / "data", test="test __eou__ c")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*changed since"):
        load_splits(config, letters())


def test_a_fraction_that_leaves_no_pair_is_refused(tmp_path):
    folder = write(tmp_path, train="alone\n" * 9 + "a __eou__ b", validation="a __eou__ b", test="a __eou__ b")
    with pytest.raises(ValueError, match="--fraction 0.1"):
        load_splits(settings_of(folder, fraction=0.1, seed=1), letters())


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=9)


def row_length(example):
    return len(example[0]) + len(example[1])


@settings(max_examples=60, deadline=None)
@given(examples=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=9), size=st.integers(1, 10),
       seed=st.none() | st.integers(0, 9))
def test_batches_are_a_permutation_of_similar_lengths(examples, size, seed):
    batches = group_by_length(examples, size, row_length, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1) and max(map(len, batches)) <= size
    lengths = [[row_length(examples[i]) for i in batch] for batch in batches]
    assert seed is not None or lengths == sorted(lengths, reverse=True)
    for a, b in itertools.combinations(sorted(lengths, key=lambda batch: (max(batch), min(batch))), 2):
        assert max(a) <= min(b)                                         # no example fits better in another batch


def test_the_order_of_batches_and_their_company_change_with_the_seed():
    examples = [([1] * (1 + i % 5), [1]) for i in range(200)]
    one, again, other = (group_by_length(examples, 8, row_length, seed) for seed in (1, 1, 2))
    assert one == again
    assert sorted(map(sorted, one)) != sorted(map(sorted, other))
    assert [len(examples[batch[0]][0]) for batch in one] != [len(examples[batch[0]][0]) for batch in other]
