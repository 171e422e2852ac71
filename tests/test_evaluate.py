"""Metrics against nltk, rouge-score and by hand; the dictionary; devices; what a trained run can do; tables, figure."""
import doctest
import functools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

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
from evaluate import (METRICS, Lookup, all_metrics, choose_device, corpus_bleu, corpus_nist, distinct, diversity,
                      load_run, lookup_results, novelty, plot, report, rouge_l, table)
from model import GPT
from runs import MODEL, SMALL, contents, failed, finished, lines_of, ok, run


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
    assert all_metrics([], [], ["a"], None) == {"n": 0} | dict.fromkeys(METRICS)


def test_metrics_need_the_standard_library_alone():
    """What stands between the first two rulers runs in a Python without any package."""
    head, metrics, *_ = re.split(r"^# -{20,}.*\n", (ROOT / "evaluate.py").read_text(encoding="utf-8"), flags=re.M)
    lines = re.finditer(r"^(?:import|from) (\w+).*", head, flags=re.M)
    imports = [line[0] for line in lines if line[1] in sys.stdlib_module_names]
    call = "all_metrics(['I see a black cat.', 'No.'], ['I see a black dog.', 'No.'], ['No.'], 1.5)"
    code = "\n".join([*imports, metrics, f"print(json.dumps({call}))"])
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert bare.stderr == "" and json.loads(bare.stdout) == eval(call)


# ------------------------------------------------------------------------------------------------------- the dictionary

def test_lookup_answers_with_the_most_frequent_response_and_among_equals_the_earliest():
    """A query is known by its words, turn for turn."""
    lookup = Lookup([(["q"], "b"), (["q"], "a"), (["r"], "a"), (["r"], "c"), (["r"], "c"), (["p", "Are you?"], "a")])
    assert [lookup.answer(query) for query in (["q"], ["R!"], [" P", "are you"])] == ["b", "c", "a"]
    assert Lookup([(["q"], "b"), (["p", "Are you?"], "a")]).answer(["are you", "p"]) == "b"         # unknown


@pytest.mark.skipif(not (SHARED / "dailydialog").exists(), reason="needs ../shared/dailydialog")
def test_lookup_on_dailydialog():
    """This project's finding: far above the paper's best model, and nothing on unseen queries."""
    found = lookup_results(str(SHARED / "dailydialog"))
    for part, *expected in ("test", 3700, 0.220, 0.207, 0.209, 0.209), ("test_unseen", 2542, 0.008, 0.002, 0.001, 0):
        assert [round(found[part][name], 3) for name in ("n", "bleu1", "bleu2", "bleu3", "bleu4")] == expected
        assert found[part]["novelty"] == 0


def test_lookup_prints_its_row_for_all_and_for_unseen_pairs(tmp_path):
    dialogues = {"train": "Hi. __eou__ Hello there, you!", "validation": "a __eou__ b",
                 "test": "hi __eou__ Hello there, you!\nHo. __eou__ Hey."}
    for split, text in dialogues.items():
        (tmp_path / f"{split}.txt").write_text(text)
    everything, unseen = rows_of(ok(run(evaluate, "--lookup", "--data", tmp_path)).out)
    assert "2 pairs" in everything["Data"] and "unseen (1 pairs)" in unseen["Data"]
    assert (everything["BLEU1"], everything["ROUGE-L"], unseen["ROUGE-L"]) == ("0.500", "0.500", "0.000")


# ------------------------------------------------------------------------------------------------------------- devices

@pytest.fixture
def pretend(monkeypatch):
    """Let PyTorch find GPUs of these compute capabilities, and have kernels for these architectures."""
    def pretend(*capabilities):
        current = [0]
        for name, function in {
                "is_available": lambda: bool(capabilities), "device_count": lambda: len(capabilities),
                "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"],
                "get_device_capability": lambda device=None: capabilities[current[0]],
                "is_bf16_supported": lambda including_emulation: capabilities[current[0]] >= (8, 0),
                "set_device": lambda device: current.__setitem__(0, torch.device(device).index or 0)}.items():
            monkeypatch.setattr(torch.cuda, name, function)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield pretend
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("device, capabilities, expected, words", [
    ("auto", [], "cpu", "cpu"), ("auto", [(7, 5)], "cuda float16", "no fast bfloat16"),
    ("auto", [(9, 0)], "cuda bfloat16", "TF32"), ("auto", [(13, 0)], "cuda bfloat16", ""),         # from compute_120
    ("auto", [(7, 0)], "cpu", "no kernels for the GPU here, of compute capability 7.0"),
    ("cuda:1", [(7, 5), (8, 0)], "cuda:1 bfloat16", "")], ids=str)
def test_the_device_and_its_type_are_chosen_and_the_reason_is_given(pretend, device, capabilities, expected, words):
    pretend(*capabilities)
    found, dtype, why = choose_device(device, "auto")
    assert expected in (f"{found} {str(dtype).removeprefix('torch.')}", str(found)) and words in why
    if found.type == "cuda":
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert choose_device(device, "float32")[1:] == (torch.float32, "--dtype float32")
        assert not torch.backends.cudnn.allow_tf32                  # it would round p-tuning's LSTM in float32


def test_on_a_cpu_16_bits_are_chosen_only_where_they_are_fast(monkeypatch):
    for amx, dtype in (True, torch.bfloat16), (False, torch.float32):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        assert choose_device("cpu")[1] == dtype
        assert choose_device("cpu", "float16")[1] == torch.float16


# ------------------------------------------------------------------------------------------------------- a trained run

def test_a_run_answers_from_any_directory(tmp_path, monkeypatch):
    """As in its test: from a Path or a string, and whatever the working directory is."""
    folder = finished("dynamic")
    monkeypatch.chdir(tmp_path)
    query, response = (lines_of(folder / "generations.jsonl")[0][key] for key in ("query", "response"))
    for path in (folder, str(folder)):
        loaded = load_run(path, "cpu")
        assert loaded.reply(query) == loaded.reply(query[0]) == loaded.reply(["before that", *query]) == response != ""
    assert "| test (" in ok(run(evaluate, folder)).out
    torch.manual_seed(0)
    drawn = [loaded.reply(query, temperature=5.0) for _ in range(5)]
    assert len(set(drawn)) == 5 and loaded.reply(query, temperature=5.0, top_p=1e-9) == response
    for nothing in ("", " \n", [], ["Hi.", ""]):
        with pytest.raises(ValueError, match="query is empty"):
            loaded.reply(nothing)


def test_a_run_reads_as_many_turns_as_it_was_trained_on():
    loaded = load_run(finished("soft", "--turns", 2, "--epochs", 0))
    assert loaded.reply(["x", "Hello.", "Who?"]) == loaded.reply(["Hello.", "Who?"]) != loaded.reply(["Who?"])


def test_a_row_without_a_word_is_never_generated(tmp_path):
    """wte is padded to a multiple of 64, and one of the new rows is [PAD]'s: even where these rows would always win."""
    gpt, folder = GPT.from_pretrained(MODEL), shutil.copytree(MODEL, tmp_path / "padded")
    gpt.config.vocab_size, gpt.config.eos_token_id = 576, 511
    with torch.no_grad():
        gpt.ln_f.bias += 5
        gpt.wte.weight = torch.nn.Parameter(torch.cat([gpt.wte.weight, torch.full((64, 32), 10.0)]))
    gpt.save_pretrained(folder)
    (folder / "added_tokens.json").write_text('{"[PAD]": 512}')
    assert min(GPT.from_pretrained(folder).generate([[1, 2, 3]], 5)[0]) >= 512         # the GPT alone knows no words
    ok(run(train, "--method", "dynamic", *SMALL, "--model", folder, "--epochs", 0, "--out", tmp_path / "run"))
    loaded = load_run(tmp_path / "run")
    for options in {}, {"temperature": 5.0, "top_p": 0.9}:
        answer, = loaded.model.generate([[1, 2, 3]], 20, 511, **options)
        assert answer and max(answer) < 511


@pytest.mark.parametrize("change", ["weights", "test.txt", "vocab.json"])
def test_a_run_knows_what_it_stood_on(tmp_path, change):
    """Once the weights or the dialogues have changed, nothing is done with a run, and nothing overwritten."""
    small, folder = shutil.copytree(MODEL.parent, tmp_path / "small"), tmp_path / "run"
    flags = [*SMALL, "--method", "prompt-tuning", "--epochs", 0, "--model", small / "gpt", "--data", small / "data"]
    ok(run(train, *flags, "--out", folder))
    ok(run(evaluate, folder))
    if change == "weights":
        gpt = GPT.from_pretrained(MODEL)
        with torch.no_grad():
            gpt.h[1].mlp.c_fc.weight[0, 0] += 1e-3
        gpt.save_pretrained(small / "gpt")
    elif change == "vocab.json":                        # two letters change places: the dialogues' ids are others
        vocab = json.loads((small / "gpt/vocab.json").read_text())
        (small / "gpt/vocab.json").write_text(json.dumps(vocab | {"a": vocab["e"], "e": vocab["a"]}))
    else:
        with open(small / "data/test.txt", "a") as file:
            file.write("\nOne more. __eou__ Thanks.")
    before = contents(folder)
    for ended in (run(evaluate, folder), run(evaluate, folder, "--chat", stdin=b"Hello.\n"),
                  run(train, *flags, "--epochs", 3, "--resume", "--out", folder)):
        failed(ended, 1, small, "changed since this run began")
    assert contents(folder) == before


def test_chat():
    """It answers as in the test, and any line of any bytes; blank lines are passed over; the end of input ends it."""
    pair = lines_of(finished("soft") / "generations.jsonl")[0]
    said = [pair["query"][0].encode(), b"", b"  ", b"\xff\xfe\x00\x9d", b"x" * 1_000_000, b"<|endoftext|>", b"the end"]
    out = ok(run(evaluate, finished("soft"), "--chat", stdin=b"\n".join(said))).out
    assert f"you: soft: {pair['response']}\n" in out
    assert out.count("you: soft: ") == 5 and out.endswith("you: \n")
    hot = ok(run(evaluate, finished("soft"), "--chat", "--temperature", 5, stdin=said[0])).out
    assert hot.count("you: soft: ") == 1 and pair["response"] not in hot


# ------------------------------------------------------------------------------------------------------------- export

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


@pytest.mark.parametrize("method", ["prompt-tuning", "p-tuning", "prefix"])
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


def test_what_has_no_such_form_says_so(tmp_path):
    failed(run(evaluate, finished("soft"), "--export", tmp_path / "new"), 2, "soft", "prompt-tuning, p-tuning, prefix")
    both = finished("prefix", "--train-embeddings", "--epochs", 0)          # an adapter cannot hold word embeddings
    failed(run(evaluate, both, "--export", tmp_path / "new"), 2, "embeddings")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------- tables, figure

CONFIG = {"method": "soft", "model": "tiny-gpt2", "data": "moved away", "fraction": 1.0, "seed": 0, "turns": 1,
          "pairs": "steps", "lr": 1e-3, "prompt_length": None, "controller_layers": 2, "train_embeddings": None}


def write_run(folder, test=None, unseen=None, **config):
    """A finished run by hand; every metric that is not given is 0.5."""
    config, numbers = CONFIG | config, {"n": 1000} | dict.fromkeys(METRICS, 0.5)
    results = config | {"test": numbers | (test or {}), "test_unseen": numbers | (unseen or {})}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps(results))


def rows_of(markdown):
    """Markdown -> {column: cell} for each row of all its tables."""
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(lines[0], line)) for line in lines if line != lines[0] and line[0] != "---"]


def test_table_averages_seeds_with_their_spread(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"soft/{seed}", seed=seed, unseen={"bleu4": 0.01 * seed},
                  test={"bleu4": 0.1 * seed, "nist": seed, "perplexity": 10 * seed})
    write_run(tmp_path / "dynamic", method="dynamic", test={"bleu1": 0.25, "length": 7.77})
    write_run(tmp_path / "a tenth", fraction=0.1)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/config.json").write_text(json.dumps(CONFIG))
    rows = rows_of(ok(run(evaluate, "--table", tmp_path)).out)
    assert list(rows[0])[:8] == ["Data", "Method", "BLEU1", "BLEU2", "BLEU3", "BLEU4", "Novelty", "Diversity"]
    assert [row["Data"] + row["Method"] for row in rows] == ["10%soft", "100%soft", "100%dynamic"] * 2
    tenth, soft, dynamic, _, unseen, _ = rows
    assert (soft["BLEU4"], soft["NIST"], soft["PPL"]) == ("0.200 ± 0.100", "2.00 ± 1.00", "20.0 ± 10.0")
    assert unseen["BLEU4"] == "0.020 ± 0.010"
    assert (dynamic["BLEU1"], dynamic["Length"], tenth["BLEU4"]) == ("0.250", "7.8", "0.500")


@pytest.mark.parametrize("method, change, name", [
    ("soft", {"train_embeddings": False}, "soft, train embeddings False"), ("soft", {"lr": 3e-3}, "soft (mixed lr)")])
def test_table_averages_over_nothing_but_seeds(method, change, name, tmp_path):
    write_run(tmp_path / "1", method=method)
    write_run(tmp_path / "2", method=method, **change)
    names = [row["Method"] for row in rows_of(table(tmp_path))]
    assert names == ([name] if "mixed" in name else [method, name]) * 2


def test_table_ends_with_the_lookup_row_and_shows_dashes_where_nothing_was_scored(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / f"data/{split}.txt").write_text("Hi. __eou__ Hello there, you!")
    write_run(tmp_path / "run", data=str(tmp_path / "data"), unseen={"n": 0} | dict.fromkeys(METRICS))
    _, lookup, *unseen = rows_of(table(tmp_path))
    assert (lookup["Method"], lookup["BLEU4"], lookup["Novelty"], lookup["PPL"]) == ("lookup", "1.000", "0.000", "-")
    assert [set(list(row.values())[2:]) for row in unseen] == [{"-"}, {"-"}]


def test_a_new_metric_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(METRICS, "shouts", ("Shouts", 2, lambda outputs, *others: len(outputs) + 0.25))
    loaded = load_run(finished("soft"))
    results, _ = loaded.test(data.load_splits(loaded.config, loaded.tokenizer), loaded.best)
    assert results["test"]["shouts"] == 11.25 and rows_of(report(results))[0]["Shouts"] == "11.25"
    write_run(tmp_path / "run", test={"shouts": 7.25})
    assert [row["Shouts"] for row in rows_of(table(tmp_path))] == ["7.25", "0.50"]


def test_plot_has_a_line_for_each_method_and_model_over_the_fraction(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    for seed, fraction, bleu4 in (1, 1.0, 0.4), (2, 1.0, 0.6), (1, 0.1, 0.2):
        write_run(tmp_path / f"soft-{seed}-{fraction}", seed=seed, fraction=fraction, test={"bleu4": bleu4})
    write_run(tmp_path / "dynamic", method="dynamic", test={"novelty": 0.9})
    write_run(tmp_path / "dialogpt", model="dialogpt-small", test={"diversity": 0.7})
    write_run(tmp_path / "ablation", model="dialogpt-small", train_embeddings=False)
    write_run(tmp_path / "empty", method="prefix", test={"n": 0} | dict.fromkeys(METRICS))
    png, svg = plot(tmp_path)
    assert (png.name, png.read_bytes()[:8]) == ("figure2.png", b"\x89PNG\r\n\x1a\n")
    assert (svg.name, ElementTree.parse(svg).getroot().tag) == ("figure2.svg", "{http://www.w3.org/2000/svg}svg")
    drawn = {panel.get_title(): {line.get_label(): dict(zip(*line.get_data())) for line in panel.lines}
             for panel in plt.gcf().axes}
    plt.close()
    soft, dynamic, dialogpt = "soft, tiny-gpt2", "dynamic, tiny-gpt2", "soft, dialogpt-small"
    ablation = {"soft, train embeddings False, dialogpt-small": {100: 0.5}}
    assert drawn == {"BLEU4": {soft: {10: 0.2, 100: 0.5}, dynamic: {100: 0.5}, dialogpt: {100: 0.5}} | ablation,
                     "Novelty": {soft: {10: 0.5, 100: 0.5}, dynamic: {100: 0.9}, dialogpt: {100: 0.5}} | ablation,
                     "Diversity": {soft: {10: 0.5, 100: 0.5}, dynamic: {100: 0.5}, dialogpt: {100: 0.7}} | ablation}


# ------------------------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize("status, arguments", [
    (2, ""), (2, "--table"), (2, "run --chat --temperature nan"), (2, "run --chat --top-p 0"), (2, "run --chat --plot"),
    (1, "nowhere"), (1, "nowhere --chat"), (1, "nowhere --table"), (1, "--lookup --data nowhere")])
def test_usage_errors_and_folders_that_are_not_there(status, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed(run(evaluate, *arguments.split()), status, *["nowhere"] * (status == 1))


def test_what_a_gpu_reports_ends_in_one_sentence():
    def ended(message):
        program = SimpleNamespace(main=mock.Mock(side_effect=RuntimeError(message + "\nmore lines")), __file__="x.py")
        return run(program)

    failed(ended("CUDA out of memory. Tried to allocate 2 GiB"), 1, "--batch-size", "2 GiB")
    failed(ended("CUDA error: device-side assert"), 1, "--device cpu", "device-side assert")
    with pytest.raises(RuntimeError, match="a bug"):
        ended("a bug")
