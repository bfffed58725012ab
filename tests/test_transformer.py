"""The decoder against transformers.Qwen2ForCausalLM, itself cached, and its parts against closed forms."""
import copy

import pytest
import torch

import transformer
from fast import decode, layer as fast_layer, products
from qwen_load import hub_name
from sample import generate, generate_stream
from transformer import KVCache, RMSNorm, Transformer, TransformerConfig, attention, fast_attention, rotary_cos_sin, apply_rotary_emb

CONFIGS = [dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48), dict(n_layer=1, n_head=3, n_kv_head=1, n_embd=18, n_hidden=20),
           dict(n_layer=3, n_head=2, n_kv_head=2, n_embd=16, n_hidden=40, tied=False, rope_theta=1e6)]


def make(seed=0, **sizes):
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(vocab_size=61, block_size=64, **sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():                            # biases and norms off their initial 0 and 1
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.mark.parametrize("sizes", CONFIGS)
def test_logits_and_gradients_match_qwen2_of_transformers(sizes):
    transformers = pytest.importorskip("transformers")
    model, c = make(**sizes), TransformerConfig(vocab_size=61, **sizes)
    library = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=61, hidden_size=c.n_embd, intermediate_size=c.n_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, tie_word_embeddings=c.tied,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, rms_norm_eps=c.norm_eps)).eval()
    library.load_state_dict({hub_name(n): p for n, p in model.state_dict().items()}, strict=True)
    tokens = torch.randint(61, (3, 40))
    hidden, _ = model(tokens)
    expected = library(tokens).logits
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=1e-4)
    model(tokens[:, :-1], targets=tokens[:, 1:])[0].backward()
    torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = dict(library.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad - theirs[hub_name(name)].grad).norm() <= 1e-4 * p.grad.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("sizes", CONFIGS)
@pytest.mark.parametrize("cuts", [[1] * 30, [30], [7, 23], [1, 1, 20, 8], [29, 1]])
def test_cached_equals_uncached_for_any_split(sizes, cuts):
    model = make(**sizes)
    tokens = torch.randint(61, (2, 30))
    with torch.no_grad():
        whole, none = model(tokens)
        state, parts = model.init_state(2, 30), []
        for piece in tokens.split(cuts, 1):
            hidden, state = model(piece, state)
            parts.append(hidden)
    assert none is None and state.length == 30
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 9), (4, 9), (300, 300)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_readable_attention_equals_the_fast_path(T, S, heads):
    torch.manual_seed(T)
    q, k, v = torch.randn(2, heads[0], T, 8), torch.randn(2, heads[1], S, 8), torch.randn(2, heads[1], S, 8)
    with torch.no_grad():                                       # no gradient: the fused kernel, at any length
        torch.testing.assert_close(fast_attention(q, k, v), attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_fused_backward_equals_the_readable_one():
    torch.manual_seed(0)
    leaves = [torch.randn(2, 4, 300, 8, requires_grad=True) for _ in range(3)]
    ours, fused = attention(*leaves), fast_attention(*leaves)
    assert "ScaledDotProduct" in type(fused.grad_fn).__name__   # beyond 256 tokens torch's kernel runs
    weight = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), leaves), torch.autograd.grad((fused * weight).sum(), leaves)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_attention_by_brute_force():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    out = attention(q, k, v)
    for head in range(2):
        for t in range(3):
            weights = [torch.exp(q[0, head, t] @ k[0, 0, s] / 2) for s in range(2 + t + 1)]     # sees positions 0..t+2
            expected = sum(w * v[0, 0, s] for s, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(out[0, head, t], expected)


def test_rope_depends_on_the_distance_alone():
    torch.manual_seed(2)
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = rotary_cos_sin(torch.arange(100), 8, 10000.0)

    def score(t, s):
        return apply_rotary_emb(q, cos[t], sin[t]) @ apply_rotary_emb(k, cos[s], sin[s])
    for distance in (0, 1, 30):
        scores = torch.stack([score(t + distance, t) for t in range(0, 60, 7)])
        torch.testing.assert_close(scores, scores[:1].expand_as(scores), atol=1e-5, rtol=1e-5)
    assert not torch.isclose(score(1, 0), score(30, 0))


def test_rms_norm_has_unit_mean_square():
    x = torch.randn(4, 5, 32) * 7
    torch.testing.assert_close(RMSNorm(32, 0.0)(x).square().mean(-1), torch.ones(4, 5))


def test_a_later_token_never_changes_an_earlier_output():
    model, tokens = make(**CONFIGS[0]), torch.randint(61, (1, 20))
    with torch.no_grad():
        before, _ = model(tokens)
        tokens[0, 12] = (tokens[0, 12] + 1) % 61
        after, _ = model(tokens)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.allclose(before[:, 12:], after[:, 12:])


def test_a_context_that_is_too_long_is_refused():
    model = make(**CONFIGS[0])
    with pytest.raises(ValueError, match="65 tokens do not fit"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        model(torch.zeros(1, 9, dtype=torch.long), model.init_state(1, 8))


def test_sizes_that_do_not_fit_are_refused():
    for bad in (dict(n_embd=30, n_head=4, n_kv_head=4), dict(n_embd=32, n_head=4, n_kv_head=3)):
        with pytest.raises(ValueError, match="n_head"):
            Transformer(TransformerConfig(vocab_size=5, **bad))


def test_the_cache_is_allocated_once():
    model = make(**CONFIGS[0])
    state = model.init_state(2, 10)
    where = [layer.data_ptr() for layer in (*state.k, *state.v)]
    with torch.no_grad():
        for _ in range(10):
            _, state = model(torch.zeros(2, 1, dtype=torch.long), state)
    assert isinstance(state, KVCache) and state.length == 10
    assert [layer.data_ptr() for layer in (*state.k, *state.v)] == where


def test_causal_mask_counts():
    for T, S in ((1, 1), (3, 3), (2, 7)):
        visible = (transformer.causal_mask(T, S, torch.zeros(1)) == 0).sum(1)
        assert visible.tolist() == [S - T + 1 + t for t in range(T)]


# ---------------------------------------------------------------- generation in bfloat16 on a CPU

@pytest.fixture(params=["compiled", "torch operations"])
def few_rows(request, monkeypatch):
    """Both ways of multiplying few rows; a test that asks for the compiled one where there is no compiler is skipped."""
    if request.param == "torch operations":
        monkeypatch.setattr(decode, "compiled_linear", lambda: None)
    elif decode.compiled_linear() is None:
        pytest.skip("no C compiler here")


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 1), (2, 5), (128,), (129,), (0,)])
@pytest.mark.parametrize("n_in, n_out", [(2, 1), (2, 3), (7, 5), (128, 64), (130, 33), (384, 10), (896, 151), (4864, 17)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_bf16_is_the_exact_product_rounded_once_or_twice(few_rows, rows, n_in, n_out, bias):
    torch.manual_seed(n_in + n_out)
    layer, x = torch.nn.Linear(n_in, n_out, bias).bfloat16(), torch.randn(*rows, n_in).bfloat16()
    decode.use_decode_kernels(layer)
    assert type(layer) is decode.DecodeLinear
    exact = x.double() @ layer.weight.double().t()
    with torch.no_grad():
        got = layer(x)
    product = exact.clone()                                     # some ways round it before the bias comes on
    if bias:
        exact = exact + layer.bias.double()
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= (exact.abs() + product.abs()) * 2 ** -8 + 1e-6).all()


@pytest.mark.parametrize("sizes", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_reading_token_by_token_in_bf16_equals_float32_on_the_same_weights(few_rows, sizes, rows):
    model = make(**sizes).bfloat16()
    decode.use_decode_kernels(model)
    tokens, state, out = torch.randint(61, (rows, 20)), model.init_state(rows, 20), []
    with torch.no_grad():
        for piece in tokens.split(1, 1):
            hidden, state = model(piece, state)
            out.append(model.logits(hidden))
        got, exact = torch.cat(out, 1).float(), (model.float(), model.logits(model(tokens)[0]))[1]
    assert (got - exact).norm() <= 0.03 * exact.norm()


def test_nan_is_not_hidden(few_rows):
    layer = torch.nn.Linear(4, 3).bfloat16()
    decode.use_decode_kernels(layer)
    with torch.no_grad():
        assert layer(torch.full((1, 4), float("nan")).bfloat16()).isnan().all()


def test_gradients_never_take_the_way_of_generation():
    layer = torch.nn.Linear(4, 3).bfloat16()
    decode.use_decode_kernels(layer)
    x = torch.randn(1, 4, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, x.expand(3, 4))


def test_float32_keeps_torchs_way_but_where_onednn_is_faster(monkeypatch):
    for onednn, kind in ((False, torch.nn.Linear), (True, decode.DecodeLinear)):
        monkeypatch.setattr(decode, "AMD", onednn)
        layer = torch.nn.Linear(4, 3)
        decode.use_decode_kernels(layer)
        assert type(layer) is kind


def few_rows_of(dtype, monkeypatch):
    """A DecodeLinear that packs its weight for a few rows, or a skip."""
    monkeypatch.setattr(decode, "AMD", dtype == torch.float32)
    if not torch.backends.mkldnn.is_available() or dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("nothing is packed here")
    layer = torch.nn.Linear(33, 70).to(dtype)
    decode.use_decode_kernels(layer)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_never_stale(dtype, monkeypatch):
    """Whether it is trained by a fused optimizer (which leaves no trace in _version), refreshed in place as PPO's
    sampler is, changed through .data, or replaced: the next generation of several rows is that of its numbers."""
    monkeypatch.setattr(decode, "AMD", dtype == torch.float32)
    model, packs = make(n_embd=32, n_head=4, n_layer=2).to(dtype), []
    decode.use_decode_kernels(model)
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: packs.append(1) or reorder(*args))

    def right(rows):
        prompts = [[1, 2, 3]] * rows
        tokens = generate(model, prompts, 6, temperature=0)
        texts = torch.tensor([prompt + row for prompt, row in zip(prompts, tokens)])
        with torch.no_grad():
            logits = model.logits(model(texts)[0])[:, 2:-1]                     # of whole texts: nothing is packed
        behind = logits.amax(-1) - logits.gather(2, texts[:, 3:, None])[..., 0]
        assert behind.max() <= (1e-4 if dtype == torch.float32 else 0.03) * logits.abs().max()

    right(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    right(8)
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})
    right(3)
    with torch.no_grad():
        for p in model.parameters():
            p.data = torch.randn_like(p)
            p.data.mul_(2)
    right(32)
    model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.randn_like(model.layers[0].mlp.up_proj.weight))
    right(8)
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert len(packs) >= 5 * 2 * 7 and len(packs) % 5 == 0              # each matrix once in each generation
    assert decode.PACKED is None


def test_a_float32_decode_linear_under_autocast_multiplies_in_bfloat16(monkeypatch):
    layer = few_rows_of(torch.float32, monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 33)).dtype == torch.bfloat16


def test_without_a_compiler_there_is_no_compiled_code(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(decode, "compile_c", products.compile_c.__wrapped__)
    monkeypatch.setattr(fast_layer, "compile_c", products.compile_c.__wrapped__)
    assert decode.compiled_linear.__wrapped__() is None
    model = make(**CONFIGS[0])
    fast_layer.use_layer_kernels(model)
    assert {type(layer) for layer in model.layers} == {transformer.DecoderLayer}


def pair(seed=0, **sizes):
    """The same weights in textbook layers and in layers with the kernels."""
    if fast_layer.layer_kernels(torch.float32, torch.float32) is None:
        pytest.skip("no C compiler here")
    plain = make(seed, **sizes).train()
    fast = copy.deepcopy(plain)
    fast_layer.use_layer_kernels(fast)
    assert {type(layer) for layer in fast.layers} == {fast_layer.FastDecoderLayer}
    return plain, fast


def loss_and_gradients(model, tokens, bf16=False):
    torch.manual_seed(1)                                        # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])[0]
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())]).float()


@pytest.mark.parametrize("sizes", [*CONFIGS, dict(n_layer=2, n_head=4, n_kv_head=1, n_embd=104, n_hidden=130)])
@pytest.mark.parametrize("B, T", [(1, 1), (3, 2), (2, 37), (9, 64)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_layer_by_hand_has_the_textbooks_loss_and_gradients(sizes, B, T, rate):
    plain, fast = pair(dropout=rate, **sizes)
    tokens = torch.randint(61, (B, T + 1))
    expected, got = (loss_and_gradients(model, tokens) for model in (plain, fast))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    fast.zero_grad()
    fast.checkpointing = True
    torch.testing.assert_close(loss_and_gradients(fast, tokens), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sizes", CONFIGS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_layer_by_hand_in_bf16_is_no_less_exact_than_the_textbook(sizes, weights):
    of_textbook = by_hand = 0
    for seed in range(6):                                       # one draw says little about an error
        plain, fast = (model.to(weights) for model in pair(seed, **sizes))
        tokens, exact = torch.randint(61, (4, 50)), copy.deepcopy(plain).double()
        exact, expected, got = (loss_and_gradients(model, tokens, model is not exact) for model in (exact, plain, fast))
        of_textbook += (expected - exact).norm() / exact.norm()
        by_hand += (got - exact).norm() / exact.norm()
    assert by_hand <= 1.2 * of_textbook


def test_a_layer_by_hand_gives_way_where_it_does_not_apply():
    plain, fast = pair(**CONFIGS[0])
    tokens = torch.randint(61, (2, 30))
    with torch.no_grad():
        assert torch.equal(fast(tokens, fast.init_state(2, 30))[0], plain(tokens, plain.init_state(2, 30))[0])
        assert torch.equal(fast.double()(tokens)[0], plain.double()(tokens)[0])
        plain, fast = plain.float(), copy.deepcopy(fast).float()
        plain.config.block_size = fast.config.block_size = 1025
        tokens = torch.randint(61, (1, 1025))
        assert torch.equal(fast(tokens)[0], plain(tokens)[0])
        assert not torch.equal(fast(tokens[:, 1:])[0], plain(tokens[:, 1:])[0])       # here it applies


def test_a_layer_by_hand_has_a_graph_that_can_be_walked_twice():
    _, fast = pair(dropout=0.2, **CONFIGS[0])
    x = torch.randn(2, 9, 32, requires_grad=True)
    y = fast.layers[0](x, *rotary_cos_sin(torch.arange(9), 8, 1e4), None)
    first, second = (torch.autograd.grad(y.square().sum(), [x, *fast.layers[0].parameters()], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_layer_by_hand_does_not_hide_what_is_not_a_number():
    _, fast = pair(**CONFIGS[0])
    with torch.no_grad():
        fast.embed_tokens.weight[7, 3] = float("nan")
        hidden = fast(torch.tensor([[5, 7, 6]]))[0]
    assert hidden[0, 1:].isnan().all()


def half_the_window(T, S, like):
    return causal_mask(T, S, like).masked_fill(torch.ones(T, S).tril(S - T - 20).bool(), float("-inf"))


causal_mask = transformer.causal_mask
ATTENTION = transformer.Attention.__init__
CHANGES = {
    "attention": lambda q, k, v: attention(q, k / 2, v),
    "causal_mask": half_the_window,
    "apply_rotary_emb": lambda x, cos, sin: x,
    "RMSNorm.forward": lambda self, x: x * self.weight,
    "SwiGLU.forward": lambda self, x: self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x)),
    "DecoderLayer.forward": lambda self, x, cos, sin, cache: self.input_layernorm(
        x + self.mlp(self.post_attention_layernorm(x + self.self_attn(x, cos, sin, cache)))),
    "Attention.__init__": lambda self, c, layer: (ATTENTION(self, c, layer), setattr(self.q_proj, "bias", None))[0],
    "RMSNorm": lambda dim, eps: torch.nn.LayerNorm(dim),
    "dropout": lambda x, p, training: x,
}


def swiglu_with_a_tenth_of_its_gradient(self, x):
    y = self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
    return y.detach() + 0.1 * (y - y.detach())


def detached_before_the_mlp(self, x, cos, sin, cache):
    x = x + transformer.dropout(self.self_attn(self.input_layernorm(x), cos, sin, cache), self.dropout, self.training)
    return x + transformer.dropout(self.mlp(self.post_attention_layernorm(x).detach()), self.dropout, self.training)


# what no output shows, or only large activations
HIDDEN_CHANGES = {
    "attention": lambda q, k, v: attention(q, k.detach(), v),
    "SwiGLU.forward": swiglu_with_a_tenth_of_its_gradient,
    "DecoderLayer.forward": detached_before_the_mlp,
    "SwiGLU.forward ": lambda self, x: self.down_proj(torch.nn.functional.silu(self.gate_proj(x).clamp(-7, 7)) * self.up_proj(x).clamp(-7, 7)),
}


@pytest.mark.parametrize("name", HIDDEN_CHANGES)
@pytest.mark.parametrize("block_size", [16, 400])
def test_a_change_that_only_gradients_or_large_activations_show_is_run(monkeypatch, name, block_size):
    pair(**CONFIGS[0])
    monkeypatch.setattr(f"transformer.{name.strip()}", HIDDEN_CHANGES[name])
    model = Transformer(TransformerConfig(61, block_size, **CONFIGS[0]))
    fast_layer.use_layer_kernels(model)
    assert {type(layer) for layer in model.layers} == {transformer.DecoderLayer}


@pytest.mark.parametrize("how", ["forward hook", "hook inside", "pre-hook", "backward hook", "parametrization"])
def test_a_layer_that_is_watched_runs_as_the_textbook(how):
    plain, fast = pair(**CONFIGS[0])
    seen, tokens = [], torch.arange(21)[None]
    layer = fast.layers[1]
    if how == "parametrization":
        class Half(torch.nn.Module):
            def forward(self, w):
                seen.append(1)
                return w / 2
        torch.nn.utils.parametrize.register_parametrization(layer.mlp.up_proj, "weight", Half())
        with torch.no_grad():
            plain.layers[1].mlp.up_proj.weight.div_(2)
    else:
        part = layer if how == "forward hook" else layer.self_attn.v_proj
        register = {"pre-hook": part.register_forward_pre_hook, "backward hook": part.register_full_backward_hook}.get(how, part.register_forward_hook)
        register(lambda *_: seen.append(1) and None)
    loss, expected = (model(tokens[:, :-1], targets=tokens[:, 1:])[0] for model in (fast, plain))
    loss.backward()
    assert seen
    torch.testing.assert_close(loss, expected)


def test_float16_and_a_whole_number_as_epsilon_go_the_textbooks_way():
    plain, fast = pair(**CONFIGS[0])
    tokens = torch.arange(21)[None]
    with torch.autocast("cpu", torch.float16):
        losses = [model(tokens[:, :-1], targets=tokens[:, 1:])[0] for model in (fast, plain)]
    assert torch.equal(*losses)
    plain, fast = pair(norm_eps=1, **CONFIGS[0])
    torch.testing.assert_close(fast(tokens)[0], plain(tokens)[0], atol=1e-5, rtol=1e-4)


def test_packed_weights_are_in_force_only_during_a_models_calls():
    model = make(**CONFIGS[0])
    decode.use_decode_kernels(model)
    stream = generate_stream(model, [[1, 2], [3, 4]], 5, 0.0)
    for _ in range(3):
        next(stream)
        assert decode.PACKED is None
    stream.close()
    assert decode.PACKED is None


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_class_is_trained_as_it_was_changed(monkeypatch, name):
    """What a student writes into the textbook part must not be passed by in silence."""
    pair(**CONFIGS[0], dropout=0.2)
    before = loss_and_gradients(make(**CONFIGS[0], dropout=0.2).train(), tokens := torch.arange(41)[None])
    monkeypatch.setattr(f"transformer.{name}", CHANGES[name])
    plain, model = (make(**CONFIGS[0], dropout=0.2).train() for _ in range(2))
    fast_layer.use_layer_kernels(model)
    expected, got = (loss_and_gradients(m, tokens) for m in (plain, model))
    assert abs(expected[0] - before[0]) > 1e-5
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_choosing_kernels_draws_no_random_numbers_and_changes_no_weight():
    model = make(**CONFIGS[0])
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fast_layer.use_layer_kernels(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
