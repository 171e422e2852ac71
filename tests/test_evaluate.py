"""Metrics against nltk, rouge-score and by hand; the dictionary; what a trained run can do; tables and figures."""
import doctest
import functools
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from nltk.translate import bleu_score, nist_score
from pytest import approx
from rouge_score.rouge_scorer import RougeScorer

import data
import evaluate
import model
import prompt_encoder
import train
from conftest import ROOT, SHARED
from evaluate import (Lookup, all_metrics, baselines, corpus_bleu, corpus_nist, distinct, diversity, load_run,
                      load_splits, novelty, rouge_l, table)
from model import GPT
from prompt_encoder import METHODS
from runs import (DATA, MODEL, SMALL, assert_same_run, contents, failed, finished, lines_of, ok, on_call, results_of,
                  run, start)


@pytest.mark.parametrize("module", [model, prompt_encoder, data, evaluate, train], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_true(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(module)
    assert not found.failed and (found.attempted or module is train)


# ----------------------------------------------------------------------------------------------------------- metrics

def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


def nltk_bleu(outputs, references, n):
    score = bleu_score.corpus_bleu([[words(r)] for r in references], [words(o) for o in outputs], weights=[1 / n] * n)
    return score if score > 1e-50 else 0                # for an order without a match, nltk takes the smallest float


def nltk_nist(outputs, references):
    try:
        return nist_score.corpus_nist([[words(r)] for r in references], [words(o) for o in outputs])
    except ZeroDivisionError:
        return 0


def google_rouge(outputs, references):
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
    return sum(scorer.score(r, o)["rougeL"].fmeasure for o, r in zip(outputs, references)) / len(outputs)


METRIC_PAIRS = {f"bleu{n}": [functools.partial(bleu, n=n) for bleu in (corpus_bleu, nltk_bleu)] for n in (1, 2, 3, 4)}
METRIC_PAIRS |= {"nist": (corpus_nist, nltk_nist), "rouge_l": (rouge_l, google_rouge)}
every_metric = pytest.mark.parametrize("ours, theirs", METRIC_PAIRS.values(), ids=METRIC_PAIRS.keys())


@pytest.mark.filterwarnings(r"ignore:\s*The hypothesis contains 0 counts")
@every_metric
def test_metrics_equal_nltk_and_rouge_score_on_random_corpora(ours, theirs):
    """500 small ones for each of the six; many have empty, short, equal or entirely different texts in them."""
    chance, some = random.Random(0), ["a", "b", "c", "A", "a.", "don't", "", "…", "สวัสดี", "你好", "नमस्ते"]

    def text():
        return " ".join(chance.choices(some, k=chance.choice([0, 1, 2, 5, 9, 13])))

    for _ in range(500):
        outputs = [text() for _ in range(chance.randint(1, 6))]
        references = [chance.choice([text(), output, output + " b"]) for output in outputs]
        expected = theirs(outputs, references)
        assert ours(outputs, references) == approx(expected, rel=1e-9, abs=1e-14), (outputs, references)


@pytest.mark.parametrize("metric", [corpus_bleu, corpus_nist, rouge_l])
def test_every_output_has_one_reference(metric):
    assert metric([], []) == 0
    for outputs, references in (["a b c d", "e"], ["a b c d"]), ([], ["a"]), (["a"], []):
        with pytest.raises(ValueError):
            metric(outputs, references)


def test_a_single_string_is_refused():
    """Its characters would be scored one by one."""
    for metric, *texts in (corpus_bleu, ["a b"], "a b"), (corpus_nist, "a", "a"), (rouge_l, "a", "a"), (
            novelty, ["a"], "a"), (diversity, "a"), (distinct, "a b", 1):
        with pytest.raises(TypeError, match="expected a list of strings"):
            metric(*texts)


def test_novelty_diversity_and_distinct():
    assert novelty([" Yes.", "yes.", "Yes"], ["Yes. ", "No."]) == 2 / 3         # exact, but for the white space around
    assert diversity([" Yes.", "Yes. ", "yes."]) == 2 / 3
    assert distinct(["a b", "b a", "a b"], 2) == 2 / 3                          # no "b b": they stay within an output
    assert distinct(["a", ""], 2) == 0.0
    assert (novelty([], ["Yes."]), diversity([]), distinct([], 1)) == (0, 0, 0)


def test_all_metrics_worked_out_by_hand():
    """11 words, of which 4 match; 2 of 8 pairs, 1 of 5 triples, none of 2 + 1 + 1 quadruples. 7 reference words."""
    outputs = ["the cat sat down today", "the the the", "the the the"]
    found = all_metrics(outputs, ["the cat sat there today", "no", "no"], ["the the the"], mean_loss=2.0)
    assert found == approx({
        "n": 3, "bleu1": 4 / 11, "bleu2": (4 / 11 * 2 / 8) ** (1 / 2), "bleu3": (4 / 11 * 2 / 8 * 1 / 5) ** (1 / 3),
        "bleu4": 0, "novelty": 1 / 3, "diversity": 2 / 3, "distinct1": 5 / 11, "distinct2": 5 / 8,
        "nist": 4 * math.log2(7) / 11, "rouge_l": 0.8 / 3, "length": 11 / 3, "perplexity": math.exp(2)})
    assert all_metrics([], [], ["a"]) == dict.fromkeys(found) | {"n": 0}


def test_metrics_need_the_standard_library_alone():
    """What stands between the first two rulers runs in a Python without any package."""
    head, metrics, *_ = re.split(r"^# -{20,}.*\n", (ROOT / "evaluate.py").read_text(encoding="utf-8"), flags=re.M)
    lines = re.finditer(r"^(?:import|from) (\w+).*", head, flags=re.M)
    imports = [line[0] for line in lines if line[1] in sys.stdlib_module_names]
    call = "all_metrics(['I see a black cat.', 'No.'], ['I see a black dog.', 'No.'], ['No.'], 1.5)"
    code = "\n".join([*imports, metrics, f"print(json.dumps({call}))"])
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert bare.stderr == "" and json.loads(bare.stdout) == eval(call)


# ---------------------------------------------------------------------------------- the dictionary, seen and unseen

def test_lookup_answers_with_the_most_frequent_response_and_among_equals_the_earliest():
    """A query is known by its words, turn for turn."""
    lookup = Lookup([(["q"], "b"), (["q"], "a"), (["r"], "a"), (["r"], "c"), (["r"], "c"), (["p", "Are you?"], "a")])
    assert [lookup.answer(query) for query in (["q"], ["R!"], [" P", "are you"])] == ["b", "c", "a"]
    assert Lookup([(["q"], "b"), (["p", "Are you?"], "a")]).answer(["are you", "p"]) == "b"         # unknown


@pytest.mark.skipif(not (SHARED / "dailydialog").exists(), reason="needs ../shared/dailydialog")
def test_the_dictionary_and_the_human_on_dailydialog(monkeypatch):
    """This project's finding: far above the paper's best model, and nothing on unseen queries."""
    for slow in "corpus_nist", "rouge_l":
        monkeypatch.setattr(evaluate, slow, lambda *_: 0)
    found = baselines(str(SHARED / "dailydialog"))
    for part, *expected in ("test", 3700, 0.220, 0.207, 0.209, 0.209), ("test_unseen", 2542, 0.008, 0.002, 0.001, 0):
        values = [found["lookup"][part][name] for name in ("n", "bleu1", "bleu2", "bleu3", "bleu4")]
        assert values == approx(expected, abs=1.5e-3) and found["lookup"][part]["novelty"] == 0
    human = found["human"]["test"]
    assert [human[name] for name in ("bleu4", "novelty", "diversity")] == approx([1, 0.741, 0.966], abs=1.5e-3)


def write_dialogues(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in ({"validation": "a __eou__ b"} | splits).items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def test_lookup_prints_dictionary_and_human_for_all_and_for_unseen_pairs(tmp_path):
    write_dialogues(tmp_path, train="Hi. __eou__ Hello you!", test="hi __eou__ Hello you!\nHo. __eou__ Hey.")
    rows = rows_of(ok(run(evaluate, "--lookup", "--data", tmp_path)).out)
    found = {row["Method"] + " " + row["Test pairs"]: (row["ROUGE-L"], row["Novelty"], row["PPL"]) for row in rows}
    assert found == {"lookup test (2 pairs)": ("0.500", "0.000", "-"), "human test (2 pairs)": ("1.000", "0.500", "-"),
                     "lookup test, unseen (1 pairs)": ("0.000", "0.000", "-"),
                     "human test, unseen (1 pairs)": ("1.000", "1.000", "-")}


def test_seen_is_a_query_of_the_full_training_split_whatever_the_fraction(tmp_path):
    """By its words, turn for turn; as a query, not as a response."""
    training = [f"What is {i}? __eou__ A number: {i} __eou__ more {i} __eou__ yes" for i in range(20)]
    queries = ["WHAT   is 7", "What is 7, 8?", "A number: 7", "more, 19!", "7"]
    write_dialogues(tmp_path, train="\n".join(training), test="\n".join(f"{query} __eou__ x" for query in queries))
    config = json.loads((finished("soft", "--epochs", 0) / "config.json").read_text()) | {"data": str(tmp_path)}
    del config["dialogues"]
    tokenizer, sizes = data.load_tokenizer(MODEL), []
    for fraction, pairs, turns, expected in (
            (1.0, "steps", 1, [1, 0, 0, 1, 0]), (0.05, "steps", 1, [1, 0, 0, 1, 0]),
            (0.05, "sliding", 1, [1, 0, 1, 1, 0]), (0.05, "sliding", 2, [1, 0, 0, 0, 0])):
        splits = load_splits(config | {"fraction": fraction, "pairs": pairs, "turns": turns}, tokenizer)
        assert splits.seen == expected
        sizes.append(len(splits.pairs["train"]))
    assert sizes == [40, 2, 3, 3]


# ------------------------------------------------------------------------------------------------------- a trained run

def test_a_run_answers_from_any_directory(tmp_path, monkeypatch):
    """As in its test: from a Path or a string, and whatever the working directory is."""
    folder = finished("dynamic")
    monkeypatch.chdir(tmp_path)
    query, response = (lines_of(folder / "generations.jsonl")[0][key] for key in ("query", "response"))
    for path in (folder, str(folder)):
        loaded = load_run(path, "cpu")
        assert loaded.reply(query) == loaded.reply(query[0]) == loaded.reply(["before that", *query]) == response != ""
    torch.manual_seed(0)
    drawn = [loaded.reply(query, temperature=5.0) for _ in range(5)]
    assert len(set(drawn)) == 5 and loaded.reply(query, temperature=5.0, top_p=1e-9) == response


def test_a_reply_reads_a_turn_as_training_does():
    """White space around it counts for nothing, and neither do more turns than the run was trained to read."""
    loaded = load_run(finished("soft", "--turns", 2, "--epochs", 0))
    assert loaded.reply(["x", "Hello.", "Who?"]) == loaded.reply(["Hello.", "Who?"]) != loaded.reply(["Who?"])
    for text in " Hello\n", "\tHello", "Hello\u3000":
        assert loaded.reply(text) == loaded.reply("Hello")
        assert loaded.reply(["Hi.", text]) == loaded.reply(["Hi. ", "Hello"])
    for nothing in "", " \n", "\u200b", [], ["Hi.", ""], ["Hi.", "\u200b\n"]:
        with pytest.raises(ValueError, match="query is empty"):
            loaded.reply(nothing)


def test_a_row_without_a_word_is_never_generated(tmp_path):
    """wte is padded to a multiple of 64, and one of the new rows is [PAD]'s: even where these rows would always win."""
    gpt, folder = GPT.from_pretrained(MODEL), shutil.copytree(MODEL, tmp_path / "padded")
    gpt.config.vocab_size, gpt.config.eos_token_id = 576, 511
    with torch.no_grad():
        gpt.ln_f.bias += 5
        gpt.wte.weight = torch.nn.Parameter(torch.cat([gpt.wte.weight, torch.full((64, 32), 10.0)]))
    gpt.save_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"[PAD]": 512}')
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    assert min(GPT.from_pretrained(folder).generate([[1, 2, 3]], 5)[0]) >= 512         # the GPT alone knows no words
    ok(run(train, "--method", "dynamic", *SMALL, "--model", folder, "--epochs", 0, "--out", tmp_path / "run"))
    loaded = load_run(tmp_path / "run")
    for options in {}, {"temperature": 5.0, "top_p": 0.9}:
        with mock.patch.object(loaded.tokenizer, "decode", lambda ids: json.dumps(ids)):
            answer = json.loads(loaded.reply("Hello.", **options))
        assert answer and max(answer) < 511


@pytest.mark.parametrize("change", ["weights", "test.txt", "vocab.json"])
def test_a_run_knows_what_it_stood_on(tmp_path, change):
    """Model and dialogues may move. Once they have changed, a run is neither scored nor resumed, nor touched."""
    def change_it(place):
        if change == "weights":
            gpt = GPT.from_pretrained(MODEL)
            with torch.no_grad():
                gpt.h[1].mlp.c_fc.weight[0, 0] += 1e-3
            gpt.save_pretrained(place / "gpt")
        elif change == "vocab.json":                    # two letters change places: the dialogues' ids are others
            vocab = json.loads((place / "gpt/vocab.json").read_text())
            (place / "gpt/vocab.json").write_text(json.dumps(vocab | {"a": vocab["e"], "e": vocab["a"]}))
        else:
            (place / "data/test.txt").write_text("One more. __eou__ Thanks.")

    old, new, folder = shutil.copytree(MODEL.parent, tmp_path / "old"), tmp_path / "new", tmp_path / "run"
    flags = ["--method", "prompt-tuning", *SMALL, "--model", old / "gpt", "--data", old / "data", "--epochs", 0,
             "--out", folder]
    moved = folder, "--model", new / "gpt", "--data", new / "data"
    ok(run(train, *flags))
    shutil.copytree(old, new)
    change_it(old)
    test = results_of(folder)["test"]
    assert "| test (11 pairs) |" in ok(run(evaluate, *moved)).out and results_of(folder)["test"] == test
    change_it(new)
    before = contents(folder)
    failed(run(evaluate, *moved), 1, new, "changed since this run began")
    for ended in run(evaluate, folder), run(train, *flags, "--resume"), run(train, *flags, "--resume", "--epochs", 3):
        failed(ended, 1, old, "changed since this run began")
    assert contents(folder) == before


def test_a_run_knows_its_code(tmp_path):
    """With other code it is scored, but its results are replaced only if that is wanted."""
    folder = shutil.copytree(finished("soft"), tmp_path / "run")
    for file, change in ("config.json", {"code": "another"}), ("results.json", {"epoch": 77}):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    before = contents(folder)
    out = ok(run(evaluate, folder)).out
    assert "| test (11 pairs) |" in out and "prompt_encoder.py has changed" in out and contents(folder) == before
    ok(run(evaluate, folder, "--overwrite"))
    assert results_of(folder) == results_of(finished("soft"))


def test_scores_that_cannot_be_written_are_printed(tmp_path):
    folder = shutil.copytree(finished("soft"), tmp_path / "run")

    def read_only():
        raise PermissionError(13, "Permission denied")

    with on_call(os, "replace", 1, read_only):          # as in a read-only folder, to which root may write
        ended = failed(run(evaluate, folder), 1, folder, "Permission denied")
    assert "| test (11 pairs) |" in ended.out and contents(folder) == contents(finished("soft"))


def test_what_overflows_is_not_scored(tmp_path):
    """Values 2^15 times as large and projections as much smaller: the same in float32, infinite in float16."""
    gpt, small = GPT.from_pretrained(MODEL), shutil.copytree(MODEL, tmp_path / "gpt")
    with torch.no_grad():
        for attention in (block.attn for block in gpt.h):
            attention.c_attn.weight[64:] *= 2**15
            attention.c_attn.bias[64:] *= 2**15
            attention.c_proj.weight /= 2**15
    gpt.save_pretrained(small)
    ok(start("prompt-tuning", "--model", small, "--epochs", 0, "--out", tmp_path / "run"))
    before = contents(tmp_path / "run")
    assert ok(run(evaluate, tmp_path / "run")) and contents(tmp_path / "run") == before
    failed(run(evaluate, tmp_path / "run", "--dtype", "float16"), 1, "NaN or infinite", "float32")
    failed(run(evaluate, tmp_path / "run", "--dtype", "float16", "--chat", stdin=b"Hello.\n"), 1, "NaN or infinite")
    assert contents(tmp_path / "run") == before


every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_reloaded_run_scores_the_same(tmp_path, method):
    """The swap test, too: 0 exactly where the prompt does not depend on the query."""
    folder = shutil.copytree(finished(method), tmp_path / "copy")
    (folder / "generations.jsonl").unlink()
    (folder / "results.json").write_text("{}")
    row, _ = rows_of(ok(run(evaluate, folder)).out)
    assert_same_run(folder, finished(method))
    encoder, swap = load_run(folder).model.encoder, results_of(folder)["swap"]
    with torch.no_grad():                               # of one query of 5 tokens, and of another
        one, other = (encoder(torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool)) for _ in range(2))
    if encoder.writes_past:
        one, other = (torch.stack([torch.stack(layer) for layer in prompt]) for prompt in (one, other))
    assert (swap == 0) == torch.equal(one, other) and row["Swap"] == f"{swap:.3f}"


@every_method
def test_explain_shows_the_reply_behind_other_prompts(method):
    """Its own first, and the words nearest to each vector. Nothing changes if no prompt depends on its query."""
    folder, query, loaded = finished(method), "Hi", load_run(finished(method))
    out = ok(run(evaluate, folder, "--explain", query)).out
    behind = re.findall(r"^behind the prompt of '(.*)': (.+)  \(loss of the first reply: (\d+\.\d+)\)$", out, flags=re.M)
    assert len(behind) == 4 and behind[0][:2] == (query, repr(loaded.reply(query)))
    assert results_of(folder)["swap"] != 0 or len({part[1:] for part in behind}) == 1
    assert out.count("  ->  ") == loaded.model.encoder.prompt_length(len(loaded.encode_query(query)))


def test_explain_where_a_row_takes_all_positions():
    folder = finished("dynamic", "--max-query", 44, "--epochs", 0)          # 44 + 44 + 40 of 128
    assert "(loss of the first reply: " in ok(run(evaluate, folder, "--explain", "x y " * 60)).out


def test_chat():
    """It answers as in the test, and any line of any bytes; blank lines are passed over; the end of input ends it."""
    pair = lines_of(finished("soft") / "generations.jsonl")[0]
    said = [pair["query"][0].encode(), b"", b"  ", b"\xff\xfe\x00\x9d", b"x" * 1_000_000, b"<|endoftext|>", b"the end"]
    out = ok(run(evaluate, finished("soft"), "--chat", stdin=b"\n".join(said))).out
    assert f"you: soft: {pair['response']}\n" in out
    assert out.count("you: soft: ") == 5 and out.endswith("you: \n")
    hot = ok(run(evaluate, finished("soft"), "--chat", "--temperature", 5, stdin=said[0])).out
    assert hot.count("you: soft: ") == 1 and pair["response"] not in hot


def test_a_notebooks_stdout():
    """It has no `reconfigure`."""
    stdout = io.StringIO()
    ok(run(evaluate, "--table", finished("soft"), stdout=stdout))
    assert "| 100% | soft |" in stdout.getvalue()


# ------------------------------------------------------------------------------------------------------------- export

PEFT = ["prompt-tuning", "p-tuning", "prefix"]          # what peft, too, has
IDS = [40, 73, 0, 300, 17, 211, 13, 99, 511]


def test_export_for_transformers(tmp_path):
    from transformers import AutoModelForCausalLM
    folder = finished("finetune")
    assert str(tmp_path / "gpt") in ok(run(evaluate, folder, "--export", tmp_path / "gpt")).out
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt").eval(), torch.tensor([IDS])
    with torch.no_grad():
        torch.testing.assert_close(load_run(folder).model.gpt(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert data.load_tokenizer(tmp_path / "gpt").eot_token == 511
    failed(run(evaluate, folder, "--export", tmp_path / "gpt"), 1, tmp_path / "gpt", "not empty")


@pytest.mark.parametrize("method", PEFT)
def test_export_for_peft(tmp_path, method):
    """Logits at every position, of a batch of two queries, one of them padded."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel
    folder, model = finished(method), load_run(finished(method)).model
    assert str(tmp_path / "adapter") in ok(run(evaluate, folder, "--export", tmp_path / "adapter")).out
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"}
    theirs = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(MODEL), tmp_path / "adapter").eval()
    with torch.no_grad():
        ids, mask = torch.tensor([IDS, IDS[:5] + [0] * 4]), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
        expected = theirs(input_ids=ids, attention_mask=mask).logits
        found = model.label_logits(model.batch([(IDS[:2], IDS[2:]), (IDS[:2], IDS[2:5])]))
        k = expected.size(1) - len(IDS)                 # virtual tokens have logits, too, where they stand in the row
        assert k == (0 if method == "prefix" else 20)
        expected = torch.cat([expected[0, k + 1:k + 8], expected[1, k + 1:k + 4]])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        plain = GPT2LMHeadModel.from_pretrained(MODEL)(torch.tensor([IDS])).logits[0, 1:8]
    assert (found[:7] - plain).abs().max() > 1e-2       # the prompt does something


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"finetune", *PEFT}))
def test_what_has_no_such_form_says_so(tmp_path, method):
    failed(run(evaluate, finished(method), "--export", tmp_path / "new"), 2, method, ", ".join(PEFT))
    both = finished("prefix", "--train-embeddings", "--epochs", 0)          # an adapter cannot hold word embeddings
    failed(run(evaluate, both, "--export", tmp_path / "new"), 2, "embeddings")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- tables, figures, answers

def write_run(folder, test={}, unseen={}, swap=0.0, **changes):
    """A finished run by hand: a real one's, but for these settings and numbers; every other metric is 0.5."""
    config = json.loads((finished("soft") / "config.json").read_text()) | changes
    results = {part: dict.fromkeys(all_metrics([], [], []), 0.5) | {"n": 1000} | numbers
               for part, numbers in (("test", test), ("test_unseen", unseen))}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({"swap": swap} | results))
    return folder


def rows_of(markdown):
    """Markdown -> {column: cell} for each row of all its tables, which have the same columns."""
    columns, _, *rows = [line[2:-2].split(" | ") for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(columns, row)) for row in rows if row != columns and row[0] != "---"]


def test_table(tmp_path):
    """A row for each setting, its label says in what it differs: means over seeds, not copies. Links are followed."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"runs/soft/{seed}", seed=seed, swap=0.0, unseen={"bleu4": 0.01 * seed},
                  test={"bleu4": 0.1 * seed, "nist": seed, "perplexity": math.exp(seed)})
    shutil.copytree(tmp_path / "runs/soft/1", tmp_path / "runs/a copy")
    write_run(tmp_path / "runs/dynamic", method="dynamic", swap=0.25, test={"bleu1": 0.25, "length": 7.77})
    write_run(tmp_path / "runs/a tenth", fraction=0.1)
    write_run(tmp_path / "elsewhere/run", lr=0.003, test={"bleu4": 0.9})
    (tmp_path / "runs/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs/unfinished").mkdir()
    (tmp_path / "runs/unfinished/config.json").write_text("{}")
    rows = rows_of(ok(run(evaluate, "--table", tmp_path / "runs")).out)
    assert list(rows[0])[:9] == ["Data", "Method", "Seeds", "Loss", "Swap", "BLEU1", "BLEU2", "BLEU3", "BLEU4"]
    found = {(row["Data"], row["Method"]): row for row in rows}
    lookup, human = (found.pop(("100%", name)) for name in ("lookup", "human"))
    soft = found["100%", "soft, lr 0.0005"]
    assert {key: row["Seeds"] for key, row in found.items()} == {
        ("10%", "soft, lr 0.0005"): "1", ("100%", "soft, lr 0.0005"): "3", ("100%", "soft, lr 0.003"): "1",
        ("100%", "dynamic"): "1"} and len(rows) == 6
    assert [soft[column] for column in ("Loss", "Swap", "BLEU4", "NIST", "BLEU4 unseen")] == [
        "2.000 ± 1.000", "0.000 ± 0.000", "0.200 ± 0.100", "2.00 ± 1.00", "0.020 ± 0.010"]
    assert [found["100%", "dynamic"][column] for column in ("Swap", "BLEU1", "Length")] == ["0.250", "0.250", "7.8"]
    assert found["100%", "soft, lr 0.003"]["BLEU4"] == "0.900"
    expected = baselines(DATA)["lookup"]["test"]
    assert (lookup["BLEU1"], lookup["Loss"], human["BLEU4"]) == (f"{expected['bleu1']:.3f}", "-", "1.000")


def test_a_table_for_each_data_set_by_its_whole_path_if_need_be(tmp_path):
    """The dictionary is scored on each one's own data, unless that has moved; where there are no pairs stand dashes."""
    for name, response in ("A", "Yes."), ("B", "No."):
        folder = write_dialogues(tmp_path / name / "shop", train=f"Hi. __eou__ {response}", test="Hi. __eou__ Yes.")
        write_run(tmp_path / f"runs/{name}", data=str(folder), unseen=all_metrics([], [], []))
    write_run(tmp_path / "runs/moved", data="/moved/away", turns=2)
    nothing = all_metrics([], [], [])
    write_run(tmp_path / "runs/none", data="/moved/none", test=nothing, unseen=nothing, swap=None)
    text = table(tmp_path / "runs")
    assert re.findall(r"^\*\*(.*?), gpt", text, flags=re.M) == [
        "away", "none", f"{tmp_path}/A/shop", f"{tmp_path}/B/shop"]
    rows = rows_of(text)
    assert [" ".join(row[column] for column in ("Method", "BLEU1", "BLEU4 unseen")) for row in rows] == [
        "soft 0.500 0.500", "soft - -", "soft 0.500 -", "lookup 1.000 -", "human 1.000 -",
        "soft 0.500 -", "lookup 0.500 -", "human 1.000 -"]


@pytest.fixture
def figures():
    """The figures that are drawn; pyplot is not touched."""
    matplotlib, drawn, make = pytest.importorskip("matplotlib"), [], evaluate.new_figure
    before = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    keep = lambda *size: drawn.append(make(*size)) or drawn[-1]                             # noqa: E731
    with mock.patch.object(evaluate, "new_figure", keep):
        yield drawn
    assert (dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules) == before


def assert_drawn(file, out):
    assert str(file) in out and file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plot_of_one_run_draws_its_curves(tmp_path, figures):
    folder = shutil.copytree(finished("dynamic"), tmp_path / "a_$b_$c")
    config, log = json.loads((folder / "config.json").read_text()), lines_of(folder / "log.jsonl")
    (folder / "config.json").write_text(json.dumps(config | {"data": "/x/_$\\frac_$"}))
    assert_drawn(folder / "curves.png", ok(run(evaluate, folder, "--plot")).out)
    losses, bleu = figures[0].axes
    drawn = {line.get_label(): list(zip(*map(list, line.get_data()))) for line in losses.lines}
    assert drawn["training"] == [(line["epoch"], line["train_loss"]) for line in log[1:]]
    assert drawn["validation"] == [(line["epoch"], line["val_loss"]) for line in log]
    assert [x for x, _ in drawn["tested"]] == [results_of(folder)["epoch"]] * 2
    assert list(bleu.lines[0].get_ydata()) == [line["val_bleu4"] for line in log]


def test_plot_has_a_line_for_each_method_over_the_fraction(tmp_path, figures):
    """A row of panels for each data set and model; all pairs solid, unseen ones dotted, a method in its colour."""
    for seed, fraction, bleu4 in (1, 1.0, 0.4), (2, 1.0, 0.6), (1, 0.1, 0.2):
        write_run(tmp_path / f"soft-{seed}-{fraction}", seed=seed, fraction=fraction, test={"bleu4": bleu4},
                  unseen={"bleu4": 0.1})
    write_run(tmp_path / "dynamic", method="dynamic", test={"novelty": 0.9})
    write_run(tmp_path / "$other_$", model="/$/gpt_x$")
    assert_drawn(tmp_path / "figure2.png", ok(run(evaluate, tmp_path, "--plot")).out)
    assert [panel.get_title() for panel in figures[0].axes] == ["BLEU4", "Novelty", "Diversity"] * 2
    drawn = []
    for panel in figures[0].axes:
        lines = [container.lines[0] for container in panel.containers]
        drawn.append({(line.get_color(), line.get_linestyle()): dict(zip(*line.get_data())) for line in lines})
    soft, dynamic = (evaluate.COLORS[method] for method in ("soft", "dynamic"))
    every, half, tenth = {10: 0.5, 100: 0.5}, {100: 0.5}, {10: 0.1, 100: 0.1}
    one, other = {(dynamic, "-"): half, (dynamic, ":"): half, (soft, "-"): every, (soft, ":"): every}, {
        (soft, "-"): half, (soft, ":"): half}
    assert drawn == [other] * 3 + [one | {(soft, "-"): {10: 0.2, 100: 0.5}, (soft, ":"): tenth},
                                   one | {(dynamic, "-"): {100: 0.9}}, one]


def test_compare(tmp_path):
    """A column for each run: ten of their common test pairs, or the lines of a file. Other pairs are refused."""
    lines = [{"query": ["a|b", f"{i}\u2028"], "reference": "r", "response": f"A{i}"} for i in range(25)]
    runs = {"one": lines, "two": [line | {"response": "C\nD"} for line in lines], "three": lines[1:]}
    for name, written in runs.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written)
        (tmp_path / name / "generations.jsonl").write_text(text, encoding="utf-8")
    one, two, three = (tmp_path / name for name in runs)
    rows = [line for line in ok(run(evaluate, "--compare", one, two)).out.split("\n") if line.startswith("| ")]
    assert len(rows) == 2 + 9 and rows[0] == f"| query | {one} | {two} |"       # every third of 25
    assert rows[2].endswith("| A0 | C D |") and "a\\|b" in rows[2] and rows[-1].endswith("| A24 | C D |")
    failed(run(evaluate, "--compare", one, three), 2, three, "same pairs", "--queries")
    (tmp_path / "mine.txt").write_text("Good morning.\n\n Who are you? \n")
    folders = finished("soft"), finished("dynamic")
    rows = rows_of(ok(run(evaluate, "--compare", *folders, "--queries", tmp_path / "mine.txt")).out)
    assert [row["query"] for row in rows] == ["Good morning.", "Who are you?"]
    assert rows[1][str(folders[1])] == " ".join(load_run(folders[1]).reply("Who are you?").split("\n"))
    (tmp_path / "mine.txt").write_text("\n")
    failed(run(evaluate, "--compare", *folders, "--queries", tmp_path / "mine.txt"), 1, "mine.txt")


# ------------------------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize("status, arguments", [
    (2, ""), (2, "--table"), (2, "RUN --chat --plot"),
    (2, "RUN --temperature 1"), (2, "RUN --lookup"), (2, "RUN --queries x"), (2, "RUN --chat --overwrite"),
    (2, "--table RUN --dtype float32"), (2, "RUN RUN"), (2, "--lookup --model x"), (2, "RUN --device cuda:99"),
    (1, "nowhere"), (1, "nowhere --chat"), (1, "nowhere --table"), (1, "nowhere --plot"), (1, "--compare RUN nowhere"),
    (1, "--lookup --data nowhere"), (2, "RUN --chat --temperature nan"), (2, "RUN --chat --top-p 90")])
def test_usage_errors_and_folders_that_are_not_there(status, arguments, tmp_path, monkeypatch):
    """Among them: flags that would do nothing."""
    monkeypatch.chdir(tmp_path)
    before = contents(finished("soft"))
    arguments = arguments.replace("RUN", str(finished("soft"))).split()
    failed(run(evaluate, *arguments, stdin=b"Hello.\n"), status, *["nowhere"] * ("nowhere" in arguments))
    assert contents(finished("soft")) == before


def test_what_a_gpu_reports_ends_in_one_sentence():
    def ended(error):
        return run(SimpleNamespace(main=mock.Mock(side_effect=error), __file__="x.py"))

    failed(ended(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")), 1, "--batch-size")
    failed(ended(RuntimeError("CUDA error: device-side assert\nmore lines")), 1, "--device cpu", "device-side assert")
    for bug in RuntimeError("a bug"), NotImplementedError("a bug"), RecursionError("a bug"):
        with pytest.raises(type(bug), match="a bug"):
            ended(bug)
