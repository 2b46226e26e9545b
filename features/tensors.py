"""
Safetensors files, which somebody else may have written.
"""
import safetensors

from checkpoint import open_regular
from configurator import UserError


def open_tensors(path):
    """Open a safetensors file. Raises UserError unless it has floating-point tensors alone."""
    open_regular(path).close()
    try:
        file = safetensors.safe_open(path, 'pt')
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{path}: not readable as safetensors: {error}') from None
    for name in file.keys():
        dtype = file.get_slice(name).get_dtype()
        if dtype not in ('F64', 'F32', 'F16', 'BF16'):
            raise UserError(f'{path}: {name:.100}: {dtype}, takes float32, float16 or bfloat16')
    return file
