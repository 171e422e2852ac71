"""The embedded dialogues: format, lengths, balance, and no more repetition than in life."""
from collections import Counter, defaultdict

import pytest

from data import make_pairs, query_key, read_dialogues

SPLITS = read_dialogues("sample")
EVERYTHING = [turns for dialogues in SPLITS.values() for turns in dialogues]


def test_sizes():
    assert {split: len(dialogues) for split, dialogues in SPLITS.items()} == {"train": 800, "validation": 100, "test": 100}


def test_turns():
    for turns in EVERYTHING:
        assert 4 <= len(turns) <= 12, turns
        assert all(3 <= len(turn.split()) <= 30 and turn.isascii() for turn in turns), turns
        assert not any(" ," in turn or " ." in turn or "  " in turn for turn in turns), turns


def test_long_turns_hardly_recur():
    counts = Counter(turn for turns in EVERYTHING for turn in turns if len(turn.split()) > 8)
    assert counts.most_common(1)[0][1] <= 2


def test_no_two_dialogues_share_a_third_of_their_turns():
    where = defaultdict(set)
    for i, turns in enumerate(EVERYTHING):
        for turn in turns:
            where[turn].add(i)
    for i, turns in enumerate(EVERYTHING):
        for j, shared in Counter(j for turn in set(turns) for j in where[turn] if j != i).items():
            assert shared <= min(len(turns), len(EVERYTHING[j])) / 3, (turns, EVERYTHING[j])


@pytest.mark.parametrize("topic, words", [(2, "museum book song film play festival painting"), (5, "hotel train ticket bus flight luggage"),
                                          (6, "doctor tooth sleep pills knee fever"), (9, "bank money pay rent loan euros dollars")])
def test_each_tenth_has_its_topic(topic, words):
    """A topic's words are more frequent in its tenth than in any other."""
    tenths = [SPLITS["train"][i:i + 80] for i in range(0, 800, 80)]
    counts = [sum(word in turn.lower() for turns in tenth for turn in turns for word in words.split()) for tenth in tenths]
    assert counts.index(max(counts)) == topic, counts


def test_some_test_queries_are_seen():
    known = {query_key(query) for query, _ in make_pairs(SPLITS["train"])}
    assert sum(query_key(query) in known for query, _ in make_pairs(SPLITS["test"])) == 37
