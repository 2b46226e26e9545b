"""Some cases of fuzz.py; `python tests/faults/fuzz.py 100000` runs as many as one likes."""
import pytest
from fuzz import KINDS, fuzz


@pytest.mark.parametrize('kind', KINDS)
def test_input_nobody_thought_of_is_right_or_refused_in_one_line(kind):
    fuzz(kind, 100)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_much_more_of_it(kind):
    fuzz(kind, 2000)
