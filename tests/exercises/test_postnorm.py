"""Norms after the sum: what leaves a layer is normalised."""
import torch

from transformer import Transformer, TransformerConfig


def test_the_output_of_every_layer_has_a_mean_square_of_one():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(31, 32, n_layer=3, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24)).eval()
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(torch.randint(31, (2, 9)))
    for x in seen:
        torch.testing.assert_close(x.square().mean(-1), torch.ones(2, 9), atol=1e-3, rtol=1e-3)
    assert len(seen) == 3
