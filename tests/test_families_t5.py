"""
Encoder-decoders that people use, T5, Flan-T5, mT5 and UMT5: what users do with the decoders of
test_families.py they do with these too. Their logits, exports and adapters are in test_t5.py.
"""
import json

import pytest
import torch
import transformers
from conftest import one_line, read_log, run, train
from test_hub import write_tokenizer
from test_surgery import random_model
from test_t5 import FLAN, MT5, T5, UMT5, ours, pad, texts, theirs

import checkpoint
from checkpoint import fill
from configurator import UserError
from features.growth.networks import take_layers
from features.hf import reading

CASES = {'t5': T5, 'flan-t5': FLAN, 'mt5': MT5, 'umt5': UMT5}
DEEP = dict(num_layers=3, num_decoder_layers=4)


@torch.no_grad()
def assert_same(model, other):
    """The same logits, to 1e-5 of the largest. Returns them."""
    source, target = pad(texts([60, 35, 1]), 'cpu'), torch.tensor(texts([50] * 3, seed=2))
    a = model(target, source=source)
    b = other(input_ids=source.clamp(min=0), attention_mask=(source >= 0).long(), decoder_input_ids=target,
              use_cache=False).logits
    assert a.shape == b.shape and a.std() > 0.1
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    return b


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
    other = theirs(0.1, **CASES[case] | DEEP)
    other.save_pretrained(tmp_path)
    old = ours(tmp_path)
    part = fill(*take_layers(old.cfg, old.state_dict(), decoder, encoder=encoder), 'test').eval()
    whole = assert_same(old, other)
    keep_layers(other, encoder, decoder)
    assert not torch.allclose(assert_same(part, other), whole, atol=0.05)


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
    theirs(**CASES[case] | DEEP | dict(vocab_size=257)).save_pretrained(tmp_path / 'hf')
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
        assert_same(checkpoint.load_model(f'{tmp_path}/{name}', encoder=True)[0], loaded)
    other = theirs(**CASES[case] | DEEP | dict(vocab_size=257))
    keep_layers(other, [0, 2], [0, 1])
    assert_same(checkpoint.load_model(f'{tmp_path}/small', encoder=True)[0], other)


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
