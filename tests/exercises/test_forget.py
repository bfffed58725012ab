"""The LSTM's gates start at torch's usual bias of zero instead of many time scales."""
import torch

from lstm import LSTMConfig, LSTMLM


def test_all_input_biases_begin_at_zero():
    torch.manual_seed(0)
    for layer in LSTMLM(LSTMConfig(31, 16, 24, 2)).layers:
        assert (layer.bias_ih == 0).all()
