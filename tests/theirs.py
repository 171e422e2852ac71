"""The methods as a user of transformers and peft writes them: the other side of bench.py, memory.py and gpu.py."""
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

from prompt_encoder import METHODS

LIMIT, EOT = 128, 50256         # the longest query; GPT-2's <|endoftext|>


class Theirs(nn.Module):
    """Fine-tuning, and what the other methods share. transformers is imported where it is needed: our side's process
    has no need of it, and would hold it in memory."""

    frozen = None               # what of the GPT is not trained: "blocks", "all" or None

    def __init__(self, folder, dtype):
        super().__init__()
        from transformers import GPT2LMHeadModel, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.gpt, self.dtype = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).train(), dtype
        self.gpt.requires_grad_(self.frozen is None)
        self.gpt.transformer.wte.requires_grad_(self.frozen != "all")

    def autocast(self):
        return torch.autocast(self.gpt.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def pad(self, rows, value=0):
        rows = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
        return rows.to(self.gpt.device)

    def forward(self, examples):
        """[(query ids, response ids), ...] -> the sum of the losses of the response tokens, as train_epoch takes it."""
        with self.autocast():
            return self.loss(examples) * sum(len(response) for _, response in examples)

    def inputs(self, examples, prompts=False):
        """What GPT2LMHeadModel reads: mask and labels (-100 where there is no loss), with room for prompts."""
        m = [len(q) if prompts else 0 for q, _ in examples]
        return {"attention_mask": self.pad([[1] * (m + len(q) + len(r)) for m, (q, r) in zip(m, examples)]),
                "labels": self.pad([[-100] * (m + len(q)) + r for m, (q, r) in zip(m, examples)], -100)}

    def loss(self, examples):
        return self.gpt(self.pad([q + r for q, r in examples]), **self.inputs(examples)).loss

    def answers(self, examples):
        """Greedy answers, as long as the references. All rows run on to the longest: the checkpoint names no end."""
        rows, lengths = [q for q, _ in examples], [len(r) for _, r in examples]
        T = max(map(len, rows))
        with torch.no_grad(), self.autocast():
            ids = self.gpt.eval().generate(
                self.pad([[EOT] * (T - len(row)) + row for row in rows]), do_sample=False, max_new_tokens=max(lengths),
                attention_mask=self.pad([[0] * (T - len(row)) + [1] * len(row) for row in rows]), pad_token_id=EOT)
        return [row[:n - 1] for row, n in zip(ids[:, T:].tolist(), lengths)]            # without the end


class TheirSoft(Theirs):
    frozen = "blocks"

    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        self.prompt = nn.Embedding(LIMIT, self.gpt.config.n_embd)
        nn.init.normal_(self.prompt.weight, std=0.02)

    def prompts(self, words):
        """Embeddings of the queries, padding behind them (B, M, C) -> prompt embeddings (B, M, C)."""
        return self.prompt.weight[:words.size(1)].expand(len(words), -1, -1)

    def loss(self, examples):
        words = self.gpt.transformer.wte(self.pad([q + r for q, r in examples]))        # (B, T, C)
        prompts = self.prompts(words[:, :max(len(q) for q, _ in examples)])             # a response is padding here
        rows = [torch.cat((p[:len(q)], w[:len(q) + len(r)])) for p, w, (q, r) in zip(prompts, words, examples)]
        return self.gpt(inputs_embeds=pad_sequence(rows, batch_first=True), **self.inputs(examples, prompts=True)).loss


class TheirDynamic(TheirSoft):
    def __init__(self, folder, dtype):
        from transformers import GPT2Config, GPT2Model
        super().__init__(folder, dtype)
        config = self.gpt.config.to_dict() | {"n_layer": 2, "vocab_size": 1, "n_positions": LIMIT}
        self.prompt = GPT2Model(GPT2Config(**config))

    def prompts(self, words):
        return self.prompt(inputs_embeds=words).last_hidden_state                   # causal, so padding needs no mask


class TheirPrefix(Theirs):
    frozen = "all"

    def __init__(self, folder, dtype):
        from peft import PrefixTuningConfig, get_peft_model
        super().__init__(folder, dtype)
        self.gpt = get_peft_model(self.gpt, PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=METHODS["prefix"].default_length, prefix_projection=True,
            encoder_hidden_size=512))
        self.prompt = self.gpt.prompt_encoder["default"]


class TheirDialogPrompt(Theirs):
    frozen, k = "all", METHODS["dialogprompt"].default_length

    def __init__(self, folder, dtype):
        from transformers import GPT2Config, GPT2Model
        super().__init__(folder, dtype)
        config = self.gpt.config.to_dict() | {"vocab_size": self.k, "n_positions": self.k, "add_cross_attention": True}
        self.prompt = GPT2Model(GPT2Config(**config))

    def loss(self, examples):
        query, mask = self.pad([q for q, _ in examples]), self.pad([[1] * len(q) for q, _ in examples])
        context = self.gpt.transformer(query, attention_mask=mask, use_cache=False).last_hidden_state
        virtual_tokens = torch.arange(self.k, device=query.device).expand(len(query), -1)
        past = self.prompt(virtual_tokens, encoder_hidden_states=context, encoder_attention_mask=mask, use_cache=True)
        inputs = self.inputs(examples)
        inputs["attention_mask"] = torch.cat((torch.ones_like(virtual_tokens), inputs["attention_mask"]), dim=1)
        return self.gpt(self.pad([q + r for q, r in examples]), **inputs,
                        past_key_values=past.past_key_values.self_attention_cache).loss


THEIRS = {"finetune": Theirs, "soft": TheirSoft, "dynamic": TheirDynamic, "prefix": TheirPrefix,
          "dialogprompt": TheirDialogPrompt}
