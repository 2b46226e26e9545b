"""
Settings that earlier versions of minnow had and that their checkpoints still hold.
"""
from configurator import UserError

# Each with the only value that this version still acts on; ... = any value, as it changed no result or stands
# elsewhere in the checkpoint
REMOVED = {
    'mix_by': 'tokens',
    'verify_data': ...,
    'first_block_dense': False,
    'rank_act_qk': None,
    'rank_init': ...,
    'rank_identity': False,
    'rank_blocks': 0,
    'rank_guide': 0,
    'factor_decay': 'factor',
    'momentum': 0.95,
    'momentum_warmup': 300,
    'eps': 1e-8,
    'max_skipped': ..., 'skip_steps': ..., 'desync_interval': ...,
    'init_keep': ...,
    'grow_how': 'stack',
    'flops': 0.0, 'hours': 0.0,
    'backend': ...,
    'expert_shared': False,
    'distill_temperature': 1.0,
    'lora_alphas': ..., 'lora_bias': ..., 'lora_layers': ..., 'lora_ranks': ..., 'lora_tokens': ...,
    'lora_whole': ...,
    'lora_pissa': False,
    'lora_plus': 1.0,
}


def without_removed(values, where):
    """A stored dict of settings without those in REMOVED. Raises UserError for one at another value."""
    for name in REMOVED.keys() & values.keys():
        if REMOVED[name] not in (values[name], ...):
            raise UserError(f'{where}: {name}={values[name]}: minnow no longer has this setting: '
                            'use the version that wrote this')
    return {name: value for name, value in values.items() if name not in REMOVED}
