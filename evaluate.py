"""The metrics of both papers from scratch; scoring, tabulating, plotting and talking to trained runs.

    python evaluate.py RUN                          score a run on its test set again
    python evaluate.py RUN --chat                   talk to it
    python evaluate.py RUN --export FOLDER          write a fine-tuned GPT as a Hugging Face checkpoint
    python evaluate.py --table RUNS                 every run below a folder, as the papers' tables
    python evaluate.py --plot RUNS                  BLEU4, novelty and diversity over the training fraction
    python evaluate.py --lookup --data DATA         the dictionary that answers seen queries by heart
"""
import argparse
import json
import math
import os
import re
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from data import (checkpoint_folder, encode_pairs, group_by_length, load_tokenizer, make_batch, make_pairs,
                  read_dialogues, take_fraction)
from model import GPT, load_plain, read_config, replace
from prompt_encoder import METHODS, PromptedGPT

# ----------------------------------------------------------------------------------------------------------- metrics
# Lists of strings in, a float out. Down to the next ruler the standard library is enough: paste them anywhere.


def tokenize(text):
    """Words and single punctuation marks, case kept.

    >>> tokenize("I don't know.")
    ['I', 'don', "'", 't', 'know', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text)


def ngrams(tokens, n):
    return Counter(zip(*(tokens[i:] for i in range(n))))


def corpus_bleu(outputs, references, n=4):
    """BLEU-n of a whole corpus, one reference each, no smoothing (Papineni et al. 2002, section 2.3).

    The geometric mean of the precisions of orders 1..n, each output's n-grams clipped to its reference's, times the
    brevity penalty; 0 where an order has no match. Here 4/4 words, 3/3 pairs, and the output is 4 words against 5:

    >>> round(corpus_bleu(["the cat sat down"], ["the cat sat down ."], n=2), 4)        # exp(1 - 5/4)
    0.7788
    """
    return corpus_bleus(outputs, references, n)[-1]


def corpus_bleus(outputs, references, n=4):
    """[BLEU-1, ..., BLEU-n]: one count of the n-grams gives them all."""
    outputs, references = [tokenize(t) for t in outputs], [tokenize(t) for t in references]
    brevity = min(0, 1 - sum(map(len, references)) / max(1, sum(map(len, outputs))))
    scores, logs = [], 0.0
    for order in range(1, n + 1):
        matches = total = 0
        for output, reference in zip(outputs, references, strict=True):
            counts = ngrams(output, order)
            matches += (counts & ngrams(reference, order)).total()
            total += max(1, counts.total())             # as nltk has it: an output too short still counts 1
        logs += math.log(matches / total) if matches else -math.inf
        scores.append(math.exp(brevity + logs / order))
    return scores


def corpus_nist(outputs, references, n=5):
    """NIST-n of a whole corpus, one reference each (Doddington 2002): BLEU's matches, weighted by their information.

    An n-gram's information is log2(count of its first n - 1 words / its own count), over all references.
    """
    outputs, references = [tokenize(t) for t in outputs], [tokenize(t) for t in references]
    counts = Counter()
    for reference in references:
        for order in range(1, n + 1):
            counts.update(ngrams(reference, order))
    words, length = sum(map(len, references)), sum(map(len, outputs))
    score = 0.0
    for order in range(1, n + 1):
        gain = total = 0
        for output, reference in zip(outputs, references, strict=True):
            found = ngrams(output, order)
            total += found.total()
            gain += sum(count * math.log2((counts[gram[:-1]] if order > 1 else words) / counts[gram])
                        for gram, count in (found & ngrams(reference, order)).items())
        if total == 0:
            return 0.0
        score += gain / total
    if words == 0:
        return 0.0
    ratio = length / words                              # the penalty is 1/2 where outputs are 2/3 as long as references
    return score * (math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2) if ratio < 1 else 1.0)


def rouge_l(outputs, references):
    """Mean F1 of the longest common subsequence of words (Lin 2004, section 3).

    >>> rouge_l(["a b c d"], ["a x c"])                 # "a c": 2 of 4 words, 2 of 3
    0.5714285714285715
    """
    def f1(output, reference):
        best = [0] * (len(reference) + 1)               # best[j]: longest match of the words so far with reference[:j]
        for word in output:
            corner = 0
            for j, other in enumerate(reference, 1):
                corner, best[j] = best[j], corner + 1 if word == other else max(best[j], best[j - 1])
        precision, recall = best[-1] / max(1, len(output)), best[-1] / max(1, len(reference))
        return 2 * precision * recall / (precision + recall) if best[-1] else 0.0

    scores = [f1(tokenize(o), tokenize(r)) for o, r in zip(outputs, references, strict=True)]
    return statistics.fmean(scores) if scores else 0.0


def novelty(outputs, training_responses):
    """Share of outputs that were no response in training (Valvoda et al. 2022, section 4).

    >>> novelty(["Yes.", "I see a cat."], ["Yes.", "No."])
    0.5
    """
    known = {response.strip() for response in training_responses}
    return sum(output.strip() not in known for output in outputs) / max(1, len(outputs))


def diversity(outputs):
    """Distinct outputs / outputs (Valvoda et al. 2022, section 4).

    >>> diversity(["Yes.", "No.", "Yes.", "Yes."])
    0.5
    """
    return len({output.strip() for output in outputs}) / max(1, len(outputs))


def distinct(outputs, n):
    """Distinct n-grams / n-grams, over all outputs (Li et al. 2016, section 5.3).

    >>> distinct(["so so good"], 1)
    0.6666666666666666
    """
    counts = Counter()
    for output in outputs:                              # `sum` would copy all that is counted so far for each output
        counts.update(ngrams(tokenize(output), n))
    return len(counts) / max(1, counts.total())


def all_metrics(outputs, references, training_responses, mean_loss):
    """Every metric of results.json; null for all of them where there is no pair."""
    names = ("bleu1", "bleu2", "bleu3", "bleu4", "novelty", "diversity", "distinct1", "distinct2", "nist", "rouge_l",
             "length", "perplexity")
    if not outputs:
        return {"n": 0} | dict.fromkeys(names)
    values = (*corpus_bleus(outputs, references),
              novelty(outputs, training_responses), diversity(outputs), distinct(outputs, 1), distinct(outputs, 2),
              corpus_nist(outputs, references), rouge_l(outputs, references),
              statistics.fmean(len(tokenize(o)) for o in outputs),
              None if mean_loss is None else math.exp(min(mean_loss, 700)))        # beyond 709, exp overflows
    return {"n": len(outputs)} | dict(zip(names, values))


class Lookup:
    """A dictionary for a model: each query of the training set is answered with its most frequent response there, any
    other with the most frequent of all; among equals with the earliest. What a system scores beyond this, it did not
    learn by heart."""

    def __init__(self, training_pairs):
        answers = defaultdict(Counter)
        for query, response in training_pairs:
            answers[key(query)][response] += 1
        self.answers = {query: counts.most_common(1)[0][0] for query, counts in answers.items()}    # ties: the earliest
        self.default = Counter(response for _, response in training_pairs).most_common(1)[0][0]

    def answer(self, query):
        return self.answers.get(key(query), self.default)


def key(query):
    """A query is seen if the training set has one of exactly this text."""
    return tuple(turn.strip() for turn in query)


# --------------------------------------------------------------------------------------------------- scoring a model

VERSION = 1                                             # of a run's folder
# What a run's config.json must hold: the types of what tables need, and of what loading the model needs besides; limits.
LABELS = {"version": int, "method": str, "model": str, "data": str, "fraction": (int, float), "turns": int, "pairs": str}
SETTINGS = {"dtype": str, "dropout": (int, float), "max_query": int, "max_response": int, "controller_layers": int,
            "prompt_length": (int, type(None)), "train_embeddings": (bool, type(None)), "seed": int}
LEAST = {"fraction": 0, "turns": 1, "dropout": 0, "max_query": 1, "max_response": 1, "controller_layers": 1, "prompt_length": 1}
CHOICES = {"method": tuple(METHODS), "pairs": ("steps", "sliding"), "dtype": ("auto", "float32", "bfloat16")}
MAX_NEW_TOKENS = 40


class Task:
    """What a run trains and is tested on: pairs as text and as tokens, and which test queries the training set has."""

    def __init__(self, config, tokenizer):
        dialogues = read_dialogues(config["data"])
        pairs = {split: make_pairs(d, config["turns"], config["pairs"] == "sliding") for split, d in dialogues.items()}
        known = {key(query) for query, _ in pairs["train"]}
        self.seen = [key(query) in known for query, _ in pairs["test"]]         # known from the whole training split
        pairs["train"] = make_pairs(take_fraction(dialogues["train"], config["fraction"], config["seed"]),
                                    config["turns"], config["pairs"] == "sliding")
        if not pairs["train"]:
            raise ValueError(f"--fraction {config['fraction']} of {config['data']} leaves no pair to train on")
        self.pairs, self.tokenizer = pairs, tokenizer
        self.examples = {split: encode_pairs(p, tokenizer, config["max_query"], config["max_response"])
                         for split, p in pairs.items()}


def choose_device(device, dtype):
    """The flags --device and --dtype -> (torch.device, torch.dtype, why)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, colon, index = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}.get(kind, 0)
    if colon and not index.isdecimal() or int(index or 0) >= there:
        raise UsageError(f"--device {device}: PyTorch finds no such device here, expected cpu, cuda, cuda:1 ... or mps")
    if dtype != "auto":
        return torch.device(device), getattr(torch, dtype), f"--dtype {dtype}"
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    why = f"this {kind} has {'' if fast else 'no '}fast bfloat16"
    return torch.device(device), torch.bfloat16 if fast else torch.float32, why


def open_checkpoint(config):
    """A run's settings -> the tokenizer of its checkpoint, which is checked against the settings."""
    folder = checkpoint_folder(config["model"])
    shape, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    if tokenizer.n_vocab != shape.vocab_size:
        raise ValueError(f"{folder}: vocab.json has {tokenizer.n_vocab} entries, "
                         f"but config.json says vocab_size {shape.vocab_size}")
    query, response, method = config["max_query"], max(config["max_response"], MAX_NEW_TOKENS), METHODS[config["method"]]
    prompt = 0 if method.trains_gpt else config["prompt_length"] or method.default_length or query
    if prompt + query + response > shape.n_positions:
        raise UsageError(f"a prompt of {prompt}, --max-query {query} and a response of {response} tokens are "
                         f"{prompt + query + response}, but {config['model']} has n_positions {shape.n_positions}")
    return tokenizer


def build(config, dtype):
    """A run's settings -> its model, untrained."""
    gpt = GPT.from_pretrained(checkpoint_folder(config["model"]), config["dropout"])
    return PromptedGPT(gpt, config["method"], config["prompt_length"], config["controller_layers"], config["max_query"],
                       config["train_embeddings"], dtype)


def describe(config, model, best):
    """What results.json says of a run, before its test."""
    return {k: config[k] for k in ("method", "model", "data", "fraction", "seed")} | {
        "lr": best["lr"], "epoch": best["epoch"],
        "trainable_parameters": sum(p.numel() for p in model.trained().values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "test": None, "test_unseen": None, "val_bleu4": best["val_bleu4"]}


def gather(part):
    """This process's share of a list (every world-th item) -> the whole list, in order."""
    if not dist.is_initialized():
        return part
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def main_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def share(items):
    return items[dist.get_rank()::dist.get_world_size()] if dist.is_initialized() else items


def mean_loss(model, examples, batch_size=32):
    """Mean cross-entropy per response token; None without examples."""
    model.eval()
    mine, losses = share(examples), []
    with torch.no_grad(), model.autocast():             # around all batches: trained weights, but for wte, are cast once
        for indices in group_by_length(mine, batch_size, slots=model.encoder.slots):
            losses.append(model(make_batch([mine[i] for i in indices], model.encoder.slots).to(model.device)))
    total = sum(gather([sum(torch.stack(losses).tolist()) if losses else 0.0]))
    return total / sum(len(response) for _, response in examples) if examples else None


def respond(model, examples, tokenizer, batch_size=64):
    """Greedy answers to the examples' queries, as text, in their order."""
    model.eval()
    mine = share(examples)
    groups = group_by_length([(query, []) for query, _ in mine], max(1, batch_size // 4))
    batches = (make_batch([mine[i] for i in indices], model.encoder.slots, responses=False).to(model.device)
               for indices in groups)
    found = model.answer(batches, MAX_NEW_TOKENS, tokenizer.eot_token, batch_size=batch_size)
    answers = dict(zip((i for indices in groups for i in indices), found))
    return gather([tokenizer.decode(answers[i]).strip() for i in range(len(mine))])


def test(model, task, folder, results):
    """Score model on the test split -> the results; with a folder, write them and generations.jsonl there."""
    pairs, examples = task.pairs["test"], task.examples["test"]
    training = [response for _, response in task.pairs["train"]]
    outputs = respond(model, examples, task.tokenizer)
    unseen = [i for i, seen in enumerate(task.seen) if not seen]
    for name, chosen in (("test", range(len(pairs))), ("test_unseen", unseen)):
        loss = mean_loss(model, [examples[i] for i in chosen])
        results[name] = all_metrics([outputs[i] for i in chosen], [pairs[i][1] for i in chosen], training, loss)
    lines = [json.dumps({"query": query, "reference": reference, "response": output, "seen": seen}, ensure_ascii=False)
             for (query, reference), output, seen in zip(pairs, outputs, task.seen)]
    if folder and main_process():
        write_text(folder / "generations.jsonl", "\n".join(lines) + "\n")
        write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def write_text(path, text):
    replace(path, lambda file: file.write(text.encode("utf-8")))


def read_json(path, needed):
    """A JSON object from a run's folder, with the keys it needs and the types of their values."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: expected the folder of a finished run") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    wrong = [k for k, kind in needed.items() if not isinstance(contents, dict) or not isinstance(contents.get(k, ...), kind)]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}, or has another type there: was it written by another version "
                         "of this project?")
    return contents


def read_settings(folder, more={}):
    """A run's config.json, checked; more: settings that are needed besides LABELS. Raises ValueError, OSError."""
    path = folder / "config.json"
    config = read_json(path, LABELS | more)
    if config["version"] != VERSION:
        raise ValueError(f"{path} is of version {config['version']}, expected {VERSION}")
    for k in LABELS | more:
        if k in CHOICES and config[k] not in CHOICES[k]:
            raise ValueError(f"{path}: {k} is {config[k]!a}, expected one of {', '.join(CHOICES[k])}")
        if k in LEAST and config[k] is not None and not config[k] >= LEAST[k]:
            raise ValueError(f"{path}: {k} is {config[k]}, expected {LEAST[k]} or more")
    return config


def load_checkpoint(path, needed):
    """best.pt or last.pt of a run."""
    state = load_plain(path)
    if not isinstance(state, dict) or not needed <= state.keys() or not isinstance(state["trained"], dict):
        raise ValueError(f"{path} is not a checkpoint of this project")
    return state


def load_run(folder, device="auto", dtype="auto"):
    """A run's folder -> (settings, model with its best weights, what best.pt says of itself)."""
    config = read_settings(folder, SETTINGS)
    device, dtype, _ = choose_device(device, config["dtype"] if dtype == "auto" else dtype)
    model = build(config, dtype)
    if not (folder / "best.pt").exists():
        raise FileNotFoundError(f"{folder / 'best.pt'} is missing: has the run's first epoch ended?")
    best = load_checkpoint(folder / "best.pt", {"trained", "epoch", "val_bleu4", "lr"})
    model.load_trained(best["trained"])
    return config, model.to(device).eval(), best


# ------------------------------------------------------------------------------------------- tables, figure, and chat

COLUMNS = {"bleu1": "BLEU1", "bleu2": "BLEU2", "bleu3": "BLEU3", "bleu4": "BLEU4", "novelty": "Novelty",
           "diversity": "Diversity", "nist": "NIST", "rouge_l": "ROUGE-L", "distinct1": "Dist-1", "distinct2": "Dist-2",
           "length": "Length", "perplexity": "PPL"}
DIGITS = dict.fromkeys(COLUMNS, 3) | {"nist": 2, "length": 1, "perplexity": 1}


def spread(values, digits):
    """Several seeds' values -> mean ± sample standard deviation; a single one alone."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows):
    """[(label, label, [M, ...]), ...] -> a Markdown table, one line for each row, seeds averaged."""
    lines = ["| Data | Method | " + " | ".join(COLUMNS.values()) + " |", "|---|---|" + "---:|" * len(COLUMNS)]
    for data, method, results in rows:
        cells = [spread([r[c] for r in results], DIGITS[c]) for c in COLUMNS]
        lines.append(f"| {data} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lookup_results(data, turns=1, pairs="steps"):
    """The dictionary's scores on a data set -> {"test": M, "test_unseen": M}."""
    splits = {split: make_pairs(d, turns, pairs == "sliding") for split, d in read_dialogues(data).items()}
    lookup, training = Lookup(splits["train"]), [response for _, response in splits["train"]]
    unseen = [pair for pair in splits["test"] if key(pair[0]) not in lookup.answers]
    return {name: all_metrics([lookup.answer(q) for q, _ in chosen], [r for _, r in chosen], training, None)
            for name, chosen in (("test", splits["test"]), ("test_unseen", unseen))}


def finished_runs(path):
    """All runs below a folder, as [(settings, results), ...]."""
    files = sorted(Path(path).rglob("results.json"))
    if not files:
        raise FileNotFoundError(f"{path} holds no finished run (no results.json below it)")
    runs = [(read_settings(file.parent), read_json(file, {"test": dict, "test_unseen": dict})) for file in files]
    for file, (_, results) in zip(files, runs):
        if not {"n", *COLUMNS} <= results["test"].keys() & results["test_unseen"].keys():
            raise ValueError(f"{file} lacks metrics: was it written by another version of this project?")
    return runs


def ablation(config):
    """What of a method was set otherwise than by default: such a run is another row, not another seed."""
    usual = {"prompt_length": None, "controller_layers": 2, "train_embeddings": None}
    return "".join(f", {k.replace('_', ' ')} {config[k]}" for k in usual if config.get(k, usual[k]) != usual[k])


def context(config):
    """What a query is, if not the turn before the response."""
    return f", {config['turns']} turns" * (config["turns"] > 1) + ", sliding" * (config["pairs"] == "sliding")


def mixed(configs):
    """For a row's label: settings in which its runs differ, the seed aside. Their mean is not one over seeds alone."""
    differ = [k for k in configs[0] if k != "seed" and any(c.get(k) != configs[0][k] for c in configs)]
    return f" (mixed {', '.join(differ)})" if differ else ""


def table(path):
    """Runs below a folder -> Markdown: for each data set and model the papers' table, for all and unseen test pairs."""
    groups = defaultdict(lambda: defaultdict(list))
    for config, results in finished_runs(path):
        group = groups[config["data"], config["turns"], config["pairs"], config["model"]]
        group[config["fraction"], config["method"], ablation(config)].append((config, results))
    text = []
    for (data, turns, pairs, model), rows in sorted(groups.items()):
        try:
            lookup = lookup_results(data, turns, pairs)
        except (OSError, ValueError):                   # the data may have moved since
            lookup = None
        order = list(METHODS)
        for part, name in (("test", "test pairs"), ("test_unseen", "unseen test pairs")):
            lines = []
            for row in sorted(rows, key=lambda row: (row[0], order.index(row[1]), row[2])):
                (fraction, method, more), (configs, results) = row, zip(*rows[row])
                lines.append((f"{100 * fraction:g}%", method + more + mixed(configs), [r[part] for r in results]))
            if lookup:
                lines.append(("100%", "lookup", [lookup[part]]))
            title = f"{data}, {model}{context(configs[0])}: {lines[0][2][0]['n']:,} {name}"
            text += [f"**{title}**", "", markdown(lines), ""]
    return "\n".join(text)


def plot(path):
    """Figure 2 of Valvoda et al.: one panel a metric, one line for each method and model -> the files written."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    lines = defaultdict(lambda: defaultdict(list))
    for config, results in finished_runs(path):
        name = config["data"] + context(config), config["method"] + ablation(config), config["model"]
        if results["test"]["n"]:                        # without test pairs, its metrics are null
            lines[name][config["fraction"]].append(results["test"])
    data, methods, models = ({k[i]: None for k in sorted(lines)} for i in range(3))
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for panel, metric in zip(panels, ("bleu4", "novelty", "diversity")):
        for name, points in sorted(lines.items()):
            _, method, model = name
            x = sorted(points)
            label = ", ".join(n for n, many in zip(name, (data, methods, models)) if len(many) > 1 or n == method)
            panel.plot([100 * f for f in x], [statistics.fmean(r[metric] for r in points[f]) for f in x],
                       color=f"C{list(methods).index(method)}", linestyle="--" if "dialogpt" in model.lower() else "-",
                       marker="o", markersize=4, label=label)
        panel.set_title(COLUMNS[metric])
        panel.set_xlabel("training data (%)")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    files = [Path(path) / "figure2.png", Path(path) / "figure2.svg"]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def chat(folder, device, dtype, temperature, top_p):
    """Talk to a run: it reads the last N turns, as it was trained to. End of input or Ctrl-C ends."""
    config, model, _ = load_run(folder, device, dtype)
    tokenizer = open_checkpoint(config)
    print(f"{config['method']} on {config['model']} reads the last {config['turns']} turn(s). Ctrl-D or Ctrl-C ends.")
    sys.stdin.reconfigure(errors="replace")
    turns = []
    try:
        while True:
            said = input("you: ").strip()
            if not said:
                continue
            turns = (turns + [said])[-config["turns"]:]
            example = encode_pairs([(turns, "")], tokenizer, config["max_query"], config["max_response"])
            batch = make_batch(example, model.encoder.slots, responses=False).to(model.device)
            ids, = model.answer([batch], MAX_NEW_TOKENS, tokenizer.eot_token, temperature, top_p)
            turns.append(tokenizer.decode(ids).strip())
            print(f"{config['method']}: {turns[-1]}", flush=True)
    except (EOFError, KeyboardInterrupt):
        print()


def export(folder, target):
    config, model, _ = load_run(folder, "cpu", "float32")
    if config["method"] != "finetune":
        raise ValueError(f"{folder} is a {config['method']} run: only finetune runs change the GPT itself")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty, expected a new folder")
    model.gpt.save_pretrained(target)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(checkpoint_folder(config["model"]) / file, target / file)
    print(f"wrote {target}: load it with transformers, or with --model {target}")


def report(results, examples=()):
    """A run's test table, and some answers."""
    name = f"{results['method']}, {results['model']}"
    rows = [(f"{part.replace('_', ', ')} ({results[part]['n']:,} pairs)", name, [results[part]])
            for part in ("test", "test_unseen")]
    text = [f"\n    query: {' / '.join(e['query'])}\nreference: {e['reference']}\n response: {e['response']}"
            for e in examples]
    return "\n".join([markdown(rows), *text])


# ------------------------------------------------------------------------------------------------------- command line

class UsageError(ValueError):
    """The command line asks for something that cannot be."""


def run_command(main):
    """Run main(); what a user can cause ends in one sentence: status 2 for usage, 1 for data, checkpoint or folder."""
    sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")      # who starts us may close them
    sys.stdout.reconfigure(errors="replace")            # a log file on Windows cannot hold every character
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shown = parser.add_argument, " (default: %(default)s)"
    add("path", type=Path, nargs="?", help="a run's folder; for --table and --plot, a folder with runs below it")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--chat", action="store_true", help="talk to the run")
    modes.add_argument("--export", type=Path, metavar="FOLDER", help="write a finetune run as a checkpoint folder")
    modes.add_argument("--table", action="store_true", help="print all runs below the folder, in Markdown")
    modes.add_argument("--plot", action="store_true", help="draw all runs below the folder: figure2.png and .svg there")
    modes.add_argument("--lookup", action="store_true", help="score the dictionary that answers seen queries by heart")
    add("--data", default="sample", help="for --lookup: sample, dailydialog, multiwoz or a folder" + shown)
    add("--temperature", type=float, default=0.0, help="for --chat: 0 is greedy, 1 samples from the model's own distribution" + shown)
    add("--top-p", type=float, default=1.0, help="for --chat: sample from this share of the probability" + shown)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..." + shown)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the products; auto: as the run was asked for")
    args = parser.parse_args()
    if args.temperature < 0 or not math.isfinite(args.temperature):
        parser.error(f"--temperature {args.temperature}: expected 0 or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: expected more than 0 and at most 1")
    if args.path is None and not args.lookup:
        parser.error("a run's folder is expected (or --lookup)")
    if args.lookup:
        results = lookup_results(args.data)
        print(markdown([(f"{args.data}, {part.replace('_', ', ')} ({m['n']:,} pairs)", "lookup", [m])
                        for part, m in results.items()]))
    elif args.table:
        print(table(args.path))
    elif args.plot:
        print("wrote", *plot(args.path))
    elif args.chat:
        chat(args.path, args.device, args.dtype, args.temperature, args.top_p)
    elif args.export:
        export(args.path, args.export)
    else:
        config, model, best = load_run(args.path, args.device, args.dtype)
        finished = (args.path / "results.json").exists()        # a run that can be resumed must not come to look finished
        results = test(model, Task(config, open_checkpoint(config)), args.path if finished else None,
                       describe(config, model, best))
        print(report(results) + "\n\nThe run is unfinished: nothing was written." * (not finished))


if __name__ == "__main__":
    run_command(main)
