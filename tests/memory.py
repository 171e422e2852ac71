"""Peak memory of a training step, by size of GPT-2 and method: ours against transformers', as a table. Run by hand:

    python tests/memory.py                                              # minutes
    python tests/memory.py --sizes small medium --methods soft prefix --dtype bfloat16

Each number is of a process of its own. It loads a GPT-2 with random weights, saved in float16, and trains on one pair
of 32 tokens at most. Ours holds frozen matrices in --dtype; theirs holds all in float32 and casts. What would not fit
is not tried.
"""
import os
import tempfile

import torch

from bench import (
    describe, gigabytes, load_examples, make_checkpoint, own_process, parser, print_header, print_row, runner)

SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}     # L, H, C
METHODS = ("soft", "dynamic", "prefix", "finetune")
SIDES = ("ours", "at best")


def train(side, method, folder, dtype):
    """One step on one pair -> the peak in GB."""
    query, response = load_examples()[0]
    runner(side, method, folder, "cpu", dtype)([(query[-16:], response[:16])], [[0]])
    return gigabytes("cpu")


def fresh(function, *args, **options):
    """Call a function in a process of its own."""
    with own_process() as process:
        return process.submit(function, *args, **options).result()


def main():
    flags = parser(__doc__)
    flags.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    args = flags.parse_args()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"{describe('cpu', dict.fromkeys(SIDES, args.dtype))}; {memory / 1e9:.1f} GB of memory; GB, ours / theirs")
    print_header(["GPT-2", "parameters", *args.methods])
    for size in args.sizes:
        L, H, C = SIZES[size]
        parameters = 12 * L * C * C + (50257 + 1024) * C                # biases and norms left out
        cells = [size, f"{parameters / 1e6:,.0f}M"]
        with tempfile.TemporaryDirectory() as folder:
            fresh(make_checkpoint, folder, torch.float16, n_layer=L, n_head=H, n_embd=C)
            for method in args.methods:
                # The weights in float32; of those that are trained also a gradient and two averages; a margin.
                if parameters * (16 if method == "finetune" else 4) * 1.1 >= memory:
                    cells.append("does not fit")
                    continue
                peaks = [fresh(train, side, method, folder, args.dtype) for side in SIDES]
                cells.append(" / ".join(f"{peak:.2f}" for peak in peaks))
        print_row(cells)


if __name__ == "__main__":
    main()
