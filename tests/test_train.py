"""`train.py` and `evaluate.py` as they are run: what a run leaves behind, that it can be repeated, reloaded, interrupted and resumed,
and how it fails. All at the smallest setting: a GPT of random weights, 32 wide, and a few of the sample dialogues.
"""
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import os
import pickle
import pkgutil
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from conftest import ROOT
import data
import evaluate
import train
from model import GPT, GPTConfig
from prompt_encoder import PromptedGPT

TRAINS = {"finetune": {"gpt"}, "soft": {"encoder", "gpt.wte"}, "dynamic": {"encoder", "gpt.wte"}, "prompt-tuning": {"encoder"},
          "p-tuning": {"encoder"}, "prefix": {"encoder"}, "dialogprompt": {"encoder"}}
METRICS = {"n", "bleu1", "bleu2", "bleu3", "bleu4", "novelty", "diversity", "distinct1", "distinct2", "nist", "rouge_l", "length", "perplexity"}
every_method = pytest.mark.parametrize("method", TRAINS)


# ----------------------------------------------------------------------------------------------------- the smallest setting

def write_small(folder):
    """Write a tiny checkpoint and a few dialogues into a folder -> the flags that train with them."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=4096, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn(p.shape) * 0.2)              # large enough that it talks
    gpt.save_pretrained(folder / "gpt")
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(ROOT / "tiny" / "tiny-gpt2" / file, folder / "gpt" / file)
    lines = {s: (ROOT / "tiny" / "dialogues" / f"{s}.txt").read_text(encoding="utf-8").splitlines() for s in ("train", "validation", "test")}
    (folder / "data").mkdir()
    for split, some in (("train", lines["train"][:12]), ("validation", lines["validation"][:3]), ("test", lines["test"][:3] + lines["train"][:1])):
        (folder / "data" / f"{split}.txt").write_text("\n".join(some), encoding="utf-8")
    return ["--model", folder / "gpt", "--data", folder / "data", "--max-query", 16, "--max-response", 16, "--batch-size", 8,
            "--epochs", 2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """(method, more flags) -> the folder of a run that nothing disturbed. It is shared: look, don't touch."""
    @functools.cache
    def run_once(method, *flags):
        folder = tmp_path_factory.mktemp("runs") / method
        ok(run(train, "--method", method, *small, *flags, "--out", folder))
        return folder
    return run_once


@pytest.fixture
def copied(finished, tmp_path):
    """The same, as a copy of the test's own."""
    return lambda *flags: shutil.copytree(finished(*flags), tmp_path / "copy")


def run(program, *arguments, stdin=b"", encoding="utf-8"):
    """Run train or evaluate with these arguments, in this process -> status, out, err. What would be a traceback passes through."""
    files = [io.TextIOWrapper(io.BytesIO(content), encoding=encoding, write_through=True) for content in (stdin, b"", b"")]
    with mock.patch.multiple(sys, argv=[program.__file__, *map(str, arguments)], stdin=files[0], stdout=files[1], stderr=files[2]):
        try:
            evaluate.run_command(program.main)
            status = 0
        except SystemExit as end:
            status = end.code
    return SimpleNamespace(status=status, **{name: f.buffer.getvalue().decode(encoding) for name, f in zip(("out", "err"), files[1:])})


def ok(ended):
    assert (ended.status, ended.err) == (0, "")
    return ended


def failed(ended, status, *words):
    """It ended with this status and one sentence with these words in it (of argparse: after the usage)."""
    assert ended.status == status
    sentence = ended.err.strip().splitlines()[-1]
    assert "error: " in sentence and "Traceback" not in ended.err
    if not ended.err.startswith("usage: "):
        assert ended.err == sentence + "\n"
    for word in words:
        assert str(word) in sentence
    return ended


@contextlib.contextmanager
def on_call(target, number, action):
    """Patch a function, named like `train.make_batch`: just before its number-th call, do something first."""
    function, calls = pkgutil.resolve_name(target), itertools.count(1)

    def stand_in(*args, **options):
        if next(calls) == number:
            action()
        return function(*args, **options)
    owner, name = target.rsplit(".", 1)
    with mock.patch.object(pkgutil.resolve_name(owner), name, stand_in):
        yield


def interrupt():
    """Ctrl-C."""
    raise KeyboardInterrupt


def killed(target, number, *arguments):
    """Run train.py in a process of its own, which is killed at the number-th call of a function of its own."""
    end = subprocess.run([sys.executable, __file__, target, str(number), *map(str, arguments)], capture_output=True)
    assert end.returncode == -signal.SIGKILL, end.stderr.decode()


def lines_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def log_of(folder):
    """log.jsonl without the clock."""
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines_of(folder / "log.jsonl")]


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_run(folder, other):
    """To the bit."""
    for file in ("best.pt", "generations.jsonl", "results.json"):
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file
    logs = [sorted(f.parent.relative_to(run) for f in run.rglob("log.jsonl")) for run in (folder, other)]
    assert logs[0] == logs[1]
    for name in logs[0]:
        assert log_of(folder / name) == log_of(other / name)


# -------------------------------------------------------------------------------------------------------------- a whole run

@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt") if sys.platform == "linux" else True, reason="for glibc")
def test_memory_is_kept():
    """Once allocated, memory serves again: the system is asked for no further page."""
    code = """if True:
        import resource, torch, train
        train.keep_memory()
        faults = []
        for _ in range(20):
            torch.ones(30_000_000)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        assert faults[-1] - faults[9] < 1000, faults"""
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert end.returncode == 0, end.stderr


def test_the_command(small, finished, tmp_path):
    """It ends with a table and five examples, and does the same again in another process, to the bit."""
    end = subprocess.run([sys.executable, ROOT / "train.py", "--method", "dynamic", *map(str, small)], capture_output=True, cwd=tmp_path,
                         encoding="utf-8")
    assert end.returncode == 0, end.stderr
    assert "| Data | Method | BLEU1 | BLEU2 |" in end.stdout and "| test, unseen (" in end.stdout
    assert [end.stdout.count(f"\n{word}: ") for word in ("    query", "reference", " response")] == [5, 5, 5]
    folder = tmp_path / "runs" / "data-gpt-dynamic-1.0-s0"
    assert {f.name for f in folder.iterdir()} == {"config.json", "log.jsonl", "last.pt", "best.pt", "generations.jsonl", "results.json"}
    assert_same_run(folder, finished("dynamic"))


def test_another_seed_is_another_run(finished):
    assert log_of(finished("finetune"))[1] != log_of(finished("finetune", "--seed", 1))[1]


def test_what_the_files_hold(small, finished):
    folder, flags = finished("dynamic"), dict(zip(small[::2], small[1::2]))
    results, log = json.loads((folder / "results.json").read_text()), lines_of(folder / "log.jsonl")
    config, best = json.loads((folder / "config.json").read_text()), torch.load(folder / "best.pt", weights_only=True)
    assert config.keys() == {
        "version", "method", "model", "data", "fraction", "turns", "pairs", "prompt_length", "controller_layers", "epochs", "patience",
        "batch_size", "lr", "trials", "dropout", "seed", "dtype", "max_query", "max_response", "train_embeddings"}

    assert [line["epoch"] for line in log] == [0, 1, 2]
    assert all(line.keys() == {"epoch", "step", "train_loss", "val_loss", "val_bleu4", "lr", "seconds", "eval_seconds", "tokens_per_second"}
               for line in log)
    chosen = max(log, key=lambda line: (line["val_bleu4"], -line["val_loss"]))
    assert {k: results[k] for k in ("method", "model", "data", "fraction", "seed", "lr", "epoch", "val_bleu4")} == {
        "method": "dynamic", "model": str(flags["--model"]), "data": str(flags["--data"]), "fraction": 1.0, "seed": 0,
        "lr": config["lr"], "epoch": chosen["epoch"], "val_bleu4": chosen["val_bleu4"]}
    assert results["trainable_parameters"] == sum(t.numel() for t in best["trained"].values())
    assert results["total_parameters"] == sum(p.numel() for p in GPT.from_pretrained(flags["--model"]).parameters()) + sum(
        t.numel() for name, t in best["trained"].items() if name.startswith("encoder."))
    assert len(results) == 12 and results["test"].keys() == results["test_unseen"].keys() == METRICS

    splits = data.read_dialogues(flags["--data"])
    queries = [query for query, _ in data.make_pairs(splits["train"])]
    generations = lines_of(folder / "generations.jsonl")
    assert [(g["query"], g["reference"], g["seen"]) for g in generations] == [
        (query, reference, query in queries) for query, reference in data.make_pairs(splits["test"])]
    assert all(g.keys() == {"query", "reference", "response", "seen"} and isinstance(g["response"], str) for g in generations)
    assert (results["test"]["n"], results["test_unseen"]["n"]) == (len(generations), sum(not g["seen"] for g in generations))
    assert 0 < results["test_unseen"]["n"] < results["test"]["n"]


@every_method
def test_training_lowers_the_validation_loss(finished, method):
    before, *after = [line["val_loss"] for line in log_of(finished(method))]
    assert min(after) < before - 0.01


@every_method
def test_best_holds_the_trained_tensors_alone(finished, method):
    file = finished(method) / "best.pt"
    trained = torch.load(file, weights_only=True)["trained"]
    assert {"gpt.wte" if name == "gpt.wte.weight" and method != "finetune" else name.split(".")[0] for name in trained} == TRAINS[method]
    assert file.stat().st_size < sum(t.numel() * 4 for t in trained.values()) + 1000 * (len(trained) + 2)


@every_method
def test_a_reloaded_run_answers_the_same(finished, copied, method):
    folder = copied(method)
    (folder / "generations.jsonl").unlink()
    (folder / "results.json").write_text((folder / "results.json").read_text().replace("0.", "7."))
    assert "| test (" in ok(run(evaluate, folder)).out
    assert_same_run(folder, finished(method))


def test_epochs_0_scores_the_untouched_model(small, finished):
    """As transformers scores it: the perplexity of the responses, and the greedy answers."""
    from transformers import GPT2LMHeadModel
    folder, flags = finished("finetune", "--epochs", 0, "--dtype", "float32"), dict(zip(small[::2], small[1::2]))
    theirs, tokenizer, losses = GPT2LMHeadModel.from_pretrained(flags["--model"]).eval(), data.load_tokenizer(flags["--model"]), []
    for g in lines_of(folder / "generations.jsonl"):
        query, response = (tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in (*g["query"], g["reference"]))
        query, response = query[-16:], response[:16]
        with torch.no_grad():
            logits = theirs(torch.tensor([query + response])).logits[0, len(query) - 1:-1]
            answer = theirs.generate(torch.tensor([query]), attention_mask=torch.ones(1, len(query)), max_new_tokens=40, do_sample=False,
                                     pad_token_id=tokenizer.eot_token)[0, len(query):].tolist()
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none").tolist()
        assert g["response"] == tokenizer.decode([t for t in answer if t != tokenizer.eot_token]).strip()
    results = json.loads((folder / "results.json").read_text())
    assert results["epoch"] == 0 and [line["epoch"] for line in log_of(folder)] == [0]
    assert results["test"]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipped_steps_equal_pytorchs(scale):
    """Three steps of AdamW after `clip` and after clip_grad_norm_, from gradients shorter and longer than 1."""
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((50, 30), (30,), (7, 1, 3))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    sides = [(p, torch.optim.AdamW(p, lr=0.1, eps=0.1, fused=True)) for p in (ours, theirs)]      # a large eps: Adam forgets no scale
    for _ in range(3):
        gradients = [torch.randn_like(p) * scale for p in ours]
        for parameters, optimizer in sides:
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient.clone()
        train.clip(*sides[0])
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for _, optimizer in sides:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_the_learning_rate_rises_and_falls():
    assert [train.warm_up_and_decay(step, 1000) for step in (0, 49, 99, 550, 999)] == pytest.approx([0.01, 0.5, 1, 0.5, 1 / 900])
    assert [train.warm_up_and_decay(step, 20) for step in (0, 1, 2, 11, 19)] == pytest.approx([0.5, 1, 1, 0.5, 1 / 18])
    assert train.warm_up_and_decay(0, 1) == 1


def test_the_best_epoch_is_kept_and_patience_ends_the_run(small, finished, tmp_path):
    """BLEU4 decides, though the loss goes on falling; two epochs without a better one are enough."""
    with mock.patch("train.corpus_bleu", side_effect=[0.1, 0.3, 0.2, 0.2, 1.0]):
        ok(run(train, "--method", "soft", *small, "--epochs", 9, "--patience", 2, "--out", tmp_path / "run"))
    losses = [line["val_loss"] for line in log_of(tmp_path / "run")]
    results, best = json.loads((tmp_path / "run" / "results.json").read_text()), torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert len(losses) == 4 and losses[3] < losses[1]
    assert (results["epoch"], results["val_bleu4"]) == (best["epoch"], best["val_bleu4"]) == (1, 0.3)
    assert best["val_loss"] == losses[1]


# ---------------------------------------------------------------------------------------------------- interrupted and resumed

@pytest.mark.parametrize("method, target, number, after", [
    ("dynamic", "train.make_batch", 8, 1),          # in the second epoch, which has 5 steps
    ("finetune", "os.fsync", 9, 1),                 # while the second epoch is saved, best.pt already is
    ("prefix", "os.fsync", 10, 2),                  # while it is saved, the last file is still missing
    ("dialogprompt", "model.GPT.answer", 4, 2)],    # in the final test
    ids=["mid-epoch", "in a save", "at the end of a save", "in the test"])
def test_killed_and_resumed(small, finished, tmp_path, method, target, number, after):
    """Killed at any moment, it ends as if nothing had been."""
    arguments = "--method", method, *small, "--out", tmp_path / "run"
    killed(target, number, *arguments)
    assert not (tmp_path / "run" / "results.json").exists()
    assert f"resuming after epoch {after}\n" in ok(run(train, *arguments, "--resume")).out
    assert_same_run(tmp_path / "run", finished(method))
    assert contents(tmp_path / "run").keys() == contents(finished(method)).keys()       # no half-written file stays behind


def test_killed_between_trials(small, finished, tmp_path):
    """What was tried is not tried again."""
    arguments = "--method", "soft", *small, "--trials", 2
    killed("train.read_json", 1, *arguments, "--out", tmp_path / "run")
    before = contents(tmp_path / "run" / "trial-01")
    assert not (tmp_path / "run" / "trial-02").exists()
    out = ok(run(train, *arguments, "--out", tmp_path / "run", "--resume")).out
    assert "trial 1/2" not in out and "trial 2/2" in out
    assert contents(tmp_path / "run" / "trial-01") == before
    assert_same_run(tmp_path / "run", finished("soft", "--trials", 2))


@pytest.mark.parametrize("target, number", [("train.make_batch", 8), ("train.test", 1)], ids=["in training", "in the test"])
def test_ctrl_c_says_how_to_resume(small, finished, tmp_path, target, number):
    """And a look at the unfinished run in between does no harm."""
    arguments = "--method", "soft", *small, "--out", tmp_path / "run"
    with on_call(target, number, interrupt):
        ended = run(train, *arguments)
    assert ended.status == 130 and "--resume" in ended.out + ended.err
    run(evaluate, tmp_path / "run")
    ok(run(train, *arguments, "--resume"))
    assert_same_run(tmp_path / "run", finished("soft"))


def test_resume_without_a_run_begins_one(small, finished, tmp_path):
    ok(run(train, "--method", "soft", *small, "--out", tmp_path / "new", "--resume"))
    assert_same_run(tmp_path / "new", finished("soft"))


def test_resume_after_the_end(small, copied):
    folder = copied("soft")
    before = contents(folder)
    assert f"{folder} is already finished" in ok(run(train, "--method", "soft", *small, "--out", folder, "--resume")).out
    assert contents(folder) == before


def test_resume_with_other_settings(small, copied):
    folder = copied("soft")
    before = contents(folder)
    ended = run(train, "--method", "soft", *small, "--out", folder, "--resume", "--seed", 3, "--lr", 0.5)
    failed(ended, 2, "--seed 0 (now 3)", f"--lr {train.LEARNING_RATES['soft']} (now 0.5)")
    assert "--batch-size" not in ended.err and contents(folder) == before


def test_a_folder_with_a_run_is_refused(small, copied):
    folder = copied("soft")
    before = contents(folder)
    failed(run(train, "--method", "soft", *small, "--out", folder), 1, folder, "--resume", "--overwrite")
    assert contents(folder) == before


def test_a_run_without_its_settings_is_still_a_run(small, copied):
    """Whatever --lr says now: without config.json, nobody knows what last.pt was trained with."""
    folder = copied("soft")
    (folder / "config.json").unlink()
    before = contents(folder)
    failed(run(train, "--method", "soft", *small, "--lr", 0.5, "--out", folder), 1, folder, "--overwrite")
    failed(run(train, "--method", "soft", *small, "--lr", 0.5, "--out", folder, "--resume"), 1, "config.json is missing")
    assert contents(folder) == before


def test_overwrite_spares_a_checkpoint_folder(small, tmp_path):
    folder = shutil.copytree(small[1], tmp_path / "gpt")
    before = contents(folder)
    failed(run(train, "--method", "soft", *small, "--out", folder, "--overwrite"), 1, folder / "config.json")
    assert contents(folder) == before


def test_overwrite_leaves_nothing_of_the_run_before(small, finished, tmp_path):
    """Not even if it is itself cut short, between the files it takes away, and has to be asked for again."""
    folder = shutil.copytree(finished("soft", "--seed", 1), tmp_path / "run")
    shutil.copytree(finished("soft", "--trials", 2), folder, dirs_exist_ok=True)        # as if it had had trials too
    arguments = "--method", "soft", *small, "--out", folder
    with on_call("pathlib.Path.unlink", 2, interrupt), contextlib.suppress(KeyboardInterrupt):
        run(train, *arguments, "--overwrite")
    ended = run(train, *arguments)
    if ended.status:                                # it may still call itself the run before, and be refused
        ok(run(train, *arguments, "--overwrite"))
    assert contents(folder).keys() == contents(finished("soft")).keys()
    assert_same_run(folder, finished("soft"))


# ------------------------------------------------------------------------------------------------------------ several trials

def nan_loss_at(step):
    """Let the loss of a training step, counted over all trials, be NaN."""
    forward, steps = PromptedGPT.forward, itertools.count(1)

    def poisoned(self, batch):
        return forward(self, batch) * (math.nan if self.training and next(steps) == step else 1)
    return mock.patch.object(PromptedGPT, "forward", poisoned)


def test_trials(small, tmp_path):
    """Each in a folder of its own; one fails and the search goes on; the best BLEU4 is tested, though another's loss is lower."""
    folder = tmp_path / "run"
    with nan_loss_at(7), mock.patch("train.corpus_bleu", side_effect=[0.1, 0.2, 0.1, 0.1, 0.3]):
        out = ok(run(train, "--method", "soft", *small, "--trials", 3, "--epochs", 1, "--out", folder)).out
    trials = [json.loads((folder / f"trial-0{i}" / "trial.json").read_text()) for i in (1, 2, 3)]
    assert "| 2 | " in out and out.count("| failed |") == 1 and "step 2" in trials[1]["failed"]
    assert [t.get("val_bleu4") for t in trials] == [0.2, None, 0.3] and trials[2]["val_loss"] > trials[0]["val_loss"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["lr"], results["val_bleu4"]) == (trials[2]["lr"], 0.3)
    tensors = [torch.load(f / "best.pt", weights_only=True)["trained"] for f in (folder, folder / "trial-03")]
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    assert [len(log_of(folder / f"trial-0{i}")) for i in (1, 2, 3)] == [2, 1, 2]


def test_learning_rates_of_trials(small, tmp_path):
    """Log-uniform in [3e-6, 9e-3] and seeded; and if all of them fail, that is said."""
    def rates(n, seed, folder):
        with mock.patch("train.fit", side_effect=train.Diverged("the loss became nan")):
            ended = run(train, "--method", "soft", *small, "--trials", n, "--seed", seed, "--out", tmp_path / folder)
        failed(ended, 1, f"all {n} trials failed")
        return [json.loads(file.read_text())["lr"] for file in sorted((tmp_path / folder).glob("trial-*/trial.json"))]

    drawn = rates(60, 0, "a")
    assert len(drawn) == 60 and all(3e-6 <= lr <= 9e-3 for lr in drawn)
    thirds = [sum(3e-6 * 3000 ** (i / 3) <= lr <= 3e-6 * 3000 ** ((i + 1) / 3) for lr in drawn) for i in range(3)]
    assert min(thirds) >= 10                        # of 20 expected
    assert rates(5, 0, "b") == drawn[:5] and not set(rates(5, 1, "c")) & set(drawn)


# ------------------------------------------------------------------------------------------------------------ what can go wrong

@pytest.mark.parametrize("trouble, step", [(nan_loss_at(8), 8), (mock.patch("train.mean_loss", side_effect=[9.0, 8.0, math.nan]), 10)],
                         ids=["in training", "in validation"])
def test_a_nan_loss_stops_the_run(small, tmp_path, trouble, step):
    """The step and its learning rate are named, and the last good checkpoint is kept."""
    with trouble:
        failed(run(train, "--method", "soft", *small, "--out", tmp_path / "run"), 1, "nan", f"step {step} ", "learning rate", tmp_path / "run")
    for file in ("best.pt", "last.pt"):
        assert torch.load(tmp_path / "run" / file, weights_only=True)["epoch"] == 1
    assert len(log_of(tmp_path / "run")) == 2 and not (tmp_path / "run" / "results.json").exists()


@contextlib.contextmanager
def full_disk(size):
    """No file may grow beyond size bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [2_000, 300_000, 531_000], ids=lambda size: f"{size} bytes")
def test_a_full_disk(small, finished, tmp_path, size):
    """One sentence, and the last good checkpoint is there to resume from."""
    folder, arguments = tmp_path / "run", ("--method", "soft", *small, "--out", tmp_path / "run")
    with on_call("train.make_batch", 8, interrupt):
        run(train, *arguments)
    before = contents(folder)
    with full_disk(size):
        failed(run(train, *arguments, "--resume"), 1, folder)
    after = contents(folder)
    assert after == before | {Path("best.pt"): after[Path("best.pt")]}          # for which there may have been room
    ok(run(train, *arguments, "--resume"))
    assert_same_run(folder, finished("soft"))


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_written(small, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    failed(run(train, "--method", "soft", *small, "--out", tmp_path / place), 1, tmp_path / "file")
    assert contents(tmp_path) == {Path("file"): b"mine"}


@pytest.mark.parametrize("flags, word", [
    ("", "--method"), ("--method hard", "hard"), ("--method soft --epochs -1", "--epochs"), ("--method soft --epochs 1.5", "--epochs"),
    ("--method soft --fraction 0", "--fraction"), ("--method soft --fraction nan", "--fraction"), ("--method soft --lr inf", "--lr"),
    ("--method soft --batch-size 0", "--batch-size"), ("--method soft --seed -1", "--seed"), ("--method soft --turns zwei", "--turns"),
    ("--method soft --dropout 1", "--dropout"), ("--method soft --pairs all", "--pairs"), ("--method soft --trials 2 --lr 0.1", "--trials"),
    ("--method soft --resume --overwrite", "--overwrite"), ("--method dynamic --prompt-length 5", "--prompt-length"),
    ("--method soft --colour red", "--colour"), ("--method soft --max-query 999999999999999999999", "--max-query"),
    ("--method finetune --max-query 89", "are 129,"), ("--method soft --max-query 45", "are 130,"),
    ("--method prefix --max-query 20 --max-response 99", "are 129,"), ("--method dialogprompt --prompt-length 73", "are 129,")])
def test_usage_errors(small, tmp_path, flags, word):
    """Among them: prompt, query and response could need more than the 128 positions there are. Nothing is written."""
    failed(run(train, *small, *flags.split(), "--out", tmp_path / "run"), 2, word)
    assert not (tmp_path / "run").exists()


def test_what_just_fits_is_accepted(small, tmp_path):
    ok(run(train, "--method", "soft", *small, "--max-query", 44, "--epochs", 0, "--out", tmp_path / "run"))


@pytest.mark.parametrize("flag, word", [("--model", "gpt5"), ("--data", "nowhere"), ("--device", "cuda:99")])
def test_unknown_names(small, tmp_path, flag, word):
    failed(run(train, "--method", "soft", *small, flag, word, "--out", tmp_path / "run"), 2 if flag == "--device" else 1, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file, content, word", [
    ("data/test.txt", None, "test.txt"), ("data/validation.txt", b"Hello? Anybody?\n", "validation.txt"),
    ("data/train.txt", b"Hi. __eou__ Hi!\nCaf\xe9. __eou__ Yes.\n", "line 2"),
    ("gpt/config.json", b"{}", "vocab_size"), ("gpt/model.safetensors", b"\0" * 100, "model.safetensors"), ("gpt/vocab.json", None, "vocab.json"),
    ("gpt/config.json", lambda text: text.replace(b"4096", b"4097"), "4097")])
def test_bad_data_and_checkpoints(small, tmp_path, file, content, word):
    folder = shutil.copytree(small[1].parent, tmp_path / "bad")
    content = content((folder / file).read_bytes()) if callable(content) else content
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    failed(run(train, "--method", "soft", *small, "--model", folder / "gpt", "--data", folder / "data", "--out", tmp_path / "run"), 1, word)


@pytest.mark.parametrize("size", [math.nan, math.inf, 1e6])
def test_a_checkpoint_of_absurd_numbers(small, tmp_path, size):
    """No perplexity can be told of it: either that is said, or results.json has no number there."""
    gpt = GPT.from_pretrained(small[1])
    with torch.no_grad():
        gpt.wte.weight *= size
    folder = shutil.copytree(small[1], tmp_path / "gpt")
    gpt.save_pretrained(folder)
    ended = run(train, "--method", "soft", *small, "--model", folder, "--epochs", 0, "--out", tmp_path / "run")
    if ended.status:
        failed(ended, 1)
    else:
        json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=pytest.fail)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@pytest.mark.parametrize("content", [lambda whole: pickle.dumps(Code(), protocol=2), lambda whole: whole[:-1000], lambda whole: b"", None],
                         ids=["code", "half", "empty", "something else"])
def test_broken_checkpoints_of_a_run(small, copied, tmp_path, monkeypatch, name, content):
    """They are refused in a sentence that names them, and no code in them runs."""
    folder = copied("soft")
    (folder / "results.json").unlink()
    if content:
        (folder / name).write_bytes(content((folder / name).read_bytes()))
    else:
        torch.save({"colour": "red"}, folder / name)
    monkeypatch.chdir(tmp_path)
    failed(run(train, "--method", "soft", *small, "--out", folder, "--resume"), 1, folder / name)
    assert not (tmp_path / "executed").exists()


def test_a_log_file_without_unicode(small, tmp_path):
    """Windows' log files cannot show every character: that must not end a run."""
    folder = shutil.copytree(small[3], tmp_path / "data")
    (folder / "test.txt").write_text("Olé! 😀 __eou__ مرحبا\n" * 2, encoding="utf-8")
    ok(run(train, "--method", "soft", *small, "--data", folder, "--epochs", 0, "--out", tmp_path / "run", encoding="ascii"))


# ------------------------------------------------------------------------------------------- several processes, export, chat

def test_two_processes_train_as_one(small, tmp_path):
    """Batches of 3: one process has 2 rows, the other 1 or none."""
    flags = "--method", "dynamic", *small, "--batch-size", 3, "--dropout", 0, "--dtype", "float32", "--out"
    end = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py",
                          *map(str, flags), tmp_path / "two"], capture_output=True, encoding="utf-8")
    assert end.returncode == 0, end.stderr
    ok(run(train, *flags, tmp_path / "one"))
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["epoch"] for line in two] == [0, 1, 2] and end.stdout.count("epoch   2") == 1
    for key in ("train_loss", "val_loss"):
        assert [line[key] for line in two if line[key]] == pytest.approx([line[key] for line in one if line[key]], abs=1e-5, rel=0)
    assert lines_of(tmp_path / "two" / "generations.jsonl") == lines_of(tmp_path / "one" / "generations.jsonl")


def test_export(finished, tmp_path):
    """transformers loads it and computes the same logits."""
    from transformers import AutoModelForCausalLM
    assert str(tmp_path / "gpt") in ok(run(evaluate, finished("finetune"), "--export", tmp_path / "gpt")).out
    _, model, _ = evaluate.load_run(finished("finetune"), dtype="float32")
    tokenizer = data.load_tokenizer(tmp_path / "gpt")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt").eval()
    ids = torch.tensor([tokenizer.encode_ordinary("Where did you put my keys? I cannot find them.")])
    with torch.no_grad():
        torch.testing.assert_close(model.gpt(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    failed(run(evaluate, finished("finetune"), "--export", tmp_path / "gpt"), 1, "not empty")
    failed(run(evaluate, finished("soft"), "--export", tmp_path / "other"), 1, "soft")


def test_chat(finished):
    """It answers as in the test, and any line of any bytes; blank lines are passed over; the end of the input ends it."""
    pair = lines_of(finished("soft") / "generations.jsonl")[0]
    said = [pair["query"][0].encode(), b"", b"  ", b"\xff\xfe\x00\x9d", b"x" * 1_000_000, b"<|endoftext|>", b"no end of line"]
    out = ok(run(evaluate, finished("soft"), "--chat", stdin=b"\n".join(said))).out
    assert f"you: soft: {pair['response']}\n" in out
    assert out.count("you: soft: ") == 5 and out.endswith("you: \n")


def test_chat_reads_as_many_turns_as_were_trained(finished):
    folder, read = finished("soft", "--turns", 2, "--epochs", 0), []

    def encode_pairs(pairs, *limits):
        read.append(list(pairs[0][0]))
        return data.encode_pairs(pairs, *limits)
    with mock.patch("evaluate.encode_pairs", encode_pairs), on_call("builtins.input", 3, interrupt):        # Ctrl-C ends it too
        replies = ok(run(evaluate, folder, "--chat", stdin=b"Hello.\nWho is there?\n")).out.split("soft: ")[1:]
    assert read == [["Hello."], [replies[0].removesuffix("\nyou: "), "Who is there?"]]


if __name__ == "__main__":              # python test_train.py TARGET N ...: python train.py ..., killed at the N-th call of TARGET
    target, number, *sys.argv[1:] = sys.argv[1:]
    with on_call(target, int(number), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        train.main()
