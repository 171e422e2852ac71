"""Tokenizer, dialogues, pairs, splits: against transformers' and tokenizers' own, by hand, and by properties. What a run
says of data and vocabularies that are missing or broken stands in test_train.py."""
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer

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
def trained(merges=150, special=(EOT,)):
    """A byte-level tokenizer of one's own, as the Hugging Face course makes it: special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=256 + merges + len(special), special_tokens=list(special),
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(turns_of("sample", 40), trainer)
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


@pytest.mark.parametrize("form", [
    {"header": ""}, {"newline": "\r\n"}, {"last": ""}, {"mark": "\ufeff"},
    {"header": "", "last": "", "newline": "\r\n", "mark": "\ufeff"}], ids=str)
def test_every_way_of_writing_merges_is_one_tokenizer(tmp_path, form):
    """A line of merges may begin with #, as the header does."""
    merges = ("# #", "## #", "h e")
    ours = load_tokenizer(write_vocabulary(tmp_path, merges, **form))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8-sig"))
    theirs = Tokenizer(models.BPE(vocab, [tuple(merge.split()) for merge in merges]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    same_ids(ours, theirs, ["he the", "#### #version: ###", "#version"])


@pytest.mark.parametrize("form", ["two files", "pairs", "strings"])
def test_tokenizers_of_ones_own(tmp_path, form):
    """Special tokens first; two files, or tokenizer.json alone, whose merges were once strings."""
    theirs = trained(special=("[PAD]", EOT))
    whole = json.loads(theirs.to_str())
    vocab, merges = whole["model"]["vocab"], whole["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    assert (vocab["[PAD]"], vocab[EOT]) == (0, 1)
    if form == "two files":
        (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    else:
        whole["model"]["merges"] = merges if form == "strings" else [merge.split() for merge in merges]
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.eot_token == 1 and ours.special_tokens_set == {"[PAD]", EOT}
    same_ids(ours, theirs, turns_of("sample", 40))


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


@pytest.mark.parametrize("change, name", [
    ({"pre_tokenizer__add_prefix_space": True}, "add_prefix_space"), ({"pre_tokenizer__use_regex": False}, "use_regex"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"), ({"pre_tokenizer": None}, "pre_tokenizer"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer"), ({"post_processor": TEMPLATE}, "post_processor"),
    ({"model__type": "WordPiece"}, "type"), ({"model__dropout": 0.1}, "dropout"),
    ({"model__ignore_merges": True}, "ignore_merges"), ({"model__continuing_subword_prefix": "##"}, "subword_prefix"),
    ({"model__end_of_word_suffix": "</w>"}, "word_suffix"), ({"model": ...}, "tokenizer.json"),
    ({"model__merges": [["a"]]}, "tokenizer.json"), ({"added_tokens": [3]}, "tokenizer.json")], ids=str)
def test_settings_that_would_change_the_ids_are_refused_by_name(tmp_path, change, name):
    assert load_tokenizer(tokenizer_json(tmp_path)).eot_token == 0
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}.*{re.escape(name)}"):
        load_tokenizer(tokenizer_json(tmp_path, **change))


@pytest.mark.parametrize("setting", ["add_prefix_space", "add_bos_token", "do_lower_case"])
def test_settings_in_tokenizer_config_are_refused_by_name(tmp_path, setting):
    config = write_vocabulary(tmp_path) / "tokenizer_config.json"
    config.write_text(json.dumps({setting: False, "model_max_length": 1024}))
    assert load_tokenizer(tmp_path).n_vocab == 259
    config.write_text(json.dumps({setting: True}))
    with pytest.raises(ValueError, match=setting):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"h": None}, "h"), ({"h": 1, "i": 1}, "same id"), ({EOT: -1}, "endoftext"), ({"new": 2**31}, "new"),
    ({"he": 257, "Ġt": 256}, "rise"), ({"a": ...}, "no 'a'"), ({"he": ...}, "no 'he'"),
    ({EOT: ...}, "no <.endoftext.>")], ids=str)
def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(tmp_path, change, words):
    vocab = json.loads((write_vocabulary(tmp_path) / "vocab.json").read_text(encoding="utf-8")) | change
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for word, i in vocab.items() if i is not ...}))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{words}"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_changed_on_disk_is_read_anew(tmp_path):
    assert len(load_tokenizer(write_vocabulary(tmp_path)).encode_ordinary("hehe")) == 2
    assert len(load_tokenizer(write_vocabulary(tmp_path, merges=["h e", "he he"])).encode_ordinary("hehe")) == 1


def test_data_is_read_without_requests():
    code = """if True:
        import sys
        sys.modules["requests"] = None
        import data
        data.load_tokenizer(data.checkpoint_folder("tiny-gpt2"))
        print(len(data.read_dialogues("sample")["train"]))"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "800\n"


# ------------------------------------------------------------------------------------------------- the text format

@pytest.mark.parametrize("text, dialogues", [
    ("a __eou__ b\nc __eou__ d", [["a", "b"], ["c", "d"]]),
    ("a __eou__ b __eou__\nc __eou__ d __eou__ \n", [["a", "b"], ["c", "d"]]),              # __eou__ at line ends
    ("\ufeffa __eou__ b\n", [["a", "b"]]),                                                  # byte order mark
    ("a __eou__ b\r\nc __eou__ d\r\n", [["a", "b"], ["c", "d"]]),                           # CRLF
    ("\n \n\r\na __eou__ b\n\n__eou__ __eou__\n\t\n", [["a", "b"]]),                        # blank lines
    ("a __eou__ __eou__ c __eou__ d", [["a", "", "c", "d"]]),                               # an empty turn stays
    ("__eou__ a __eou__ b\n", [["", "a", "b"]]),                                            # at the beginning, too
    ("a __eou__ \u200b \u200d __eou__ c", [["a", "", "c"]]),                                # an invisible one, too
    ("a\u2028b\x0cc\x0bd\x85e __eou__ f\u2029g\rh", [["a\u2028b\x0cc\x0bd\x85e", "f\u2029g\rh"]]),
    ("👩‍👧 e\u0301 __eou__ \u202bשלום, عالم\u202c\n", [["👩‍👧 e\u0301", "\u202bשלום, عالم\u202c"]]),
    (f"a{EOT}b __eou__ {EOT}", [[f"a{EOT}b", EOT]]),
    ("a _eou_ __EOU__ __eou_ b __eou__ c", [["a _eou_ __EOU__ __eou_ b", "c"]]),            # what is no separator
])
def test_oddities_of_the_text_format(text, dialogues):
    assert parse_text(text.encode(), "train.txt") == dialogues


@pytest.mark.parametrize("gap", ["", "\u200b"])
@pytest.mark.parametrize("place", range(8))
def test_an_empty_turn_never_flips_the_roles(gap, place):
    """Customer and clerk take turns, one of them silent once: nobody answers himself, and silence makes no pair."""
    turns = [who for _ in range(4) for who in ("customer", "clerk")]
    turns[place] = gap
    dialogue = parse_text((" __eou__ ".join(turns) + " __eou__").encode(), "train.txt")
    assert make_pairs(dialogue) == [(["customer"], "clerk")] * 3
    sliding = make_pairs(dialogue, sliding=True)
    assert {(query, response) for [query], response in sliding} <= {("customer", "clerk"), ("clerk", "customer")}
    assert len(sliding) == (6 if place in (0, 7) else 5)


# ------------------------------------------------------------------------------------------------- folders and files

def write(folder, **texts):
    """Files of one folder: train="..." makes train.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    return folder


@pytest.mark.parametrize("n, sizes", [(3, [1, 1, 1]), (57, [47, 5, 5])])
def test_one_file_is_split_by_the_seed(tmp_path, n, sizes):
    write(tmp_path, all="".join(f"q{i} __eou__ r{i}\n" for i in range(n)))
    one, again, other = (read_dialogues(tmp_path / "all.txt", seed) for seed in (0, 0, 1))
    assert [len(one[split]) for split in SPLITS] == sizes
    assert sorted(itertools.chain(*one.values())) == sorted([f"q{i}", f"r{i}"] for i in range(n))
    assert one == again and one["test"] + one["train"] != other["test"] + other["train"]


def test_the_embedded_dialogues():
    splits = dialogues_of("sample")
    assert [len(splits[split]) for split in SPLITS] == [800, 100, 100]
    turns = turns_of("sample")
    assert all(len(dialogue) >= 4 for split in SPLITS for dialogue in splits[split])
    assert all(3 <= len(turn.split()) <= 30 and turn.isascii() and "  " not in turn for turn in turns)
    known = {query_key(query) for query, _ in make_pairs(splits["train"])}
    assert sum(query_key(query) in known for query, _ in make_pairs(splits["test"])) == 37


def test_dailydialog_has_its_published_counts():
    dialogues = dialogues_of("dailydialog")
    assert [len(dialogues[split]) for split in SPLITS] == [11_118, 1_000, 1_000]
    assert [sum(map(len, dialogues[split])) for split in SPLITS] == [87_170, 8_069, 7_740]
    assert len(make_pairs(dialogues["test"])) == 3_700


# ------------------------------------------------------------------------------------------------- MultiWOZ

def said(*turns):
    """("U", text) and ("S", text) in MultiWOZ 2.2's schema."""
    speakers = {"U": "USER", "S": "SYSTEM"}
    turns = [{"speaker": speakers.get(who, who), "utterance": text} for who, text in turns]
    return {"dialogue_id": "D1.json", "turns": turns}


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


@pytest.mark.parametrize("contents", [
    b"", b"{}", b"[" * 100_000, ["hello"], [{}], [{"turns": [{"speaker": "USER"}]}], [said(("U", "a"), ("user", "b"))],
    [said(("U", "a"), ("S", None))], [said(("U", "half an emoji: \ud83d"), ("S", "b"))], [said(("S", "no pair"))]],
    ids=range(10))
def test_a_file_that_breaks_the_schema_is_named(tmp_path, contents):
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
    (8, "abcd|ef|", "ghij|"), (7, "bcd|ef|", "ghij|"), (4, "|ef|", "ghij"), (1, "|", "g")])
def test_a_long_query_keeps_its_end_and_a_long_response_its_start(limit, query, response):
    [encoded] = encode_pairs([(["abcd", "ef"], "ghij")], letters(), limit, limit)
    assert [letters().decode(ids).replace(EOT, "|") for ids in encoded] == [query, response]


def test_a_query_is_a_string_or_a_list_of_turns():
    assert encode_pairs([("Hi!", "Hello.")], letters()) == encode_pairs([(["Hi!"], "Hello.")], letters())
    [(query, response)] = encode_pairs([([f"a{EOT}b", EOT], f"{EOT}c")], letters())
    assert (letters().decode(query), letters().decode(response)) == (f"a{EOT}b{EOT}{EOT}{EOT}", f"{EOT}c{EOT}")
    assert (query.count(letters().eot_token), response.count(letters().eot_token)) == (2, 1)    # our own separators


def test_cutting_a_long_turn_before_it_is_tokenized_changes_nothing():
    tiny = load_tokenizer(TINY / "tiny-gpt2")
    for turns in read_dialogues("sample")["test"][:20]:
        turn = " ".join(turns * 5)
        ids = tiny.encode_ordinary(turn) + [tiny.eot_token]
        assert encode_pairs([([turn], turn)], tiny, 5, 5) == [(ids[-5:], ids[:5])]
    [(query, _)] = encode_pairs([("word " * 2_000_000, "b")], letters(), 8)             # ten megabytes
    assert letters().decode(query) == f"d word {EOT}"


def test_two_queries_are_the_same_by_their_words():
    same = [["How are you?"], ["how are you"], ["  HOW   are, you?!"], ["How—are\nyou…"]]
    assert len(set(map(query_key, same))) == 1
    others = [["how are you", ""], ["how", "are you"], ["howareyou"], ["how are you 2"], ["hów are you"]]
    assert len({query_key(query) for query in same + others}) == 1 + len(others)
    assert query_key(["ÄÖ 中文?"]) == query_key(["äö  中文"])


def test_seen_means_in_the_full_training_split_whatever_the_fraction(tmp_path):
    folder = write(tmp_path, train="".join(f"q{i} __eou__ r{i}\n" for i in range(10)), validation="a __eou__ b",
                   test="q0 __eou__ x\nnew __eou__ r1\nQ9 ?! __eou__ x\nr3 __eou__ q3\n")
    config = {"data": str(folder), "turns": 1, "pairs": "steps", "seed": 0, "max_query": 8, "max_response": 8}
    splits = load_splits(config | {"fraction": 0.1}, letters())
    assert splits.seen == [True, False, True, False]                    # to be a response there is not enough
    sizes = {"train": 1, "validation": 1, "test": 4}
    assert {split: len(pairs) for split, pairs in splits.pairs.items()} == sizes
    assert {split: len(examples) for split, examples in splits.examples.items()} == sizes
    assert load_splits(config | {"fraction": 1.0}, letters()).seen == splits.seen


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
