"""
Read and check the fields of an untrusted config.json.

    config = Config(folder)
    width = config.size('n_embd')      # if it is not a valid size: UserError with the file and the field
"""
import os

from configurator import UserError
from features.foreign_json import read_foreign
from features.hf import llama2c


class Config:
    """The fields of a config.json. Its methods raise UserError with the file, the field and its value."""

    def __init__(self, folder):
        self.path = os.path.join(folder, 'config.json')
        self.fields = config_fields(folder)

    def refuse(self, name, value, why):
        """Raise UserError: the field `name` has this value, which is not possible because of `why`."""
        shown = repr(value)
        if len(shown) >= 100:
            shown = shown[:100] + '…'
        raise UserError(f'{self.path}: {name}={shown}: {why}')

    def get(self, name, default):
        """The value of a field; the default where it is absent or null."""
        value = self.fields.get(name)
        if value is None:
            return default
        return value

    def size(self, name, default=None):
        """An integer of at least 1."""
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value < 2 ** 31:
            self.refuse(name, value, 'takes a whole number from 1, below 2**31')
        return value

    def number(self, name, default):
        """A float above 0."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(name, value, 'takes a number above 0, below 1e30')
        return float(value)

    def one_of(self, name, *known):
        """A field whose value must be one of `known`; the first one is the default."""
        value = self.get(name, known[0])
        if value not in known:
            self.refuse(name, value, 'takes ' + ' or '.join(repr(k) for k in known))
        return known[known.index(value)]  # False for a 0, which is equal


def config_fields(folder):
    """The fields of the config.json of a folder, or those of the network of llama2.c in it."""
    model = llama2c.model_file(folder)
    return llama2c.config_fields(model) if model else read_foreign(os.path.join(folder, 'config.json'))
