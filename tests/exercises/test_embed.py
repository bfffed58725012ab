"""The LSTM's embeddings start in the usual narrow range."""
import torch

from lstm import LSTMConfig, LSTMLM


def test_embeddings_begin_within_a_tenth():
    torch.manual_seed(0)
    weight = LSTMLM(LSTMConfig(1000, 16, 16, 1)).embed_tokens.weight
    assert 0.09 < weight.abs().max() <= 0.1
