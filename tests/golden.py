"""The referee of a rewrite: python tests/golden.py COMMIT [word ...]

Runs the same short commands in a clean checkout of COMMIT and in the working tree, on this machine, with one thread, and
compares every log.csv, trials.csv and result.json they leave, all figures but times, to the last bit. A line per command: `same`,
or where the two part. Words choose the commands whose names contain one of them (those that they build on run too).
"""
import csv
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COMPARED = {"seconds", "seconds_rollout", "seconds_scoring", "seconds_update", "tokens_per_second", "torch", "processor",
                "commit", "device", "options"}

SMALL = "--n-embd 32 --batch-size 8 --block-size 16 --steps 40 --eval-every 10 --log-every 1 --warmup 5 --dtype float32"
ATTENTION = f"--model transformer {SMALL} --n-layer 2 --n-head 2 --n-hidden 48"
WORDS_DROPPED = "--dropout 0.3 --dropout-input 0.2 --dropout-hidden 0.2 --dropout-embed 0.1"
TUNE = "--data stories --steps 12 --eval-every 4 --log-every 1 --batch-size 4 --block-size 16 --held-out 8 --eval-tokens 400"
PPO = "--scorer scorer --steps 4 --batch-size 16 --minibatch 8 --epochs 2 --response-tokens 8 --held-out 12 --eval-every 2"
# name (also that of the run's folder): command; `killed` in the name: killed in the middle, then resumed; the rest of the
# name after a colon: the commands it builds on
COMMANDS = {
    "rnn": f"train.py --model rnn {SMALL} --also climate",
    "rnn-dropout": f"train.py --model rnn {SMALL} {WORDS_DROPPED} --n-layer 2",
    "lstm": f"train.py --model lstm {SMALL}",
    "lstm-dropout-killed": f"train.py --model lstm {SMALL} {WORDS_DROPPED} --n-layer 2 --n-hidden 24",
    "transformer": f"train.py {ATTENTION} --also stories",
    "transformer-dropout-killed": f"train.py {ATTENTION} --dropout 0.2",
    "own-text": f"train.py --model lstm {SMALL} --data own.txt",
    "reviews": f"train.py {ATTENTION} --data reviews --block-size 32",
    "reviews-lstm": f"train.py --model lstm {SMALL} --data reviews",
    "search": "train.py --model lstm --search 4 --minutes 0.0001 --dtype float32 --batch-size 8 --block-size 16 --n-embd 16",
    "finetune: transformer": f"finetune.py --base transformer {TUNE} --dtype float32",
    "finetune-bf16: transformer": f"finetune.py --base transformer {TUNE} --dtype bfloat16",
    "finetune-killed: transformer-dropout-killed":
        f"finetune.py --base transformer-dropout-killed {TUNE} --dtype float32 --accumulate 2 --checkpointing",
    "finetune-lstm: lstm": f"finetune.py --base lstm {TUNE} --dtype float32",
    "ablation: transformer": "finetune.py --ablate --base transformer --ablate-epochs 0.01 0.02 --ablate-fractions 0.6 0.9 "
                             + TUNE.replace("--steps 12", "") + " --dtype float32",
    "scorer": "ppo.py --train-reward --data reviews --epochs 0.05 --eval-every 5 --dtype float32",
    "scorer-killed": "ppo.py --train-reward --data reviews --epochs 0.05 --eval-every 3 --dtype float32 --seed 2",
    "ppo: reviews scorer": f"ppo.py --base reviews {PPO} --dtype float32",
    "ppo-repairs-killed: reviews scorer": f"ppo.py --base reviews {PPO} --dtype float32 --lr 1e-3 --kl-target 1 "
                                          "--repetition-coef 0.5 --sft-coef 0.1 --sft-every 2",
    "ppo-lstm: reviews-lstm scorer": f"ppo.py --base reviews-lstm {PPO} --dtype float32",
    "two-lstm": f"2 train.py --model lstm {SMALL} {WORDS_DROPPED}",
    "two-shards: transformer": f"2 finetune.py --base transformer {TUNE} --shard --dtype float32",
}


RENAMED = {"--warmup": "--warmup-steps"}            # options, in trees whose data.py has parse_args


def launch(tree, folder, command, run, *more):
    names = RENAMED if "def parse_args" in (tree / "data.py").read_text(encoding="utf-8") else {}
    first, *rest = (names.get(word, word) for word in command.split())
    python = [sys.executable]
    if first.isdigit():
        port = str(random.randrange(20_000, 60_000))
        python += ["-m", "torch.distributed.run", "--nproc-per-node", first, "--master-port", port, "--"]
        first, *rest = rest
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen([*python, str(tree / first), *(more or rest), "--run", run], cwd=folder, stdout=output,
                                stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})


def perform(tree, folder, name, command):
    """Run one command; if its name says so, kill it in the middle and resume it. RuntimeError if it fails."""
    run = name.partition(":")[0]
    process = launch(tree, folder, command, run)
    if "killed" in run:
        while process.poll() is None and not (folder / run / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(random.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        if process.wait() != 0:
            script = [word for word in command.split() if word == "--train-reward"]
            process = launch(tree, folder, command, run, *script, "--resume")
    if process.wait() != 0:
        raise RuntimeError(f"{name} failed:\n" + (folder / "output.txt").read_text(errors="replace")[-2000:])


def figures(folder):
    """{(file, place): value} of everything that is compared in a run's folder."""
    found = {}

    def walk(file, place, value):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if key in NOT_COMPARED:
                continue
            if isinstance(part, (dict, list)):
                walk(file, f"{place}/{key}", part)
            else:
                found[file, f"{place}/{key}".replace("reward_sd", "reward_std")] = part
    for path in sorted(folder.rglob("*")):
        file = str(path.relative_to(folder))
        if "trial-" in file:                                    # trials.csv has what matters
            continue
        if path.name == "result.json":
            walk(file, "", json.loads(path.read_text(encoding="utf-8")))
        elif path.name in ("log.csv", "trials.csv"):
            with open(path, newline="") as f:
                walk(file, "", list(csv.DictReader(f)))
    return found


def main(commit, *words):
    needed = set()
    for name in COMMANDS:
        if not words or any(word in name.partition(":")[0] for word in words):
            needed |= {name.partition(":")[0], *name.partition(":")[2].split()}
    with tempfile.TemporaryDirectory() as scratch:
        old = Path(scratch, "tree")
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(old, filter="data")
        folders = [Path(scratch, "old"), Path(scratch, "new")]
        for folder in folders:
            folder.mkdir()
            (folder / "own.txt").write_text("".join(f"the w{i % 17} of w{i * i % 23} is w{i % 5} here\n" for i in range(600)))
        bad = 0
        for name, command in COMMANDS.items():
            run = name.partition(":")[0]
            if run not in needed:
                continue
            with ThreadPoolExecutor(2) as both:
                list(both.map(lambda pair: perform(*pair, name, command), zip((old, ROOT), folders)))
            a, b = (figures(folder / run) for folder in folders)
            apart = [f"{file} {place}: {a.get((file, place))!r} -> {b.get((file, place))!r}"
                     for file, place in sorted(a.keys() | b.keys(), key=natural) if a.get((file, place)) != b.get((file, place))]
            print(f"{run:28} {f'same, {len(a)} figures' if a and not apart else 'DIFFERS: ' + '; '.join(apart[:2]) or 'no figures'}",
                  flush=True)
            bad += not a or bool(apart)
    return 1 if bad else 0


def natural(key):
    """Rows in the order of their numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", " ".join(key))]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else print(__doc__) or 2)
