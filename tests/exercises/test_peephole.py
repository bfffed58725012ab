"""An LSTM whose gates see the cell: parameters peep_i, peep_f, peep_o of [hidden_size], at first zero."""
import torch

from lstm import LSTM


def test_with_peepholes_of_zero_it_is_the_library():
    torch.manual_seed(0)
    ours, library, x = LSTM(5, 7), torch.nn.LSTM(5, 7, batch_first=True), torch.randn(3, 6, 5)
    assert all(getattr(ours, f"peep_{gate}").shape == (7,) for gate in "ifo")
    library.load_state_dict({f"{name}_l0": p for name, p in ours.named_parameters() if not name.startswith("peep")})
    torch.testing.assert_close(ours(x)[0], library(x)[0], atol=1e-6, rtol=1e-5)


def test_input_and_forget_gate_see_the_old_cell_and_the_output_gate_the_new_one():
    torch.manual_seed(0)
    layer = LSTM(5, 7)
    for gate in "ifo":
        torch.nn.init.normal_(getattr(layer, f"peep_{gate}"))
    x, h, c = torch.randn(3, 6, 5), torch.randn(3, 7), torch.randn(3, 7)
    out, (h_last, c_last) = layer(x, (h, c))
    for t in range(6):
        i, f, g, o = (x[:, t] @ layer.weight_ih.T + layer.bias_ih + h @ layer.weight_hh.T + layer.bias_hh).chunk(4, 1)
        new = torch.sigmoid(f + layer.peep_f * c) * c + torch.sigmoid(i + layer.peep_i * c) * torch.tanh(g)
        h, c = torch.sigmoid(o + layer.peep_o * new) * torch.tanh(new), new
        torch.testing.assert_close(out[:, t], h, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(c_last, c, atol=1e-5, rtol=1e-4)
    out.sum().backward()
    assert all(getattr(layer, f"peep_{gate}").grad.abs().max() > 0 for gate in "ifo")
