"""Train one way of prompting a GPT, and test it.

    python train.py --method dynamic

Each epoch ends with a score on the validation set and two checkpoints in the run's folder: best.pt, what scored best
so far, and last.pt, all that `--resume` needs. An epoch seeds itself from --seed and its number, so an interrupted run
goes on as if it had never stopped, and there are no random states to save. With `torchrun`, each process takes its
share of every batch.
"""
import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import REPOSITORIES, group_by_length, load_splits, read_json
from evaluate import (Run, UsageError, choose_device, load_checkpoint, load_run, report, run_command, write_test,
                      write_text)
from model import load_plain, replace
from prompt_encoder import METHODS

RUN_FILES = ("results.json", "generations.jsonl", "log.jsonl", "last.pt", "best.pt", "config.json")
NOT_SETTINGS = ("device", "out", "resume", "overwrite")         # may differ when a run is resumed; epochs may grow
VERSION = 2                                                     # of a run's folder


class Diverged(ValueError):
    """The loss became NaN or infinite."""


# ---------------------------------------------------------------------------------------------------------- training

def warm_up_and_decay(step, steps):
    """The learning rate as a share of its peak: up over 100 steps (at most a tenth), then down to 0, both linearly."""
    warm_up = max(1, min(100, steps // 10))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train_epoch(model, examples, batches, rates, optimizer, scaler, show):
    """Train on batches of the examples, lists of indices, each at its learning rate -> the mean loss of each step.

    show: called after each step with the step's number in the epoch and its loss. The loss is a tensor: to read it is to
    wait for the GPU.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    losses = []
    for indices, rate in zip(batches, rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = sum(len(examples[i][1]) for i in indices)
        share, weight = indices[rank::world], 1 / tokens                # this process's
        if not share:                                   # a short last batch: as all must take part, a row that counts nothing
            share, weight = indices[:1], 0
        loss = model([examples[i] for i in share]).sum() * weight
        scaler.scale(loss * world).backward()           # DistributedDataParallel divides gradients by world
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
        show(len(losses), losses[-1])
    losses = torch.stack(losses)
    if world > 1:
        dist.all_reduce(losses)
    return losses.tolist()


def fit(run, splits, config, folder, label=""):
    """Train a run, from the start or from last.pt in the folder; best.pt there holds its best epoch -> that epoch's scores."""
    model, examples = run.model, splits.examples["train"]
    trained = model.trained()
    n, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    say(f"{label}training {n:,} of {total:,} parameters ({n / total:.1%})")
    optimizer = torch.optim.AdamW(trained.values(), lr=config["lr"], weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    epoch, log, best = -1, [], None                     # the last finished epoch; 0 only scores
    if (folder / "last.pt").exists():
        state = load_checkpoint(folder / "last.pt", {"trained", "optimizer", "scaler", "epoch", "log", "best"})
        model.load_trained(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        epoch, log, best = state["epoch"], state["log"], state["best"]
        say(f"{label}resuming after epoch {epoch}")
    if config["compile"]:
        for block in model.gpt.h:
            block.compile(dynamic=True)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
    steps_per_epoch = math.ceil(len(examples) / config["batch_size"])
    steps = steps_per_epoch * config["epochs"]
    rates = [config["lr"] * warm_up_and_decay(step, steps) for step in range(steps)]

    while epoch < config["epochs"] and (not best or epoch - best["epoch"] < config["patience"]):
        epoch += 1
        first, step = steps_per_epoch * (epoch - 1), steps_per_epoch * epoch        # the epoch's first step, and the next one's
        line = {"epoch": epoch, "step": step} | dict.fromkeys(          # the keys' order in log.jsonl
            ("train_loss", "val_loss", "val_bleu4", "lr", "seconds", "eval_seconds", "tokens_per_second"))
        if epoch > 0:
            seed = config["seed"] * 1_000_003 + epoch
            torch.manual_seed(seed * 1009 + (dist.get_rank() if dist.is_initialized() else 0))      # dropout
            batches = group_by_length(examples, config["batch_size"], run.row_length, seed)
            show = progress(f"{label}epoch {epoch}/{config['epochs']}", first, steps,
                            (config["epochs"] - epoch + 1) * log[-1]["eval_seconds"])
            begun = time.perf_counter()
            losses = train_epoch(parallel, examples, batches, rates[first:step], optimizer, scaler, show)
            line["seconds"] = time.perf_counter() - begun
            for i, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise Diverged(f"the loss became {loss} at step {first + i + 1} with a learning rate of "
                                   f"{rates[first + i]:.2g}; nothing of this epoch is saved")
            weights = [sum(len(examples[i][1]) for i in indices) for indices in batches]
            line["train_loss"] = sum(loss * weight for loss, weight in zip(losses, weights)) / sum(weights)
            line["lr"] = rates[step - 1]
            line["tokens_per_second"] = sum(map(run.row_length, examples)) / line["seconds"]
        begun = time.perf_counter()
        with torch.compiler.set_stance("force_eager") if config["compile"] else contextlib.nullcontext():
            val_loss, bleu4 = from_main_process(lambda: run.validate(splits))
        if not math.isfinite(val_loss):
            raise Diverged(f"the validation loss became {val_loss} after step {step}; nothing of this epoch is saved")
        line |= {"val_loss": val_loss, "val_bleu4": bleu4, "eval_seconds": time.perf_counter() - begun}
        log.append(line)
        say(f"{label}epoch {epoch:3d}  " + (f"train loss {line['train_loss']:.3f}  " if epoch else "before training   ")
            + f"val loss {val_loss:.3f}  val BLEU4 {bleu4:.4f}"
            + (f"  {line['tokens_per_second']:,.0f} tokens/s" if epoch else ""))
        # Epoch 0 is a baseline: it is chosen only where nothing is trained.
        better = (epoch > 0 or config["epochs"] == 0) and (
            not best or best["epoch"] == 0 or (bleu4, -val_loss) > (best["val_bleu4"], -best["val_loss"]))
        if better:
            best = {"epoch": epoch, "val_bleu4": bleu4, "val_loss": val_loss, "lr": config["lr"]}
        if main_process():
            if better:
                save(folder / "best.pt", {"trained": trained, "config": config, **best})
            write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
            save(folder / "last.pt", {"trained": trained, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                                      "epoch": epoch, "log": log, "best": best})
    return best


def search(run, splits, config, folder):
    """--trials: train once for each of the learning rates, each in a folder of its own; best.pt is the best's by validation
    BLEU4."""
    draw, trials, device, dtype = random.Random(config["seed"]), [], run.model.device, run.model.dtype
    run.model = None                                    # each trial has its own: no second one beside it
    for i in range(1, config["trials"] + 1):
        lr = math.exp(draw.uniform(math.log(3e-6), math.log(9e-3)))
        file = folder / f"trial-{i:02}" / "trial.json"
        if not file.exists():
            trial = config | {"lr": lr, "trials": 1}
            if main_process():
                file.parent.mkdir(exist_ok=True)
                write_text(file.parent / "config.json", json.dumps(trial, indent=2) + "\n")
            torch.manual_seed(config["seed"])
            try:
                found = fit(Run(config, device, dtype), splits, trial, file.parent,
                            f"trial {i}/{config['trials']}, lr {lr:.2g}: ")
            except Diverged as error:
                found = {"lr": lr, "failed": str(error)}
                say(str(error))
            if main_process():
                write_text(file, json.dumps({"trial": i} | found) + "\n")
        trials.append(from_main_process(lambda: read_json(file)))
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
    return best


def main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def from_main_process(function):
    """What function() gives in the main process, in all of them: the others wait."""
    result = [function() if main_process() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def save(path, state):
    replace(path, lambda file: torch.save(state, file))


def say(text):
    if main_process():
        if sys.stdout.isatty():
            print("\r\033[K", end="")                   # over the line of progress
        print(text, flush=True)


def progress(label, done, steps, seconds_more):
    """A function for `train_epoch` that shows, a few times a second, how far the training is: in a terminal alone."""
    begun = shown = time.perf_counter()

    def show(step, loss):
        nonlocal shown
        now = time.perf_counter()
        if now - shown > 0.3 and sys.stdout.isatty() and main_process():
            shown, left = now, int((now - begun) / step * (steps - done - step) + seconds_more)
            text = f"{label}  step {done + step}/{steps}  loss {loss.item():.3f}  {timedelta(seconds=left)} left"
            print(f"\r\033[K{text[:shutil.get_terminal_size().columns - 1]}", end="", flush=True)
    return show


# ------------------------------------------------------------------------------------------------------ command line

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
    shown = " (default: %(default)s)"
    add = parser.add_argument_group("what is trained").add_argument
    add("--method", required=True, choices=list(METHODS), help="the way of prompting")
    add("--model", default="tiny-dialogpt", help="tiny-dialogpt, tiny-gpt2, gpt2[-medium|-large|-xl], "
        "dialogpt-small|medium|large, owner/name on the Hugging Face Hub, or a folder" + shown)
    add("--prompt-length", type=number(int, 1, 10**6), help="k, for methods with a prompt of fixed length (default: "
        + ", ".join(f"{name} {m.default_length}" for name, m in METHODS.items() if m.default_length) + ")")
    add("--controller-layers", type=number(int, 1, 1000), default=2, help="depth of dynamic's controller" + shown)
    add("--train-embeddings", action=argparse.BooleanOptionalAction,
        help="train the word embeddings (default: finetune, soft and dynamic do)")
    add = parser.add_argument_group("on which dialogues").add_argument
    add("--data", default="sample", help="sample, dailydialog, multiwoz, a folder, or a text file" + shown)
    add("--fraction", type=number(float, 1e-6, 1), default=1.0, help="share of the training dialogues" + shown)
    add("--turns", type=number(int, 1, 100), default=1, help="turns in a query" + shown)
    add("--pairs", choices=("steps", "sliding"), default="steps",
        help="steps: (1,2), (3,4) ...; sliding: (1,2), (2,3) ..." + shown)
    add("--max-query", type=number(int, 1, 10**6), default=128, help="tokens kept of a query, from its end" + shown)
    add("--max-response", type=number(int, 1, 10**6), default=128,
        help="tokens kept of a response, from its start, for training and for losses and perplexity" + shown)
    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=number(int, 0, 10**6), default=4, help="at most this many; 0 tests the model before training" + shown)
    add("--patience", type=number(int, 1, 10**6), default=4,
        help="stop after this many epochs without a better one (validation BLEU4, then loss)" + shown)
    add("--batch-size", type=number(int, 1, 10**6), default=16, help="pairs in a step, over all processes" + shown)
    add("--lr", type=number(float, 0, 10), help="peak learning rate (default: "
        + ", ".join(f"{name} {m.learning_rate:g}" for name, m in METHODS.items()) + ")")
    add("--trials", type=number(int, 1, 1000), default=1, help="train this many times, with learning rates drawn from "
        "[3e-6, 9e-3], and test the best by validation BLEU4" + shown)
    add("--dropout", type=number(float, 0, 0.99), default=0.1, help="in training, in GPT and controller" + shown)
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random" + shown)
    add = parser.add_argument_group("where").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..." + shown)
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the matrix products; trained weights and logits stay float32" + shown)
    add("--compile", action="store_true", help="give the GPT's blocks to torch.compile; it needs a C++ compiler or Triton")
    add("--out", type=Path, help="the run's folder (default: runs/DATA-MODEL-METHOD-FRACTION-sSEED)")
    add("--resume", action="store_true", help="go on where the run in the folder stopped; --epochs may be larger")
    add("--overwrite", action="store_true", help="replace the run in the folder")
    args = parser.parse_args()
    if args.prompt_length and not METHODS[args.method].default_length:
        parser.error(f"--prompt-length {args.prompt_length}: {args.method} has no prompt of fixed length")
    if args.lr is not None and args.trials > 1:
        parser.error("--lr and --trials exclude each other: trials draw their learning rates")
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        parser.error("--compile needs a C++ compiler, and none is found here (c++, g++, clang++, cl)")
    if args.lr is None and args.trials == 1:
        args.lr = METHODS[args.method].learning_rate
    known = {"sample", "dailydialog", "multiwoz", "tiny-gpt2", "tiny-dialogpt", *REPOSITORIES}
    for name in ("data", "model"):                      # paths are kept whole, so that a run can be used from any directory
        value = getattr(args, name)
        if value not in known and Path(value).exists():
            setattr(args, name, str(Path(value).resolve()))
    if args.out is None:
        data, model = (Path(name).stem if os.path.isabs(name) else name.replace("/", "--") for name in (args.data, args.model))
        args.out = Path("runs") / f"{data}-{model}-{args.method}-{args.fraction}-s{args.seed}"
    return args


def enter_folder(folder, config, resume, overwrite):
    """Settings and the run's folder -> the settings, with what the run stood on if it is resumed. Nothing of a run that is
    already there is touched unasked. Raises OSError, UsageError."""
    if not any((folder / name).exists() for name in RUN_FILES):
        return config
    if overwrite:
        if (folder / "config.json").exists() and "method" not in read_json(folder / "config.json"):
            raise FileExistsError(f"{folder / 'config.json'} is not a run's: nothing in this folder is replaced")
        return config
    if not resume:
        raise FileExistsError(f"{folder} already holds a run: choose --resume, --overwrite or another --out")
    before = read_json(folder / "config.json")
    changed = [k for k in config if before.get(k) != config[k] and not (
        k == "epochs" and isinstance(before.get(k), int) and before[k] < config[k])]
    if changed:
        raise UsageError(f"{folder} was started with other settings: " + ", ".join(
            f"--{k.replace('_', '-')} {before.get(k)} (now {config[k]})" for k in changed))
    if (folder / "results.json").exists() and before["epochs"] == config["epochs"]:
        print(f"{folder} is already finished: nothing to resume")
        sys.exit(0)
    return config | {k: before[k] for k in ("weights", "dialogues") if k in before}


def prepare_folder(folder, config, resume, overwrite):
    """Take away what is replaced, and write the settings."""
    for trial in folder.glob("trial-[0-9][0-9]*") if overwrite else ():
        shutil.rmtree(trial)
    for name in RUN_FILES[:1] if resume else RUN_FILES:         # a run that goes on is not finished
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def main():
    args = parse_arguments()
    config = {"version": VERSION} | {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    config = enter_folder(args.out, config, args.resume, args.overwrite)
    device, dtype, why = choose_device(args.device, args.dtype)
    if "RANK" in os.environ:                                    # started by torchrun
        if device.type == "cuda":
            device, *_ = choose_device(f"cuda:{os.environ['LOCAL_RANK']}", args.dtype)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    torch.manual_seed(args.seed)
    run = Run(config, device, dtype)
    splits = load_splits(config, run.tokenizer)
    config |= {"weights": run.weights, "dialogues": splits.fingerprint}
    say(f"{device}, {str(dtype).removeprefix('torch.')} ({why}); "
        + ", ".join(f"{len(p):,} {s}" for s, p in splits.pairs.items()) + " pairs")
    if Path(config["data"]).is_file():
        say(f"{config['data']} is one file: its dialogues are split 80/10/10, shuffled by --seed {config['seed']}")
    if dist.is_initialized():
        dist.barrier()                                          # every process has looked at the folder
    from_main_process(lambda: prepare_folder(args.out, config, args.resume, args.overwrite))
    try:
        best = (search if args.trials > 1 else fit)(run, splits, config, args.out)
        if main_process():
            run = load_run(args.out, str(device), args.dtype)
            results, generations = run.test(splits, run.best)
            write_test(args.out, results, generations)
            chosen = "best validation BLEU4" if args.epochs else "before training"
            say(f"\ntested: epoch {best['epoch']} of {args.epochs} ({chosen}, {best['val_bleu4']:.4f})\n\n"
                + report(results, generations[::max(1, len(generations) // 5)][:5]) + f"\n\n{args.out}")
    except KeyboardInterrupt:
        say(f"\ninterrupted: the same command with --resume goes on from the last finished epoch in {args.out}")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
