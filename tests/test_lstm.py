"""LSTM layer and language model against torch.nn.LSTM, autograd and finite differences."""
import pytest
import torch

from lstm import LSTM, LSTMConfig, LSTMLM
from tests.recurrent import (check_against_library, check_gradcheck, check_plain_equals_fast, check_stack,
                             check_state_is_carried, check_bf16_close)

SHAPES = [(1, 1, 1, 1), (1, 7, 3, 5), (4, 1, 6, 2), (3, 9, 8, 8), (5, 20, 17, 33)]      # B, T, I, H


@pytest.mark.parametrize("shape", SHAPES)
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
