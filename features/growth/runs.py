"""
Read a trained model and write a new run: the common part of all commands of surgery.py.

    old = read(s, s.from_)
    cfg, weights = widen(old.model.cfg, old.model.state_dict(), n_embd=512)
    write(s, 'widen', old, cfg, weights)

`s` is the command's settings. The new run has a checkpoint at step 0, and settings.json and log.jsonl like a
run of train.py.
"""
import dataclasses
import json
import os
import shlex
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import checkpoint
from batches import EVAL_ROWS, Mixture, evaluate
from checkpoint import append, replace_json
from configurator import UserError
from features.folder import new_folder
from features.networks import fill, inherited_format, is_foreign, read_model, tokenizer_of
from model import Transformer
from run import OneProcess
from tokenizer import PromptFormat

SAMPLE = 2 ** 16  # tokens to measure losses and inputs on
ROW = 1024  # tokens of a row at most: 12 rows of 8,192 tokens would take a laptop ten minutes and 5 GB
EFFORT = 4e12  # FLOPs of a forward pass at most, a minute: a large network is measured on fewer tokens,
LEAST = 2 ** 12  # but on no fewer than this


@dataclass
class Old:
    """The model to operate on, with its run, data and tokenizer."""
    model: Transformer
    settings: dict  # of its run; {} for weights of others
    state: dict  # its state.json; {} for weights of others
    data: Mixture | None  # to measure inputs on
    val: list  # the batches.Sources to measure losses on; [] = none
    tokenizer: dict  # its description
    tokenizer_folder: str  # where the files of the tokenizer are
    begin: tuple  # (id,) of the start token before a text, or ()
    form: PromptFormat  # what stands around its prompts


def sample_tokens(model):
    """Number of tokens to measure losses and inputs of a model on, from LEAST to SAMPLE."""
    return max(LEAST, min(SAMPLE, int(EFFORT / (2 * model.num_params()))))


# -----------------------------------------------------------------------------
# In

def read(s, where, encoder=False, untie=False):
    """
    The Old model of `where`. encoder: whether the command supports encoder-decoders; untie: as in
    read_model(). Raises UserError for a model without layers and for data of another tokenizer.
    """
    if os.path.isdir(s.out_dir) and os.listdir(s.out_dir):
        raise UserError(f'out_dir={s.out_dir}: holds something already: give a new directory')
    cfg, weights, folder = read_model(where, encoder=encoder, untie=untie)
    if cfg.arch == 'markov':
        raise UserError(f'from={where}: a Markov chain has no layers: give a transformer')
    state = {}
    if not is_foreign(where):
        state = checkpoint.load_state(folder)
    form = inherited_format(where, folder, cfg)
    data, val = open_data(s, where, cfg, state, form)

    if state:
        tokenizer, tokenizer_folder = state['tokenizer'], folder
        begin = tuple(state.get('begin', ()))
    elif data is not None:  # weights of others: the data have their tokenizer
        files = data.sources[0].files
        tokenizer, tokenizer_folder = files.meta['tokenizer'], files.folder
        begin = ()
    else:
        tokenizer, tokenizer_folder = tokenizer_of(where, folder)
        begin = () if cfg.n_encoder_layer else form.bos
    model = fill(cfg, weights, where)
    return Old(model, state.get('settings', {}), state, data, val, tokenizer, tokenizer_folder,
               begin, form)


def open_data(s, where, cfg, state, form):
    """
    (the training Mixture, the validation Sources) of s.dataset; (None, []) if there is none. state, form: the
    state.json and the PromptFormat of the model of `where`. Raises UserError for data of another tokenizer.
    """
    settings = state.get('settings', {})
    name = s.dataset
    if name == 'auto':
        name = settings.get('dataset', 'none')
    if name == 'none':
        print('no data; --dataset=NAME would measure losses')
        return None, []

    objective = None  # the next token
    if cfg.n_encoder_layer or settings.get('objective', 'causal') != 'causal':  # t5
        from features.t5.objectives import find_objective  # t5
        objective = find_objective(settings, cfg, form)  # t5
    length = cfg.block_size
    shorter = 0  # length of the rows, if they are shorter than the context
    if objective is None and length > ROW:
        length = shorter = ROW
    try:
        data = Mixture(name, 'train', length, 0, settings.get('packing', 'stream'),
                       objective, tuple(state.get('begin', ())))
    except UserError as error:
        if s.dataset != 'auto':
            raise
        print(f'no losses: {error}')
        return None, []
    val = []  # without the folder study: no losses
    from features.study.validation import validation_sources  # study
    val = validation_sources(where, cfg, name, shorter)  # study
    return data, val


# -----------------------------------------------------------------------------
# Losses

def loss_settings(models, val):
    """
    The settings of the losses of several models on the same tokens: about sample_tokens() of the largest, or
    all if there are fewer.
    """
    tokens = min(sample_tokens(model) for model in models)
    count = max(1, tokens // val[0].block_size // EVAL_ROWS)
    if all(source.rows <= EVAL_ROWS * count for source in val):
        count = 0  # all
    return {'eval_iters': count, 'batch_size': 4}


def losses(model, val, how):
    """{'val_loss', 'val_bpb'} of a model on these Sources. how: loss_settings()."""
    s = SimpleNamespace(**how, dtype='float32')
    return evaluate(model, val, s, OneProcess(torch.device('cpu')))


# -----------------------------------------------------------------------------
# Out

def write(s, command, old, cfg, weights):
    """
    Write the new model as a run in s.out_dir, and print its size and losses beside those of `old`. Raises
    UserError if it cannot be written.
    """
    new = fill(cfg, weights, s.out_dir)
    how = {}
    before = {}
    after = {}
    is_short = False  # the rows are shorter than the context
    if old.val:
        how = loss_settings((old.model, new), old.val)
        before = losses(old.model, old.val, how)
        after = losses(new, old.val, how)
        is_short = old.val[0].block_size < cfg.block_size
    if is_short:
        print(f'losses: of rows of {old.val[0].block_size:,} tokens, the context has {cfg.block_size:,}; '
              'they are not in log.jsonl')
    report(old, new, before, after)

    settings = {}
    for name, value in old.settings.items():
        if not name.startswith('lora_'):  # an adapter is merged by now
            settings[name] = value
    settings |= dataclasses.asdict(cfg)
    settings |= {'out_dir': s.out_dir, 'init_from': s.from_, 'max_iters': 0}
    if old.data is not None:  # so that compare.py knows which tokens the loss is of
        settings |= how
        if s.dataset != 'auto':
            settings['dataset'] = s.dataset
    state = new_state(command, cfg, settings, old.tokenizer, old.begin)
    state['prompt'] = old.form.as_json()
    write_run(s.out_dir, weights, state, old.tokenizer_folder, {} if is_short else after)
    print(f'written: {s.out_dir}; '
          + shlex.join(['python', 'train.py', f'--init_from={s.out_dir}',
                        f'--out_dir={s.out_dir.rstrip("/")}_tuned']))


def report(old, new, before, after):
    """Print parameters, FLOPs and losses of the old and the new model."""
    for what, a, b in (('parameters', old.model.num_params(), new.num_params()),
                       ('training FLOPs a token', old.model.flops_per_token(), new.flops_per_token())):
        print(f'{what:24}{a:14,} → {b:14,}  {b / a - 1:+.1%}')
    for name in after:
        print(f'{name:24}{before[name]:14.4f} → {after[name]:14.4f}  {after[name] - before[name]:+.4f}')


def new_state(command, cfg, settings, tokenizer, begin):
    """The state.json of a run with no steps, made by a command of surgery.py."""
    return {
        'step': 0,
        'model': dataclasses.asdict(cfg),
        'settings': settings,
        'tokenizer': tokenizer,
        'torch': torch.__version__,
        'begin': list(begin),
        'surgery': command,
    }


def write_run(out_dir, weights, state, tokenizer_folder, losses=None):
    """
    Write a run with no steps and no optimizer as the new folder out_dir, complete or not at all: checkpoint,
    settings.json and log.jsonl. Raises UserError if it cannot be written, or if weights are NaN or infinite.
    """
    checkpoint.check_finite(weights, out_dir)
    tokenizer_files = checkpoint.read_files(tokenizer_folder, state['tokenizer'].get('files', {}))
    with new_folder(out_dir, 'out_dir') as folder:
        checkpoint.write(os.path.join(folder, f'step_{0:08d}'), 0, weights, {}, state, tokenizer_files)
        replace_json(os.path.join(folder, 'settings.json'), state['settings'])
        if losses:
            record = {'step': 0, 'tokens': 0, 'flops': 0, 'seconds': 0, **losses}
            append(os.path.join(folder, 'log.jsonl'), json.dumps(record) + '\n')
