"""
The tokenizer.bin of llama2.c, as tok512.bin of stories260K: ids and text are those of its run.c.

    int32 max_token_length, then of every token float32 score, int32 length, the bytes
    0 <unk>, 1 <s>, 2 </s>, 3 to 258 the bytes <0x00> to <0xFF>; a space is written as it is
"""
import struct

from configurator import UserError
from tokenizer import SentencePieceTokenizer

FIRST_BYTE, FIRST_PIECE = 3, 259
MOST = 2 ** 20  # tokens of a vocabulary


class Llama2c(SentencePieceTokenizer):
    """
    A tokenizer.bin. Its rule is that of sentencepiece's BPE, which encodes with a model made of the file: the
    pair with the best score is merged first, and a character without a token becomes its bytes.
    """

    def __init__(self, data, where):
        super().__init__(as_sentencepiece(read_pieces(data, where), where), where)
        self.kind, self.files = 'llama2.c', {'tokenizer.bin': data}

    def encode(self, text):
        """The ids of a text, with a space before it; no space makes an empty text empty."""
        return super().encode(' ' + text) if text else []

    def encode_after(self, text):
        return super().encode(text)

    def decode(self, ids):
        """The text of tokens: the first one, and one after <s>, lose the space before them."""
        self.check_ids(ids)
        parts, rest = [], []
        for i in [*map(int, ids), self.sp.bos_id()]:
            if i != self.sp.bos_id():
                rest.append(i)
            elif rest:
                text = self.sp.decode(rest)
                parts.append(text[self.sp.id_to_piece(rest[0]).startswith('▁'):])
                rest = []
        return ''.join(parts)


def read_pieces(data, where):
    """[(score, bytes), …] of a file. Raises UserError for a file of another kind."""
    problem = f'{where}: not a tokenizer.bin of llama2.c'
    pieces, at = [], 4
    while at < len(data) and len(pieces) < MOST:
        if at + 8 > len(data):
            raise UserError(problem)
        score, length = struct.unpack_from('<fi', data, at)
        at += 8 + length
        if length < 1 or at > len(data):
            raise UserError(problem)
        pieces.append((score, data[at - length:at]))
    bytes_of_file = [piece for _, piece in pieces[FIRST_BYTE:FIRST_PIECE]]
    if at != len(data) or bytes_of_file != [b'<0x%02X>' % byte for byte in range(256)]:
        raise UserError(problem)
    return pieces


def as_sentencepiece(pieces, where):
    """The bytes of a sentencepiece model with these pieces, which changes no blank of a text."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(f'{where}: reading it needs the protobuf library: pip install protobuf') from None
    model = sentencepiece_model_pb2.ModelProto()
    kind = model.SentencePiece
    for n, (score, piece) in enumerate(pieces):
        text = piece.decode(errors='replace').replace(' ', '▁')
        added = model.pieces.add(piece=text, score=score, type=kind.NORMAL)
        if n < FIRST_BYTE:  # run.c writes a newline before and after the names of two
            added.piece, added.type = text.strip(), kind.UNKNOWN if n == 0 else kind.CONTROL
        elif n < FIRST_PIECE:
            added.type = kind.BYTE
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.unk_surface = trainer.BPE, True, '<unk>'
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix = 'identity', False
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()
