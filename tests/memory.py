"""Peak memory of a training step, by size of GPT-2 and method: ours against transformers', as a table. Run by hand:

    python tests/memory.py                                              # minutes
    python tests/memory.py --sizes small medium --methods soft prefix
    python tests/memory.py --dtype bfloat16 --tokens 8                  # few tokens, where bfloat16 products are slow

Each number is of a process of its own. It loads a GPT-2 with random weights, saved in float16, and trains on one pair.
Ours holds frozen matrices in --dtype; theirs holds all in float32 and casts. What would not fit is not tried.
"""
import argparse
import os
import tempfile

import torch

from bench import describe, gigabytes, load_examples, make_checkpoint, own_process, runner

SIZES = {"small": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}     # L, H, C


def make_half(folder, shape):
    torch.set_default_dtype(torch.float16)
    make_checkpoint(folder, **shape)


def train(side, method, folder, device, dtype, tokens):
    """One step on one pair, cut to a number of tokens -> the peak in GB."""
    query, response = load_examples()[0]
    runner(side, method, folder, device, dtype)([[(query[-tokens // 2:], response[:tokens // 2])]])
    return gigabytes(device)


def fresh(function, *arguments):
    """Call a function in a process of its own."""
    with own_process() as process:
        return process.submit(function, *arguments).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=("soft", "dynamic", "prefix", "finetune"),
                        default=["soft", "dynamic", "prefix", "finetune"])
    parser.add_argument("--tokens", type=int, default=32, help="in query and response together (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of matrix products (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    args = parser.parse_args()
    memory = (torch.cuda.get_device_properties(0).total_memory if args.device == "cuda"
              else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    sides = ("ours", "at best")
    print(f"{describe(args.device, dict.fromkeys(sides, args.dtype))}; {memory / 1e9:.1f} GB of memory; "
          f"at most {args.tokens} tokens; GB, ours / theirs\n\n"
          f"| GPT-2 | parameters | {' | '.join(args.methods)} |\n|---|---:|{'---:|' * len(args.methods)}")
    for size in args.sizes:
        L, H, C = SIZES[size]
        parameters = 12 * L * C * C + (50257 + 1024) * C                # biases and norms left out
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            fresh(make_half, folder, {"n_layer": L, "n_head": H, "n_embd": C})
            for method in args.methods:
                # In float32: the weights, for those that are trained also a gradient and AdamW's two averages, and a margin.
                fits = parameters * (16 if method == "finetune" else 4) * 1.1 < memory
                peaks = [fresh(train, side, method, folder, args.device, args.dtype, args.tokens)
                         for side in sides if fits]
                cells.append(" / ".join(f"{peak:.2f}" for peak in peaks) or "does not fit")
        print(f"| {size} | {parameters / 1e6:,.0f}M | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
