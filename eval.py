"""
Evaluate a model.

    # nats per token and bits per byte of a checkpoint, on the whole validation split
    python eval.py loss --out_dir=out/tinystories_cpu
    # the same for any text, and its perplexity
    python eval.py text --out_dir=out/tinystories_cpu FILE.txt
    # zero- and few-shot tasks from files (features/study/items.py), or from lm-evaluation-harness
    python eval.py tasks --out_dir=hf:FOLDER lambada.jsonl arc_easy.jsonl='\\nAnswer: '
    python eval.py harness --out_dir=hf:FOLDER --tasks=lambada_openai,arc_easy
    # ROUGE of generated summaries (features/study/summaries.py); without a file, of the validation pairs
    python eval.py summaries --out_dir=out/pairs dev.jsonl --source=source --target=target
    # baselines on the same tokens: uniform guessing, n-gram counts, a transformer
    python eval.py ladder --dataset=tinystories

`python eval.py loss --help` prints the settings of a command.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass, field
from typing import Literal

# before torch is loaded, see train.py
os.environ['GOMP_SPINCOUNT'] = os.environ.get('GOMP_SPINCOUNT', '1000')

import sample
from configurator import (
    DeviceConfig,
    FilePath,
    NumericConfig,
    UserError,
    pick_device,
    pick_exact_dtype,
    run_main,
    typed_text,
)
from features.commands import configure_command

# -----------------------------------------------------------------------------
# Settings

@dataclass
class LossSettings(DeviceConfig):
    out_dir: FilePath = ''  # a training run or one of its checkpoints; '' = the last run under out/
    which: Literal['best', 'last'] = 'best'  # checkpoint of out_dir: lowest validation loss or newest
    dataset: FilePath = ''  # name under data/, or a folder, with the same tokenizer; '' = data of the run


@dataclass
class ModelSettings(NumericConfig):  # no compile: rows of every length would be compiled anew
    out_dir: FilePath = ''  # a training run, one of its checkpoints, hf:FOLDER or gpt2; '' = the last run
    # under out/
    which: Literal['best', 'last'] = 'best'  # checkpoint of a run: lowest validation loss or newest
    adapter: FilePath = ''  # LoRA adapter to apply: a run of train.py --lora_rank, or a PEFT folder

    def load(self, encoder=False):
        """
        (model on its device, tokenizer, device, dtype). encoder: whether an encoder-decoder is accepted.
        Raises UserError for a model that cannot be loaded or evaluated.
        """
        device = pick_device(self.device)
        model, tokenizer = sample.load(self.out_dir, self.which, encoder)
        if self.adapter:
            from features.lora.sampling import add_adapters
            [(_, tokenizer)] = add_adapters(model, tokenizer, [self.adapter], self.out_dir)
        if model.cfg.arch == 'markov':
            raise UserError(f'out_dir={self.out_dir}: a Markov chain reads only one token: use eval.py loss')
        dtype = pick_exact_dtype(self.dtype, device)
        print(f'device: {device}, {dtype}', flush=True)
        return model.to(device), tokenizer, device, dtype


@dataclass
class TextSettings(ModelSettings):
    files: list[FilePath] = field(default_factory=list)  # text files, UTF-8
    stride: int = 0  # tokens predicted per window; 0 = half of the context, with the other half before them
    rolling: bool = False  # the windows of lm-eval's rolling log-likelihoods, to compare with its figures:
    # they do not overlap, and a start token that the tokenizer writes before texts is predicted too

    positional = 'files'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.files:
            raise ValueError('files: none is given: python eval.py text --out_dir=DIR FILE.txt')
        if self.stride < 0:
            raise ValueError(f'stride={self.stride}: must not be negative')
        if self.rolling and self.stride:
            raise ValueError(f'rolling, stride={self.stride}: rolling windows have a stride of the whole '
                             'context: leave one of them out')


@dataclass
class TaskSettings(ModelSettings):
    files: list[FilePath] = field(default_factory=list)  # JSONL files, of the shapes that docs/evaluate.md
    # lists; FILE='\nAnswer: ' gives one file a delimiter of its own
    delimiter: str = ' '  # text between query and choices of the other files; \n is a new line
    shots: int = 0  # number of solved examples before each item, from the same file (few-shot)
    limit: int = 0  # use only this many items of each task, the first ones; 0 = all
    seed: int = 1337  # seed for the choice of examples
    beside: list[FilePath] = field(default_factory=list)  # other networks to compare with: runs or hf:FOLDER
    csv: FilePath = ''  # file for the results of all items
    table: FilePath = ''  # csv file for the results of all tasks, with their standard errors
    picture: FilePath = ''  # file for a plot of them

    positional = 'files'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.files:
            raise ValueError('files: none is given: python eval.py tasks --out_dir=DIR FILE.jsonl')
        typed_text(self.delimiter, 'delimiter')
        if self.shots < 0 or self.limit < 0:
            raise ValueError(f'shots={self.shots}, limit={self.limit}: must not be negative')


@dataclass
class HarnessSettings(ModelSettings):
    tasks: str = ''  # names of lm-eval's tasks, separated by commas
    shots: int | None = None  # number of solved examples before each item; None = the default of each task
    limit: int = 0  # use only this many items of each task, the first ones; 0 = all
    include: FilePath = ''  # folder of your own tasks in lm-eval's YAML format

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.tasks:
            raise ValueError('tasks: none is given: --tasks=lambada_openai,arc_easy; '
                             'lm-eval ls tasks shows them')
        if (self.shots or 0) < 0 or self.limit < 0:
            raise ValueError(f'shots={self.shots}, limit={self.limit}: must not be negative')


@dataclass
class SummarySettings(ModelSettings):
    files: list[FilePath] = field(default_factory=list)  # JSONL files of pairs; none = validation pairs
    source: str = 'source'  # field that the model reads
    prompt_template: str = ''  # template to use in place of source, as in prepare.py; \n is a new line
    target: str = 'target'  # field with the reference: a text, or a list of texts
    max_new_tokens: int = 100  # maximum length of each generated text, in tokens
    num_beams: int = 0  # number of beams of a beam search; 0 = greedy, in batches
    batch_size: int = 16
    stripped: bool = False  # also print rougeL without stop words, as ROT5 reports it
    show: int = 3  # number of texts to print beside their references
    limit: int = 0  # use only this many pairs of each file, the first ones; 0 = all
    csv: FilePath = ''  # file for all texts and their scores

    positional = 'files'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.prompt_template:
            from features.text.pairs import check_template
            check_template(self.prompt_template)
        for name, least in (('max_new_tokens', 1), ('batch_size', 1), ('num_beams', 0), ('show', 0),
                            ('limit', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: takes {least} or more')


@dataclass
class LadderSettings(DeviceConfig):
    dataset: FilePath = 'stdlib'  # name under data/, or a folder
    sweep: FilePath = 'config/sweeps/ladder.py'  # trains what is missing; '' = counts only
    out: FilePath = ''  # folder of their runs; '' = out/ladder/NAME
    picture: FilePath = 'auto'  # file for the plot; auto = ladder.png in that folder, '' = no plot


# -----------------------------------------------------------------------------
# Commands. Each imports what it uses: `loss` loads no tasks

def run_loss(s):
    from features.study import split_loss
    split_loss.run(s)


def run_text(s):
    from features.study import tasks
    tasks.run_text(s)


def run_tasks(s):
    from features.study import tasks
    tasks.run(s)


def run_harness(s):
    from features.study import harness
    harness.run(s)


def run_summaries(s):
    from features.study import summaries
    summaries.run(s)


def run_ladder(s):
    from features.study import ladder
    ladder.run(s)


COMMANDS = {
    'loss': (run_loss, LossSettings),
    'text': (run_text, TextSettings),
    'tasks': (run_tasks, TaskSettings),
    'harness': (run_harness, HarnessSettings),
    'summaries': (run_summaries, SummarySettings),
    'ladder': (run_ladder, LadderSettings),
}


def main():
    run, s = configure_command(COMMANDS)
    run(s)


if __name__ == '__main__':
    run_main(main)
