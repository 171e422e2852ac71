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
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench import (
    SIDES, TINY, Work, choose_dtypes, describe, load_examples, make_checkpoint, parser, print_header, print_row, race,
    ratios, runner)
from model import GPT, choose_device
from prompt_encoder import METHODS, PromptedGPT
from theirs import THEIRS


def on_device(method, examples, device):
    """-> the loss of the examples, its gradients and the greedy answers. The model is drawn on the CPU, so that it is
    the same everywhere, and in training mode, which cuDNN's LSTM asks for; there is no dropout."""
    torch.manual_seed(0)
    model = PromptedGPT(GPT.from_pretrained(TINY), method).to(device).train()
    loss = model(examples).mean()
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.trained().items()}
    return loss.item(), gradients, model.generate([query for query, _ in examples])


def check(method, device, examples):
    """-> the cells of a row of the first table, but for the runs of train.py, and whether all is well."""
    choose_device(device, "float32")                            # without TF32
    (loss, gradients, answers), expected = (on_device(method, examples, where) for where in (device, "cpu"))
    differences = [abs(loss / expected[0] - 1),
                   max(((gradients[name] - g).norm() / g.norm()).item() for name, g in expected[1].items())]
    equal = sum(map(list.__eq__, answers, expected[2]))
    cells, right = [f"{d:.0e}" for d in differences], max(differences) < 1e-3 and equal == len(examples)
    cells.append(f"{equal} of {len(examples)}")
    for dtype in ("float32", "bfloat16", "float16"):
        torch.manual_seed(0)
        losses = runner("ours", method, TINY, device, dtype)(examples, [range(len(examples))] * 50)
        cells.append(f"{losses[0]:.3f} → {losses[-1]:.3f}")
        right = right and losses[-1] < losses[0]
    return cells, right


def resume_and_compile(method):
    """-> how far a resumed run, and a compiled one, end from an undisturbed one, relatively."""
    from kill_resume import start               # here: it sets this process's threads to 1, but not those of the race

    def train(name, *flags, **kill):
        out = Path(folder, name)
        start(["--method", method, "--epochs", 2, "--device", "cuda", "--out", out, *flags], **kill)
        log = (out / "log.jsonl").read_text().splitlines()
        assert len(log) == (2 if kill else 3), f"{method}: {len(log)} lines in {name}'s log"
        return json.loads(log[-1])["val_loss"]

    with tempfile.TemporaryDirectory() as folder:
        whole = train("whole")
        train("cut", kill_after=0, until="epoch   1 ")
        return [abs(loss / whole - 1) for loss in (train("cut", "--resume"), train("compiled", "--compile"))]


def main():
    flags = parser(__doc__)
    flags.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="(default: all)")
    args = flags.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch finds no GPU here, so there is nothing to check.")
        return
    wrong, examples, dtypes = [], load_examples(tiny=True)[:16], choose_dtypes("cuda")
    print(describe("cuda", dtypes))
    print_header(["Method", "loss", "gradients", "answers", "50 steps, float32", "bfloat16", "float16", "resume",
                  "compile"])
    for method in args.methods:
        cells, right = check(method, "cuda", examples)
        runs = resume_and_compile(method)
        wrong += [] if right and max(runs) < 1e-2 else [method]
        print_row([method, *cells, *(f"{difference:.0e}" for difference in runs)])
    print(f"\n{'Wrong: ' + ', '.join(wrong) if wrong else 'All is as on the CPU.'}\n\nIn pairs/s (GB):")

    print_header(["Train", "batch", *SIDES])
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        for method in (method for method in args.methods if method in THEIRS):
            for size in (8, 64):
                speeds, memory = race(Work(method, size, 4, folder, "cuda"), dtypes, rounds=3)
                print_row([method, str(size), *map("{:,.0f} ({:.2f})".format, speeds, memory), *ratios(speeds)])
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
