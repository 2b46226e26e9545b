"""
JSON files that other programs write and read, as a Hugging Face folder's: they mean here what they mean to
json.load().
"""
import math

from checkpoint import read_json


def read_foreign(path, most=2 ** 23):
    """
    The object in a JSON file. Of a field that is there twice, the last one counts. A number that is not
    finite becomes its text, as 'NaN': it is no obstacle in a field that nobody uses, and in one that takes a
    number it is refused as every text is. Raises UserError as read_json() does.
    """
    return read_json(path, most=most, object_pairs_hook=dict, parse_constant=str, parse_float=finite,
                     parse_int=whole)


def finite(text):
    value = float(text)
    return value if math.isfinite(value) and abs(value) < 1e308 else text


def whole(text):
    value = int(text)  # of more than 4,300 digits: ValueError
    return value if abs(value) < 10 ** 300 else text
