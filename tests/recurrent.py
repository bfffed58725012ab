"""What the tests of rnn.py and lstm.py share: the same claims about two layers."""
import torch


def as_list(state):
    return list(state) if isinstance(state, tuple) else [state]


def pair(layer_type, library_type, I, H):
    """Our layer and the library's, with the same weights: the library's state dict loads but for its _l0 suffix."""
    library = library_type(I, H, batch_first=True)
    layer = layer_type(I, H)
    layer.load_state_dict({k.removesuffix("_l0"): v for k, v in library.state_dict().items()})
    return layer, library


def random_state(layer, B, requires_grad=True):
    state = [torch.randn(B, layer.hidden_size, requires_grad=requires_grad) for _ in as_list(layer.zero_state(B))]
    return tuple(state) if len(state) > 1 else state[0]


def check_against_library(layer_type, library_type, shape, with_state):
    B, T, I, H = shape
    torch.manual_seed(sum(shape))
    layer, library = pair(layer_type, library_type, I, H)
    x = torch.randn(B, T, I, requires_grad=True)
    state = random_state(layer, B) if with_state else None
    out, last = layer(x, state)
    library_state = None if state is None else \
        tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
    expected, expected_last = library(x, library_state)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(as_list(last), as_list(expected_last)):
        torch.testing.assert_close(a, b[0], atol=1e-5, rtol=1e-5)
    # a loss that uses every output and the last state, so that every gradient is exercised
    weight = [torch.randn_like(out)] + [torch.randn(B, H) for _ in as_list(last)]
    inputs = [x] + (as_list(state) if with_state else [])

    def loss(out, last):
        return sum((w * v).sum() for w, v in zip(weight, [out] + last))
    # the gradients of out and of the last state arrive transposed, as they do from some losses
    weight = [w.transpose(0, 1).contiguous().transpose(0, 1) for w in weight]
    ours = torch.autograd.grad(loss(out, as_list(last)), inputs + list(layer.parameters()))
    theirs = torch.autograd.grad(loss(expected, [s[0] for s in as_list(expected_last)]), inputs + list(library.parameters()))
    assert [n + "_l0" for n, _ in layer.named_parameters()] == [n for n, _ in library.named_parameters()]
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def check_plain_equals_fast(layer_type, shape):
    B, T, I, H = shape
    torch.manual_seed(1)
    layer = layer_type(I, H).double()
    x = torch.randn(B, T, I, dtype=torch.double, requires_grad=True)
    results = []
    for run in (layer.plain, layer):
        out, last = run(x)
        total = out.square().sum() + sum(s.sum() for s in as_list(last))
        results.append([out, *as_list(last), *torch.autograd.grad(total, [x, *layer.parameters()])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def check_gradcheck(layer_type):
    torch.manual_seed(2)
    layer = layer_type(3, 4).double()
    x = torch.randn(2, 5, 3, dtype=torch.double, requires_grad=True)
    state = [torch.randn(2, 4, dtype=torch.double, requires_grad=True) for _ in as_list(layer.zero_state(2))]
    names = [n for n, _ in layer.named_parameters()]

    def f(x, *rest):
        state, weights = rest[:len(rest) - len(names)], rest[-len(names):]
        out, last = torch.func.functional_call(layer, dict(zip(names, weights)),
                                               (x, state if len(state) > 1 else state[0]))
        return (out, *as_list(last))
    assert torch.autograd.gradcheck(f, (x, *state, *layer.parameters()))


def check_stack(model_type, config_type, library_type, n_layer):
    """Outputs, the last state of every layer, and all gradients of a stack."""
    torch.manual_seed(3)
    model = model_type(config_type(vocab_size=23, n_embd=6, n_hidden=6, n_layer=n_layer)).eval()
    library = library_type(6, 6, n_layer, batch_first=True)
    library.load_state_dict({f"{name}_l{i}": p for i, layer in enumerate(model.layers)
                             for name, p in layer.named_parameters()})
    tokens = torch.randint(23, (4, 9))
    out, states = model(tokens)
    expected, expected_states = library(model.embed_tokens(tokens))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for i, state in enumerate(states):
        for a, b in zip(as_list(state), as_list(expected_states)):
            torch.testing.assert_close(a, b[i], atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [model.embed_tokens.weight, *model.layers.parameters()])
    theirs = torch.autograd.grad((expected * weight).sum(), [model.embed_tokens.weight, *library.parameters()])
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def check_state_is_carried(model_type, config_type):
    torch.manual_seed(4)
    model = model_type(config_type(vocab_size=23, n_embd=8, n_hidden=12, n_layer=2)).eval()
    tokens = torch.randint(23, (3, 20))
    whole, _ = model(tokens)
    for cuts in ([1] * 20, [20], [7, 13], [3, 1, 16]):
        state, parts = model.init_state(3), []
        for piece in tokens.split(cuts, 1):
            hidden, state = model(piece, state)
            parts.append(hidden)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-5)


def check_bf16_close(layer_type):
    """Under bf16 autocast, outputs and gradients stay within bf16's precision of the float32 ones."""
    torch.manual_seed(5)
    layer, x = layer_type(32, 48), torch.randn(6, 25, 32, requires_grad=True)
    results = []
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out, _ = layer(x)
        assert out.dtype == (torch.bfloat16 if low else torch.float32)
        results.append([out.float(), *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    for exact, low in zip(*results):
        assert low.dtype == torch.float32
        assert (low - exact).norm() / exact.norm() < 0.02
