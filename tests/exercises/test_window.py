"""A query sees 16 tokens, its own included."""
import torch

from transformer import Transformer, TransformerConfig


def test_one_layer_sees_the_last_sixteen_tokens_and_no_other():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(31, 64, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24)).eval()
    tokens = torch.randint(1, 31, (40,))
    with torch.no_grad():
        before = model(tokens[None])[0][0, -1]
        for distance in range(39):
            changed = tokens.clone()
            changed[39 - distance] = 0
            moved = (model(changed[None])[0][0, -1] - before).abs().max() > 1e-6
            assert moved == (distance < 16), distance


def test_generation_from_the_cache_sees_the_same():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(31, 64, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24)).eval()
    tokens, state = torch.randint(31, (1, 40)), model.init_state(1, 40)
    with torch.no_grad():
        whole = model(tokens)[0]
        for t in range(40):
            hidden, state = model(tokens[:, t:t + 1], state)
            torch.testing.assert_close(hidden[:, 0], whole[:, t], atol=1e-4, rtol=1e-3)
            assert t < 20 or (model(tokens[:, t - 15:t + 1])[0][:, -1] - whole[:, t]).abs().max() > 1e-6
    one = Transformer(TransformerConfig(31, 64, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_hidden=24)).eval()
    with torch.no_grad():                                           # positions are relative: 16 tokens alone say the same
        torch.testing.assert_close(one(tokens)[0][:, -1], one(tokens[:, -16:])[0][:, -1], atol=1e-4, rtol=1e-3)
