"""
Any of our tokenizers as a tokenizer.json, which the tokenizers library and all that is built on it read: the
same ids for the same text.

    text = to_json(tokenizer)      # str, the content of the file
"""
from configurator import UserError
from tokenizer import EOT, Reserved

# byte → the printable character that stands for it in a byte-level vocabulary, as GPT-2 began it
PRINTABLE = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
BYTE_CHARS = ({b: chr(b) for b in PRINTABLE}
              | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)})

PROBE = ('Once upon a time, there was a bird.\n\n'
         '\tdef f(x):  return [x ** 2, 1234567]\n    "Naïve façade" — 你好 🙂 don\'t\r\n   ')


def to_json(tokenizer, begin=()):
    """
    The content of a tokenizer.json; begin: (id,) of a start token that the library is to put before every
    text. Raises UserError where the tokenizers library cannot do what `tokenizer` does.
    """
    text = plain(tokenizer)
    if not begin:
        return text
    import tokenizers
    theirs, first = tokenizers.Tokenizer.from_str(text), spelling(text, begin[0])
    template = tokenizers.processors.TemplateProcessing
    theirs.post_processor = template(f'{first} $A', special_tokens=[(first, begin[0])])
    return theirs.to_str(pretty=True)


def spelling(text, token):
    """The name that a tokenizer.json with this content has for a token; None for None."""
    if token is None:
        return None
    import tokenizers
    return tokenizers.Tokenizer.from_str(text).id_to_token(token)


def plain(tokenizer):
    """The content of a tokenizer.json that puts nothing before a text, or what the file itself does."""
    try:
        import tokenizers
    except ImportError:
        raise UserError('writing tokenizer.json takes the tokenizers library: '
                        'pip install tokenizers') from None
    if isinstance(tokenizer, Reserved):
        theirs = tokenizers.Tokenizer.from_str(plain(tokenizer.inner))
        theirs.add_special_tokens([f'<{n}>' for n in range(tokenizer.more['reserved'])])
        if (theirs.token_to_id('<0>') != tokenizer.inner.vocab_size
                or theirs.get_vocab_size() != tokenizer.vocab_size):
            raise UserError(f'the {tokenizer.kind} tokenizer has a token <0> of its own: '
                            'its reserved ones have no place in a tokenizer.json')
        return theirs.to_str(pretty=True)
    if tokenizer.kind in ('tokenizers', 'wordpiece'):
        theirs = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
        if tokenizer.kind == 'wordpiece':
            theirs.add_special_tokens([name for name in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
                                       if theirs.token_to_id(name) is not None])
    else:
        theirs = ({'byte': from_bytes, 'char': from_chars, 'sentencepiece': from_sentencepiece}
                  .get(tokenizer.kind, from_tiktoken)(tokenizers, tokenizer))
    probe = PROBE if tokenizer.kind != 'char' else ''.join(tokenizer.more['chars'])
    if theirs.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
        raise UserError(f'the {tokenizer.kind} tokenizer has other ids as a tokenizer.json: '
                        'convert it by hand, with the tools of whoever made it')
    return theirs.to_str(pretty=True)


def byte_level(tokenizers, vocab, merges, eot, pattern=None):
    """A BPE over bytes: vocab {bytes: id}, merges [(bytes, bytes)], the words of `pattern` each by itself."""
    def spell(token):
        return ''.join(BYTE_CHARS[b] for b in token)
    bpe = tokenizers.models.BPE({spell(token): i for token, i in vocab.items()} | {EOT: eot},
                                [(spell(a), spell(b)) for a, b in merges], ignore_merges=True)
    theirs, byte_chars = (tokenizers.Tokenizer(bpe),
                          tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    words = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')] if pattern else []
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*words, byte_chars])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([EOT])
    return theirs


def from_bytes(tokenizers, tokenizer):
    return byte_level(tokenizers, {bytes([b]): b for b in range(256)}, [], tokenizer.eot)


def from_chars(tokenizers, tokenizer):
    """A word for each character."""
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {c: i for i, c in enumerate(tokenizer.spelling)}, unk_token=tokenizer.spelling[-1]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    theirs.decoder = tokenizers.decoders.Fuse()
    theirs.add_special_tokens([EOT] if tokenizer.eot is not None else [])
    return theirs


def from_tiktoken(tokenizers, tokenizer):
    """
    tiktoken joins the pair whose union has the lowest id; the library wants all pairs, in that order: the
    last merge of each token.
    """
    ranks = tokenizer.encoding._mergeable_ranks
    merges = [last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]
    return byte_level(tokenizers, ranks, merges, tokenizer.eot, tokenizer.encoding._pat_str)


def from_sentencepiece(tokenizers, tokenizer):
    """BPE joins the pair whose union has the highest score; Unigram takes the scores themselves."""
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sp.serialized_model_proto())
    pieces, is_bpe, norm = ([(p.piece, p.score) for p in model.pieces], model.trainer_spec.model_type == 2,
                            model.normalizer_spec)
    unk = model.trainer_spec.unk_id
    if is_bpe:
        places = {piece: n for n, (piece, _) in enumerate(pieces)}
        normal = [n for n, p in enumerate(model.pieces) if p.type in (p.NORMAL, p.USER_DEFINED)]
        merges = [(piece[:cut], piece[cut:]) for n in sorted(normal, key=lambda n: -pieces[n][1])
                  for piece in [pieces[n][0]]
                  for cut in range(1, len(piece)) if piece[:cut] in places and piece[cut:] in places]
        bpe = tokenizers.models.BPE(places, merges, unk_token=pieces[unk][0], fuse_unk=True,
                                    byte_fallback=model.trainer_spec.byte_fallback)
        theirs = tokenizers.Tokenizer(bpe)
    else:
        theirs = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk,
                                                                model.trainer_spec.byte_fallback))
    normalizers = tokenizers.normalizers
    steps = [normalizers.Precompiled(norm.precompiled_charsmap)] if norm.precompiled_charsmap else []
    steps += ([normalizers.Strip(), normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')]
              if norm.remove_extra_whitespaces else [])
    steps += [normalizers.Prepend('▁')] if norm.add_dummy_prefix else []
    theirs.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', '▁')])
    decoders = tokenizers.decoders
    theirs.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
                                       + [decoders.Strip(' ', 1, 0)] * norm.add_dummy_prefix)
    theirs.add_special_tokens([p.piece for p in model.pieces if p.type in (p.CONTROL, p.UNKNOWN)])
    return theirs


def last_merge(token, rank, ranks):
    """The two parts that `token` consists of when all merges before its own are done."""
    parts = [token[n:n + 1] for n in range(len(token))]
    while len(parts) > 2:
        _, place = min((ranks.get(parts[n] + parts[n + 1], rank), n) for n in range(len(parts) - 1))
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return tuple(parts)
