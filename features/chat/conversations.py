"""
Read conversations from .jsonl, one a line, in the usual shapes:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
"""
import re

import prepare
from checkpoint import open_regular
from configurator import UserError

LONGEST = 2 ** 24  # bytes of a line

SHAPES = {'messages': ('role', 'content'), 'conversations': ('from', 'value')}
ROLES = {'system': 'system', 'user': 'user', 'human': 'user', 'assistant': 'assistant', 'gpt': 'assistant'}


def read(path, s):
    """Yield (where, messages) of each line; where is for example 'chats.jsonl:2'. Raises UserError."""
    with open_regular(path) as f:
        offset = 0  # of the line in the file, in bytes
        for number, data in enumerate(iter(lambda: f.readline(LONGEST + 1), b''), 1):
            if len(data) > LONGEST:
                raise UserError(f'{path}:{number}: a line of more than {LONGEST:,} bytes: '
                                'take a conversation in each line')
            line = prepare.decode(data, s, path, offset).removeprefix('\ufeff')
            offset += len(data)
            if line and not line.isspace():
                where = f'{path}:{number}'
                yield where, messages_of(prepare.parse(line, where), s, where)


def messages_of(row, s, where):
    """[{'role', 'content'}, …] of a line's object. Raises UserError for another shape."""
    key = next((key for key in SHAPES if key in row), None)
    if key is None:
        raise UserError(f'{where}: no field messages or conversations; it has {", ".join(row) or "none"}: '
                        'leave out --messages, or convert it')
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise UserError(f'{where}: {key}: takes a list of turns')
    messages = [message_of(turn, s, f'{where}: {key}[{n}]') for n, turn in enumerate(turns)]
    roles = [message['role'] for message in messages]
    if 'assistant' not in roles:
        raise UserError(f'{where}: no turn of the assistant, so nothing to train on: leave it out')
    if 'user' not in roles[:roles.index('assistant')]:
        raise UserError(f'{where}: the assistant speaks before the user: leave this turn out')
    return messages


def message_of(turn, s, where):
    """{'role', 'content'} of a turn in either shape."""
    shape = next((shape for shape in SHAPES.values() if isinstance(turn, dict) and shape[0] in turn), None)
    if shape is None:
        raise UserError(f'{where}: takes {{"role", "content"}} or {{"from", "value"}}')
    name, key = shape
    role, content = turn[name], turn.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f'{where}: {name}={role!r}: takes {", ".join(ROLES)}')
    if not isinstance(content, str):
        raise UserError(f'{where}: {key} holds a {type(content).__name__}, takes text')
    if re.search('[\ud800-\udfff]', content):  # JSON can spell half a character
        if s.errors == 'strict':
            raise UserError(f'{where}: {key} has half a surrogate pair: fix it, or use --errors=replace')
        content = content.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return {'role': ROLES[role], 'content': content}
