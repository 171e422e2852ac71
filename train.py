"""Train one way of prompting a GPT, and test it.

    python train.py --method dynamic

Each epoch ends with a score on the validation set and two checkpoints in the run's folder: best.pt, what scored best
so far, and last.pt, all that `--resume` needs. An epoch seeds itself from --seed and its number, so an interrupted run
goes on as if it had never stopped, and there are no random states to save. With `torchrun`, each process takes its
share of every batch.
"""
import argparse
import ctypes
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import group_by_length, make_batch
from evaluate import (VERSION, Task, UsageError, build, choose_device, corpus_bleu, describe, load_checkpoint, load_run,
                      main_process, mean_loss, open_checkpoint, read_json, read_settings, report, respond, run_command, test,
                      write_text)
from model import load_plain, replace
from prompt_encoder import METHODS

LEARNING_RATES = {"finetune": 1e-3, "soft": 3e-3, "dynamic": 4e-3, "prompt-tuning": 3e-2, "p-tuning": 2e-3,
                  "prefix": 3e-3, "dialogprompt": 1e-3}
RUN_FILES = ("results.json", "generations.jsonl", "log.jsonl", "last.pt", "best.pt", "config.json")
NOT_SETTINGS = ("device", "out", "resume", "overwrite")         # what may differ when a run is resumed


def parse_arguments():
    def number(kind, low, high=math.inf):
        def parse(text):
            value = kind(text)
            if not low <= value <= high or not math.isfinite(value):
                raise argparse.ArgumentTypeError(f"{text} is out of range, expected " + (
                    f"{low} or more" if high == math.inf else f"a number from {low} to {high}"))
            return value
        parse.__name__ = {int: "whole number", float: "number"}[kind]
        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shown = " (default: %(default)s)"
    add("--method", required=True, choices=list(METHODS), help="the way of prompting")
    add("--model", default="tiny-gpt2", help="tiny-gpt2, tiny-dialogpt, gpt2[-medium|-large|-xl], "
        "dialogpt-small|medium|large, owner/name on the Hugging Face Hub, or a folder" + shown)
    add("--data", default="sample", help="sample, dailydialog, multiwoz, or a folder" + shown)
    add("--fraction", type=number(float, 1e-6, 1), default=1.0, help="share of the training dialogues" + shown)
    add("--turns", type=number(int, 1, 100), default=1, help="turns in a query" + shown)
    add("--pairs", choices=("steps", "sliding"), default="steps",
        help="steps: (1,2), (3,4) ...; sliding: (1,2), (2,3) ..." + shown)
    add("--prompt-length", type=number(int, 1, 10**6), help="k, for methods with a prompt of fixed length (default: "
        + ", ".join(f"{name} {m.default_length}" for name, m in METHODS.items() if m.default_length) + ")")
    add("--controller-layers", type=number(int, 1, 1000), default=2, help="depth of dynamic's controller" + shown)
    add("--epochs", type=number(int, 0, 10**6), default=8, help="at most this many; 0 tests the untouched model" + shown)
    add("--patience", type=number(int, 1, 10**6), default=8,
        help="stop after this many epochs without a better one (validation BLEU4, then loss)" + shown)
    add("--batch-size", type=number(int, 1, 10**6), default=16, help="pairs in a step, over all processes" + shown)
    add("--lr", type=number(float, 0, 10), help="peak learning rate (default: "
        + ", ".join(f"{m} {lr:g}" for m, lr in LEARNING_RATES.items()) + ")")
    add("--trials", type=number(int, 1, 1000), default=1, help="train this many times, with learning rates drawn from "
        "[3e-6, 9e-3], and test the best by validation BLEU4" + shown)
    add("--dropout", type=number(float, 0, 0.99), default=0.1, help="in training, in GPT and controller" + shown)
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random" + shown)
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the matrix products; trained weights stay float32" + shown)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..." + shown)
    add("--out", type=Path, help="the run's folder (default: runs/DATA-MODEL-METHOD-FRACTION-sSEED)")
    add("--resume", action="store_true", help="go on where the run in the folder stopped")
    add("--overwrite", action="store_true", help="replace the run in the folder")
    add("--max-query", type=number(int, 1, 10**6), default=128, help="tokens kept of a query, from its end" + shown)
    add("--max-response", type=number(int, 1, 10**6), default=128,
        help="tokens kept of a response, from its start, for training and for losses and perplexity" + shown)
    add("--train-embeddings", action=argparse.BooleanOptionalAction,
        help="train the word embeddings (default: finetune, soft and dynamic do)")
    args = parser.parse_args()
    if args.prompt_length and not METHODS[args.method].default_length:
        parser.error(f"--prompt-length {args.prompt_length}: {args.method} has no prompt of fixed length")
    if args.lr is not None and args.trials > 1:
        parser.error("--lr and --trials exclude each other: trials draw their learning rates")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.lr is None and args.trials == 1:
        args.lr = LEARNING_RATES[args.method]
    if args.out is None:
        data, model = (Path(name).resolve().name if Path(name).is_dir() else name.replace("/", "--")
                       for name in (args.data, args.model))
        args.out = Path("runs") / f"{data}-{model}-{args.method}-{args.fraction}-s{args.seed}"
    return args


def check_folder(folder, config, resume, overwrite):
    """Raise unless the run may use its folder: nothing of a run that is already there is touched unasked."""
    if not any((folder / name).exists() for name in RUN_FILES):
        return
    if overwrite:
        if (folder / "config.json").exists():
            read_json(folder / "config.json", {"version": int})         # a GPT's folder has a config.json, too: not for us
        return
    if not resume:
        raise FileExistsError(f"{folder} already holds a run: choose --resume, --overwrite or another --out")
    before = read_settings(folder)
    changed = [k for k in config if before.get(k) != config[k]]
    if changed:
        raise UsageError(f"{folder} was started with other settings: " + ", ".join(
            f"--{k.replace('_', '-')} {before.get(k)} (now {config[k]})" for k in changed))


def enter_folder(folder, config, resume):
    """Make the run's folder, empty of any earlier run, or enter it again to resume."""
    if not resume:
        for trial in folder.glob("trial-*"):
            shutil.rmtree(trial)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def save(path, state):
    replace(path, lambda file: torch.save(state, file))


def warm_up_and_decay(step, steps):
    """The learning rate as a share of its peak: up over 100 steps (at most a tenth), then down to 0, both linearly."""
    warm_up = max(1, min(100, steps // 10))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def clip(parameters, optimizer):
    """Shorten the gradient to a norm of 1 if it is longer, for the optimizer's next step."""
    if parameters[0].device.type != "cpu":
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    else:       # a dot product takes a third of a norm's time, and fused AdamW divides on its way, as for GradScaler
        gradients = [p.grad.flatten() for p in parameters]
        optimizer.grad_scale = torch.stack([torch.dot(g, g) for g in gradients]).sum().sqrt().clamp(min=1.0)


class Diverged(ValueError):
    """The loss became NaN or infinite."""


def check_loss(loss, step, rate, folder):
    if not math.isfinite(loss):
        raise Diverged(f"the loss became {loss} at step {step} with a learning rate of {rate or 0:.2g}; "
                       f"{folder} keeps the last good checkpoint, if there was one")


def fit(config, task, device, dtype, folder, label=""):
    """Train once, from the start or from last.pt in the folder; best.pt there holds the best epoch -> its scores."""
    torch.manual_seed(config["seed"])
    model = build(config, dtype).to(device)
    parameters, train, validation = list(model.trained().values()), task.examples["train"], task.examples["validation"]
    trained, total = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    say(f"{label}training {trained:,} of {total:,} parameters ({trained / total:.1%})")
    optimizer = torch.optim.AdamW(parameters, lr=config["lr"], weight_decay=0.01, fused=True)
    epoch, log, best = -1, [], None
    if (folder / "last.pt").exists():
        state = load_checkpoint(folder / "last.pt", {"trained", "optimizer", "epoch", "log", "best"})
        model.load_trained(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, log, best = state["epoch"], state["log"], state["best"]
        write_log(folder, log)
        say(f"{label}resuming after epoch {epoch}")
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    steps_per_epoch = -(-len(train) // config["batch_size"])
    steps = steps_per_epoch * config["epochs"]

    while epoch < config["epochs"] and (best is None or epoch - best["epoch"] < config["patience"]):
        epoch += 1
        step, begun = steps_per_epoch * max(0, epoch - 1), time.perf_counter()
        loss_sum = response_tokens = tokens = 0
        train_loss = seconds = rate = None
        if epoch > 0:
            model.train()
            seed = config["seed"] * 1_000_003 + epoch
            torch.manual_seed(seed * 1009 + rank)                                               # dropout
            for indices in group_by_length(train, config["batch_size"], seed, model.encoder.slots):
                rate = config["lr"] * warm_up_and_decay(step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # Every process takes its share of the rows; these differ in length: the mean is over all their tokens.
                mine = [train[i] for i in indices[rank::world]]
                batch = make_batch(mine or [train[indices[0]]], model.encoder.slots).to(device)
                targets = sum(len(train[i][1]) for i in indices)
                loss = parallel(batch) * (bool(mine) / targets)
                (loss * world).backward()                       # DistributedDataParallel divides by world
                loss = loss.detach()
                if world > 1:
                    dist.all_reduce(loss)
                loss = loss.item()
                check_loss(loss, step + 1, rate, folder)
                clip(parameters, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                loss_sum, response_tokens = loss_sum + loss * targets, response_tokens + targets
                for query, response in (train[i] for i in indices):
                    tokens += model.encoder.slots(len(query)) + len(query) + len(response)
                seconds = time.perf_counter() - begun
                step_time, to_come = seconds / (step - steps_per_epoch * (epoch - 1)), config["epochs"] - epoch + 1
                progress(f"{label}epoch {epoch}/{config['epochs']}  step {step}/{steps}  loss {loss:.3f}  "
                         f"{tokens / seconds:,.0f} tokens/s  "
                         f"{clock(step_time * (steps - step) + log[-1]['eval_seconds'] * to_come)} left")
            train_loss = loss_sum / response_tokens
        begun = time.perf_counter()
        val_loss = mean_loss(model, validation)
        check_loss(val_loss, step, rate, folder)
        bleu4 = corpus_bleu(respond(model, validation, task.tokenizer), [r for _, r in task.pairs["validation"]])
        speed = tokens / seconds if seconds else None
        log.append({"epoch": epoch, "step": step, "train_loss": train_loss, "val_loss": val_loss, "val_bleu4": bleu4,
                    "lr": rate, "seconds": seconds, "eval_seconds": time.perf_counter() - begun,
                    "tokens_per_second": speed})
        say(f"{label}epoch {epoch:3d}  " + (f"train loss {train_loss:.3f}  " if epoch else "untouched         ")
            + f"val loss {val_loss:.3f}  val BLEU4 {bleu4:.4f}" + (f"  {speed:,.0f} tokens/s" if epoch else ""))
        better = best is None or (bleu4, -val_loss) > (best["val_bleu4"], -best["val_loss"])
        if better:
            best = {"epoch": epoch, "val_bleu4": bleu4, "val_loss": val_loss, "lr": config["lr"]}
        if main_process():
            if better:
                save(folder / "best.pt", {"trained": model.trained(), **best})
            save(folder / "last.pt", {"trained": model.trained(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                                      "log": log, "best": best})
            write_log(folder, log)
        wait()
    return best


def write_log(folder, log):
    if main_process():
        write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def say(text):
    progress("")
    if main_process():
        print(text, flush=True)


def progress(text):
    """One line, written over and over, in a terminal; nothing in a log file, where each epoch's line is enough."""
    if sys.stdout.isatty() and main_process():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:{width}}\r", end="", flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"


def search(config, task, device, dtype, folder):
    """--trials: a run for each of the learning rates, each in a folder of its own -> the best by validation BLEU4."""
    draw, trials = random.Random(config["seed"]), []
    for i in range(1, config["trials"] + 1):
        lr = math.exp(draw.uniform(math.log(3e-6), math.log(9e-3)))
        file = folder / f"trial-{i:02}" / "trial.json"
        if not file.exists():
            trial = config | {"lr": lr, "trials": 1}
            if main_process():
                enter_folder(file.parent, trial, resume=True)
            try:
                found = fit(trial, task, device, dtype, file.parent, f"trial {i}/{config['trials']}, lr {lr:.2g}: ")
            except Diverged as error:
                found = {"lr": lr, "failed": str(error)}
                say(str(error))
            if main_process():
                write_text(file, json.dumps({"trial": i} | found) + "\n")
            wait()
        trials.append(read_json(file, {"trial": int, "lr": float}))
    say("\n| Trial | Learning rate | Best epoch | Val loss | Val BLEU4 |\n|---:|---:|---:|---:|---:|")
    for t in trials:
        outcome = "failed | - | -" if "failed" in t else f"{t['epoch']} | {t['val_loss']:.3f} | {t['val_bleu4']:.4f}"
        say(f"| {t['trial']} | {t['lr']:.2e} | {outcome} |")
    good = [t for t in trials if "failed" not in t]
    if not good:
        raise ValueError(f"all {len(trials)} trials failed; {folder} keeps them")
    best = max(good, key=lambda t: (t["val_bleu4"], -t["val_loss"]))
    if main_process():
        save(folder / "best.pt", load_plain(folder / f"trial-{best['trial']:02}" / "best.pt"))
    wait()


def keep_memory():
    """Let the memory of freed tensors wait for the next ones. Linux's C library gives large blocks back at once, and to get
    fresh ones, page by page and cleared, costs a quarter of a step on a CPU where the word embeddings are trained. To be
    called before the first tensor is made."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")          # for PyTorch: pages of 2 MB for large tensors, not of 4 KB
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):                                # musl, another C library, has none
        libc.mallopt(-4, 0)                                     # M_MMAP_MAX: no block is asked from the system by itself
        libc.mallopt(-1, 2**31 - 1)                             # M_TRIM_THRESHOLD: nothing is given back


def wait():
    if dist.is_initialized():
        dist.barrier()


def main():
    args = parse_arguments()
    keep_memory()
    config = {"version": VERSION} | {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    check_folder(args.out, config, args.resume, args.overwrite)
    if args.resume and (args.out / "results.json").exists():
        print(f"{args.out} is already finished: nothing to resume")
        return
    device, dtype, why = choose_device(args.device, args.dtype)
    if "RANK" in os.environ:                                    # started by torchrun
        if device.type == "cuda":
            device, *_ = choose_device(f"cuda:{os.environ['LOCAL_RANK']}", args.dtype)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    task = Task(config, open_checkpoint(config))
    say(f"{device.type}, {str(dtype).removeprefix('torch.')} ({why}); "
        + ", ".join(f"{len(p):,} {s}" for s, p in task.pairs.items()) + " pairs")
    wait()                                                      # every process has looked at the folder
    if main_process():
        enter_folder(args.out, config, args.resume)
    wait()
    try:
        (search if args.trials > 1 else fit)(config, task, device, dtype, args.out)
        _, model, best = load_run(args.out, str(device), args.dtype)
        results = test(model, task, args.out, describe(config, model, best))
        wait()                                                  # for the main process to write it
    except KeyboardInterrupt:
        say(f"\ninterrupted: the same command with --resume goes on from the last finished epoch in {args.out}")
        sys.exit(130)
    examples = [json.loads(line) for line in open(args.out / "generations.jsonl", encoding="utf-8")]
    say(f"\n{report(results, examples[::max(1, len(examples) // 5)][:5])}\n\n{args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
