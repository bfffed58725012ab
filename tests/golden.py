"""Some thirty short trainings of every kind, before and after a restructuring: every logged number is compared.

    python tests/golden.py run TREE OUT [CASE ...]      # TREE's scripts, each case in OUT/CASE
    python tests/golden.py compare OUT_1 OUT_2          # log.csv, result.json, weights, what was printed

Times, speeds and the commit are left out. It goes when the restructuring is done.
"""
import concurrent.futures
import csv
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

SMALL = "--n-embd 16 --batch-size 8 --block-size 16 --warmup-steps 5 --dtype float32 --data own.txt"
LSTM = f"train.py --model lstm {SMALL} --n-layer 2 --n-hidden 16 --dropout 0.2 --dropout-hidden 0.2 --dropout-input 0.2 --dropout-embed 0.1"
GPT = f"train.py --model transformer {SMALL} --n-head 2 --n-layer 2 --dropout 0.2"
BASE = ("train.py --model transformer --n-embd 16 --n-hidden 24 --n-layer 2 --n-head 2 --batch-size 4 --block-size 128 --steps 20 "
        "--dtype float32 --run base")
TUNE = ("finetune.py --base base --data stories --batch-size 4 --block-size 32 --held-out 12 --eval-tokens 500 --sample-tokens 8 "
        "--steps 12 --eval-every 4 --log-every 3 --run r")
REVIEWS = BASE.replace("--steps 20", "--data reviews --steps 60")
SCORER = "ppo.py --train-reward --data reviews --epochs 0.06 --run scorer --dtype float32 --eval-every 7 --log-every 2"
POLICY = ("ppo.py --base base --scorer scorer --data reviews --steps 6 --eval-every 2 --batch-size 16 --minibatch 8 --epochs 2 --held-out 20 "
          "--response-tokens 8 --dtype float32 --run r")

# a crash (as kill -9) just after the n-th checkpoint has its name
CRASH = """
import os, runpy, sys
n, replace, calls = int(sys.argv[1]), os.replace, 0
def crash(source, target):
    global calls
    replace(source, target)
    calls += str(target).endswith("last.pt")
    if calls == n:
        os._exit(9)
os.replace = crash
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Ctrl-C in the n-th step of the optimizer
CTRL_C = """
import os, runpy, signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)
n, calls = int(sys.argv[1]), 0
for kind in (torch.optim.AdamW, torch.optim.Adam):
    def step(self, *args, kind=kind, original=kind.step):
        global calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)
    kind.step = step
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# a search whose trainings have a fixed number of steps
SEARCH = """
import json, os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import data, train
train.SEARCH_SPACE["lstm"] = dict(lr=(1e-3, 1e-2), n_embd=[8, 16], n_layer=[1, 2], batch_size=[4], block_size=[8, 16],
                                  dropout=[0.0, 0.5], weight_decay=(0.01, 0.1))
original = train.train
def steps_of(minutes):
    return max(3, round(minutes * 300))
if hasattr(train, "plan_minutes"):
    def plan(config, progress, *rest):
        progress.steps = steps_of(config.minutes)
        progress.eval_every = -(-progress.steps // 20)
    train.plan_minutes = plan
else:
    trial = train.run_trial
    def fixed(config, *rest, **more):
        from dataclasses import replace
        return trial(replace(config, minutes=None, steps=steps_of(config.minutes)), *rest, **more)
    train.run_trial = fixed
data.run_main(lambda: train.main(sys.argv[2:]))
"""

CASES = {
    "rnn": [f"{LSTM.replace('lstm', 'rnn')} --steps 30 --eval-every 7 --log-every 3 --data finance --also climate --run r"],
    "lstm": [f"{LSTM} --epochs 1.3 --grad-clip 0.1 --eval-every 50 --log-every 7 --run r", "sample.py --run r --tokens 30 --seed 3 --dtype float32"],
    "transformer": [f"{GPT} --steps 40 --eval-every 9 --log-every 4 --run r", "sample.py --run r --tokens 30 --seed 3 --n 2 --top-k 5"],
    "defaults": ["train.py --model lstm --steps 30 --dtype float32 --run r", "eval.py --runs r --domains climate poem.txt --out report"],
    "char": [f"{GPT} --tokenizer char --steps 30 --eval-every 10 --log-every 5 --run r"],
    "char-rnn": [f"{LSTM} --tokenizer char --steps 30 --eval-every 10 --log-every 5 --run r"],
    "gpt2": [f"{GPT} --tokenizer gpt2 --steps 12 --eval-every 5 --log-every 5 --run r", "eval.py --runs r --domains poem.txt --out report"],
    "bf16-lstm": [f"{LSTM} --steps 20 --eval-every 6 --log-every 2 --dtype bfloat16 --run r"],
    "bf16-gpt": [f"{GPT} --steps 20 --eval-every 6 --log-every 2 --dtype bfloat16 --run r"],
    "killed-lstm": [(CRASH, 2, f"{LSTM} --steps 60 --eval-every 7 --log-every 3 --run r"), "train.py --resume --run r"],
    "killed-gpt": [(CRASH, 3, f"{GPT} --steps 40 --eval-every 7 --log-every 3 --run r"), "train.py --resume --run r"],
    "ctrl-c": [(CTRL_C, 11, f"{LSTM} --steps 60 --eval-every 7 --log-every 3 --run r"), "train.py --resume --run r"],
    "extended": [f"{LSTM} --steps 20 --eval-every 7 --log-every 3 --run r", "train.py --resume --run r --steps 33"],
    "search": [(SEARCH, None, "train.py --search 6 --minutes 0.6 --run r --data own.txt --dtype float32 --seed 2")],
    "finetune": [BASE, f"{TUNE} --dtype float32", "eval.py --runs r --domains stories --out report"],
    "finetune-lstm": [BASE.replace("transformer", "lstm").replace("--n-head 2 ", ""), f"{TUNE} --dtype float32"],
    "finetune-accumulate": [BASE, f"{TUNE} --dtype float32 --accumulate 2 --checkpointing"],
    "finetune-qwen2": ["hub", f"{TUNE.replace('stories', 'story.txt')} --base hub --dtype float32 --retain own.txt --lr 1e-3"],
    "finetune-killed": [BASE, (CRASH, 2, f"{TUNE} --dtype float32"), "finetune.py --resume --run r"],
    "finetune-bf16": [BASE, f"{TUNE} --dtype bfloat16"],
    "ablation": [BASE, f"{TUNE.replace('--steps 12 ', '')} --dtype float32 --ablate --ablate-epochs 0.01 0.02"],
    "scorer": [SCORER.replace("--run scorer", "--run r")],
    "scorer-encoder": [SCORER, f"{SCORER.replace('--run scorer', '--run r')} --encoder scorer"],
    "scorer-killed": [(CRASH, 2, SCORER.replace("--run scorer", "--run r")), "ppo.py --train-reward --resume --run r"],
    "ppo": [REVIEWS, SCORER, POLICY, "eval.py --runs r --out report"],
    "ppo-repairs": [REVIEWS, SCORER, f"{POLICY} --repetition-coef 2 --sft-every 2 --kl-target 0.5"],
    "ppo-sft-coef": [REVIEWS, SCORER, f"{POLICY} --sft-coef 0.5"],
    "ppo-lstm": [REVIEWS.replace("transformer", "lstm").replace("--n-head 2 ", ""), SCORER, f"{POLICY} --sft-every 2"],
    "ppo-killed": [REVIEWS, SCORER, (CRASH, 2, POLICY), "ppo.py --resume --run r"],
    "two": [(2, f"{LSTM} --steps 20 --eval-every 6 --log-every 2 --run r")],
    "finetune-two": [BASE, (2, f"{TUNE} --dtype float32")],
    "finetune-shard": [BASE, (2, f"{TUNE} --dtype float32 --shard")],
    "finetune-shard-bf16": ["hub", (2, f"{TUNE.replace('stories', 'story.txt')} --base hub --retain own.txt --lr 1e-3 --dtype bfloat16 --shard")],
}


def texts(folder):
    (folder / "own.txt").write_text("".join(f"the w{i % 17} of w{i * i % 23} is w{i % 5} here\n" for i in range(900)))
    stories = [f"the {w} went in the hell and don't sing, said the {w} to the doer." for w in ("hen", "thing", "inn", "ring") * 30]
    (folder / "story.txt").write_text("<|endoftext|>\n".join(stories) + "<|endoftext|>\n")
    (folder / "poem.txt").write_text("The bank of the rain sells a company. The rate of the share is new. A fund holds ms. harlow.\n" * 3)


def run_case(tree, folder, name):
    folder.mkdir(parents=True)
    texts(folder)
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", TOKENIZERS_PARALLELISM="false")
    with open(folder / "output.txt", "w") as output:
        for k, what in enumerate(CASES[name]):
            before, command = [sys.executable], what
            if what == "hub":
                code = ("import sys; sys.path.insert(0, sys.argv[1]); import torch; from pathlib import Path; torch.manual_seed(1)\n"
                        "from tests.test_qwen_load import library_model, write_tokenizer\n"
                        "library_model(vocab_size=300, initializer_range=0.1).save_pretrained('hub'); write_tokenizer(Path('hub'))")
                subprocess.run([sys.executable, "-c", code, str(tree)], cwd=folder, check=True, capture_output=True)
                continue
            if isinstance(what, tuple):
                how, *_, command = what
                if isinstance(how, int):
                    before += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(how), "--"]
                    before = before[:1] + before[1:]
                else:
                    before += ["-c", how, *([str(what[1])] if what[1] else [])]
            if command.startswith("ppo.py --base") and "update_epochs" in (tree / "ppo.py").read_text():
                command = command.replace("--epochs", "--update-epochs")
            script, *options = command.split()
            done = subprocess.run([*before, str(tree / script), *options], cwd=folder, env=env, text=True, capture_output=True)
            output.write(f"=== {k}: {command}: status {done.returncode}\n{done.stdout}--- stderr\n{done.stderr}")
    return name


LEFT_OUT = {"seconds", "tokens_per_second", "commit", "options", "seconds_rollout", "seconds_scoring", "seconds_update", "processor", "torch"}


def numbers(value, path=""):
    """{path: leaf} of nested dicts and lists, without what differs between two runs of the same thing."""
    if isinstance(value, dict):
        return {p: v for k, each in value.items() if k not in LEFT_OUT for p, v in numbers(each, f"{path}/{k}").items()}
    if isinstance(value, list):
        return {p: v for k, each in enumerate(value) for p, v in numbers(each, f"{path}/{k}").items()}
    return {path: value}


def weights(path):
    import torch
    model = torch.load(path, map_location="cpu", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(model):
        digest.update(name.encode() + model[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def facts(folder):
    out = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "log.csv":
            with open(path) as f:
                out |= {f"{name}/{row['step']}/{k}": v for row in csv.DictReader(f) for k, v in row.items() if k not in LEFT_OUT and v}
        elif path.name in ("result.json", "before.json", "report.json"):
            out |= {f"{name}{k}": v for k, v in numbers(json.loads(path.read_text())).items()}
        elif path.suffix == ".pt":
            out[name] = weights(path)
    return out


def same(a, b):
    return a == b or isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)


def compare(one, other):
    bad = 0
    for case in sorted({p.name for p in one.iterdir()} | {p.name for p in other.iterdir()}):
        if not (one / case).exists() or not (other / case).exists():
            print(f"{case}: only in one")
            continue
        a, b = facts(one / case), facts(other / case)
        differ = [k for k in a.keys() & b.keys() if not same(a[k], b[k])]
        only = [sorted(k for k in x if k not in y) for x, y in ((a, b), (b, a))]
        word = "same" if not differ and not any(only) and a else "DIFFERS"
        bad += word != "same"
        print(f"{case}: {word}, {len(a.keys() & b.keys())} numbers; {len(differ)} differ; only in one: {len(only[0])}, {len(only[1])}")
        for k in sorted(differ)[:4]:
            print(f"    {k}: {a[k]} {b[k]}")
        for each in only:
            print("".join(f"    only: {k}\n" for k in each[:3]), end="")
    return bad


if __name__ == "__main__":
    if sys.argv[1] == "compare":
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])) > 0)
    tree, out = Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for name in pool.map(lambda name: run_case(tree, out / name, name), sys.argv[4:] or CASES):
            print(name, flush=True)
