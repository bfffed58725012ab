"""LSTM layer and language model against torch.nn.LSTM, autograd and finite differences."""
import shutil

import pytest
import torch

import lstm
from fast import cells, products
from fast.cells import fast_cells
from lstm import LSTM, LSTMConfig, LSTMLM
from tests.recurrent import (check_against_library, check_gradcheck, check_plain_equals_fast, check_stack,
                             check_state_is_carried, check_bf16_close)

SHAPES = [(1, 1, 1, 1), (1, 7, 3, 5), (4, 1, 6, 2), (3, 9, 8, 8), (5, 20, 17, 33)]      # B, T, I, H


@pytest.fixture(autouse=True, params=["cell in C", "equations"])
def all_cells(request, monkeypatch):
    """Every test here runs twice: as it is where there is a compiler, and with the equations as they are written down."""
    if request.param == "equations":
        monkeypatch.setattr(lstm, "fast_cells", lambda forward, backward, *_: (forward, backward))


@pytest.mark.parametrize("shape", SHAPES + [(40, 3, 9, 70)])                # the last is large enough for two threads
@pytest.mark.parametrize("with_state", [False, True])
def test_lstm_matches_the_library_forward_and_backward(shape, with_state):
    check_against_library(LSTM, torch.nn.LSTM, shape, with_state)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_step_equals_fast_function(shape):
    check_plain_equals_fast(LSTM, shape)


def test_lstm_gradients_match_finite_differences():
    check_gradcheck(LSTM)


@pytest.mark.parametrize("n_layer", [1, 2, 3])
def test_stacked_layers_match_the_library(n_layer):
    check_stack(LSTMLM, LSTMConfig, torch.nn.LSTM, n_layer)


def test_any_split_of_the_text_gives_the_same_hidden_states():
    check_state_is_carried(LSTMLM, LSTMConfig)


def test_bf16_stays_close_to_float32():
    check_bf16_close(LSTM)


def test_forget_gates_start_at_many_time_scales():
    torch.manual_seed(0)
    layer = LSTMLM(LSTMConfig(11, 64, 64, 1)).layers[0]
    i, f, _, _ = (layer.bias_ih + 0).chunk(4)
    assert torch.equal(i, -f) and f.min() >= 0 and f.max() < 4.2 and f.std() > 0.5


def test_gates_saturate_and_nan_is_not_hidden():
    layer, x = LSTM(3, 5), 1e4 * torch.randn(2, 6, 3)
    torch.testing.assert_close(layer(x)[0], layer.plain(x)[0], atol=1e-6, rtol=1e-6)
    x[0, 2, 1] = float("nan")
    out = layer(x)[0]
    assert out[0, 2:].isnan().all() and not out[0, :2].isnan().any() and not out[1].isnan().any()


def test_a_graph_can_be_walked_twice():
    layer, x = LSTM(3, 5), torch.randn(2, 6, 3, requires_grad=True)
    loss = layer(x)[0].square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cell_compiles_where_there_is_a_compiler(dtype):
    assert fast_cells(lstm.cell_forward, lstm.cell_backward, "cpu", dtype)[0] is not lstm.cell_forward


def test_without_a_compiler_and_elsewhere_the_equations_do_the_same(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(cells, "compile_c", products.compile_c.__wrapped__)
    equations = lstm.cell_forward, lstm.cell_backward
    for key in (("cpu", torch.float32), ("cpu", torch.float64), ("cuda", torch.float32)):
        assert fast_cells.__wrapped__(*equations, *key) == equations


FORWARD, BACKWARD = lstm.cell_forward, lstm.cell_backward              # as they are written, whatever a test puts in their place


def clipped_cell(gates, from_h, c_before, c, h, limit):
    FORWARD(gates, from_h, c_before, c, h)
    c.clamp_(-limit, limit)
    h.copy_(gates.chunk(4, 1)[3] * torch.tanh(c))


def forward_then(change):
    def changed(gates, from_h, c_before, c, h):
        FORWARD(gates, from_h, c_before, c, h)
        change(h)
    return changed


def backward_then(change):
    def changed(gates, grad_h, from_next, c_before, c, da, dc):
        BACKWARD(gates, grad_h, from_next, c_before, c, da, dc)
        change(da, dc)
    return changed


EDITS = {"c clipped to 1": (lambda *v: clipped_cell(*v, 1), BACKWARD), "c clipped to 2": (lambda *v: clipped_cell(*v, 2), BACKWARD),
         "h times 0.985": (forward_then(lambda h: h.mul_(0.985)), BACKWARD), "da clipped to 1": (FORWARD, backward_then(lambda da, dc: da.clamp_(-1, 1))),
         "dc times 0.9": (FORWARD, backward_then(lambda da, dc: dc.mul_(0.9)))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("edit", EDITS)
def test_equations_that_a_student_has_changed_are_run_as_they_are(dtype, edit):
    assert fast_cells(*EDITS[edit], "cpu", dtype) == EDITS[edit]


def test_an_lstm_computes_what_its_equations_say(monkeypatch):
    """Through the layer: the forward pass of a changed cell is that of its equations, whatever C would give."""
    layer, x = LSTM(5, 7), 4 * torch.randn(3, 20, 5)
    before = layer(x)[0]
    monkeypatch.setattr(lstm, "cell_forward", EDITS["c clipped to 1"][0])
    out, (_, c) = layer(x)
    assert c.abs().max() <= 1 and (out - before).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, n_in, n_out", [(1, 1, 4), (3, 7, 28), (20, 65, 260), (64, 256, 1024)])
@pytest.mark.parametrize("library", ["with", "without"])
def test_a_packed_matrix_gives_the_same_product(monkeypatch, dtype, rows, n_in, n_out, library):
    if library == "without":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(rows)
    weight = torch.randn(n_out, n_in).to(dtype)
    linear = products.packed_linear(weight, rows, 2)
    for _ in range(2):
        x = torch.randn(rows, n_in).to(dtype)
        torch.testing.assert_close(linear(x).double(), x.double() @ weight.double().t(), atol=1e-4 if dtype == torch.float32 else 0.02,
                                   rtol=1e-5 if dtype == torch.float32 else 2 ** -8)


@pytest.mark.parametrize("compiler", ["", "'unbalanced", "false", "/no/such/compiler"])
def test_a_compiler_that_is_none_leaves_the_equations(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert products.compile_c.__wrapped__("cells") is None
