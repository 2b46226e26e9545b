"""
Mixtures of experts: several MLPs in every block, of which a router picks some for each token.

    python train.py --n_expert=8 --n_expert_active=2
"""


def may_choose(s, cfg):
    """The settings that a run may choose which begins with weights of a network with experts: how fast a bias moves."""
    if cfg.expert_bias and 'expert_bias' in s.given and s.expert_bias:
        return {'expert_bias'}
    return set()
