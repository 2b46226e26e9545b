"""
PEFT's folders: what PEFT trains speaks here with the same logits, what is trained here speaks in PEFT, and a folder that is not exactly an adapter for
the network is one clear line. The networks are tiny and random.
"""
import warnings

import peft
import pytest
import torch
import transformers
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

import hub
import lora
import peft_files
from lora import LoraConfig
from origin import add_adapters, fill

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings('ignore', module='peft')

ENDS = dict(bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=100, n_positions=32, n_embd=48, n_layer=2, n_head=4, **ENDS)
FAMILIES = {
    'gpt2': (GPT2LMHeadModel, GPT2Config(**GPT2)),
    'gpt_bigcode': (GPTBigCodeForCausalLM, GPTBigCodeConfig(**GPT2)),
    'llama': (LlamaForCausalLM, LlamaConfig(vocab_size=100, max_position_embeddings=32, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2, **ENDS)),
    't5': (T5ForConditionalGeneration, T5Config(vocab_size=100, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_decoder_layers=2, num_heads=4, n_positions=32,
                                                decoder_start_token_id=0)),
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
            p.data = 1 + 0.3 * torch.randn(p.shape) if p.dim() == 1 and name.endswith('weight') else 0.15 * torch.randn(p.shape)
        out[kind] = tmp_path_factory.mktemp('base') / kind
        model.save_pretrained(out[kind])
    return out


def theirs(folder, kind):
    return FAMILIES[kind][0].from_pretrained(folder).eval()


def ours(folder):
    cfg, weights = hub.load(f'hf:{folder}')
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


TARGETS = {'gpt2': ['c_attn', 'c_proj', 'c_fc'], 'gpt_bigcode': ['c_attn', 'c_proj', 'c_fc'], 'llama': ['q_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj'],
           't5': ['q', 'v', 'wi', 'wo']}
TABLE = {'gpt2': ['wte', 'wpe'], 'gpt_bigcode': ['wte', 'wpe'], 'llama': ['embed_tokens', 'lm_head'], 't5': ['embed_tokens']}
VARIANTS = {
    'plain': {}, 'rslora': {'use_rslora': True}, 'dora': {'use_dora': True},
    'patterns': {'rank_pattern': {'c_fc': 2, 'q_proj': 2, 'decoder.*.q': 2}, 'alpha_pattern': {r'.*0\..*': 3}}, 'tables': {},
    'biases': {'bias': 'lora_only'}, 'all biases': {'bias': 'all'},
    'tokens': {'trainable_token_indices': [5, 9]},
}


def adapted_by_peft(folders, kind, variant):
    targets = TARGETS[kind] + (TABLE[kind] if variant == 'tables' else [])
    task = 'SEQ_2_SEQ_LM' if kind == 't5' else 'CAUSAL_LM'
    torch.manual_seed(1)
    options = VARIANTS[variant]
    if variant == 'tokens' and kind in ('gpt2', 'gpt_bigcode'):
        options = {'trainable_token_indices': {'wte': [5, 9]}}
    if variant == 'tokens' and kind == 't5':
        options = {'trainable_token_indices': {'shared': [5, 9]}}
    model = peft.get_peft_model(theirs(folders[kind], kind), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task,
                                                                              fan_in_fan_out=kind == 'gpt2', **options)).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('kind', FAMILIES)
def test_what_peft_trains_speaks_here(folders, tmp_path, kind, variant):
    if variant == 'tokens' and kind == 't5':
        pytest.skip('PEFT has no such rows in T5')
    model = adapted_by_peft(folders, kind, variant)
    model.save_pretrained(tmp_path / 'adapter')
    mine = ours(folders[kind])
    _, base = same(mine, model, kind)
    add_adapters(mine, [f'x={tmp_path}/adapter'], str(folders[kind]))
    wanted, found = same(mine, model, kind)
    assert_equal(found, wanted, base)


SETTINGS = {
    'plain': {}, 'rslora': {'lora_rs': True}, 'dora': {'lora_dora': True}, 'tokens': {'lora_tokens': [5, 9]}, 'pissa': {'lora_pissa': True},
    'patterns': {'lora_ranks': {'mlp': 2, r'blocks.1.attn': 3}, 'lora_alphas': {r'\.0\.': 3}}, 'tables': {'lora_targets': 'attn,mlp,embed'},
    'some': {'lora_targets': 'q,v', 'lora_layers': '1:'}, 'fused': {'lora_targets': 'c_attn,c_proj'}, 'norms': {'lora_whole': 'norm'},
    'biases': {'lora_bias': 'lora_only'}, 'all biases': {'lora_bias': 'all'},
}


@pytest.mark.parametrize('variant', SETTINGS)
@pytest.mark.parametrize('kind', FAMILIES)
def test_what_is_trained_here_speaks_in_peft(folders, tmp_path, kind, variant):
    if kind in ('llama', 't5') and (variant == 'fused' or 'biases' in variant) or kind == 't5' and variant == 'tokens':
        pytest.skip('they have no such thing')
    mine, s = ours(folders[kind]), LoraConfig(**{'lora_rank': 4, 'lora_alpha': 6.0} | SETTINGS[variant])
    other = theirs(folders[kind], kind)
    base, _ = same(mine, other, kind)
    torch.manual_seed(2)
    lora.begin(mine, s)
    for p in mine.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    peft_files.write(str(tmp_path / 'adapter'), mine.cfg, lora.take(mine), kind)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*(issing|nexpected|ismatch).*')  # PEFT only warns of it
        model = peft.PeftModel.from_pretrained(other, tmp_path / 'adapter').eval()
    wanted, found = same(mine, model, kind)
    assert_equal(found, wanted, base)
    again = ours(folders[kind])
    add_adapters(again, [str(tmp_path / 'adapter')], str(folders[kind]))
    assert_equal(same(again, model, kind)[1], found, base)
