"""The solutions of README's exercises, tests/exercises: each is applied to a copy of the code, and does as promised."""
import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from model import GPT
from prompt_encoder import PromptedGPT
from runs import MODEL, SMALL, lines_of, results_of

DYNAMIC = ["--method", "dynamic", *SMALL, "--epochs", 1, "--max-new-tokens", 8, "--out", "run"]
C, L, K = 32, 2, 10         # the small model's width and layers, and exercise 4's default_length
TRAIN = """import doctest, prompt_encoder, train
assert doctest.testmod(prompt_encoder).failed == 0
train.run_command(train.main)"""


@pytest.fixture
def solve(tmp_path):
    """Apply these exercises' diffs to a copy of the code -> a function that runs Python there, with one thread."""
    def apply(*numbers):
        for name in ("model.py", "prompt_encoder.py", "data.py", "evaluate.py", "train.py"):
            shutil.copy(ROOT / name, tmp_path)
        shutil.copytree(ROOT / "tiny/dialogues", tmp_path / "tiny/dialogues")
        for number in numbers:
            (diff,) = (ROOT / "tests/exercises").glob(f"{number}-*.diff")
            program = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-i"]
            subprocess.run([*program, diff], cwd=tmp_path, check=True)
        return lambda *arguments: subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=tmp_path, capture_output=True, encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    return apply


@pytest.mark.parametrize("number, code", [
    (1, """from evaluate import all_metrics, baselines
assert all_metrics(["Why?", "No."], ["a", "b"], [])["questions"] == 0.5 and all_metrics([], [], [])["questions"] is None
assert [round(b["test"]["questions"], 3) for b in baselines("sample").values()] == [0.911, 0.244]"""),
    (2, """import doctest, torch, prompt_encoder
from model import GPT, GPTConfig
assert doctest.testmod(prompt_encoder).failed == 0
examples = [([5, 6], [7, 8]), ([9], [4])]
for method in prompt_encoder.METHODS:
    model = prompt_encoder.PromptedGPT(GPT(GPTConfig(10, 64, 8, 1, 1)), method).eval()
    batch, word = model.batch(examples), lambda ids: model.gpt.wte(torch.tensor(ids))
    (x, past), prompt = model.embed(batch), model.prompt(batch)
    for b, (query, response) in enumerate(examples):
        k = model.encoder.prompt_length(len(query))
        parts = [word(query)] + ([] if past else [prompt[b, :k]]) + [word(response)]
        assert torch.equal(x[b, :batch.lengths[b]], torch.cat(parts)), method
assert prompt_encoder.make_batch(examples, lambda m: m).label_positions.tolist() == [3, 4, 7]"""),
    (6, """from evaluate import baselines
scores = baselines("sample")["lookup"]
assert [round(scores[part]["bleu4"], 3) for part in ("test", "test_unseen")] == [0.015, 0.008]""")])
def test_a_few_lines_show_it(solve, number, code):
    done = solve(number)("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("numbers, more", [([3], 0), ([4], K * (C + 1)), ([4, 5], K * (C + 1) + (C + 1) * 2 * L * C)])
def test_another_controller_trains(solve, tmp_path, numbers, more):
    """It keeps the padding rule, learns, depends on the query, and has as many parameters more as README says."""
    done = solve(*numbers)("-c", TRAIN, *DYNAMIC)
    assert (done.returncode, done.stderr) == (0, "")
    before, after = (line["val_loss"] for line in lines_of(tmp_path / "run/log.jsonl"))
    assert after < before and results_of(tmp_path / "run")["swap"] != 0
    ours = PromptedGPT(GPT.from_pretrained(MODEL), "dynamic", max_query=16).trained().values()
    assert f"training {sum(p.numel() for p in ours) + more:,} of " in done.stdout


def test_the_broken_padding_rule_is_seen(solve, tmp_path):
    """By train.py, which refuses it, and by the neighbours test; without that check, a table shows nothing."""
    python = solve(7)
    done = python("-c", TRAIN, *DYNAMIC)
    assert done.returncode == 1 and done.stderr.startswith("error: --method dynamic: what DynamicPrompt.forward writes")
    assert "depends on the padding behind it" in done.stderr and not (tmp_path / "run").exists()
    done = python("-c", "import train; train.check_padding = lambda *_: None; train.run_command(train.main)", *DYNAMIC)
    assert (done.returncode, done.stderr) == (0, "") and "| test (" in done.stdout
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "test_prompts.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    done = python("-m", "pytest", "-q", "-k", "neighbours and (dynamic or soft)", "tests")
    assert "neighbours_nor_the_cache_matter[dynamic]" in done.stdout and "1 failed, 1 passed" in done.stdout
