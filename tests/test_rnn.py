"""RNN layer, softmax loss and dropouts against torch.nn.RNN, F.cross_entropy, autograd and finite differences."""
import math

import pytest
import torch
import torch.nn.functional as F

import rnn
from fast import products
from fast.products import dropout
from rnn import RNN, LinearCrossEntropy, RNNConfig, RNNLM, embedded_dropout, locked_dropout
from tests.recurrent import (check_against_library, check_bf16_close, check_gradcheck, check_plain_equals_fast,
                             check_stack, check_state_is_carried)

SHAPES = [(1, 1, 1, 1), (1, 7, 3, 5), (4, 1, 6, 2), (3, 9, 8, 8), (5, 20, 17, 33)]      # B, T, I, H


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_state", [False, True])
def test_rnn_matches_the_library_forward_and_backward(shape, with_state):
    check_against_library(RNN, torch.nn.RNN, shape, with_state)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_step_equals_fast_function(shape):
    check_plain_equals_fast(RNN, shape)


def test_rnn_gradients_match_finite_differences():
    check_gradcheck(RNN)


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_stacked_layers_match_the_library(n_layer):
    check_stack(RNNLM, RNNConfig, torch.nn.RNN, n_layer)


def test_any_split_of_the_text_gives_the_same_hidden_states():
    check_state_is_carried(RNNLM, RNNConfig)


def test_bf16_stays_close_to_float32():
    check_bf16_close(RNN)


def test_a_text_without_time_steps_is_refused():
    with pytest.raises(ValueError, match="time step"):
        RNN(3, 4)(torch.zeros(2, 0, 3))


# ---- the softmax loss

@pytest.mark.parametrize("n, vocab, biased, n_chunks", [(1, 2, True, 1), (7, 11, False, 1), (23, 31, True, 5), (9, 9, True, 9)])
def test_linear_cross_entropy_matches_the_library(monkeypatch, n, vocab, biased, n_chunks):
    torch.manual_seed(n)
    monkeypatch.setattr(rnn, "MOST_LOGITS", -(-n * vocab // n_chunks))
    monkeypatch.setattr(rnn, "FEWEST_ROWS", 1)
    assert len(list(rnn.row_chunks(vocab, torch.zeros(n, 6)))) == n_chunks
    hidden, weight = torch.randn(n, 6, dtype=torch.double), torch.randn(vocab, 6, dtype=torch.double)
    bias = torch.randn(vocab, dtype=torch.double) if biased else None
    targets = torch.randint(vocab, (n,))
    targets[::3] = -1
    inputs = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    ours = LinearCrossEntropy.apply(hidden, weight, bias, targets)
    theirs = F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=-1, reduction="sum") \
        if (targets >= 0).any() else (hidden * 0).sum()
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(ours * 0.37, inputs), torch.autograd.grad(theirs * 0.37, inputs, allow_unused=True)):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-10, rtol=1e-10)


def test_linear_cross_entropy_gradient_is_right_where_the_probability_underflows():
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = LinearCrossEntropy.apply(hidden, torch.eye(2), None, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite() and loss > 80
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, -1.0]]))


def test_linear_cross_entropy_in_bf16_is_within_its_precision():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(300, 64), torch.randn(500, 64) * 0.3, torch.randint(500, (300,))
    h, w = hidden.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    ours = LinearCrossEntropy.apply(h, w, None, targets)
    ours.backward()
    hidden, weight = hidden.bfloat16().float().requires_grad_(), weight.bfloat16().float().requires_grad_()
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    exact.backward()
    assert abs(ours / exact - 1) < 2e-3 and w.grad.dtype == torch.float32
    assert (w.grad - weight.grad).norm() / weight.grad.norm() < 0.01
    assert (h.grad.float() - hidden.grad).norm() / hidden.grad.norm() < 0.01


@pytest.mark.parametrize("p", [0.5, 0.99, 0.997, 0.999])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_in_bf16_is_right_where_the_model_is_sure(p, reduction):
    """bfloat16 rounds p = 0.997 to 0.996: p - 1 must be formed before it is rounded."""
    head = torch.nn.Linear(2, 2, bias=False)
    logit = torch.tensor(math.log(p / (1 - p))).bfloat16()
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    hidden = torch.stack((logit, torch.tensor(0.0).bfloat16()))[None].requires_grad_()
    loss = rnn.softmax_loss(hidden, head, torch.tensor([0]), reduction)
    loss.sum().backward()
    exact = torch.sigmoid(-logit.double())                                      # 1 - p of the rounded logit
    assert loss.sum().item() == pytest.approx(-math.log1p(-exact), rel=2e-4)
    assert hidden.grad[0, 0].item() == pytest.approx(-exact.item(), rel=2 ** -8)


@pytest.mark.parametrize("bias", [True, False])
def test_each_tokens_loss_and_gradient_equal_autograds(bias, monkeypatch):
    monkeypatch.setattr(rnn, "MOST_LOGITS", 1)
    monkeypatch.setattr(rnn, "FEWEST_ROWS", 4)                                 # several chunks
    torch.manual_seed(0)
    hidden, head, slope = torch.randn(3, 5, 6, dtype=torch.double, requires_grad=True), torch.nn.Linear(6, 11, bias).double(), torch.randn(3, 5, dtype=torch.double)
    targets, suppressed = torch.randint(11, (3, 5)), torch.tensor([2, 9])
    targets[1, 2:] = -1
    targets[(targets == 2) | (targets == 9)] = 0
    got = rnn.softmax_loss(hidden, head, targets, "none", suppressed)
    logits = head(hidden).index_fill(-1, suppressed, -math.inf)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(got, expected)
    inputs = [hidden, *head.parameters()]
    for a, b in zip(torch.autograd.grad((got * slope).sum(), inputs), torch.autograd.grad((expected * slope).sum(), inputs)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(rnn.softmax_loss(hidden, head, targets, "none", suppressed), expected)
        torch.testing.assert_close(rnn.softmax_loss(hidden, head, targets, "none"), rnn.softmax_loss(hidden, head, targets, "none", targets.flatten()[:0]), check_dtype=False)


@pytest.mark.parametrize("n_rows, vocab", [(1, 10), (256, 10_000), (1120, 10_000), (4096, 151_936), (100_000, 50_000)])
def test_chunks_are_bounded_and_not_tiny(n_rows, vocab):
    rows = [len(part) for part, in rnn.row_chunks(vocab, torch.empty(n_rows, 0, device="meta"))]
    assert sum(rows) == n_rows and rows[0] * vocab <= max((1 << 23) + vocab, 1024 * vocab)
    assert len(rows) == 1 or rows[0] >= 512


def test_loss_and_nll_agree_and_ignore_minus_one():
    torch.manual_seed(1)
    model = RNNLM(RNNConfig(vocab_size=17, n_embd=5, n_hidden=9, n_layer=2)).eval()
    targets = torch.randint(17, (3, 8))
    targets[1, 4:] = -1
    tokens = torch.randint(17, (3, 8))
    hidden, _ = model(tokens)
    nll, state = model(tokens, targets=targets, reduction="none")
    expected = F.cross_entropy(model.logits(hidden).transpose(1, 2), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert (nll[1, 4:] == 0).all() and nll.dtype == torch.float32 and len(state) == 2
    torch.testing.assert_close(model(tokens, targets=targets)[0], nll.sum() / 20)       # 24 targets, 4 of them -1


def test_tied_weights_get_both_gradients():
    torch.manual_seed(2)
    tokens, targets = torch.randint(7, (2, 5)), torch.randint(7, (2, 5))
    model = RNNLM(RNNConfig(vocab_size=7, n_embd=4, n_hidden=6, n_layer=2))
    model(tokens, targets=targets)[0].backward()
    ours = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    hidden, _ = model(tokens)
    F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten()).backward()
    torch.testing.assert_close(ours, model.embed_tokens.weight.grad)
    assert model.lm_head.weight is model.embed_tokens.weight


# ---- dropouts

def test_locked_dropout_keeps_one_mask_for_all_time_steps():
    torch.manual_seed(3)
    x = locked_dropout(torch.ones(50, 9, 40), 0.3, training=True)
    assert (x == x[:, :1]).all() and abs((x == 0).float().mean() - 0.3) < 0.03
    torch.testing.assert_close(x[x != 0], torch.full_like(x[x != 0], 1 / 0.7))
    assert locked_dropout(x, 0.3, training=False) is x


def test_embedding_dropout_drops_whole_words_everywhere():
    torch.manual_seed(4)
    embedding = torch.nn.Embedding(1000, 3)
    tokens = torch.randint(1000, (20, 500))
    x = embedded_dropout(embedding, tokens, 0.2, training=True)
    ratio = (x / embedding(tokens)).detach()
    dropped = ratio[..., 0] == 0
    assert abs(dropped.float().mean() - 0.2) < 0.05
    for word in range(1000):                                    # a word is dropped at every place or at none
        assert len(dropped[tokens == word].unique()) <= 1
    torch.testing.assert_close(ratio[~dropped], torch.full_like(ratio[~dropped], 1.25))


@pytest.mark.parametrize("p", [1e-3, 1 / 300])
def test_a_dropout_below_the_grain_of_the_fast_draw_is_drawn_exactly(p):
    torch.manual_seed(5)
    x = dropout(torch.ones(2000, 1000), p, training=True)
    assert abs((x == 0).double().mean() - p) < 5 * (p / x.numel()) ** 0.5
    assert x.max().item() == pytest.approx(1 / (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_each_element_with_the_right_chance_and_mean(p):
    torch.manual_seed(5)
    x = dropout(torch.ones(1003, 333), p, training=True)
    n, dropped = x.numel(), round(p * 256) / 256
    assert abs((x == 0).double().mean() - dropped) < 5 * (dropped * (1 - dropped) / n) ** 0.5
    assert abs(x.double().mean() - 1) < 5 * (dropped / (1 - dropped) / n) ** 0.5
    by_lane = (x.flatten()[:n // 8 * 8].view(-1, 8) == 0).double().mean(0)      # eight elements share a draw
    assert (by_lane - dropped).abs().max() < 5 * (dropped * (1 - dropped) / n * 8) ** 0.5
    assert dropout(x, p, training=False) is x


# ---------------------------------------------------------------------------------------------------- products

@pytest.fixture(params=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Both libraries, whichever this processor would take."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    for name in ("AMD", "ONEDNN"):
        monkeypatch.setattr(products, name, request.param == "oneDNN")
    return request.param


def close(got, exact, dtype):
    assert got.dtype == dtype and got.shape == exact.shape
    assert (got.double() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * (1 + exact.abs().max()) if exact.numel() else True


@pytest.mark.parametrize("N, K, M", [(1, 1, 1), (0, 3, 4), (1, 7, 5), (13, 1, 3), (3, 65, 129), (64, 33, 8), (513, 40, 77)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_float64s_on_views_too(library, N, K, M, dtype):
    torch.manual_seed(N + K + M)
    x, w, b, g = (torch.randn(*shape).to(dtype) for shape in ((N, K), (M, K), (M,), (N, M)))
    x_view, w_view, g_view = (v.t().contiguous().t() for v in (x, w, g))
    exact, grad = x.double() @ w.double().t(), g.double().t() @ x.double()
    with torch.no_grad():
        for a, c, h in ((x, w, g), (x_view, w_view, g_view), (x, w_view, g_view)):
            close(products.product(a, c), exact, dtype)
            close(products.product(a, c, b), exact + b.double(), dtype)
            close(products.grad_product(h, a), grad, dtype)
        close(products.product(x.view(N, 1, K), w), exact.view(N, 1, M), dtype)


@pytest.mark.parametrize("rows, K, M", [(1, 3, 4), (5, 16, 64), (20, 200, 800), (3, 600, 900)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [1, 9])
def test_packed_linears_equal_float64s(library, rows, K, M, dtype, times):
    torch.manual_seed(rows + K)
    w, x = (torch.randn(*shape).to(dtype) for shape in ((M, K), (rows, K)))
    for weight in (w, w.t().contiguous().t()):
        for v in (x, x.t().contiguous().t()):
            close(products.packed_linear(weight, rows, times)(v), v.double() @ w.double().t(), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 9, 8, 8), (5, 20, 17, 33)])
def test_the_layer_matches_the_library_with_either(library, shape):
    check_against_library(RNN, torch.nn.RNN, shape, True)


def test_the_softmax_loss_is_the_librarys_with_either(library):
    torch.manual_seed(0)
    hidden, head, y = torch.randn(4, 300, 24), torch.nn.Linear(24, 61), torch.randint(-1, 61, (4, 300))
    losses = []
    for loss in (lambda h: rnn.softmax_loss(h, head, y), lambda h: torch.nn.functional.cross_entropy(head(h).flatten(0, 1), y.flatten(), ignore_index=-1)):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        value = loss(h)
        value.backward()
        losses.append((value.detach(), h.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for a, b in zip(*losses):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
