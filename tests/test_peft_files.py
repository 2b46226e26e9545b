"""
PEFT's folders: what PEFT trains speaks here with the same logits, what is trained here speaks in PEFT, and a
folder that is not exactly an adapter for the network is one clear line. The networks are tiny and random.
"""
import json
import warnings

import peft
import pytest
import torch
import transformers
from conftest import one_line, run
from safetensors.torch import load_file, save_file
from test_lora import adapted, uneven
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from configurator import UserError
from features.hf import reading
from features.lora import adapters, peft_files
from features.lora.load import add_adapters
from features.networks import fill, load_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings('ignore', module='peft')

ENDS = dict(bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=100, n_positions=32, n_embd=48, n_layer=2, n_head=4, **ENDS)
FAMILIES = {
    'gpt2': (GPT2LMHeadModel, GPT2Config(**GPT2)),
    'gpt_bigcode': (GPTBigCodeForCausalLM, GPTBigCodeConfig(**GPT2)),
    'llama': (LlamaForCausalLM,
              LlamaConfig(vocab_size=100, max_position_embeddings=32, hidden_size=48, intermediate_size=80,
                          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **ENDS)),
    't5': (T5ForConditionalGeneration,
           T5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_decoder_layers=2,
                    num_heads=4, n_positions=32, decoder_start_token_id=0)),
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{family: folder of a random model of transformers}."""
    torch.set_num_threads(1)
    out = {}
    for kind, (cls, config) in FAMILIES.items():
        torch.manual_seed(0)
        model = cls(config).eval()
        for name, p in model.named_parameters():
            p.data = (1 + 0.3 * torch.randn(p.shape) if p.dim() == 1 and name.endswith('weight')
                      else 0.15 * torch.randn(p.shape))
        out[kind] = tmp_path_factory.mktemp('base') / kind
        model.save_pretrained(out[kind])
    return out


def theirs(folder, kind):
    return FAMILIES[kind][0].from_pretrained(folder).eval()


def ours(folder):
    cfg, weights = reading.load(f'hf:{folder}')
    return fill(cfg, weights, folder)


@torch.no_grad()
def same(model, other, kind):
    """Both their logits, of theirs and of ours."""
    x, source = (torch.randint(3, 100, (2, n), generator=torch.Generator().manual_seed(n)) for n in (14, 11))
    if kind == 't5':
        return other(input_ids=source, decoder_input_ids=x).logits, model(x, source=source)
    return other(input_ids=x).logits, model(x)


def assert_equal(found, wanted, base):
    assert (wanted - base).abs().max() > 0.01 * wanted.abs().max()  # the adapter says something
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


TARGETS = {'gpt2': ['c_attn', 'c_proj', 'c_fc'], 'gpt_bigcode': ['c_attn', 'c_proj', 'c_fc'],
           'llama': ['q_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj'], 't5': ['q', 'v', 'wi', 'wo']}
TABLE = {'gpt2': ['wte', 'wpe'], 'gpt_bigcode': ['wte', 'wpe'], 'llama': ['embed_tokens', 'lm_head'],
         't5': ['embed_tokens']}
VARIANTS = {
    'plain': {}, 'rslora': {'use_rslora': True}, 'dora': {'use_dora': True}, 'patterns': {
        'rank_pattern': {'c_fc': 2, 'q_proj': 2, 'decoder.*.q': 2}, 'alpha_pattern': {r'.*0\..*': 3}},
    'tables': {}, 'biases': {'bias': 'lora_only'}, 'all biases': {'bias': 'all'},
    'tokens': {'trainable_token_indices': [5, 9]}, 'whole': {},
    'whole head': {'modules_to_save': ['lm_head']},
}
WHOLE = {'gpt2': ['wte', 'mlp.c_fc', 'ln_1'], 'gpt_bigcode': ['wte', 'lm_head', 'mlp.c_fc'],
         'llama': ['embed_tokens', 'gate_proj', 'norm'], 't5': ['wo', 'layer_norm']}


def adapted_by_peft(folders, kind, variant):
    targets = TARGETS[kind] + (TABLE[kind] if variant == 'tables' else [])
    task = 'SEQ_2_SEQ_LM' if kind == 't5' else 'CAUSAL_LM'
    torch.manual_seed(1)
    options = VARIANTS[variant]
    if variant == 'tokens' and kind in ('gpt2', 'gpt_bigcode'):
        options = {'trainable_token_indices': {'wte': [5, 9]}}
    if variant == 'whole':
        options = {'modules_to_save': WHOLE[kind]}
        targets = [target for target in targets if target not in ('c_fc', 'wo')]
    model = peft.get_peft_model(theirs(folders[kind], kind),
                                peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task,
                                                fan_in_fan_out=kind == 'gpt2', **options)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('kind', FAMILIES)
def test_what_peft_trains_speaks_here(folders, tmp_path, kind, variant):
    if variant in ('tokens', 'whole head') and kind == 't5':
        pytest.skip('PEFT has no such rows in T5, and its head is its embedding')
    model = adapted_by_peft(folders, kind, variant)
    model.save_pretrained(tmp_path / 'adapter')
    mine = ours(folders[kind])
    _, base = same(mine, model, kind)
    add_adapters(mine, [f'x={tmp_path}/adapter'], str(folders[kind]))
    wanted, found = same(mine, model, kind)
    assert_equal(found, wanted, base)


SETTINGS = {
    'plain': {}, 'rslora': {'lora_rs': True}, 'dora': {'lora_dora': True},
    'tokens': {'tokens': [5, 9]}, 'uneven': {'places': uneven},
    'tables': {'lora_targets': 'attn,mlp,embed'}, 'fused': {'lora_targets': 'c_attn,c_proj'},
    'norms': {'whole': 'norm'}, 'matrices': {'lora_targets': 'attn', 'whole': r'mlp\.up'},
    'embedding': {'lora_targets': 'attn', 'whole': r'wte\.weight'},
    'biases': {'whole': r'(attn|mlp).*\.bias'}, 'all biases': {'whole': r'\.bias'},
}


@pytest.mark.parametrize('variant', SETTINGS)
@pytest.mark.parametrize('kind', FAMILIES)
def test_what_is_trained_here_speaks_in_peft(folders, tmp_path, kind, variant):
    if (kind in ('llama', 't5') and (variant == 'fused' or 'biases' in variant)
            or kind == 't5' and variant in ('tokens', 'embedding')):
        pytest.skip('they have no such thing')
    mine = ours(folders[kind])
    other = theirs(folders[kind], kind)
    base, _ = same(mine, other, kind)
    torch.manual_seed(2)
    adapted(mine, **{'lora_alpha': 6.0} | SETTINGS[variant])
    peft_files.write(str(tmp_path / 'adapter'), mine.cfg, adapters.take(mine), kind)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*(issing|nexpected|ismatch).*')  # PEFT only warns of it
        model = peft.PeftModel.from_pretrained(other, tmp_path / 'adapter').eval()
    wanted, found = same(mine, model, kind)
    assert_equal(found, wanted, base)
    again = ours(folders[kind])
    add_adapters(again, [str(tmp_path / 'adapter')], str(folders[kind]))
    assert_equal(same(again, model, kind)[1], found, base)


# --- folders that are not exactly an adapter for the network ---

@pytest.fixture(scope='module')
def good(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp('good') / 'adapter'
    adapted_by_peft(folders, 'gpt2', 'plain').save_pretrained(folder)
    return folder


A, B = (f'base_model.model.transformer.h.0.attn.c_attn.lora_{factor}.weight' for factor in 'AB')


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def put(name, *shape):
    return lambda tensors, config: tensors.update({name: torch.zeros(*shape)})


def say(**fields):
    return lambda tensors, config: config.update(fields)


@pytest.mark.parametrize('change, words', [
    (drop(A), 'transformer.h.0.attn.c_attn.lora_A.weight: not in the file'),
    (drop(B), 'transformer.h.0.attn.c_attn.lora_B.weight: not in the file'),
    (put(A, 4, 64), 'lora_A.weight: [4, 64], this network takes'),
    (put(B, 144, 8), 'lora_B.weight: [144, 8], this network takes'),
    (put(A.replace('h.0', 'h.7'), 4, 48), 'transformer.h.7.attn.c_attn: no family that we know'),
    (put(A.replace('lora_A', 'lora_E'), 4), 'lora_E.weight: this model has no such tensor'),
    (say(peft_type='IA3'), "peft_type='IA3': takes LORA"), (say(r=8), 'has rank 4, the file says 8'),
    (say(init_lora_weights='pissa'), "init_lora_weights='pissa': this takes a part out of the base"),
    (say(lora_alpha='x'), "lora_alpha='x': is invalid in PEFT"),
    (say(rank_pattern={'(': 2}), "'(' is not a valid pattern"),
    (say(alpha_pattern={'c_attn': 'x'}), "lora_alpha='x': takes a number"),
    (say(trainable_token_indices=[100]), 'trainable_token_indices=[100]: takes tokens from 0 to 99'),
    (say(use_dora=True), 'lora_magnitude_vector: not in the file'),
    (say(trainable_token_indices={'wte': 5}), "{'wte': 5}: takes tokens"),
    (say(target_modules=[5]), 'target_modules=[5]'), (say(lora_dropout=5.0), 'lora_dropout=5.0'),
    (say(modules_to_save=['ln_f']), 'modules_to_save=ln_f: not in'),
    (put('base_model.model.transformer.ln_f.modules_to_save.weight', 48),
     'modules_to_save.weight: this model has no such tensor'),
    (put('base_model.model.transformer.h.0.attn.c_attn.base_layer.bias', 10),
     'c_attn.base_layer.bias: [10], this network takes [144]'),
    (say(layers_to_transform=[0]), 'h.1.attn.c_attn.lora_A.weight: this model has no such tensor'),
    (lambda tensors, config: tensors[A].fill_(float('nan')), 'lora_A.weight: holds NaN or infinity'),
    (say(target_modules=['c_attn', 'c_proj', 'c_fc', 'wte']), 'transformer.wte.lora_embedding_A: '
     'not in the file'), (say(layer_replication=[[0, 1]]), 'layer_replication=[[0, 1]]'),
])
def test_folders_that_are_no_adapter_for_the_network_are_one_line(folders, good, tmp_path, change, words):
    tensors, config = (load_file(good / 'adapter_model.safetensors'),
                       json.loads((good / 'adapter_config.json').read_text()))
    change(tensors, config)
    save_file(tensors, tmp_path / 'adapter_model.safetensors')
    (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        add_adapters(ours(folders['gpt2']), [f'x={tmp_path}'], str(folders['gpt2']))
    assert (words in str(refused.value) and str(tmp_path) in str(refused.value)
            and '\n' not in str(refused.value))


@pytest.mark.parametrize('change', [put(A, 10 ** 6, 48), put(A, 4, 10 ** 6),
                                    put(A.replace('lora_A', 'lora_B'), 10 ** 6, 4),
                                    put(A.replace('lora_A', 'lora_C'), 10 ** 6),
                                    put('base_model.model.transformer.ln_f.weight', 10 ** 6)], ids=range(5))
def test_shapes_are_compared_before_a_tensor_is_read(folders, good, tmp_path, monkeypatch, change):
    tensors, float32 = load_file(good / 'adapter_model.safetensors'), torch.Tensor.float
    change(tensors, {})
    save_file({name: t.half() for name, t in tensors.items()}, tmp_path / 'adapter_model.safetensors')
    (tmp_path / 'adapter_config.json').write_bytes((good / 'adapter_config.json').read_bytes())
    read = []
    monkeypatch.setattr(torch.Tensor, 'float', lambda t: read.append(t.numel()) or float32(t))
    with pytest.raises(UserError):
        peft_files.read(str(tmp_path), ours(folders['gpt2']).cfg)
    assert max(read, default=0) < 10 ** 6


def test_integers_are_no_adapter(folders, good, tmp_path):
    tensors = load_file(good / 'adapter_model.safetensors')
    save_file({name: t.int() for name, t in tensors.items()}, tmp_path / 'adapter_model.safetensors')
    (tmp_path / 'adapter_config.json').write_bytes((good / 'adapter_config.json').read_bytes())
    with pytest.raises(UserError, match='I32, takes float32, float16 or bfloat16'):
        peft_files.read(str(tmp_path), ours(folders['gpt2']).cfg)


def test_files_that_are_not_what_their_name_says(folders, good, tmp_path):
    model = ours(folders['gpt2'])
    for name, text, words in (('adapter_config.json', '{', 'not readable as JSON'),
                              ('adapter_model.safetensors', 'x', 'not readable as safetensors')):
        for each in ('adapter_config.json', 'adapter_model.safetensors'):
            (tmp_path / each).write_bytes((good / each).read_bytes())
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=words):
            add_adapters(model, [f'x={tmp_path}'], '')
    with pytest.raises(UserError, match='no such directory'):
        add_adapters(model, [f'x={tmp_path}/none'], '')
    with pytest.raises(UserError, match='this network takes'):
        adapter = adapted_by_peft(folders, 'llama', 'plain')
        adapter.save_pretrained(tmp_path / 'llama')
        add_adapters(model, [f'x={tmp_path}/llama'], '')


def test_what_has_no_place_in_peft_is_named_and_nothing_is_written(folders, tmp_path):
    mine = ours(folders['gpt2'])
    adapted(mine, lora_rank=2, lora_targets='attn', whole='attn.o.weight')
    with pytest.raises(UserError, match='blocks.0.attn.o.weight: is trained fully, which PEFT does not'):
        peft_files.write(str(tmp_path / 'out'), mine.cfg, adapters.take(mine), 'gpt2')
    mine.cfg.softcap = 3.0
    with pytest.raises(UserError, match='softcap=3.0: no class of transformers has this'):
        peft_files.family_of(mine.cfg, 'out/run')
    assert not any(tmp_path.iterdir())


def test_a_run_is_exported_and_speaks_in_peft(folders, dataset, tmp_path):
    base, settings = folders['gpt2'], ['--learning_rate=3e-2', '--max_iters=4', '--eval_interval=4',
                                       '--eval_iters=1', '--sample_tokens=0']
    done = run('train.py', f'--init_from=hf:{base}', f'--dataset={dataset}', f'--out_dir={tmp_path}/run',
               '--lora_rank=4', '--lora_targets=c_attn,mlp', *settings)
    assert done.returncode == 0, done.stderr
    done = run('hub.py', 'export', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/adapter')
    assert done.returncode == 0 and f'--adapter={tmp_path}/adapter' in done.stdout, done.stderr
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base),
                                            tmp_path / 'adapter').eval()
    ids = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said, ours = theirs(ids).logits, load_model(str(tmp_path / 'run'))[0](ids)
        plain = GPT2LMHeadModel.from_pretrained(base).eval()(ids).logits
    assert (torch.allclose(ours, said, atol=1e-5 * said.abs().max())
            and not torch.allclose(plain, said, atol=1e-3))
    one = one_line(run('hub.py', 'export', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/half',
                       '--dtype=bfloat16'))
    assert 'an adapter, which is exported to PEFT in float32' in one and not (tmp_path / 'half').exists()


# --- tables of another size, and those that are one matrix in the base ---

def folder_of(tmp_path, kind, resize=0, **options):
    """(folder of a base, PEFT's model, folder of its adapter); resize: more tokens than the base has."""
    config = type(FAMILIES[kind][1])(**FAMILIES[kind][1].to_dict() | options.pop('config', {}))
    torch.manual_seed(0)
    base = FAMILIES[kind][0](config)
    for p in base.parameters():
        if p.ndim > 1:
            p.data = 0.15 * torch.randn(p.shape)
    base.save_pretrained(tmp_path / 'base')
    base = FAMILIES[kind][0].from_pretrained(tmp_path / 'base').eval()
    if resize:
        base.resize_token_embeddings(100 + resize, mean_resizing=False)
    options = {'r': 4, 'target_modules': TARGETS[kind][:1], 'fan_in_fan_out': kind == 'gpt2'} | options
    task = 'SEQ_2_SEQ_LM' if kind == 't5' else 'CAUSAL_LM'
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, **options)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(tmp_path / 'adapter')
    return str(tmp_path / 'base'), model, str(tmp_path / 'adapter')


TIED = {'tie_word_embeddings': True}


@pytest.mark.parametrize('kind, options', [
    ('llama', dict(config=TIED, modules_to_save=['embed_tokens'])),
    ('llama', dict(config=TIED, modules_to_save=['lm_head'])),
    ('llama', dict(config=TIED, modules_to_save=['embed_tokens', 'lm_head'])),
    ('llama', dict(config=TIED, modules_to_save=['embed_tokens'], ensure_weight_tying=True)),
    ('llama', dict(config=TIED, target_modules=['q_proj', 'lm_head'])),
    ('llama', dict(config=TIED, resize=3)), ('llama', dict(resize=-7)), ('t5', dict(resize=3)),
    ('t5', dict(config={'scale_decoder_outputs': False, 'vocab_size': 128}, target_modules=['q', 'lm_head'])),
    ('gpt2', dict(resize=30, target_modules=['wte', 'c_attn']))], ids=str)
def test_tables_that_are_tied_or_resized(tmp_path, kind, options):
    base, model, adapter = folder_of(tmp_path, kind, **options)
    mine = ours(base)
    torch.manual_seed(3)
    add_adapters(mine, [adapter], base)
    x = torch.randint(90, (2, 14))
    read = {'input_ids': x} | ({'decoder_input_ids': x} if kind == 't5' else {})
    with torch.no_grad():
        wanted = model(**read).logits
        assert (mine(x, source=x) if kind == 't5' else mine(x)).shape == wanted.shape
        for merged in (False, True):
            if merged and not adapters.obstacle(mine):
                adapters.merge(mine)
            found = mine(x, source=x) if kind == 't5' else mine(x)
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize('options, words', [
    (dict(target_modules=['q', 'shared']), "shared: PEFT's changes to it have no effect"),
    (dict(modules_to_save=['shared']), "shared: PEFT's changes to it have no effect"),
    (dict(target_modules=['q', 'lm_head']), 'lm_head: the head of this network is its embedding')], ids=str)
def test_tables_of_t5_that_peft_does_not_change(tmp_path, options, words):
    base, _, adapter = folder_of(tmp_path, 't5', **options)
    with pytest.raises(UserError, match=words):
        add_adapters(ours(base), [adapter], base)


def renamed(change):
    return lambda tensors: {change(name): t for name, t in tensors.items()}


def without(part):
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


@pytest.mark.parametrize('options, change, words', [
    (dict(target_modules=r'.*(q|v)_proj'), without('layers.0'), '0.self_attn.q_proj.lora_A.weight: not in'),
    (dict(target_modules='all-linear'), without('layers.1.mlp.up'), '1.mlp.up_proj.lora_A.weight: not in'),
    ({}, renamed(lambda name: '_orig_mod.' + name), 'has the prefix _orig_mod. of torch.compile: save'),
    ({}, renamed(lambda name: name.replace('model.layers', 'module.model.layers')), 'the prefix module. of'),
    (dict(modules_to_save=['norm']), without('model.norm'), 'modules_to_save=norm: not in'),
], ids=lambda value: '' if callable(value) else str(value))
def test_files_that_lack_a_layer_or_have_other_names(tmp_path, options, change, words):
    base, _, adapter = folder_of(tmp_path, 'llama', **options)
    path = f'{adapter}/adapter_model.safetensors'
    save_file(change(load_file(path)), path)
    if 'all-linear' in options.values():  # PEFT writes the names in its place
        config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
        (tmp_path / 'adapter/adapter_config.json').write_text(json.dumps(config | options))
    with pytest.raises(UserError, match=words):
        add_adapters(ours(base), [adapter], base)


def test_a_pickle_and_fields_that_nobody_knows_are_named(tmp_path):
    base, _, adapter = folder_of(tmp_path, 'llama')
    config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
    (tmp_path / 'adapter/adapter_config.json').write_text(json.dumps(config | {'new_option': {'x': 1}}))
    with pytest.raises(UserError, match="new_option={'x': 1}: minnow does not know this"):
        add_adapters(ours(base), [adapter], base)
    (tmp_path / 'adapter/adapter_config.json').write_text(json.dumps(config))
    (tmp_path / 'adapter/adapter_model.safetensors').rename(tmp_path / 'adapter/adapter_model.bin')
    with pytest.raises(UserError, match='adapter_model.bin: is a pickle, which can run code, and is not'):
        add_adapters(ours(base), [adapter], base)


def test_biases_that_are_missing_are_named(tmp_path):
    base, _, adapter = folder_of(tmp_path, 'gpt2', bias='all')
    path = f'{adapter}/adapter_model.safetensors'
    save_file(without('h.1.mlp.c_fc.bias')(load_file(path)), path)
    with pytest.raises(UserError, match="h.1.mlp.c_fc.bias: not in the file, which says bias='all'"):
        add_adapters(ours(base), [adapter], base)


def test_positions_of_a_shorter_context(folders, dataset, tmp_path):
    """Trained at 16 of 32 positions: PEFT gets an A for all of them, and we read it again."""
    base = folders['gpt2']
    done = run('train.py', f'--init_from=hf:{base}', f'--dataset={dataset}', f'--out_dir={tmp_path}/run',
               '--lora_rank=4', '--lora_targets=attn,wpe', '--block_size=16', '--learning_rate=3e-2',
               '--max_iters=4', '--eval_interval=4', '--eval_iters=1', '--sample_tokens=0')
    assert done.returncode == 0, done.stderr
    assert run('hub.py', 'export', f'--out_dir={tmp_path}/run', f'--to={tmp_path}/adapter').returncode == 0
    model = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), tmp_path / 'adapter').eval()
    x = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    trained, mine = load_model(str(tmp_path / 'run'))[0], ours(base)
    add_adapters(mine, [str(tmp_path / 'adapter')], str(base))
    with torch.no_grad():
        wanted = trained(x)
        assert (model(x).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (mine(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        longer = torch.randint(100, (2, 32))
        assert torch.allclose(model(longer).logits, mine(longer), atol=1e-4)
