"""GPT against transformers' GPT-2: logits, gradients, checkpoint folders, generation."""
import json
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, TemperatureLogitsWarper, TopPLogitsWarper

from conftest import ROOT
from data import load_tokenizer
from model import GPT, Cache, Dropout, GPTConfig, Linear, Past, attend, choose, is_conv1d

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def random_gpt2(seed=0, **given):
    """A transformers GPT-2 of random shape, all its parameters random, biases too: none can be forgotten unseen."""
    r = random.Random(seed)
    heads = given.get("n_head", r.choice([1, 2, 3, 5, 7]))
    shape = {"vocab_size": r.randint(20, 60), "n_positions": r.randint(20, 60), "n_head": heads,
             "n_embd": heads * r.randint(3, 9), "n_layer": r.randint(1, 3),
             "n_inner": r.choice([None, r.randint(1, 90)]),
             "layer_norm_epsilon": 10 ** -r.uniform(1, 6), "bos_token_id": 0, "eos_token_id": 0}
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


def edit_config(folder, **changes):
    """Write changes into config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# ------------------------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("n_inner", [None, 50])
@pytest.mark.parametrize("n_head", [1, 2, 3, 5, 7, 12])
def test_logits(n_head, n_inner, tmp_path):
    model = random_gpt2(seed=n_head, n_head=n_head, n_inner=n_inner)
    assert_same_logits(loaded(model, tmp_path), model)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 0.3])
def test_layer_norm_epsilon(epsilon, tmp_path):
    model = random_gpt2(layer_norm_epsilon=epsilon)
    assert_same_logits(loaded(model, tmp_path), model)


def test_gradients(tmp_path):
    """One training step's gradients, those of the tied word embedding included."""
    model = random_gpt2(seed=1)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    model(ids, labels=ids).loss.backward()
    F.cross_entropy(gpt(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(model.transformer.named_parameters())
    assert theirs.keys() == dict(gpt.named_parameters()).keys()
    for name, p in gpt.named_parameters():
        grad = theirs[name].grad
        grad = grad.t() if is_conv1d(name) else grad
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (3, 1, 7), (3, 4, 7), (2, 3, 4, 7), (0, 7)], ids=str)
def test_linear_without_gradients(shape):
    layer, x = Linear(7, 3), torch.randn(shape)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = layer(x)
    assert y.shape == expected.shape and torch.allclose(y, expected, atol=1e-6)
    assert coarse.dtype == torch.bfloat16 and torch.allclose(coarse.float(), expected, atol=0.05)


def test_initialisation_has_the_spread_of_transformers():
    shape = {"vocab_size": 400, "n_positions": 100, "n_embd": 96, "n_layer": 5, "n_head": 3}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).transformer.state_dict()
    for name, t in GPT(GPTConfig(**shape)).state_dict().items():
        assert t.std().item() == approx(theirs[name].std().item(), rel=0.05), name
        assert t.mean().item() == approx(theirs[name].mean().item(), abs=0.001), name


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


def test_past_stands_before_the_row(tmp_path):
    """The first words as a Past of transformers' keys and values, the rest embedded: the logits of the whole row."""
    model = random_gpt2(seed=2)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :7]).past_key_values
        pairs = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])
        rest = gpt.logits(gpt.transform(gpt.wte(ids[:, 7:]), Past(pairs)))
        torch.testing.assert_close(rest, whole[:, 7:], atol=1e-4, rtol=0)
        for row in range(3):                                                # one past for all rows
            everyone = gpt(torch.cat((ids[:1, :7].expand(3, -1), ids[:, 7:]), dim=1))[:, 7:]
            shared = gpt(ids[:, 7:], Past(pairs[:, :, :1]))
            torch.testing.assert_close(shared[row], everyone[row], atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ checkpoint folders

@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n_inner", [None, 17])
def test_transformers_reads_what_we_save(n_inner, dtype, tmp_path):
    gpt = loaded(random_gpt2(n_inner=n_inner), tmp_path / "theirs")
    gpt.save_pretrained(tmp_path / "ours", dtype=dtype)
    model, report = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert_same_logits(GPT.from_pretrained(tmp_path / "ours"), model)
    for name, t in gpt.state_dict().items():
        assert torch.equal(GPT.from_pretrained(tmp_path / "ours").state_dict()[name], t.to(dtype).float()), name


def save_safetensors(tensors, folder):
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def save_zip(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin")


def save_legacy(tensors, folder):
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_safetensors, save_zip, save_legacy])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "masks and lm_head"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_published_layout(save, prefix, extras, dtype, tmp_path):
    """GPT-2's files have bare names, DialoGPT's a prefix; old files also store masks and the output layer."""
    model = random_gpt2().to(dtype)
    tensors = OrderedDict((prefix + name, t) for name, t in model.transformer.state_dict().items())
    if extras:
        for i in range(model.config.n_layer):
            tensors[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 60, 60, dtype=torch.uint8).tril()
            tensors[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4, dtype=dtype)
        tensors["lm_head.weight"] = model.lm_head.weight.detach()
    model.config.save_pretrained(tmp_path)
    save(tensors, tmp_path)
    gpt = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32} and not gpt.training
    assert_same_logits(gpt, model.float())


def test_n_ctx_may_stand_for_n_positions(tmp_path):
    model = random_gpt2(n_positions=23)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, n_positions=None, n_ctx=23)
    assert_same_logits(GPT.from_pretrained(tmp_path), model)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with config.json, and its tensors, to be damaged and saved."""
    model = random_gpt2(n_embd=12, n_head=3, n_layer=2, n_inner=None, vocab_size=30)
    model.config.save_pretrained(tmp_path)
    return tmp_path, dict(model.transformer.state_dict())


@pytest.mark.parametrize("key, value", [
    ("model_type", "gpt_neo"), ("activation_function", "gelu"), ("tie_word_embeddings", False),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
    ("add_cross_attention", True)])
def test_other_architectures_are_refused(key, value, checkpoint):
    folder, tensors = checkpoint
    save_safetensors(tensors, folder)
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match=f"config.json: {key} is {value!r}"):
        GPT.from_pretrained(folder)


def test_missing_and_unexpected_names_are_listed(checkpoint):
    folder, tensors = checkpoint
    del tensors["ln_f.bias"], tensors["h.1.mlp.c_fc.weight"]
    save_safetensors(tensors | {"h.0.crossattention.q_attn.weight": torch.ones(2)}, folder)
    with pytest.raises(ValueError, match="missing .*h.1.mlp.c_fc.weight.*ln_f.bias.* unexpected .*h.0.crossattention"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("changes, complaint", [
    ({"vocab_size": 31}, r"wte.weight has shape \[30, 12\].*\[31, 12\]"),
    ({"n_inner": 24}, r"mlp.c_fc.* has shape"),
    ({"n_layer": 3}, r"missing .*h.2"),
    ({"n_layer": 1}, r"unexpected .*h.1")])
def test_weights_of_another_shape_are_refused(changes, complaint, checkpoint):
    folder, tensors = checkpoint
    save_safetensors(tensors, folder)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=complaint):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("name, t, complaint", [
    ("lm_head.weight", torch.ones(30, 12), "lm_head.weight differs"),
    ("lm_head.weight", torch.ones(29, 12), "lm_head.weight"),
    ("ln_f.bias", torch.ones(12, dtype=torch.int64), "ln_f.bias.* is torch.int64"),
    ("ln_f.bias", torch.ones(12, dtype=torch.float64), "ln_f.bias.* is torch.float64"),
    ("h.0.mlp.c_fc.weight", torch.ones(48, 12), r"h.0.mlp.c_fc.weight.* has shape"),    # as nn.Linear stores it
    ("h.0.mlp.c_fc.weight", torch.ones(12, 48, 1), r"h.0.mlp.c_fc.weight.* has shape"),
    ("wpe.weight", torch.ones(()), r"wpe.weight.* has shape")])
def test_tensors_that_do_not_fit_are_refused(name, t, complaint, checkpoint):
    folder, tensors = checkpoint
    save_safetensors(tensors | {name: t}, folder)
    with pytest.raises(ValueError, match=complaint):
        GPT.from_pretrained(folder)


def test_missing_files_are_os_errors_that_name_them(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(OSError, match="pytorch_model.bin"):
        GPT.from_pretrained(folder)
    with pytest.raises(OSError, match="config.json"):
        GPT.from_pretrained(folder / "nowhere")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_it_should(p, dtype):
    """Independently of each other, and the gradient passes where the number did. Not in evaluation."""
    torch.manual_seed(0)
    drop, x = Dropout(p), torch.ones(1001, 1003, dtype=dtype, requires_grad=True)
    y = drop(x)
    y.sum().backward()
    torch.testing.assert_close(y, x.grad)
    assert set(y.unique().tolist()) <= {0.0, y.max().item()} and y.max().item() == approx(1 / (1 - p), rel=0.01)
    gone = (y == 0).double()
    assert abs(gone.mean() - p) < 0.002
    for other in (gone.roll(1), gone.roll(2), gone.roll(3), gone.roll(4), gone.roll(1, 0)):
        assert abs((gone * other).mean() - p * p) < 0.002
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_spelt_out_equals_pytorchs(masked):
    """In bfloat16 with gradients on a CPU the formula is written out; its output and gradients are those of float32's kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7 if masked else 5, 7 if masked else 5))
    mask = torch.rand(2, 1, 5, 7) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (q, k, v)]
        y = attend(*inputs, mask, Dropout(0.0))
        y.backward(torch.ones_like(y).cumsum(-1))
        results.append([y.dtype == dtype, y.float(), *(t.grad.float() for t in inputs)])
    assert results[0][0] and results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:], atol=0.06, rtol=0.03)


def test_bfloat16_rounds_logits_no_more_than_transformers_does():
    """Both against float32, on real weights and text: the form of GELU that bfloat16 gets must not be seen in the sum."""
    folder = ROOT / "tiny" / "tiny-gpt2"
    text = (ROOT / "tiny" / "dialogues" / "test.txt").read_text(encoding="utf-8").replace("__eou__", "")
    ids = torch.tensor(load_tokenizer(folder).encode(text)[:2048]).view(16, 128)
    gpt, theirs = GPT.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        exact = theirs(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            errors = [(logits.float() - exact).square().mean().sqrt().item() for logits in (gpt(ids), theirs(ids).logits)]
    assert 0 < errors[0] < 1.1 * errors[1]


# --------------------------------------------------------------------------------------------------- generating text

def greedy(model, query, new, eot):
    """transformers' greedy continuation of one query alone, without eot."""
    ids = model.generate(torch.tensor([query]), attention_mask=torch.ones(1, len(query)), max_new_tokens=new,
                         do_sample=False, eos_token_id=eot, pad_token_id=eot)
    answer = ids[0, len(query):].tolist()
    return answer[:-1] if answer[-1] == eot else answer


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A transformers model, the same as GPT, queries of 1 to 60 tokens, and a token that ends some answers."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=84, n_embd=33, n_layer=2, n_head=3,
                                       initializer_range=0.6, bos_token_id=0, eos_token_id=0)).eval()
    gpt, r = loaded(model, tmp_path_factory.mktemp("writer")), random.Random(0)
    queries = [[r.randrange(40) for _ in range(length)] for length in (3, 60, 1, 17, 2, 44, 1, 29, 8, 5, 51, 12)]
    free = gpt.generate(queries, max_new_tokens=24, eot=-1)
    eot = max(range(40), key=lambda token: len({answer.index(token) for answer in free if token in answer}))
    return model, gpt, queries, eot


def test_greedy_answers_equal_transformers(writer):
    model, gpt, queries, eot = writer
    answers = gpt.generate(queries, max_new_tokens=24, eot=eot)
    assert answers == [greedy(model, query, 24, eot) for query in queries]
    lengths = [len(answer) for answer in answers]
    assert max(lengths) == 24 and min(lengths) < 12 and len(set(lengths)) > 3       # rows did end at different times


def test_the_whole_room_of_n_positions_can_be_used_and_no_more(writer):
    model, gpt, queries, _ = writer
    assert gpt.generate(queries[:3], [20, 24, 83], eot=-1) == [greedy(model, query, new, None) for query, new in
                                                               zip(queries[:3], (20, 24, 83))]
    with pytest.raises(ValueError, match="85.*84"):
        gpt.generate(queries[:3], [20, 25, 3], eot=-1)


def test_each_query_may_have_its_own_limit(writer):
    _, gpt, queries, eot = writer
    limits = [5, 24, 1, 8, 17, 2, 9, 24, 4, 3, 24, 11]
    full = gpt.generate(queries, max_new_tokens=24, eot=eot)
    assert gpt.generate(queries, limits, eot) == [answer[:limit] for answer, limit in zip(full, limits)]


def test_no_room_no_words(writer):
    _, gpt, queries, eot = writer
    assert gpt.generate(queries[:3], 0, eot) == [[], [], []]
    assert [len(answer) for answer in gpt.generate(queries[:3], [2, 0, 1], eot=-1)] == [2, 0, 1]


def test_no_queries_no_answers(writer):
    assert writer[1].generate([], max_new_tokens=5) == []


def test_finished_rows_leave_and_each_token_costs_one_position(writer):
    _, gpt, queries, eot = writer
    shapes = []
    hook = gpt.h[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[:2]))
    answers = gpt.generate(queries, max_new_tokens=24, eot=eot)
    hook.remove()
    written = [len(answer) + (len(answer) < 24) for answer in answers]                # the closing eot is written too
    assert shapes == [(12, 60)] + [(sum(n > step for n in written), 1) for step in range(1, 24)]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_queries_enter_as_others_leave(batch_size, writer):
    """Answers do not depend on the company, no more than batch_size are under way at once, and places do not stay empty."""
    _, gpt, queries, eot = writer
    expected, sizes = gpt.generate(queries, max_new_tokens=24, eot=eot), []
    hook = gpt.h[0].register_forward_hook(lambda module, inputs, output: sizes.append((output.size(1) == 1, len(output))))
    answers = gpt.generate(queries, 24, eot, batch_size=batch_size)
    answers_to_short = gpt.generate([[1], [2], [3]], 24, eot, batch_size=batch_size)
    hook.remove()
    assert answers == expected and answers_to_short == [gpt.generate([[n]], 24, eot)[0] for n in (1, 2, 3)]
    assert max(size for _, size in sizes) <= batch_size
    steps = sum(max(0, len(answer) - (len(answer) == 24)) for answer in (*answers, *answers_to_short))
    assert sum(one and size for one, size in sizes) >= steps > (batch_size > 1) * sum(one for one, _ in sizes)


def test_the_cache_has_room_for_what_is_there_and_no_more(writer, monkeypatch):
    """One query alone does not pay for 64 places."""
    _, gpt, queries, eot = writer
    places, join = [], Cache.join
    monkeypatch.setattr(Cache, "join", lambda cache, *args: (join(cache, *args), places.append(cache.layers[0][0].shape)))
    gpt.generate(queries[:1], 7, eot)
    gpt.generate(queries, 24, eot, batch_size=8)
    assert places[0] == (1, 3, 10, 11) and {shape[0] for shape in places[1:]} == {8} and len(places) == 7


def test_more_positions_than_there_are():
    model = GPT(GPTConfig(vocab_size=9, n_positions=5, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="6 positions .* n_positions is 5"):
        model(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="6 positions"):
        model(torch.zeros(1, 4, dtype=torch.int64), Past(torch.zeros(1, 2, 1, 2, 2, 4)))


@pytest.mark.parametrize("queries, complaint", [([[1, 2], []], "no tokens"), ([[1] * 85], "n_positions")])
def test_impossible_queries_are_refused(queries, complaint, writer):
    with pytest.raises(ValueError, match=complaint):
        writer[1].generate(queries, max_new_tokens=1)


@pytest.mark.parametrize("temperature, top_p", [(1, 1), (0.5, 1), (3, 1), (1, 0.7), (2, 0.95), (0.7, 0.5)])
def test_draws_follow_the_distribution_of_transformers(temperature, top_p):
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 9)
    warped = TopPLogitsWarper(float(top_p))(None, TemperatureLogitsWarper(float(temperature))(None, logits))
    drawn = choose(logits.expand(20_000, -1), temperature, top_p)
    shares = drawn.bincount(minlength=9) / 20_000
    torch.testing.assert_close(shares, F.softmax(warped, dim=-1)[0], atol=0.015, rtol=0)
    assert not shares[warped[0].isinf()].any()                                        # never from outside the nucleus


def test_each_row_draws_from_its_own_distribution():
    logits = torch.full((50, 9), -100.0)
    favourites = torch.arange(50) % 9
    logits[torch.arange(50), favourites] = 0
    assert torch.equal(choose(logits, temperature=1.0, top_p=0.9), favourites)
    assert torch.equal(choose(logits, temperature=1e-40, top_p=0.9), favourites)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.0), (1.0, 1e-9), (1e-6, 1.0)])
def test_the_narrowest_draw_is_greedy(temperature, top_p, writer):
    _, gpt, queries, eot = writer
    drawn = gpt.generate(queries, 24, eot, temperature=temperature, top_p=top_p)
    assert drawn == gpt.generate(queries, 24, eot)


def test_a_seed_fixes_the_draws(writer):
    _, gpt, queries, eot = writer

    def draw(seed):
        torch.manual_seed(seed)
        return gpt.generate(queries, 24, eot, temperature=1.0, top_p=0.9)

    assert draw(1) == draw(1) != draw(2)
