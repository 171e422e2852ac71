"""Metrics against nltk, rouge-score and examples worked out by hand; the lookup baseline; scoring; tables, figure and errors."""
import doctest
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from nltk.translate import bleu_score, nist_score
from pytest import approx
from rouge_score.rouge_scorer import RougeScorer

import data
import evaluate
from conftest import ROOT, SHARED
from evaluate import (Lookup, Task, all_metrics, choose_device, corpus_bleu, corpus_nist, distinct, diversity, lookup_results, mean_loss,
                      novelty, plot, respond, rouge_l, run_command, table)
from model import GPT, GPTConfig
from prompt_encoder import PromptedGPT

METRICS = ["bleu1", "bleu2", "bleu3", "bleu4", "novelty", "diversity", "distinct1", "distinct2", "nist", "rouge_l", "length", "perplexity"]


def words(text):
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.mark.parametrize("module", [evaluate, data])
def test_examples_in_docstrings_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ----------------------------------------------------------------------------------------------------------- metrics

def nltk_bleu(outputs, references, n):
    score = bleu_score.corpus_bleu([[words(r)] for r in references], [words(o) for o in outputs], weights=[1 / n] * n)
    return score if score > 1e-50 else 0                # for an order without a match, nltk takes the smallest float there is


def nltk_nist(outputs, references):
    try:
        return nist_score.corpus_nist([[words(r)] for r in references], [words(o) for o in outputs])
    except ZeroDivisionError:
        return 0


def google_rouge(outputs, references):
    scorer = RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=words))
    return sum(scorer.score(r, o)["rougeL"].fmeasure for o, r in zip(outputs, references)) / len(outputs)


METRIC_PAIRS = {f"bleu{n}": (lambda *texts, n=n: corpus_bleu(*texts, n=n), lambda *texts, n=n: nltk_bleu(*texts, n)) for n in (1, 2, 3, 4)}
METRIC_PAIRS |= {"nist": (corpus_nist, nltk_nist), "rouge_l": (rouge_l, google_rouge)}
every_metric = pytest.mark.parametrize("ours, theirs", METRIC_PAIRS.values(), ids=METRIC_PAIRS.keys())

few_words = st.lists(st.sampled_from(["a", "b", "A", "a.", "don't"]), max_size=12).map(" ".join)
texts = few_words | st.text(max_size=12)
corpora = st.lists(st.tuples(texts, texts) | texts.map(lambda text: (text, text)), min_size=1, max_size=6)


@pytest.mark.filterwarnings(r"ignore:\s*The hypothesis contains 0 counts")
@every_metric
@settings(max_examples=100, deadline=None)
@given(pairs=corpora)
@example(pairs=[("a b c d e", "a b c d e"), ("a", "a")])        # shorter than n, an output still counts 1
@example(pairs=[("", "a b"), ("a b c d e f", "a b c d e g")])   # an output of nothing
@example(pairs=[("a b c d e", "")])
@example(pairs=[("a b c", "c b a")])                            # words match, pairs do not
def test_metrics_equal_nltk_and_rouge_score(ours, theirs, pairs):
    outputs, references = zip(*pairs)
    assert ours(outputs, references) == approx(theirs(outputs, references), rel=1e-9, abs=1e-14)


@pytest.fixture(scope="module")
def dailydialog():
    """The dictionary made of the real training set, and the real test pairs."""
    if not (SHARED / "dailydialog").exists():
        pytest.skip("needs ../shared/dailydialog")
    pairs = {split: data.make_pairs(d) for split, d in data.read_dialogues(str(SHARED / "dailydialog")).items()}
    return Lookup(pairs["train"]), pairs["test"]


@every_metric
def test_metrics_equal_nltk_and_rouge_score_on_real_dialogues(ours, theirs, dailydialog):
    lookup, pairs = dailydialog
    outputs, references = [lookup.answer(query) for query, _ in pairs[:300]], [response for _, response in pairs[:300]]
    expected = theirs(outputs, references)
    assert expected > 0.05 and ours(outputs, references) == approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", [corpus_bleu, corpus_nist, rouge_l])
def test_every_output_has_one_reference(metric):
    assert metric([], []) == 0
    with pytest.raises(ValueError):
        metric(["a b c d", "e"], ["a b c d"])


def test_of_no_outputs_none_are_new():
    assert (novelty([], ["Yes."]), diversity([]), distinct([], 1)) == (0, 0, 0)


def test_novelty_and_diversity_compare_stripped_text_exactly():
    assert novelty([" Yes.", "yes.", "Yes"], ["Yes. ", "No."]) == 2 / 3
    assert diversity([" Yes.", "Yes. ", "yes."]) == 2 / 3


def test_ngrams_of_distinct_stay_within_an_output():
    assert distinct(["a b", "b a", "a b"], 2) == 2 / 3          # no "b b"
    assert distinct(["a", ""], 2) == 0.0


def test_all_metrics_worked_out_by_hand():
    """11 words, of which 4 match; 2 of 8 pairs, 1 of 5 triples, none of 2 + 1 + 1 quadruples. All 7 reference words but "no" occur once."""
    outputs = ["the cat sat down today", "the the the", "the the the"]
    found = all_metrics(outputs, ["the cat sat there today", "no", "no"], ["the the the"], mean_loss=2.0)
    assert found == approx({
        "n": 3, "bleu1": 4 / 11, "bleu2": (4 / 11 * 2 / 8) ** (1 / 2), "bleu3": (4 / 11 * 2 / 8 * 1 / 5) ** (1 / 3), "bleu4": 0,
        "novelty": 1 / 3, "diversity": 2 / 3, "distinct1": 5 / 11, "distinct2": 5 / 8, "nist": 4 * math.log2(7) / 11,
        "rouge_l": 0.8 / 3, "length": 11 / 3, "perplexity": math.exp(2)})
    assert list(found) == ["n", *METRICS]


def test_metrics_of_no_pairs_are_null():
    assert all_metrics([], [], ["a"], None) == {"n": 0} | dict.fromkeys(METRICS)


def test_metrics_need_the_standard_library_alone():
    """What stands between the first two rulers runs in a Python without any package."""
    head, metrics, *_ = re.split(r"^# -{20,}.*\n", (ROOT / "evaluate.py").read_text(encoding="utf-8"), flags=re.M)
    imports = [line[0] for line in re.finditer(r"^(?:import|from) (\w+).*", head, flags=re.M) if line[1] in sys.stdlib_module_names]
    call = "all_metrics(['I see a black cat.', 'No.'], ['I see a black dog.', 'No.'], ['No.'], 1.5)"
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", "\n".join([*imports, metrics, f"print(json.dumps({call}))"])],
                          capture_output=True, text=True)
    assert bare.stderr == "" and json.loads(bare.stdout) == eval(call)


# ------------------------------------------------------------------------------------------------------------ lookup

def test_lookup_answers_with_the_most_frequent_response_and_among_equals_the_earliest():
    lookup = Lookup([(["q"], "b"), (["q"], "a"), (["r"], "a"), (["r"], "c"), (["r"], "c"), (["s"], "a")])
    assert [lookup.answer([query]) for query in ("q", "r", "unseen")] == ["b", "c", "a"]
    assert Lookup([(["q"], "b"), (["r"], "a")]).answer(["unseen"]) == "b"


def test_a_query_is_seen_if_all_its_turns_are_the_same_but_for_white_space_around_them():
    lookup = Lookup([(["x"], "the default"), (["p", "q"], "seen")])
    assert lookup.answer([" p", "q "]) == "seen"
    assert {lookup.answer(query) for query in (["q"], ["q", "p"], ["p q"], ["P", "q"])} == {"the default"}


def test_lookup_on_dailydialog_scores_as_published(dailydialog):
    found = lookup_results(str(SHARED / "dailydialog"))
    for part, n, bleu4 in ("test", 3700, 0.138), ("test_unseen", 2807, 0.0):
        assert (found[part]["n"], round(found[part]["bleu4"], 3), found[part]["novelty"]) == (n, bleu4, 0.0)
    lookup, pairs = dailydialog
    seen = [(lookup.answer(query), response) for query, response in pairs if tuple(query) in lookup.answers]
    assert len(seen) == 893 and corpus_bleu(*zip(*seen)) == approx(0.783, abs=0.0005)


# ----------------------------------------------------------------------------------------------------------- scoring

def write_dialogues(folder, train, test):
    folder.mkdir()
    for split, dialogues in {"train": train, "validation": test, "test": test}.items():
        (folder / f"{split}.txt").write_text("\n".join(" __eou__ ".join(turns) for turns in dialogues), encoding="utf-8")
    return str(folder)


NUMBERS = SimpleNamespace(eot_token=63, encode_ordinary=lambda text: [ord(c) % 63 for c in text],
                          decode=lambda ids: f" {' '.join(map(str, ids))} ")


def test_seen_means_in_the_full_training_split_whatever_the_fraction(tmp_path):
    folder = write_dialogues(tmp_path / "data", train=[[f"q{i}", f"r{i}"] for i in range(10)],
                             test=[["q0", "x"], ["new", "r1"], ["q9", "x"]])
    config = {"data": folder, "turns": 1, "pairs": "steps", "fraction": 0.1, "seed": 0, "max_query": 8, "max_response": 8}
    task = Task(config, NUMBERS)
    assert task.seen == [True, False, True]
    assert {split: len(pairs) for split, pairs in task.pairs.items()} == {"train": 1, "validation": 3, "test": 3}


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape) * 0.2)          # so that its answers differ
    return gpt.eval()


EXAMPLES = [([5, 63], [7, 8, 9, 63]), ([11, 12, 13, 14, 63], [15, 63]), ([16, 17, 63], [18, 19, 20, 21, 22, 23, 63]), ([24, 63], [63])]


def test_loss_is_the_mean_over_response_tokens_in_whatever_batches(gpt):
    rows = [(gpt(torch.tensor([query + response]))[0, len(query) - 1:-1], torch.tensor(response)) for query, response in EXAMPLES]
    expected = F.cross_entropy(torch.cat([logits for logits, _ in rows]), torch.cat([targets for _, targets in rows])).item()
    model = PromptedGPT(gpt, "finetune")
    assert [mean_loss(model, EXAMPLES, size) for size in (1, 3, 32)] == approx([expected] * 3, rel=1e-5)
    assert mean_loss(model, []) is None


def test_answers_come_in_the_order_of_the_queries(gpt):
    alone = [NUMBERS.decode(*gpt.generate([query], max_new_tokens=40, eot=63)).strip() for query, _ in EXAMPLES]
    assert len(set(alone)) == len(alone) and respond(PromptedGPT(gpt, "finetune"), EXAMPLES, NUMBERS, batch_size=3) == alone


@pytest.mark.parametrize("device", ["abacus", "cuda:x", "cpu:", "xpu"])
def test_a_device_that_is_not_there_is_refused(device):
    if device == "xpu" and torch.xpu.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"--device {device}"):
        choose_device(device, "auto")


# ---------------------------------------------------------------------------------------------------- tables, figure

CONFIG = {"version": evaluate.VERSION, "method": "soft", "model": "tiny-gpt2", "data": "moved away", "fraction": 1.0, "seed": 0, "turns": 1,
          "pairs": "steps", "prompt_length": None, "controller_layers": 2, "train_embeddings": None}


def write_run(folder, test=None, unseen=None, **config):
    """A finished run by hand; every metric that is not given is 0.5."""
    config, numbers = CONFIG | config, {"n": 1000} | dict.fromkeys(METRICS, 0.5)
    results = config | {"test": numbers | (test or {}), "test_unseen": numbers | (unseen or {})}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))


def rows_of(markdown):
    """Markdown -> {column: cell} for each row of all its tables."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line)) for line in lines if line != lines[0] and line[0] != "---"]


def test_table_averages_seeds_with_their_spread(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"soft/{seed}", seed=seed, test={"bleu4": 0.1 * seed, "nist": seed, "perplexity": 10 * seed},
                  unseen={"bleu4": 0.01 * seed})
    write_run(tmp_path / "dynamic", method="dynamic", test={"bleu1": 0.25, "length": 7.77})
    write_run(tmp_path / "a tenth", fraction=0.1)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.json").write_text(json.dumps(CONFIG))
    rows = rows_of(table(tmp_path))
    assert list(rows[0])[:8] == ["Data", "Method", "BLEU1", "BLEU2", "BLEU3", "BLEU4", "Novelty", "Diversity"]
    assert [(row["Data"], row["Method"]) for row in rows] == [("10%", "soft"), ("100%", "soft"), ("100%", "dynamic")] * 2
    tenth, soft, dynamic, _, unseen, _ = rows
    assert (soft["BLEU4"], soft["NIST"], soft["PPL"]) == ("0.200 ± 0.100", "2.00 ± 1.00", "20.0 ± 10.0")
    assert unseen["BLEU4"] == "0.020 ± 0.010"
    assert (dynamic["BLEU1"], dynamic["Length"], tenth["BLEU4"]) == ("0.250", "7.8", "0.500")


def test_table_separates_data_models_and_contexts(tmp_path):
    for i, change in enumerate([{}, {"data": "other"}, {"model": "gpt2"}, {"turns": 4}, {"pairs": "sliding"}]):
        write_run(tmp_path / str(i), **change)
    text = table(tmp_path)
    assert len(rows_of(text)) == 2 * 5 and "±" not in text
    headings = {line for line in text.splitlines() if "1,000" in line}
    assert len(headings) == 2 * 5, "two tables have the same heading"


@pytest.mark.parametrize("method, change", [("soft", {"train_embeddings": False}), ("prefix", {"prompt_length": 20}),
                                            ("dynamic", {"controller_layers": 4})], ids=str)
def test_table_averages_over_nothing_but_seeds(method, change, tmp_path):
    write_run(tmp_path / "1", method=method)
    write_run(tmp_path / "2", method=method, **change)
    rows = rows_of(table(tmp_path))
    assert len(rows) == 2 * 2 and rows[0]["Method"] != rows[1]["Method"]


def test_table_tells_where_a_mean_is_not_over_seeds_alone(tmp_path):
    for seed, lr in (0, 1e-3), (1, 1e-3), (0, 3e-3):
        write_run(tmp_path / f"{seed}-{lr}", seed=seed, lr=lr)
    assert rows_of(table(tmp_path))[0]["Method"] == "soft (mixed lr)"


def test_table_ends_with_the_lookup_row_and_shows_dashes_where_nothing_was_scored(tmp_path):
    folder = write_dialogues(tmp_path / "data", train=[["Hi.", "Hello there, you!"]], test=[["Hi.", "Hello there, you!"]])
    write_run(tmp_path / "run", data=folder, unseen={"n": 0} | dict.fromkeys(METRICS))
    _, lookup, *unseen = rows_of(table(tmp_path))
    assert (lookup["Method"], lookup["BLEU4"], lookup["Novelty"], lookup["PPL"]) == ("lookup", "1.000", "0.000", "-")
    assert [set(list(row.values())[2:]) for row in unseen] == [{"-"}, {"-"}]


def test_plot_has_a_line_for_each_method_and_model_over_the_fraction(tmp_path):
    pytest.importorskip("matplotlib")
    for seed, fraction, bleu4 in (1, 1.0, 0.4), (2, 1.0, 0.6), (1, 0.1, 0.2):
        write_run(tmp_path / f"soft-{seed}-{fraction}", seed=seed, fraction=fraction, test={"bleu4": bleu4})
    write_run(tmp_path / "dynamic", method="dynamic", test={"novelty": 0.9})
    write_run(tmp_path / "dialogpt", model="dialogpt-small", test={"diversity": 0.7})
    png, svg = plot(tmp_path)
    assert (png.name, png.read_bytes()[:8]) == ("figure2.png", b"\x89PNG\r\n\x1a\n")
    assert (svg.name, ElementTree.parse(svg).getroot().tag) == ("figure2.svg", "{http://www.w3.org/2000/svg}svg")
    import matplotlib.pyplot as plt
    drawn = {panel.get_title(): {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata())) for line in panel.lines}
             for panel in plt.gcf().axes}
    plt.close()
    soft, dynamic, dialogpt = "soft, tiny-gpt2", "dynamic, tiny-gpt2", "soft, dialogpt-small"
    assert drawn == {"BLEU4": {soft: {10: 0.2, 100: 0.5}, dynamic: {100: 0.5}, dialogpt: {100: 0.5}},
                     "Novelty": {soft: {10: 0.5, 100: 0.5}, dynamic: {100: 0.9}, dialogpt: {100: 0.5}},
                     "Diversity": {soft: {10: 0.5, 100: 0.5}, dynamic: {100: 0.5}, dialogpt: {100: 0.7}}}


def test_plot_leaves_out_runs_without_test_pairs(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    write_run(tmp_path / "empty", test={"n": 0} | dict.fromkeys(METRICS))
    write_run(tmp_path / "dynamic", method="dynamic")
    plot(tmp_path)
    assert [line.get_label() for line in plt.gcf().axes[0].lines] == ["dynamic"]
    plt.close()


def test_plot_keeps_an_ablation_and_other_contexts_apart(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    for i, change in enumerate([{}, {"train_embeddings": False}, {"turns": 4}]):
        write_run(tmp_path / str(i), **change)
    plot(tmp_path)
    labels = [line.get_label() for line in plt.gcf().axes[0].lines]
    plt.close()
    assert len(set(labels)) == 3


# ------------------------------------------------------------------------------------------------------ command line

@pytest.fixture
def command(monkeypatch, capsys):
    """Run evaluate.py with these arguments -> (exit status, what it printed, its complaint)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        status = 0
        try:
            run_command(evaluate.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run


def test_lookup_prints_its_row_for_all_and_for_unseen_pairs(command, tmp_path):
    folder = write_dialogues(tmp_path / "data", train=[["Hi.", "Hello there, you!"]], test=[["Hi.", "Hello there, you!"], ["Ho.", "Hey."]])
    status, printed, _ = command("--lookup", "--data", folder)
    everything, unseen = rows_of(printed)
    assert status == 0 and "unseen" in unseen["Data"]
    assert (everything["BLEU1"], everything["ROUGE-L"], unseen["ROUGE-L"]) == ("0.500", "0.500", "0.000")       # of twice 5 words, 5 match


def without(key):
    return json.dumps({k: v for k, v in CONFIG.items() if k != key})


BROKEN = {
    "another version": ("config.json", json.dumps(CONFIG | {"version": 999}), "version 999"),
    "no version": ("config.json", without("version"), "version"),
    "no method": ("config.json", without("method"), "method"),
    "no turns": ("config.json", without("turns"), "turns"),
    "no settings": ("config.json", None, "missing"),
    "cut settings": ("config.json", json.dumps(CONFIG)[:40], "not JSON"),
    "settings in a list": ("config.json", "[]", "lacks"),
    "cut results": ("results.json", '{"test": ', "not JSON"),
    "binary results": ("results.json", b"\xff\x00", "not JSON"),
    "unknown method": ("config.json", json.dumps(CONFIG | {"method": "magic"}), "'magic'"),
    "no turn": ("config.json", json.dumps(CONFIG | {"turns": 0}), "turns is 0, expected 1 or more"),
    "unknown pairs": ("config.json", json.dumps(CONFIG | {"pairs": "\ud83d"}), "expected one of steps, sliding"),
    "turns in words": ("config.json", json.dumps(CONFIG | {"turns": "two"}), "turns"),
    "results without a test": ("results.json", json.dumps(CONFIG), "test"),
    "no test yet": ("results.json", json.dumps(CONFIG | {"test": None, "test_unseen": None}), "test"),
    "results without metrics": ("results.json", json.dumps(CONFIG | {"test": {"n": 1}, "test_unseen": {"n": 1}}), "metrics"),
    "no run": ("results.json", None, "no finished run"),
}


@pytest.mark.parametrize("file, content, complaint", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_run_is_named_in_one_sentence(file, content, complaint, command, tmp_path):
    write_run(tmp_path / "run")
    if content is None:
        (tmp_path / "run" / file).unlink()
    else:
        (tmp_path / "run" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, error = command("--table", tmp_path)
    assert status == 1 and re.fullmatch(r"error: .+\n", error)
    assert complaint in error and str(tmp_path) in error


@pytest.mark.parametrize("setting, value", [("dtype", "float8"), ("dropout", math.nan), ("seed", None), ("prompt_length", -1), ("max_response", 0)])
def test_settings_that_train_would_refuse_are_refused_here_too(setting, value, command, tmp_path):
    settings = {"dtype": "float32", "dropout": 0.1, "max_query": 128, "max_response": 128}
    write_run(tmp_path / "run", **settings | {setting: value})
    status, _, error = command(tmp_path / "run")
    assert status == 1 and re.fullmatch(r"error: .+\n", error)
    assert setting in error and str(tmp_path / "run/config.json") in error


def test_plot_without_matplotlib_says_how_to_get_it(command, tmp_path, monkeypatch):
    write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, error = command("--plot", tmp_path)
    assert status == 1 and "pip install matplotlib" in error


@pytest.mark.parametrize("arguments", ["", "--table", "run --chat --temperature -1", "run --chat --temperature nan", "run --chat --top-p 0",
                                       "run --chat --top-p 1.5", "run --chat --plot", "run --dtype float16"])
def test_absurd_usage_ends_with_status_2(arguments, command):
    status, _, error = command(*arguments.split())
    assert status == 2 and "error: " in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", ["nowhere", "nowhere --chat", "nowhere --export new", "nowhere --table", "--lookup --data nowhere"])
def test_a_folder_that_is_not_there_is_named(arguments, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = command(*arguments.split())
    assert status == 1 and re.fullmatch("error: .*nowhere.*\n", error)
