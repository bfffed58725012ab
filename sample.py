"""Generate text from a trained run: the same loop for the RNN, the LSTM and the Transformer.

    python sample.py --run runs/lstm-finance --prompt "the meaning of life is" --temperature 0.8
    python sample.py --run runs/lstm-ptb --n 3 --tokens 60 --top-k 40
    python sample.py --run Qwen/Qwen2-0.5B --prompt "The meaning of life is" --temperature 0       # 1 GB
    python sample.py --run Qwen/Qwen2-0.5B-Instruct --chat --prompt "Why is the sky blue?"

One step of generation: the model reads one token of each row and returns hidden [B, 1, D], from which the
logits follow. The next token is drawn from softmax(logits / temperature). The distribution is first cut to
the top_k most likely tokens and to the smallest set of tokens whose probabilities sum to top_p (Holtzman et
al. 2020). Temperature 0 takes the most likely token. A repetition penalty c (Keskar et al. 2019) looks at all
tokens that the text already has: it divides their logits by c if they are positive, and multiplies them by c
if they are negative. The state is the model's memory between steps: h, or h and c, or the KV cache.

Prompts of unequal length need no padding. All rows step together from the end of the shortest prompt, and a
row whose prompt continues takes its next prompt token in place of the drawn one.

Where to find what:
    the softmax and the draw            sample_token
    the cuts to top_k and top_p         top_k_top_p
    the repetition penalty              penalize
    the steps                           generate_stream
"""
import contextlib
import math
import os
import select
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
import qwen_load
from data import UserError, option
from fast.decode import packed_weights
from fast.layer import speed_up
from lstm import LSTMConfig, LSTMLM
from rnn import RNNConfig, RNNLM
from transformer import Scorer, Transformer, TransformerConfig

MODELS = {"rnn": (RNNLM, RNNConfig), "lstm": (LSTMLM, LSTMConfig),
          "transformer": (Transformer, TransformerConfig)}


@dataclass
class Config:
    """Generate text from a trained run, or from Qwen2's pretrained weights."""
    run: str = option("runs/lstm-finance", "folder of a run, or of Qwen2's weights, or a checkpoint; or a "
                                           "name on the hub, as Qwen/Qwen2-0.5B: downloaded once (1 GB)")
    prompt: str = option("", "the text to continue; \\n is a new line, \\t a tab, file:PATH reads a file")
    chat: bool = option(False, "an instruction-tuned model answers the prompt, which is a message; without a "
                               "prompt, a conversation begins")
    temperature: float = option(0.8, "below 1: safer, above 1: wilder, 0: always the likeliest", at_least=0)
    top_k: int = option(None, "draw from the N likeliest tokens only")
    top_p: float = option(None, "draw from the likeliest with probability X together", above=0, at_most=1)
    repetition_penalty: float = option(1.0, "above 1: tokens of the text (in a chat, of this turn) are less "
                                            "likely to come again")
    tokens: int = option(100, "the largest number of new tokens")
    n: int = option(1, "how many samples")
    stop: bool = option(False, "end a sample at the end of its document or line (Qwen2 always does)")
    seed: int = option(None, "the same seed gives the same text (default: random)", at_least=0,
                       below=2 ** 62)
    device: str = option("auto", "auto: cuda if there is one, else cpu; or a torch device")
    dtype: str = option("auto", "dtype of Qwen2's weights (a run is float32); auto: bfloat16 if the hardware "
                                "multiplies it, else float32", choices=["auto", "float32", "bfloat16"])


# ------------------------------------------------------------------------------------------- opening a model

def pick_device(name="auto"):
    """A torch.device by its name. `auto` is cuda or cpu, because no other was tested. Each of several
    processes has a GPU of its own. UserError for a device that does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if data.WORLD > 1 and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).add(1)                      # torch has no kernels for some old GPUs
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here; try --device cpu") from e
    return torch.device(name)


def pick_dtype(name, device):
    """A dtype by its name. `auto` is bfloat16 if the hardware multiplies it (CUDA from capability 8.0, CPUs
    with AVX512-BF16 or AMX), else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = [getattr(torch.cpu, f, None) for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        fast = device.type == "cpu" and any(f is not None and f() for f in flags)
    return torch.bfloat16 if fast else torch.float32


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def device_of(model):
    return next(model.parameters()).device


def autocast(model):
    """The context in which a model multiplies in its product_dtype, whatever the dtype of its weights."""
    in_bf16 = model.product_dtype == torch.bfloat16
    return torch.autocast(device_of(model).type, torch.bfloat16, enabled=in_bf16)


def read_checkpoint(path, first="python train.py --model lstm", mmap=False):
    """A checkpoint as a dict on the CPU. weights_only=True, so that a hostile file cannot run code. mmap: a
    tensor is read when it is used. UserError if the file cannot be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        needed = {"model", "kind", "config", "tokenizer"}
        if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
            raise ValueError("not a checkpoint of this project")
        return checkpoint
    except FileNotFoundError as e:
        raise UserError(f"{path} is not there; train a model first, for example: {first} --run "
                        f"{data.quoted(Path(path).parent)}") from e
    except (PermissionError, IsADirectoryError, MemoryError) as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    except Exception as e:              # a cut-off zip, a hostile pickle and wrong content raise many types
        raise UserError(f"{path} cannot be loaded: it is damaged or not a checkpoint of this project "
                        f"({type(e).__name__}). Delete it, and train again if there is no other") from e


def tokenizer_from(state):
    """The tokenizer that a checkpoint describes."""
    kinds = {"word": data.WordTokenizer, "char": data.CharTokenizer, "gpt2": data.GPT2Tokenizer,
             "qwen2": qwen_load.Qwen2Tokenizer, "wordpiece": qwen_load.WordPiece}
    try:
        return kinds[state["kind"]](**{k: v for k, v in state.items() if k != "kind"})
    except (KeyError, TypeError) as e:
        raise UserError(f"this is a run of an earlier version, which is not read: its tokenizer, {e}") from e


def build_model(kind, config, weights=None):
    """A model of MODELS from its config, a dict, perhaps with the weights of a checkpoint. UserError if they
    do not fit."""
    try:
        model_type, config_type = MODELS[kind]
        model = model_type(config_type(**config))
        if weights is not None:
            model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        if weights is None and not isinstance(e, ValueError):   # a mistake in the code of a new model
            raise
        raise UserError(f"this does not make a {kind} model. Was the code changed, or the change taken back, "
                        f"since it was trained? {' '.join(str(e).split())[:200]}") from e
    return model


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def kind_of(model):
    """A model's name in MODELS, or scorer. (fully_shard makes a subclass of a model's class.)"""
    names = {model_type: kind for kind, (model_type, _) in MODELS.items()} | {Scorer: "scorer"}
    return next(names[t] for t in type(model).__mro__ if t in names)


def command_for(folder):
    """The command that makes a run of this name, if its name is a default one."""
    kind, _, corpus = folder.name.partition("-")
    if folder.parent == Path("runs") and kind in MODELS and corpus in data.CORPORA:
        return f"python train.py --model {kind} --data {corpus}"
    if kind in ("finetune", "ppo"):
        return f"python {kind}.py --run {data.quoted(folder)} (python {kind}.py --help says from what)"
    return f"python train.py --model {kind if kind in MODELS else 'lstm'} --run {data.quoted(folder)}"


def checkpoint_file(folder):
    """The checkpoint of a run: if `folder` is a file, that file; else its best.pt, else its last.pt, else
    None."""
    for path in (folder, folder / "best.pt", folder / "last.pt"):
        if path.is_file():
            return path
    return None


def load_run(folder, device="cpu", dtype=None):
    """-> (model in eval mode, tokenizer, config). folder: a run (its best.pt is read, else last.pt), a
    checkpoint, a folder in the hub's layout, or a repository on the hub. A run is float32; dtype None keeps
    the dtype of pretrained weights."""
    if qwen_load.is_pretrained(folder):
        model, tokenizer = qwen_load.load_model(folder, device, dtype)
        speed_up(model)
        return model, tokenizer, model.config
    folder = Path(folder)
    if not folder.exists():
        raise UserError(f"there is no run at {folder}. Train one first: {command_for(folder)}")
    path = checkpoint_file(folder)
    if path is None:
        raise UserError(f"{folder} is neither a run nor a model that can be read here: it holds "
                        f"{qwen_load.contents(folder)}")
    checkpoint = read_checkpoint(path)
    if checkpoint["kind"] not in MODELS:
        raise UserError(f"{folder} holds a {checkpoint['kind']}, which is no language model; name a run of "
                        "train.py")
    model = build_model(checkpoint["kind"], checkpoint["config"], checkpoint["model"]).to(device).eval()
    speed_up(model)
    return model, tokenizer_from(checkpoint["tokenizer"]), model.config


def trained_on(folder):
    """The resolved names of the texts that a run was trained on, its base's first; [] if it does not say."""
    path = checkpoint_file(Path(folder))
    return read_checkpoint(path, mmap=True).get("trained_on", []) if path else []


def context_length(model):
    """How many tokens a model can read at once."""
    return math.inf if model.recurrent else model.config.block_size


# ------------------------------------------------------------------------------------------- drawing a token

def top_k_top_p(logits, top_k=None, top_p=None):
    """logits [B, V] with -inf for all tokens outside the top_k most likely ones and the top_p nucleus. Ties
    at the edge of top_k all stay. The token with which the sum passes top_p stays, too."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        p, order = torch.softmax(logits, -1).sort(descending=True, stable=True)
        outside = p.cumsum(-1) - p >= top_p                     # the sum before this token reaches top_p
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits


def penalize(logits, seen, penalty):
    """logits [B, V], where those of the tokens seen [B, T] are lowered by the repetition penalty."""
    scores = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw a token for each row of logits [B, V]; -> (token [B], log_prob [B]), the log-probability under the
    distribution from which the token was drawn."""
    if temperature == 0:
        token = logits.max(-1).indices                                      # five times as fast as argmax
        return token, logits.new_zeros(len(logits), dtype=torch.float32)
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature      # the largest is 0: nothing overflows
    log_p = torch.log_softmax(top_k_top_p(logits, top_k, top_p), -1)
    # The drawn token is the one at whose cumulated probability a uniform number falls. (torch.multinomial
    # draws a number for every token: 2.7 ms a row with Qwen2's vocabulary.)
    sums = log_p.exp().cumsum(-1, dtype=torch.float32 if log_p.device.type == "mps" else torch.float64)
    u = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator)
    token = torch.searchsorted(sums, u * sums[:, -1:], right=True)
    return token[:, 0], log_p.gather(1, token)[:, 0]


@torch.no_grad()
def generate_stream(model, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos=(),
                    seed=None, suppressed_tokens=(), repetition_penalty=1.0, state=None):
    """Generate for all prompts (non-empty lists of ids) together, one token a step. Yields (token [B],
    log_prob [B], done [B]) on the model's device. token is -1 for a row that has nothing new, because its
    prompt is not read yet, or because it is done: after one of the end tokens `eos` (which is yielded) or
    after max_new_tokens. log_prob is that of sample_token, 0 for temperature 0. seed None: torch's own
    generator. suppressed_tokens: ids that are never drawn. state: of a text of one row that was read before;
    the prompt continues this text."""
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token: begin with the end-of-text token")
    device, packed = device_of(model), {}
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    shortest, total = int(lengths.min()), int(lengths.max()) + max_new_tokens
    text = torch.zeros(len(prompts), total, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        text[row, :len(prompt)] = torch.tensor(prompt, device=device)
    window = min(total, context_length(model))
    if lengths.max() > window:
        raise UserError(f"the prompt has {int(lengths.max())} tokens, the model's context is {window}")
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    suppressed = torch.tensor(list(suppressed_tokens), dtype=torch.long, device=device)
    stops = torch.tensor(eos, dtype=torch.long, device=device).flatten()
    state = model.init_state(len(prompts), window) if state is None else state
    unread = text[:, :shortest]
    for t in range(shortest, total):
        with packed_weights(packed):
            hidden, state = model(unread, state)
            logits = model.logits(hidden[:, -1])                                # [B, V]
        if repetition_penalty != 1:
            logits = penalize(logits, text[:, :t], repetition_penalty)
        logits.index_fill_(1, suppressed, float("-inf"))
        token, log_prob = sample_token(logits, temperature, top_k, top_p, generator)
        in_prompt = t < lengths
        new = ~in_prompt & ~done
        text[:, t] = torch.where(in_prompt, text[:, t], token)
        done = done | new & ((t + 1 >= lengths + max_new_tokens) | torch.isin(token, stops))
        yield token.masked_fill(~new, -1), log_prob.masked_fill(~new, 0.0), done
        if done.all():
            return
        unread = text[:, t:t + 1]
        if not model.recurrent and state.length == state.max_len:   # the cache is full: keep the later half
            state, unread = model.init_state(len(prompts), window), text[:, t + 1 - max(1, window // 2):t + 1]


def generate(model, prompts, max_new_tokens, temperature=1.0, eos=(), **how):
    """The new ids of each prompt as lists, without end tokens. The arguments are those of generate_stream."""
    out, stops = [[] for _ in prompts], torch.tensor(eos).flatten().tolist()
    for token, _, _ in generate_stream(model, prompts, max_new_tokens, temperature, eos=eos, **how):
        for row, t in enumerate(token.tolist()):
            if t >= 0 and t not in stops:
                out[row].append(t)
    return out


def encode_prompt(tokenizer, text):
    """The token ids of a prompt, after the tokens with which every text begins. An empty prompt is the end
    token. Unknown characters are left out with a warning, and unknown words if there is no <unk>."""
    if tokenizer.kind == "char" or tokenizer.kind == "word" and tokenizer.unk is None:
        pieces = tokenizer.normalize(text)
        if unknown := [piece for piece in pieces if piece not in tokenizer.ids]:
            print(f"not in this run's vocabulary, left out: {' '.join(unknown)}", file=sys.stderr)
        ids = [tokenizer.ids[piece] for piece in pieces if piece in tokenizer.ids]
    else:
        ids = tokenizer.encode(text)
    return tokenizer.begin + ids or [tokenizer.eos]


# The evening's reading of this file ends here.

MESSAGE = "<|im_start|>{role}\n{text}<|im_end|>\n"                          # ChatML
ANSWER = "<|im_start|>assistant\n"
CHAT_CONTEXT = 4096                                                         # tokens of a conversation


def read_message():
    """A line that is typed, or lines that are pasted together. UnicodeEncodeError for what is no text."""
    lines = [input("> ")]
    while os.name == "posix" and sys.stdin.isatty() and select.select([sys.stdin], [], [], 0.05)[0]:
        lines.append(input())
    return "\n".join(line.removesuffix("\r") for line in lines).encode().decode()


def system_message(tokenizer):
    """The message that a chat begins with: that of the model's chat template, with which it was tuned."""
    if tokenizer.chat_template is None:
        return MESSAGE.format(role="system", text="You are a helpful assistant.")
    text = qwen_load.system_text(tokenizer.chat_template)
    return MESSAGE.format(role="system", text=text) if text else ""


class Printer:
    """Print a text as it grows. Only new tokens are decoded, together with the two tokens before them, which
    decide the spacing. An incomplete UTF-8 character is held back until the rest arrives."""

    def __init__(self, tokenizer, ids):
        self.tokenizer, self.context, self.new = tokenizer, [], list(ids)
        self.show(last=True)

    def add(self, token):
        self.new.append(token)
        self.show()

    def show(self, last=False):
        before = self.tokenizer.decode(self.context)
        text = self.tokenizer.decode(self.context + self.new)[len(before):]
        if last or not text.endswith("\ufffd") or len(self.new) > 8:
            print(text, end="", flush=True)
            self.context, self.new = (self.context + self.new)[-2:], []


def print_continuation(model, tokenizer, ids, config, stops, seed, shown=(), state=None):
    """Print the tokens `shown`, and the model's continuation of ids as it grows; -> the new tokens. state:
    the memory of a conversation. With it, Ctrl-C ends the answer and not the program."""
    printer, new = Printer(tokenizer, shown), []
    try:
        for token, _, _ in generate_stream(model, [ids], config.tokens, config.temperature, config.top_k,
                                           config.top_p, stops, seed, tokenizer.suppressed,
                                           config.repetition_penalty, state):
            new.append(token.item())
            if new[-1] not in stops:
                printer.add(new[-1])
    except KeyboardInterrupt:
        if state is None:
            raise
    printer.show(last=True)                                                 # perhaps an incomplete character
    print()
    return new


def chat(model, tokenizer, config):
    """A conversation in the terminal. Ctrl-C stops an answer, and Ctrl-D ends. The state is kept from turn to
    turn, so that the model reads only what is new."""
    limit = min(CHAT_CONTEXT, context_length(model))
    state, unread, ids = model.init_state(1, limit), system_message(tokenizer), []
    with contextlib.suppress(ImportError, AttributeError):                  # Windows has no readline
        sys.stdin.reconfigure(errors="surrogateescape")                     # a wrong byte ends nothing
        import readline  # noqa: F401                                       # makes the arrow keys work
    stops = [*tokenizer.stops, tokenizer.added["<|im_end|>"]]
    while True:
        try:
            text = read_message()
        except EOFError:
            return print()
        except UnicodeError:
            print("(this is no UTF-8 text; type it again)", file=sys.stderr)
            continue
        if not text.strip():
            continue
        for token in tokenizer.added:
            if token in text:
                print(f"(your message holds {token}, which the model reads as a control token)",
                      file=sys.stderr)
        message = MESSAGE.format(role="user", text=text) + ANSWER
        room, alone = min(config.tokens, limit // 4), tokenizer.encode(system_message(tokenizer) + message)
        if len(alone) + room > limit:                                       # room: for an answer
            print("(this message is too long; shorten it)", file=sys.stderr)
            continue
        ids += tokenizer.encode(unread + message)
        if state.length + len(ids) + room > limit:
            print(f"(the conversation is longer than {limit} tokens and begins again)", file=sys.stderr)
            state, ids = model.init_state(1, limit), alone
        before = state.length + len(ids)
        short = replace(config, tokens=min(config.tokens, limit - before))
        answer = print_continuation(model, tokenizer, ids, short, stops, config.seed, state=state)
        if state.length >= before:                                          # else the model has read nothing
            ids = answer[state.length - before:]                            # tokens drawn, but not read yet
        unread = "\n" if answer and answer[-1] in stops else "<|im_end|>\n"
        if unread != "\n":
            print("(cut off)", file=sys.stderr)


def main(argv=None):
    example = 'example: python sample.py --run runs/lstm-finance --prompt "the market"'
    config, _ = data.parse_args(Config, argv, example)
    device = pick_device(config.device)
    model, tokenizer, _ = load_run(config.run, device, pick_dtype(config.dtype, device))
    qwen2 = tokenizer.kind == "qwen2"
    if config.chat and not (qwen2 and "<|im_start|>" in tokenizer.added):
        raise UserError("--chat needs a model that was tuned for it, as Qwen/Qwen2-0.5B-Instruct; "
                        f"{config.run} was not")
    if config.chat and not config.prompt:
        return chat(model, tokenizer, config)
    asked, eos = config.prompt, tokenizer.stops if qwen2 or config.stop else []
    if asked.startswith("file:"):                       # an editor ends a file with a new line
        asked = "".join(data.read_lines(asked.removeprefix("file:"))).removesuffix("\n")
    else:
        asked = asked.replace("\\n", "\n").replace("\\t", "\t")
    if config.chat:
        eos = [*eos, tokenizer.added["<|im_end|>"]]
        asked = system_message(tokenizer) + MESSAGE.format(role="user", text=asked) + ANSWER
    prompt = encode_prompt(tokenizer, asked)
    shown = prompt[len(tokenizer.begin):] if config.prompt and not config.chat else []
    seed = torch.seed() % (1 << 31) if config.seed is None else config.seed
    for n in range(config.n):
        if n:
            print()
        print_continuation(model, tokenizer, prompt, config, eos, seed + n, shown)


if __name__ == "__main__":
    data.run_main(main)
