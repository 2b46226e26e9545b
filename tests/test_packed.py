"""
Matrices in fewer bits: what is stored is what is said to be, a frozen one is trained through as a dense one
of the same numbers is, and adapters learn the same beside weights kept in the dtype that they are multiplied
in.
"""
import pytest
import torch
from conftest import one_line, read_log, train
from test_lora import adapted, ids, network

import checkpoint
from configurator import build
from features.lora.layers import how_stored
from features.lora.packed import BLOCK, Packed, nf4_pairs, pack, pack_frozen
from train import Settings

QLORA = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
         -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
         0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_the_sixteen_numbers_are_those_of_qlora():
    assert nf4_pairs()[:16, 1].tolist() == pytest.approx(QLORA, abs=1e-6)  # its appendix E
    assert nf4_pairs()[16 * 3 + 9].tolist() == pytest.approx([QLORA[3], QLORA[9]], abs=1e-6)


def test_nf4_takes_four_bits_and_the_nearest_of_sixteen():
    torch.manual_seed(0)
    weight = torch.randn(8, 3 * BLOCK)
    layer = Packed(weight, None, 'float32', 'nf4')
    assert layer.stored.nbytes + layer.scale.nbytes == weight.numel() // 2 + 2 * weight.numel() // BLOCK
    scale = weight.unflatten(1, (3, BLOCK)).abs().amax(2).bfloat16().float().repeat_interleave(BLOCK, 1)
    nearest = (scale[..., None] * torch.tensor(QLORA) - weight[..., None]).abs().amin(-1)
    assert torch.allclose((layer.weight - weight).abs(), nearest, atol=1e-6)
    # of normal numbers
    assert ((layer.weight - weight).norm() / weight.norm()).item() == pytest.approx(0.091, abs=0.01)
    assert torch.equal(Packed(layer.weight, None, 'float32', 'nf4').weight, layer.weight)


@pytest.mark.parametrize('dtype, kind', [('float32', ''), ('bfloat16', ''), ('bfloat16', 'int8')])
def test_nothing_is_unpacked_while_a_network_is_packed(dtype, kind, monkeypatch):
    def fail(layer):
        raise AssertionError('unpacked: for 135M parameters, that took as long as the packing')

    monkeypatch.setattr(Packed, 'dense', fail)
    packed = pack(network(), dtype, kind, eager=True)
    assert any(isinstance(module, Packed) for module in packed.modules())


@pytest.mark.parametrize('kind', ['bfloat16', 'int8', 'nf4'])
@pytest.mark.parametrize('compiled', [False, True])
def test_a_stored_layer_is_trained_through_as_a_dense_one(kind, compiled):
    torch.manual_seed(0)
    layer = Packed(torch.randn(24, BLOCK), torch.nn.Parameter(torch.randn(24)), 'float32', kind)
    x, y = (torch.randn(5, 7, BLOCK, requires_grad=True), torch.randn(5, 7, 24))
    out = (torch.compile(layer) if compiled else layer)(x)
    out.backward(y)
    assert torch.allclose(out, torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    assert (torch.allclose(x.grad, y @ layer.weight, atol=1e-5)
            and torch.allclose(layer.bias.grad, y.sum((0, 1)), atol=1e-5))


@pytest.mark.parametrize('settings', [{}, dict(rank_qk=8, rank_mlp=8),
                                      dict(bias=True, tie=False, n_encoder_layer=1, source_size=16)], ids=str)
@pytest.mark.parametrize('lora', [{}, dict(lora_targets='attn,mlp,embed,head', whole='norm')], ids=str)
def test_stored_as_they_are_multiplied_the_numbers_are_the_same(settings, lora):
    def gradients(store):
        model = adapted(network(**settings | ({'tie': False} if lora.get('whole') else {})),
                        **lora).train()
        if store:
            before = sum(p.nbytes for p in model.parameters())
            pack_frozen(model, 'bfloat16')
            assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) < before
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = model(ids(), ids(seed=2),
                         **({'source': ids(3, 12, 2)} if model.cfg.n_encoder_layer else {}))
        loss.backward()
        return ({name: p.grad for name, p in model.named_parameters() if p.requires_grad}
                | {'loss': loss.detach()})
    dense, stored = gradients(False), gradients(True)
    assert (dense.keys() == stored.keys()
            and all(torch.equal(dense[name], stored[name]) for name in dense if dense[name] is not None))


def test_nothing_that_is_trained_is_rounded():
    model = adapted(network(bias=True), whole=r'mlp.up.weight|bias$', lora_targets='attn')
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    pack_frozen(model, 'int8')
    left = dict(model.named_parameters())
    assert trained.keys() <= left.keys() and all(torch.equal(t, left[name]) for name, t in trained.items())
    assert (all(isinstance(layer, Packed) for layer in (model.blocks[1].attn.q, model.blocks[0].mlp.down))
            and not isinstance(model.blocks[1].mlp.up, Packed))


def test_an_encoder_is_stored_too():
    model = adapted(network(n_encoder_layer=1, source_size=16))
    pack_frozen(model, 'int8')
    assert all(isinstance(layer, Packed)
               for layer in (model.encoder[0].attn.q, model.blocks[0].cross.k, model.blocks[0].mlp.up))


def test_beside_dora_rows_stay_exact():
    assert (how_stored(build(Settings, lora_rank=4, dtype='bfloat16')) == 'bfloat16'
            != how_stored(build(Settings, lora_rank=4, dtype='bfloat16', lora_dora=True)) == 'float32')
    assert how_stored(build(Settings, lora_rank=4, lora_dora=True, lora_store='int8')) == 'int8'


def test_nf4_minds_the_rows_of_what_it_stores_alone():
    model = adapted(network(n_embd=64, n_head=2, rank_mlp=8), lora_targets='attn', whole='mlp')
    pack_frozen(model, 'nf4')
    assert isinstance(model.blocks[0].attn.q, Packed)


# --- in train.py ---

WIDE = ['--n_embd=64']


@pytest.fixture(scope='module')
def base(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp('base') / 'run'
    train(folder, *WIDE, dataset=dataset)
    return str(folder)


def test_a_run_begins_as_its_base_and_ends_the_same_however_exact_numbers_are_kept(tmp_path, base, dataset):
    losses, said = {}, {}
    for store in ('float32', 'auto', 'int8', 'nf4'):
        done = train(tmp_path / store, *WIDE, f'--init_from={base}', '--lora_rank=4', f'--lora_store={store}',
                     '--dtype=bfloat16', dataset=dataset)
        losses[store] = [r['val_loss'] for r in read_log(tmp_path / store) if 'val_loss' in r]
        said[store] = float(done.stdout.split(' MB of weights')[0].split()[-1])
    assert losses['auto'] == losses['float32'] and losses['auto'][-1] < losses['auto'][0] - 0.05
    assert (losses['int8'] == pytest.approx(losses['auto'], abs=0.01)
            and losses['nf4'] == pytest.approx(losses['auto'], abs=0.1))
    assert losses['nf4'][0] != losses['int8'][0] != losses['auto'][0]
    assert said['nf4'] < said['int8'] < said['auto'] < said['float32']
    states = [checkpoint.read_weights(checkpoint.find(str(tmp_path / store), 'last'))
              for store in ('float32', 'auto')]
    assert (states[0].keys() == states[1].keys()
            and all(torch.equal(t, states[1][name]) for name, t in states[0].items()))


def test_a_stored_run_that_was_stopped_ends_bitwise_as_one_that_was_not(tmp_path, base, dataset):
    args = *WIDE, f'--init_from={base}', '--lora_rank=4', '--lora_store=nf4'
    train(tmp_path / 'whole', *args, dataset=dataset)
    train(tmp_path / 'parts', *args, '--max_iters=5', '--lr_decay_iters=10', '--warmup_iters=0',
          dataset=dataset)
    train(tmp_path / 'parts', *args, '--warmup_iters=0', dataset=dataset)
    states = [checkpoint.read_weights(checkpoint.find(str(tmp_path / name), 'last'))
              for name in ('whole', 'parts')]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_rows_that_do_not_fit_are_named(tmp_path, dataset):
    train(tmp_path / 'base', dataset=dataset)  # 32 wide
    done = train(tmp_path / 'run', f'--init_from={tmp_path}/base', '--lora_rank=4', '--lora_store=nf4',
                 dataset=dataset, check=False)
    assert ('lora_store=nf4: blocks.0.attn.q has rows of 32' in one_line(done)
            and not (tmp_path / 'run').exists())
    done = train(tmp_path / 'run', '--lora_store=int8', dataset=dataset, check=False)
    assert 'lora_store=int8: belongs to adapters' in one_line(done)
