"""Tokenizer, dialogues, pairs: against transformers' and tokenizers' own, by hand, and by properties."""
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
from data import (SPLITS, TINY, detokenize, encode_pairs, load_tokenizer, make_pairs, parse_text, query_key,
                  read_dialogues, take_fraction)
from prompt_encoder import group_by_length

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


def write_vocabulary(folder, merges=("h e", "Ġ t"), header="#version: 0.2\n", newline="\n", last="\n", **more):
    """GPT-2's two files in small: the 256 bytes, some merges, <|endoftext|>."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + [EOT]
    text = (header + "\n".join(merges) + last).replace("\n", newline)
    (folder / "merges.txt").write_bytes(text.encode())
    (folder / "vocab.json").write_text(json.dumps(dict(zip(words, range(999))) | more), "utf-8")
    return folder


def listed(folder):
    """What tokenizers reads in such a folder."""
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text("utf-8").splitlines()]
    theirs = Tokenizer(models.BPE(vocab, [merge for merge in merges if merge and merge[0] != "#version:"]))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return theirs


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


@pytest.mark.parametrize("form", [{"header": ""}, {"newline": "\r\n"}, {"last": ""}], ids=str)
def test_every_way_of_writing_merges_is_one_tokenizer(tmp_path, form):
    """A line of merges may begin with #, as the header does."""
    ours = load_tokenizer(write_vocabulary(tmp_path, ("# #", "## #", "h e"), **form))
    same_ids(ours, listed(tmp_path), ["he the", "#### #version: ###", "#version"])


@pytest.mark.parametrize("form", ["two files", "tokenizer.json", "merges as strings"])
def test_tokenizers_of_ones_own(tmp_path, form):
    """Special tokens first; in two files, or in tokenizer.json, which wins over old files; merges may be strings."""
    theirs = trained(special=("[PAD]", EOT))
    whole = json.loads(theirs.to_str())
    if form == "merges as strings":
        whole["model"]["merges"] = [" ".join(merge) for merge in whole["model"]["merges"]]
    if form == "two files":
        theirs.model.save(str(tmp_path))
    else:
        (write_vocabulary(tmp_path) / "tokenizer.json").write_text(json.dumps(whole))
    ours = load_tokenizer(tmp_path)
    assert ours.eot_token == 1 and ours.special_tokens_set == {"[PAD]", EOT}
    same_ids(ours, theirs, turns_of("sample", 40))


@pytest.mark.parametrize("form", ["tokenizer.json", "version 4"])
def test_special_tokens_are_text_and_added_words_are_one_token(tmp_path, form):
    """As transformers 5 or 4 saves them. [PAD] as every DialoGPT tutorial adds it; a word may be said, [PAD] never."""
    theirs = GPT2Tokenizer.from_pretrained(TINY / "tiny-gpt2")
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.add_tokens(["covid", "New", "New York", "the", "a.b|c", "été"])
    ids = theirs.get_vocab()
    if form == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
    else:
        shutil.copytree(TINY / "tiny-gpt2", tmp_path, dirs_exist_ok=True)
        added = {word: i for word, i in ids.items() if i > 4095 or word == "the"}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(theirs.special_tokens_map))
    ours = load_tokenizer(tmp_path)
    assert (ours.n_vocab, ours.eot_token) == (len(theirs), 4095)
    assert ours.word_ids == set(range(len(theirs))) - {ids["[PAD]"]}
    same_ids(ours, theirs, ["Hello [PAD]there", "covid in New York, New England: other covids", "a.b|c the été\n New"])


@pytest.mark.parametrize("merges, sound", [
    (["b c", "a b", "ab c"], False), (["a b", "b c", "ab c"], True), (["a b", "a ab"], True), (["a a", "a aa"], False),
    (["a a", "aa a", "aa aa"], True), (["b c", "c d", "a bc", "abc d"], True), (["b c", "a b", "c d", "ab cd"], False)])
def test_merges_that_tiktoken_reads_differently_are_refused(tmp_path, merges, sound):
    """GPT-2 joins the listed pairs alone; tiktoken any two neighbours whose joint is a token."""
    write_vocabulary(tmp_path, merges)
    if sound:
        same_ids(load_tokenizer(tmp_path), listed(tmp_path), map("".join, itertools.product("abcd", repeat=5)))
    else:
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*KeyError"):
            load_tokenizer(tmp_path)


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": EOT}}, {"Sequence": {"id": "A"}}]}
WORD = {"id": 999, "content": "covid", "special": False}


@pytest.mark.parametrize("part, change, name", [
    ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space"), ("pre_tokenizer", None, "NoneType"),
    ("pre_tokenizer", {"use_regex": False}, "pre_tokenizer"), ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer"),
    ("normalizer", {"type": "Lowercase"}, "normalizer"), ("post_processor", TEMPLATE, "post_processor"),
    ("added_tokens", [WORD | {"lstrip": True}], "lstrip"), ("added_tokens", [3], "TypeError"),
    ("model", None, "NoneType"), ("model", {"merges": [["a"]]}, "unpack")], ids=str)
def test_settings_that_would_change_the_ids_are_refused(tmp_path, part, change, name):
    whole = json.loads(trained(merges=5).to_str())
    whole[part] = whole[part] | change if isinstance(change, dict) and whole[part] else change
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*{name}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [{"h": None}, {EOT: -1}, {"he": 257, "Ġt": 256}, {"Ġt": 256}, {EOT: 5}], ids=str)
def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_tokenizer(write_vocabulary(tmp_path, **change))


@pytest.mark.parametrize("name", ["add_prefix_space", "add_bos_token"])
def test_settings_beside_the_older_files_count(tmp_path, name):
    (write_vocabulary(tmp_path) / "tokenizer_config.json").write_text(json.dumps({name: True}))
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path)


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
    ("a __eou__ b\rc __eou__ d\r", [["a", "b"], ["c", "d"]]),                               # CR
    ("Yes, sir __eou__ {no}\n[1] __eou__ a,b\n", [["Yes, sir", "{no}"], ["[1]", "a,b"]]),   # no CSV, no JSON
    ("\n \n\r\na __eou__ b\n\n__eou__ __eou__\n\t\n", [["a", "b"]]),                        # blank lines
    ("a __eou__ __eou__ c __eou__ d", [["a", "", "c", "d"]]),                               # an empty turn stays
    ("__eou__ a __eou__ b\n", [["", "a", "b"]]),                                            # at the beginning, too
    ("a __eou__ \u200b \u200d __eou__ c", [["a", "", "c"]]),                                # an invisible one, too
    ("a\u2028b\x0cc\x0bd\x85e __eou__ f\u2029g", [["a\u2028b\x0cc\x0bd\x85e", "f\u2029g"]]),
    ("👩‍👧 e\u0301 __eou__ \u202bשלום, عالم\u202c\n", [["👩‍👧 e\u0301", "\u202bשלום, عالم\u202c"]]),
    (f"a{EOT}b __eou__ {EOT}", [[f"a{EOT}b", EOT]]),
    ("a _eou_ __EOU__ __eou_ b __eou__ c", [["a _eou_ __EOU__ __eou_ b", "c"]]),            # what is no separator
])
def test_oddities_of_the_text_format(text, dialogues):
    assert parse_text(text.encode(), "train.txt") == dialogues


@pytest.mark.parametrize("place", range(8))
def test_an_empty_turn_never_flips_the_roles(place):
    """Customer and clerk take turns, one of them silent once: nobody answers himself, and silence makes no pair."""
    turns = ["customer", "clerk"] * 4
    turns[place] = "\u200b"
    dialogue = parse_text((" __eou__ ".join(turns) + " __eou__").encode(), "train.txt")
    assert make_pairs(dialogue) == [(["customer"], "clerk")] * 3
    sliding = make_pairs(dialogue, sliding=True)
    assert len(sliding) == (6 if place in (0, 7) else 5) and all(query != [response] for query, response in sliding)


# ------------------------------------------------------------------------------------------------- folders and files

@pytest.mark.parametrize("name, text, words", [
    ("a.csv", b"Hi, you __eou__ Fine\n", "'Hi! __eou__ Hello.'"), ("a.txt", b'["a __eou__ b"]', "'Hi! __eou__ Hello.'"),
    ("a.txt", b'a __eou__ b\n{"text": "a __eou__ b"}\n', "'Hi! __eou__ Hello.'"),
    ("a.txt", b"A: Hi!\nB: Hello.\n", "'Hi! __eou__ Hello.'"), ("a.txt", b"a __eou__ \xe9\n", "UnicodeDecodeError"),
    ("a.txt", "a __eou__ b".encode("utf-16"), "UnicodeDecodeError")], ids=range(6))
def test_what_is_not_in_the_format_is_named_with_the_cure(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}.*{words}"):
        read_dialogues(tmp_path / name)


@pytest.mark.parametrize("n, sizes", [(3, [1, 1, 1]), (57, [47, 5, 5])])
def test_one_file_or_list_is_split_always_in_the_same_way(tmp_path, n, sizes):
    (tmp_path / "all.txt").write_text("".join(f"q{i} __eou__ r{i}\n" for i in range(n)))
    dialogues = [[f" q{i}", f"r{i}\n"] for i in range(n)]
    splits = read_dialogues(tmp_path / "all.txt")
    assert [len(splits[split]) for split in SPLITS] == sizes
    assert sorted(itertools.chain(*splits.values())) == sorted([f"q{i}", f"r{i}"] for i in range(n))
    assert splits == read_dialogues(dialogues) == read_dialogues(str(tmp_path / "all.txt"))
    assert read_dialogues(splits | {"train": dialogues})["train"] == [[f"q{i}", f"r{i}"] for i in range(n)]


@pytest.mark.parametrize("dialogues, words", [
    (["Hi!", "Hello."], "expected a list of turns"), ([["a", None]], "NoneType"), ([["a", "b"]], "train.*no .query"),
    ({"train": [["a", "b"]]}, "KeyError 'validation'"), ([["half an emoji: \ud83d", "b"]], "surrogates")], ids=range(5))
def test_lists_that_are_no_dialogues_are_refused(dialogues, words):
    with pytest.raises(ValueError, match=words):
        read_dialogues(dialogues)


def test_unknown_data_is_refused_with_what_is_known():
    with pytest.raises(FileNotFoundError, match="'daily'.*sample, dailydialog, multiwoz"):
        read_dialogues("daily")


@pytest.mark.parametrize("tokenized, text", [
    ("I ' m fine , thanks .", "I'm fine, thanks."), ("don't . I ’ Ve been", "don't. I’Ve been"),
    ("you are right.But no", "you are right.But no"), ('say " Thank you " . ok', 'say "Thank you". ok'),
    ("my parents ' house", "my parents' house"), ("' Titanic ' , isn ' t it ?", "'Titanic', isn't it?"),
    ("$ 5 or 10 $ , 50 % off", "$5 or 10 $, 50% off"), ("at 3 : 30 p . m . sharp", "at 3:30 p.m. sharp"),
    ("( Bob groans . ) Well ...", "(Bob groans.) Well..."), ("3 , 4 or $ 2.50", "3, 4 or $2.50"),
    ("the “ green ” and ‘ blue ’ ones", "the “green” and ‘blue’ ones"), ("", "")])
def test_detokenized_by_hand(tokenized, text):
    assert detokenize(tokenized) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("I ' s ’ t “ ” \" , . : 30 % $ ( ) - / don't a b".split())))
def test_detokenizing_takes_spaces_alone_and_no_words_apart(words):
    text = " ".join(words)
    for find in (r"\w+|[^\w\s]", r"\w+", r"\S"):
        assert re.findall(find, detokenize(text)) == re.findall(find, text)


@pytest.mark.parametrize("name, dialogues, turns, pairs, seen", [
    ("sample", [800, 100, 100], None, None, 37),
    ("dailydialog", [11_118, 1_000, 1_000], [87_170, 8_069, 7_740], 3_700, 1_158)])
def test_the_data_sets_have_their_published_counts(name, dialogues, turns, pairs, seen):
    splits = dialogues_of(name)
    assert [len(splits[split]) for split in SPLITS] == dialogues
    assert turns in (None, [sum(map(len, splits[split])) for split in SPLITS])
    known, test = {query_key(query) for query, _ in make_pairs(splits["train"])}, make_pairs(splits["test"])
    assert pairs in (None, len(test)) and sum(query_key(query) in known for query, _ in test) == seen


# ------------------------------------------------------------------------------------------------- MultiWOZ

def said(*turns):
    """("U", text) and ("S", text) in MultiWOZ 2.2's schema."""
    speakers = {"U": "USER", "S": "SYSTEM"}
    return {"turns": [{"speaker": speakers.get(who, who), "utterance": text} for who, text in turns]}


def multiwoz(folder, part, contents):
    """A folder in MultiWOZ's layout, in which one part holds these contents (bytes, or anything JSON)."""
    for name in ("train", "dev", "test"):
        held = contents if name == part else [said(("U", "a"), ("S", "b"))]
        (folder / name).mkdir()
        held = held if isinstance(held, bytes) else json.dumps(held).encode()
        (folder / name / "dialogues_001.json").write_bytes(held)
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
    expected = ["hi a room?", "", "please", "yes two", "bye"]
    assert read_dialogues(multiwoz(tmp_path, "train", [dialogue]))["train"] == [expected]


@pytest.mark.parametrize("contents", [
    b"", b"[" * 100_000, ["hello"], [{}], [{"turns": [{"speaker": "USER"}]}], [said(("U", "a"), ("user", "b"))],
    [said(("U", "a"), ("S", None))], [said(("U", "half an emoji: \ud83d"), ("S", "b"))]], ids=range(8))
def test_a_file_that_breaks_the_schema_is_named(tmp_path, contents):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "dev"))):
        read_dialogues(multiwoz(tmp_path, "dev", contents))


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


def test_a_query_is_a_string_or_a_list_of_turns_and_white_space_around_them_counts_for_nothing():
    eot = letters().eot_token
    assert encode_pairs([(" Hi!\n", " b ")], letters()) == encode_pairs([(["Hi!"], "b")], letters())
    assert encode_pairs([("\u200b", "")], letters()) == [([eot], [eot])]
    [(query, response)] = encode_pairs([([f"a{EOT}b", EOT], f"{EOT}c")], letters())
    assert (letters().decode(query), letters().decode(response)) == (f"a{EOT}b{EOT}{EOT}{EOT}", f"{EOT}c{EOT}")
    assert (query.count(eot), response.count(eot)) == (2, 1)            # our own separators


def test_two_queries_are_the_same_by_their_words():
    same = [["How are you?"], ["how are you"], ["  HOW   are, you?!"], ["How—are\nyou…"]]
    assert len(set(map(query_key, same))) == 1
    others = [["how are you", ""], ["how", "are you"], ["howareyou"], ["how are you 2"], ["hów are you"]]
    assert len({query_key(query) for query in same + others}) == 1 + len(others)
    assert query_key(["ÄÖ 中文?"]) == query_key(["äö  中文"])
    assert query_key(["कि"]) != query_key(["की"]) and query_key(["कि है।"]) == (("कि", "है"),)


@given(st.text(st.characters(max_codepoint=0x17f, exclude_characters="İ")))       # in lower case i and a mark
def test_in_english_words_are_what_re_finds(text):
    assert query_key([text]) == (tuple(re.findall(r"\w+", text.lower())),)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 10), st.none() | st.integers(0, 9))
def test_batches_are_a_permutation_of_similar_lengths(lengths, size, seed):
    batches = group_by_length(lengths, size, seed)
    assert batches == group_by_length(lengths, size, seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1) and max(map(len, batches)) <= size
    rows = sorted(([lengths[i] for i in batch] for batch in batches), key=lambda row: (max(row), min(row)))
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(rows))   # no example fits better in another batch
