"""
Sample with adapters: python sample.py --adapter=DIR, also several in one batch.
"""
from contextlib import suppress
from dataclasses import replace

import checkpoint
from configurator import UserError
from features.lora import adapters, load, peft_files
from sample import encode_prompt, shown_prompt, stored_format
from tokenizer import load_tokenizer


def add_adapters(model, tokenizer, given, where, merge=False):
    """
    Add adapters to the model of `where` (given: as in load.add_adapters()). Returns [(name, tokenizer)]; each
    tokenizer has the prompt format that the adapter was trained with. merge: merge a single adapter into the
    weights, if possible.
    """
    from features.hf import reading
    found, before = [], model.cfg.vocab_size
    for name, folder in load.add_adapters(model, given, where).items():
        own = tokenizer
        if not peft_files.is_one(folder):
            state = checkpoint.load_state(checkpoint.find(folder, 'best'))
            form = stored_format(state, tokenizer)
            base = tokenizer.prompt_format
            own = tokenizer.with_format(replace(form, bos=form.bos or base.bos, ends=form.ends or base.ends,
                                                chat_template=form.chat_template or base.chat_template,
                                                names=form.names or base.names))
        elif model.cfg.vocab_size > before:  # resized: the new tokens are written beside it
            with suppress(UserError):  # or nowhere
                more = load_tokenizer(*reading.tokenizer(f'hf:{folder}'))
                own = more.with_format(tokenizer.prompt_format)
        found.append((name, own))
    if merge and len(found) == 1 and not adapters.obstacle(model):
        adapters.merge(model)
    return found


def select_adapters(model, named, count):
    """Let `count` rows of every batch have the first adapter, the next `count` rows the second, and so on."""
    adapters.select(model, [name for name, _ in named for _ in range(count)])


def prompts_of_each(named, text, cfg, count):
    """(token ids, text to print before the sample) of the prompt `text` for the rows of select_adapters()."""
    prompts, texts = [], []
    for name, tokenizer in named:
        prompts += [encode_prompt(text, tokenizer, cfg)] * count
        texts += [f'{name}: {shown_prompt(text, tokenizer, cfg)}'] * count
    return prompts, texts
