"""What do the papers' curves of BLEU and novelty measure? See it in a miniature of DailyDialog, on a laptop.

    python tests/leak.py --data dailydialog             train, measure, draw: runs/leak/figure2.png and table.md
    python tests/leak.py --data dailydialog --null      score a fake that understands nothing, on all test pairs

Of DailyDialog's test queries 31% are training queries, too, and 18% of its test pairs stand in the training set as they
are. The miniature keeps both shares. Its control, with the same test pairs, has none of their queries in training.
A finished run is a line of results.jsonl; what stands there is not run again.
"""
import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch

from conftest import ROOT
from data import checkpoint_folder, encode_pairs, load_tokenizer, make_pairs, query_key, read_dialogues
from evaluate import corpus_bleu, diversity, novelty
from model import GPT
from prompt_encoder import PromptedGPT, group_by_length

CONTROLLER = {"method": "dynamic", "controller_layers": 6}              # as deep as tiny-dialogpt
METHODS = {     # name -> colour, learning rates to choose from, and PromptedGPT's arguments
    "finetune": ("C0", (1e-3, 3e-4), {"method": "finetune"}),
    "soft": ("C1", (3e-3, 1e-3), {"method": "soft"}),
    "dynamic": ("C2", (3e-3, 1e-3), CONTROLLER | {"controller_init": "random"}),
    "dynamic from the GPT": ("C3", (3e-3, 1e-3), CONTROLLER | {"controller_init": "gpt"}),
}       # At a third of the lower rate the validation loss is lower still, but nothing is known by heart in 12 epochs.
SEEDS, EPOCHS = (0, 1, 2), 12
MEASURED = (1, 4, 8, 12)                                # the epochs after which the model answers the test queries
SETTINGS = ("leak", 1.0), ("leak", 0.25), ("control", 1.0)              # and the share of the training pairs
CONTROL = ("finetune", "dynamic from the GPT")          # the methods that are trained without the leak, too


# ---------------------------------------------------------------------------------------------------------- the pairs

def miniature(pairs, split, size, seed, leak=True):
    """200 short pairs of a split and `size` of the training set -> training pairs, test pairs, which of these are seen.

    A test pair whose query is a training query gets its twin: the training pair with the same response, or else the
    first with the same query. The other training pairs are drawn from those with none of the test queries. Without the
    leak all are; the test pairs are the same."""
    draw = random.Random(seed)
    short = {s: [pair for pair in pairs[s] if max(len(turn.split()) for turn in (*pair[0], pair[1])) <= 12]
             for s in ("train", split)}
    test = draw.sample(short[split], 200)
    queries, same, others = {query_key(query) for query, _ in test}, defaultdict(list), []
    for pair in short["train"]:
        key = query_key(pair[0])
        (same[key] if key in queries else others).append(pair)
    seen = [query_key(query) in same for query, _ in test]
    twins = [max(same[query_key(query)], key=lambda pair: pair[1] == response)
             for (query, response), known in zip(test, seen) if known and leak]
    train = twins + draw.sample(others, size - len(twins))
    return draw.sample(train, size), test, seen


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


# --------------------------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def swap_test(model, examples):
    """What another query's prompt costs, in nats per token, among queries of equal length."""
    groups = defaultdict(list)
    for example in examples:
        groups[len(example[0])].append(example)
    groups = [group for group in groups.values() if len(group) > 1]
    own, other = (torch.cat([model(group, swapped=swapped) for group in groups]).mean() for swapped in (False, True))
    return (other - own).item()


@torch.no_grad()
def measure(model, tokenizer, train, test, seen, answer):
    """The loss per token on all, on seen and on unseen queries and, where it is to answer, BLEU4 and novelty."""
    examples, known = encode_pairs(test, tokenizer), [response for _, response in train]
    losses, answers, result = [None] * len(test), [None] * len(test), {}
    for batch in group_by_length([len(query) + len(response) for query, response in examples], 25):
        queries, responses = zip(*(examples[i] for i in batch))
        said = model.generate(queries) if answer else responses
        for i, loss, ids in zip(batch, model(list(zip(queries, responses))).split([len(r) for r in responses]), said):
            losses[i], answers[i] = loss, tokenizer.decode(ids)
    for name, wanted in ("all", (True, False)), ("seen", (True,)), ("unseen", (False,)):
        part = [i for i in range(len(test)) if seen[i] in wanted]
        result[name] = {"n": len(part), "loss": torch.cat([losses[i] for i in part]).mean().item()}
        if answer:
            said, gold = [answers[i] for i in part], [test[i][1] for i in part]
            result[name] |= {"bleu4": corpus_bleu(said, gold), "novelty": novelty(said, known),
                             "gold": novelty(gold, known)}      # the references' own novelty
    return result


# ---------------------------------------------------------------------------------------------------------- training

def epochs(name, rate, batch_size, seed, train, test, seen, measured):
    """Train a method at a constant learning rate, without dropout, and give back what is measured after each epoch."""
    folder = checkpoint_folder("tiny-dialogpt")
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    model = PromptedGPT(GPT.from_pretrained(folder), **METHODS[name][2])
    optimizer = torch.optim.AdamW(model.trained().values(), lr=rate, weight_decay=0.01, fused=True)
    examples = encode_pairs(train, tokenizer)
    lengths = [model.encoder.prompt_length(len(query)) + len(query) + len(response) for query, response in examples]
    for epoch in range(1, EPOCHS + 1):
        model.train()
        total = tokens = 0
        for batch in group_by_length(lengths, batch_size, seed=1000 * seed + epoch):
            losses = model([examples[i] for i in batch])
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total, tokens = total + losses.sum().item(), tokens + len(losses)
        model.eval()
        result = {"epoch": epoch, "train_loss": total / tokens}
        if measured is None or epoch in measured:
            result |= measure(model, tokenizer, train, test, seen, answer=measured is not None)
        if measured is not None and epoch == EPOCHS:
            result["swap"] = swap_test(model, encode_pairs(test, tokenizer))
        yield result


def experiment(pairs, size, file):
    """Tune, train and measure whatever is not yet in the file -> its lines."""
    done = {line["run"]: line for line in map(json.loads, file.read_text().splitlines())} if file.exists() else {}

    def once(run, name, rate, seed, train, test, seen, measured):
        if run not in done:
            start, results = time.time(), []
            for result in epochs(name, rate, size // 25, seed, train, test, seen, measured):
                results.append(result)
                if measured is None and len(results) > 1 and result["all"]["loss"] > results[-2]["all"]["loss"]:
                    break                               # the best validation loss stands behind us
            done[run] = {"run": run, "rate": rate, "seconds": round(time.time() - start), "epochs": results}
            with open(file, "a") as lines:
                lines.write(json.dumps(done[run]) + "\n")
            print(run, done[run]["seconds"], "s", results[-1], flush=True)
        return done[run]["epochs"]

    rates = {}
    for name, (_, choices, _) in METHODS.items():
        best = {rate: min(result["all"]["loss"] for result in
                          once(f"tuning {name} {rate}", name, rate, 0, *miniature(pairs, "validation", size, 0), None))
                for rate in choices}
        rates[name] = min(best, key=best.get)
    for what, fraction in SETTINGS:
        for seed in SEEDS:
            train, test, seen = miniature(pairs, "test", size, seed, what == "leak")
            for name in METHODS if what == "leak" else CONTROL:
                once(f"{what} {fraction} {name} {seed}", name, rates[name], seed, train[:round(fraction * size)], test,
                     seen, MEASURED if (what, fraction) == SETTINGS[0] else MEASURED[-1:])
    return done


# ------------------------------------------------------------------------------------------------- table and figure

def over_seeds(done, what, fraction, name, epoch=EPOCHS):
    return [done[f"{what} {fraction} {name} {seed}"]["epochs"][epoch - 1] for seed in SEEDS]


def table(done):
    """What is measured after the last epoch, as Markdown: mean over the seeds ± standard deviation."""
    columns = [("train_loss",), ("all", "loss"), *((part, key) for key in ("bleu4", "novelty", "gold")
                                                   for part in ("seen", "unseen", "all")), ("swap",)]
    rows = [["training pairs", "method", *(" ".join(column) for column in columns)],
            ["---"] * 2 + ["---:"] * len(columns)]
    for what, fraction in SETTINGS:
        for name in METHODS if what == "leak" else CONTROL:
            results = over_seeds(done, what, fraction, name)
            rows.append([f"{what}, {fraction:.0%}", name])
            for *part, key in columns:
                values = [(result[part[0]] if part else result)[key] for result in results]
                rows[-1].append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def draw(done, size, file):
    """BLEU4 and novelty on seen and unseen queries: over epochs, over training pairs, with the leak and without it."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    panels = figure.subplots(2, 3, sharex="col", sharey="row", width_ratios=(4, 3, 3))
    fractions = sorted(fraction for what, fraction in SETTINGS if what == "leak")

    def curves(name):                                   # for each column of panels: places on its x axis, results there
        yield MEASURED, [over_seeds(done, "leak", 1.0, name, epoch) for epoch in MEASURED]
        yield [fraction * size for fraction in fractions], [over_seeds(done, "leak", f, name) for f in fractions]
        if name in CONTROL:
            yield (0, 1), [over_seeds(done, what, 1.0, name) for what in ("leak", "control")]

    def plot(row, name, metric, **look):
        for panel, (x, points) in zip(panels[row], curves(name)):
            for part, style in ("seen", "-"), ("unseen", "--"):
                values = [[result[part][metric] for result in point] for point in points]
                panel.plot(x, [statistics.mean(v) for v in values], style, **look)
                low, high = [min(v) for v in values], [max(v) for v in values]
                panel.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0)

    for name, (colour, _, _) in METHODS.items():
        plot(0, name, "bleu4", color=colour, marker="o", markersize=5)
        plot(1, name, "novelty", color=colour, marker="o", markersize=5)
    plot(1, "finetune", "gold", color="0.4", lw=1)      # the references' own novelty is the same for all methods

    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=12)
    panels[0, 0].set_title(f"training goes on: {size} pairs", fontsize=14)
    panels[0, 1].set_title(f"more data: {EPOCHS} epochs each", fontsize=14)
    panels[0, 2].set_title("the leak is taken away", fontsize=14)
    panels[0, 0].set_ylabel("BLEU4", fontsize=14)
    panels[1, 0].set_ylabel("novelty", fontsize=14)
    panels[1, 0].set_xlabel("epochs", fontsize=13)
    panels[1, 1].set_xlabel("training pairs", fontsize=13)
    panels[1, 0].set_xticks(MEASURED)
    panels[1, 1].set_xticks([fraction * size for fraction in fractions])
    panels[1, 2].set_xticks((0, 1), ("leak", "no leak"))
    panels[1, 2].set_xlim(-0.2, 1.2)
    seen = [result["seen"]["n"] for result in over_seeds(done, "leak", 1.0, "finetune")]
    figure.suptitle(f"200 test pairs of DailyDialog, of which {min(seen)} to {max(seen)} have a query that is a "
                    f"training query, too ({len(SEEDS)} seeds: mean and range)", fontsize=15)
    lines = [Line2D([], [], color=colour, marker="o", label=name) for name, (colour, _, _) in METHODS.items()]
    lines += [Line2D([], [], color="0.4", lw=1, label="the references' novelty"),
              Line2D([], [], color="k", label="seen queries"),
              Line2D([], [], color="k", ls="--", label="unseen queries")]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=12)
    figure.savefig(file)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="dailydialog", help="dailydialog, or a folder that holds it")
    p.add_argument("--pairs", type=int, default=200, help="training pairs; an epoch is 25 batches of them")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "leak", help="folder for results, table and figure")
    p.add_argument("--null", action="store_true", help="score the fake instead")
    args = p.parse_args()
    pairs = {split: make_pairs(dialogues) for split, dialogues in read_dialogues(args.data).items()}
    if args.null:
        null(pairs)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    done = experiment(pairs, args.pairs, args.out / "results.jsonl")
    (args.out / "table.md").write_text(table(done), encoding="utf-8")
    draw(done, args.pairs, args.out / "figure2.png")


if __name__ == "__main__":
    main()
