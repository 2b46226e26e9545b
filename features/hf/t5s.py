"""
The families of transformers with T5's layout: an encoder-decoder with relative positions.

    t5           T5, Flan-T5
    mt5          mT5: T5 whose head is never scaled; load only, exported as T5, which is the same network
    umt5         UMT5: T5 with a position bias in every layer

For each: X_config reads config.json, X_fields writes it, X_names maps its modules to ours, and X_wants gives
the settings that it needs (families.Family).
"""
from features import build
from model import ModelConfig

KINDS = ('t5', 'mt5', 'umt5')
MLP = {  # feed_forward_proj: our mlp
    'relu': 'relu',
    'gated-gelu': 'geglu',
    'gated-silu': 'swiglu',
}


def t5_config(config):
    from features.t5.positions import BUCKETS, FURTHEST  # t5
    config.one_of('relative_attention_num_buckets', BUCKETS)
    config.one_of('relative_attention_max_distance', FURTHEST)
    config.one_of('is_encoder_decoder', True)
    layers = config.size('num_layers')
    context = config.size('n_positions', 512)
    if context > 2 ** 20:
        config.refuse('n_positions', context, 'takes up to 1048576: lower it to the context that you use')
    # T5's head is its embedding. T5 1.1 and Flan-T5 have a head of their own and do not scale its logits;
    # transformers 5 calls that scale_decoder_outputs
    tie = config.one_of('tie_word_embeddings', True, False)
    tie = config.one_of('scale_decoder_outputs', tie, True, False)
    return build(
        ModelConfig,
        vocab_size=config.size('vocab_size'),
        block_size=context,
        n_layer=config.size('num_decoder_layers', layers),
        n_encoder_layer=layers,
        n_head=config.size('num_heads'),
        n_embd=config.size('d_model'),
        head_dim=config.size('d_kv'),
        d_ff=config.size('d_ff'),
        position='relative',
        norm='rmsnorm',
        norm_eps=config.number('layer_norm_epsilon', 1e-6),
        mlp=MLP[config.one_of('feed_forward_proj', *MLP)],
        qk_norm=False,
        zero_init=False,
        t5_scale=True,
        tie=tie)


def mt5_config(config):
    config.fields.setdefault('feed_forward_proj', 'gated-gelu')
    config.fields['scale_decoder_outputs'] = False  # whatever tie_word_embeddings says
    return t5_config(config)


def umt5_config(config):
    config.fields.setdefault('feed_forward_proj', 'gated-gelu')
    cfg = t5_config(config)
    cfg.rel_per_layer = True
    return cfg


def t5_names(cfg):
    names = {
        'shared': 'wte',
        'encoder.final_layer_norm': 'norm_encoder',
        'decoder.final_layer_norm': 'norm_f',
    }
    names |= t5_stack_names(cfg, 'encoder', 'encoder', 'rel_encoder', has_cross=False)
    names |= t5_stack_names(cfg, 'decoder', 'blocks', 'rel', has_cross=True)
    return names


def t5_stack_names(cfg, stack, ours, rel, has_cross):
    """The names of T5's encoder or decoder. In T5, a layer is a norm and the attention or MLP after it."""
    names = {f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias': rel}
    layer = f'{stack}.block.N.layer.0'
    names[f'{layer}.layer_norm'] = f'{ours}.N.norm_1'
    for name in 'qkvo':
        names[f'{layer}.SelfAttention.{name}'] = f'{ours}.N.attn.{name}'
    if has_cross:
        layer = f'{stack}.block.N.layer.1'
        names[f'{layer}.layer_norm'] = f'{ours}.N.norm_x'
        for name in 'qkvo':
            names[f'{layer}.EncDecAttention.{name}'] = f'{ours}.N.cross.{name}'
    layer = f'{stack}.block.N.layer.{2 if has_cross else 1}'
    names[f'{layer}.layer_norm'] = f'{ours}.N.norm_2'
    if cfg.mlp == 'relu':
        names[f'{layer}.DenseReluDense.wi'] = f'{ours}.N.mlp.up'
    else:
        names[f'{layer}.DenseReluDense.wi_0'] = f'{ours}.N.mlp.gate'
        names[f'{layer}.DenseReluDense.wi_1'] = f'{ours}.N.mlp.up'
    names[f'{layer}.DenseReluDense.wo'] = f'{ours}.N.mlp.down'
    return names


def umt5_names(cfg):
    bias = 'layer.0.SelfAttention.relative_attention_bias'
    names = {theirs: ours for theirs, ours in t5_names(cfg).items() if not theirs.endswith(bias)}
    names[f'encoder.block.N.{bias}'] = 'encoder.N.attn.rel'
    names[f'decoder.block.N.{bias}'] = 'blocks.N.attn.rel'
    return names


def t5_fields(cfg):
    from features.t5.positions import BUCKETS, FURTHEST  # t5
    projection = {ours: theirs for theirs, ours in MLP.items()}
    return {
        'n_positions': cfg.block_size,
        'num_layers': cfg.n_encoder_layer,
        'num_decoder_layers': cfg.n_layer,
        'num_heads': cfg.n_head,
        'd_model': cfg.n_embd,
        'd_kv': cfg.d_head,
        'd_ff': cfg.mlp_width,
        'feed_forward_proj': projection[cfg.mlp],
        'relative_attention_num_buckets': BUCKETS,
        'relative_attention_max_distance': FURTHEST,
        'layer_norm_epsilon': cfg.norm_eps,
        'dropout_rate': cfg.dropout,
        'is_encoder_decoder': True,
    }


def t5_wants(cfg):
    return {
        'position': 'relative',
        'norm': 'rmsnorm',
        'mlp': cfg.mlp if cfg.mlp in MLP.values() else 'relu',
        'n_kv_head': cfg.n_head,
        'head_dim': cfg.d_head,
        'bias': False,
        'n_encoder_layer': max(1, cfg.n_encoder_layer),
        't5_scale': True,
    }


def umt5_wants(cfg):
    return t5_wants(cfg) | {'rel_per_layer': True}
