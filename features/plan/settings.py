"""
The dial: derive model size, batch size, learning rates and steps from a depth, a number of parameters, tokens
or minutes.

    python train.py --minutes=5            # the best model that this machine can train in five minutes
    python train.py --plan --minutes=180   # print what scaling laws recommend, without training
"""
from dataclasses import dataclass

DEEPEST = 48  # layers


@dataclass
class PlanConfig:
    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('depth', 'params', 'tokens', 'minutes'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.plan and (self.depth or self.params):
            raise ValueError(f'depth={self.depth}, params={self.params:g}: plan takes tokens or minutes in '
                             'their place, or the sizes of a network: leave them out')
        if self.minutes > 1e9 or self.tokens > 1e15:
            raise ValueError(f'minutes={self.minutes:g}, tokens={self.tokens:g}: takes at most 1e9, 1e15')
        if self.depth > DEEPEST:
            raise ValueError(f'depth={self.depth}: takes at most {DEEPEST}')
        if self.depth and self.params:
            raise ValueError(f'depth={self.depth}, params={self.params:g}: give one of them, '
                             'the other follows')
        if self.tokens and self.minutes:
            raise ValueError(f'tokens={self.tokens:g}, minutes={self.minutes:g}: give one of them, '
                             'the other follows')
        is_asked = 'plan' in getattr(self, 'given', ())  # show.py goes on without it
        if self.is_planned and self.n_encoder_layer and not is_asked:
            raise ValueError(f'n_encoder_layer={self.n_encoder_layer}: the dial (depth, params, tokens, '
                             'minutes) is for decoders: leave it out')
