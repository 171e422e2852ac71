"""Seven ways to prompt a GPT, from the simplest to the richest, and `PromptedGPT`, which joins one of them to a GPT.

A prompt reaches the GPT through one of two doors: as vectors, which take the slots before the query's embeddings, or as
key/value pairs, which every layer reads before the row. An encoder says how many slots it needs (`slots`) and fills one
of the doors (`vectors` or `kv`). The story: a table of vectors (PromptTuning), one as long as the query (SoftPrompt),
the same table seen through an LSTM (PTuning) or turned into pairs (Prefix); then the prompts that depend on what was
just said (DynamicPrompt, DialogPrompt).

Shape letters as in model.py; m is the number of tokens in a query, M the width of a batch of queries with its padding, k a
fixed prompt length.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Dropout, Past, attend, init_weights


class NoPrompt(nn.Module):
    """No prompt at all: the whole GPT is trained (Valvoda et al. 2022, section 3). Each other method changes one thing."""

    trains_gpt, trains_embeddings = True, True      # the GPT's blocks; its word embedding wte, tied to the output layer
    default_length = None                           # k, for methods that have one

    def __init__(self, gpt, length, layers):
        """gpt: for its sizes and word embeddings. length: k, or the longest query. layers: the controller's depth."""
        super().__init__()

    def slots(self, m):
        """How many vectors stand before a query of m tokens."""
        return 0

    def vectors(self, query):
        """Query embeddings (B, M, C), each row's padding behind it -> prompt vectors (B or 1, slots(M), C), or None."""
        return None

    def kv(self, gpt, query, lengths):
        """The GPT, query embeddings (B, M, C), their lengths (B,) -> key/value pairs (L, 2, B or 1, H, k, D), or None."""
        return None


class PromptTuning(NoPrompt):
    """k free vectors before every query; they alone are trained (Lester et al. 2021, section 2)."""

    trains_gpt, trains_embeddings = False, False
    default_length = 20

    def __init__(self, gpt, length, layers):
        super().__init__(gpt, length, layers)
        self.table = nn.Parameter(torch.randn(length, gpt.config.n_embd) * 0.02)

    def slots(self, m):
        return len(self.table)

    def vectors(self, query):
        return self.table[None]                                                     # (1, k, C)


class SoftPrompt(PromptTuning):
    """Unlike prompt tuning, the prompt is as long as the query, and wte is trained (Valvoda et al. 2022, equation 2)."""

    trains_embeddings = True
    default_length = None

    def slots(self, m):
        return m

    def vectors(self, query):
        return self.table[None].narrow(1, 0, query.size(1))     # (1, M, C); a slice would not mind a table too short


class PTuning(PromptTuning):
    """Unlike prompt tuning, the k vectors know each other: they come out of a bidirectional LSTM and an MLP
    (Liu et al. 2021b, section 3.2; sizes as in its code)."""

    def __init__(self, gpt, length, layers):
        super().__init__(gpt, length, layers)
        C, half = gpt.config.n_embd, gpt.config.n_embd // 2
        self.lstm = nn.LSTM(C, half, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * half, C), nn.ReLU(), nn.Linear(C, C))

    def vectors(self, query):
        return self.mlp(self.lstm(self.table[None])[0])                             # (1, k, C)


class Prefix(PromptTuning):
    """Unlike prompt tuning, the prompt enters every layer, as keys and values. A table and an MLP make them, which trains
    more stably than free pairs (Li & Liang 2021, sections 4.2 and 4.3)."""

    default_length = 10

    def __init__(self, gpt, length, layers):
        super().__init__(gpt, length, layers)
        c = gpt.config
        self.shape = length, c.n_layer, 2, c.n_head, c.n_embd // c.n_head
        self.mlp = nn.Sequential(nn.Linear(c.n_embd, 512), nn.Tanh(), nn.Linear(512, c.n_layer * 2 * c.n_embd))

    def slots(self, m):
        return 0

    def vectors(self, query):
        return None

    def kv(self, gpt, query, lengths):
        kv = self.mlp(self.table).view(self.shape)                                  # (k, C) -> (k, L, 2, H, D)
        return kv.permute(1, 2, 3, 0, 4)[:, :, None]                                # (L, 2, 1, H, k, D)


class DynamicPrompt(NoPrompt):
    """A prompt of its own for every query: the controller, a causal Transformer, reads the query and writes one vector
    per token,

        h1, ..., hm = Transformer(x1, ..., xm)              (Valvoda et al. 2022, equation 3 and figure 1)

    where x are the GPT's own word embeddings. It is built of GPT-2's blocks and has positions of its own."""

    trains_gpt, trains_embeddings = False, True

    def __init__(self, gpt, length, layers):
        super().__init__(gpt, length, layers)
        C = gpt.config.n_embd
        self.wpe = nn.Embedding(length, C)
        self.drop = Dropout(gpt.config.dropout)
        self.h = nn.ModuleList(Block(gpt.config) for _ in range(layers))
        self.ln_f = nn.LayerNorm(C, eps=gpt.config.layer_norm_epsilon)
        self.apply(init_weights)
        nn.init.constant_(self.ln_f.weight, gpt.wte.weight.std().item())        # speak as loud as word embeddings do

    def slots(self, m):
        return m

    def vectors(self, query):
        h = self.drop(query + self.wpe.weight[:query.size(1)])                      # (B, M, C)
        for block in self.h:
            h = block(h)            # causal: no token reads the padding behind it
        return self.ln_f(h)


class CrossAttention(nn.Module):
    """Unlike self-attention, the keys and values come from elsewhere: every position reads the whole context."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.drop = config.n_head, Dropout(config.dropout)
        self.q_attn = nn.Linear(config.n_embd, config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, context, mask):
        """x (B, k, C), context (B, M, C), mask (B, 1, 1, M) -> (B, k, C)."""
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2)                # (B, T, C) -> (B, H, T, D)
                   for t in (self.q_attn(x), *self.c_attn(context).chunk(2, dim=2)))
        y = attend(q, k, v, mask, self.drop)
        return self.c_proj(y.transpose(1, 2).flatten(2))                            # (B, H, k, D) -> (B, k, C)


class DialogBlock(Block):
    """A GPT-2 block that looks at the context between its self-attention and its MLP."""

    def __init__(self, config):
        super().__init__(config)
        self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.crossattention = CrossAttention(config)

    def forward(self, x, context, mask, keep):
        x = x + self.drop(self.attn(self.ln_1(x), extend=keep))         # `extend` as a tap: k and v pass unchanged
        x = x + self.drop(self.crossattention(self.ln_cross_attn(x), context, mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


class DialogPrompt(NoPrompt):
    """Unlike Prefix, the pairs depend on the context; unlike DynamicPrompt, they enter every layer (Gu et al. 2021).

    k learned tokens run through a causal Transformer as deep as the GPT, whose blocks read the GPT's last hidden states
    of the context. The keys and values of its self-attention, layer by layer, become the GPT's past. So its last block is
    nothing but keys and values: what would follow could get no gradient.
    """

    trains_gpt, trains_embeddings = False, False
    default_length = 5

    def __init__(self, gpt, length, layers):
        super().__init__(gpt, length, layers)
        c = gpt.config
        self.n_head = c.n_head
        self.wte = nn.Embedding(length, c.n_embd)
        self.wpe = nn.Embedding(length, c.n_embd)
        self.drop = Dropout(c.dropout)
        self.h = nn.ModuleList(DialogBlock(c) for _ in range(c.n_layer - 1))
        self.ln_last = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.c_last = nn.Linear(c.n_embd, 2 * c.n_embd)                             # the last layer's keys and values
        self.apply(init_weights)
        with torch.no_grad():
            rows = gpt.wte.weight[5:5 + length]
            self.wte.weight[:len(rows)] = rows

    def kv(self, gpt, query, lengths):
        context = gpt.transform(query)                                              # (B, M, C)
        mask = (torch.arange(query.size(1), device=query.device) < lengths[:, None])[:, None, None]     # (B, 1, 1, M)
        kept = []

        def keep(k, v):
            kept.append(torch.stack((k, v)))                                        # (2, B, H, k, D)
            return k, v

        x = self.drop(self.wte.weight + self.wpe.weight).expand(len(query), -1, -1)             # (B, k, C)
        for block in self.h:
            x = block(x, context, mask, keep)
        k, v = self.c_last(self.ln_last(x)).unflatten(2, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        keep(k, v)
        return torch.stack(kept)                                                    # (L, 2, B, H, k, D)


METHODS = {"finetune": NoPrompt, "soft": SoftPrompt, "dynamic": DynamicPrompt, "prompt-tuning": PromptTuning,
           "p-tuning": PTuning, "prefix": Prefix, "dialogprompt": DialogPrompt}


class LookUp(torch.autograd.Function):
    """The word embedding wte (V, C) and ids (B, T) -> its rows (B, T, C), and wte once more, for the output layer.

    Plain autograd would fill a gradient of wte's size for each of the two uses. This way the output layer's comes by here
    on its way back, and the rows' few are added to it.
    """

    @staticmethod
    def forward(ctx, wte, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, wte), wte.view_as(wte)

    @staticmethod
    def backward(ctx, rows, wte):
        ids, = ctx.saved_tensors
        return wte.index_add_(0, ids.flatten(), rows.flatten(0, 1)), None


class CrossEntropy(torch.autograd.Function):
    """Logits (N or more, V) and targets (N,) int64 -> the cross-entropy of the first N rows, summed.

    The logits are the largest tensor of a training step, and plain autograd would keep four of that size. Here their
    gradient, softmax(logits) - one_hot(targets), is written over them at once, 64 rows at a time in float32.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        loss = torch.zeros((), device=logits.device)
        for rows, target in zip(logits[:len(targets)].split(64), targets[:, None].split(64)):
            log_probs = F.log_softmax(rows.float(), dim=1)
            loss -= log_probs.gather(1, target).sum()
            if ctx.needs_input_grad[0]:
                rows.copy_(log_probs.exp_().scatter_add_(1, target, log_probs.new_full(target.shape, -1.0)))
        logits[len(targets):] = 0
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return gradient.mul_(grad), None


class PromptedGPT(nn.Module):
    """A GPT and one way of prompting it.

    method: a name in METHODS. prompt_length: k, for methods that have one (None: the method's default). max_query: the
    longest query in tokens. train_embeddings: whether wte is trained (None: as the method says). dtype: what the products
    are computed in; trained weights stay float32, frozen matrices are held in dtype once instead of cast in every step.
    """

    def __init__(self, gpt, method, prompt_length=None, controller_layers=2, max_query=128, train_embeddings=None,
                 dtype=torch.float32):
        super().__init__()
        encoder = METHODS[method]
        self.gpt, self.dtype, self.max_query = gpt, dtype, max_query
        length = (prompt_length or encoder.default_length) if encoder.default_length else max_query
        self.encoder = encoder(gpt, length, controller_layers)
        gpt.requires_grad_(encoder.trains_gpt)
        gpt.wte.requires_grad_(encoder.trains_embeddings if train_embeddings is None else train_embeddings)
        for p in gpt.parameters():
            if not p.requires_grad and p.dim() > 1:
                p.data = p.data.to(dtype)

    @property
    def device(self):
        return self.gpt.wte.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def read(self, batch):
        """Batch -> input embeddings (B, T + padding, C), the prompt's vectors in their slots; its pairs or None; and wte."""
        x, wte = LookUp.apply(self.gpt.wte.weight, batch.ids)                       # the only look-up: -> (B, T, C)
        T, M = x.size(1), int(batch.query.max())
        M = max(M, min(M + -M % 16, T, self.max_query))             # few lengths: on a CPU, each costs a kernel to compile
        columns = batch.prompt[:, None] + torch.arange(M, device=x.device)          # where the queries stand: (B, M),
        columns = columns.clamp(max=T - 1)[..., None].expand(-1, -1, x.size(2))     # padding might point past the row
        query = x.gather(1, columns)                                                # (B, M, C)
        vectors = self.encoder.vectors(query)
        if vectors is not None:
            is_slot = torch.arange(T, device=x.device) < batch.prompt[:, None]                  # (B, T)
            x = torch.where(is_slot[..., None], F.pad(vectors, (0, 0, 0, T - vectors.size(1))), x)
        kv = self.encoder.kv(self.gpt, query, batch.query)
        room = self.gpt.config.n_positions - T - (0 if kv is None else kv.size(-2))
        x = F.pad(x, (0, 0, 0, min(-T % 8, max(0, room))))                          # again few lengths
        return x, kv, wte

    def logits(self, batch):
        """Batch -> the logits (N + padding, V) at its N response positions, and nowhere else: V is large."""
        with self.autocast():
            x, kv, wte = self.read(batch)
            hidden = self.gpt.transform(x, None if kv is None else Past(kv))[:, :batch.ids.size(1)]         # (B, T, C)
            hidden = hidden.flatten(0, 1)[batch.where]                                                      # (N, C)
            return F.linear(F.pad(hidden, (0, 0, 0, -len(hidden) % 64)), wte)       # again few shapes

    def forward(self, batch):
        """Batch -> the cross-entropy of its response tokens, summed: divide by their number for the mean."""
        return CrossEntropy.apply(self.logits(batch), batch.targets)

    def answer(self, batches, max_new_tokens, eot, temperature=0.0, top_p=1.0, batch_size=64):
        """Batches of queries -> list of token lists, in their order; see `GPT.answer`."""
        def groups():
            for batch in batches:
                x, kv, _ = self.read(batch)
                yield x, batch.prompt + batch.query, kv

        with self.autocast():
            return self.gpt.answer(groups(), max_new_tokens, eot, temperature, top_p, batch_size)

    def trained(self):
        """What is trained, by name: all that a checkpoint needs to hold."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, tensors):
        """Put back what `trained` gave. Raises ValueError if names or shapes differ."""
        mine = self.trained()
        wrong = sorted(mine.keys() ^ tensors.keys()) or [
            name for name, p in mine.items() if getattr(tensors[name], "shape", None) != p.shape]
        if wrong:
            raise ValueError(f"the checkpoint is of another model: {', '.join(wrong[:5])} differ")
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(tensors[name])
