"""An own AdamW that does what torch's does."""
import copy

import torch

import train
from rnn import RNNConfig, RNNLM


def test_twenty_steps_are_those_of_torch():
    torch.manual_seed(0)
    ours = RNNLM(RNNConfig(31, 8, 8, 1))
    theirs = copy.deepcopy(ours)
    optimizer = train.configure_optimizer(ours, 1e-2, 0.3)
    assert not type(optimizer).__module__.startswith("torch."), "this is torch's own"
    groups = [[p for p in theirs.parameters() if p.dim() >= 2], [p for p in theirs.parameters() if p.dim() < 2]]
    library = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.3}, {"params": groups[1], "weight_decay": 0.0}], lr=1e-2,
                                betas=(0.9, 0.99))
    for _ in range(20):
        x, y = torch.randint(31, (4, 6)), torch.randint(31, (4, 6))
        for model, stepper in ((ours, optimizer), (theirs, library)):
            model(x, targets=y)[0].backward()
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-4)


def test_a_checkpoint_of_it_continues_where_it_stopped():
    torch.manual_seed(0)
    model, x = RNNLM(RNNConfig(31, 8, 8, 1)), torch.randint(31, (4, 6))
    optimizer = train.configure_optimizer(model, 1e-2, 0.3)
    assert not type(optimizer).__module__.startswith("torch.")
    for k in range(6):
        if k == 3:
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        model(x, targets=x)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    again = RNNLM(RNNConfig(31, 8, 8, 1))
    again.load_state_dict(weights)
    optimizer = train.configure_optimizer(again, 1e-2, 0.3)
    optimizer.load_state_dict(state)
    for _ in range(3):
        again(x, targets=x)[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
