"""GPT-2 from scratch, in one file that works alone: the model, its checkpoints on disk, and text generation.

The names are those of the published checkpoints (wte, wpe, h, ln_1, attn.c_attn, mlp.c_fc ...), so loading is one loop.

Shape letters, the same in every file of this project:
    B batch    T tokens    S keys, those of the past included    C embedding width    H heads    D = C / H    L layers
    V vocabulary    P prompt length

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""
import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------- the network

@dataclass
class GPTConfig:
    """The shape of a GPT-2. The defaults are the smallest published one's (124M parameters)."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None              # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0                    # in training only: on embeddings, attention and residual branches


class Dropout(nn.Dropout):
    """In training, each number becomes 0 with probability p, and the others grow by 1 / (1 - p).

    PyTorch's own draws them one by one on a CPU, a fifth of all training. In bfloat16, 64 random bits serve four places
    here; float32 stays as it is, equal to transformers draw by draw.
    """

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        kept = bits[:x.numel()].view(x.shape) >= self.p * 2**16 - 2**15         # int16 begins at -2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


def attend(q, k, v, mask, dropout):
    """Queries (B, H, T, D), keys and values (B, H, S, D) -> (B, H, T, D). mask None: the causal triangle. dropout: a module.

    softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, equation 1): spelt out where that is twice as fast as PyTorch's
    kernel, which never holds all T * S scores at once: in bfloat16 training on a CPU, on rows as short as dialogue's.
    """
    T, S = q.size(2), k.size(2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and S <= 256:
        readable = torch.ones(T, S, dtype=torch.bool).tril() if mask is None else mask
        bias = torch.zeros(readable.shape, dtype=q.dtype).masked_fill(~readable, -math.inf)
        scores = q / math.sqrt(q.size(3)) @ k.transpose(2, 3) + bias                        # (B, H, T, S)
        return dropout(scores.softmax(dim=-1)) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                          dropout_p=dropout.p if dropout.training else 0.0)


class Linear(nn.Linear):
    """nn.Linear, but where no gradient is wanted, a CPU computes the transpose y^T = W x^T + b: (out, in) (in, N) -> (out, N).

    With W on the left PyTorch need not rearrange it for every product, which takes a third of the time when rows are few,
    as in answering. y lies transposed in memory; attention would have to copy its q, k and v, so these come from an nn.Linear.
    """

    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        y = torch.addmm(self.bias[:, None], self.weight, x.reshape(-1, self.in_features).t())   # (out, N)
        return y.t().reshape(*x.shape[:-1], self.out_features)


class Attention(nn.Module):
    """Causal self-attention: every position reads itself and what stands before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.drop = config.n_head, Dropout(config.dropout)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)       # queries, keys and values in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, extend=None):
        """x (B, T, C) -> (B, T, C).

        mask: which keys each position may read, broadcastable to (B, H, T, S); None: the causal triangle.
        extend: a function (k, v) -> (k, v) that puts earlier keys and values in front; see `Past`.
        """
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)      # (B, T, C) -> (B, H, T, D)
                   for t in self.c_attn(x).split(C, dim=2))
        if extend is not None:
            k, v = extend(k, v)                                                     # (B, H, T, D) -> (B, H, S, D)
        y = attend(q, k, v, mask, self.drop)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))                      # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner)
        self.c_proj = Linear(inner, config.n_embd)

    def forward(self, x):
        h = self.c_fc(x)
        # GPT-2 was trained with the tanh form of GELU; the exact form differs by up to 5e-4 per activation. In bfloat16
        # rounding does seven times as much to the logits, and the exact form's kernel is four times as fast on a CPU.
        form = "none" if h.dtype == torch.bfloat16 and h.device.type == "cpu" else "tanh"
        return self.c_proj(F.gelu(h, approximate=form))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout)

    def forward(self, x, mask=None, extend=None):
        x = x + self.drop(self.attn(self.ln_1(x), mask, extend))
        return x + self.drop(self.mlp(self.ln_2(x)))


def init_weights(module):
    """GPT-2's initialisation, for `Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class Past:
    """Keys and values that every layer reads before its own: a prompt written straight into the GPT's memory.

    kv: (L, 2, B or 1, H, P, D). The row itself follows at positions P, P + 1, ...
    """

    def __init__(self, kv):
        self.kv = kv

    def positions(self, T):
        """Where the next T tokens stand: (T,), the same for every row."""
        P = self.kv.size(-2)
        return torch.arange(P, P + T, device=self.kv.device)

    def extend(self, layer, k, v):
        """The keys and values of the row (B, H, T, D) -> the same with the earlier ones in front (B, H, P + T, D)."""
        return [torch.cat((old.expand(new.size(0), -1, -1, -1).to(new.dtype), new), dim=2)
                for old, new in zip(self.kv[layer], (k, v))]


class Cache(Past):
    """Unlike a plain `Past`, a cache remembers what it is shown, so that each new token costs one position.

    A first pass shows it whole rows, padded on the right. `join` puts the rows of several first passes together. From
    then on `lengths` (B,) says how many positions of each row are real: the next token is written at that place, over the
    padding, and reads the places up to its own.
    """

    def __init__(self, kv=None):
        super().__init__(kv)
        self.layers, self.lengths = [], None            # for each layer keys and values (places, H, size, D)

    def positions(self, T):
        if self.lengths is None:
            return super().positions(T)                                                     # (T,)
        self.rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.end = int(self.lengths.max()) + 1          # once for all layers: on a GPU, to ask for a number is to wait
        return self.lengths[:, None]                                                        # (B, 1)

    def extend(self, layer, k, v):
        if self.lengths is None:
            self.layers.append(super().extend(layer, k, v))                                 # (B, H, P + T, D)
            return self.layers[layer]
        for kept, new in zip(self.layers[layer], (k, v)):
            kept[self.rows, :, self.lengths] = new[:, :, 0]                                 # row b at its place lengths[b]
        return [kept[:len(self.rows), :, :self.end] for kept in self.layers[layer]]

    def join(self, first, lengths, places, size):
        """Take in the rows of another cache's first pass, lengths (b,), with room for `places` rows of `size` positions."""
        if self.lengths is None:
            self.layers = [[t.new_zeros(0, t.size(1), 0, t.size(3)) for t in pair] for pair in first.layers]
            self.lengths = lengths[:0]
        B = len(self.lengths)
        self.lengths = torch.cat((self.lengths, lengths))
        for kept, new in zip(self.layers, first.layers):
            for i in range(2):
                more = [max(0, wanted - there) for wanted, there in zip((size, places), (kept[i].size(2), len(kept[i])))]
                if any(more):
                    kept[i] = F.pad(kept[i], (0, 0, 0, more[0], 0, 0, 0, more[1]))
                kept[i][B:len(self.lengths), :, :new[i].size(2)] = new[i]

    def leave(self, holes, movers, B):
        """B rows remain: those at `movers` fill the `holes` of rows that have finished, so little is copied."""
        for kept in (*(t for pair in self.layers for t in pair), self.lengths):
            kept[holes] = kept[movers]
        self.lengths = self.lengths[:B]


class GPT(nn.Module):
    """GPT-2 with the output layer tied to the word embedding.

    >>> gpt = GPT.from_pretrained("tiny/tiny-gpt2")
    >>> gpt(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4096])
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):      # 2L branches add into the residual stream: it must not grow with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, ids, past=None):
        """Token ids (B, T) int64 -> logits (B, T, V). `past`: see `transform`."""
        return self.logits(self.transform(self.wte(ids), past))

    def transform(self, x, past=None):
        """Input embeddings (B, T, C), without positions -> last hidden states (B, T, C).

        The door for prompts: vectors enter as part of x, key/value pairs as a `Past`. Raises ValueError for more positions
        than the model has.
        """
        T, mask = x.size(1), None
        positions = torch.arange(T, device=x.device) if past is None else past.positions(T)             # (T,) or (B, T)
        S = T if past is None else int(positions.max()) + 1
        if S > self.config.n_positions:
            raise ValueError(f"{S} positions are asked for, but the model's n_positions is {self.config.n_positions}")
        if past is not None:
            mask = (torch.arange(S, device=x.device) <= positions[..., None]).view(-1, 1, T, S)         # (1 or B, 1, T, S)
        x = self.drop(x.to(self.ln_f.weight.dtype) + self.wpe(positions))       # the residual stream: float32, as norms are
        for layer, block in enumerate(self.h):
            x = block(x, mask, past and functools.partial(past.extend, layer))
        return self.ln_f(x)

    def logits(self, hidden):
        """Hidden states (..., C) -> logits (..., V). Ask for few positions: V is large, this is the widest layer."""
        return F.linear(hidden, self.wte.weight)

    # ------------------------------------------------------------------------------------------------ generating text

    def generate(self, queries, max_new_tokens=40, eot=50256, temperature=0.0, top_p=1.0, batch_size=64):
        """Continue each of a list of token lists until `eot`, or for max_new_tokens (an int, or one for each query).

        Returns a list of token lists, without eot. temperature 0 is greedy; otherwise tokens are drawn from the
        smallest set that holds top_p of the probability. At most batch_size queries are under way at once. Raises
        ValueError for an empty query or one that leaves too few of the n_positions.
        """
        if not all(queries):
            raise ValueError(f"query {[bool(q) for q in queries].index(False)} has no tokens, expected at least one")

        def groups(size):
            for i in range(0, len(queries), size):
                rows = [torch.tensor(query, device=self.wte.weight.device) for query in queries[i:i + size]]
                ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
                yield self.wte(ids), torch.tensor([len(row) for row in rows], device=ids.device), None

        return self.answer(groups(max(1, batch_size // 4)), max_new_tokens, eot, temperature, top_p, batch_size)

    @torch.no_grad()
    def answer(self, groups, max_new_tokens, eot, temperature=0.0, top_p=1.0, batch_size=64):
        """Like `generate`, from groups of rows: input embeddings x (b, T, C), of which each row's first lengths (b,) are
        real, and key/value pairs (L, 2, b or 1, H, P, D) that stand before them, or None.

        A step reads all weights, for many rows or few. So a row leaves when it is finished, and the next group enters
        when there are places for it: "continuous batching" (Yu et al. 2022, Orca, section 3.1). Groups of a quarter of
        batch_size do well: smaller ones read the weights too often, larger ones wait too long.
        """
        def limit(row):
            return max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[row]

        answers, rows, cache = [], [], Cache()              # rows: whose answer stands in which place of the batch
        last = self.ln_f.weight.new_zeros(0, self.config.n_embd)                            # (B, C)
        groups = iter(groups)
        group = next(groups, None)
        while True:
            while group and (not rows or len(rows) + len(group[0]) <= batch_size):
                (x, lengths, kv), group = group, next(groups, None)
                entering = range(len(answers), len(answers) + len(x))
                answers += [[] for _ in entering]
                rows += entering
                places = max(len(rows), batch_size if group else 0)
                last = torch.cat((last, self.enter(x, lengths, kv, [limit(row) for row in entering], cache, places)))
            if not rows:
                return [answer[:limit(row)] for row, answer in enumerate(answers)]
            logits = (self.wte.weight @ last.t()).t()                                       # (B, V), in the way of `Linear`
            tokens, finished = choose(logits, temperature, top_p), []                       # (B,)
            for place, (row, token) in enumerate(zip(rows, tokens.tolist())):
                if token != eot:
                    answers[row].append(token)
                if token == eot or len(answers[row]) >= limit(row):
                    finished.append(place)
            if finished:                            # if 1 and 2 of 0 .. 4 leave, 3 and 4 move into their places
                B = len(rows) - len(finished)
                holes, movers = [p for p in finished if p < B], [p for p in range(B, len(rows)) if p not in finished]
                for hole, mover in zip(holes, movers):
                    rows[hole] = rows[mover]
                tokens[holes] = tokens[movers]
                rows, tokens = rows[:B], tokens[:B]
                cache.leave(holes, movers, B)
            last = last[:0]
            if rows:
                last = self.transform(self.wte(tokens)[:, None], cache)[:, 0]               # (B, 1, C) -> (B, C)
                cache.lengths += 1

    def enter(self, x, lengths, kv, limits, cache, places):
        """The first pass of a group, whose rows then join the cache -> hidden states of their last positions (b, C)."""
        H, C = self.config.n_head, self.config.n_embd
        if kv is None:
            kv = x.new_zeros(self.config.n_layer, 2, 1, H, 0, C // H)
        first, P = Cache(kv), kv.size(-2)
        needed = P + int((lengths + torch.tensor(limits, device=x.device)).max())
        if needed > self.config.n_positions:
            raise ValueError(f"prompt, query and answer need {needed} positions, but the model's n_positions is "
                             f"{self.config.n_positions}")
        hidden = self.transform(x, first)
        cache.join(first, P + lengths, places, max(needed, P + x.size(1)))
        return hidden[torch.arange(len(x), device=x.device), lengths - 1]

    # ---------------------------------------------------------------------------------------------- checkpoint folders

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """Load config.json and model.safetensors (or pytorch_model.bin), Hugging Face's layout -> GPT, float32, eval mode.

        Raises OSError for a missing file, ValueError for a file that is broken or holds something else than a GPT-2.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json")
        config.dropout = dropout
        with torch.device("meta"), mock.patch.object(nn.init, "normal_"):       # shapes only, in no time: nothing is drawn
            gpt = cls(config)
        expected, found, unexpected = gpt.state_dict(), {}, []
        source, tied = weights_file(folder), None
        for name, tensor in read_safetensors(source) if source.suffix == ".safetensors" else read_pickle(source):
            name = name.removeprefix("transformer.")
            if name.endswith((".attn.bias", ".attn.masked_bias")):      # the causal triangle, stored by old versions
                continue
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"{source}: {name!a} is {tensor.dtype}, expected float32, float16 or bfloat16")
            if name == "lm_head.weight":
                tied = tensor
            elif name not in expected:
                unexpected.append(name)
            else:
                if is_conv1d(name) and tensor.dim() == 2:
                    tensor = tensor.t()
                if tensor.shape != expected[name].shape:
                    raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, "
                                     f"but config.json asks for {list(expected[name].shape)}")
                found[name] = tensor.float().contiguous()
        missing = sorted(expected.keys() - found.keys())
        if missing or unexpected:
            raise ValueError(f"{source} is not a plain GPT-2 of this shape: "
                             f"missing {some(missing)}; unexpected {some(unexpected)}")
        if tied is not None and not torch.equal(tied.float(), found["wte.weight"]):
            raise ValueError(f"{source}: lm_head.weight differs from wte.weight, expected GPT-2's tied output layer")
        gpt.load_state_dict(found, assign=True)
        return gpt.eval()

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write config.json and model.safetensors as `transformers` writes and reads them."""
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
                  "vocab_size": c.vocab_size, "n_positions": c.n_positions, "n_ctx": c.n_positions, "n_embd": c.n_embd,
                  "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": c.n_inner,
                  "layer_norm_epsilon": c.layer_norm_epsilon, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
                  "bos_token_id": c.vocab_size - 1, "eos_token_id": c.vocab_size - 1}      # <|endoftext|> comes last
        write_safetensors(folder / "model.safetensors", {
            f"transformer.{name}": (t.t() if is_conv1d(name) else t).to(dtype)
            for name, t in self.state_dict().items()})
        replace(folder / "config.json", lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))


def is_conv1d(name):
    """GPT-2's attention and MLP layers are `Conv1D`: stored (in, out), where nn.Linear keeps (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def some(names):
    return f"{', '.join(map(ascii, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" if names else "nothing"


def choose(logits, temperature, top_p):
    """Logits (b, V) -> the next token of each row (b,): the likeliest, or drawn from the top_p nucleus."""
    if temperature < 1e-6:                              # 0, or so little that to divide by it would overflow
        return logits.max(dim=-1).indices               # argmax takes twice as long on a CPU
    probs, ids = F.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0            # what stands before a token already fills the nucleus
    probs[:, 0] += (probs[:, 0] == 0)                           # top_p 0 leaves the likeliest
    return ids.gather(1, torch.multinomial(probs, 1)).squeeze(1)


def read_config(path):
    """Hugging Face's config.json -> GPTConfig. Raises ValueError for anything but a plain GPT-2 of a sane size."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: expected a checkpoint folder in Hugging Face's layout") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, expected an object")
    plain = {"model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
             "scale_attn_weights": True, "add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False,
             "reorder_and_upcast_attn": False}
    for key, value in plain.items():        # loaded silently, the logits of such a model would be wrong
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, expected plain GPT-2's {value!r}")

    def number(*keys, limit):
        key = next((k for k in keys if raw.get(k) is not None), keys[0])
        value = raw.get(key)
        if type(value) is not int or not 0 < value <= limit:
            raise ValueError(f"{path}: {key} is {value!r}, expected a whole number from 1 to {limit}")
        return value

    config = GPTConfig(vocab_size=number("vocab_size", limit=10**7),
                       n_positions=number("n_positions", "n_ctx", limit=10**6),
                       n_embd=number("n_embd", limit=10**5), n_layer=number("n_layer", limit=1000),
                       n_head=number("n_head", limit=10**4),
                       n_inner=None if raw.get("n_inner") is None else number("n_inner", limit=10**6),
                       layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-5))
    if config.n_embd % config.n_head:
        raise ValueError(f"{path}: n_embd {config.n_embd} does not divide into n_head {config.n_head} heads")
    if type(config.layer_norm_epsilon) not in (int, float) or not 0 < config.layer_norm_epsilon < 1:
        raise ValueError(f"{path}: layer_norm_epsilon is {config.layer_norm_epsilon!r}, expected one between 0 and 1")
    return config


def weights_file(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")


def load_plain(path):
    """torch.load for tensors, numbers and text alone: any other pickle could run a stranger's code. Raises ValueError."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:              # of many kinds; torch's own text advises to switch the check off
            raise ValueError(f"{path} is broken or holds more than plain tensors, so it was not loaded "
                             f"({type(error).__name__})") from None


def is_plain(t):
    """A tensor whose numbers are all there: not sparse, not without data, not few bytes repeated into a huge shape."""
    return (isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu"
            and t.untyped_storage().nbytes() >= t.numel() * t.element_size())


def read_pickle(path):
    """Tensors of a pytorch_model.bin, as (name, tensor)."""
    tensors = load_plain(path)
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and is_plain(t) for n, t in tensors.items()):
        raise ValueError(f"{path} does not hold a dictionary of names and tensors")
    yield from tensors.items()


# ------------------------------------------------------------------------------------------------------- safetensors
# 8 bytes: N, little-endian; N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}; then raw bytes.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Tensors of a safetensors file, as (name, tensor), one at a time; all is checked before anything is allocated.

    Raises ValueError where the file breaks the format: the header must be sound and the tensors must tile the data.
    """
    def check(sound, complaint):
        if not sound:
            raise ValueError(f"{path} is not a sound safetensors file: {complaint:.300}")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check(size >= 8, f"it holds {size} bytes, expected at least 8")
        n = int.from_bytes(file.read(8), "little")
        check(n <= min(size - 8, 100_000_000), f"its header claims {n} bytes of the file's {size} (at most 100 MB)")
        try:
            header = json.loads(file.read(n).decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            check(False, f"its header is not JSON: {error}")
        check(isinstance(header, dict), "its header is not an object")
        header.pop("__metadata__", None)
        end = 0
        for name, entry in header.items():
            check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"},
                  f"the entry of {name!r} should be dtype, shape and data_offsets")
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            check(isinstance(dtype, str) and dtype in DTYPES,
                  f"{name!r} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
            for numbers in (shape, offsets):
                check(isinstance(numbers, list) and all(type(i) is int and 0 <= i < 2**63 for i in numbers),
                      f"{name!r} has {numbers!r} where whole numbers are expected")
            check(len(offsets) == 2 and len(shape) <= 8 and math.prod(i or 1 for i in shape) < 2**63
                  and offsets[1] - offsets[0] == math.prod(shape) * DTYPES[dtype].itemsize,
                  f"{name!r} of shape {shape} and dtype {dtype} does not fit its bytes {offsets}")
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            begin, stop = entry["data_offsets"]
            check(begin == end, f"{name!r} begins at byte {begin}, expected {end}: the tensors overlap or leave a gap")
            end = stop
        check(8 + n + end == size, f"its tensors end at byte {8 + n + end}, but the file has {size}")
        for name, entry in entries:
            data = bytearray(entry["data_offsets"][1] - entry["data_offsets"][0])
            check(file.readinto(data) == len(data), "it shrank while it was read")
            dtype = DTYPES[entry["dtype"]]
            tensor = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            yield name, tensor.view(entry["shape"])


def unique(pairs):
    """For JSON: a dictionary, but two entries of one name are an error."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def write_safetensors(path, tensors):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                                                         # data starts aligned

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.view(-1).view(torch.uint8).numpy())

    replace(path, write)


def replace(path, write):
    """Let write(file) fill a temporary file, then rename it: whoever looks finds the old file or the new, never half."""
    temporary = Path(f"{path}.tmp")                     # if a kill leaves it behind, the next save takes it away
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # torch.save makes a RuntimeError of a full disk
        raise OSError(f"cannot write {path}: {error.__context__ or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
