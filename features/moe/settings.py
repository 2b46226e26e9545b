"""
Mixtures of experts: every block has several MLPs (experts), and a router picks some of them for each token.
"""
from dataclasses import dataclass, field

from model import ModelConfig


@dataclass
class MoEConfig(ModelConfig):
    n_expert_active: int = 1  # experts per token (1: Switch, arXiv 2101.03961; 2: Mixtral)
    expert_aux: float = 0.01  # weight of the load-balancing loss, which is 1 per layer if loads are equal
    # (Switch)
    expert_z: float = 0.001  # weight of the router z-loss, mean(logsumexp²), which keeps its logits small
    # (ST-MoE, Zoph et al. 2022, arXiv 2202.08906)
    expert_bias: float = 0.0  # load balancing without a loss: after each step, a bias in the choice of
    # experts rises by this for experts with too few tokens and falls for those with too many (Wang et al.
    # 2024, arXiv 2408.15664: 0.001, with expert_aux=0). It cannot be added to a trained model
    expert_width: int = 0  # hidden width of an expert; 0 = that of a dense MLP, d_ff (fine-grained experts:
    # DeepSeekMoE, arXiv 2401.06066)
    expert_renorm: bool | None = None  # scale the weights of a token's experts so that they sum to 1; None =
    # with two or more active experts
    shared_width: int = 0  # hidden width of an MLP for all tokens beside the experts; 0 = none (DeepSeekMoE)
    shared_gate: bool = False  # scale its output for each token by a sigmoid (Qwen2-MoE)
    dense_layers: list[int] = field(default_factory=list)  # blocks (0, 1, …), of an encoder too, that have
    # one dense MLP of width d_ff

    only_in_training = ('expert_aux', 'expert_z')

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.n_expert == 1 or self.n_expert < 0:
            raise ValueError(f'n_expert={self.n_expert}: takes 0 for one MLP, or 2 and more')
        for name in ('expert_aux', 'expert_z', 'expert_bias', 'expert_width', 'shared_width'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if not self.n_expert:
            return self.check_idle()
        if not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f'n_expert_active={self.n_expert_active}: takes 1 to n_expert={self.n_expert}')
        if self.shared_gate and not self.shared_width:
            raise ValueError('shared_gate=True: scales the output of a shared expert: set shared_width too')
        count = max(self.n_layer, self.n_encoder_layer)
        if not all(0 <= n < count for n in self.dense_layers) or len(set(self.dense_layers)) == count:
            raise ValueError(f'dense_layers={self.dense_layers}: takes some of the blocks 0 to {count - 1}, '
                             'not all of them')
        if self.rank_mlp or any(rank for name, rank in self.ranks.items() if 'mlp.' in name):
            raise ValueError(f'n_expert={self.n_expert}, rank_mlp={self.rank_mlp}: experts are dense: leave '
                             'rank_mlp, and ranks of the MLP, out')

    def check_idle(self):
        """Raise ValueError for a setting of experts that the user set without n_expert."""
        is_new = getattr(self, 'init_from', 'auto') in ('auto', 'scratch')  # else init_from has a network
        idle = sorted(getattr(self, 'given', set()) & vars(MoEConfig)['__annotations__'].keys())
        if idle and is_new:
            raise ValueError(f'{idle[0]}={getattr(self, idle[0])}: belongs to a mixture of experts: '
                             'set n_expert too')

    @property
    def is_renormed(self):
        """Whether the weights of a token's experts sum to 1."""
        if self.expert_renorm is None:
            # the weight of a single one would always be 1, and the router would learn nothing from the loss
            return self.n_expert_active > 1
        return self.expert_renorm


def may_choose(s, cfg):
    """
    The settings that a new run may change when it starts from a model with experts: the step size of the
    bias.
    """
    if cfg.expert_bias and 'expert_bias' in s.given and s.expert_bias:
        return {'expert_bias'}
    return set()
