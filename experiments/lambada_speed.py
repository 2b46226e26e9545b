"""
What does batching by length gain? LAMBADA on a random network of llama_15m's size: by
features/study/tasks.py; by the same an item at a time; and by the loop that one writes first, an item at a
time with the logits of every position.

    # a tokenizer of 32,000 tokens, as Llama's or Mistral's
    python experiments/lambada_speed.py lambada_openai.jsonl --tokenizer=FILE.model
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import train
from configurator import FilePath, NumericConfig, UserError, configure, pick_device, pick_dtype, run_main
from features import part_of
from features.study import tasks
from features.study.items import read_items
from features.study.measure import alternate, section, show
from model import ModelConfig, autocast, make_model
from tokenizer import new_tokenizer

ROOT = Path(__file__).parent.parent


@dataclass
class Settings(NumericConfig):
    positional = 'files'
    files: list[FilePath] = field(default_factory=list)  # one task
    tokenizer: FilePath = 'gpt2'  # as prepare.py takes it
    limit: int = 0  # items, from the beginning of the file; 0 = all
    rounds: int = 2  # of each, in turn


@torch.no_grad()
def loop(model, tokenizer, items, device, dtype):
    """As tasks.score_items() on items without choices, one by one."""
    out = []
    for item in items:
        context, continuation = tasks.encode_pair(tokenizer, item.context, item.choices[0])
        length = len(continuation)
        ids = torch.tensor((context + continuation)[-model.cfg.block_size - 1:], device=device)  # (T + 1,)
        with autocast(device, dtype):
            logits = model.logits(model.hidden(ids[None, :-1]))[0]  # (T, V)
        asked = ids[-length:]
        logits = logits[-length:]
        nats = logits.float().log_softmax(-1).gather(1, asked[:, None])
        is_greedy = bool((logits.argmax(-1) == asked).all())
        out.append([(nats.sum().item(), is_greedy)])
    return out


def main():
    s = configure(Settings)
    if len(s.files) != 1:
        raise UserError('files: takes one task: '
                        'python experiments/lambada_speed.py lambada_openai.jsonl --tokenizer=FILE.model')
    items = read_items(s.files[0])[:s.limit or None]
    tokenizer = new_tokenizer(s.tokenizer)
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    config = str(ROOT / 'config' / 'llama_15m.py')
    sizes = configure(train.Settings, [config, f'--vocab_size={tokenizer.vocab_size}'])
    torch.manual_seed(1)
    model = make_model(part_of(sizes, ModelConfig)).to(device).eval()
    found = {}

    def timed(name, score, **options):
        def arm():
            began = time.perf_counter()
            found[name] = score(model, tokenizer, items, device, dtype, **options)
            return {'seconds': time.perf_counter() - began}
        return arm

    arms = {
        'tasks.py': timed('tasks.py', tasks.score_items),
        'tasks.py, an item at a time': timed('single', tasks.score_items, batch_tokens=1),
        'a plain loop': timed('loop', loop),
    }
    title = (f'{len(items):,} items, {model.num_params():,} parameters, {dtype}, '
             f'{torch.get_num_threads()} thread(s)')
    show(section(title, alternate(arms, s.rounds)))
    pairs = list(zip(found['tasks.py'], found['loop']))
    apart = max(abs(ours[0][0] - theirs[0][0]) for ours, theirs in pairs)
    other = sum(ours[0][1] != theirs[0][1] for ours, theirs in pairs)
    print(f'  log-likelihoods differ by {apart:.1e} at most, greedy continuations in {other}')


if __name__ == '__main__':
    run_main(main)
