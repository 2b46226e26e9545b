"""
The dial: derive model size, batch size, learning rates and steps from a depth, a number of parameters, tokens
or minutes.

    python train.py --minutes=5            # the best model that this machine can train in five minutes
    python train.py --plan --hours=3       # print what scaling laws recommend, without training
"""
from dataclasses import dataclass

DEEPEST = 48  # layers


@dataclass
class PlanConfig:
    flops: float = 0.0  # with plan: floating-point operations of the run
    hours: float = 0.0  # with plan: duration of the run in hours on this machine

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('depth', 'params', 'tokens', 'minutes', 'flops', 'hours'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.plan:
            self.check_plan()
        elif self.flops or self.hours:
            raise ValueError(f'flops={self.flops:g}, hours={self.hours:g}: belong to --plan; '
                             'to train for a time, give minutes')
        if self.flops > 1e30 or self.hours > 1e7 or self.tokens > 1e15:
            raise ValueError(f'flops={self.flops:g}, hours={self.hours:g}, tokens={self.tokens:g}: '
                             'takes at most 1e30, 1e7, 1e15')
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

    def check_plan(self):
        if [self.tokens > 0, self.flops > 0, self.hours > 0].count(True) > 1:
            raise ValueError(f'tokens={self.tokens:g}, flops={self.flops:g}, hours={self.hours:g}: '
                             'plan takes one of them')
        if self.depth or self.params or self.minutes:
            raise ValueError(f'depth={self.depth}, params={self.params:g}, minutes={self.minutes:g}: '
                             'plan takes tokens, flops or hours in their place, or the sizes of a network: '
                             'leave them out')
