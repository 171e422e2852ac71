"""GPT-2 from scratch, in one file that works alone: the network, text generation, and checkpoints on disk.

The names are those of the published checkpoints (wte, wpe, h, ln_1, attn.c_attn, mlp.c_fc ...), so loading is one loop.

Shape letters, the same in every file of this project:
    B batch    T tokens    C embedding width    H heads    D = C / H, width of a head    L layers    V vocabulary
    P positions before the row, there as keys and values: a prefix's, or those in the KV cache

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


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
    eos_token_id: int | None = None         # <|endoftext|>; None: the vocabulary's last token
    dropout: float = 0.0                    # in training only: on embeddings, attention and residual branches

    @property
    def eot(self):
        return self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(D)) v, where every position reads itself and what stands before it."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"n_embd {config.n_embd} does not divide into {config.n_head} heads"
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)       # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past=None, mask=None):
        """x (B, T, C) -> y (B, T, C), and the keys and values (B, H, P + T, D) of all that could be read.

        past: keys and values (B, H, P, D) that stand before the row; they are read as if they were part of it.
        mask: added to the scores, (B or 1, 1, T, P + T): 0 where a position may be read, -inf elsewhere; None: causal, every
        position reads the past, itself and what stands before it.
        """
        B, T, C = x.shape
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2)                # (B, T, C) -> (B, H, T, D)
                   for t in self.c_attn(x).split(C, dim=2))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)   # (B, H, P + T, D)
            if mask is None:            # `is_causal` aligns its triangle at the top left: row 0 would read one past position
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)              # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh form of GELU; PyTorch's default, the exact form, differs by up to 5e-4.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, past=None, mask=None):
        y, present = self.attn(self.ln_1(x), past, mask)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.ln_2(x))), present


def init_weights(module):
    """GPT-2's initialisation, for `Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class GPT(nn.Module):
    """GPT-2, with the output layer tied to the word embeddings.

    >>> gpt = GPT.from_pretrained("tiny/tiny-gpt2")
    >>> gpt(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4096])
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.suppress_tokens = []       # ids that `generate` never chooses: rows of wte that stand for no word
        self.apply(init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):      # 2L branches add into the residual stream: it must not grow with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, ids):
        """Token ids (B, T) int64 -> logits (B, T, V)."""
        hidden, _ = self.hidden_states(self.wte(ids))
        return self.logits(hidden)

    def hidden_states(self, x, past=None, readable=None, positions=None):
        """Input embeddings (B, T, C), without positions -> last hidden states (B, T, C), and each layer's keys and values.

        Prompts enter here: embeddings as a part of x, keys and values as `past`.
        past: for each layer the (keys, values) that stand before the row, each (B, H, P, D).
        readable: with a past, True where a position may be read, (B, P + T), for rows of one token (T = 1); None: all before.
        positions: position ids (B, T) or (T,); None: P, P + 1, ...
        Raises ValueError for more positions than the model has.
        """
        T, P, mask = x.size(1), past[0][0].size(2) if past else 0, None
        if positions is None:
            if P + T > self.config.n_positions:
                raise ValueError(f"{P + T} positions are asked for, but the model's n_positions is "
                                 f"{self.config.n_positions}")
            positions = torch.arange(P, P + T, device=x.device)
        if past is not None:            # one mask for all layers
            if readable is None:
                readable = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
            mask = additive_mask(readable, x).view(-1, 1, T, P + T)
        x = self.drop(x + self.wpe(positions))
        presents = []
        for layer, block in enumerate(self.h):
            x, present = block(x, past[layer] if past else None, mask)
            presents.append(present)
        return self.ln_f(x), presents

    def logits(self, hidden):
        """Hidden states (..., C) -> float32 logits (..., V). Ask for few positions: V is large, this is the widest layer.

        GPT-2's logits lie between -30 and -110, where neighbours in bfloat16 are 0.25 to 0.5 apart: rounded so, many
        tokens would tie for the first place. So this product is not autocast.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight.float())

    # ------------------------------------------------------------------------------------------------ generating text

    def generate(self, queries, max_new_tokens=40, eot=None, temperature=0.0, top_p=1.0):
        """Continue each query until `eot` or for max_new_tokens, all in one batch.

        queries: a list of token lists, or a (B, T) tensor. eot: the token that ends an answer; None: the checkpoint's own.
        temperature 0 is greedy; otherwise tokens are drawn from the smallest set that holds top_p of the probability.
        Returns a list of token lists, without eot. Raises ValueError for an empty query, or one that leaves too few of the
        n_positions.
        """
        if len(queries) == 0:
            return []
        ids = pad_sequence([torch.as_tensor(query, dtype=torch.int64) for query in queries], batch_first=True)
        with evaluation(self):
            x = self.wte(to_device(ids, self.wte.weight.device))
            return self.generate_from(x, [len(query) for query in queries], None, max_new_tokens, eot, temperature, top_p)

    def generate_from(self, x, lengths, past, max_new_tokens=40, eot=None, temperature=0.0, top_p=1.0):
        """Like `generate`, from input embeddings x (B, T, C), padded on the right to `lengths` (a list of B numbers), and a
        `past` as in `hidden_states`, or None. To be called within `evaluation`."""
        c, (B, T, _), device = self.config, x.shape, x.device
        P = past[0][0].size(2) if past else 0
        eot = c.eot if eot is None else eot
        if min(lengths) == 0:
            raise ValueError(f"query {lengths.index(0)} has no tokens, expected at least one")
        if P + max(lengths) + max_new_tokens > c.n_positions:
            raise ValueError(f"prompt, query and answer need {P + max(lengths) + max_new_tokens} positions, "
                             f"but the model's n_positions is {c.n_positions}")
        suppressed = torch.zeros(c.vocab_size).index_fill(0, torch.tensor(self.suppress_tokens, dtype=torch.int64), -math.inf)
        ends, suppressed = to_device(torch.tensor(lengths), device), to_device(suppressed, device)
        answers, rows = [[] for _ in lengths], list(range(B))           # rows: those that have not ended
        # Prefill: one pass over the rows. What is real never reads the padding behind it; later tokens must not either.
        hidden, past = self.hidden_states(x, past)
        hidden = hidden[torch.arange(B, device=device), ends - 1][:, None]                      # (B, 1, C)
        readable = torch.arange(-P, T, device=device) < ends[:, None]                           # (B, P + T)
        positions = P + ends[:, None]                                                           # (B, 1)
        for n in range(1, max_new_tokens + 1):
            tokens = sample_next_token(self.logits(hidden[:, 0]) + suppressed, temperature, top_p)      # (B,)
            alive = []
            for i, token in enumerate(tokens.tolist()):                 # a GPU is waited for here, and nowhere else
                if token != eot:
                    answers[rows[i]].append(token)
                    alive.append(i)
            if not alive or n == max_new_tokens:
                break
            if len(alive) < len(rows):                                  # rows that have ended leave the batch
                rows, kept = [rows[i] for i in alive], to_device(torch.tensor(alive), device)
                tokens, readable, positions = tokens[kept], readable[kept], positions[kept]
                past = [(k[kept], v[kept]) for k, v in past]
            readable = F.pad(readable, (0, 1), value=True)
            hidden, past = self.hidden_states(self.wte(tokens)[:, None], past, readable, positions)
            positions = positions + 1
        return answers

    # ---------------------------------------------------------------------------------------------- checkpoint folders

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """Load a folder in Hugging Face's layout: config.json, and model.safetensors or pytorch_model.bin, whole or in
        shards -> GPT, float32, in evaluation mode.

        Raises OSError for a missing file, ValueError for a file that is broken or holds something else than a GPT-2.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json")
        config.dropout = dropout
        with torch.device("meta"):              # shapes only: no memory, no random numbers
            gpt = cls(config)
        expected, found, unexpected = gpt.state_dict(), {}, []
        for path in weight_files(folder):
            for name, tensor in read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path):
                # What stands before GPT-2's own names (transformer. module. model.) comes from a module around it.
                name = re.sub(r"^.*?\b(wte|wpe|ln_f|lm_head|h\.\d+)\.", r"\1.", name)
                if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal triangle, stored by old versions
                    continue
                name = {"lm_head.weight": "wte.weight", "lm_head.decoder.weight": "wte.weight"}.get(name, name)     # tied
                if name not in expected:
                    unexpected.append(name)
                    continue
                if is_conv1d(name) and tensor.dim() == 2:
                    tensor = tensor.t()
                if tensor.shape != expected[name].shape:
                    raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}, "
                                     f"but config.json asks for {list(expected[name].shape)}")
                tensor = tensor.float().contiguous()
                if not torch.stack(tensor.aminmax()).isfinite().all():          # without a second tensor of its size
                    raise ValueError(f"{path}: {name} holds NaN or infinite numbers, expected a trained model's weights")
                if name in found and not torch.equal(found[name], tensor):
                    raise ValueError(f"{path} holds two different tensors for {name}; GPT-2's output layer (lm_head) is "
                                     f"tied to wte")
                found[name] = tensor
        missing = sorted(expected.keys() - found.keys())
        if missing or unexpected:
            raise ValueError(f"{folder} does not hold a plain GPT-2 of the shape in config.json: "
                             f"missing {some(missing)}; unexpected {some(unexpected)}")
        gpt.load_state_dict(found, assign=True)
        return gpt.eval()

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write config.json and model.safetensors as `transformers` writes and reads them. Raises OSError."""
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
                  "vocab_size": c.vocab_size, "n_positions": c.n_positions, "n_ctx": c.n_positions, "n_embd": c.n_embd,
                  "n_layer": c.n_layer, "n_head": c.n_head, "n_inner": c.n_inner,
                  "layer_norm_epsilon": c.layer_norm_epsilon, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
                  "bos_token_id": c.eot, "eos_token_id": c.eot}
        write_safetensors(folder / "model.safetensors", {
            f"transformer.{name}": (t.t() if is_conv1d(name) else t).to(dtype) for name, t in self.state_dict().items()})
        replace(folder / "config.json", lambda file: file.write((json.dumps(config, indent=2) + "\n").encode()))


@contextmanager
def evaluation(module):
    """Evaluation mode for a while: no dropout, no gradients."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def additive_mask(readable, x):
    """True where a position may be read -> 0 there and -inf elsewhere, in the type in which x enters attention."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.zeros(readable.shape, dtype=dtype, device=x.device).masked_fill(~readable, -math.inf)


def sample_next_token(logits, temperature, top_p):
    """Logits (B, V) -> the next token of each row (B,): the likeliest, or one drawn from the top_p nucleus."""
    if temperature < 1e-6:                              # 0, or so little that to divide by it would overflow
        return logits.argmax(dim=-1)
    probs, ids = F.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0            # what stands before a token already fills the nucleus
    probs[:, 0] += (probs[:, 0] == 0)                           # top_p 0 leaves the likeliest
    return ids.gather(1, torch.multinomial(probs, 1)).squeeze(1)


def to_device(tensor, device):
    """From pinned memory, the copy to a GPU waits for its turn while the program goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ------------------------------------------------------------------------------------------------------ files on disk

def is_conv1d(name):
    """GPT-2's attention and MLP layers are `Conv1D`: stored (in, out), where nn.Linear keeps (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def some(names):
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(ascii, names[:5])) + more or "nothing"


def read_config(path):
    """Hugging Face's config.json -> GPTConfig. Raises OSError, or ValueError for anything but a plain GPT-2."""
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
    for key, value in plain.items():                    # loaded silently, the logits of such a model would be wrong
        if raw.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {raw[key]!r}, expected plain GPT-2's {value!r}")
    raw = {"n_positions": raw.get("n_ctx")} | raw
    limits = {"vocab_size": 10**7, "n_positions": 10**6, "n_embd": 10**5, "n_layer": 1000, "n_head": 10**4, "n_inner": 10**6}
    for key, limit in limits.items():
        if key == "n_inner" and raw.get(key) is None:
            continue
        if type(raw.get(key)) is not int or not 0 < raw[key] <= limit:
            raise ValueError(f"{path}: {key} is {raw.get(key)!r}, expected a whole number from 1 to {limit}")
    epsilon, eos = raw.get("layer_norm_epsilon", 1e-5), raw.get("eos_token_id")
    if raw["n_embd"] % raw["n_head"]:
        raise ValueError(f"{path}: n_embd {raw['n_embd']} does not divide into n_head {raw['n_head']} heads")
    if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
        raise ValueError(f"{path}: layer_norm_epsilon is {epsilon!r}, expected a number between 0 and 1")
    if type(eos) is not int or not 0 <= eos < raw["vocab_size"]:
        eos = None
    return GPTConfig(**{key: raw.get(key) for key in limits}, layer_norm_epsilon=epsilon, eos_token_id=eos)


def weight_files(folder):
    for name in ("model", "pytorch_model"):
        suffix = ".safetensors" if name == "model" else ".bin"
        if files := sorted(folder.glob(name + suffix)) or sorted(folder.glob(f"{name}-*-of-*{suffix}")):
            return files
    raise FileNotFoundError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")


def load_plain(path):
    """torch.load for tensors, numbers and text alone: any other pickle could run a stranger's code. Raises ValueError."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:              # of many kinds; torch's own text advises to switch the check off
            raise ValueError(f"{path} is broken or holds more than plain tensors, so it was not loaded "
                             f"({type(error).__name__})") from None


def read_pickle(path):
    """Tensors of a pytorch_model.bin, as (name, tensor). Raises ValueError."""
    def is_plain(t):                            # neither sparse nor few bytes repeated into a huge shape
        return (isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type == "cpu"
                and t.untyped_storage().nbytes() >= t.numel() * t.element_size())

    tensors = load_plain(path)
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and is_plain(t) for n, t in tensors.items()):
        raise ValueError(f"{path} does not hold a dictionary of names and tensors")
    for name in list(tensors):
        yield name, tensors.pop(name)           # so that no second copy of the model stays in memory


# safetensors: 8 bytes N, little-endian; N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}; then raw bytes.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Tensors of a safetensors file, as (name, tensor), one at a time; all is checked before anything is allocated.

    Raises ValueError where the file breaks the format: the header must be sound, and the tensors must tile the data.
    """
    with open(path, "rb") as file:
        size, entries, position = os.fstat(file.fileno()).st_size, [], 0
        try:
            n = int.from_bytes(file.read(8), "little")
            if n > min(size - 8, 100_000_000):
                raise ValueError(f"its header claims {n} bytes of the file's {size} (at most 100 MB)")
            header = json.loads(file.read(n).decode("utf-8"))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                if len(shape) > 8 or not all(type(i) is int and 0 <= i <= size for i in (begin, end, *shape)):
                    raise ValueError(f"{name!r} has shape {str(shape):.60} and bytes {begin} to {end}")
                if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name!r} of shape {shape} begins at byte {begin} and ends at {end}, "
                                     f"expected {position} and {position + math.prod(shape) * dtype.itemsize}")
                entries.append((name, dtype, shape, end - begin))
                position = end
            if 8 + n + position != size:
                raise ValueError(f"its tensors end at byte {8 + n + position}, but the file has {size}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a sound safetensors file: {type(error).__name__} {str(error):.300}") from None
        for name, dtype, shape, n_bytes in entries:
            data = bytearray(n_bytes)
            if file.readinto(data) != n_bytes:
                raise ValueError(f"{path} shrank while it was read")
            yield name, (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)


def write_safetensors(path, tensors):
    """{name: tensor} -> a safetensors file. Raises OSError."""
    header, end, names = {"__metadata__": {"format": "pt"}}, 0, {dtype: name for name, dtype in DTYPES.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    for name, t in tensors.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the data is aligned

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
