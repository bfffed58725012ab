"""LSTM layer and language model against torch.nn.LSTM, autograd and finite differences."""
import shutil

import pytest
import torch

import lstm
from lstm import LSTM, LSTMConfig, LSTMLM
from tests.recurrent import (check_against_library, check_gradcheck, check_plain_equals_fast, check_stack,
                             check_state_is_carried, check_bf16_close)

FAST_CELLS = lstm.fast_cells                                # the real one, whatever all_cells puts in its place
SHAPES = [(1, 1, 1, 1), (1, 7, 3, 5), (4, 1, 6, 2), (3, 9, 8, 8), (5, 20, 17, 33)]      # B, T, I, H


@pytest.fixture(autouse=True, params=["cell in C", "equations"])
def all_cells(request, monkeypatch):
    """Every test here runs twice: as it is where there is a compiler, and with the equations as they are written down."""
    if request.param == "equations":
        monkeypatch.setattr(lstm, "fast_cells", lambda *_: (lstm.cell_forward, lstm.cell_backward))


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
    assert FAST_CELLS("cpu", dtype)[0] is not lstm.cell_forward


def test_without_a_compiler_and_elsewhere_the_equations_do_the_same(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(lstm, "compile_c", lstm.compile_c.__wrapped__)
    for key in (("cpu", torch.float32), ("cpu", torch.float64), ("cuda", torch.float32)):
        assert FAST_CELLS.__wrapped__(*key) == (lstm.cell_forward, lstm.cell_backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cell_forward", "cell_backward"])
def test_equations_that_were_changed_are_run_as_they_stand(monkeypatch, dtype, name):
    as_written = getattr(lstm, name)

    def changed(*v):
        as_written(*v)
        v[-1].mul_(0.9)                                         # the last thing that either writes: h, dc
    monkeypatch.setattr(lstm, name, changed)
    assert FAST_CELLS.__wrapped__("cpu", dtype) == (lstm.cell_forward, lstm.cell_backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, n_in, n_out", [(1, 1, 4), (3, 7, 28), (20, 65, 260), (64, 256, 1024)])
@pytest.mark.parametrize("library", ["with", "without"])
def test_a_packed_matrix_gives_the_same_product(monkeypatch, dtype, rows, n_in, n_out, library):
    if library == "without":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(rows)
    weight = torch.randn(n_out, n_in).to(dtype)
    linear = lstm.packed_linear(weight, rows, 2)
    for _ in range(2):
        x = torch.randn(rows, n_in).to(dtype)
        torch.testing.assert_close(linear(x).double(), x.double() @ weight.double().t(), atol=1e-4 if dtype == torch.float32 else 0.02,
                                   rtol=1e-5 if dtype == torch.float32 else 2 ** -8)


@pytest.mark.parametrize("compiler", ["", "'unbalanced", "false", "/no/such/compiler"])
def test_a_compiler_that_is_none_leaves_the_equations(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert lstm.compile_c.__wrapped__("lstm") is None
