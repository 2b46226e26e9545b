"""
Features that do not go with other settings.
"""


def refuse_beside(settings, name, **plain):
    """Raise ValueError unless these other settings, which do not go with `name`, are at these values."""
    for other, value in plain.items():
        found = getattr(settings, other, value)
        if found != value:
            raise ValueError(f'{name}={getattr(settings, name)}: goes with {other}={value} alone, '
                             f'not {found}: leave it out')
