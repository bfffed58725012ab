"""Fine-tuning moves the last block only."""
import train
import finetune
import torch


def test_only_the_last_block_has_moved(tmp_path):
    sizes = "--n-embd 16 --n-head 2 --n-layer 3 --batch-size 4 --block-size 32 --steps 2 --no-sample".split()
    train.main(["--model", "transformer", *sizes, "--run", str(tmp_path / "base")])
    options = "--data stories --batch-size 4 --block-size 32 --steps 3 --held-out 4 --eval-tokens 200 --sample-tokens 4 --no-sample"
    finetune.main(["--base", str(tmp_path / "base"), "--run", str(tmp_path / "tuned"), "--dtype", "float32", *options.split()])
    before, after = (torch.load(tmp_path / run, weights_only=True)["model"] for run in ("base/best.pt", "tuned/last.pt"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("layers.2.") for name in moved), sorted(moved)[:3]
