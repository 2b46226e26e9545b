"""
Chat templates: a conversation → text → tokens, and which of the tokens are trained.

    messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    render(DEFAULT, messages, eos_token='<|im_end|>')

Templates come with downloaded models, so they run in Jinja's sandbox, in a process with limits: jinja.py. The
rendered text is that of transformers' apply_chat_template().
"""
import functools
import json
import os
import re
import select
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec

import numpy as np

from configurator import UserError
from features.chat import jinja
from tokenizer import from_json

# ChatML. A marker that is no special token of the tokenizer is ordinary text; the end of a turn always is one
DEFAULT = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
           "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LONGEST = 2 ** 20  # characters of a template; those of published models have up to 30,000
SECONDS = 5  # for one conversation, which takes 0.0002 s
# Signs around the number of a special token whose name stands in a message: of Unicode's private use
BEFORE, AFTER = '\ue001', '\ue002'
HIDDEN = re.compile(f'{BEFORE}(\\d+){AFTER}')


# -----------------------------------------------------------------------------
# Text

def render(template, messages, add_generation_prompt=False, **names):
    """
    The text of messages [{'role', 'content'}, …]. add_generation_prompt: also the beginning of the
    assistant's next turn. names: bos_token, eos_token, … Raises UserError for a template that fails, or takes
    too long or too much memory.
    """
    if template == DEFAULT:
        return jinja.render(default(), messages, add_generation_prompt, names)
    request = {'messages': messages, 'add_generation_prompt': add_generation_prompt, 'names': names}
    return renderer(template, os.getpid()).ask(request)


def refused(reason):
    return UserError(f'the chat template refuses it: {reason}')


@functools.cache
def default():
    check_jinja()
    return jinja.environment().from_string(DEFAULT)


def check_jinja():
    if find_spec('jinja2') is None:
        raise UserError('a chat template needs the jinja2 library: pip install jinja2')


@functools.lru_cache(maxsize=2)
def renderer(template, pid):  # pid: a process that was forked has one of its own
    return Renderer(template)


class Renderer:
    """The process of jinja.py for a template from elsewhere. It ends with this one, when its input does."""

    def __init__(self, template):
        self.template, self.process, self.is_slow = template, None, False
        check_jinja()
        if len(template) > LONGEST:
            raise refused(f'it has more than {LONGEST:,} characters')

    def start(self):
        # -I: it imports nothing from the folder that the user works in. Of the user's variables it gets those
        # that Python needs
        known = {name: os.environ[name] for name in ('TZ', 'LD_LIBRARY_PATH') if name in os.environ}
        self.process = subprocess.Popen([sys.executable, '-I', jinja.__file__], env=known,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        folders = [os.path.dirname(find_spec(name).origin) for name in ('jinja2', 'markupsafe')]
        self.send({'path': [os.path.dirname(folder) for folder in folders], 'template': self.template})

    def send(self, value):
        self.process.stdin.write(json.dumps(value).encode() + b'\n')
        self.process.stdin.flush()

    def ask(self, request):
        """The text of a conversation. Raises UserError."""
        line = b''
        if self.is_slow:  # once: the next conversation has to wait no more
            raise refused(f'it takes longer than {SECONDS} seconds')
        with suppress(BrokenPipeError):
            if self.process is None:
                self.start()
            self.send(request)
            answer = select.poll()  # select() takes no descriptor above 1,023
            answer.register(self.process.stdout, select.POLLIN)
            if not answer.poll(1000 * SECONDS):
                self.end()
                self.is_slow = True
                raise refused(f'it takes longer than {SECONDS} seconds')
            line = self.process.stdout.readline()
        if not line.endswith(b'\n'):  # the system ended it
            self.end()
            raise refused('it takes too much memory or time')
        answer = json.loads(line)
        if 'error' in answer:
            raise refused(answer['error'])
        return answer['text']

    def end(self):
        self.process.kill()
        self.process.communicate()
        self.process = None


# -----------------------------------------------------------------------------
# Tokens

class Template:
    """
    The chat template of a PromptFormat, DEFAULT if it has none, with the tokenizer that reads its text.
    where: its origin, for errors.
    """

    def __init__(self, form, tokenizer, where=''):
        self.text, self.tokenizer, self.where = form.chat_template or DEFAULT, tokenizer, where
        self.names = {'eos_token': tokenizer.eot_text, **dict(form.names)}
        self.special = tokenizer.special_tokens()
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_names = re.compile('|'.join(map(re.escape, longest_first)) or r'(?!)')
        self.numbers = {name: f'{BEFORE}{n}{AFTER}' for n, name in enumerate(longest_first)}
        self.by_number = longest_first

    def render(self, messages, add_generation_prompt=False):
        """The text of messages; names of special tokens inside of them are hidden, for encode()."""
        hidden = []
        for message in messages:
            content = self.special_names.sub(lambda found: self.numbers[found[0]], message['content'])
            hidden.append({**message, 'content': content})
        return render(self.text, hidden, add_generation_prompt, **self.names)

    def encode(self, text):
        """
        The ids of a rendered text. Only the template writes special tokens: their names in a message are
        ordinary text.
        """
        if BEFORE not in text:
            return self.tokenizer.encode_special(text)
        ids, begin = [], 0
        for found in [*self.special_names.finditer(text), None]:
            part = self.shown(text[begin:found.start() if found else None])
            ids += self.tokenizer.encode(part) if part else []
            if found:
                ids.append(self.special[found[0]])
                begin = found.end()
        return ids

    def shown(self, text):
        """A rendered text with the names of special tokens inside of the messages."""
        return HIDDEN.sub(self.name_of, text)

    def name_of(self, found):
        number = int(found[1])
        return self.by_number[number] if number < len(self.by_number) else found[0]

    def prompt(self, messages):
        """The ids after which the assistant's next turn follows."""
        return self.encode(self.render(messages, add_generation_prompt=True))

    def example(self, messages):
        """
        (ids, mask, ends) of a conversation: ids (L,) int64, mask (L,) uint8, 1 for the tokens of the
        assistant's turns with their ends; ends: the tokens that end these turns. Raises UserError for a
        template that writes a turn in other words once another one follows.
        """
        whole = self.render(messages)
        ids, ends = self.encode(whole), set()
        mask = np.zeros(len(ids), np.uint8)
        for n, message in enumerate(messages):
            if message['role'] != 'assistant':
                continue
            before = self.render(messages[:n], add_generation_prompt=True)
            until = self.render(messages[:n + 1])
            if not until.startswith(before):
                raise self.refused(f'the turn of message {n + 1}, of the assistant, does not begin with what '
                                   'the template writes to ask for it (add_generation_prompt)')
            if not whole.startswith(until):
                raise self.refused(f'the template writes message {n + 1} in another way once others follow')
            begin, end = shared(ids, self.encode(before)), shared(ids, self.encode(until))
            mask[begin:end] = 1
            special = [i for i in ids[begin:end] if i in self.special.values()]
            if not special:
                raise self.refused(f'message {n + 1}, of the assistant, ends with no special token, '
                                   'so no answer could end')
            ends.add(special[-1])
        return np.array(ids, np.int64), mask, ends

    def refused(self, problem):
        return UserError(f'{problem}: use another template than {self.where or "this one"}')


def shared(ids, others):
    """The number of tokens with which both lists begin."""
    for n, (one, other) in enumerate(zip(ids, others)):
        if one != other:
            return n
    return min(len(ids), len(others))


def form_of(meta, inherited=None):
    """
    The PromptFormat of a model that is trained on data with this meta.json. inherited: that of the model it
    begins with, which may end a text in more ways.
    """
    form = from_json(meta['chat'])
    more = inherited.ends if inherited is not None else ()
    return from_json({**form.as_json(), 'ends': sorted({*form.ends, *more})},
                     inherited.bos if inherited is not None else ())
