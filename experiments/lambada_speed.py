"""
What batching by length gains: LAMBADA on a random network of llama_15m's size, by tasks.py, by tasks.py an item at a time, and by the
loop that one writes first, an item at a time with the logits of every position.

    python experiments/lambada_speed.py lambada_openai.jsonl --tokenizer=FILE.model        # of 32,000 tokens, as Llama's or Mistral's
"""
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


import train
from configurator import FilePath, UserError, configure, part_of, run_main
from device import NumericConfig, autocast, pick_device, pick_dtype
from features.study import tasks
from features.study.measure import alternate, section, show
from model import ModelConfig, make_model
from tokenizer import new_tokenizer


@dataclass
class Settings(NumericConfig):
    positional = 'files'
    files: list[FilePath] = field(default_factory=list)  # one task
    tokenizer: FilePath = 'gpt2'  # as prepare.py takes it
    limit: int = 0  # the first so many items; 0 = all
    rounds: int = 2  # of each, in turn


@torch.no_grad()
def loop(model, tokenizer, items, device, dtype):
    """As tasks.score_items() on items without choices, one by one."""
    out = []
    for item in items:
        context, continuation = tasks.encode_pair(tokenizer, item.context, item.choices[0])
        ids = torch.tensor((context + continuation)[-model.cfg.block_size - 1:], device=device)
        with autocast(device, dtype):
            logits = model.logits(model.hidden(ids[None, :-1]))[0]  # (T, V)
        asked = ids[-len(continuation):]
        nats = logits.float().log_softmax(-1)[-len(continuation):].gather(1, asked[:, None])
        out.append([(nats.sum().item(), bool((logits[-len(continuation):].argmax(-1) == asked).all()))])
    return out


def main():
    s = configure(Settings)
    if len(s.files) != 1:
        raise UserError('files: takes one task: python experiments/lambada_speed.py lambada_openai.jsonl --tokenizer=FILE.model')
    items, tokenizer, device = tasks.read_items(s.files[0])[:s.limit or None], new_tokenizer(s.tokenizer), pick_device(s.device)
    sizes = configure(train.Settings, [str(Path(__file__).parent.parent / 'config' / 'llama_15m.py'), f'--vocab_size={tokenizer.vocab_size}'])
    torch.manual_seed(1)
    model, dtype = make_model(part_of(sizes, ModelConfig)).to(device).eval(), pick_dtype(s.dtype, device)
    found = {}

    def timed(name, score, **options):
        def arm():
            began = time.perf_counter()
            found[name] = score(model, tokenizer, items, device, dtype, **options)
            return {'seconds': time.perf_counter() - began}
        return arm
    arms = {'tasks.py': timed('tasks.py', tasks.score_items), 'tasks.py, an item at a time': timed('single', tasks.score_items, batch_tokens=1),
            'a plain loop': timed('loop', loop)}
    show(section(f'{len(items):,} items, {model.num_params():,} parameters, {dtype}, {torch.get_num_threads()} thread(s)', alternate(arms, s.rounds)))
    apart = max(abs(ours[0][0] - theirs[0][0]) for ours, theirs in zip(found['tasks.py'], found['loop']))
    print(f'  log-likelihoods differ by {apart:.1e} at most, greedy continuations in '
          f'{sum(ours[0][1] != theirs[0][1] for ours, theirs in zip(found["tasks.py"], found["loop"]))}')


if __name__ == '__main__':
    run_main(main)
