"""
Encoder-decoders that people use, T5, Flan-T5, mT5 and UMT5: what users do with the decoders of
test_families.py they do with these too. The network itself is in test_t5.py.
"""
import csv
import json
import re
from collections import Counter

import peft
import pytest
import torch
import transformers
from conftest import one_line, read_log, run, train
from test_export import exported
from test_families import with_random_adapters
from test_hub import write_tokenizer
from test_lora import adapted
from test_prompts import T5 as WORDS
from test_prompts import sentencepiece_file
from test_surgery import random_model
from test_t5 import FLAN, MT5, T5, UMT5, ours, pad, texts, theirs

import checkpoint
import sample
from configurator import UserError
from features.growth.networks import take_layers
from features.hf import reading
from features.lora import adapters, peft_files
from features.lora.load import add_adapters
from features.networks import fill, load_model
from features.study.attention import (
    attentions,
    first_share,
    gradient_norms,
    mass,
    mean_nulls,
    measure,
    nulls,
    rank,
    watching,
)
from features.study.items import Item, read_items, with_shots
from features.study.likelihoods import score
from features.study.tasks import encode_source, score_items
from features.t5.sampling import Decoder, read_sources
from tokenizer import ByteTokenizer, PromptFormat

CPU = torch.device('cpu')
CASES = {'t5': T5, 'flan-t5': FLAN, 'mt5': MT5, 'umt5': UMT5}
DEEP = dict(num_layers=3, num_decoder_layers=4)


def network(case, **settings):
    """A random network of transformers. Its weights are small, so that rounding is not enlarged."""
    return theirs(0.1, **CASES[case] | settings)


def source_and_target():
    return pad(texts([60, 35, 1]), 'cpu'), torch.tensor(texts([50] * 3, seed=2))


@torch.no_grad()
def logits_of(model):
    source, target = source_and_target()
    return model(target, source=source)


@torch.no_grad()
def assert_same(model, other):
    """The same logits, to 1e-5 of the largest. Returns the difference, as a share of it."""
    source, target = source_and_target()
    a = logits_of(model)
    b = other(input_ids=source.clamp(min=0), attention_mask=(source >= 0).long(), decoder_input_ids=target,
              use_cache=False).logits
    difference = ((a - b).abs().max() / b.abs().max()).item()
    assert a.shape == b.shape and a.std() > 0.1 and difference < 1e-5
    return difference


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{case: folder that transformers wrote}"""
    out = {case: str(tmp_path_factory.mktemp('base') / case) for case in CASES}
    for case, folder in out.items():
        network(case).save_pretrained(folder)
    return out


# --- the network ---

@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_logits_and_greedy_text_are_those_of_transformers(case, folders, record_property):
    model, other = ours(folders[case]), network(case)
    record_property('family', other.config.model_type)  # for experiments/families.py
    record_property('difference', assert_same(model, other))
    source, = texts([30])
    # its cache has as many layers as the encoder
    wanted = other.generate(torch.tensor([source]), max_new_tokens=50, min_new_tokens=50, do_sample=False,
                            eos_token_id=None, use_cache=False)[0, 1:].tolist()
    decoder = Decoder(model, [source], 51)
    assert torch.cat(list(sample.generate(decoder, [[0]], 50, temperature=0))).tolist() == wanted


@pytest.mark.parametrize('case', CASES)
def test_the_export_loads_in_transformers_with_nothing_missing(case, folders, tmp_path):
    model = ours(folders[case])
    folder = exported(tmp_path, model)
    other, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert other.config.model_type == ('umt5' if case == 'umt5' else 't5')  # mT5 is the same network
    assert_same(model, other)
    assert ours(folder).cfg == model.cfg


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_adapters_go_to_peft_and_come_back(case, folders, tmp_path):
    base, there = ours(folders[case]), network(case)
    plain = logits_of(base)
    targets = ['q', 'k', 'v', 'o', 'wo', *(['wi'] if case == 't5' else ['wi_0', 'wi_1'])]
    there = with_random_adapters(there, tmp_path / 'theirs', 'SEQ_2_SEQ_LM', target_modules=targets)
    model = ours(folders[case])
    add_adapters(model, [f'x={tmp_path}/theirs'], folders[case])
    assert_same(model, there)
    assert not torch.allclose(logits_of(model), plain, atol=0.1)

    model = ours(folders[case])
    torch.manual_seed(2)
    adapted(model, lora_alpha=6.0, lora_targets='q_proj,v_proj,mlp', whole='norm')
    kind = json.load(open(f'{folders[case]}/config.json'))['model_type']
    peft_files.write(str(tmp_path / 'ours'), model.cfg, adapters.take(model), kind)
    assert_same(model, peft.PeftModel.from_pretrained(network(case), tmp_path / 'ours').eval())
    assert not torch.allclose(logits_of(model), plain, atol=0.1)


# --- some of the layers ---

def keep_layers(model, encoder, decoder):
    """Delete the other layers of a model of transformers. T5's first layer has the position bias of all."""
    for stack, kept in ((model.encoder, encoder), (model.decoder, decoder)):
        bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
        stack.block = torch.nn.ModuleList(stack.block[n] for n in kept)
        first = stack.block[0].layer[0].SelfAttention
        if not first.has_relative_attention_bias:
            first.has_relative_attention_bias, first.relative_attention_bias = True, bias
        stack.config.num_layers = len(kept)
    model.config.num_layers, model.config.num_decoder_layers = len(encoder), len(decoder)


@pytest.mark.parametrize('encoder, decoder', [([0, 1], [0, 1]), ([0, 1, 2], [0]), ([2, 1], [1, 3, 3])],
                         ids=str)
@pytest.mark.parametrize('case', CASES)
def test_inherited_layers_are_those_of_transformers(case, encoder, decoder, tmp_path):
    other = network(case, **DEEP)
    other.save_pretrained(tmp_path)
    old = ours(tmp_path)
    part = fill(*take_layers(old.cfg, old.state_dict(), decoder, encoder=encoder), 'test').eval()
    assert_same(old, other)
    keep_layers(other, encoder, decoder)
    assert_same(part, other)
    assert not torch.allclose(logits_of(part), logits_of(old), atol=0.05)


def pairs_file(path, count=40):
    """A JSONL file of pairs: a text that counts, and the words of its numbers."""
    words = 'zero one two three four five six seven eight nine'.split()
    with open(path, 'w') as f:
        for n in range(count):
            f.write(json.dumps({'q': f'count {n % 10} {n}', 'a': words[n % 10]}) + '\n')
    return str(path)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """The folder of prepared pairs of bytes."""
    folder = tmp_path_factory.mktemp('pairs')
    done = run('prepare.py', pairs_file(folder / 'pairs.jsonl'), '--source=q', '--target=a',
               '--tokenizer=byte', '--val_fraction=0.4', f'--out={folder}/data')
    assert done.returncode == 0, done.stderr
    return f'{folder}/data'


TRAIN = ['--objective=seq2seq', '--batch_size=4', '--eval_interval=10', '--eval_iters=0', '--device=cpu',
         '--dtype=float32', '--sample_tokens=0', '--log_interval=1', '--max_iters=10']


@pytest.mark.parametrize('case', ['t5', 'umt5'])
def test_an_inherited_network_trains_on_and_goes_back_to_transformers(case, pairs, tmp_path):
    network(case, **DEEP, vocab_size=257).save_pretrained(tmp_path / 'hf')
    done = run('surgery.py', 'inherit', f'--from=hf:{tmp_path}/hf', f'--out_dir={tmp_path}/small',
               f'--dataset={pairs}', '--layers=first:2', '--encoder_layers=0,2')
    assert done.returncode == 0, done.stderr
    assert 'blocks 0, 1 of 4; of the encoder 0, 2 of 3' in done.stdout
    loss = read_log(tmp_path / 'small')[0]['val_loss']
    done = run('train.py', f'--out_dir={tmp_path}/on', f'--init_from={tmp_path}/small', f'--dataset={pairs}',
               *TRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    log = [record['val_loss'] for record in read_log(tmp_path / 'on') if 'val_loss' in record]
    assert log[0] == pytest.approx(loss, abs=1e-4) and log[-1] < loss
    for name in ('small', 'on'):
        done = run('hub.py', 'export', f'--out_dir={tmp_path}/{name}', f'--to={tmp_path}/{name}_hf')
        assert done.returncode == 0, done.stderr
        loaded, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(f'{tmp_path}/{name}_hf',
                                                                            output_loading_info=True)
        assert not any(report.values()), report
        assert (loaded.config.num_layers, loaded.config.num_decoder_layers) == (2, 2)
        assert loaded.config.decoder_start_token_id == 0
        assert_same(load_model(f'{tmp_path}/{name}', encoder=True)[0], loaded)
    other = network(case, **DEEP, vocab_size=257)
    keep_layers(other, [0, 2], [0, 1])
    assert_same(load_model(f'{tmp_path}/small', encoder=True)[0], other)


OWN = dict(vocab_size=64, n_encoder_layer=3, n_layer=3, n_head=4)


@pytest.mark.parametrize('settings', [
    dict(cross_rope='same'), dict(position='learned'), dict(value_residual=True), dict(depth_scale='norm'),
    dict(n_expert=4), dict(rank_qk=4, rank_act='silu'), dict(ranks={'attn.k': 3, 'blocks.1.attn.q': 4}),
    dict(n_expert=4, dense_layers=[1]), dict(position='relative', rel_per_layer=True)], ids=str)
def test_our_own_encoder_decoders_keep_the_blocks_that_are_named(settings):
    old = random_model(**OWN | settings)
    cfg, weights = take_layers(old.cfg, old.state_dict(), [1, 2], encoder=[1, 2])
    new = fill(cfg, weights, 'test').eval()
    assert (cfg.n_layer, cfg.n_encoder_layer) == (2, 2)
    for stack in ('encoder', 'blocks'):
        for n, block in enumerate(getattr(new, stack)):
            kept = getattr(old, stack)[n + 1].state_dict()
            for name, t in block.state_dict().items():
                assert torch.equal(t, kept[name])
            assert kept.keys() - block.state_dict().keys() <= {'attn.v_mix'}
    whole, encoded = take_layers(old.cfg, old.state_dict(), [0, 1, 2], encoder=[0, 1, 2])
    assert whole == old.cfg and all(torch.equal(t, encoded[name]) for name, t in old.state_dict().items())


def test_the_first_block_of_an_encoder_has_its_own_values_wherever_it_goes():
    old = random_model(**OWN, value_residual=True)
    _, weights = take_layers(old.cfg, old.state_dict(), [0, 1], encoder=[1, 0])
    assert 'encoder.0.attn.v_mix' not in weights and weights['encoder.1.attn.v_mix'] == 0
    assert weights['blocks.1.attn.v_mix'] == old.blocks[1].attn.v_mix


@pytest.mark.parametrize('settings, encoder, words', [
    (dict(ranks={'blocks.1.attn.q': 4}), [1, 2], "'blocks.1.attn.q': 4}: block 0 of the encoder, taken"),
    (dict(ranks={'blocks.1.attn.q': 4}), [0, 2], 'that of the decoder 4: take the same blocks of both'),
    (dict(ranks={'blocks.1.attn.q': 4}), [0, 1, 1], 'block 2 of the encoder, taken from 1, has rank 4'),
    (dict(n_expert=4, dense_layers=[1]), [1, 2], 'dense_layers=[1]: block 0 would have experts in the'),
    (dict(n_expert=4, dense_layers=[1]), [0, 2, 1], 'dense_layers=[1]: block 1 would have experts in the'),
    (dict(n_expert=4, dense_layers=[0, 1]), [1, 0], 'alone have no experts')], ids=str)
def test_blocks_that_one_number_cannot_name_in_both_stacks_are_refused(settings, encoder, words):
    old = random_model(**OWN | settings)
    with pytest.raises(UserError) as refused:
        take_layers(old.cfg, old.state_dict(), [0, 1], encoder=encoder)
    assert words in str(refused.value)


def saved(folder, **settings):
    """The folder of a random T5 with a tokenizer of bytes."""
    theirs(**settings).save_pretrained(folder)
    write_tokenizer(folder, 257)
    return f'hf:{folder}'


def test_parts_of_both_stacks_are_drawn_anew(tmp_path):
    folder = saved(tmp_path / 'hf', **T5 | dict(vocab_size=257))
    old = reading.load(folder)[1]

    def changed(fresh):
        done = run('surgery.py', 'inherit', f'--from={folder}', f'--out_dir={tmp_path}/{fresh}',
                   '--layers=0', f'--fresh={fresh}')
        assert done.returncode == 0, done.stderr
        new = checkpoint.read_weights(checkpoint.find(f'{tmp_path}/{fresh}'))
        return {name.removesuffix('.weight') for name, t in new.items() if not torch.equal(t, old[name])}
    assert changed('cross') == {f'blocks.0.cross.{name}' for name in 'qkvo'}
    assert changed('norm') == {'encoder.0.norm_1', 'encoder.0.norm_2', 'blocks.0.norm_1',
                               'blocks.0.norm_2', 'blocks.0.norm_x'}
    assert changed('rel,rel_encoder') == {'rel', 'rel_encoder'}
    assert {name.split('.')[0] for name in changed('encoder')} == {'encoder'}


def test_layers_that_a_stack_does_not_have_are_one_line(tmp_path):
    folder = saved(tmp_path / 'hf', **T5 | dict(vocab_size=257))
    for args, words in [
            (['--layers=0-2'], 'layers=0-2: without encoder_layers, they are also those of the encoder, '
                               'which has the blocks 0 to 1'),
            (['--layers=0-3', '--encoder_layers=0'], 'layers=0-3: the decoder has the blocks 0 to 2'),
            (['--layers=0', '--encoder_layers=2'], 'encoder_layers=2: the encoder has the blocks 0 to 1'),
            (['--layers=0', '--encoder_layers=x'], "encoder_layers=x: 'x': takes blocks as")]:
        done = run('surgery.py', 'inherit', f'--from={folder}', f'--out_dir={tmp_path}/x', *args)
        assert words in one_line(done)
    assert not (tmp_path / 'x').exists()


def test_a_decoder_has_no_encoder_layers(dataset, tmp_path):
    train(tmp_path / 'run', '--max_iters=1', dataset=dataset)
    done = run('surgery.py', 'inherit', f'--from={tmp_path}/run', f'--out_dir={tmp_path}/x', '--layers=0',
               '--encoder_layers=0')
    assert 'encoder_layers=0: ' in one_line(done) and not (tmp_path / 'x').exists()


# --- tasks ---

def folder_of_words(folder, case, **fields):
    """The folder of a random network and a sentencepiece model with T5's sentinels, by transformers."""
    folder.mkdir()
    sentencepiece_file(folder / 'spiece.model', **WORDS)
    (folder / 'config.json').write_text(json.dumps({'model_type': 't5', 'vocab_size': 256}))
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder)
    model = theirs(0.2, **CASES[case] | dict(vocab_size=256, pad_token_id=0, eos_token_id=1) | fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model, tokenizer


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    """{case: what folder_of_words() returns}"""
    folder = tmp_path_factory.mktemp('words')
    return {case: folder_of_words(folder / case, case) for case in CASES}


ASKED = [
    Item('the cat sat on ', ['the mat', 'the cat', 'Hi', 'the mat, user Hi'], 0),  # one source for all
    Item('', ['the cat sat on the mat', 'the mat sat on the cat'], 0),  # BLiMP
    Item('', ['the mat', 'the mat'], 0, contexts=['the cat sat on', ' the user\n sat on\n\n']),
    Item('  ', ['cat'], 0),
    Item('the cat <extra_id_0> the mat', ['<extra_id_0> sat on'], 0),
    Item('the cat sat on the mat ' * 40, [' zzz  qq', 'Hi'], 0),  # longer than n_positions, and unknown text
]


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_choices_of_a_task_are_scored_as_transformers_scores_them(case, words):
    folder, other, theirs_too = words[case]
    model, tokenizer = sample.load(f'hf:{folder}', encoder=True)
    wanted = []
    for context, choice in [pair for item in ASKED for pair in item.pairs()]:
        stripped = context.rstrip()
        source = theirs_too(stripped, return_tensors='pt').input_ids
        labels = theirs_too(context[len(stripped):] + choice, add_special_tokens=False,
                            return_tensors='pt').input_ids
        logits = other(input_ids=source, labels=labels).logits[0].log_softmax(-1)
        assert source[0, -1] == 1
        wanted.append((logits.gather(1, labels[0][:, None]).sum(), torch.equal(logits.argmax(-1), labels[0])))
    for batch_tokens in (1, 100, 0):
        scores = score_items(model, tokenizer, ASKED, CPU, 'float32', batch_tokens)
        assert [len(found) for found in scores] == [len(item.choices) for item in ASKED]
        for found, (nats, greedy) in zip([found for item in scores for found in item], wanted, strict=True):
            assert abs(found[0] - nats) < 1e-4 and found[1] == greedy and nats < -5
    source, _ = encode_source(tokenizer, 'the cat sat on', 'x')
    decoder, prompts = read_sources(model, tokenizer, [source], 6)
    written = torch.cat(list(sample.generate(decoder, prompts, 6, temperature=0))).tolist()
    assert score(model, [(source, written)], CPU, 'float32')[0][1]


@pytest.mark.parametrize('case', CASES)
def test_item_by_item_the_numbers_are_those_of_the_harness(case, words):
    pytest.importorskip('lm_eval')
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    folder, _, _ = words[case]
    # it cuts every source to n_positions, 200, if it may
    lm = HFLM(pretrained=folder, dtype='float32', device='cpu', batch_size=3, max_length=2000)
    assert lm.backend == 'seq2seq'
    pairs = [pair for item in ASKED for pair in item.pairs()]
    wanted = lm.loglikelihood([Instance('loglikelihood', {}, pair, 0) for pair in pairs], disable_tqdm=True)
    scores = score_items(*sample.load(f'hf:{folder}', encoder=True), ASKED, CPU, 'float32')
    for (nats, greedy), response in zip([found for item in scores for found in item], wanted, strict=True):
        assert nats == pytest.approx(response[0], abs=1e-4) and greedy == response[1]


def test_a_table_of_tasks_beside_an_inherited_network(words, tmp_path):
    folder, _, _ = words['flan-t5']
    done = run('surgery.py', 'inherit', f'--from=hf:{folder}', f'--out_dir={tmp_path}/small', '--layers=0')
    assert done.returncode == 0, done.stderr
    lines = [{'query': f'the {word}', 'choices': ['cat sat', 'mat', 'user Hi'], 'gold': n % 3}
             for n, word in enumerate(['cat', 'mat', 'user', 'sat'])]
    task = tmp_path / 'task.jsonl'
    task.write_text('\n'.join(map(json.dumps, lines)))
    done = run('eval.py', 'tasks', f'--out_dir=hf:{folder}', f'--beside={tmp_path}/small', '--shots=1', task,
               f'--csv={tmp_path}/items.csv', '--device=cpu')
    assert done.returncode == 0 and 'acc_norm' in done.stdout and 'minus the others' in done.stdout, done
    rows = list(csv.DictReader(open(tmp_path / 'items.csv')))
    items = with_shots(read_items(str(task)), 1, 1337)
    for name, found in (('flan-t5', f'hf:{folder}'), ('small', f'{tmp_path}/small')):
        scores = score_items(*sample.load(found, encoder=True), items, CPU, 'float32')
        wanted = [' '.join(f'{nats:.6f}' for nats, _ in item) for item in scores]
        assert [row['nats'] for row in rows if row['network'].endswith(name)] == wanted


def test_our_own_encoder_decoder_reads_the_end_of_a_long_context_and_a_line_says_so(capsys):
    model = random_model(vocab_size=257, n_encoder_layer=2, source_size=12, cross_rope='same')
    tokenizer = ByteTokenizer().with_format(PromptFormat((), (7,), (256,)))  # as of a run with modes
    items = [Item('a b c d e f g h i j ', ['yes', 'no'], 0), Item('', ['yes'], 0)]
    scores = score_items(model, tokenizer, items, CPU, 'float32', what='file')
    assert ('file: the encoder reads 12 tokens: 2 of 3 contexts (one for each choice) cut to 12'
            in capsys.readouterr().out)
    sources = [[*b' e f g h i j'[-11:], 256], [7, 256]]
    for source, choice, (nats, _) in zip(sources, [b' yes', b'yes'], [scores[0][0], scores[1][0]]):
        with torch.no_grad():
            logits = model(torch.tensor([[256, *choice[:-1]]]), source=torch.tensor([source]))[0]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(list(choice))[:, None]).sum()
        assert abs(nats - wanted) < 1e-4


def test_what_an_encoder_decoder_cannot_score_is_one_line(tmp_path):
    folder, _, _ = folder_of_words(tmp_path / 'hf', 't5', vocab_size=80)
    model, tokenizer = sample.load(f'hf:{folder}', encoder=True)
    own = random_model(vocab_size=257, n_encoder_layer=1)
    for network, its, item, words in [
            (model, tokenizer, Item('the', ['cat', ' '], 0, 'f:1'), "f:1: ' ' has no token: leave it out"),
            (model, tokenizer, Item('the <extra_id_0>', ['cat'], 0, 'f:2'), 'beyond the 80 tokens of the'),
            (own, ByteTokenizer(), Item('a', ['x' * 33], 0, 'f:3'), 'f:3: a continuation of 33 tokens: the')]:
        with pytest.raises(UserError) as refused:
            score_items(network, its, [item], CPU, 'float32')
        assert words in str(refused.value)
    with pytest.raises(UserError, match='a continuation of 33 tokens is longer than the 32'):
        score(own, [([1], [2] * 33)], CPU, 'float32')


# --- attention ---

def their_attention(model, source, target):
    """[{kind: [A (1, H, T, S) of each layer]} of each pair] of a model of transformers."""
    model.set_attn_implementation('eager')
    found = []
    for read, write in zip(source, target):
        out = model(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([write]), use_cache=False,
                    output_attentions=True)
        found.append({'encoder': out.encoder_attentions, 'decoder': out.decoder_attentions,
                      'cross': out.cross_attentions})
    return found


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_layers_are_inherited_and_attention_is_measured(case, folders):
    other, model = network(case), ours(folders[case])
    source, target = texts([40, 12, 1]), texts([9, 30, 1], seed=2)
    wanted = their_attention(other, source, target)
    batches = [(torch.tensor([write]), torch.tensor([read])) for read, write in zip(source, target)]
    for (x, read), theirs_too in zip(batches, wanted):
        seen, logits = [], model(x, source=read)
        with watching(seen.append):
            watched = model(x, source=read)
        torch.testing.assert_close(watched, logits, rtol=1e-4, atol=1e-4)
        for (kind, layer, _), A in zip(attentions(model), seen, strict=True):
            torch.testing.assert_close(A, theirs_too[kind][layer], rtol=1e-4, atol=1e-5)
    records = measure(model, batches)
    assert len(records) == 4 * (2 + 3 + 3)  # of 4 heads
    for record in records:
        found = [pair[record['attention']][record['layer']][0, record['head']] for pair in wanted]
        for name, figure in (('rank', rank), ('mass', mass), ('first', first_share)):
            mean = sum(figure(A).item() for A in found) / 3
            assert record[name] == pytest.approx(mean, abs=1e-4 if name == 'first' else 0.34), record
    keep_layers(other, [1], [0, 2])
    cfg, weights = take_layers(model.cfg, model.state_dict(), [0, 2], encoder=[1])
    assert_same(fill(cfg, weights, 'test').eval(), other)


def test_simple_patterns_of_attention_that_is_not_causal():
    wanted = {'uniform': (1, 90, 0.01), 'sink': (1, 1, 1), 'identity': (90, 90, 0.01)}
    assert nulls(100, kind='encoder') == {name: pytest.approx(values) for name, values in wanted.items()}
    wanted = {'uniform': (1, 36, 1 / 40), 'sink': (1, 1, 1), 'diagonal': (9, 9, 0.1)}
    assert nulls(10, S=40, kind='cross') == {name: pytest.approx(values) for name, values in wanted.items()}
    A, B = (nulls(T, 0.8, S, 'cross') for T, S in ((7, 20), (30, 4)))
    means = mean_nulls([(7, 20), (30, 4), (7, 20)], 0.8, 'cross')
    assert means.keys() == A.keys()
    for name, values in means.items():
        assert values == pytest.approx([(2 * a + b) / 3 for a, b in zip(A[name], B[name])])


def test_zero_queries_attend_as_the_uniform_patterns_and_gradients_are_autograds():
    model = random_model(**OWN, cross_rope='same')
    pairs = [(torch.tensor([write]), torch.tensor([write]).roll(-1, 1), torch.tensor([read]) % 64)
             for read, write in zip(texts([20, 7]), [list(range(9)), list(range(30))])]
    parts = [model.encoder[1].attn.q.weight, model.blocks[2].attn.k.weight, model.blocks[0].cross.q.weight]
    total = sum(model(x, y, source=read, reduction='sum') for x, y, read in pairs) / 39
    wanted = [g.norm().item() for g in torch.autograd.grad(total, parts)]
    found = {(kind, n): norms for (kind, n, _), norms in zip(attentions(model), gradient_norms(model, pairs))}
    assert ([found['encoder', 1][0], found['decoder', 2][1], found['cross', 0][0]]
            == pytest.approx(wanted, rel=1e-4))
    for name, p in model.named_parameters():
        if name.endswith('.q.weight'):
            p.data.zero_()
    shapes = {'encoder': [(20, 20), (7, 7)], 'decoder': [(9, 9), (30, 30)], 'cross': [(9, 20), (30, 7)]}
    for record in measure(model, [(x, read) for x, _, read in pairs]):
        kind = record['attention']
        assert ((record['rank'], record['mass'], record['first'])
                == pytest.approx(mean_nulls(shapes[kind], 0.9, kind)['uniform']))


def test_the_command_has_a_table_for_each_kind_of_attention(pairs, dataset, tmp_path):
    theirs(**UMT5 | dict(vocab_size=257)).save_pretrained(tmp_path / 'hf')
    folder = f'hf:{tmp_path}/hf'
    look = ['attention', '--sequences=8', '--picture=']
    done = run('analyze.py', *look, f'--out_dir={folder}', f'--dataset={pairs}', '--length=300', '--lazy=40',
               f'--csv={tmp_path}/a.csv', f'--picture={tmp_path}/a.png')
    assert done.returncode == 0, done.stderr
    assert '8 pairs of up to 300 + 300 tokens' in done.stdout
    tables = done.stdout.split('\n\n')
    headings = [table.split('\n')[0] for table in tables if '\nlayer ' in table]
    assert headings == ["encoder's self-attention", "decoder's self-attention", 'cross-attention']
    assert re.findall('up to 40: (.*)', done.stdout) == ['0, 1', '0, 1, 2', '0, 1, 2']
    rows = list(csv.DictReader(open(tmp_path / 'a.csv')))
    assert (Counter(row['attention'] for row in rows) == {'encoder': 8, 'decoder': 12, 'cross': 12}
            and all(float(row['grad_q']) > 0 for row in rows))
    assert (tmp_path / 'a.png').stat().st_size > 10_000
    # the pairs are cut where they would be in training
    done = run('analyze.py', *look, f'--out_dir={folder}', f'--dataset={pairs}', '--length=3')
    sources = [line for line in done.stdout.splitlines() if line.startswith('sink')]
    assert done.returncode == 0 and len(sources) == 3, done.stderr
    for args, words in [([f'--dataset={pairs}', '--batch_averaged'], 'batch_averaged: is the mean'),
                        ([f'--dataset={pairs}', '--sequences=9999'], 'pairs to validate on: lower it'),
                        ([f'--dataset={dataset}'], 'there are no pairs in it'), ([], 'give --dataset=NAME')]:
        assert words in one_line(run('analyze.py', *look, f'--out_dir={folder}', *args))
    # a run knows its data, and rows of a denoising run are masked as in validation
    train(tmp_path / 'run', '--n_encoder_layer=1', '--objective=prefix', '--max_iters=1', dataset=dataset)
    done = run('analyze.py', *look, f'--out_dir={tmp_path}/run', '--length=20')
    assert done.returncode == 0 and 'cross-attention' in done.stdout, done.stderr
    assert 'length=33: the network' in one_line(run('analyze.py', *look, f'--out_dir={tmp_path}/run',
                                                    '--length=33'))
