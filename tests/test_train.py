"""`train.py` as it is run: what it leaves behind, that it can be repeated, interrupted and resumed, who gets a folder,
how it fails; 16 bits, torch.compile, several processes, a pretended GPU. With the small model of runs.py.
"""
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import data
import evaluate
import train
from conftest import ROOT, SHARED
from evaluate import Run, all_metrics, load_run
from model import GPT, UsageError
from prompt_encoder import METHODS, DialogPrompt, PromptedGPT, PromptEncoder, group_by_length
from runs import (DATA, MODEL, SMALL, assert_same_run, contents, failed, finished, interrupt, lines_of, log_of, ok,
                  on_call, results_of, run, start)

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")


def checkpoint_of(folder, name="best.pt"):
    return torch.load(folder / name, weights_only=True)


# ------------------------------------------------------------------------------------------------------- a whole run

def test_the_command(tmp_path):
    """It ends with a table and five examples, says which epoch is tested, and does the same in another process."""
    command = [sys.executable, ROOT / "train.py", "--method", "dynamic", *map(str, SMALL)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    end = subprocess.run(command, capture_output=True, cwd=tmp_path, encoding="utf-8", env=one_thread)
    assert end.returncode == 0, end.stderr
    assert "| Test pairs | Method | Swap | BLEU1 | BLEU2 |" in end.stdout and "| test, unseen (" in end.stdout
    assert [end.stdout.count(f"\n{word}: ") for word in ("    query", "reference", " response")] == [5, 5, 5]
    folder, = (tmp_path / "runs").iterdir()             # its name says what differs from the defaults
    assert folder.name == "data-gpt-dynamic-1.0-s0-max-query16-max-response16-epochs2-batch-size8-dtypefloat32"
    assert {f.name for f in folder.iterdir()} == {*train.RUN_FILES} - {"trial.json"}
    assert f"tested: epoch {results_of(folder)['epoch']} of 2 (best validation BLEU4" in end.stdout
    assert_same_run(folder, finished("dynamic"))


def test_what_the_files_hold():
    folder = finished("dynamic")
    results, log, best = results_of(folder), lines_of(folder / "log.jsonl"), checkpoint_of(folder)
    assert [(line["epoch"], line["step"]) for line in log] == [(0, 0), (1, 5), (2, 10)]
    assert all(line.keys() == {"epoch", "step", "train_loss", "val_loss", "val_bleu4", "lr", "seconds", "eval_seconds",
                               "tokens_per_second"} for line in log)
    chosen = max(log[1:], key=lambda line: (line["val_bleu4"], -line["val_loss"]))      # epoch 0 is a baseline
    tests, swap = [results.pop(name) for name in ("test", "test_unseen")], results.pop("swap")
    trained = {name: tensor.numel() for name, tensor in best["trained"].items()}
    assert results == {
        "method": "dynamic", "model": str(MODEL), "data": str(DATA), "fraction": 1.0, "seed": 0, "lr": 5e-4,
        "epoch": chosen["epoch"], "val_bleu4": chosen["val_bleu4"], "trainable_parameters": sum(trained.values()),
        "total_parameters": sum(p.numel() for p in GPT.from_pretrained(MODEL).parameters())
        + sum(n for name, n in trained.items() if name.startswith("encoder."))}
    assert [part.keys() for part in tests] == [all_metrics([], [], []).keys()] * 2 and isinstance(swap, float)
    generations = lines_of(folder / "generations.jsonl")
    assert [part["n"] for part in tests] == [11, sum(not g["seen"] for g in generations)] and len(generations) == 11
    assert 0 < tests[1]["n"] < 11


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says_and_nothing_else(method):
    """The loss falls, and best.pt holds the trained tensors alone."""
    before, *after = [line["val_loss"] for line in log_of(finished(method))]
    assert min(after) < before - 0.01
    file, trained, kind = finished(method) / "best.pt", checkpoint_of(finished(method))["trained"], METHODS[method]
    gpt = GPT.from_pretrained(MODEL)
    encoder = list(kind(gpt.config, gpt.wte.weight).parameters())
    wanted = {"gpt": kind.trains_gpt, "gpt.wte": kind.trains_embeddings, "encoder": encoder}
    parts = {"gpt.wte" if name == "gpt.wte.weight" else name.split(".")[0] for name in trained}
    assert parts == {part for part, wants in wanted.items() if wants}
    assert file.stat().st_size < sum(t.numel() * 4 for t in trained.values()) + 1000 * (len(trained) + 6)


def test_epochs_0_scores_the_model_before_training():
    """As transformers scores it: the perplexity of the responses, and the greedy answers."""
    from transformers import GPT2LMHeadModel
    folder = finished("finetune", "--epochs", 0, "--max-new-tokens", 9)
    theirs, losses = GPT2LMHeadModel.from_pretrained(MODEL), []
    tokenizer = data.load_tokenizer(MODEL)
    for g in lines_of(folder / "generations.jsonl"):
        query, response = (tokenizer.encode_ordinary(text) + [511] for text in (*g["query"], g["reference"]))
        query, response = query[-16:], response[:16]
        with torch.no_grad():
            logits = theirs(torch.tensor([query + response])).logits[0, len(query) - 1:-1]
            answer = theirs.generate(torch.tensor([query]), attention_mask=torch.ones(1, len(query)), max_new_tokens=9,
                                     do_sample=False, pad_token_id=511)[0, len(query):].tolist()
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="none").tolist()
        assert g["response"] == tokenizer.decode([t for t in answer if t != 511]).strip()
    assert results_of(folder)["epoch"] == checkpoint_of(folder)["epoch"] == 0 and len(log_of(folder)) == 1
    perplexity = math.exp(sum(losses) / len(losses))
    assert results_of(folder)["test"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)


def scores(*given):
    """Let validation give these, as (loss, BLEU4)."""
    return mock.patch.object(Run, "validate", side_effect=given)


@pytest.mark.parametrize("given, select, epochs, epoch", [
    ([(9, 0.9), (8, 0.1), (7, 0.3), (6, 0.2), (5, 0.2), (4, 1.0)], "bleu4", 4, 2),
    ([(9, 0.0), (8, 0.0), (6, 0.0), (7, 0.0)], "bleu4", 3, 2),
    ([(1, 0.5), (8, 0.2), (7, 0.1), (6, 0.1)], "bleu4", 3, 1),
    ([(1, 0.0), (7, 0.3), (6, 0.1), (6, 0.2), (8, 0.4)], "loss", 4, 3)],
    ids=["BLEU4 decides", "then the loss", "never epoch 0", "the loss decides, then BLEU4"])
def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path, given, select, epochs, epoch):
    folder, last = tmp_path / "run", len(given) - 1
    with scores(*given):
        out = ok(start("prompt-tuning", "--epochs", last, "--patience", 2, "--select", select, "--out", folder)).out
    assert len(log_of(folder)) == epochs + 1 and f"tested: epoch {epoch} of {last} (best" in out
    assert ("fewer than 100 validation pairs" in out) == (select == "bleu4")
    for found in results_of(folder), checkpoint_of(folder):
        assert (found["epoch"], found["val_bleu4"]) == (epoch, given[epoch][1])
    assert checkpoint_of(folder)["val_loss"] == given[epoch][0]


def test_the_learning_rate_rises_and_falls():
    for steps, expected in (1000, {0: 0.01, 49: 0.5, 99: 1, 550: 0.5, 999: 1 / 900}), (20, {0: 0.5, 1: 1, 19: 1 / 18}):
        assert {step: train.warm_up_and_decay(step, steps) for step in expected} == pytest.approx(expected)
    assert train.warm_up_and_decay(0, 1) == 1


def test_one_text_file_is_data_enough(tmp_path, monkeypatch):
    """Found again from another directory; split in the same way whatever the seed."""
    (tmp_path / "mine.txt").write_text("".join(f"Do you like {i}? __eou__ Yes, {i} is fine.\n" for i in range(20)))
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        out = ok(start("soft", "--data", "mine.txt", "--epochs", 0, "--seed", seed, "--out", f"run{seed}")).out
        assert "16 train, 2 validation, 2 test pairs" in out
    monkeypatch.chdir("/")
    assert "| test (2 pairs)" in ok(run(evaluate, tmp_path / "run0")).out
    ok(run(evaluate, "--compare", tmp_path / "run0", tmp_path / "run1"))        # refused where test pairs differ


def test_from_python(tmp_path):
    """A list of dialogues is enough; 0 and False count; a wrong flag raises UsageError, and nothing ends."""
    dialogues = [[f"Do you like {i}?", f"Yes, {i} is fine."] for i in range(20)]
    flags = {"model": MODEL, "max_query": 16, "max_response": 16, "device": "cpu", "out": tmp_path / "run"}
    found = train.train(method="soft", data=dialogues, epochs=1, batch_size=8, **flags)
    assert found.reply("Do you like 3?") == load_run(tmp_path / "run", "cpu").reply("Do you like 3?")
    assert results_of(tmp_path / "run")["test"]["n"] == 2 and len(log_of(tmp_path / "run")) == 2
    flags["overwrite"] = True
    splits = {"train": dialogues, "validation": dialogues[:3], "test": dialogues[:4]}
    found = train.train(method="finetune", data=splits, epochs=0, dropout=0, train_embeddings=False, **flags)
    assert [found.config[key] for key in ("epochs", "dropout", "train_embeddings")] == [0, 0, False]
    assert results_of(tmp_path / "run")["test_unseen"]["n"] == 0
    for wrong in {"learning_rate": 1}, {"epochs": -1}, {"resume": True}:
        with pytest.raises(UsageError):
            train.train(method="soft", **flags | wrong)


# ------------------------------------------------------------------------------------------- interrupted and resumed

def interrupt_in_a_save(save=torch.save):
    """PyTorch makes a RuntimeError of it."""
    save({}, mock.Mock(write=mock.Mock(side_effect=[1, KeyboardInterrupt, *range(99)])))


@pytest.mark.parametrize("method, owner, name, number, after", [
    ("dynamic", PromptedGPT, "label_logits", 2, 0), ("prompt-tuning", PromptedGPT, "label_logits", 9, 1),
    ("finetune", train, "save", 6, 1), ("dialogprompt", Run, "respond", 3, 1), ("prefix", Run, "test", 1, 2),
    ("soft", torch, "save", 3, 0)],
    ids=["first epoch", "mid-epoch", "after best.pt", "in validation", "in the test", "in a save"])
def test_interrupted_and_resumed(tmp_path, method, owner, name, number, after):
    """Ctrl-C at any moment says how to resume; a look at the run does no harm; it ends as if nothing had been."""
    folder = tmp_path / "run"
    with on_call(owner, name, number, interrupt_in_a_save if owner is torch else interrupt):
        ended = start(method, "--out", folder)
    before = contents(folder)
    assert ended.status == 130 and "--resume" in ended.out and Path("results.json") not in before
    ended = run(evaluate, folder)
    if after or Path("best.pt") in before:
        assert "nothing was written" in ok(ended).out
    else:
        failed(ended, 1, "best.pt is missing")
    assert contents(folder) == before
    assert f"resuming after epoch {after}\n" in ok(start(method, "--out", folder, "--resume")).out
    assert_same_run(folder, finished(method))


@needs_fork
def test_killed_in_a_save_and_resumed(tmp_path):
    """SIGKILL leaves half a file behind, which does no harm and is taken away."""
    folder = tmp_path / "run"
    with on_call(os, "fsync", 8, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        process = multiprocessing.get_context("fork").Process(target=start, args=("soft", "--out", folder))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(file.suffix == ".tmp" for file in folder.iterdir())
    assert "resuming after epoch 1\n" in ok(start("soft", "--out", folder, "--resume")).out
    assert_same_run(folder, finished("soft"))
    assert contents(folder).keys() == contents(finished("soft")).keys()


class Full(io.StringIO):
    """A terminal that has gone away, or a full disk behind `> log.txt`."""
    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stdout", [Full(), None], ids=["full", "closed"])      # Python's stdout is None after `>&-`
def test_where_nothing_can_be_printed_training_goes_on(tmp_path, stdout):
    ok(start("soft", "--out", tmp_path / "run", stdout=stdout))
    assert_same_run(tmp_path / "run", finished("soft"))


def test_resume_without_a_run_begins_one_and_after_the_end_says_so(tmp_path):
    ok(start("soft", "--out", tmp_path / "new", "--resume"))
    assert_same_run(tmp_path / "new", finished("soft"))
    assert f"{tmp_path / 'new'} is already finished" in ok(start("soft", "--out", tmp_path / "new", "--resume")).out
    assert_same_run(tmp_path / "new", finished("soft"))


def test_epochs_may_grow(tmp_path):
    """A finished run goes on; stopped while it does, it is unfinished, and can be resumed again."""
    folder = shutil.copytree(finished("soft", "--epochs", 1), tmp_path / "run")
    flags = "--out", folder, "--resume"
    with on_call(PromptedGPT, "label_logits", 3, interrupt):
        assert start("soft", *flags, "--epochs", 2).status == 130
    assert "nothing was written" in ok(run(evaluate, folder)).out
    assert "tested: epoch" in ok(start("soft", *flags, "--epochs", 2)).out
    assert len(log_of(folder)) == 3 and log_of(folder)[:2] == log_of(finished("soft", "--epochs", 1))
    failed(start("soft", *flags, "--epochs", 1), 2, "--epochs 2 (now 1)")


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name, content", [
    ("last.pt", "code"), ("last.pt", "half"), ("last.pt", "missing"), ("best.pt", "code"), ("best.pt", "half")])
def test_broken_checkpoints_of_a_run(tmp_path, monkeypatch, name, content):
    """They are refused in a sentence that names them, nothing else is lost, and no code in them runs."""
    folder = shutil.copytree(finished("soft"), tmp_path / "run")
    half = (folder / name).read_bytes()[:-1000]
    (folder / name).unlink()
    if content != "missing":
        (folder / name).write_bytes(half if content == "half" else pickle.dumps(Code(), protocol=2))
    before = contents(folder)
    monkeypatch.chdir(tmp_path)
    ended = start("soft", "--out", folder, "--resume", "--epochs", 3) if name == "last.pt" else run(evaluate, folder)
    failed(ended, 1, folder / name)
    assert contents(folder) == before and not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------- a run's folder

def test_of_two_jobs_that_want_one_folder_the_second_is_refused(tmp_path):
    """Though both looked before either was there; with the difference in settings. The first is not disturbed."""
    flags = "soft", "--epochs", 0, "--out", tmp_path / "run"
    with on_call(train, "load_splits", 1, lambda: ok(start(*flags, "--lr", 0.25))):
        failed(start(*flags, "--lr", 0.5), 1, tmp_path / "run", "--lr 0.25 (now 0.5)", "--resume", "--overwrite")
    assert results_of(tmp_path / "run")["lr"] == 0.25

    def claim(lr):
        try:
            train.claim_folder(tmp_path / "many", {"method": "soft", "epochs": 1, "trials": 1, "lr": lr}, False, False)
        except (OSError, ValueError):
            return None
        return lr

    with ThreadPoolExecutor(8) as pool:
        winner, = [lr for lr in pool.map(claim, range(16)) if lr is not None]
    assert json.loads((tmp_path / "many/config.json").read_text())["lr"] == winner


def test_a_sweep_makes_folders_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = [(), ("--lr", 0.25), ("--lr", 0.5, "--turns", 4), ("--trials", 2), ("--lr", 5e-4)]
    end = [start("soft", *flags, "--epochs", 0) for flags in sweep]
    assert [ended.status for ended in end] == [0, 0, 0, 0, 1]           # the last one's rate is the default
    common, *others = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    assert common.startswith("data-gpt-soft-1.0-s0-") and len(others) == 3
    for words in ["-lr0.25"], ["-lr0.5", "-turns4"], ["-trials2"]:
        assert sum(all(word in name for word in words) for name in others) == 1
    assert not any("None" in name for name in others)


def test_a_folder_with_a_run_is_left_alone(tmp_path):
    folder = shutil.copytree(finished("soft"), tmp_path / "run")
    before = contents(folder)
    ended = start("soft", "--out", folder, "--resume", "--seed", 3, "--lr", 0.5)
    failed(ended, 2, "--seed 0 (now 3)", "--lr 0.0005 (now 0.5)")
    assert "--batch-size" not in ended.err
    failed(start("soft", "--out", folder), 1, folder, "--resume", "--overwrite")
    assert "--dialogues" not in failed(start("soft", "--out", folder, "--turns", 2), 1, "--turns 1 (now 2)").err
    assert contents(folder) == before
    (folder / "config.json").unlink()
    for flags in (), ("--resume",), ("--overwrite",):
        failed(start("soft", "--out", folder, *flags), 1, "config.json")
    assert contents(folder).keys() == before.keys() - {Path("config.json")}


def test_overwrite_spares_what_is_no_run(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "gpt")
    before = contents(folder)
    failed(start("soft", "--out", folder, "--overwrite"), 1, folder / "config.json")
    assert contents(folder) == before
    folder = shutil.copytree(finished("finetune"), tmp_path / "run")
    for i, notes in enumerate((tmp_path / "none/trial-01/notes.txt", folder / "trial-01/notes.txt")):
        notes.parent.mkdir(parents=True)
        shutil.copytree(finished("soft", "--epochs", 0), notes.parent / "of its own")
        shutil.copy(finished("soft") / "config.json", notes.parent)     # another run, of that name
        notes.write_text("mine")
        before = contents(notes.parent)
        ok(start("soft", "--out", notes.parent.parent, "--overwrite"))
        assert contents(notes.parent) == before
        assert_same_run(notes.parent.parent, finished("soft"))              # nothing is left of the run before


def nan_loss_at(step):
    """Let the loss of a training step, counted over all trials, be NaN."""
    forward, steps = PromptedGPT.forward, itertools.count(1)

    def poisoned(self, examples, *swapped):
        return forward(self, examples, *swapped) * (math.nan if self.training and next(steps) == step else 1)
    return mock.patch.object(PromptedGPT, "forward", poisoned)


def test_trials(tmp_path):
    """One fails and the search goes on; the best is tested. Interrupted, none is tried again. Epochs cannot grow."""
    folder, flags = tmp_path / "run", ("--trials", 3, "--epochs", 1, "--out", tmp_path / "run")
    with nan_loss_at(7), scores((9, 0.1), (8, 0.2), (9, 0.1), KeyboardInterrupt()):
        assert start("soft", *flags).status == 130
    before = contents(folder / "trial-01")
    with scores((9, 0.1), (9, 0.3)):
        out = ok(start("soft", *flags, "--resume")).out
    assert "trial 1/3, lr" not in out and "trial 3/3, lr" in out and contents(folder / "trial-01") == before
    trials = [json.loads((folder / f"trial-0{i}/trial.json").read_text()) for i in (1, 2, 3)]
    assert out.count("| failed |") == 1 and "step 2 " in trials[1]["failed"]
    assert [t.get("val_bleu4") for t in trials] == [0.2, None, 0.3]
    assert len({t["lr"] for t in trials}) == 3 and all(3e-6 <= t["lr"] <= 9e-3 for t in trials)
    found, best = results_of(folder), checkpoint_of(folder / "trial-03")["trained"]
    assert (found["lr"], found["val_bleu4"], found["epoch"]) == (trials[2]["lr"], 0.3, 1)
    assert all(torch.equal(t, best[name]) for name, t in checkpoint_of(folder)["trained"].items())
    assert [len(log_of(folder / f"trial-0{i}")) for i in (1, 2, 3)] == [2, 1, 2]
    before = contents(folder)
    failed(start("soft", *flags, "--resume", "--epochs", 6), 2, "--epochs 1 (now 6)")
    assert contents(folder) == before
    ok(start("soft", "--epochs", 0, "--out", folder, "--overwrite"))
    assert not list(folder.glob("trial-*"))


# ------------------------------------------------------------------------------------------------- what can go wrong

def test_a_nan_loss_stops_the_run(tmp_path):
    """The step is named, and nothing of the epoch is saved."""
    folder = tmp_path / "run"
    with nan_loss_at(8):
        failed(start("soft", "--out", folder), 1, "nan", "step 3", "nothing of this epoch is saved")
    assert [checkpoint_of(folder, name)["epoch"] for name in ("best.pt", "last.pt")] == [1, 1]
    assert len(log_of(folder)) == 2 and not (folder / "results.json").exists()


def test_a_full_disk(tmp_path):
    """One sentence, and the last good checkpoint is there to resume from."""
    resource, folder = pytest.importorskip("resource"), tmp_path / "run"
    with on_call(Run, "respond", 3, interrupt):
        start("soft", "--out", folder)
    before, (soft, hard) = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))       # no file may grow beyond that
    try:
        failed(start("soft", "--out", folder, "--resume"), 1, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before
    ok(start("soft", "--out", folder, "--resume"))
    assert_same_run(folder, finished("soft"))


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    failed(start("soft", "--out", tmp_path / place), 1, tmp_path / "file")
    assert contents(tmp_path) == {Path("file"): b"mine"}


@pytest.mark.parametrize("flags, word", [
    ("soft --epochs -1", "--epochs"), ("soft --fraction nan", "--fraction"), ("soft --turns zwei", "--turns"),
    ("soft --trials 2 --lr 1", "--trials"), ("soft --resume --overwrite", "--over"), ("hard", "hard"),
    ("dynamic --prompt-length 5", "--prompt-length"), ("soft --controller-layers 2", "--controller-layers"),
    ("soft --dropout 0", "--dropout"), ("dialogprompt --controller-init gpt", "--controller-init"),
    ("soft --device cuda:99", "cuda:99"), ("finetune --max-query 89", "are 129,"), ("soft --max-query 45", "are 130,"),
    ("prefix --max-query 20 --max-response 99", "are 129,"), ("dialogprompt --prompt-length 73", "are 129,"),
    ("finetune --max-new-tokens 113", "are 129,")])
def test_usage_errors(tmp_path, flags, word):
    """Among them: what a method has no use for; prompt, query and response could need more than the 128 positions."""
    failed(start(*flags.split(), "--out", tmp_path / "run"), 2, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file, content, word", [
    ("data", "nowhere", "nowhere"), ("data/test.txt", None, "test.txt"),
    ("data/validation.txt", b"Hello? Anybody?\n", "validation.txt has no __eou__"),
    ("data/validation.txt", b"__eou__ Hello? __eou__ Hi!\n", "no pair is left in validation"),     # nobody answers
    ("data/train.txt", b"Hi. __eou__ Hi!\nCaf\xe9. __eou__ Yes.\n", "train.txt"),
    ("gpt", "gpt5", "gpt5"), ("gpt/config.json", b"[]", "config.json"),
    ("gpt/model.safetensors", b"\0" * 100, "model.safetensors"), ("gpt/model.safetensors", None, "has no weights"),
    ("gpt/vocab.json", None, "vocab.json"), ("gpt/merges.txt", b"\xff", "merges.txt")])
def test_bad_data_and_checkpoints(tmp_path, file, content, word):
    folder = shutil.copytree(MODEL.parent, tmp_path / "bad")
    names = {"gpt": folder / "gpt", "data": folder / "data"}
    if isinstance(content, str):
        names[file] = content
    else:
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    failed(start("soft", "--model", names["gpt"], "--data", names["data"], "--out", tmp_path / "run"), 1, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base, forward, word", [
    (PromptEncoder, lambda self, queries, mask: queries.mean(dim=1, keepdim=True), "padding"),
    (PromptEncoder, lambda self, queries, mask: queries[:, :1] - queries[:, :1].mean(dim=0), "neighbours"),
    (DialogPrompt, lambda self, hidden, mask: DialogPrompt.forward(self, hidden, torch.ones_like(mask)), "mask"),
    (PromptEncoder, lambda self, queries, mask: queries[:, :2], "prompt_length"),
    (PromptEncoder, lambda self, queries, mask: queries.cumsum(dim=0)[:, :1], "neighbours"),
    (DialogPrompt, lambda self, hidden, mask: [(keys[:, :, :9], values[:, :, :9]) for keys, values in
                                               DialogPrompt.forward(self, hidden, mask)], "prompt_length")])
def test_a_method_that_breaks_the_rule_is_named_before_it_is_trained(tmp_path, monkeypatch, base, forward, word):
    """Its prompt depends on padding or neighbours, or its length is not as promised. (METHODS were trained above.)"""
    length = lambda self, m: 0 if self.writes_past else 1                       # noqa: E731
    monkeypatch.setitem(METHODS, "mine", type("Mine", (base,), {"forward": forward, "prompt_length": length}))
    failed(start("mine", "--train-embeddings", "--out", tmp_path / "run"), 1, "--method mine", "Mine.forward", word)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------- 16 bits, torch.compile, several processes, and a GPU

def test_16_bits_resume(tmp_path):
    """The scaler's state, too, is where it was."""
    flags = "--dtype", "float16", "--out"
    ok(start("dynamic", *flags, tmp_path / "whole"))
    with on_call(PromptedGPT, "label_logits", 9, interrupt):
        start("dynamic", *flags, tmp_path / "run")
    ok(start("dynamic", *flags, tmp_path / "run", "--resume"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    resumed, whole = (checkpoint_of(tmp_path / name, "last.pt")["scaler"] for name in ("run", "whole"))
    assert resumed == whole != {}                       # it counts the steps since the last overflow


def test_compile_is_refused_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    failed(start("soft", "--compile", "--out", tmp_path / "run"), 2, "--compile", "compiler")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler to be accepted")
def test_compile(tmp_path):
    """Its graphs, without the compiler's minutes: losses are those of the blocks as written, no batch is compiled anew,
    and a run that was interrupted ends as if it had not been."""
    torch.compiler.reset()
    compile_, graphs, flags = torch.nn.Module.compile, [], ("--compile", "--out")

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with mock.patch.object(torch.nn.Module, "compile", functools.partialmethod(compile_, backend=backend)):
        ok(start("dynamic", *flags, tmp_path / "whole"))
        assert 0 < len(graphs) <= 2                     # for all sizes of batches
        with on_call(PromptedGPT, "label_logits", 9, interrupt):
            start("dynamic", *flags, tmp_path / "run")
        ok(start("dynamic", *flags, tmp_path / "run", "--resume"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    folders = tmp_path / "whole", finished("dynamic")
    compiled, eager = ([line["val_loss"] for line in log_of(folder)] for folder in folders)
    assert compiled == pytest.approx(eager, rel=1e-5)


@needs_fork
def test_torchrun(tmp_path):
    """Of a batch of 3, one process has 2 rows and the other 1 or, at the end, none."""
    flags = "--batch-size", 3, "--epochs", 1
    agent = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d",
                         rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.05, start_method="fork")
    ended = elastic_launch(agent, start)("dynamic", *flags, "--out", tmp_path / "run")
    assert "tested: epoch 1" in ok(ended[0]).out and {ok(other).out for rank, other in ended.items() if rank} == {""}
    (before, several), (untrained, one) = log_of(tmp_path / "run"), log_of(finished("dynamic", *flags))
    assert before["val_loss"] == untrained["val_loss"] and results_of(tmp_path / "run")["test"]["n"] == 11
    for key in ("train_loss", "val_loss"):
        assert several[key] == pytest.approx(one[key], rel=1e-4)


@pytest.fixture
def fake_cuda(monkeypatch):
    if not (SHARED / "tools/fake_cuda.py").exists():
        pytest.skip("needs ../shared/tools/fake_cuda.py")
    monkeypatch.syspath_prepend(SHARED / "tools")
    from fake_cuda import FakeCuda
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    yield functools.partial(FakeCuda, root=str(ROOT))
    for setting, allowed in zip(settings, before):
        setting.allow_tf32 = allowed
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float16"), ((9, 0), "bfloat16")], ids=str)
def test_a_run_on_a_gpu_goes_on_from_a_cpu(fake_cuda, tmp_path, capability, dtype):
    """Begun in float32, with no scaler; --device auto and --dtype auto are the GPU, and what it is fast in."""
    flags = "--dtype", "auto", "--fraction", 0.4, "--epochs", 1, "--max-new-tokens", 5, "--out", tmp_path / "run"
    with on_call(PromptedGPT, "label_logits", 3, interrupt):
        assert start("dynamic", *flags, "--device", "cpu").status == 130
    with fake_cuda(capability=capability) as fake:
        out = ok(start("dynamic", *flags, "--resume")).out
        answer = load_run(tmp_path / "run").reply("Hello.")
    assert f"cuda:0, {dtype} (" in out and "resuming after epoch 0" in out and "tested: epoch 1" in out and answer
    assert fake.mismatches == [] and len(log_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("method, dtype", [
    ("soft", torch.float32), ("dynamic", torch.float16), ("prefix", torch.bfloat16)], ids=str)
def test_nothing_waits_for_the_gpu(fake_cuda, method, dtype):
    """In an epoch of training, the reading of its losses at the end alone; in answering, one reading a token."""
    config = json.loads((finished(method) / "config.json").read_text())
    with fake_cuda() as fake:
        some_run = Run(config, torch.device("cuda:0"), dtype)
        examples = evaluate.load_splits(config, some_run.tokenizer).examples["train"]
        optimizer, rates = torch.optim.AdamW(some_run.model.trained().values(), fused=True), [1e-3] * 3
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        batches = group_by_length(list(map(some_run.row_length, examples)), 4, seed=0)[:3]
        with fake.section("epoch"):
            loss = train.train_epoch(some_run.model, examples, batches, rates, optimizer, scaler, lambda *_: None)
        with fake.section("answers"):
            answers = some_run.model.generate([query for query, _ in examples[:4]], max_new_tokens=6, eot=-1)
    assert math.isfinite(loss) and [len(answer) for answer in answers] == [6] * 4
    for section, waits in ("epoch", 1), ("answers", 6):
        counts = fake.count("sync", section), fake.count("h2d pageable", section)
        assert counts == (waits, 0), fake.report(section)
