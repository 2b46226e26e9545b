"""
A folder as llama2.c's authors give it, model.bin and tokenizer.bin: the logits are those of its network, and
it does what a Hugging Face folder does.
"""
import struct

import pytest
import torch
import transformers
from conftest import one_line, run
from test_tokenizer import LONG, llama2c_encode, read_llama2c, write_llama2c

import sample
from configurator import UserError
from features.hf import reading
from features.networks import fill
from sample import encode_prompt, generate
from tokenizer import new_tokenizer

SIZES = dict(dim=48, hidden=80, layers=3, heads=6, kv_heads=3, vocab=500, context=64)


def random_tensors(dim, hidden, layers, heads, kv_heads, vocab, context):
    """The tensors of a model.bin in its order; vocab < 0: with a head of its own."""
    torch.manual_seed(0)
    kv = dim // heads * kv_heads
    shapes = dict(
        embed=(abs(vocab), dim), norm_1=(layers, dim), q=(layers, dim, dim), k=(layers, kv, dim),
        v=(layers, kv, dim), o=(layers, dim, dim), norm_2=(layers, dim), w1=(layers, hidden, dim),
        w2=(layers, dim, hidden), w3=(layers, hidden, dim), norm=(dim,), cos=(context, dim // heads // 2),
        sin=(context, dim // heads // 2), head=(abs(vocab) if vocab < 0 else 0, dim))
    return {name: 1 + 0.3 * torch.randn(shape) if 'norm' in name else 0.3 * torch.randn(shape)
            for name, shape in shapes.items()}


def write_model(path, **changed):
    sizes = SIZES | changed
    tensors = random_tensors(**sizes)
    numbers = torch.cat([t.flatten() for t in tensors.values()]).numpy()
    path.write_bytes(struct.pack('<7i', *sizes.values()) + numbers.astype('<f4').tobytes())
    return tensors


def rms(x, weight):
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def turned(x):
    """x (T, H, D): neighbours turned by their angles, as run.c turns them."""
    T, _, D = x.shape
    angles = torch.outer(torch.arange(T), 10000.0 ** (-torch.arange(0, D, 2) / D))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def llama2c_logits(tensors, ids, heads, kv_heads):
    """The network of run.c, all tokens at once: ids (T,) → (T, V)."""
    x, T = tensors['embed'][ids], len(ids)
    for n in range(len(tensors['q'])):
        part = {name: t[n] for name, t in tensors.items() if name not in ('embed', 'norm', 'head')
                and t.dim() > 1 and len(t) == len(tensors['q'])}
        h = rms(x, part['norm_1'])
        q, k, v = ((h @ part[name].T).view(T, count, -1)
                   for name, count in (('q', heads), ('k', kv_heads), ('v', kv_heads)))
        q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum('thd,shd->hts', q, k) / q.size(-1) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum('hts,shd->thd', scores, v).flatten(1) @ part['o'].T
        h = rms(x, part['norm_2'])
        x = x + (torch.nn.functional.silu(h @ part['w1'].T) * (h @ part['w3'].T)) @ part['w2'].T
    head = tensors['head'] if len(tensors['head']) else tensors['embed']
    return rms(x, tensors['norm']) @ head.T


@pytest.fixture(scope='module')
def tokenizer_bin(tmp_path_factory):
    import io

    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LONG.split('\n')), model_writer=model, minloglevel=2, model_type='bpe',
        vocab_size=500, byte_fallback=True, normalization_rule_name='identity',
        remove_extra_whitespaces=False)
    folder = tmp_path_factory.mktemp('tok')
    write_llama2c(folder, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    return folder / 'tok500.bin'


@pytest.fixture
def folder(tokenizer_bin, tmp_path):
    folder = tmp_path / 'stories'
    folder.mkdir()
    write_model(folder / 'stories.bin')
    (folder / 'tok500.bin').write_bytes(tokenizer_bin.read_bytes())
    return folder


@torch.no_grad()
@pytest.mark.parametrize('changed', [{}, dict(vocab=-500), dict(kv_heads=6), dict(kv_heads=1)], ids=str)
def test_logits_are_those_of_llama2c(changed, tmp_path):
    tensors = write_model(tmp_path / 'model.bin', **changed)
    cfg, weights = reading.load(f'hf:{tmp_path}')
    model = fill(cfg, weights, 'test')
    ids = torch.randint(500, (64,), generator=torch.Generator().manual_seed(1))
    wanted = llama2c_logits(tensors, ids, cfg.n_head, cfg.kv_heads)
    found = model(ids[None])[0]
    assert wanted.std() > 0.3 and (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert cfg.block_size == 64 and cfg.tie == (changed.get('vocab', 1) > 0)


@torch.no_grad()
def test_it_writes_greedily_what_llama2c_writes(folder):
    model, tokenizer = sample.load(f'hf:{folder}')
    tensors = random_tensors(**SIZES)
    pieces, scores = read_llama2c(folder / 'tok500.bin')
    wanted = [1, *llama2c_encode('One day', pieces, scores)]
    assert encode_prompt('One day', tokenizer, model.cfg) == wanted
    assert tokenizer.ends() == (1, 2)  # <s> stood between the stories
    prompt = list(wanted)
    for _ in range(50 - len(prompt)):
        wanted.append(int(llama2c_logits(tensors, wanted, 6, 3)[-1].argmax()))
    found = torch.cat(list(generate(model, [prompt], 50 - len(prompt), temperature=0))).tolist()
    assert prompt + found == wanted


def test_a_folder_of_llama2c_does_what_others_do(folder, tmp_path):
    """Sampled, trained on data of its tokenizer, exported, and read by transformers."""
    text = tmp_path / 'text.txt'
    text.write_text('One day, a little girl named Lily found a needle.\n' * 100)
    commands = [
        ['prepare.py', text, f'--tokenizer={folder}/tok500.bin', f'--out={tmp_path}/data'],
        ['train.py', f'--init_from=hf:{folder}', f'--dataset={tmp_path}/data', f'--out_dir={tmp_path}/run',
         '--block_size=32', '--batch_size=2', '--max_iters=2', '--eval_iters=1', '--sample_tokens=4',
         '--device=cpu', '--dtype=float32'],
        ['sample.py', f'--init_from=hf:{folder}', '--start=One day', '--max_new_tokens=5'],
        ['hub.py', 'export', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/back']]
    for command in commands:
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'back')
    ours = sample.load(f'{tmp_path}/run')[1]
    for text in ('One day, Lily', 'ab\n  c', 'é中😀'):
        assert theirs(text).input_ids == [1, *ours.encode(text)]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'back')
    assert model.generation_config.eos_token_id == [1, 2]
    assert new_tokenizer(str(tmp_path / 'data' / 'tokenizer.bin')).describe() == ours.describe()


def test_what_is_not_read_is_refused_in_one_line(folder):
    data = (folder / 'stories.bin').read_bytes()
    (folder / 'stories.bin').write_bytes(b'24ka' + data)
    done = run('sample.py', f'--init_from=hf:{folder}')
    assert 'stories.bin: a later format of llama2.c: write it with' in one_line(done)
    (folder / 'stories.bin').write_bytes(data[:-4])
    assert 'no such file' in one_line(run('sample.py', f'--init_from=hf:{folder}')).lower()
    for name in ('stories.bin', 'other.bin'):
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match='2 networks of llama2.c in it'):
        reading.load(f'hf:{folder}')
