"""
python sample.py --chat: hold a conversation on the terminal.
"""
from contextlib import suppress
from dataclasses import replace

from configurator import UserError, typed_text, visible
from features.chat.template import Template
from features.interactive import typed_lines
from sample import NotFinite, stream


def talk(model, tokenizer, s, generator, compile, adapters=()):
    """
    Read a line, print the assistant's answer, and go on until the input ends. A message that cannot be read
    does not end the program.
    """
    check_settings(model, s, adapters)
    form = tokenizer.prompt_format
    if not form.chat_template:
        print('no chat template is known of this model: the default one is used', flush=True)
    template = Template(form, tokenizer)
    tokenizer = tokenizer.with_format(replace(form, ends=ends_of(template, form)))
    messages = []
    if s.system:
        messages = [{'role': 'system', 'content': typed_text(s.system, 'system')}]
    print('a message a line, \\n in it is a new line; Ctrl-D ends', flush=True)
    for text in typed_lines('chat'):
        try:
            asked = [*messages, {'role': 'user', 'content': typed_text(text, 'chat')}]
            asked, prompt, dropped = fit(asked, template, model.cfg.block_size, s.max_new_tokens)
            if dropped:
                print(f'({dropped} earlier messages no longer fit into the context of '
                      f'{model.cfg.block_size} tokens and were dropped)', flush=True)
            messages = [*asked, {'role': 'assistant',
                                 'content': answer(model, tokenizer, prompt, s, generator, compile)}]
        except NotFinite:  # no other message would do
            raise
        except UserError as error:
            print(visible(str(error)), flush=True)


def check_settings(model, s, adapters):
    """Raise UserError for a model and settings that cannot hold a conversation."""
    if model.cfg.n_encoder_layer or s.num_beams:
        raise UserError('chat=True: takes a decoder, without num_beams')
    if len(adapters) > 1:
        raise UserError('chat=True: takes one adapter')
    for name in ('start', 'interactive', 'num_samples'):
        if name in s.given:
            raise UserError(f'{name}={getattr(s, name)}: does not go with chat=True: leave it out')
    if s.max_new_tokens >= model.cfg.block_size:
        raise UserError(f'max_new_tokens={s.max_new_tokens}: leaves no room for a message in the context of '
                        f'{model.cfg.block_size} tokens: lower it')


def ends_of(template, form):
    """The tokens at which an answer stops: those of the model, and the one that the template writes."""
    found = set(form.ends or (template.tokenizer.eot,))
    with suppress(UserError):  # a template that cannot be trained, as one that removes earlier reasoning
        turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        found |= template.example(turns)[2]
    return tuple(sorted(found))


def fit(messages, template, block_size, max_new_tokens):
    """
    (messages, ids of the prompt, number of dropped messages): the oldest turns, but not the system's message,
    are dropped until the prompt leaves room for the answer. Raises UserError if the last message alone does
    not fit.
    """
    system = [message for message in messages[:1] if message['role'] == 'system']
    turns = messages[len(system):]
    dropped = 0
    while True:
        prompt = template.prompt([*system, *turns[dropped:]])
        if len(prompt) + max_new_tokens <= block_size:
            return [*system, *turns[dropped:]], prompt, dropped
        if dropped + 1 == len(turns):
            raise UserError(f'the message has {len(prompt)} tokens with what is around it, the context of '
                            f'{block_size} has room for {block_size - max_new_tokens} and an answer of '
                            f'max_new_tokens={max_new_tokens}: shorten it')
        dropped += 2  # a message and its answer


def answer(model, tokenizer, prompt, s, generator, compile):
    """Print the assistant's answer while it is generated. Returns its text."""
    names = 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'use_cache'
    options = {name: getattr(s, name) for name in names}
    stop, text = [typed_text(text, 'stop') for text in s.stop], ''
    for _, piece in stream(model, tokenizer, [prompt], stop, generator=generator, compile=compile, **options):
        print(piece, end='', flush=True)
        text += piece
    print(flush=True)
    return text
