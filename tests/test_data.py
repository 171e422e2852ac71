"""Tokenizer, dialogues, pairs and batches: against transformers' tokenizer, by hand, and by properties."""
import itertools
import json
import random
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

from conftest import SHARED
from data import (TINY, encode_pairs, group_by_length, load_tokenizer, make_batch, make_pairs, parse_text,
                  read_dialogues, take_fraction)

SPLITS = ("train", "validation", "test")
EOT = "<|endoftext|>"


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"needs ../shared/{name}")
    return SHARED / name


@pytest.fixture(scope="module")
def dailydialog():
    return read_dialogues(str(shared("dailydialog")))


def write_vocabulary(folder, merges=("h e", "Ġ t")):
    """GPT-2's format in small: the 256 bytes, some merges, <|endoftext|>."""
    tokens = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + [EOT]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A tokenizer without merges: a token per letter, so that lengths can be counted by eye."""
    return load_tokenizer(write_vocabulary(tmp_path_factory.mktemp("letters"), merges=()))


# --------------------------------------------------------------------------------------------------------- tokenizer

@pytest.fixture(scope="module", params=["tiny-gpt2", "gpt2-bpe"])
def both_tokenizers(request):
    """Ours and transformers', from the embedded vocabulary and from the real one."""
    folder = TINY / "tiny-gpt2" if request.param == "tiny-gpt2" else shared("gpt2-bpe")
    return load_tokenizer(folder), GPT2Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("both_tokenizers, name", [("tiny-gpt2", "sample"), ("gpt2-bpe", "dailydialog")],
                         indirect=["both_tokenizers"])
def test_tokens_are_those_of_transformers_on_every_turn(both_tokenizers, name):
    ours, theirs = both_tokenizers
    dialogues = read_dialogues(name if name == "sample" else str(shared(name)))
    turns = sorted({turn for split in SPLITS for dialogue in dialogues[split] for turn in dialogue})
    assert ours.n_vocab == len(theirs) and ours.eot_token == theirs.eos_token_id
    assert [ours.encode_ordinary(turn) for turn in turns] == theirs(turns)["input_ids"]


pieces = [EOT, " ", "  ", "\n", "\x00", "\u2028", "'ll", "é", "e\u0301", "👩‍👧", "שלום", "١٢", "a", "-"]


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from(pieces)).map("".join))
def test_tokens_are_those_of_transformers_on_any_text(both_tokenizers, text):
    ours, theirs = both_tokenizers
    assert ours.encode_ordinary(text) == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.decode(ours.encode_ordinary(text)) == text


def test_a_vocabulary_changed_on_disk_is_read_anew(tmp_path):
    assert len(load_tokenizer(write_vocabulary(tmp_path)).encode_ordinary("hehe")) == 2
    assert len(load_tokenizer(write_vocabulary(tmp_path, merges=["h e", "he he"])).encode_ordinary("hehe")) == 1


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_missing_vocabulary_is_named(tmp_path, file):
    (write_vocabulary(tmp_path) / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load_tokenizer(tmp_path)


def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(tmp_path):
    vocab = json.loads((write_vocabulary(tmp_path) / "vocab.json").read_text(encoding="utf-8"))
    changes = {"new": len(vocab)}, {"h": vocab["e"], "e": vocab["h"]}, {EOT: 3}, {EOT: -1}, {EOT: None}, {"h": "h"}
    for text in ("", "[]", "{}", f'"{EOT}"', "[" * 100_000, *(json.dumps(vocab | change) for change in changes)):
        (tmp_path / "vocab.json").write_text(text)
        with pytest.raises(ValueError, match="vocab.json.*merges.txt"):
            load_tokenizer(tmp_path)


def test_a_damaged_vocabulary_is_refused_or_harmless(tmp_path):
    """Random changes to the files: each gives a ValueError that names them, or a tokenizer that still loses nothing."""
    write_vocabulary(tmp_path)
    chance, refused = random.Random(0), 0
    for file in (tmp_path / "vocab.json", tmp_path / "merges.txt"):
        whole = file.read_bytes()
        for _ in range(250):
            i, j = chance.randrange(len(whole)), chance.choice([0, 1, 1, 5])
            file.write_bytes(whole[:i] + chance.randbytes(chance.randrange(3)) + whole[i + j:])
            try:
                tokenizer = load_tokenizer(tmp_path)
                assert tokenizer.decode(tokenizer.encode_ordinary("the hé 👩‍👧")) == "the hé 👩‍👧"
            except ValueError as error:
                assert str(file) in str(error)
                refused += 1
        file.write_bytes(whole)
    assert 0 < refused < 500


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
    ("__eou__ a __eou__ __eou____eou__ \t __eou__ b\n", [["a", "b"]]),                      # empty turns
    ("a__eou__b", [["a", "b"]]),                                                            # no spaces
    ("a\x00b __eou__ \x00\n", [["a\x00b", "\x00"]]),                                        # NUL
    ("a\u2028b\x0cc\x0bd\x85e __eou__ f\u2029g\rh", [["a\u2028b\x0cc\x0bd\x85e", "f\u2029g\rh"]]),  # no line ends
    ("👩‍👧 e\u0301 __eou__ \u202bשלום, عالم\u202c\n", [["👩‍👧 e\u0301", "\u202bשלום, عالم\u202c"]]),    # kept as they are
    (f"a{EOT}b __eou__ {EOT}", [[f"a{EOT}b", EOT]]),
    ("a _eou_ __EOU__ __eou_ b __eou__ c", [["a _eou_ __EOU__ __eou_ b", "c"]]),            # what is no separator
])
def test_oddities_of_the_text_format(text, dialogues):
    assert parsed(text) == dialogues


turns = (st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\ufeff")) |
         st.lists(st.sampled_from(["__eou_", "_eou__", "\r", EOT, "\u2028", "\x00", "a", " "])).map("".join)
         ).map(str.strip).filter(lambda turn: turn and "__eou__" not in turn)


@settings(deadline=None)
@given(dialogues=st.lists(st.lists(turns, min_size=1), min_size=1).filter(lambda ds: any(len(d) > 1 for d in ds)),
       mark=st.sampled_from(["", "\ufeff"]), closing=st.sampled_from(["", " __eou__", " __eou__ "]),
       ending=st.sampled_from(["\n", "\r\n", "\n\n"]), last=st.booleans())
def test_what_is_written_is_read_back(dialogues, mark, closing, ending, last):
    text = mark + ending.join(" __eou__ ".join(turns) + closing for turns in dialogues) + ending * last
    assert parsed(text) == dialogues


def test_a_line_of_ten_megabytes(letters):
    turn = "word " * 2_000_000
    dialogues = parsed(f"{turn}__eou__ {turn}__eou__ b\n")
    assert [len(t) for t in dialogues[0]] == [9_999_999, 9_999_999, 1]
    [(query, response)] = encode_pairs(make_pairs(dialogues), letters, 8, 4)
    assert (letters.decode(query), letters.decode(response)) == (f"rd word{EOT}", "word")


@pytest.mark.parametrize("line, content", [
    (1, b"\xff\xfea __eou__ b\n"), (2, b"a __eou__ b\n\xc3( __eou__ b\n"),
    (3, b"\xef\xbb\xbfa __eou__ b\r\n\r\nb __eou__ \xf0\x9f\x91"), (4, b"\n\n\na\xed\xa0\x80\n")])
def test_invalid_utf8_is_refused_with_file_and_line(line, content):
    with pytest.raises(ValueError, match=rf"^train\.txt, line {line}\b.*UTF-8"):
        parsed(content)


# ------------------------------------------------------------------------------------------------- folders

def write(folder, **texts):
    """Files of one folder: train="..." makes train.txt."""
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    return str(folder)


def test_both_layouts_of_a_folder(tmp_path):
    texts = {split: f"{split} __eou__ b\n" for split in SPLITS}
    (tmp_path / "own").mkdir()
    own = write(tmp_path / "own", **texts)
    for split in SPLITS:
        (tmp_path / "daily" / split).mkdir(parents=True)
        write(tmp_path / "daily" / split, **{f"dialogues_{split}": texts[split]})
    assert read_dialogues(own) == read_dialogues(str(tmp_path / "daily")) == {split: [[split, "b"]] for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("text", ["", "\n\r\n", "one turn __eou__\nand another\n"])
def test_a_split_without_a_pair_is_refused_by_name(tmp_path, split, text):
    folder = write(tmp_path, **{s: "a __eou__ b" for s in SPLITS} | {split: text})
    with pytest.raises(ValueError, match=f"{split}.txt.*pair"):
        read_dialogues(folder)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="validation.txt"):
        read_dialogues(write(tmp_path, train="a __eou__ b", test="a __eou__ b"))
    with pytest.raises(FileNotFoundError, match="no-such-data.*sample.*dailydialog.*multiwoz"):
        read_dialogues("no-such-data")


def test_dailydialog_has_its_published_counts(dailydialog):
    assert [len(dailydialog[split]) for split in SPLITS] == [11_118, 1_000, 1_000]
    assert [sum(map(len, dailydialog[split])) for split in SPLITS] == [87_170, 8_069, 7_740]
    assert len(make_pairs(dailydialog["test"])) == 3_700


# ------------------------------------------------------------------------------------------------- MultiWOZ

def said(*turns, name="D1.json"):
    """("U", text) and ("S", text) in MultiWOZ 2.2's schema, with the frames of the official files."""
    frame = {"actions": [], "service": "hotel", "slots": [], "state": {"slot_values": {"hotel-area": ["east"]}}}
    speakers = {"U": "USER", "S": "SYSTEM"}
    return {"dialogue_id": name, "services": ["hotel"],
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
    return str(folder)


def test_multiwoz_is_read_turn_for_turn():
    folder = shared("multiwoz")
    splits = read_dialogues(str(folder))
    for split, name in zip(SPLITS, ("train", "dev", "test")):
        files = sorted((folder / name).glob("*.json"))
        official = [dialogue["turns"] for file in files for dialogue in json.loads(file.read_bytes())]
        pairs = [(a["utterance"].strip(), b["utterance"].strip()) for turns in official
                 for a, b in zip(turns, turns[1:]) if (a["speaker"], b["speaker"]) == ("USER", "SYSTEM")]
        assert [(query, response) for [query], response in make_pairs(splits[split])] == pairs
    assert [len(splits[split]) for split in SPLITS] == [800, 199, 1_000]


def test_multiwoz_alternates_from_the_users_first_turn(tmp_path):
    dialogue = said(("S", "Welcome!"), ("U", " hi "), ("U", "a room?"), ("S", ""), ("U", "please"),
                    ("S", "yes"), ("S", "two"), ("U", "bye"))
    folder = multiwoz(tmp_path, train_010=[GOOD], train_002=[dialogue])
    assert read_dialogues(folder)["train"] == [["a", "b"], ["hi a room? please", "yes two", "bye"], ["a", "b"]]


@pytest.mark.parametrize("broken", [
    {"dialogue_id": "D2.json"}, {"dialogue_id": "D2.json", "turns": None}, {"dialogue_id": "D2.json", "turns": "hello"},
    {"dialogue_id": "D2.json", "turns": {"0": "hello"}}, {"dialogue_id": "D2.json", "turns": [{"speaker": "USER"}]},
    {"dialogue_id": "D2.json", "turns": [{"utterance": "hello"}]}, said(("U", "a"), ("user", "b"), name="D2.json"),
    said(("U", "a"), ("S", None), name="D2.json"), said(("U", "a"), ("S", ["b"]), name="D2.json"),
    said(("U", "half an emoji: \ud83d"), ("S", "b"), name="D2.json")], ids=range(10))
def test_a_dialogue_that_breaks_the_schema_is_named_with_its_file(tmp_path, broken):
    with pytest.raises(ValueError, match="dialogues_002.json.*dialogue 2 .*D2.json"):
        read_dialogues(multiwoz(tmp_path, dev_002=[GOOD, broken]))


@pytest.mark.parametrize("contents", [b"", b"[{", b'[{"dialogue_id": "\xff"}]', b"null", b"{}", b"[" * 100_000],
                         ids=range(6))
def test_a_file_that_is_no_list_of_dialogues_is_named(tmp_path, contents):
    with pytest.raises(ValueError, match="dialogues_002.json"):
        read_dialogues(multiwoz(tmp_path, test_002=contents))


@pytest.mark.parametrize("contents", [[], ["hello"], [None], [said()], [said(("S", "b"))]], ids=range(5))
def test_multiwoz_without_a_pair_is_refused(tmp_path, contents):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_dialogues(multiwoz(tmp_path, dev_001=contents))


# ------------------------------------------------------------------------------------------------- fractions and pairs

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
    assert make_pairs([list("abcdef")], turns=4) == [(["a"], "b"), (["a", "b", "c"], "d"), (["b", "c", "d", "e"], "f")]
    assert make_pairs([list("abcd")], turns=2, sliding=True) == [(["a"], "b"), (["a", "b"], "c"), (["b", "c"], "d")]


@pytest.mark.parametrize("limit, query, response", [
    (99, "abcd|ef|", "ghij|"), (8, "abcd|ef|", "ghij|"), (7, "bcd|ef|", "ghij|"), (5, "d|ef|", "ghij|"),
    (4, "|ef|", "ghij"), (3, "ef|", "ghi"), (1, "|", "g")])
def test_a_long_query_keeps_its_end_and_a_long_response_its_start(letters, limit, query, response):
    [encoded] = encode_pairs([(["abcd", "ef"], "ghij")], letters, limit, limit)
    assert [letters.decode(ids).replace(EOT, "|") for ids in encoded] == [query, response]


def test_only_our_own_separators_are_the_special_token(letters):
    [(query, response)] = encode_pairs([([f"a{EOT}b", EOT], f"{EOT}c")], letters, 99, 99)
    assert (query.count(letters.eot_token), response.count(letters.eot_token)) == (2, 1)
    assert (letters.decode(query), letters.decode(response)) == (f"a{EOT}b{EOT}{EOT}{EOT}", f"{EOT}c{EOT}")


def test_cutting_a_long_turn_before_it_is_tokenized_changes_nothing(dailydialog):
    tokenizer = load_tokenizer(shared("gpt2-bpe"))
    for dialogue in dailydialog["test"][:50]:
        turn = " ".join(dialogue * 5)
        ids = tokenizer.encode_ordinary(turn) + [tokenizer.eot_token]
        assert encode_pairs([([turn], turn)], tokenizer, 5, 5) == [(ids[-5:], ids[:5])]


# ------------------------------------------------------------------------------------------------- batches

def test_a_batch_worked_out_by_hand():
    examples = [([5, 6], [7, 8]), ([9], [4])]
    batch = make_batch(examples, slots=lambda m: m)
    assert batch.ids.tolist() == [[0, 0, 5, 6, 7, 8],
                                  [0, 9, 4, 0, 0, 0]]
    assert (batch.prompt.tolist(), batch.query.tolist()) == ([2, 1], [2, 1])
    assert (batch.where.tolist(), batch.targets.tolist()) == ([3, 4, 7], [7, 8, 4])
    batch = make_batch(examples, slots=lambda m: 0)
    assert batch.ids.tolist() == [[5, 6, 7, 8],
                                  [9, 4, 0, 0]]
    assert (batch.prompt.tolist(), batch.where.tolist()) == ([0, 0], [1, 2, 4])
    batch = make_batch(examples, slots=lambda m: 3, responses=False)
    assert batch.ids.tolist() == [[0, 0, 0, 5, 6],
                                  [0, 0, 0, 9, 0]]
    assert (batch.prompt.tolist(), batch.query.tolist()) == ([3, 3], [2, 1])
    assert batch.where.tolist() == batch.targets.tolist() == []
    assert all(t.dtype == torch.int64 for t in vars(batch).values())


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=9)
examples = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=9)


@settings(deadline=None)
@given(examples=examples, slots=st.sampled_from([lambda m: 0, lambda m: 4, lambda m: m]))
def test_every_response_token_is_predicted_from_the_place_before_it(examples, slots):
    batch = make_batch(examples, slots)
    assert batch.targets.tolist() == [token for _, response in examples for token in response]
    assert torch.equal(batch.ids.flatten()[batch.where + 1], batch.targets)
    for row, start, m, (query, response) in zip(batch.ids.tolist(), batch.prompt.tolist(), batch.query.tolist(), examples):
        assert row[start:start + m] == query and start == slots(m)
        assert sum(row) == sum(query) + sum(response)                   # slots and padding hold nothing


@settings(deadline=None)
@given(examples=examples, size=st.integers(1, 10), seed=st.none() | st.integers(0, 9), slots=st.sampled_from([lambda m: 4, lambda m: m]))
def test_batches_are_a_permutation_of_similar_lengths(examples, size, seed, slots):
    batches = group_by_length(examples, size, seed, slots)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1) and max(map(len, batches)) <= size
    lengths = [[slots(len(q)) + len(q) + len(r) for q, r in (examples[i] for i in batch)] for batch in batches]
    if seed is None:
        assert lengths == sorted(lengths, reverse=True)
    for a, b in itertools.combinations(sorted(lengths, key=lambda batch: (max(batch), min(batch))), 2):
        assert max(a) <= min(b)                                         # no example fits better in another batch


def test_the_order_of_batches_and_their_company_change_with_the_seed():
    examples = [([1] * (1 + i % 5), [1]) for i in range(200)]
    one, again, other = (group_by_length(examples, 8, seed) for seed in (1, 1, 2))
    assert one == again
    assert sorted(map(sorted, one)) != sorted(map(sorted, other))
    assert [len(examples[batch[0]][0]) for batch in one] != [len(examples[batch[0]][0]) for batch in other]
