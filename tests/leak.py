"""What do the papers' curves of BLEU and novelty measure? See it in a miniature of DailyDialog, on a laptop.

    python tests/leak.py --data dailydialog             train, measure, draw: runs/leak/table.md and figure2.png
    python tests/leak.py --data dailydialog --null      score a fake that understands nothing, on all test pairs

Of DailyDialog's test queries 31% are training queries, too. The miniature, 400 short training pairs and 200 test pairs,
keeps this share, and is trained on for up to 20 epochs; the control has the same test pairs and none of their queries
in training. What has been trained is not trained again; `--seeds 0` does a part.
"""
import argparse
import itertools
import random
import statistics
from math import isnan, log, nan
from pathlib import Path

from conftest import ROOT
from data import make_pairs, query_key, read_dialogues, read_json, take_fraction
from evaluate import COLORS, corpus_bleu, diversity, markdown, mean_std, novelty, read_lines
from train import train

METHODS = {"finetune": {"method": "finetune", "dropout": 0.0}, "soft": {"method": "soft"},
           "dynamic": {"method": "dynamic", "controller_init": "random"},
           "dynamic, from the GPT": {"method": "dynamic", "controller_init": "gpt"}}
CONTROL = ("finetune", "dynamic, from the GPT")         # the methods that are trained without the leak, too
RATES = (3e-4, 1e-3, 3e-3)                              # the validation part chooses each method's
EPOCHS, FRACTIONS = (1, 5, 20), (0.25, 1.0)
MEASURED = ("loss", "bleu4 seen", "bleu4 unseen", "bleu4 all", "novelty seen", "novelty unseen", "novelty all", "swap")


def miniature(pairs, split, seed, leak=True):
    """400 training pairs of at most 12 words a turn, and 200 such pairs of the split -> train, test.

    A test pair whose query is a training query brings its twin into the training pairs: the one with the same response,
    or else the first with the same query. The other training pairs have none of the test queries."""
    draw = random.Random(seed)
    short = {s: [pair for pair in pairs[s] if max(len(turn.split()) for turn in (*pair[0], pair[1])) <= 12]
             for s in ("train", split)}
    test = draw.sample(short[split], 200)
    twins, others = {query_key(query): [] for query, _ in test}, []
    for pair in short["train"]:
        twins.get(query_key(pair[0]), others).append(pair)
    found = [(twins[query_key(query)], response) for query, response in test if leak]
    chosen = [max(same, key=lambda pair: pair[1] == response) for same, response in found if same]
    return draw.sample(chosen + draw.sample(others, 400 - len(chosen)), 400), test


def trained(args, pairs, name, lr, seed=0, leak=True, fraction=1.0, epochs=20, split="test"):
    """The folder of a run on the miniature, trained unless it has been."""
    folder = args.out / f"{name}-{lr}-{'leak' if leak else 'control'}-{fraction}-{epochs}-{split}-s{seed}"
    if not (folder / "results.json").exists():
        known, test = miniature(pairs, split, seed, leak)
        # The best epoch is the one with the lowest loss on these: to know the training pairs by heart, or, to tune.
        validation = take_fraction(known, fraction, seed)[:25] if split == "test" else test
        data = {"train": known, "validation": validation, "test": test}
        train(data={part: [[*query, response] for query, response in chosen] for part, chosen in data.items()},
              lr=lr, seed=seed, fraction=fraction, epochs=epochs, patience=epochs if split == "test" else 2,
              select="loss", out=folder, overwrite=True, **METHODS[name])
    return folder


def measure(folder):
    """A finished run -> {name: value} for MEASURED; without the leak no test query is seen."""
    results = read_json(folder / "results.json")
    everything, unseen = results["test"], results["test_unseen"]
    seen = [line for line in read_lines(folder / "generations.jsonl") if line["seen"]]
    novel = everything["novelty"] * everything["n"] - unseen["novelty"] * unseen["n"]
    return {"loss": log(everything["perplexity"]), "swap": results["swap"],
            "bleu4 seen": corpus_bleu(*zip(*[(line["response"], line["reference"]) for line in seen])) if seen else nan,
            "bleu4 unseen": unseen["bleu4"], "bleu4 all": everything["bleu4"],
            "novelty seen": novel / len(seen) if seen else nan, "novelty unseen": unseen["novelty"],
            "novelty all": everything["novelty"]}


def experiment(args, pairs):
    """Tune and train all that is missing -> {(method, leak, fraction, epochs): [what each seed measures]}."""
    found = {}
    for name in METHODS:
        tuning = {rate: measure(trained(args, pairs, name, rate, split="validation"))["loss"] for rate in RATES}
        rate = min(tuning, key=tuning.get)
        settings = [(True, 1.0, epochs) for epochs in EPOCHS] + [(True, f, EPOCHS[-1]) for f in FRACTIONS[:-1]]
        if name in CONTROL:
            settings.append((False, 1.0, EPOCHS[-1]))
        for setting in settings:
            found[name, *setting] = [measure(trained(args, pairs, name, rate, seed, *setting)) for seed in args.seeds]
    return found


def table(found):
    """What is measured after the last epoch, as Markdown: mean over the seeds ± standard deviation."""
    rows = []
    for (name, leak, fraction, epochs), seeds in found.items():
        if epochs == EPOCHS[-1]:
            cells = {what: mean_std([seed[what] for seed in seeds if not isnan(seed[what])], 3) for what in MEASURED}
            trained_on = f"{400 * fraction:.0f}{'' if leak else ', no leak'}"
            rows.append({"training pairs": trained_on, "method": name, **cells})
    return markdown(sorted(rows, key=lambda row: row["training pairs"], reverse=True)) + "\n"


def draw(found, file):
    """BLEU4 and novelty on seen and unseen queries, over epochs and over training pairs: means and ranges."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 3, sharex="col", sharey="row")
    last = EPOCHS[-1]
    columns = [("epochs, 400 pairs", {e: (True, 1.0, e) for e in EPOCHS}),
               (f"training pairs, {last} epochs", {400 * f: (True, f, last) for f in FRACTIONS}),
               ("400 pairs with (0) and without (1) the leak", {0: (True, 1.0, last), 1: (False, 1.0, last)})]
    for row, metric in zip(panels, ("bleu4", "novelty")):
        row[0].set_ylabel(metric)
        for panel, (title, points) in zip(row, columns):
            panel.set(xticks=list(points), xlabel=title if metric == "novelty" else "")
            panel.grid(alpha=0.3)
            for name, part in itertools.product(METHODS, ("seen", "unseen")):
                results = [found.get((name, *setting)) for setting in points.values()]
                if all(results):
                    values = [[seed[f"{metric} {part}"] for seed in seeds] for seeds in results]
                    color = COLORS.get(name, "black")
                    panel.plot(list(points), [*map(statistics.mean, values)], "-o" if part == "seen" else ":o",
                               color=color, label=f"{name}, {part}")
                    panel.fill_between(list(points), [*map(min, values)], [*map(max, values)], color=color, alpha=0.1)
    figure.suptitle("Miniature of DailyDialog: 200 test pairs, queries seen (solid) and unseen (dotted) in training; "
                    "means and ranges over seeds")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=100)


def null(pairs, seed=0):
    """Score a fake: it recites half of the leaked test pairs, and else glues halves of random training responses."""
    draw, responses = random.Random(seed), [response for _, response in pairs["train"]]
    known = {(query_key(query), response) for query, response in pairs["train"]}
    leaked = [i for i, (query, response) in enumerate(pairs["test"]) if (query_key(query), response) in known]
    gold, said = [response for _, response in pairs["test"]], []
    for _ in gold:
        first, second = draw.choice(responses).split(), draw.choice(responses).split()
        said.append(" ".join(first[:len(first) // 2] + second[len(second) // 2:]))
    for i in draw.sample(leaked, len(leaked) // 2):
        said[i] = gold[i]
    bleu = " ".join(f"{corpus_bleu(said, gold, n):.3f}" for n in (1, 2, 3, 4))
    print(f"{len(gold)} test pairs, {len(leaked)} of them leaked: BLEU-1..4 {bleu}, "
          f"novelty {novelty(said, responses):.3f}, diversity {diversity(said):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="dailydialog", help="dailydialog, or a folder that holds it")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "leak", help="folder for runs, table and figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--null", action="store_true", help="score the fake instead")
    args = parser.parse_args()
    pairs = {split: make_pairs(dialogues) for split, dialogues in read_dialogues(args.data).items()}
    if args.null:
        null(pairs)
    else:
        found = experiment(args, pairs)
        (args.out / "table.md").write_text(table(found), encoding="utf-8")
        draw(found, args.out / "figure2.png")
