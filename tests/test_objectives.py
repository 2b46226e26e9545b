"""
What is masked and what is asked for: the published counts, nothing lost between source and target, each
denoiser as often as its weight, the same for every number of ranks and after a resume; decoders learn targets
alone.
"""
import json

import numpy as np
import pytest
import torch
from conftest import one_line, read_log, run, sha256, train, write_dataset

from batches import Mixture, open_source, validation_batch
from configurator import UserError
from features import build
from features.hf.tokenizer_json import to_json
from features.study.summaries import encode_source
from features.t5 import objectives
from features.t5.objectives import (
    DENOISERS,
    Denoiser,
    Masking,
    Objective,
    count_masked,
    decoder_batch,
    denoise,
    encoder_batch,
    find_objective,
    mask_spans,
    parse_denoisers,
    split_at_random,
)
from features.t5.pairs import cut_pair
from features.t5.sampling import prompt_format
from features.text.cuts import Cuts
from features.text.settings import TextConfig
from features.text.tokenizers import Reserved
from model import ModelConfig, make_model
from prepare import prepare
from sample import encode_prompt
from tokenizer import ByteTokenizer, PromptFormat, load_tokenizer
from train import Settings

EOT, RESERVED = 1, (100, 149)
META = {'vocab_size': 150, 'eot': EOT, 'tokenizer': {'reserved': 50}}


def rng(seed=0):
    return np.random.default_rng(seed)


def text(length, seed=0):
    return rng(seed).integers(2, 100, length)


# --- masking ---

def test_counts_are_t5s():
    assert count_masked(512, Denoiser(3, 0.15, 1)) == (77, 26)  # 0.150 of the row
    assert (count_masked(512, Denoiser(32, 0.5, 1)) == (256, 8)
            and count_masked(512, Denoiser(64, 0.5, 1)) == (256, 4))
    for length in range(2, 70):
        for d in (*DENOISERS['ul2'], Denoiser(1, 0.9, 1)):
            if d.span:
                number, spans = count_masked(length, d)
                mask = mask_spans(length, d, rng(length))
                assert (mask.sum() == number
                        and (np.diff(mask.astype(int), prepend=0) == 1).sum() == spans >= 1)
                assert not mask[0] and mask[-1]


def test_every_way_to_part_is_alike_likely():
    """5 in 3 pieces: 6 ways, each a sixth of the time, 3,000 draws."""
    ways = [tuple(split_at_random(5, 3, r)) for r in [rng()] for _ in range(3000)]
    assert len(set(ways)) == 6 and all(sum(way) == 5 and min(way) > 0 for way in ways)
    assert max(ways.count(way) for way in set(ways)) < 580 and min(ways.count(way) for way in set(ways)) > 420


@pytest.mark.parametrize('d', [*DENOISERS['ul2'], *DENOISERS['ul2r'], Denoiser(0, 0.5, 1)], ids=str)
@pytest.mark.parametrize('length', [2, 3, 17, 120])
def test_source_and_target_are_the_text(d, length):
    tokens = text(length)
    for seed in range(20):
        source, target = denoise(tokens, d, rng(seed), RESERVED, EOT)
        assert source[-1] == target[-1] == EOT
        if d.mode:
            assert source[0] == 100 + 'RSX'.index(d.mode)
        source, target = source[bool(d.mode):-1], target[:-1]
        if not d.span:
            assert np.array_equal(np.append(source, target), tokens) and len(source) and len(target)
            continue
        spans, whole = {}, []
        for token in target:  # <99> a b <98> c → {149: [a, b], 148: [c]}
            spans.setdefault(token, []) if token >= 100 else spans[list(spans)[-1]].append(token)
        assert list(spans) == [149 - n for n in range(len(spans))] and all(spans.values())
        for token in source:
            whole += spans.pop(token) if token >= 100 else [token]
        assert whole == list(tokens) and not spans


def test_the_end_of_a_row_is_written_at_its_mean_length():
    for rate in (0.25, 0.5):
        lengths = [len(denoise(text(100), Denoiser(0, rate, 1), rng(seed), RESERVED, EOT)[1]) - 1
                   for seed in range(2000)]
        assert abs(np.mean(lengths) - 100 * rate) < 1.5 and min(lengths) == 1


def test_each_denoiser_comes_by_its_weight_and_alone():
    masking = Masking('ul2', 100, 110, [[3, 0.15, 3, 'R'], [0, 0.25, 1, 'S']], META)
    modes = [masking.example(text(masking.length), noise)[0][0] - 100 for noise in range(2000)]
    assert set(modes) == {0, 1} and abs(modes.count(0) / 2000 - 0.75) < 0.03


# --- rows ---

@pytest.mark.parametrize('source_size', [0, 40, 200])
@pytest.mark.parametrize('kind, denoisers',
                         [('ul2', 't5'), ('ul2', 'ul2r'), ('ul2', [[8, 0.5, 1]]), ('prefix', 't5')])
def test_rows_are_as_long_as_fits_and_no_token_is_cut(kind, denoisers, source_size):
    masking = Masking(kind, 60, source_size, denoisers, META)
    examples, longest = [masking.example(text(masking.length, noise), noise) for noise in range(300)], 0
    for source, target in examples:
        assert target[-1] == EOT
        if source_size:
            assert len(source) <= source_size and len(target) <= 60
        else:
            assert len(source) + len(target) <= 61
        longest = max(longest, len(source) / source_size if source_size else 0, len(target) / 60,
                      (len(source) + len(target)) / 61 * (not source_size))
    assert longest > 0.9
    if source_size:
        arrays = encoder_batch(examples, 60, source_size, EOT, 302)
    else:
        arrays = decoder_batch([[example] for example in examples], 60, 302)
    assert (all(len(a) == 302 for a in arrays)
            and (arrays[1] >= 0).sum() == sum(len(target) for _, target in examples))


def test_a_decoder_reads_the_source_and_learns_the_target():
    masking = Masking('ul2', 30, 0, 't5', META)
    source, target = masking.example(text(masking.length), 3)
    x, y, _ = (a[0] for a in decoder_batch([[(source, target)]], 30))
    row = np.append(source, target)
    assert np.array_equal(x[:len(row) - 1], row[:-1]) and np.array_equal(y[y >= 0], target)
    # the last token read is followed by the first one written
    assert y[len(source) - 1] == target[0] and (y[:len(source) - 1] == -1).all()


def test_an_encoder_reads_the_source_and_the_decoder_begins_with_the_end_of_text():
    masking = Masking('ul2', 20, 30, 't5', META)
    source, target = masking.example(text(masking.length), 3)
    x, y, read = (a[0] for a in encoder_batch([(source, target)], 20, 30, EOT))
    assert (np.array_equal(read[read >= 0], source) and x[0] == EOT
            and np.array_equal(x[1:len(target)], target[:-1]))
    assert np.array_equal(y[:len(target)], target) and (y[len(target):] == -1).all()


@pytest.fixture
def reserved(tmp_path):
    """A data set with 50 reserved tokens."""
    write_dataset(tmp_path / 'reserved', vocab_size=64)
    path = tmp_path / 'reserved' / 'meta.json'
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {'vocab_size': 114, 'tokenizer': meta['tokenizer'] | {'reserved': 50}}))
    return str(tmp_path / 'reserved')


def denoising(reserved, seed=1, **settings):
    s = build(Settings, **dict(objective='ul2', block_size=32, source_size=40, n_encoder_layer=1) | settings)
    return Mixture(reserved, 'train', 32, seed, objective=find_objective(vars(s), s))


def test_every_epoch_masks_anew_and_validation_never(reserved):
    data = denoising(reserved)
    rows = data.sources[0].rows
    assert all(np.array_equal(a, b) for a, b in zip(data.rows(range(7)), denoising(reserved).rows(range(7))))
    first, second = ({tuple(row) for row in data.rows(range(n, n + rows))[2].tolist()} for n in (0, rows))
    assert len(first & second) < rows / 10
    val = open_source(reserved, 'val', 32, objective=Objective('ul2', 40))
    assert all(np.array_equal(a, b) for a, b in zip(*(validation_batch(val, range(5), 6) for _ in range(2))))


def test_all_of_the_text_is_seen_once_an_epoch(reserved):
    data = denoising(reserved, denoisers=[[0, 0.5, 1]])
    rows = data.sources[0].rows
    x, y, source = data.rows(range(rows))
    # without the two ends of text
    read = sum(int((s >= 0).sum()) - 1 for s in source) + sum(int((t >= 0).sum()) - 1 for t in y)
    assert read == data.sources[0].files.tokens


# --- pairs ---

def pairs(tmp_path, rows, name='pairs', **settings):
    path = tmp_path / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    options = dict(sources=[str(path)], source='question', target='answer', out=f'{tmp_path}/{name}',
                   tokenizer='byte', val_fraction=0.2, num_proc=1)
    prepare(TextConfig(**options | settings))
    return f'{tmp_path}/{name}'


ROWS = [{'question': f'what is {n}?', 'answer': f'{n * n}', 'more': 'and so on'} for n in range(100)]


def test_pairs_are_source_and_target(tmp_path):
    folder, seen = pairs(tmp_path, ROWS), set()
    for split in ('train', 'val'):
        for size in (0, 20):
            source = as_pairs(folder, size, split)
            for n in range(source.rows):
                read, written = source.row(n)
                read, written = (bytes(int(t) for t in ids[:-1]).decode()
                                 for ids in (read, written) if ids[-1] == 256)
                seen.add((split, read, written))
    assert ({pair[1:] for pair in seen} == {(row['question'], row['answer']) for row in ROWS}
            and len(seen) == 100)
    meta = json.load(open(f'{folder}/meta.json'))
    assert (meta['pairs'] and sum(split['bytes'] for split in meta['splits'].values())
            == sum(len(row['answer']) for row in ROWS))


def as_pairs(folder, size, split='train'):
    """A Source of pairs in rows of 40, beside an encoder that reads `size`, or without one."""
    return open_source(folder, split, 40, 'document', objective=Objective('seq2seq', size))


def test_a_source_that_is_too_long_is_cut_and_its_end_kept(tmp_path):
    folder = pairs(tmp_path, [{'question': 'x' * 50, 'answer': 'y' * 50}] * 1 + ROWS, val_fraction=0.01)
    for size, (read, written) in ((20, (20, 40)), (0, (21, 20))):
        source = as_pairs(folder, size)
        examples = [source.row(n) for n in range(source.rows)]
        assert (read, written) in {tuple(map(len, example)) for example in examples}
        assert all(read[-1] == 256 for read, _ in examples)
        assert source.batch(examples)[0].shape == (source.rows, 40)


@pytest.mark.parametrize('T', [3, 4, 31, 32])
def test_neither_side_of_a_pair_takes_the_half_of_the_other(T):
    row = T + 1
    for source in range(2, 2 * row, 1 + T // 8):
        for target in range(2, 2 * row, 1 + T // 8):
            tokens = np.concatenate([text(source - 1), [EOT], text(target - 1), [EOT]])
            read, written = cut_pair(tokens, T, 0, EOT)
            assert len(read) + len(written) == min(row, source + target)
            assert len(read) >= min(source, row // 2) and len(written) >= min(target, row // 2)
            assert read[-1] == EOT and np.array_equal(read[:-1], tokens[:len(read) - 1])
            assert np.array_equal(written, tokens[source:source + len(written)])


def test_pairs_that_do_not_fit_are_counted(tmp_path, monkeypatch):
    long = [{'question': f'{n}' + 'x' * 50, 'answer': 'y' * 60} for n in range(10, 14)]
    folder = pairs(tmp_path, ROWS[:20] + long + ROWS[20:], val_fraction=0.01)
    where, count = f'{folder}, train', as_pairs(folder, 0).files.documents
    assert as_pairs(folder, 0).too_long() == (
        f'{where}: 4 of {count} pairs do not fit block_size=40: '
        f'4 of {count} sources cut to 21 tokens, losing up to 32; '
        f'4 of {count} targets cut to 20 tokens, losing up to 41')
    assert as_pairs(folder, 55).too_long() == (
        f'{where}: 4 of {count} pairs do not fit block_size=40, source_size=55: '
        f'4 of {count} targets cut to 40 tokens, losing up to 21')
    assert as_pairs(folder, 0, 'val').too_long() == ''
    monkeypatch.setattr('features.t5.pairs.LOOK_AT', 2)
    assert f'{where}: 2 of the first ' in as_pairs(folder, 0).too_long()


def test_training_says_at_its_start_what_of_pairs_is_cut(tmp_path):
    folder = pairs(tmp_path, [{'question': f'what is {n}?', 'answer': 'y' * 50} for n in range(20)])
    done = train(tmp_path / 'run', '--objective=seq2seq', '--max_iters=1', dataset=folder)
    lines = [line for line in done.stdout.splitlines() if 'do not fit' in line]
    assert len(lines) == 2 and f'data: {folder}, train: ' in lines[0] and f'data: {folder}, val: ' in lines[1]
    assert 'pairs do not fit block_size=32: ' in lines[0] and 'sources cut' not in lines[0]
    loss = run('eval.py', 'loss', f'--out_dir={tmp_path}/run', '--device=cpu').stdout
    assert lines[1].removeprefix('data: ') in loss


def test_pairs_of_one_source_are_on_one_side_of_the_split(tmp_path):
    folder = pairs(tmp_path, [{'question': f'what is {n % 10}?', 'answer': f'{n}'} for n in range(200)],
                   val_fraction=0.4)
    sides = []
    for split in ('train', 'val'):
        source = open_source(folder, split, 40, objective=Objective('seq2seq', 20))
        sides.append({tuple(source.row(n)[0]) for n in range(source.rows)})
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10


def test_what_differs_in_the_tokenizer_is_said(reserved, dataset, tmp_path):
    assert 'with --reserve=50' in one_line(train(tmp_path / 'out',
                                                 dataset=f'{{"{reserved}": 1, "{dataset}": 1}}', check=False))
    assert (f'dataset={dataset}: objective=seq2seq'
            in one_line(train(tmp_path / 'out', '--objective=seq2seq', dataset=dataset, check=False)))


def test_a_list_of_targets_gives_its_first_and_blank_ones_are_left_out(tmp_path):
    folder = pairs(tmp_path, [{'question': 'q', 'answer': ['first', 'second']},
                              {'question': 'q', 'answer': ' '}, {'question': 'q', 'answer': []}] + ROWS[:9])
    assert (sum(split['documents'] for split in json.load(open(f'{folder}/meta.json'))['splits'].values())
            == 10)
    assert b'first' in b''.join(bytes(ids[::2]) for ids in (open(f'{folder}/{split}_00000.bin', 'rb').read()
                                                            for split in ('train', 'val')))


def test_pairs_are_the_same_by_parts_and_processes(tmp_path):
    folders = [pairs(tmp_path, ROWS * 3000, name, num_proc=n) for name, n in (('one', 1), ('two', 2))]
    assert sha256(f'{folders[0]}/train_00000.bin') == sha256(f'{folders[1]}/train_00000.bin')


@pytest.mark.parametrize('settings, words', [
    (dict(source='', target='answer'), 'source='),
    (dict(target='reply'), 'no field reply; it has question, answer, more: set --source and --target'),
    (dict(split='tail'), 'split=tail'), (dict(sources=['README.md']), 'README.md'),
    (dict(reserve=-1), 'reserve=-1')], ids=str)
def test_pairs_that_cannot_be_are_refused(settings, words, tmp_path):
    (tmp_path / 'p.jsonl').write_text(json.dumps(ROWS[0]))
    options = dict(source='question', target='answer', out=f'{tmp_path}/out', tokenizer='byte') | settings
    sources = options.pop('sources', [f'{tmp_path}/p.jsonl'])
    assert words in one_line(run('prepare.py', *sources,
                                 *(f'--{name}={value}' for name, value in options.items())))
    assert not (tmp_path / 'out').exists()


# --- reserved tokens ---

def test_reserved_tokens_are_no_text(tmp_path):
    tokenizer = Reserved(ByteTokenizer(), 5)
    assert tokenizer.vocab_size == 262 and tokenizer.encode('<0>') == list(b'<0>')
    assert tokenizer.decode([104, 105, 257, 261, 33]) == 'hi<0><4>!'
    again = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
    assert again.describe() == tokenizer.describe() != ByteTokenizer().describe()
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(to_json(tokenizer))
    assert (theirs.get_vocab_size() == 262 and theirs.token_to_id('<4>') == 261
            and theirs.encode('hi').ids == [104, 105])


# --- training ---

UL2 = ['--objective=ul2', '--n_encoder_layer=2', '--source_size=40', '--position=rope', '--cross_rope=offset']
SETUPS = {'encoder': UL2, 'decoder': ['--objective=ul2', '--denoisers=[[3,0.15,1,"R"],[0,0.25,1]]'],
          'prefix': ['--objective=prefix'],
          't5': [*UL2[:3], '--position=relative', '--t5_scale=True', '--denoisers=t5']}


@pytest.mark.parametrize('kind', SETUPS)
def test_what_is_masked_can_be_learned(kind, reserved, tmp_path):
    train(tmp_path / 'out', *SETUPS[kind], '--max_iters=60', '--eval_interval=60', dataset=reserved)
    first, last = (record['val_loss'] for record in read_log(tmp_path / 'out') if 'val_loss' in record)
    assert first > 4 and last < first - 0.9
    # a part of the text has no bits per byte
    assert not any('val_bpb' in record for record in read_log(tmp_path / 'out'))


def test_a_resumed_run_is_the_uninterrupted_one(reserved, tmp_path):
    train(tmp_path / 'a', *UL2, dataset=reserved)
    train(tmp_path / 'b', *UL2, '--max_iters=5', '--lr_decay_iters=10', '--warmup_iters=0', dataset=reserved)
    train(tmp_path / 'b', *UL2, '--lr_decay_iters=10', '--warmup_iters=0', dataset=reserved)
    train(tmp_path / 'c', *UL2, '--lr_decay_iters=10', '--warmup_iters=0', dataset=reserved)
    assert (sha256(tmp_path / 'b/step_00000010/model.safetensors')
            == sha256(tmp_path / 'c/step_00000010/model.safetensors'))


def test_two_processes_are_one(reserved, tmp_path):
    one = train(tmp_path / 'one', *UL2, '--max_iters=3', dataset=reserved)
    two = train(tmp_path / 'two', *UL2, '--max_iters=3', '--batch_size=2', '--gradient_accumulation_steps=2',
                dataset=reserved, nproc=2)
    a, b = (torch.tensor([record['train_loss'] for record in read_log(tmp_path / name)
                          if 'train_loss' in record]) for name in ('one', 'two'))
    assert len(a) == 3 and torch.allclose(a, b, atol=1e-5), (one.stdout, two.stdout)


def test_evaluate_has_the_loss_of_the_run(reserved, tmp_path):
    train(tmp_path / 'out', *SETUPS['decoder'], dataset=reserved)
    done = run('eval.py', 'loss', f'--out_dir={tmp_path}/out', '--device=cpu', '--dtype=float32')
    assert f'{read_log(tmp_path / "out")[-1]["val_loss"]:.4f}' in done.stdout, done.stdout + done.stderr


def test_what_was_pretrained_goes_on_with_pairs(tmp_path):
    """
    UL2 first, then pairs with the same reserved tokens, each with its own context for the targets; the first
    loss is not a random network's.
    """
    (tmp_path / 'text.jsonl').write_text(''.join(json.dumps({'text': f'{n % 4}' * 30 + f' {n}'}) + '\n'
                                                 for n in range(300)))
    prepare(TextConfig([f'{tmp_path}/text.jsonl'], f'{tmp_path}/text', 'byte', reserve=20, val_fraction=0.1,
                       num_proc=1))
    folder = pairs(tmp_path, [{'question': f'{n % 4}' * (15 + n % 7), 'answer': f'{n % 4}' * 8}
                              for n in range(300)], reserve=20)
    for kind, sizes in (('encoder', UL2[1:]), ('decoder', ['--block_size=64'])):
        options = ['--eval_interval=100', *sizes]
        train(tmp_path / kind, *options, '--objective=ul2', '--denoisers=t5', '--max_iters=100',
              dataset=tmp_path / 'text')
        train(f'{tmp_path}/{kind}_pairs', *options, '--objective=seq2seq', f'--init_from={tmp_path}/{kind}',
              '--max_iters=100', dataset=folder)
        first, last = (record['val_loss'] for record in read_log(f'{tmp_path}/{kind}_pairs')
                       if 'val_loss' in record)
        assert last < first < 4, kind


@pytest.mark.parametrize('sizes', [['--n_encoder_layer=2', '--block_size=8', '--source_size=12'],
                                   ['--block_size=16']], ids=['encoder', 'decoder'])
def test_a_pair_is_learned_and_sampled(sizes, tmp_path):
    """
    The answer is the question's only digit. sample.py marks where the question ends, as in training, and
    shows what is written alone.
    """
    folder = pairs(tmp_path,
                   [{'question': f'{n % 4}' * (3 + n % 5), 'answer': f'{n % 4}'} for n in range(200)])
    train(tmp_path / 'out', '--objective=seq2seq', *sizes, '--max_iters=150', '--eval_interval=150',
          '--batch_size=16', '--sample_tokens=5', '--sample_prompt=333', dataset=folder)
    for digit in '0123':
        done = run('sample.py', f'--out_dir={tmp_path}/out', f'--start={digit * 4}', '--temperature=0',
                   '--num_samples=1', '--max_new_tokens=5', '--device=cpu')
        assert done.stdout.split('\n')[0] == digit, done.stdout + done.stderr


def test_what_is_read_is_marked_as_in_training():
    tokenizer = Reserved(ByteTokenizer(), 5)  # whose reserved tokens are 257 to 261
    for kind, denoisers, wanted in (
            ('causal', 'ul2', PromptFormat()), ('seq2seq', 'ul2', PromptFormat(suffix=(256,))),
            ('ul2', 'ul2', PromptFormat((), (258,), (256,))), ('ul2', 't5', PromptFormat(suffix=(256,)))):
        assert prompt_format(kind, denoisers, tokenizer) == wanted
    tokenizer = tokenizer.with_format(prompt_format('ul2', 'ul2', tokenizer))
    for cfg in (ModelConfig(block_size=9, vocab_size=262),
                build(ModelConfig, block_size=9, vocab_size=262, n_encoder_layer=1)):
        assert encode_prompt('ab', tokenizer, cfg) == [258, 97, 98, 256]
        assert encode_source('abcdefghijkl', tokenizer, cfg, 5, Cuts('sources')) == [258, 97, 98, 99, 256]
        with pytest.raises(UserError, match='12 tokens|14 tokens'):
            encode_prompt('abcdefghijkl', tokenizer, cfg)


def test_contexts_may_change_for_pairs(reserved, tmp_path):
    """Learned positions are cut, others may be longer too."""
    for name, options, wanted in (('learned', ['--position=learned', '--n_encoder_layer=1'], (16, 30)),
                                  ('rope', UL2[1:], (32, 50))):
        train(tmp_path / name, '--objective=ul2', '--denoisers=t5', '--max_iters=1', *options,
              '--source_size=40', dataset=reserved)
        train(f'{tmp_path}/{name}2', '--objective=prefix', f'--init_from={tmp_path}/{name}', '--max_iters=1',
              f'--block_size={wanted[0]}', f'--source_size={wanted[1]}', dataset=reserved)
        state = json.load(open(f'{tmp_path}/{name}2/step_00000001/state.json'))
        assert (state['model']['block_size'], state['model']['source_size']) == wanted
    done = train(f'{tmp_path}/x', '--objective=prefix', f'--init_from={tmp_path}/learned', '--source_size=50',
                 dataset=reserved, check=False)
    assert 'know 40 positions' in one_line(done)


def test_a_run_goes_on_with_its_own_objective(dataset, reserved, tmp_path):
    """
    One from before there were objectives is causal; what eval_only measures is what the run was trained for.
    """
    train(tmp_path / 'old', dataset=dataset)
    folder = tmp_path / 'old/step_00000010'
    state, manifest = (json.loads((folder / name).read_text()) for name in ('state.json', 'manifest.json'))
    del state['settings']['objective']
    (folder / 'state.json').write_text(json.dumps(state))
    manifest['files']['state.json'] = {'size': (folder / 'state.json').stat().st_size,
                                       'sha256': sha256(folder / 'state.json')}
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    done = train(tmp_path / 'old', '--objective=prefix', '--max_iters=12', dataset=dataset, check=False)
    assert 'belongs to a run with objective=causal' in one_line(done)
    # which a causal run does not look at
    assert 'resuming' in train(tmp_path / 'old', '--max_iters=12', '--denoisers=t5', dataset=dataset).stdout
    train(tmp_path / 'ul2', *SETUPS['decoder'], dataset=reserved)
    done = train(tmp_path / 'ul2', '--eval_only=True', dataset=reserved)
    assert f'{read_log(tmp_path / "ul2")[-1]["val_loss"]:.4f}' in done.stdout


@pytest.mark.parametrize('args, words', [
    (['--n_encoder_layer=2'], 'leaves the encoder without a source'),
    (['--objective=ul2'], '--reserve='), (['--objective=seq2seq'], 'there are no pairs in it'),
    (['--objective=ul2', '--denoisers=t6'], 'denoisers=t6'),
    (['--objective=ul2', '--denoisers=[[3,2,1]]'], 'denoisers: [3, 2, 1]'),
    (['--objective=prefix', '--block_size=1'], 'no row is short enough'),
    (['--objective=prefix', '--arch=markov'], 'objective=prefix'),
    (['--objective=prefix', '--n_encoder_layer=1', '--teacher=x'], 'n_encoder_layer=0')], ids=str)
def test_objectives_that_cannot_work_are_refused(args, words, dataset, tmp_path):
    done = train(tmp_path / 'out', *args, dataset=dataset, check=False)
    assert words in one_line(done) and not (tmp_path / 'out').exists()


def test_denoisers_are_checked():
    assert parse_denoisers([(3, 0.15, 1), [0, 0.25, 1, 'S']]) == [Denoiser(3, 0.15, 1),
                                                                  Denoiser(0, 0.25, 1, 'S')]
    for wrong in ([], [3], [[3, 0.15]], [[0.5, 0.15, 1]], [[3, 0.15, 0]], [[3, 0.15, 1, 'Q']],
                  [[3, '0.15', 1]], [[3, 0.15, 1, ['R']]], [[0, 0.7, 1]]):
        with pytest.raises(ValueError, match='denoisers'):
            parse_denoisers(wrong)
    with pytest.raises(UserError, match='--reserve=10'):
        Masking('ul2', 60, 0, 'ul2r', META | {'vocab_size': 100, 'tokenizer': {}})


def test_masked_padding_weighs_nothing():
    torch.manual_seed(0)
    cfg = build(ModelConfig, vocab_size=150, block_size=20, n_layer=2, n_encoder_layer=2, source_size=30,
                n_head=2, n_embd=32, zero_init=False, tie=False)
    model = make_model(cfg)
    torch.nn.init.normal_(model.head.weight)
    masking = Masking('ul2', 20, 30, 't5', META)
    examples = [masking.example(text(masking.length, n), n) for n in range(3)]
    sums = []
    for example in examples:
        x, y, source = map(torch.from_numpy, encoder_batch([example], 20, 30, EOT, height=2))
        sums.append(model(x, y, source=source, reduction='sum'))
    x, y, source = map(torch.from_numpy, encoder_batch(examples, 20, 30, EOT))
    assert torch.allclose(model(x, y, source=source, reduction='sum'), sum(sums), rtol=1e-5)
    assert objectives.MODES == ('R', 'S', 'X')  # which reserved token is which is a part of the format


def test_a_choice_without_code_does_not_work_as_another_one():
    for make in (lambda: Masking('new', 32, 0, 't5', META),
                 lambda: prompt_format('new', 'ul2', ByteTokenizer())):
        with pytest.raises(UserError, match='^objective=new: has no code in objectives.py: '):
            make()
