"""
Models of others: the same logits as transformers', from every way such a folder is written, and one line for
every folder that is not exactly a network of ours. The models are tiny and random; no network, no weights
from elsewhere.
"""
import http.server
import json
import os
import resource
import shutil
import threading
import time

import pytest
import torch
import transformers
from conftest import give_tokenizer, one_line, run, train, write_dataset
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import checkpoint
import sample
from configurator import UserError
from features.bpe import train_bpe
from features.hf import reading
from features.hf.tokenizer_json import to_json
from features.networks import load_model
from model import make_model
from sample import generate
from tokenizer import load_tokenizer, new_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """Matrices this small are slower with two threads, and far slower beside another process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ENDS = dict(bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=100, n_positions=32, n_embd=48, n_layer=3, n_head=4, layer_norm_epsilon=1e-3, **ENDS)
LLAMA = dict(vocab_size=100, max_position_embeddings=32, hidden_size=48, intermediate_size=80,
             num_hidden_layers=3, num_attention_heads=4, **ENDS)
KINDS = {'gpt2': (GPT2LMHeadModel, GPT2Config, GPT2),
         'gpt_bigcode': (GPTBigCodeForCausalLM, GPTBigCodeConfig, GPT2),
         'llama': (LlamaForCausalLM, LlamaConfig, LLAMA),
         'mistral': (MistralForCausalLM, MistralConfig, LLAMA)}


def theirs(kind, **settings):
    """A random transformers model. Norms and biases are random too: a mistake in any tensor must show."""
    torch.manual_seed(0)
    cls, config, base = KINDS[kind]
    model = cls(config(**base | settings)).eval()
    for name, p in model.named_parameters():
        is_norm = p.dim() == 1 and name.endswith('weight')
        p.data = 1 + 0.3 * torch.randn(p.shape) if is_norm else 0.15 * torch.randn(p.shape)
    return model


def saved(folder, kind='gpt2', **settings):
    """Path of the folder that transformers writes for theirs(kind, …)."""
    theirs(kind, **settings).save_pretrained(folder)
    return str(folder)


def ours(folder):
    """Our network with the weights of a folder; every parameter has to be among them."""
    cfg, weights = reading.load(f'hf:{folder}')
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in weights.values())
    model = make_model(cfg).eval()
    checkpoint.load_weights(model, weights, str(folder))
    return model


def tokens(rows=2, length=32):
    return torch.randint(100, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(model, folder, length=32):
    """The largest difference between the logits of a transformers model and those of ours from `folder`."""
    a, b = model(tokens(length=length)).logits, ours(folder)(tokens(length=length))
    assert a.shape == b.shape and a.std() > 0.3
    return (a - b).abs().max().item()


def edit(folder, **fields):
    """Change fields of a config.json."""
    path = os.path.join(folder, 'config.json')
    with open(path) as f:
        config = json.load(f) | fields
    with open(path, 'w') as f:
        json.dump(config, f)


def rewrite(folder, change, file='model.safetensors'):
    """Replace the tensors of a file by change(tensors)."""
    path = os.path.join(folder, file)
    save_file(change(load_file(path)), path)


def refusal(where):
    """The one line that load() refuses with."""
    with pytest.raises(UserError) as caught:
        reading.load(where if where.startswith('gpt2') else f'hf:{where}')
    assert '\n' not in str(caught.value)
    return str(caught.value)


# --- the same logits ---

@pytest.mark.parametrize('settings', [dict(), dict(n_inner=80), dict(tie_word_embeddings=False),
                                      dict(activation_function='gelu_pytorch_tanh'),
                                      dict(scale_attn_by_inverse_layer_idx=True)], ids=str)
def test_gpt2_has_the_logits_of_transformers(settings, tmp_path):
    model = theirs('gpt2', **settings)
    model.save_pretrained(tmp_path)
    assert difference(model, tmp_path) < 1e-5


def test_starcoder_has_the_logits_of_transformers(tmp_path):
    """GPTBigCode: GPT-2 with one head of keys and values, and matrices that are not flipped."""
    model = theirs('gpt_bigcode', n_inner=80)
    model.save_pretrained(tmp_path)
    assert difference(model, tmp_path) < 1e-5 and reading.load(f'hf:{tmp_path}')[0].n_kv_head == 1
    edit(tmp_path, multi_query=False)
    assert 'multi_query=False: takes True' in refusal(str(tmp_path))


@pytest.mark.parametrize('settings', [
    dict(), dict(num_key_value_heads=2), dict(num_key_value_heads=1, tie_word_embeddings=True),
    dict(num_key_value_heads=2, head_dim=20),
    dict(rope_parameters={'rope_type': 'default', 'rope_theta': 500000.0}), dict(rms_norm_eps=1e-2),
    dict(attention_bias=True, mlp_bias=True)], ids=str)
def test_llama_has_the_logits_of_transformers(settings, tmp_path):
    model = theirs('llama', **settings)
    model.save_pretrained(tmp_path)
    assert difference(model, tmp_path) < 1e-5


def test_a_long_context_has_the_logits_of_transformers(tmp_path):
    model = theirs('llama', max_position_embeddings=2048, num_key_value_heads=2,
                   rope_parameters={'rope_type': 'default', 'rope_theta': 500000.0})
    model.save_pretrained(tmp_path)
    # angles that differ in their last bit are 100 times further apart
    assert difference(model, tmp_path, length=2048) < 1e-5


def test_mistral_has_the_logits_of_transformers_beyond_its_window(tmp_path):
    model = theirs('mistral', num_key_value_heads=2, sliding_window=8)
    model.save_pretrained(tmp_path)
    cfg = reading.load(f'hf:{tmp_path}')[0]
    assert (cfg.window, cfg.full_layers, cfg.block_size) == (8, [], 32)
    assert difference(model, tmp_path) < 1e-5


@pytest.mark.parametrize('window, context',
                         [({'sliding_window': None}, 32), ({'sliding_window': 99}, 32), ({}, 32)], ids=str)
def test_a_window_that_hides_nothing_leaves_the_context(window, context, tmp_path):
    model = theirs('mistral', num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    edit(tmp_path, **window)
    assert reading.load(f'hf:{tmp_path}')[0].block_size == context and difference(model, tmp_path) < 1e-5


@pytest.mark.parametrize('kind', ['gpt2', 'gpt_bigcode', 'llama'])
def test_greedy_text_is_that_of_transformers(kind, tmp_path):
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    text = prompt = tokens(rows=2, length=6)
    for _ in range(26):
        with torch.no_grad():
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    # with our cache
    drawn = torch.stack(list(generate(ours(tmp_path), prompt.tolist(), 26, temperature=0)), dim=1)
    assert torch.equal(drawn, text[:, 6:])


def test_the_padding_of_the_vocabulary_is_zero_and_gets_no_logit(tmp_path):
    cfg, weights = reading.load(f'hf:{saved(tmp_path, "llama")}')
    assert (cfg.vocab_size, cfg.padded_vocab) == (100, 128)
    for name in ('wte.weight', 'head.weight'):
        assert (weights[name].shape == (128, 48) and not weights[name][100:].any()
                and weights[name][:100].any(1).all())
    assert ours(tmp_path)(tokens()).size(-1) == 100


# --- however the folder is written ---

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files_are_read_as_float32(kind, dtype, tmp_path):
    model = theirs(kind).to(dtype)
    model.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / 'model.safetensors').values()} == {dtype}
    assert difference(type(model).from_pretrained(tmp_path, dtype=torch.float32).eval(), tmp_path) < 1e-5


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_shards_are_the_whole(kind, tmp_path):
    theirs(kind).save_pretrained(tmp_path / 'whole')
    theirs(kind).save_pretrained(tmp_path / 'shards', max_shard_size='40KB')
    assert len(list((tmp_path / 'shards').glob('model-*.safetensors'))) > 2
    whole, shards = (reading.load(f'hf:{tmp_path / name}')[1] for name in ('whole', 'shards'))
    assert whole.keys() == shards.keys() and all(torch.equal(whole[name], shards[name]) for name in whole)


def test_the_body_alone_is_enough_for_a_tied_model(tmp_path):
    model = theirs('gpt2')
    model.transformer.save_pretrained(tmp_path)  # names without the prefix, as in openai-community/gpt2
    assert difference(model, tmp_path) < 1e-5


@pytest.mark.parametrize('kind, embedding',
                         [('gpt2', 'transformer.wte.weight'), ('llama', 'model.embed_tokens.weight')])
def test_a_tied_model_may_hold_its_matrix_once_or_twice_under_either_name(kind, embedding, tmp_path):
    model = theirs(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | {'lm_head.weight': t[embedding].clone()})
    assert difference(model, tmp_path) < 1e-5
    rewrite(tmp_path, lambda t: {name: t[name] for name in t if name != embedding})
    assert difference(model, tmp_path) < 1e-5
    rewrite(tmp_path, lambda t: {embedding if name == 'lm_head.weight' else name: t[name] for name in t})
    assert difference(model, tmp_path) < 1e-5
    rewrite(tmp_path, lambda t: t | {'lm_head.weight': t[embedding] + 1})
    assert 'tie_word_embeddings' in refusal(str(tmp_path))


def test_the_buffers_and_fields_of_old_files_are_understood(tmp_path):
    gpt2, llama = (theirs('gpt2'),
                   theirs('llama', rope_parameters={'rope_type': 'default', 'rope_theta': 77.0}))
    gpt2.save_pretrained(tmp_path / 'gpt2')
    llama.save_pretrained(tmp_path / 'llama')
    rewrite(tmp_path / 'gpt2', lambda t: t | {'transformer.h.0.attn.bias': torch.ones(1, 1, 32, 32),
                                              'transformer.h.0.attn.masked_bias': torch.tensor(-1e4)})
    rewrite(tmp_path / 'llama', lambda t: t | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(6)})
    edit(tmp_path / 'llama', rope_parameters=None, rope_scaling=None, rope_theta=77.0, head_dim=None,
         num_key_value_heads=None)
    assert difference(gpt2, tmp_path / 'gpt2') < 1e-5 and difference(llama, tmp_path / 'llama') < 1e-5


# --- names of the hub ---

@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """A server of tiny files in place of the hub; the list of the paths that were asked for."""
    folder = tmp_path / 'server' / 'openai-community' / 'gpt2' / 'resolve' / reading.PINNED['gpt2']
    theirs('gpt2').save_pretrained(folder)
    write_tokenizer(folder)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / 'server')

        def log_message(self, *args):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    yield asked
    server.shutdown()
    server.server_close()


def test_gpt2_is_fetched_once_at_a_pinned_revision(endpoint):
    first, second = reading.load('gpt2')[1], reading.load('gpt2')[1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.rsplit('/', 1)[1] for path in endpoint} == {'config.json', 'model.safetensors',
                                                             'tokenizer.json'}
    assert all(path.startswith('/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/')
               for path in endpoint)
    assert len(os.listdir('data/downloads/hf/gpt2')) == 3
    asked = len(endpoint)
    assert (reading.tokenizer('gpt2')[1] == os.path.join('data', 'downloads', 'hf', 'gpt2')
            and len(endpoint) == asked)


def test_a_file_that_the_server_does_not_have_is_one_line(endpoint):
    assert 'gpt2-xl' in refusal('gpt2-xl')
    assert not [name for _, _, files in os.walk('.') for name in files if not name.endswith('.part')]


# --- tokenizers ---

def write_tokenizer(folder, vocab_size=100):
    """A byte-level BPE of `vocab_size` tokens, as transformers keeps it: tokenizer.json."""
    import tokenizers
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:vocab_size - 1]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, '<|endoftext|>'])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = (tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
                                                  tokenizers.decoders.ByteLevel())
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))


def test_the_tokenizer_of_a_folder_is_read_from_there(tmp_path):
    write_tokenizer(tmp_path)
    description, folder = reading.tokenizer(f'hf:{tmp_path}')
    tokenizer = load_tokenizer(description, folder)
    assert (folder, tokenizer.vocab_size, tokenizer.eot) == (str(tmp_path), 100, 99)
    assert tokenizer.decode(tokenizer.encode('Hello')) == 'Hello'


def test_a_byte_order_mark_before_config_json_and_tokenizer_json_is_taken_off(tmp_path):
    model = theirs('llama', vocab_size=100)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    for name in ('config.json', 'tokenizer.json'):
        (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + (tmp_path / name).read_bytes())
    assert sample.load(f'hf:{tmp_path}')[1].decode([0, 1]) == '!"'


def test_a_folder_that_transformers_reads_is_read_with_numbers_that_are_none_and_fields_twice(tmp_path):
    folder = saved(tmp_path, 'llama')
    text = (tmp_path / 'config.json').read_text()
    odd = '{"hidden_size": 7, "initializer_range": NaN, "unknown": [1e999, -Infinity],' + text.lstrip('{')
    (tmp_path / 'config.json').write_text(odd)
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": 9, "top_p": NaN, "eos_token_id": 2}')
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.config.hidden_size == 48 and difference(model, folder) < 1e-5
    for name in ('rms_norm_eps', 'hidden_size', 'num_hidden_layers'):
        for number in ('NaN', 'Infinity', '-1e999'):
            (tmp_path / 'config.json').write_text(text.rstrip().rstrip('}') + f', "{name}": {number}' + '}')
            with pytest.raises(UserError, match=rf'config.json: .*{name}.*{number}'):
                reading.load(f'hf:{folder}')


def test_sentencepiece_is_read_when_there_is_no_tokenizer_json(tmp_path):
    wanted = train_bpe(['once upon a time there was a cat'] * 20, 300)
    wanted.save(tmp_path)
    assert (load_tokenizer(*reading.tokenizer(f'hf:{tmp_path}')).encode('a cat')
            == wanted.encode('a cat'))


@pytest.mark.parametrize('around, begin', [('! $A', [0]), ('$A', []), ('! $A "', [0]),
                                           ('! " $A', [0, 1]), ('$A <|endoftext|>', [])],
                         ids=['llama', 'gpt2', 'both ends', 'two tokens', 't5'])
def test_a_prompt_begins_as_their_own_tokenizer_begins_it(around, begin, tmp_path):
    import tokenizers
    folder = saved(tmp_path, 'llama')
    write_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    special = [(token, theirs.token_to_id(token)) for token in around.split() if token != '$A']
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single=around, special_tokens=special)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    model, tokenizer = sample.load(f'hf:{folder}')
    assert sample.encode_prompt('ab', tokenizer, model.cfg) == begin + tokenizer.encode('ab')
    # data stay as they were
    assert tokenizer.encode_documents(['ab'])[0].tolist() == [*tokenizer.encode('ab'), tokenizer.eot]


def test_nothing_is_written_into_the_folder(tmp_path):
    saved(tmp_path, 'llama')
    write_tokenizer(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}
    reading.load(f'hf:{tmp_path}')
    load_tokenizer(*reading.tokenizer(f'hf:{tmp_path}'))
    assert before == {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.iterdir()]}


# --- whose data have to have its tokenizer ---

STORIES = ['once upon a time there was a cat who lived in a house by the river'] * 20


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    """
    A folder with weights of 320 tokens and their tokenizer, and data sets: of the same in another format, and
    of another with as many tokens.
    """
    folder = tmp_path_factory.mktemp('llama')
    saved(folder / 'hf', 'llama', vocab_size=320)
    same, other = (train_bpe(STORIES, 320),
                   train_bpe(['the river carried the lamp and the wagon was mended'] * 20, 320))
    (folder / 'hf' / 'spiece.model').write_bytes(same.files['tokenizer.model'])
    (folder / 'same.json').write_text(to_json(same), encoding='utf-8')
    for name, tokenizer in (('same', new_tokenizer(str(folder / 'same.json'))), ('other', other)):
        write_dataset(folder / name, documents=40)
        give_tokenizer(folder / name, tokenizer)
    return folder


SHORT = ['--max_iters=1', '--eval_interval=1', '--eval_iters=1', '--batch_size=2', '--block_size=16',
         '--device=cpu', '--dtype=float32', '--sample_tokens=0']


def test_a_folder_with_spiece_model_alone_is_read(llama):
    assert sample.load(f'hf:{llama}/hf')[1].encode('a cat') == train_bpe(STORIES, 320).encode('a cat')


def test_weights_are_trained_on_data_of_their_own_tokenizer_alone(llama, tmp_path):
    args = ['train.py', *SHORT, f'--init_from=hf:{llama}/hf']
    done = run(*args, f'--dataset={llama}/same', f'--out_dir={tmp_path}/run')
    assert done.returncode == 0 and 'compared' not in done.stdout, done.stderr
    refused = one_line(run(*args, f'--dataset={llama}/other', f'--out_dir={tmp_path}/no'))
    assert (f'another tokenizer than the one of hf:{llama}/hf' in refused
            and f'--tokenizer={llama}/hf/spiece.model' in refused)
    assert not (tmp_path / 'no').exists()
    for more in ([f'--init_from={tmp_path}/run', '--lora_rank=2'],
                 ['--vocab_size=320', f'--teacher=hf:{llama}/hf']):
        refused = one_line(run('train.py', *SHORT, *more, f'--dataset={llama}/other',
                               f'--out_dir={tmp_path}/no'))
        assert 'was prepared with another tokenizer' in refused and not (tmp_path / 'no').exists()
    refused = one_line(run('eval.py', 'loss', f'--out_dir={tmp_path}/run', f'--dataset={llama}/other'))
    assert 'other: was prepared with another tokenizer' in refused
    for command in (['surgery.py', 'inherit', f'--from=hf:{llama}/hf',
                     '--layers=0', f'--out_dir={tmp_path}/no'],
                    ['analyze.py', 'attention', f'--out_dir=hf:{llama}/hf', '--length=16']):
        refused = one_line(run(*command, f'--dataset={llama}/other'))
        assert 'other: was prepared with another tokenizer' in refused


def test_where_there_is_no_tokenizer_to_compare_a_line_says_so(llama, tmp_path):
    saved(tmp_path / 'hf', 'llama', vocab_size=320)
    done = run('train.py', *SHORT, f'--init_from=hf:{tmp_path}/hf', f'--dataset={llama}/other',
               f'--out_dir={tmp_path}/run')
    assert (done.returncode == 0 and done.stdout.count('were not compared') == 1
            and 'no tokenizer.json' in done.stdout), done.stderr


def test_networks_of_different_tokenizers_are_not_averaged(llama, tmp_path):
    for name in ('same', 'other'):
        train(tmp_path / name, '--max_iters=1', dataset=llama / name)
    refused = one_line(run('surgery.py', 'average', f'--from={tmp_path}/same', f'--from={tmp_path}/other',
                           f'--out_dir={tmp_path}/mean'))
    assert f'from={tmp_path}/same: has another tokenizer' in refused and not (tmp_path / 'mean').exists()


def test_an_adapter_with_another_tokenizer_beside_it_is_refused(llama, tmp_path):
    run('train.py', *SHORT, f'--init_from=hf:{llama}/hf', f'--dataset={llama}/same', '--lora_rank=2',
        f'--out_dir={tmp_path}/run')
    done = run('hub.py', 'export', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/peft')
    assert done.returncode == 0, done.stderr
    command = ['sample.py', f'--init_from=hf:{llama}/hf', f'--adapter={tmp_path}/peft', '--num_samples=1',
               '--max_new_tokens=3', '--device=cpu']
    for name, code in (('same.json', 0), ('other', 2)):
        source = llama / name if name == 'same.json' else llama / 'other' / 'tokenizer.model'
        place = tmp_path / 'peft' / ('tokenizer.json' if name == 'same.json' else 'tokenizer.model')
        place.write_bytes(source.read_bytes())
        done = run(*command)
        assert done.returncode == code, done.stderr
        place.unlink()
    assert 'the tokenizer beside it is not that of' in done.stderr


def test_code_beside_a_known_family_is_named_and_not_run(tmp_path, capsys):
    model = theirs('gpt2')
    model.save_pretrained(tmp_path)
    edit(tmp_path, auto_map={'AutoModelForCausalLM': 'own.Code'})
    (tmp_path / 'own.py').write_text('raise SystemExit("was run")')
    assert difference(model, tmp_path) < 1e-5
    assert 'auto_map: names code of its own, which is never run: read as gpt2' in capsys.readouterr().out


# --- what is refused, in one line that names the field or the file ---

@pytest.mark.parametrize('kind, field, value', [
    ('gpt2', 'model_type', 'gptj'), ('gpt2', 'model_type', None),
    ('gpt2', 'model_type', ['gpt2']), ('gpt2', 'activation_function', 'gelu_10'),
    ('gpt2', 'activation_function', 'tanh'), ('gpt2', 'scale_attn_weights', False),
    ('gpt2', 'add_cross_attention', True), ('gpt2', 'n_embd', '48'), ('gpt2', 'n_layer', 0),
    ('gpt2', 'n_layer', True), ('gpt2', 'n_head', 2.0), ('gpt2', 'n_head', None), ('gpt2', 'n_head', 7),
    ('gpt2', 'layer_norm_epsilon', float('nan')), ('gpt2', 'tie_word_embeddings', 'false'),
    ('gpt2', 'quantization_config', {'bits': 4}),
    ('llama', 'hidden_act', 'gelu'), ('llama', 'rope_scaling', {'type': 'longrope', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': 'llama3', 'factor': 8.0}),
    ('llama', 'rope_parameters', {'full_attention': {'rope_type': 'default'}}),
    ('llama', 'rope_scaling', 'linear'), ('llama', 'partial_rotary_factor', 0.5),
    ('llama', 'rope_theta', -1.0), ('llama', 'mlp_bias', True), ('llama', 'rms_norm_eps', '1e-5'),
    ('llama', 'num_key_value_heads', 3), ('llama', 'max_position_embeddings', 10 ** 9),
    ('mistral', 'sliding_window', 0), ('llama', 'rope_theta', float('inf')),
    ('llama', 'rope_theta', 10 ** 400), ('gpt2', 'n_embd', 10 ** 400)], ids=str)
def test_a_field_that_we_cannot_follow_is_named(kind, field, value, tmp_path):
    saved(tmp_path, kind, **({'num_key_value_heads': 2} if kind == 'mistral' else {}))
    edit(tmp_path, **{field: value}, **({'rope_parameters': None} if field == 'rope_theta' else {}))
    line = refusal(str(tmp_path))
    assert ({'num_key_value_heads': 'n_kv_head'}.get(field, field) in line
            and str(tmp_path / 'config.json') in line)


@pytest.mark.parametrize('kind, fields', [
    ('gpt2', dict(n_embd=10 ** 6, n_inner=100)), ('gpt2', dict(n_layer=10 ** 9)),
    ('gpt2', dict(n_layer=2)), ('gpt2', dict(vocab_size=2 * 10 ** 9)),
    ('gpt2', dict(n_positions=2 * 10 ** 9)), ('gpt2', dict(n_inner=2 * 10 ** 9)),
    ('llama', dict(hidden_size=10 ** 9)), ('llama', dict(num_hidden_layers=2 * 10 ** 9)),
    ('llama', dict(intermediate_size=10 ** 9)), ('llama', dict(head_dim=10 ** 6)),
    ('llama', dict(num_attention_heads=4 * 10 ** 8, head_dim=12)), ('llama', dict(num_key_value_heads=2)),
    ('llama', dict(num_attention_heads=2 * 10 ** 9, head_dim=2, hidden_size=2 * 10 ** 9)),
    ('llama', dict(attention_bias=True, mlp_bias=True)), ('llama', dict(tie_word_embeddings=True))], ids=str)
def test_a_config_that_asks_for_other_tensors_than_the_file_holds_is_refused_from_the_headers(
        kind, fields, tmp_path):
    saved(tmp_path, kind)
    edit(tmp_path, **fields)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert str(tmp_path) in refusal(str(tmp_path))
    # KiB
    assert (time.perf_counter() - began < 1
            and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000)


@pytest.mark.parametrize('change, named', [
    (lambda t: {n: t[n] for n in t if n != 'transformer.h.2.mlp.c_fc.bias'}, 'h.2.mlp.c_fc.bias'),
    (lambda t: t | {'transformer.h.1.attn.extra': torch.ones(1)}, 'h.1.attn.extra'),
    (lambda t: t | {'transformer.h.3.ln_1.weight': torch.ones(48)}, 'h.3.ln_1.weight'),
    (lambda t: t | {'ln_f.weight': torch.ones(48)}, 'ln_f.weight'),
    (lambda t: t | {'transformer.h.0.attn.c_proj.weight': torch.ones(48, 47)}, 'h.0.attn.c_proj.weight'),
    (lambda t: t | {'transformer.h.0.mlp.c_fc.weight': torch.ones(192, 48)}, 'h.0.mlp.c_fc.weight'),
    (lambda t: t | {'transformer.wpe.weight': torch.ones(32, 48, dtype=torch.int8)}, 'wpe.weight')],
    ids=['missing', 'unknown', 'a layer too many', 'twice', 'shape', 'transposed', 'dtype'])
def test_every_tensor_is_accounted_for(change, named, tmp_path):
    rewrite(saved(tmp_path), change)
    line = refusal(str(tmp_path))
    assert named in line and str(tmp_path) in line


def test_an_untied_model_without_its_head_is_refused(tmp_path):
    theirs('llama').model.save_pretrained(tmp_path)
    assert 'lm_head.weight' in refusal(str(tmp_path))


def test_pickles_are_not_read_and_how_to_convert_them_is_said(tmp_path):
    model = theirs('gpt2')
    model.config.save_pretrained(tmp_path)
    marker = tmp_path / 'pickle_was_run'

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save(Evil(), tmp_path / 'pytorch_model.bin')
    line = refusal(str(tmp_path))
    assert 'pytorch_model.bin' in line and 'save_pretrained' in line and not marker.exists()


def test_a_folder_that_is_damaged_or_something_else_is_named(tmp_path):
    whole = saved(tmp_path / 'whole')

    def broken(name, file, content):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        (folder / file).write_bytes(content)
        return str(folder)

    weights = (tmp_path / 'whole' / 'model.safetensors').read_bytes()
    for name, file, content in [
            ('cut', 'model.safetensors', weights[:-100]), ('empty', 'model.safetensors', b''),
            ('html', 'model.safetensors', b'<!DOCTYPE html>' * 9),
            ('lfs', 'model.safetensors',
             b'version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 548105171\n'),
            ('json', 'config.json', b'{"model_type": "gpt2",'),
            ('list', 'config.json', b'[]'), ('latin', 'config.json', b'\xff'),
            ('digits', 'config.json', b'{"n_layer": ' + b'9' * 5000 + b'}'),
            ('deep', 'config.json', b'[' * 100_000)]:
        folder = broken(name, file, content)
        assert f'{folder}/{file}' in refusal(folder)
    for name in ('config.json', 'model.safetensors'):
        shutil.copytree(whole, tmp_path / f'no {name}')
        os.remove(tmp_path / f'no {name}' / name)
        assert name in refusal(str(tmp_path / f'no {name}'))
    assert 'no such directory' in refusal(str(tmp_path / 'nowhere'))
    assert 'no such directory' in refusal(str(tmp_path / 'whole' / 'config.json'))


@pytest.mark.parametrize('weight_map', [None, {}, {'a': '../secret.safetensors'}, {'a': '/etc/passwd'},
                                        {'a': 'missing.safetensors'}, {'a': 1}], ids=str)
def test_an_index_that_points_elsewhere_is_refused(weight_map, tmp_path):
    saved(tmp_path / 'model')
    os.rename(tmp_path / 'model' / 'model.safetensors', tmp_path / 'secret.safetensors')
    (tmp_path / 'model' / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    assert str(tmp_path / 'model') in refusal(str(tmp_path / 'model'))


def test_names_that_are_no_folder_and_not_known_are_told_what_there_is():
    assert 'hf:FOLDER' in refusal('gpt2-huge')


# --- from the command line ---

def test_text_from_a_folder_and_one_line_for_a_bad_one(tmp_path):
    saved(tmp_path)
    write_tokenizer(tmp_path)
    command = ['sample.py', f'--init_from=hf:{tmp_path}', '--start=Once', '--num_samples=1',
               '--max_new_tokens=9', '--device=cpu']
    done = run(*command)
    assert done.returncode == 0 and done.stdout.startswith('Once') and not done.stderr, done.stderr
    edit(tmp_path, activation_function='tanh')
    assert 'activation_function' in one_line(run(*command))


# --- what reading costs ---

def test_a_float32_folder_is_read_without_a_copy_and_never_changed(tmp_path):
    folder = saved(tmp_path, 'llama', tie_word_embeddings=True, vocab_size=128)  # no padding
    with open(tmp_path / 'model.safetensors', 'rb') as f:
        before = f.read()
    random = torch.get_rng_state()
    model, _ = load_model(f'hf:{folder}')
    assert torch.equal(torch.get_rng_state(), random)  # nothing was filled that is replaced
    # all of them lie in the mapped file, one after the other
    size = sum(p.nbytes for p in model.parameters())
    begins = min(p.data_ptr() for p in model.parameters())
    assert max(p.data_ptr() + p.nbytes for p in model.parameters()) == begins + size
    assert difference(theirs('llama', tie_word_embeddings=True, vocab_size=128), folder) < 1e-5
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with open(tmp_path / 'model.safetensors', 'rb') as f:
        assert f.read() == before


def test_a_bfloat16_folder_becomes_float32(tmp_path):
    folder = saved(tmp_path, 'llama')
    rewrite(folder, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    model, _ = load_model(f'hf:{folder}')
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_reading_does_not_import_the_compiler(tmp_path):
    """It takes longer than the rest; torch's arithmetic on the meta device imports it."""
    folder = saved(tmp_path, 'llama')
    code = ('import sys; from features.networks import load_model; '
            f'model, _ = load_model("hf:{folder}"); '
            'assert model.rotary.abs().sum() > 0; '
            'print("torch._dynamo" in sys.modules)')
    assert run('-c', code).stdout.split() == ['False']
