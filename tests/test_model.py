"""GPT against transformers' GPT-2: logits, gradients, keys and values, answers, and the tokens that are drawn."""
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from model import Attention, GPT, GPTConfig, sample_next_token


def random_gpt2(seed=0, **given):
    """A transformers GPT-2 of random shape, all its parameters random, biases too: none can be forgotten unseen."""
    r = random.Random(seed)
    heads = given.get("n_head", r.choice([1, 2, 3, 5, 7]))
    shape = {"vocab_size": r.randint(20, 60), "n_positions": r.randint(20, 60), "n_head": heads,
             "n_embd": heads * r.randint(3, 9), "n_layer": r.randint(1, 3), "layer_norm_epsilon": 1e-3,
             "n_inner": r.choice([None, r.randint(1, 90)]), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**shape | given)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.5)
    return model


def random_ids(model, rows=3):
    return torch.randint(model.config.vocab_size, (rows, model.config.n_positions))


def loaded(model, folder):
    model.save_pretrained(folder)
    return GPT.from_pretrained(folder)


def assert_same_logits(gpt, model):
    ids = random_ids(model)
    with torch.no_grad():
        torch.testing.assert_close(gpt(ids), model(ids).logits, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("n_head, epsilon, n_inner", [(1, 1e-5, None), (3, 1e-3, 50), (5, 0.3, None)])
def test_logits(n_head, epsilon, n_inner, tmp_path):
    model = random_gpt2(seed=n_head, n_head=n_head, n_inner=n_inner, layer_norm_epsilon=epsilon)
    assert_same_logits(loaded(model, tmp_path), model)


def test_gradients(tmp_path):
    """One training step's gradients, those of the tied word embeddings included."""
    model = random_gpt2(seed=1)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    model(ids, labels=ids).loss.backward()
    F.cross_entropy(gpt(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(model.transformer.named_parameters())
    assert theirs.keys() == dict(gpt.named_parameters()).keys()
    for name, p in gpt.named_parameters():
        grad = theirs[name].grad
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):        # transposed in transformers
            grad = grad.t()
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")


def test_dropout_falls_where_it_falls_in_transformers(tmp_path):
    """In training: on embeddings, attention and both branches. By default there is none, whatever config.json says."""
    model = random_gpt2(embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    assert_same_logits(gpt.train(), model)
    gpt = GPT.from_pretrained(tmp_path, dropout=0.3)
    assert_same_logits(gpt, model)
    torch.manual_seed(1)
    ours = gpt.train()(ids)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, model.train()(ids).logits, atol=1e-4, rtol=0)


def test_a_row_in_pieces_equals_one_pass(tmp_path):
    """Each piece reads the presents of those before it as its past. Transformers' keys and values serve as well."""
    model = random_gpt2(seed=2)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    with torch.no_grad():
        whole, presents = gpt.hidden_states(gpt.wte(ids))
        past, pieces = None, []
        for piece in ids.tensor_split([5, 6, 19], dim=1):
            hidden, past = gpt.hidden_states(gpt.wte(piece), past)
            pieces.append(hidden)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)
        for mine, other in zip(past, presents, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
        cache = model(ids[:, :5]).past_key_values
        rest, _ = gpt.hidden_states(gpt.wte(ids[:, 5:]), [(layer.keys, layer.values) for layer in cache.layers])
        torch.testing.assert_close(gpt.logits(rest), model(ids).logits[:, 5:], atol=1e-4, rtol=0)


def test_attention_alone_reads_its_past():
    """Without a mask, too: the rest of a row behind the keys and values of its beginning."""
    torch.manual_seed(0)
    attention, x = Attention(GPTConfig(n_embd=12, n_head=3)), torch.randn(2, 7, 12)
    (whole, _), (_, past) = attention(x), attention(x[:, :4])
    torch.testing.assert_close(attention(x[:, 4:], past)[0], whole[:, 4:], atol=1e-5, rtol=0)


def test_autocast_rounds_no_logits():
    """The logits are lowered to about -100, where bfloat16's neighbours are 0.5 apart, so that many would tie."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4))
    ids = torch.randint(300, (60, 64))
    with torch.no_grad():
        gpt.wte.weight.normal_(std=0.1)
        gpt.wpe.weight.normal_(std=0.3)
        gpt.wte.weight[:, 0], gpt.ln_f.weight[0], gpt.ln_f.bias[0] = 1, 0, -100
        exact = gpt(ids)
        with torch.autocast("cpu", torch.bfloat16):
            logits = gpt(ids)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert exact.mean() < -90 and logits.dtype == loss.dtype == torch.float32
    assert (logits.argmax(-1) != exact.argmax(-1)).float().mean() < 0.005
    assert (exact.bfloat16().argmax(-1) != exact.argmax(-1)).float().mean() > 0.1       # so the line above can fail


# --------------------------------------------------------------------------------------------------- generating text

def greedy(model, query, new, eot):
    """transformers' greedy continuation of one query alone, without eot."""
    ids = model.generate(torch.tensor([query]), attention_mask=torch.ones(1, len(query)), max_new_tokens=new,
                         do_sample=False, eos_token_id=eot, pad_token_id=eot)
    answer = ids[0, len(query):].tolist()
    return answer[:-1] if answer[-1] == eot else answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("writer")


@pytest.fixture(scope="module")
def writer(folder):
    """A transformers model, the same as GPT, queries of 1 to 60 tokens, and a token that ends some answers."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=84, n_embd=33, n_layer=2, n_head=3,
                                       initializer_range=0.6, bos_token_id=0, eos_token_id=0)).eval()
    gpt, r = loaded(model, folder), random.Random(0)
    queries = [[r.randrange(40) for _ in range(length)] for length in (3, 60, 1, 17, 2, 44, 1, 29, 8, 5, 51, 12)]
    free = gpt.generate(queries, max_new_tokens=24, eot=-1)
    eot = max(range(40), key=lambda token: len({answer.index(token) for answer in free if token in answer}))
    return model, gpt, queries, eot


def test_greedy_answers(writer, folder):
    """They are transformers' and those of a loop without a cache, each query alone; company and order change none,
    and dropout sleeps."""
    model, gpt, queries, eot = writer

    def slowly(query):
        ids = list(query)
        while len(ids) < len(query) + 24 and (token := gpt(torch.tensor([ids]))[0, -1].argmax().item()) != eot:
            ids.append(token)
        return ids[len(query):]

    answers = GPT.from_pretrained(folder, dropout=0.5).train().generate(queries, max_new_tokens=24, eot=eot)
    assert answers == [greedy(model, query, 24, eot) for query in queries] == [slowly(query) for query in queries]
    assert answers[::-2] == gpt.generate(queries[::-2], 24, eot)
    assert answers[3:4] == gpt.generate(torch.tensor(queries[3:4]), 24, eot)        # a tensor is as good as a list
    lengths = [len(answer) for answer in answers]
    assert max(lengths) == 24 and min(lengths) < 12 and len(set(lengths)) > 3       # rows did end at different times


def test_finished_rows_leave_and_each_token_costs_one_position(writer):
    _, gpt, queries, eot = writer
    shapes = []
    hook = gpt.h[0].register_forward_hook(lambda module, inputs, output: shapes.append(output[0].shape[:2]))
    answers = gpt.generate(queries, max_new_tokens=24, eot=eot)
    hook.remove()
    assert shapes[0] == (12, 60)
    assert shapes[1:24] == [(sum(len(answer) >= step for answer in answers), 1) for step in range(1, 24)]


def test_the_whole_room_of_n_positions_can_be_used_and_no_more(writer):
    model, gpt, queries, _ = writer
    assert gpt.generate(queries[:3], 24, eot=-1) == [greedy(model, query, 24, None) for query in queries[:3]]
    assert gpt.generate(queries[2:3], 83, eot=-1) == [greedy(model, queries[2], 83, None)]
    assert gpt.generate(queries[:3], 0) == [[], [], []]
    with pytest.raises(ValueError, match="85.*84"):
        gpt.generate(queries[:3], 25, eot=-1)
    with pytest.raises(ValueError, match="query 1 has no tokens"):
        gpt.generate([[1, 2], []], 1)


def test_the_checkpoint_knows_its_own_eot(writer, monkeypatch):
    """It is config.json's eos_token_id, or else the vocabulary's last token."""
    _, gpt, queries, eot = writer
    assert gpt.config.eos_token_id == 0
    for given, expected in ((eot, eot), (0, 0), (None, 39)):
        monkeypatch.setattr(gpt.config, "eos_token_id", given)
        assert gpt.generate(queries, 24) == gpt.generate(queries, 24, eot=expected)


def test_dropout_sleeps_while_text_is_generated(writer, folder):
    _, gpt, queries, eot = writer
    noisy = GPT.from_pretrained(folder, dropout=0.5).train()
    assert noisy.generate(queries, 24, eot) == gpt.generate(queries, 24, eot)
    assert all(module.training for module in noisy.modules())
    noisy.eval().generate(queries[:1], 3)
    assert not any(module.training for module in noisy.modules())


# ---------------------------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("temperature, top_p, shares", [
    (1.0, 1.0, [0.1, 0.5, 0.15, 0.25]), (1.0, 0.7, [0, 2 / 3, 0, 1 / 3]), (1.0, 0.4, [0, 1.0, 0, 0]),
    (0.5, 0.8, [0, 0.8, 0, 0.2]), (1.0, 0.0, [0, 1.0, 0, 0]), (1e-45, 1.0, [0, 1.0, 0, 0])])
def test_draws_come_from_the_nucleus(temperature, top_p, shares):
    """The probabilities are 0.1, 0.5, 0.15 and 0.25; temperature 0.5 squares them."""
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(20_000, -1)
    found = sample_next_token(logits, temperature, top_p).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor(shares), atol=0.015, rtol=0)
    assert not found[torch.tensor(shares) == 0].any()
