"""
The optimal model size for a number of tokens, FLOPs or minutes, by several published scaling laws, which
differ by a factor of 1.4.

    python train.py --plan --tokens=1.37e9
    python train.py --plan --minutes=180        # of this machine, at half of its peak speed
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Fit:
    """
    L = E + A/N^alpha + B/D^beta for N parameters and D tokens, at the cost of 6 N D FLOPs. Its minimum for C
    FLOPs is at N = G (C/6)^a and D = (C/6)^b / G with G = (alpha A / (beta B))^(1/(alpha + beta)),
    a = beta/(alpha + beta), b = 1 - a (Hoffmann et al. 2022, arXiv 2203.15556, 3.3).
    """
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def law(self):
        a = self.beta / (self.alpha + self.beta)
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return G / 6 ** a, a, 6 ** (a - 1) / G, 1 - a


# (k, a, m, b): N = k C^a parameters and D = m C^b tokens for C FLOPs
LAWS = {
    'Chinchilla, rounded': (0.6, 0.45, 0.3, 0.55),  # as it is often quoted
    'Chinchilla, third fit': Fit(406.4, 410.7, 0.34, 0.28).law,  # Hoffmann et al. 2022, equation 10
    # Besiroglu et al. 2024, arXiv 2404.10102
    'the same data, fitted again': Fit(482.01, 2085.43, 0.3478, 0.3658).law,
    '20 tokens a parameter': (1 / 120 ** 0.5, 0.5, (20 / 6) ** 0.5, 0.5),  # C = 6 N D with D = 20 N
}


def optima(tokens=0.0, flops=0.0):
    """{law: (parameters, tokens, FLOPs)} for this number of tokens, or of FLOPs."""
    out = {}
    for name, (k, a, m, b) in LAWS.items():
        C = flops or (tokens / m) ** (1 / b)
        out[name] = k * C ** a, m * C ** b, C
    return out


def table(found):
    """The optima as lines of text."""
    lines = [f'{"":28}{"parameters":>12}{"tokens":>12}{"FLOPs":>12}']
    lines += [f'{name:28}{params / 1e6:>11,.1f}M{tokens / 1e6:>11,.1f}M{flops:>12.3e}'
              for name, (params, tokens, flops) in found.items()]
    return '\n'.join(lines)
