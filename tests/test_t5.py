"""
Encoder-decoders: T5 and Flan-T5 have the logits of transformers, both ways, and write what transformers
writes; our own kinds of positions do what they say; padding, the cache and the other rows of a batch change
nothing.
"""
import json
import math

import pytest
import torch
import transformers
from conftest import one_line, run, write_dataset
from test_export import exported
from test_hub import edit, refusal, rewrite
from test_model import tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5ForConditionalGeneration, UMT5ForConditionalGeneration

import checkpoint
from configurator import UserError, read_config
from features import build, part_of
from features.hf import reading
from features.lora.packed import pack
from features.networks import read_model
from features.t5.beams import beam_search
from features.t5.positions import RelativeBias
from features.t5.sampling import Decoder, pad, read_sources
from features.t5.settings import READ
from model import ModelConfig, autocast, make_model
from sample import KVCache, generate, step
from tokenizer import ByteTokenizer, PromptFormat
from train import Settings

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(vocab_size=100, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4,
             n_positions=200)
T5 = dict(feed_forward_proj='relu', tie_word_embeddings=True)
FLAN = dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)
MT5 = FLAN | dict(kind='MT5')
UMT5 = FLAN | dict(kind='UMT5')

OURS = dict(vocab_size=257, n_encoder_layer=3, position='relative', mlp='relu', qk_norm=False, t5_scale=True,
            zero_init=False)


def theirs(std=0.15, kind='T5', **settings):
    """A random T5 of transformers: the norms too, so that a mistake in any tensor shows."""
    torch.manual_seed(0)
    config = getattr(transformers, f'{kind}Config')(**SIZES | settings, decoder_start_token_id=0)
    model = getattr(transformers, f'{kind}ForConditionalGeneration')(config).eval()
    for p in model.parameters():
        p.data = 1 + 0.3 * torch.randn(p.shape) if p.dim() == 1 else std * torch.randn(p.shape)
    return model


def ours(folder):
    cfg, weights = reading.load(f'hf:{folder}')
    model = make_model(cfg).eval()
    checkpoint.load_weights(model, weights, str(folder))
    return model


def texts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 100, (n,), generator=generator).tolist() for n in lengths]


def their_logits(model, sources, targets):
    ids = pad(sources, 'cpu')
    return model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(),
                 decoder_input_ids=torch.tensor(targets)).logits


# --- T5 and Flan-T5 ---

@torch.no_grad()
@pytest.mark.parametrize('settings', [T5, FLAN, FLAN | dict(feed_forward_proj='gated-silu', d_kv=16),
                                      T5 | dict(num_decoder_layers=None), MT5, UMT5,
                                      UMT5 | dict(tie_word_embeddings=True, feed_forward_proj='relu')],
                         ids=str)
def test_t5_has_the_logits_of_transformers(settings, tmp_path):
    # beyond 128, where all distances are one
    model, sources, targets = theirs(**settings), texts([150, 70, 1]), texts([160] * 3, seed=2)
    model.save_pretrained(tmp_path)
    a, b = (their_logits(model, sources, targets),
            ours(tmp_path)(torch.tensor(targets), source=pad(sources, 'cpu')))
    assert a.shape == b.shape and a.std() > 0.1
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


LONG = T5 | dict(num_layers=1, num_decoder_layers=1, n_positions=16)  # that is a length in training


@torch.no_grad()
def test_texts_beyond_the_length_of_training_are_read_and_written_as_in_transformers(tmp_path):
    model, sources, targets = theirs(**LONG), texts([600, 40]), texts([550] * 2, seed=2)
    model.save_pretrained(tmp_path)
    mine = ours(tmp_path)
    assert mine.cfg.block_size == 16
    a, b = their_logits(model, sources, targets), mine(torch.tensor(targets), source=pad(sources, 'cpu'))
    assert (a - b).abs().max() < 1e-5 * a.abs().max()
    model = theirs(**LONG, std=0.6)
    model.save_pretrained(tmp_path)
    mine, ids = ours(tmp_path), pad(sources[:1], 'cpu')
    wanted = model.generate(input_ids=ids, max_new_tokens=60, min_new_tokens=60, do_sample=False,
                            eos_token_id=None)[0, 1:].tolist()
    tokenizer = ByteTokenizer().with_format(PromptFormat(bos=(0,)))
    for use_cache in (True, False):
        decoder, prompts = read_sources(mine, tokenizer, sources[:1], 60)
        found = torch.cat(list(generate(decoder, prompts, 60, temperature=0, use_cache=use_cache)))
        assert found.tolist() == wanted, use_cache
    assert beam_search(decoder, [0], 60, 1) == wanted


def test_the_scripts_read_write_and_train_on_more_tokens_than_n_positions(tmp_path):
    folder, text = exported(tmp_path, tiny(**OURS, block_size=16).eval()), 'a b c d ' * 20
    other, end = T5ForConditionalGeneration.from_pretrained(folder), ByteTokenizer().eot
    wanted = other.generate(torch.tensor([[*text.encode(), end]]), max_new_tokens=40, do_sample=False)
    wanted = [i for i in wanted[0, 1:].tolist() if i != end]
    done = run('sample.py', f'--init_from=hf:{folder}', f'--start={text}', '--max_new_tokens=40',
               '--temperature=0', '--num_samples=1')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split('\n----')[0] == ByteTokenizer().decode(wanted)
    pairs = tmp_path / 'pairs.jsonl'
    pairs.write_text(''.join(json.dumps({'q': f'{n} {text}', 'a': text[:50]}) + '\n' for n in range(20)))
    done = run('eval.py', 'summaries', f'--out_dir=hf:{folder}', pairs, '--source=q', '--target=a',
               '--max_new_tokens=20', '--limit=2', f'--csv={tmp_path}/out.csv')
    assert done.returncode == 0 and 'cut to' not in done.stdout, done.stdout + done.stderr
    done = run('prepare.py', pairs, '--source=q', '--target=a', '--tokenizer=byte', '--val_fraction=0.3',
               f'--out={tmp_path}/data')
    assert done.returncode == 0, done.stderr
    done = run('train.py', f'--init_from=hf:{folder}', f'--dataset={tmp_path}/data', '--objective=seq2seq',
               f'--out_dir={tmp_path}/tuned', '--source_size=170', '--block_size=60', '--batch_size=2',
               '--max_iters=1', '--eval_iters=1', '--sample_tokens=70', '--device=cpu', '--dtype=float32')
    assert done.returncode == 0 and 'cut to' not in done.stdout, done.stdout + done.stderr
    cfg, _, _ = read_model(f'{tmp_path}/tuned', encoder=True)
    assert (cfg.block_size, cfg.source_size) == (60, 170)


@torch.no_grad()
def test_a_head_of_its_own_is_read(tmp_path):
    """Flan-T5's files have one; transformers 5 makes none, whatever its configuration says."""
    theirs(**FLAN).save_pretrained(tmp_path)
    head = torch.randn(100, 48)
    rewrite(tmp_path, lambda tensors: tensors | {'lm_head.weight': head})
    model, (source, target) = ours(tmp_path), texts([9, 9])
    h = model.hidden(torch.tensor([target]), encoded=model.encode(torch.tensor([source])))
    assert torch.allclose(model(torch.tensor([target]), source=torch.tensor([source])), h @ head.T, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('settings',
                         [dict(), dict(tie=False, mlp='geglu', head_dim=16), dict(rank_qk=4, rank_mlp=8),
                          dict(depth_scale='norm'), dict(depth_scale='attn'), dict(rel_per_layer=True),
                          dict(rel_per_layer=True, tie=False, mlp='geglu')], ids=str)
def test_transformers_has_our_logits(settings, tmp_path):
    model = tiny(**OURS | settings).eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1, 0.3)
    cls = UMT5ForConditionalGeneration if model.cfg.rel_per_layer else T5ForConditionalGeneration
    other, report = cls.from_pretrained(exported(tmp_path, model), output_loading_info=True)
    assert not any(report.values()), report
    assert other.config.decoder_start_token_id == ByteTokenizer().eot
    sources, targets = texts([30, 12]), texts([20, 20], seed=2)
    a, b = their_logits(other, sources, targets), model(torch.tensor(targets), source=pad(sources, 'cpu'))
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_what_t5_has_no_place_for_is_refused(tmp_path):
    with pytest.raises(UserError, match='position=rope, mlp=relu2: '
                       'no class of transformers has this .the nearest is t5') as caught:
        exported(tmp_path, tiny(vocab_size=257, n_encoder_layer=2, cross_rope='same', qk_norm=False))
    assert '\n' not in str(caught.value) and not (tmp_path / 'hf').exists()


@pytest.mark.parametrize('change, words', [
    (dict(feed_forward_proj='gelu'), "feed_forward_proj='gelu': takes 'relu' or 'gated-gelu'"),
    (dict(relative_attention_num_buckets=16), 'takes 32'), (dict(num_layers=10 ** 9), 'layers'),
    (dict(d_kv=12), 'SelfAttention.q'), (dict(num_decoder_layers=2), 'decoder.block.2')], ids=str)
def test_a_t5_that_is_not_ours_is_refused(change, words, tmp_path):
    theirs(**T5).save_pretrained(tmp_path)
    edit(tmp_path, **change)
    assert words in refusal(str(tmp_path))


def test_a_second_embedding_that_is_another_is_refused(tmp_path):
    theirs(**T5).save_pretrained(tmp_path)
    rewrite(tmp_path,
            lambda tensors: tensors | {'encoder.embed_tokens.weight': tensors['shared.weight'].clone()})
    ours(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {'encoder.embed_tokens.weight': tensors['shared.weight'] + 1})
    assert 'are not equal' in refusal(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize('settings, end', [(T5, 90), (FLAN, 86), (MT5, 86), (UMT5, 67)], ids=str)
def test_greedy_and_beam_search_write_what_transformers_writes(settings, end, tmp_path):
    # their cache has as many layers as the encoder
    model, sources = theirs(std=0.6, **settings, num_decoder_layers=2), texts([40, 25, 3, 40, 12, 7])
    model.save_pretrained(tmp_path)
    mine, ids = ours(tmp_path), pad(sources, 'cpu')
    theirs_in = dict(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), pad_token_id=0,
                     eos_token_id=end, max_new_tokens=50, do_sample=False)

    def cut(row):  # theirs are padded with zeros after the end
        row = row[1:]
        return row[:row.index(end)] if end in row else row
    wanted = [cut(row) for row in model.generate(**theirs_in).tolist()]
    drawn = torch.stack(list(generate(Decoder(mine, sources), [[0]] * 6, 50, temperature=0, eot=end)),
                        dim=1).tolist()
    assert [[t for t in row if t >= 0] for row in drawn] == wanted
    # not the same for every source, and some end
    assert len(set(map(tuple, wanted))) > 3 and min(map(len, wanted)) < 50
    searches = (4, 1.0), (3, 0.0), (2, 2.0), (4, -1.0)
    for beams, penalty in searches[:1 if 'kind' in settings else 4]:
        wanted = [cut(row)
                  for row in model.generate(**theirs_in, num_beams=beams, length_penalty=penalty).tolist()]
        assert [cut([0] + beam_search(Decoder(mine, [source]), [0], 50, beams, penalty, eot=end))
                for source in sources] == wanted, (beams, penalty)


# --- every kind ---

KINDS = [dict(position='relative', t5_scale=True), dict(position='relative', rel_per_layer=True), dict(),
         dict(cross_rope='same', n_kv_head=2),
         dict(cross_rope='offset', n_kv_head=1, tie=False),
         dict(position='learned', norm='layernorm', bias=True, mlp='gelu', qk_norm=False),
         dict(position='none', value_residual=True, mlp='swiglu'),
         dict(rank_qk=8, rank_vo=8, rank_mlp=8, rank_embed=8, rank_head=8, depth_scale='attn'),
         dict(source_size=50, cross_rope='offset')]


def network(**settings):
    return tiny(**dict(n_encoder_layer=3, zero_init=False) | settings).eval()


@torch.no_grad()
@pytest.mark.parametrize('settings', KINDS, ids=str)
def test_padding_and_the_other_rows_change_nothing(settings):
    model, sources, targets = network(**settings), texts([30, 1, 17]), torch.tensor(texts([20] * 3, seed=2))
    together = model(targets, source=pad(sources, 'cpu'))
    for n, source in enumerate(sources):
        alone = model(targets[n:n + 1], source=torch.tensor([source]))
        assert torch.allclose(together[n:n + 1], alone, atol=1e-5)
    # without positions a source is a bag of words
    other = source[::-1] if settings.get('position') != 'none' else source[1:]
    assert not torch.allclose(alone, model(targets[2:], source=torch.tensor([other])), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize('settings', KINDS, ids=str)
def test_the_encoder_sees_all_and_the_decoder_only_the_past(settings):
    model, (source, other), target = network(**settings), texts([20, 20]), torch.tensor(texts([20], seed=2))
    h = model.encode(torch.tensor([source[:-1] + other[-1:]])).h - model.encode(torch.tensor([source])).h
    assert h[0, 0].abs().max() > 1e-4
    changed = target.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 100
    a, b = (model(x, source=torch.tensor([source])) for x in (target, changed))
    assert (torch.allclose(a[0, :10], b[0, :10], atol=1e-6)
            and not torch.allclose(a[0, 10:], b[0, 10:], atol=1e-3))


@torch.no_grad()
@pytest.mark.parametrize('settings', KINDS, ids=str)
def test_cached_is_uncached(settings):
    model, sources, prompts = network(**settings), texts([30, 5, 11]), texts([1, 4, 2], seed=3)
    model, options = Decoder(model, sources), dict(temperature=0.9, eot=7)
    cached, uncached = (torch.stack(list(generate(model, prompts, 60, use_cache=use,
                                                  generator=torch.Generator().manual_seed(0), **options)))
                        for use in (True, False))
    assert torch.equal(cached, uncached) and len(cached) > 32  # beyond the context


@torch.no_grad()
def test_a_step_over_the_whole_buffer_is_the_same():
    for settings in KINDS:
        model, x = network(**settings), torch.tensor([[1, 2, 3, 4, 5]])
        decoder = Decoder(model, texts([9]))
        caches = [KVCache(model, 5), KVCache(model, 24, compile=True)]
        for cache in caches:
            cache.extend(4)
            step(decoder, x[:, :4], cache)
            cache.extend(1)
        assert torch.allclose(*(step(decoder, x[:, 4:], cache) for cache in caches), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['none', 'same', 'offset'])
def test_offset_is_one_line_of_positions_and_same_are_two(kind):
    model, (source, target) = network(cross_rope=kind), (torch.tensor([row]) for row in texts([12, 10]))
    encoded = model.encode(source)
    before = model.hidden(target, encoded=encoded)
    # as if three more tokens had been between the two
    further = model.hidden(target, encoded=encoded._replace(length=encoded.length + 3))
    assert torch.allclose(before, further) == (kind != 'offset')
    model.rotary = model.rotary[:, 5:]  # only distances count: all positions five further on
    assert torch.allclose(before, model.hidden(target, encoded=model.encode(source)), atol=1e-5)


def test_buckets_are_those_of_t5():
    """
    One distance each up to half of the buckets, then ever longer ranges up to 128: Mesh TensorFlow's, as
    transformers has it.
    """
    from transformers.models.t5.modeling_t5 import T5Attention
    positions = torch.arange(300)
    for is_causal in (True, False):
        bias = RelativeBias(1, is_causal)
        bias.weight.data = torch.arange(32.0)[:, None]
        wanted = T5Attention._relative_position_bucket(positions - positions[:, None],
                                                       bidirectional=not is_causal).float()
        future = positions > positions[:, None]
        assert torch.equal(bias(positions, positions)[0, 0],
                           wanted.masked_fill(future, -torch.inf) if is_causal else wanted)


@pytest.mark.parametrize('settings', KINDS, ids=str)
def test_flops_are_those_of_torch(settings):
    model = network(**settings)
    T, S = model.cfg.block_size, model.cfg.source_context
    x, source = torch.ones(2, T, dtype=torch.long), torch.ones(2, S, dtype=torch.long)
    # it does not know the CPU's flash kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, source=source).sum().backward()
    assert abs(model.flops_per_token() * 2 * T / counter.get_total_flops() - 1) < 0.02


def test_recomputing_changes_no_gradient():
    model, (source, target) = network(cross_rope='offset', value_residual=True), texts([20, 21])
    gradients = []
    for recompute in (False, True):
        model.train().recompute = recompute
        model.zero_grad()
        model(torch.tensor([target[:-1]]), torch.tensor([target[1:]]),
              source=torch.tensor([source])).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_t5s_init_has_logits_of_deviation_one():
    """
    Embedding of deviation 1, normed stream, head over sqrt(n_embd); attention's logits too, without
    1/sqrt(head_dim).
    """
    torch.manual_seed(0)
    cfg = part_of(build(Settings, **read_config(Settings, 'config/t5_base.py')
                        | dict(vocab_size=500, n_layer=2, n_encoder_layer=2)), ModelConfig)
    model = make_model(cfg)
    source, x = torch.randint(500, (2, 30)), torch.randint(500, (2, 30))
    with torch.no_grad():
        assert abs(model(x, source=source).std() - 1) < 0.3
        for p, std in ((model.wte.weight[:500], 1), (model.encoder[0].attn.q.weight, (768 * 64) ** -0.5),
                       (model.blocks[1].cross.o.weight, 768 ** -0.5),
                       (model.blocks[1].mlp.down.weight, 3072 ** -0.5), (model.rel.weight, 768 ** -0.5)):
            assert abs(p.std() / std - 1) < 0.1


@torch.no_grad()
@pytest.mark.parametrize('mlp, up, down', [('relu', 1000, 100), ('geglu', 300, 1e-5)])
def test_a_hidden_layer_beyond_float16_goes_on_in_float32(mlp, up, down):
    """Flan-T5's passes 65,504: transformers keeps the matrix after it in float32, and we do."""
    source, target = (torch.tensor(row) for row in (texts([20]), texts([9])))

    def logits(dtype, pack_it):
        model = tiny(**OURS | dict(mlp=mlp)).eval()
        for block in (*model.encoder, *model.blocks):
            block.mlp.up.weight.mul_(up)
            block.mlp.down.weight.mul_(down)
            if mlp == 'geglu':
                block.mlp.gate.weight.mul_(up)
        with autocast(source.device, 'float32' if pack_it else dtype):
            return (pack(model, dtype) if pack_it else model)(target, source=source)
    exact = logits('float32', False)
    for pack_it in (False, True):
        assert (logits('float16', pack_it) - exact).abs().max() < 0.01 * exact.abs().max(), pack_it


# --- the presets ---

@pytest.mark.parametrize('config, vocab_size, count', [
    ('t5_base', 32128, 222_903_552), ('flan_t5_base', 32128, 247_577_856),
    ('rot5', 32502, 223_190_784), ('rot5_rope', 32502, 223_190_016),
    ('rot5_rope_gqa', 32502, 194_878_464), ('rot5_mini', 32502, 46_814_208)])
def test_presets_have_exactly_the_published_number_of_parameters(config, vocab_size, count):
    with torch.device('meta'):
        model = make_model(part_of(build(Settings, **read_config(Settings, f'config/{config}.py')
                                         | {'vocab_size': vocab_size}), ModelConfig))
    assert model.num_params() == count


# --- the scripts ---

def test_sample_writes_what_transformers_writes(tmp_path):
    model = tiny(**OURS).eval()
    folder, text = exported(tmp_path, model), 'What the encoder reads.'
    other, end = T5ForConditionalGeneration.from_pretrained(folder), ByteTokenizer().eot
    ids = torch.tensor([[*text.encode(), end]])
    for options, beams in ((['--temperature=0', '--num_samples=2'], 1), (['--num_beams=3'], 3)):
        done = run('sample.py', f'--init_from=hf:{folder}', f'--start={text}', '--max_new_tokens=20',
                   *options)
        written = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, num_beams=beams,
                                 do_sample=False)[0, 1:].tolist()
        wanted = ByteTokenizer().decode(written[:-1] if written[-1] == end else written)
        assert done.returncode == 0 and done.stdout.split('\n----')[0] == wanted, done.stderr


@pytest.mark.parametrize('args, words', [
    (['hub.py', 'export', '--out_dir={}/../run', '--to={}x', '--as=custom'], 'is an encoder-decoder'),
    (['eval.py', 'text', '--out_dir=hf:{}', '{}/../text.txt'], 'is an encoder-decoder'),
    (['surgery.py', 'grow', '--from=hf:{}', '--n_layer=9', '--out_dir={}/x'], 'is an encoder-decoder'),
    (['train.py', '--init_from=hf:{}', '--dataset={}/../pairs'], 'objective=causal')], ids=str)
def test_what_an_encoder_decoder_cannot_do_is_refused(args, words, tmp_path):
    folder = exported(tmp_path, tiny(**OURS))
    write_dataset(tmp_path / 'pairs', vocab_size=257)
    (tmp_path / 'text.txt').write_text('some text')
    assert words in one_line(run(*(arg.format(folder) for arg in args)))


# --- bad input ---

@pytest.mark.parametrize(
    'args, words', [(['--source_size=64'], 'source_size=64'), (['--cross_rope=same'], 'cross_rope=same'),
                    (['--n_encoder_layer=-1'], 'n_encoder_layer=-1'),
                    (['--rel_per_layer=True', '--n_encoder_layer=1', '--objective=prefix'], 'rel_per_layer'),
                    (['--t5_scale=True'], 't5_scale=True')])
def test_settings_that_cannot_work_are_refused(args, words, dataset, tmp_path):
    assert words in one_line(run('train.py', *args, f'--dataset={dataset}', f'--out_dir={tmp_path}/x'))


def test_a_kind_of_cross_attention_without_code_does_not_work_as_another_one():
    with pytest.raises(ValueError,
                       match='^cross_rope=new: this choice has no code in features/t5/network.py$'):
        tiny(n_encoder_layer=1, cross_rope='new')


def test_a_setting_that_its_blocks_do_not_read_has_to_be_at_its_default(monkeypatch):
    """As a new one, which only a decoder acts on."""
    monkeypatch.setattr('features.t5.settings.READ', READ - {'softcap'})
    tiny(softcap=5.0)
    tiny(n_encoder_layer=1)
    with pytest.raises(ValueError, match='^softcap=5.0: an encoder-decoder does not act on it: leave it'):
        tiny(n_encoder_layer=1, softcap=5.0)


@pytest.mark.parametrize('setting', [
    dict(window=8), dict(full_layers=[0]), dict(window_theta=5.0), dict(rope_dim=4), dict(parallel=True),
    dict(attn_scale=0.5), dict(attn_softcap=5.0), dict(embed_scale=2.0), dict(residual_scale=0.5),
    dict(logit_scale=0.5), dict(post_norm='both'), dict(post_norm=True), dict(no_rope=[0])], ids=str)
def test_a_setting_of_decoders_alone_is_refused(setting):
    (name, value), = setting.items()
    with pytest.raises(ValueError, match=f'^{name}='):
        tiny(n_encoder_layer=1, **setting)


def test_a_network_says_when_its_source_is_missing_or_too_long():
    model, x = network(position='rope'), torch.ones(1, 4, dtype=torch.long)
    for wrong, words in ((lambda: model(x), 'takes a source'),
                         (lambda: model(x, source=x.new_ones(1, 33)), 'source_size=32')):
        with pytest.raises(ValueError, match=words):
            wrong()
    assert math.isfinite(model(x, x, source=x).item())
