"""Train one way of prompting a GPT, and test it.

    python train.py --method dynamic

Each epoch ends with a score on the validation set and two checkpoints in the run's folder: best.pt, what scored best
so far, and last.pt, all that `--resume` needs. An epoch seeds itself from --seed and its number, so an interrupted run
goes on as if it had never stopped, and there are no random states to save. With `torchrun`, each process takes its
share of every batch.

methods:
    finetune        no prompt: the whole GPT is trained
    embeddings      no prompt: the word embeddings alone are trained
    soft            free vectors, as many as the query has tokens, and the word embeddings
    dynamic         what a Transformer, the controller, writes as it reads the query; it and the word embeddings
    prompt-tuning   k free vectors
    p-tuning        k vectors out of an LSTM
    prefix          k keys and values in every layer
    dialogprompt    k keys and values in every layer, out of a Transformer that reads the query

data: a file, or a folder with train.txt, validation.txt and test.txt: a dialogue per line, turns separated by __eou__
    Hi, how are you? __eou__ Fine, thanks. __eou__ Coming along? __eou__ I'd love to.

From Python: `from train import train`, then `run = train(method="dynamic", data=dialogues, epochs=20)`.
"""
import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from data import REPOSITORIES, read_json
from evaluate import ArgumentParser, Run, load_run, load_splits, report, run_command
from model import UsageError, choose_device, evaluation, load_tensors, reading, write_atomically, write_text
from prompt_encoder import METHODS, group_by_length

RUN_FILES = ("results.json", "generations.jsonl", "log.jsonl", "last.pt", "best.pt", "trial.json", "config.json")
NOT_SETTINGS = ("device", "out", "resume", "overwrite")         # may differ when a run is resumed; epochs may grow


# ---------------------------------------------------------------------------------------------------------- training

def warm_up_and_decay(step, steps):
    """The learning rate as a share of its peak: up over 100 steps (at most a tenth), then down to 0, both linearly."""
    warm_up = max(1, min(100, steps // 10))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def train_epoch(model, examples, batches, rates, optimizer, scaler, show):
    """Train on batches of the examples, lists of indices, each at its learning rate -> the mean loss per token.

    show: called after each step with the step's number in the epoch and its loss, a tensor: reading it waits for the
    GPU. Raises FloatingPointError where a loss has become NaN or infinite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tokens = [sum(len(examples[i][1]) for i in indices) for indices in batches]
    model.train()
    losses = []
    for indices, rate, n in zip(batches, rates, tokens):
        for group in optimizer.param_groups:
            group["lr"] = rate
        mine = indices[rank::world] or indices[:1]      # a batch too small for all processes: one example, times 0
        loss = model([examples[i] for i in mine]).sum() / n * (rank < len(indices))
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
    losses = losses.tolist()
    for step, (loss, rate) in enumerate(zip(losses, rates), 1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {step} of the epoch, with a learning rate of "
                                     f"{rate:.2g}; nothing of this epoch is saved")
    return sum(loss * n for loss, n in zip(losses, tokens)) / sum(tokens)


def check_padding(model, method, examples):
    """Raise ValueError where a method breaks the rule in `PromptEncoder.forward`: a query's prompt is the same alone
    and beside longer ones, and as long as promised. A table of results cannot show it."""
    encoder, longest = model.encoder, max((query for query, _ in examples), key=len)
    queries = [longest, longest[:1], longest[:len(longest) // 2 + 1]]
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1

    def prompts(queries):
        written = model.prompt(model.batch([(query, []) for query in queries]))
        if encoder.writes_past:                         # each (B, H, k, D) -> (B, k, 2LH, D)
            written = torch.cat([t for layer in written for t in layer], dim=1).transpose(1, 2)
        return written

    with evaluation(model), model.autocast():
        for query, beside in zip(queries, prompts(queries)):
            alone, promised, wrong = prompts([query])[0], encoder.prompt_length(len(query)), None
            if len(alone) != (encoder.k if encoder.writes_past else promised) or encoder.writes_past and promised:
                wrong = "is not as long as prompt_length (for keys and values: k, and prompt_length 0) promises"
            elif not (alone - beside[:len(alone)]).norm() <= tolerance * alone.norm():      # nor is NaN
                wrong = "depends on the padding behind it or on its neighbours: read nothing where mask is False"
            if wrong:
                raise ValueError(f"--method {method}: what {type(encoder).__name__}.forward writes for a query {wrong}")


def merit(scores, select):
    """A sort key, greatest for the best epoch or trial: by validation BLEU4, then by low loss, or the other way round.
    Epoch 0, before training, is worse than any other."""
    trained, loss, bleu4 = scores["epoch"] > 0, -scores["val_loss"], scores["val_bleu4"]
    return (trained, bleu4, loss) if select == "bleu4" else (trained, loss, bleu4)


def restore(folder, model, optimizer, scaler):
    """Go back to where last.pt was written -> its epoch, the log, the best epoch's scores; or to the beginning."""
    if (folder / "last.pt").exists():
        state = load_tensors(folder / "last.pt")
        with reading(folder / "last.pt"):
            model.load_trained(state["trained"])
            optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:                         # empty where the run began in another type than float16
                scaler.load_state_dict(state["scaler"])
            return state["epoch"], state["log"], state["best"]
    if (folder / "log.jsonl").exists():
        raise FileNotFoundError(f"{folder / 'last.pt'} is missing, though log.jsonl beside it has epochs: there is "
                                f"nothing to resume from, choose --overwrite or another --out")
    return -1, [], None                                 # epoch 0 comes next, which only scores


def fit(run, splits, config, folder, label=""):
    """Train a run, from the start or from last.pt in the folder; best.pt there holds its best epoch -> that epoch's
    scores. Raises FloatingPointError where a loss becomes NaN or infinite."""
    model, examples, trained = run.model, splits.examples["train"], run.model.trained()
    n, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
    print0(f"{label}training {n:,} of {total:,} parameters ({n / total:.1%})")
    optimizer = torch.optim.AdamW(trained.values(), lr=config["lr"], weight_decay=0.01, fused=True)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    epoch, log, best = restore(folder, model, optimizer, scaler)
    print0(label + ("starting from the beginning" if epoch < 0 else f"resuming after epoch {epoch}"))
    if main_process():                                  # only now: all that the run needs has been read
        (folder / "results.json").unlink(missing_ok=True)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if config["compile"]:
        for block in model.gpt.h:
            block.compile(dynamic=True)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model
    lengths = list(map(run.row_length, examples))
    steps_per_epoch = math.ceil(len(examples) / config["batch_size"])
    steps = steps_per_epoch * config["epochs"]
    rates = [config["lr"] * warm_up_and_decay(step, steps) for step in range(steps)]

    while epoch < config["epochs"] and (not best or epoch - best["epoch"] < config["patience"]):
        epoch += 1
        first, step = steps_per_epoch * (epoch - 1), steps_per_epoch * epoch    # steps done before the epoch, and after
        train_loss = lr = seconds = tokens_per_second = None
        if epoch > 0:
            seed = config["seed"] * 1_000_003 + epoch
            torch.manual_seed(seed * 1009 + (dist.get_rank() if dist.is_initialized() else 0))      # dropout
            batches, lr = group_by_length(lengths, config["batch_size"], seed), rates[step - 1]
            show = progress(f"{label}epoch {epoch}/{config['epochs']}", first, steps,
                            (config["epochs"] - epoch + 1) * log[-1]["eval_seconds"])
            begun = time.perf_counter()
            train_loss = train_epoch(parallel, examples, batches, rates[first:step], optimizer, scaler, show)
            seconds = time.perf_counter() - begun
            tokens_per_second = sum(lengths) / seconds
        begun = time.perf_counter()
        with torch.compiler.set_stance("force_eager") if config["compile"] else contextlib.nullcontext():
            val_loss, bleu4 = from_main_process(lambda: run.validate(splits))
        log.append({"epoch": epoch, "step": step, "train_loss": train_loss, "val_loss": val_loss, "val_bleu4": bleu4,
                    "lr": lr, "seconds": seconds, "eval_seconds": time.perf_counter() - begun,
                    "tokens_per_second": tokens_per_second})
        scores = {"epoch": epoch, "val_bleu4": bleu4, "val_loss": val_loss, "lr": config["lr"]}
        if not best or merit(scores, config["select"]) > merit(best, config["select"]):
            best = scores
        if main_process():
            if best is scores:
                save(folder / "best.pt", {"trained": trained, "config": config, **best})
            write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))
            save(folder / "last.pt", {"trained": trained, "optimizer": optimizer.state_dict(),
                                      "scaler": scaler.state_dict(), "epoch": epoch, "log": log, "best": best})
        training = f"train loss {train_loss:.3f}  " if epoch else "before training   "
        speed = f"  {tokens_per_second:,.0f} tokens/s" if epoch else ""
        print0(f"{label}epoch {epoch:3d}  {training}val loss {val_loss:.3f}  val BLEU4 {bleu4:.4f}{speed}")
    return best


def search(run, splits, config, folder):
    """--trials: train once for each of the learning rates, each in a folder of its own; best.pt is the best trial's."""
    draw, trials, device, dtype = random.Random(config["seed"]), [], run.model.device, run.model.dtype
    run.model = None                                    # each trial has its own: no second one beside it
    for i in range(1, config["trials"] + 1):
        lr = math.exp(draw.uniform(math.log(3e-6), math.log(9e-3)))
        file = folder / f"trial-{i:02}" / "trial.json"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            torch.manual_seed(config["seed"])
            trial, label = config | {"lr": lr, "trials": 1}, f"trial {i}/{config['trials']}, lr {lr:.2g}: "
            try:
                found = fit(Run(trial, device, dtype), splits, trial, file.parent, label)
            except FloatingPointError as error:
                found = {"lr": lr, "failed": str(error)}
                print0(str(error))
            if main_process():
                write_text(file, json.dumps({"trial": i} | found) + "\n")
        trials.append(from_main_process(lambda: read_json(file)))
    print0("\n| Trial | Learning rate | Best epoch | Val loss | Val BLEU4 |\n|---:|---:|---:|---:|---:|")
    for t in trials:
        outcome = "failed | - | -" if "failed" in t else f"{t['epoch']} | {t['val_loss']:.3f} | {t['val_bleu4']:.4f}"
        print0(f"| {t['trial']} | {t['lr']:.2e} | {outcome} |")
    good = [t for t in trials if "failed" not in t]
    if not good:
        raise ValueError(f"all {len(trials)} trials failed; {folder} keeps them")
    best = max(good, key=lambda t: merit(t, config["select"]))
    if main_process():
        save(folder / "best.pt", load_tensors(folder / f"trial-{best['trial']:02}" / "best.pt"))
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
    write_atomically(path, lambda file: torch.save(state, file))


def print0(text, end="\n"):
    """Print in the main process alone. A terminal that has gone away, or a full disk, stops nothing."""
    if main_process():
        try:
            print(text, end=end, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")


def progress(label, done, steps, seconds_more):
    """A function for `train_epoch` that shows, a few times a second, how far the training is: in a terminal or a
    notebook."""
    begun = shown = time.perf_counter()
    interactive = "ipykernel" in sys.modules or sys.stdout is not None and sys.stdout.isatty()

    def show(step, loss):
        nonlocal shown
        now = time.perf_counter()
        if interactive and now - shown > 0.3:
            shown, left = now, int((now - begun) / step * (steps - done - step) + seconds_more)
            width = shutil.get_terminal_size().columns - 1
            text = f"{label}  step {done + step}/{steps}  loss {loss.item():.3f}  {timedelta(seconds=left)} left"
            print0(f"\r{text:{width}.{width}}\r", end="")       # the next line is printed over it
    return show


# ---------------------------------------------------------------------------------------------------- a run's folder

def claim_folder(folder, config, resume, overwrite):
    """Take a run's folder by making its config.json, in one atomic step: of two jobs that want it, one is refused
    -> whether the run in it is already finished.

    Raises FileExistsError for a folder with a run, and for `resume` UsageError or ValueError where the settings, or
    what they stand for, differ. Nothing of a run that is already there is touched, unless it is to be replaced.
    """
    path = folder / "config.json"
    if overwrite and path.exists():
        remove_run(folder)
    if not path.exists() and any((folder / name).exists() for name in RUN_FILES):
        raise FileExistsError(f"{folder} holds files of a run, but no config.json: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2) + "\n")
        return False
    before = read_json(path)
    differing = [k for k in config if before.get(k) != config[k] and k not in ("weights", "dialogues", "code")]
    changes = ", ".join(f"--{k.replace('_', '-')} {before.get(k)} (now {config[k]})" for k in differing)
    if not resume:
        raise FileExistsError(f"{folder} already holds a run" + (f" with {changes}" if changes else "")
                              + ": choose --resume, --overwrite or another --out")
    if differing and (differing != ["epochs"] or before["epochs"] > config["epochs"] or config["trials"] > 1):
        raise UsageError(f"{folder} was started with other settings: {changes}")
    for name, what in ("weights", config["model"]), ("dialogues", config["data"]):
        if before.get(name) != config[name]:
            raise ValueError(f"{what}: the {name} have changed since this run began; put the old ones back, or train "
                             f"again")
    return not differing and (folder / "results.json").exists()


def remove_run(folder):
    """Remove what a run wrote into its folder, and nothing else."""
    config = read_json(folder / "config.json")
    if "method" not in config:
        raise FileExistsError(f"{folder / 'config.json'} is not a run's: nothing in this folder is replaced")
    if config.get("trials", 1) > 1:
        for trial in (folder / f"trial-{i:02}" for i in range(1, config["trials"] + 1)):
            if (trial / "config.json").exists():
                remove_run(trial)
                with contextlib.suppress(OSError):      # something else is in there
                    trial.rmdir()
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def default_folder(config, defaults):
    """runs/DATA-MODEL-METHOD-FRACTION-sSEED, and whatever else differs from the defaults: -lr0.01-turns4."""
    data, model = (Path(name).stem if os.path.isabs(name) else name.replace("/", "--")
                   for name in (config["data"], config["model"]))
    name = f"{data}-{model}-{config['method']}-{config['fraction']}-s{config['seed']}"
    for key, value in config.items():
        if key not in ("data", "model", "method", "fraction", "seed") and value not in (None, defaults[key]):
            name += f"-{key.replace('_', '-')}{value}"
    return Path("runs") / name


# ------------------------------------------------------------------------------------------------------ command line

def make_parser():
    def number(kind, low, high):
        def parse(text):
            if not low <= kind(text) <= high:           # nor is NaN
                raise argparse.ArgumentTypeError(f"{text} is out of range, expected {low} to {high}")
            return kind(text)
        parse.__name__ = kind.__name__                  # argparse says "invalid int value"
        return parse

    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, **options):
        if options.get("default") is not None:
            options["help"] += " (default: %(default)s)"
        group.add_argument(flag, **options)

    def of_methods(attribute):
        values = {name: getattr(method, attribute) for name, method in METHODS.items()}
        return f"(default: {', '.join(f'{name} {v:g}' for name, v in values.items() if v is not None)})"

    group = parser.add_argument_group("what is trained")
    add("--method", required=True, choices=list(METHODS), help="the way of prompting, see above")
    add("--model", default="tiny-dialogpt", help="tiny-dialogpt, tiny-gpt2, gpt2[-medium|-large|-xl], "
        "dialogpt-small|medium|large, owner/name on the Hugging Face Hub, or a folder")
    add("--prompt-length", type=number(int, 1, 10**6), help=f"k {of_methods('default_length')}")
    add("--controller-layers", type=number(int, 1, 1000), help="depth of dynamic's controller (default: 2)")
    add("--controller-init", choices=("random", "gpt"), help="gpt: start as the GPT's own layers (default: random)")
    add("--dropout", type=number(float, 0, 0.99), help=f"in training {of_methods('dropout')}")
    add("--train-embeddings", action=argparse.BooleanOptionalAction,
        help="train the word embeddings (default: finetune, embeddings, soft and dynamic do)")
    group = parser.add_argument_group("on which dialogues")
    add("--data", default="sample", help="sample, dailydialog, multiwoz, a folder, or a text file")
    add("--fraction", type=number(float, 1e-6, 1), default=1.0, help="share of the training dialogues")
    add("--turns", type=number(int, 1, 100), default=1, help="turns in a query")
    add("--pairs", choices=("steps", "sliding"), default="steps", help="steps: (1,2), (3,4) ...; sliding: (1,2), (2,3)")
    add("--max-query", type=number(int, 1, 10**6), default=128, help="tokens of a query, its last ones")
    add("--max-response", type=number(int, 1, 10**6), default=128,
        help="tokens kept of a response, from its start, for training and for losses and perplexity")
    add("--max-new-tokens", type=number(int, 1, 10**6), default=40, help="tokens of an answer, at most")
    group = parser.add_argument_group("how")
    add("--epochs", type=number(int, 0, 10**6), default=3, help="at most this many; 0 tests the model before training")
    add("--patience", type=number(int, 1, 10**6), default=4, help="stop after this many epochs without a better one")
    add("--select", choices=("bleu4", "loss"), default="bleu4",
        help="the best epoch has the highest validation BLEU4, or the lowest validation loss")
    add("--batch-size", type=number(int, 1, 10**6), default=16, help="pairs in a step, over all processes")
    add("--lr", type=number(float, 0, 10), help=f"peak learning rate {of_methods('learning_rate')}")
    add("--trials", type=number(int, 1, 1000), default=1, help="train this many times, with learning rates drawn from "
        "[3e-6, 9e-3], and test the best")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random")
    group = parser.add_argument_group("where")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... or mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the matrix products; trained weights and logits stay float32")
    add("--compile", action="store_true", help="give the GPT's blocks to torch.compile; it needs a C++ compiler")
    add("--out", type=Path,
        help="the run's folder (default: runs/DATA-MODEL-METHOD-FRACTION-sSEED, and what differs from the defaults)")
    group = group.add_mutually_exclusive_group()
    add("--resume", action="store_true", help="go on where the run in the folder stopped; --epochs may be larger")
    add("--overwrite", action="store_true", help="replace the run in the folder")
    return parser


def settings(args):
    """Parsed flags -> a run's settings: what was not given is resolved, so that two runs that do the same have the same
    ones. Raises UsageError for a flag that the method has no use for."""
    config = {"version": Run.version} | {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    method = METHODS[args.method]
    defaults = {"prompt_length": method.default_length, "dropout": method.dropout,
                "controller_layers": method.controller_layers, "controller_init": method.controller_init,
                "train_embeddings": method.trains_embeddings, "lr": method.learning_rate if args.trials == 1 else None}
    for key, value in defaults.items():
        if config[key] is None:
            config[key] = value
        elif value is None:
            reason = "--trials draws learning rates" if key == "lr" else f"not with --method {args.method}"
            raise UsageError(f"--{key.replace('_', '-')} {config[key]} has no use here: {reason}")
    return config


def as_arguments(flags):
    """{"batch_size": 8, "resume": True, "lr": None} -> ["--batch-size=8", "--resume"]"""
    arguments = ["--no-train-embeddings"] if flags.get("train_embeddings") is False else []
    for name, value in flags.items():
        if value is not None and value is not False:
            arguments.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return arguments


def train(arguments=None, **flags):
    """Train one way of prompting, and test it -> the tested Run.

    The flags of `python train.py --help` as keyword arguments: train(method="dynamic", data="sample", epochs=3). data
    may also be a list of dialogues, each a list of turns, or a dict of three such lists, train, validation and test.
    arguments: the flags as on the command line, instead.
    """
    data, parser = flags.get("data", "sample"), make_parser()
    in_memory = not isinstance(data, (str, Path))
    args = parser.parse_args(as_arguments(flags | {"data": "from-python" if in_memory else data})
                             if arguments is None else arguments)
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise UsageError("--compile needs a C++ compiler, and none is found here (c++, g++, clang++, cl)")
    known = {"sample", "dailydialog", "multiwoz", "tiny-gpt2", "tiny-dialogpt", *REPOSITORIES}
    for name in ("data", "model"):              # paths are kept whole, so that a run can be used from any directory
        value = getattr(args, name)
        if value not in known and Path(value).exists():
            setattr(args, name, str(Path(value).resolve()))
    config = settings(args)
    folder = args.out or default_folder(config, settings(parser.parse_args(["--method", args.method])))
    device, dtype, reason = choose_device(args.device, args.dtype)
    if "RANK" in os.environ:                                    # started by torchrun
        if device.type == "cuda":
            device, *_ = choose_device(f"cuda:{os.environ['LOCAL_RANK']}", args.dtype)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    torch.manual_seed(args.seed)
    if not main_process():
        dist.barrier()                                          # the main process downloads first
    run = Run(config, device, dtype)
    splits = load_splits(config | ({"data": data} if in_memory else {}), run.tokenizer)
    if dist.is_initialized() and main_process():
        dist.barrier()
    check_padding(run.model, args.method, splits.examples["train"])
    config |= {"weights": run.weights, "dialogues": splits.fingerprint, "code": run.code}
    if from_main_process(lambda: claim_folder(folder, config, args.resume, args.overwrite)):
        print0(f"{folder} is already finished: nothing to resume")
        return load_run(folder, str(device), args.dtype)
    counts = ", ".join(f"{len(pairs):,} {split}" for split, pairs in splits.pairs.items())
    print0(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}); {counts} pairs")
    if len(splits.pairs["validation"]) < 100 and args.select == "bleu4":
        print0("fewer than 100 validation pairs: their BLEU4 is mostly chance, --select loss chooses more steadily")
    best = (search if args.trials > 1 else fit)(run, splits, config, folder)
    if main_process():
        run = load_run(folder, str(device), args.dtype)
        results, generations = run.test(splits, run.best)
        run.write_results(folder, results, generations)
        score = "BLEU4" if args.select == "bleu4" else "loss"
        chosen = f"best validation {score}" if args.epochs else "before training"
        print0(f"\ntested: epoch {best['epoch']} of {args.epochs} ({chosen}; BLEU4 {best['val_bleu4']:.4f}, "
               f"loss {best['val_loss']:.3f})\n")
        print0(report(results, examples=generations[::max(1, len(generations) // 5)][:5]) + f"\n\n{folder}")
    return run


def main():
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)            # a terminal that is closed stops nothing
    try:
        train(sys.argv[1:])
    except KeyboardInterrupt:
        print0("\ninterrupted: the same command with --resume goes on from the last finished epoch")
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
