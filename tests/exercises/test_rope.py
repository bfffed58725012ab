"""Attention without positions: one layer cannot tell in which order the tokens before the last one came."""
import torch

from transformer import Transformer, TransformerConfig


def test_the_order_of_earlier_tokens_does_not_matter_to_one_layer():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(31, 32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24)).eval()
    tokens = torch.arange(1, 21)
    shuffled = torch.cat((tokens[:-1][torch.randperm(19)], tokens[-1:]))
    with torch.no_grad():
        a, b = (model(t[None])[0][0, -1] for t in (tokens, shuffled))
        other = model((tokens + 5)[None])[0][0, -1]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert (a - other).abs().max() > 1e-3                           # which tokens they are does matter
