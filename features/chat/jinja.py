"""
A process of its own that renders one chat template, in Jinja's sandbox: template.py starts it for templates
that came with a model. The system limits its memory and its processor time, because a template may loop, or
multiply a text, in ways that no check of its text finds.

stdin: a line of JSON {'path', 'template'}, then one {'messages', 'add_generation_prompt', 'names'} for each
conversation; stdout: a line for each, {'text'} or {'error'}.
"""
import json
import resource
import sys

MEMORY = 2 ** 28  # bytes of address space: Python and Jinja take 60 MB
CPU_SECONDS = 600  # of all conversations together; template.py limits each
LONGEST = 2 ** 24  # characters of a rendered conversation


def limit():
    """Limit what this process may use, from here on."""
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_SECONDS),
                       (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # macOS has no limit of this kind
            pass


def environment():
    """An environment like that of transformers."""
    from datetime import datetime

    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    class Generation(ext.Extension):
        """{% generation %}…{% endgeneration %}, with which some templates mark the assistant's turns."""
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return nodes.CallBlock(self.call_method('written'), [], [], body).set_lineno(line)

        def written(self, caller):
            return caller()

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[Generation, ext.loopcontrols])
    found.filters['tojson'] = tojson
    found.globals['raise_exception'] = raise_exception
    found.globals['strftime_now'] = lambda format: datetime.now().strftime(format)
    return found


def render(template, messages, add_generation_prompt, names):
    """The text of a conversation by a compiled template."""
    text = template.render(messages=messages, tools=None, documents=None,
                           add_generation_prompt=add_generation_prompt, **names)
    if len(text) > LONGEST:
        raise ValueError(f'it writes more than {LONGEST:,} characters')
    text.encode()  # raises an error for half of a surrogate pair, which no tokenizer reads
    return text


def explained(error):
    """One line about an error of a template."""
    if isinstance(error, MemoryError):
        return 'it takes too much memory'
    if isinstance(error, RecursionError):
        return 'it calls itself too often'
    return ' '.join(str(error).split())[:300] or type(error).__name__


def main():
    begin = json.loads(sys.stdin.readline())
    sys.path += begin['path']
    jinja = environment()
    limit()
    template = None
    for line in sys.stdin:
        try:
            template = template or jinja.from_string(begin['template'])
            answer = {'text': render(template, **json.loads(line))}
        except Exception as error:  # whatever a template raises is its own error
            answer = {'error': explained(error)}
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
