"""What only a GPU can show, as Markdown tables: that training and answering there is right, and how fast it is. Run by
hand, on a machine with CUDA; it needs no network:

    python tests/gpu.py                             # all methods, a quarter of an hour or more
    python tests/gpu.py --methods soft prefix

The first table is about tiny-gpt2 and the embedded dialogues:

    loss, gradients     of a batch in float32, relative to the CPU's: at most 1e-3 may lie between
    answers             how many greedy ones equal the CPU's, token for token, in float32
    50 steps in ...     on one batch in a type, float16 with a GradScaler: the loss before and after
    resume              train.py is killed when its first epoch is saved, and resumed: the last validation loss,
                        relative to that of a run that nothing disturbed
    compile             the same with --compile, relative to the run without it

The second is bench.py's race at GPT-2 small's shape, with the peak of the GPU's memory.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import Work, choose_dtypes, describe, make_checkpoint, race, runner
from conftest import ROOT
from data import checkpoint_folder, encode_pairs, load_tokenizer, make_pairs, read_dialogues
from evaluate import choose_device
from model import GPT
from prompt_encoder import METHODS, PromptedGPT
from theirs import THEIRS

TINY = checkpoint_folder("tiny-gpt2")


def tiny_examples(n):
    """n pairs of the embedded dialogues, in token ids."""
    return encode_pairs(make_pairs(read_dialogues("sample")["train"])[:n], load_tokenizer(TINY))


def load(method, device):
    """The same model on any device: its prompt encoder is drawn on the CPU."""
    torch.manual_seed(0)
    return PromptedGPT(GPT.from_pretrained(TINY), method).to(device)


def loss_and_gradients(method, examples, device):
    model = load(method, device)
    loss = model(examples).mean()
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.trained().items()}


def compare(method, device, examples):
    """-> how far the device's loss and gradients are from the CPU's, relatively, and how many answers are equal."""
    choose_device(device, "float32")                            # without TF32
    (loss, gradients), (expected, their) = (loss_and_gradients(method, examples, where) for where in (device, "cpu"))
    worst = max((gradients[name] - g).norm().item() / g.norm().item() for name, g in their.items())
    queries = [query for query, _ in examples]
    answers, expected_answers = (load(method, where).generate(queries) for where in (device, "cpu"))
    return abs(loss / expected - 1), worst, sum(map(list.__eq__, answers, expected_answers))


def fifty_steps(method, device, dtype, examples):
    """Train on one batch, as bench.py does -> the first and the last loss."""
    torch.manual_seed(0)
    losses = runner("ours", method, TINY, device, dtype)([examples] * 50)
    return losses[0].item(), losses[-1].item()


def train(method, folder, *flags, kill=False):
    """Run train.py on the GPU for two epochs, or kill it when the first is saved -> the log's validation losses."""
    log = Path(folder) / "log.jsonl"

    def losses():
        return [json.loads(line)["val_loss"] for line in log.read_text().splitlines()] if log.exists() else []

    command = [sys.executable, ROOT / "train.py", "--method", method, "--epochs", "2", "--device", "cuda",
               "--out", folder, *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (kill and len(losses()) == 2):   # of epoch 0, the untrained model, and epoch 1
        time.sleep(0.01)
    process.kill()
    if process.wait() and not kill:
        sys.exit(f"train.py --method {method} {' '.join(flags)} ended with status {process.returncode}")
    return losses()


def resume_and_compile(method):
    """-> how far a resumed run, and a compiled one, end from an undisturbed one, relatively."""
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = train(method, f"{folder}/whole"), train(method, f"{folder}/cut", kill=True)
        assert len(cut) == 2, f"{method}: the kill came after {len(cut)} lines of the log, expected 2"
        resumed, compiled = train(method, f"{folder}/cut", "--resume"), train(method, f"{folder}/compiled", "--compile")
    return [abs(losses[-1] / whole[-1] - 1) for losses in (resumed, compiled)]


def check(method, device, examples):
    """-> the cells of a row of the first table, but for the runs of train.py, and whether all is well."""
    loss, gradients, equal = compare(method, device, examples)
    runs = [fifty_steps(method, device, dtype, examples) for dtype in ("float32", "bfloat16", "float16")]
    right = loss < 1e-3 and gradients < 1e-3 and equal == len(examples) and all(last < first for first, last in runs)
    cells = [f"{loss:.0e}", f"{gradients:.0e}", f"{equal} of {len(examples)}"]
    return cells + [f"{first:.3f} → {last:.3f}" for first, last in runs], right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=f"some of: {', '.join(METHODS)}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch finds no GPU here, so there is nothing to check.")
        return
    wrong, examples = [], tiny_examples(16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n"
          "| Method | loss | gradients | answers | 50 steps, float32 | bfloat16 | float16 | resume | compile |\n"
          "|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for method in args.methods:
        cells, right = check(method, "cuda", examples)
        runs = resume_and_compile(method)
        wrong += [] if right and max(runs) < 1e-2 else [method]
        print(f"| {method} | {' | '.join([*cells, *(f'{difference:.0e}' for difference in runs)])} |", flush=True)
    print(f"\n{'Wrong: ' + ', '.join(wrong) if wrong else 'All is as on the CPU.'}\n")

    dtypes = choose_dtypes("cuda")
    print(f"{describe('cuda', dtypes)}; pairs/s (GB)\n\n| Train | batch | ours | theirs, as written | theirs at best | "
          "ours / as written | ours / at best |\n|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        for method in (method for method in args.methods if method in THEIRS):
            for size in (8, 64):
                result = list(race(Work(method, size, 4, folder, "cuda"), dtypes, rounds=3).values())
                cells = [f"{speed:,.0f} ({memory:.2f})" for speed, memory in result]
                cells += [f"{result[0][0] / speed:.2f}" for speed, _ in result[1:]]
                print(f"| {method} | {size} | {' | '.join(cells)} |", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
