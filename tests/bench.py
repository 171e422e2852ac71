"""Ours against transformers and peft on the same work, side by side in one run, as a Markdown table. Run by hand:

    python tests/bench.py               # in float32 half an hour or more on two cores
    python tests/bench.py --quick       # a smoke run: its numbers mean nothing

The work: GPT-2 small's shape with random weights, dropout 0, and real pairs. All train by train.py's `train_epoch`, 8
pairs a step. Answers are greedy, and take as many steps as their references have tokens.

    ours        as train.py and evaluate.py do it: their choice of type, batches of similar length, fused AdamW
    as written  transformers as its users write it: float32, shuffled batches, labels=, torch.optim.AdamW as it comes
    at best     the same with our batches, and in our type where a short test finds that faster than float32

First both sides must compute the same loss (within 1e-3) or the same tokens, in float32 on the CPU. Then the sides take
turns, each in a process of its own, and the median over the rounds counts. A first round warms up. It ends with the
epoch's longest batch, so that the row `memory`, the most that a process held while it trained `soft`, is true of the
whole epoch.
"""
import argparse
import functools
import multiprocessing
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
from data import checkpoint_folder, encode_pairs, load_tokenizer, make_pairs, read_dialogues
from prompt_encoder import PromptedGPT, group_by_length
from theirs import LIMIT, THEIRS
from train import train_epoch

ROWS = {"soft": ("soft", 8), "dynamic": ("dynamic", 8), "finetune": ("finetune", 8), "prefix": ("prefix", 8),
        "dialogprompt": ("dialogprompt", 8), "generate-16": ("generate", 16), "generate-64": ("generate", 64),
        "memory": ("soft", 8)}                                                          # task, pairs in a batch
SIDES = ("ours", "theirs, as written", "theirs at best", "ours / as written", "ours / at best")     # a table's columns
TINY = checkpoint_folder("tiny-gpt2")


@dataclass(frozen=True)
class Work:
    task: str               # a method to train, or "generate"
    size: int               # pairs in a batch
    batches: int            # in a round
    folder: str             # the checkpoint
    device: str             # cpu or cuda


@functools.cache
def load_examples(tiny=False):
    """-> [(query ids, response ids), ...]: DailyDialog's training pairs in GPT-2's tokens; or, if they are not there or
    tiny ones are asked for, those of the embedded dialogues in tiny-gpt2's."""
    data, vocabulary = SHARED / "dailydialog", SHARED / "gpt2-bpe"
    if tiny or not (data.is_dir() and vocabulary.is_dir()):
        data, vocabulary = "sample", TINY
    return encode_pairs(make_pairs(read_dialogues(data)["train"])[:8000], load_tokenizer(vocabulary), LIMIT, LIMIT)


def draw(work, side, seed, n):
    """-> n batches of an epoch, lists of indices, one from each stretch of its batches in order of their longest row,
    so that few stand for all. Ours and theirs at best get the same ones."""
    if work.task == "generate":                 # before it answers, nobody knows how long the answers are
        lengths = [len(query) for query, _ in load_examples()]
    else:
        times = 2 if work.task in ("soft", "dynamic") else 1            # their prompts are as long as the query
        lengths = [times * len(query) + len(response) for query, response in load_examples()]
    shuffle = random.Random(seed)
    if side == "as written":
        order = shuffle.sample(range(len(lengths)), len(lengths))
        batches = [order[i:i + work.size] for i in range(0, len(order), work.size)]
    else:
        batches = group_by_length(lengths, work.size, seed)
    batches.sort(key=lambda batch: max(lengths[i] for i in batch))
    return [shuffle.choice(batches[len(batches) * i // n:len(batches) * (i + 1) // n]) for i in range(n)]


# ------------------------------------------------------------------------------------------------------- the two sides

def load(side, method, folder, dtype):
    if side == "ours":
        return PromptedGPT(model.GPT.from_pretrained(folder), method, max_query=LIMIT, dtype=dtype)
    return THEIRS[method](folder, dtype)


def our_answers(ours, examples):
    """Greedy answers, as long as their references: a row's last token becomes -2, the end."""
    left, sample_next_token = [len(response) for _, response in examples], model.sample_next_token

    def stand_in(logits):
        left[:] = [n - 1 for n in left if n > 0]                # rows that have ended have left the batch
        ended = torch.tensor([n == 0 for n in left], device=logits.device)
        return sample_next_token(logits).masked_fill(ended, -2)

    with mock.patch.object(model, "sample_next_token", stand_in):
        return ours.generate([query for query, _ in examples], max(left), eot=-2)


@functools.cache
def runner(side, task, folder, device, dtype):
    """-> a function of examples and batches, lists of their indices. It trains, or, for "generate", answers; it returns
    each batch's loss, or answers."""
    if side != "as written":
        model.choose_device(device, dtype)      # it also sets how a GPU computes float32 products and attention
    dtype = getattr(torch, dtype)
    net = load(side, "finetune" if task == "generate" else task, folder, dtype).to(device)
    if task == "generate":
        answers = functools.partial(our_answers, net) if side == "ours" else net.answers
        return lambda examples, batches: [answers([examples[i] for i in batch]) for batch in batches]
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True if side == "ours" else None)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    return lambda examples, batches: train_epoch(
        net, examples, batches, [1e-3] * len(batches), optimizer, scaler, lambda step, loss: None)


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
    examples = [load_examples()[i] for i in draw(work, "ours", seed=0, n=3)[1][:4]]
    method = "finetune" if work.task == "generate" else work.task
    ours, theirs = (load(side, method, work.folder, torch.float32) for side in ("ours", "theirs"))
    if work.task == "generate":
        found = our_answers(ours, examples), theirs.answers(examples)
        assert found[0] == found[1], f"answers: ours {found[0]}, theirs {found[1]}"
        return
    if method != "finetune":
        copy_prompt(ours, theirs)
    losses = ours(examples).sum().item(), theirs(examples).item()
    assert abs(losses[0] / losses[1] - 1) < 1e-3, f"{method}: ours {losses[0]}, theirs {losses[1]}"


# ------------------------------------------------------------------------------------------------------------ the race

def gigabytes(device):
    """The most that this process has held so far: of the GPU's memory, or resident in the machine's (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def measure(work, side, dtype, seed):
    """One round of one side -> pairs, or reference tokens, per second. Round 0 warms up: it adds the longest batch."""
    run, examples = runner(side, work.task, work.folder, work.device, dtype), load_examples()
    batches = draw(work, side, seed, work.batches)
    if seed == 0:
        batches += draw(work, side, seed, len(examples) // work.size)[-1:]
    begun = time.perf_counter()
    run(examples, batches)              # it ends by reading numbers from the device, so all is done
    seconds, responses = time.perf_counter() - begun, [examples[i][1] for batch in batches for i in batch]
    return (sum(map(len, responses)) if work.task == "generate" else len(responses)) / seconds


def own_process():
    """An executor whose calls all run in one fresh process."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def race(work, dtypes, rounds):
    """The sides, named in dtypes with their types, take turns -> their median speeds, their peaks of memory in GB."""
    processes = {side: own_process() for side in dtypes}
    speeds = {side: [] for side in dtypes}
    for seed in range(rounds + 1):
        for side, process in processes.items():
            speeds[side].append(process.submit(measure, work, side, dtypes[side], seed).result())
    memory = [process.submit(gigabytes, work.device).result() for process in processes.values()]
    for process in processes.values():
        process.shutdown()
    return [statistics.median(found[1:] or [0]) for found in speeds.values()], memory


def choose_dtypes(device):
    """-> the type of each side on this device, by name."""
    ours = str(model.choose_device(device)[1]).removeprefix("torch.")
    layer, x = nn.Linear(768, 3072, device=device), torch.randn(512, 768, device=device)    # of GPT-2 small's MLP

    def seconds(dtype):
        times = []
        for _ in range(10):
            begun = time.perf_counter()
            with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
                y = layer(x)
            y.sum().backward()
            layer.weight.grad.sum().item()                      # wait for a GPU
            times.append(time.perf_counter() - begun)
        return min(times)
    return {"ours": ours, "as written": "float32", "at best": min(("float32", ours), key=seconds)}


# ----------------------------------------------------------------------------------------------------------- the table

def describe(device, dtypes):
    """Where this runs, and in which types, in one line."""
    processor = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]         # ARM has no such line
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    sides = ", ".join(f"{side} {dtype}" for side, dtype in dtypes.items())
    return f"{gpu}{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}; {sides}"


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_header(cells):
    print()
    print_row(cells)
    print("|---|" + "---:|" * (len(cells) - 1))


def ratios(values):
    """How the first value compares with each of the others."""
    return [f"{values[0] / value:.2f}" for value in values[1:]]


def make_checkpoint(folder, dtype=torch.float32, **shape):
    """A GPT-2 with random weights, by transformers, dropout 0. The reference's length alone ends an answer."""
    from transformers import GPT2Config, GPT2LMHeadModel, logging
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    gpt = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    gpt.generation_config.eos_token_id = None
    gpt.save_pretrained(folder)


def parser(description):
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def main():
    flags = parser(__doc__)
    flags.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), help="these rows (default: all)")
    flags.add_argument("--rounds", type=int, default=3, help="rounds, each with new batches (default: %(default)s)")
    flags.add_argument("--quick", action="store_true", help="a smoke run: two layers, one batch, one round")
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides (default: %(default)s)")
    args = flags.parse_args()
    layers, rounds, batches = (2, 1, 1) if args.quick else (12, args.rounds, 4)
    dtypes = choose_dtypes(args.device)
    print(f"{describe(args.device, dtypes)}; {rounds} rounds of {batches} batches")
    print_header(["Work", *SIDES])
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, n_layer=layers)
        for row in args.only:
            task, size = ROWS[row]
            # A round answers as many queries in small batches as in large ones.
            work = Work(task, size, batches * (64 // size if task == "generate" else 1), folder, args.device)
            check(work)
            speeds, memory = race(work, dtypes, 0 if row == "memory" else rounds)
            name, unit, values = f"train {task}", "pairs/s", speeds
            if task == "generate":
                name, unit = f"generate, batch {size}", "tokens/s"
            if row == "memory":
                name, unit, values = "peak memory, train soft", "GB", memory
            print_row([name, *(f"{v:,.{0 if v >= 100 else 2}f} {unit}" for v in values), *ratios(values)])


if __name__ == "__main__":
    main()
