"""Ours against transformers and peft on the same work, side by side in one run, as a Markdown table. Run by hand:

    python tests/bench.py                               # all rows; in float32 half an hour or more on two cores
    python tests/bench.py --only soft generate-16       # some rows
    python tests/bench.py --device cuda                 # both sides on a GPU
    python tests/bench.py --quick                       # a smoke run: two layers, one batch, numbers mean nothing

The work: GPT-2 small's shape with random weights, dropout 0, real pairs with queries and responses of up to 128 tokens.
They are DailyDialog's first 8,000 where it and GPT-2's vocabulary lie in ../shared, else the embedded dialogues'.
Training takes 8 pairs a step and clips gradients at norm 1. Answers are greedy, and take as many steps as their
references have tokens.

    ours        as train.py and evaluate.py do it: their choice of type, batches of similar length, fused AdamW
    as written  transformers as its users write it: float32, shuffled batches, labels=, torch.optim.AdamW as it comes
    at best     the same code with our batches, and with autocast to bfloat16 where a short test finds that faster

First both sides must compute the same loss (within 1e-3) or the same tokens, in float32 on the CPU. Then the sides take
turns, each in a process of its own. Every round draws new batches, one from each stretch of the epoch's batches in the
order of length, so that few stand for all, and the median over the rounds counts. A first round warms up. It ends with
the epoch's longest batch, so that the row `memory`, the most that a process held while it trained `soft`, is true of
the whole epoch.
"""
import argparse
import functools
import multiprocessing
import platform
import random
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn

from conftest import SHARED
import model
from data import checkpoint_folder, encode_pairs, group_by_length, load_tokenizer, make_pairs, read_dialogues
from evaluate import choose_device
from prompt_encoder import PromptedGPT
from theirs import LIMIT, THEIRS

ROWS = {"soft": ("soft", 8), "dynamic": ("dynamic", 8), "finetune": ("finetune", 8), "prefix": ("prefix", 8),
        "dialogprompt": ("dialogprompt", 8), "generate-16": ("generate", 16), "generate-64": ("generate", 64),
        "memory": ("soft", 8)}                                                          # task, pairs in a batch


@functools.cache
def load_examples():
    """-> [(query ids, response ids), ...]: DailyDialog's training pairs in GPT-2's tokens, or the embedded ones."""
    data, vocabulary = SHARED / "dailydialog", SHARED / "gpt2-bpe"
    if not (data.is_dir() and vocabulary.is_dir()):
        data, vocabulary = "sample", checkpoint_folder("tiny-gpt2")
    return encode_pairs(make_pairs(read_dialogues(data)["train"])[:8000], load_tokenizer(vocabulary), LIMIT, LIMIT)


# ---------------------------------------------------------------------------------------------------------------- ours

def load_ours(folder, method, dtype):
    return PromptedGPT(model.GPT.from_pretrained(folder), method, max_query=LIMIT, dtype=dtype)


class EndAtReference:
    """Stands in for model.sample_next_token: greedy, but a row's last token is -1, the end, as its reference ends."""

    def __init__(self, lengths):
        self.left = lengths                             # tokens to come, of the rows that are still in the batch

    def __call__(self, logits, temperature, top_p):
        tokens = logits.argmax(dim=-1)
        self.left = [n - 1 for n in self.left]
        if 0 in self.left:
            tokens[[i for i, n in enumerate(self.left) if n == 0]] = -1
            self.left = [n for n in self.left if n > 0]         # `generate_from` drops these rows, too
        return tokens


def our_answers(ours, examples):
    lengths = [len(response) for _, response in examples]
    with mock.patch.object(model, "sample_next_token", EndAtReference(lengths)):
        return ours.generate([query for query, _ in examples], max(lengths), eot=-1)


# -------------------------------------------------------------------------------------------- do they compute the same?

@torch.no_grad()
def copy_prompt(ours, theirs):
    """Give their prompt encoder our weights; transformers stores its matrices the other way round."""
    mine = dict(ours.encoder.named_parameters())
    for name, p in theirs.prompt.named_parameters():
        name = {"weight": "table", "embedding.weight": "table"}.get(name, name.replace("transform.", "mlp."))
        if name in mine:
            p.copy_(mine[name].t() if name.endswith(("attn.weight", "c_proj.weight", "c_fc.weight")) else mine[name])
    if "c_last.weight" in mine:                                     # DialogPrompt's last layer is keys and values alone
        C, last = mine["c_last.weight"].size(1), theirs.prompt.h[-1]
        last.ln_1.load_state_dict(ours.encoder.ln_last.state_dict())
        last.attn.c_attn.weight[:, C:] = mine["c_last.weight"].t()
        last.attn.c_attn.bias[C:] = mine["c_last.bias"]


def check(work):
    """Both sides compute the same, in float32 on the CPU."""
    examples = draw(work, "ours", seed=0, n=3)[1][:4]
    method = "finetune" if work.task == "generate" else work.task
    ours, theirs = load_ours(work.folder, method, torch.float32), THEIRS[method](work.folder, torch.float32)
    if work.task == "generate":
        found = our_answers(ours, examples), theirs.answers(examples)
        assert found[0] == found[1], f"answers: ours {found[0]}, theirs {found[1]}"
        return
    if method != "finetune":
        copy_prompt(ours, theirs)
    losses = ours(examples).mean().item(), theirs(examples).item()
    assert abs(losses[0] / losses[1] - 1) < 1e-3, f"{method}: ours {losses[0]}, theirs {losses[1]}"


# ----------------------------------------------------------------------------------------------------- what is measured

@dataclass(frozen=True)
class Work:
    task: str               # a method to train, or "generate"
    size: int               # pairs in a batch
    batches: int            # in a round
    folder: str             # the checkpoint
    device: str             # cpu or cuda


@functools.cache
def runner(side, task, folder, device, dtype):
    """-> a function that trains on batches of examples, and gives the losses; for "generate": that answers them."""
    if side != "as written":
        choose_device(device, dtype)            # it also sets how a GPU computes float32 products and attention
    method, dtype = "finetune" if task == "generate" else task, getattr(torch, dtype)
    net = load_ours(folder, method, dtype) if side == "ours" else THEIRS[method](folder, dtype)
    net.to(device)
    if task == "generate":
        answers = functools.partial(our_answers, net) if side == "ours" else net.answers
        return lambda batches: [answers(examples) for examples in batches]
    parameters = [p for p in net.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True if side == "ours" else None)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    def train(batches):
        losses = []
        for examples in batches:
            loss = net(examples).mean()                         # theirs is a mean already
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses
    return train


def draw(work, side, seed, n):
    """n batches of an epoch, one from each stretch of its batches in order of their longest row. Ours and theirs at
    best get the same ones."""
    examples = load_examples()

    def row_length(example):
        query, response = example
        if work.task == "generate":             # before it answers, nobody knows how long the answers are
            return len(query)
        return len(query) * (2 if work.task in ("soft", "dynamic") else 1) + len(response)

    batches = group_by_length(examples, work.size, row_length, seed)
    if side == "as written":
        order = [i for batch in batches for i in batch]
        random.Random(seed).shuffle(order)
        batches = [order[i:i + work.size] for i in range(0, len(order), work.size)]
    batches.sort(key=lambda batch: max(row_length(examples[i]) for i in batch))
    stretches = [batches[len(batches) * i // n:len(batches) * (i + 1) // n] for i in range(n)]
    return [[examples[i] for i in random.Random(seed + i).choice(stretch)] for i, stretch in enumerate(stretches)]


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def gigabytes(device):
    """The most that this process has held so far: of the GPU's memory, or resident in the machine's (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def measure(work, side, dtype, seed):
    """One round of one side -> pairs, or reference tokens, per second. Round 0 warms up: it adds the longest batch."""
    run = runner(side, work.task, work.folder, work.device, dtype)
    batches = draw(work, side, seed, work.batches)
    if seed == 0:
        batches += draw(work, side, seed, len(load_examples()) // work.size)[-1:]
    synchronize(work.device)
    begun = time.perf_counter()
    run(batches)
    synchronize(work.device)
    seconds, examples = time.perf_counter() - begun, [example for batch in batches for example in batch]
    return (sum(len(r) for _, r in examples) if work.task == "generate" else len(examples)) / seconds


def own_process():
    """An executor whose calls all run in one fresh process."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def race(work, dtypes, rounds):
    """The sides, named in dtypes with their types, take turns -> for each its median speed, and peak memory in GB."""
    processes = {side: own_process() for side in dtypes}
    speeds = {side: [] for side in dtypes}
    for seed in range(rounds + 1):
        for side, process in processes.items():
            speeds[side].append(process.submit(measure, work, side, dtypes[side], seed).result())
    memory = {side: process.submit(gigabytes, work.device).result() for side, process in processes.items()}
    for process in processes.values():
        process.shutdown()
    return {side: (statistics.median(speeds[side][1:] or [0]), memory[side]) for side in dtypes}


# ------------------------------------------------------------------------------------------------- where it is measured

def fastest(dtypes, device):
    """The fastest of some types in a layer of GPT-2 small's MLP, forward and backward, with autocast as theirs.

    It begins with few rows and drops what is four times slower than another type: on a processor without bfloat16, that
    is hundreds of times slower, and 256 rows would take a minute.
    """
    layer = nn.Linear(768, 3072).to(device)

    def seconds(dtype, rows):
        times, x = [], torch.randn(rows, 768, device=device, requires_grad=True)
        while len(times) < 2 or len(times) < 5 and sum(times) < 0.2:            # the first one warms up
            synchronize(device)
            begun = time.perf_counter()
            with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
                y = layer(x)
            y.sum().backward()
            synchronize(device)
            times.append(time.perf_counter() - begun)
        return min(times)

    for rows in (4, 16, 64, 256):
        best = {dtype: seconds(dtype, rows) for dtype in dtypes}
        dtypes = [dtype for dtype in dtypes if best[dtype] < 4 * min(best.values())]
    return min(best, key=best.get)


def choose_dtypes(device):
    """-> the type of each side on this device, by name."""
    ours = str(choose_device(device)[1]).removeprefix("torch.")
    return {"ours": ours, "as written": "float32", "at best": fastest({"float32": 0, "bfloat16": 0, ours: 0}, device)}


def describe(device, dtypes):
    """Where this runs, and in which types, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = [torch.cuda.get_device_name()] if device == "cuda" else []
    machine += [name[1] if name else platform.processor(), f"{torch.get_num_threads()} threads"]
    sides = ", ".join(f"{side} {dtype}" for side, dtype in dtypes.items())
    return f"{', '.join(machine)}, torch {torch.__version__}; {sides}"


def make_checkpoint(folder, **shape):
    """A GPT-2 with random weights, by transformers, dropout 0. The reference's length alone ends an answer."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.disable_progress_bar()
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    gpt.generation_config.eos_token_id = None
    gpt.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW",
                        help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--batches", type=int, default=4, help="batches in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with new batches (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two layers, one batch, one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides (default: %(default)s)")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.rounds = 1, 1
    dtypes = choose_dtypes(args.device)
    print(f"{describe(args.device, dtypes)}; {args.rounds} rounds of {args.batches} batches\n\n"
          "| Work | ours | theirs, as written | theirs at best | ours / as written | ours / at best |\n"
          "|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, n_layer=2 if args.quick else 12)
        for row in args.only:
            task, size = ROWS[row]
            batches = args.batches * (64 // size if task == "generate" else 1)  # as many queries in small batches
            work = Work(task, size, batches, folder, args.device)
            check(work)
            speeds, memory = zip(*race(work, dtypes, 0 if row == "memory" else args.rounds).values())
            ours, *theirs = values = memory if row == "memory" else speeds
            name, unit = (("peak memory, train soft", "GB") if row == "memory" else
                          (f"generate, batch {size}", "tokens/s") if task == "generate" else
                          (f"train {task}", "pairs/s"))
            print(f"| {name} | " + " | ".join(f"{v:,.{0 if v >= 100 else 2}f} {unit}" for v in values) + " | "
                  + " | ".join(f"{ours / v:.2f}" for v in theirs) + " |", flush=True)


if __name__ == "__main__":
    main()
