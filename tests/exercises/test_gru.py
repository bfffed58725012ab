"""A GRU by hand, as a model of train.py."""
import torch

import sample
import train
from tests.recurrent import check_against_library, check_gradcheck, check_plain_equals_fast


def test_it_is_the_librarys_forward_and_backward():
    from gru import GRU
    for shape in ((1, 1, 1, 1), (4, 1, 6, 2), (5, 20, 17, 33)):
        for with_state in (False, True):
            check_against_library(GRU, torch.nn.GRU, shape, with_state)


def test_its_backward_pass_is_written_by_hand():
    from gru import GRU
    check_plain_equals_fast(GRU, (3, 9, 8, 8))
    check_gradcheck(GRU)
    out, _ = GRU(3, 4)(torch.randn(2, 5, 3))
    graph, names = [out.grad_fn], set()
    while graph:
        node = graph.pop()
        if node is not None and node not in names:
            names.add(node)
            graph += [parent for parent, _ in node.next_functions]
    assert len(names) < 40 and any(type(node).__name__.startswith("GRU") for node in names), "one Function, not a graph of every step"


def test_train_knows_it(tmp_path):
    train.main(f"--model gru --steps 2 --n-embd 8 --batch-size 4 --block-size 8 --no-sample --run {tmp_path / 'r'}".split())
    from gru import GRU
    assert all(type(layer) is GRU for layer in sample.load_run(tmp_path / "r")[0].layers)
