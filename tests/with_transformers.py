"""The controller beside transformers' GPT-2, through `inputs_embeds`: trained, and answering.

    python tests/with_transformers.py               # tensor([[  32, 1126,   13, 4095]])
"""
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from conftest import ROOT
from model import GPTConfig
from prompt_encoder import DynamicPrompt, make_batch

gpt = GPT2LMHeadModel.from_pretrained(ROOT / "tiny/tiny-gpt2", dtype=torch.float32).requires_grad_(False)     # stored as float16
wte = gpt.transformer.wte.requires_grad_(True)
controller = DynamicPrompt(GPTConfig(n_embd=gpt.config.n_embd, n_head=gpt.config.n_head), wte.weight)
optimizer = torch.optim.AdamW([*controller.parameters(), wte.weight], lr=1e-3)
examples = [([1973, 294, 3602, 30, 4095], [32, 1126, 13, 4095]), ([2647, 0, 4095], [3087, 13, 4095])] * 4
for step in range(20):
    batch = make_batch(examples, controller.prompt_length)      # rows without gaps, padded on the right: no mask is needed
    prompt = controller(wte(batch.queries))                     # (B, M, C)
    prompt = F.pad(prompt, (0, 0, 0, batch.rows.size(1) - prompt.size(1)))
    x = torch.where(batch.is_prompt[..., None], prompt, wte(batch.rows))
    logits = gpt(inputs_embeds=x).logits.flatten(0, 1)[batch.label_positions]
    F.cross_entropy(logits, batch.labels).backward()
    optimizer.step()
    optimizer.zero_grad()
words = wte(torch.tensor([examples[0][0]]))                     # one query: transformers wants several padded on the left
print(gpt.generate(inputs_embeds=torch.cat((controller(words), words), dim=1), max_new_tokens=10, do_sample=False))
