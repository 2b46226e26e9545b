"""
Read tokenizer.json, the format of the tokenizers library, and write it for any of our tokenizers, with the
same ids for the same text. Also reads BERT's vocabularies, vocab.txt.

    tokenizer = JsonTokenizer('tokenizers', data, 'tokenizer.json')
    text = to_json(tokenizer)      # str, the content of the file
"""
import base64
import functools
import json
import os
import secrets

from configurator import UserError
from features.hf.panics import call
from tokenizer import EOT, SentencePieceTokenizer, Tokenizer

HIDDEN = '\ue000'  # a character of Unicode's private use
# names of the end-of-text token, where no file says which it is
EOT_NAMES = (EOT, '</s>', '<eos>', '<|end_of_text|>', '<|eot_id|>', '[SEP]')

MOST_TOKENS = 2 ** 24
MOST_GROWTH = 100  # times, tokens or characters
MOST_STEPS = 100

BERT_SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')


# -----------------------------------------------------------------------------
# Read

class JsonTokenizer(Tokenizer):
    """
    A tokenizer of the tokenizers library: 'tokenizers' = a tokenizer.json, 'wordpiece' = a BERT vocabulary.
    """

    def __init__(self, kind, data, where, size=None, eot=None):
        """
        size, eot: of the vocabulary and of the end of text, if a description says them; else the config files
        beside the file `where` name the end of text.
        """
        try:
            import tokenizers
        except ImportError:
            raise UserError(f'{where}: reading it needs the tokenizers library: '
                            'pip install tokenizers') from None
        self.where = where
        if kind == 'wordpiece':
            self.tokenizer = wordpiece(tokenizers, data, where, size)
            vocab = self.tokenizer.get_vocab()
        else:
            self.tokenizer, vocab = read(tokenizers, data, where)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # of BPE and Unigram: they draw the pieces of a word at random
        for name in ('dropout', 'alpha', 'nbest_size'):
            if getattr(self.tokenizer.model, name, None) is not None:
                setattr(self.tokenizer.model, name, None)
        size = max(vocab.values(), default=-1) + 1
        if not self.tokenizer.get_vocab_size(with_added_tokens=False):
            raise UserError(f'{where}: has no tokens for text')
        if not 0 < size <= MOST_TOKENS:
            raise UserError(f'{where}: has {size:,} tokens, takes 1 to {MOST_TOKENS:,}')
        if eot is None:
            self.eot_text = end_of_text(vocab, where)
            eot = vocab[self.eot_text]
        else:
            self.eot_text = self.tokenizer.id_to_token(eot) or ''
        unk = vocab.get('[UNK]', vocab.get('<unk>', -1))
        file = 'tokenizer.json' if kind == 'tokenizers' else 'vocab.txt'
        super().__init__(kind, size, eot, {file: data}, unk)

    @functools.cached_property
    def literal(self):  # made when it is needed: prompts and decoding often need none, and it takes 0.3 s
        import tokenizers
        return without_specials(tokenizers, self.tokenizer, self.where)

    def encode(self, text):
        return call(self.where, self.literal.encode, text, add_special_tokens=False).ids

    def special_tokens(self):
        added = self.tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def encode_special(self, text):
        return call(self.where, self.tokenizer.encode, text, add_special_tokens=False).ids

    def decode(self, ids):
        self.check_ids(ids)
        return call(self.where, self.tokenizer.decode, [int(i) for i in ids], skip_special_tokens=False)

    def pieces(self):
        """The text of every token on its own."""
        ids = [[i] for i in self.tokenizer.get_vocab().values()]
        return call(self.where, self.tokenizer.decode_batch, ids, skip_special_tokens=False)

    def bos(self):
        if self.kind == 'wordpiece':
            return ()  # [CLS] and [SEP] belong to a text that is complete
        return self.added()

    def start(self):
        if self.kind == 'wordpiece':  # a vocab.txt does not say so, but BERT's own code begins with [CLS]
            first = self.tokenizer.token_to_id('[CLS]')
            return () if first is None else (first,)
        return self.added()

    def ordinary_size(self):
        specials = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        size = self.vocab_size
        while size - 1 in specials:
            size -= 1
        return size

    def added(self):
        """The ids that the library adds before a text, as Llama's <s>."""
        text = call(self.where, self.tokenizer.encode, 'a')
        if max(text.ids, default=0) >= self.vocab_size:
            raise UserError(f'{self.where}: adds a token beyond the {self.vocab_size} of its vocabulary')
        of_text = [n for n, special in enumerate(text.special_tokens_mask) if not special]
        if of_text:
            return tuple(text.ids[:of_text[0]])
        # it cannot write an a: a single token stands before it, unless it is the end of text
        is_first = len(text.ids) == 1 and text.ids != [self.eot]
        return tuple(text.ids) * is_first


def end_of_text(vocab, where):
    """
    The name of the end-of-text token: the one that the files beside `where` name, else the first of
    EOT_NAMES. Raises UserError where there is neither.
    """
    from features.hf.prompts import end_of_text as named
    from features.hf.prompts import in_network
    folder = os.path.dirname(where)
    name = named(folder, vocab)
    if name is None:
        known = in_network(folder, vocab)
        name = next((name for name in EOT_NAMES if name in known), None)
    if name is None:
        raise UserError(f'{where}: no end-of-text token: add eos_token to tokenizer_config.json beside it '
                        f'(none of {", ".join(EOT_NAMES)} is in the vocabulary)')
    return name


def without_specials(tokenizers, tokenizer, where):
    """
    The same tokenizer for ordinary text: what spells a special token is text. `tokenizer` itself finds them.
    """
    fields = json.loads(tokenizer.to_str())
    model = fields['model']
    special = {token['content'] for token in fields['added_tokens'] if token['special']}
    special.discard(model.get('unk_token'))
    # A model may find the name of a token in its own vocabulary. There it gets a name that no text has: one
    # that nobody can know. All keep their places, because the library counts the ids of added tokens
    hidden = {name: HIDDEN + secrets.token_hex(16) + name for name in special}
    for token in fields['added_tokens']:
        token['content'] = hidden.get(token['content'], token['content'])
    if isinstance(model['vocab'], list):  # Unigram: (name, score)
        model['vocab'] = [[hidden.get(name, name), score] for name, score in model['vocab']]
    else:
        model['vocab'] = {hidden.get(name, name): i for name, i in model['vocab'].items()}
    if 'merges' in model:  # BPE: none may make the name out of its parts
        model['merges'] = [pair for pair in model['merges'] if not special & {*pair, ''.join(pair)}]
    fields['post_processor'] = None
    literal = call(where, tokenizers.Tokenizer.from_str, json.dumps(fields))
    literal.encode_special_tokens = True  # as their pieces, also the one of unknown text
    return literal


@functools.lru_cache(maxsize=1)
def parsed(tokenizers, data):  # kept: a folder is read once to describe its tokenizer, then to use it
    tokenizer = tokenizers.Tokenizer.from_str(data.decode('utf-8-sig'))
    return tokenizer, tokenizer.get_vocab()  # takes a third as long as the parsing


def read(tokenizers, data, where):
    """(the library's tokenizer, {name: id} its vocabulary) from the bytes of a tokenizer.json."""
    tokenizer, vocab = call(f'{where}: not a tokenizer.json', parsed, tokenizers, data)
    check_growth(tokenizer, where)
    return tokenizer, vocab


def check_growth(tokenizer, where):
    """
    Raise UserError for a tokenizer that makes a long text of a short one: 30 steps that double it would fill
    any memory. Those of published models make a text twice as long at most.
    """
    parts = {}
    for name in ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder'):
        part = getattr(tokenizer, name)
        parts[name] = None if part is None else json.loads(part.__getstate__())
    for name in ('normalizer', 'decoder'):
        if growth(parts[name]) > MOST_GROWTH:
            raise UserError(f'{where}: {name}: makes a text more than {MOST_GROWTH} times as long')
    if sum(1 for part in parts.values() for _ in steps(part)) > MOST_STEPS:
        raise UserError(f'{where}: has more than {MOST_STEPS} steps, takes a tokenizer of fewer')
    added = sum(len(each['ids']) for step in steps(parts['post_processor']) for each in around(step))
    names = [getattr(tokenizer.model, name, None) or ''
             for name in ('unk_token', 'continuing_subword_prefix', 'end_of_word_suffix')]
    if added > MOST_GROWTH or len(max(names, key=len)) > MOST_GROWTH:
        raise UserError(f'{where}: adds more than {MOST_GROWTH} tokens to a text, or letters to a token')


def steps(part):
    """The steps of a part of a tokenizer.json, also those inside of a Sequence."""
    if isinstance(part, dict):
        part = [part]
    for step in part or ():
        inner = next((step[name] for name in ('normalizers', 'pretokenizers', 'processors', 'decoders')
                      if name in step), None)
        if inner is None:
            yield step
        else:
            yield from steps(inner)


def growth(part):
    """How many times as long a text can become in these steps."""
    factor = 1
    for step in steps(part):
        if step['type'] in ('Replace', 'Prepend'):
            pattern = step.get('pattern', {}).get('String') or ''
            new = step.get('content', step.get('prepend', ''))
            factor *= max(1, -(-len(new) // len(pattern)) if pattern else len(new))
        if step['type'] == 'Precompiled':
            factor *= longest_of(base64.b64decode(step['precompiled_charsmap']))
    return factor


def longest_of(charsmap):
    """The length of the longest text that sentencepiece's table of normalized characters has."""
    size = int.from_bytes(charsmap[:4], 'little')
    return max(map(len, charsmap[4 + size:].split(b'\0')))


def around(step):
    """The special tokens that a step of a post_processor adds to a text, each as often as it does."""
    if step['type'] != 'TemplateProcessing':
        return []
    names = [piece['SpecialToken']['id'] for piece in step['single'] if 'SpecialToken' in piece]
    known = step['special_tokens']
    return [known[name] for name in names if name in known]


def wordpiece(tokenizers, data, where, size=None):
    """
    BERT's tokenizer from a vocab.txt with one piece per line, read as the tokenizers library does; cased if a
    piece has an upper-case letter. size: of the vocabulary, if known.
    """
    lines = data.decode('utf-8-sig', errors='replace').removesuffix('\n').split('\n')
    # a piece of blanks only keeps its place
    vocab = {line.rstrip() or line: i for i, line in enumerate(lines)}
    # made by a version for which U+2028 and others ended a line too
    if size is not None and size != len(lines):
        vocab = {piece: i for i, piece in enumerate(data.decode(errors='replace').splitlines())}
    if '[UNK]' not in vocab or '[SEP]' not in vocab:
        raise UserError(f'{where}: not a BERT vocabulary (a piece a line, [UNK] and [SEP] among them); '
                        'for text to prepare, name it as a source')
    cased = any(piece != piece.lower() for piece in vocab if not piece.startswith('['))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens([name for name in BERT_SPECIAL if name in vocab])
    return tokenizer


# -----------------------------------------------------------------------------
# Written

# byte → the printable character that stands for it in a byte-level vocabulary, as in GPT-2's
PRINTABLE = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE}
BYTE_CHARS |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)}

BLANKS = 'A  ﬁ\tb '
PROBE = ('Once upon a time, there was a bird.\n\n'
         '\tdef f(x):  return [x ** 2, 1234567]\n    "Naïve façade" — 你好 🙂 '
         "don't\r\n   ")


def to_json(tokenizer, around=None):
    """
    The content of a tokenizer.json. around: (ids that the library adds before every text, ids after it);
    None: those of the tokenizer's own file, if it has one. Raises UserError if the tokenizers library cannot
    represent `tokenizer`.
    """
    text = plain(tokenizer)
    if around is None:
        return text
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(text)
    before, after = (list(ids) for ids in around)
    probe = call('tokenizer.json', theirs.encode, 'a', add_special_tokens=False).ids
    if call('tokenizer.json', theirs.encode, 'a').ids == [*before, *probe, *after]:
        return text
    names = {token: spelling(text, token) for token in (*before, *after)}
    steps = [*(names[token] for token in before), '$A', *(names[token] for token in after)]
    theirs.post_processor = tokenizers.processors.TemplateProcessing(
        single=steps, special_tokens=[(name, token) for token, name in names.items()])
    return theirs.to_str(pretty=True)


def adds_space(text):
    """Whether the tokenizer in a tokenizer.json with this content writes a blank before every text."""
    import tokenizers
    theirs = tokenizers.Tokenizer.from_str(text)
    first = 'a'
    if theirs.normalizer is not None:
        first = call('tokenizer.json', theirs.normalizer.normalize_str, 'a')
    if theirs.pre_tokenizer is not None:
        words = call('tokenizer.json', theirs.pre_tokenizer.pre_tokenize_str, first)
        first = words[0][0] if words else ''
    return first[:1] in (' ', '▁', BYTE_CHARS[ord(' ')])


def spelling(text, token):
    """The text of a token in a tokenizer.json with this content; None for None."""
    if token is None:
        return None
    import tokenizers
    return tokenizers.Tokenizer.from_str(text).id_to_token(token)


def plain(tokenizer):
    """
    The content of a tokenizer.json that adds no tokens before a text, or those of the tokenizer's own file.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError('writing tokenizer.json needs the tokenizers library: '
                        'pip install tokenizers') from None
    if tokenizer.more.get('reserved'):
        return with_reserved(tokenizers, tokenizer)
    if 'added' in tokenizer.more:
        return with_added(tokenizers, tokenizer)
    theirs = convert(tokenizers, tokenizer)
    probe = ''.join(tokenizer.more['chars']) if tokenizer.kind == 'char' else PROBE
    if call('tokenizer.json', theirs.encode, probe, add_special_tokens=False).ids != tokenizer.encode(probe):
        raise UserError(f'the {tokenizer.kind} tokenizer has other ids as a tokenizer.json: '
                        'convert it by hand, with the tools of whoever made it')
    return theirs.to_str(pretty=True)


def with_reserved(tokenizers, tokenizer):
    """plain() for a tokenizer with reserved tokens."""
    theirs = tokenizers.Tokenizer.from_str(plain(tokenizer.inner))
    theirs.add_special_tokens([f'<{n}>' for n in range(tokenizer.more['reserved'])])
    if (theirs.token_to_id('<0>') != tokenizer.inner.vocab_size
            or theirs.get_vocab_size() != tokenizer.vocab_size):
        raise UserError(f'the {tokenizer.kind} tokenizer has a token <0> of its own: '
                        'its reserved ones have no place in a tokenizer.json')
    return theirs.to_str(pretty=True)


def with_added(tokenizers, tokenizer):
    """plain() for a sentencepiece tokenizer with the tokens of the files beside it."""
    theirs = tokenizers.Tokenizer.from_str(plain(tokenizer.inner))
    for name, i in sorted(tokenizer.more['added'].items(), key=lambda entry: entry[1]):
        is_special = name in tokenizer.more['special']
        theirs.add_tokens([tokenizers.AddedToken(name, special=is_special, normalized=False)])
        if theirs.token_to_id(name) != i:
            raise UserError(f'the added token {name} has the id {i}, and a tokenizer.json would give it '
                            f'{theirs.token_to_id(name)}: its ids must follow those of tokenizer.model')
    return theirs.to_str(pretty=True)


def convert(tokenizers, tokenizer):
    """The library's tokenizer that is equal to one of ours."""
    if tokenizer.kind == 'byte':
        return from_bytes(tokenizers, tokenizer)
    if tokenizer.kind == 'char':
        return from_chars(tokenizers, tokenizer)
    if tokenizer.kind in ('sentencepiece', 'llama2.c'):
        return from_sentencepiece(tokenizers, tokenizer)
    if tokenizer.kind not in ('tokenizers', 'wordpiece'):
        return from_tiktoken(tokenizers, tokenizer)
    return tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())


def byte_level(tokenizers, vocab, merges, eot, pattern=None):
    """
    A BPE over bytes: vocab {bytes: id}, merges [(bytes, bytes)]; `pattern` matches the words, which are
    encoded separately.
    """
    def spell(token):
        return ''.join(BYTE_CHARS[b] for b in token)

    names = {spell(token): i for token, i in vocab.items()}
    pairs = [(spell(a), spell(b)) for a, b in merges]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({**names, EOT: eot}, pairs, ignore_merges=True))
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pattern:
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([EOT])
    return theirs


def from_bytes(tokenizers, tokenizer):
    return byte_level(tokenizers, {bytes([b]): b for b in range(256)}, [], tokenizer.eot)


def from_chars(tokenizers, tokenizer):
    """One token per character."""
    vocab = {c: i for i, c in enumerate(tokenizer.spelling)}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=tokenizer.spelling[-1]))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    theirs.decoder = tokenizers.decoders.Fuse()
    theirs.add_special_tokens([EOT] if tokenizer.eot is not None else [])
    return theirs


def from_tiktoken(tokenizers, tokenizer):
    """
    tiktoken merges the pair whose union has the lowest id. The library needs a list of pairs in that order:
    the last merge of each token.
    """
    ranks = tokenizer.encoding._mergeable_ranks
    merges = [last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]
    return byte_level(tokenizers, ranks, merges, tokenizer.eot, tokenizer.encoding._pat_str)


def last_merge(token, rank, ranks):
    """The two parts of `token` after all merges before its own."""
    parts = [token[n:n + 1] for n in range(len(token))]
    while len(parts) > 2:
        _, place = min((ranks.get(parts[n] + parts[n + 1], rank), n) for n in range(len(parts) - 1))
        parts[place:place + 2] = [parts[place] + parts[place + 1]]
    return tuple(parts)


def from_sentencepiece(tokenizers, tokenizer):
    """BPE merges the pair whose union has the highest score; Unigram uses the scores themselves."""
    from sentencepiece import sentencepiece_model_pb2
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sp.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix |= tokenizer.kind == 'llama2.c'
    is_bpe = model.trainer_spec.model_type == 2
    theirs = tokenizers.Tokenizer(bpe_of(tokenizers, model) if is_bpe else unigram_of(tokenizers, model))
    normalizers, decoders, norm = tokenizers.normalizers, tokenizers.decoders, model.normalizer_spec
    steps = []
    if norm.precompiled_charsmap:
        steps.append(normalizers.Precompiled(norm.precompiled_charsmap))
    if norm.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')]
    if norm.add_dummy_prefix:
        steps.append(normalizers.Prepend('▁'))
    theirs.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', '▁')])
    back = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    if norm.add_dummy_prefix:
        back.append(decoders.Strip(' ', 1, 0))
    theirs.decoder = decoders.Sequence(back)
    theirs.add_special_tokens([p.piece for p in model.pieces if p.type in (p.CONTROL, p.UNKNOWN)])
    return theirs


def bpe_of(tokenizers, model):
    """
    The library's BPE of a sentencepiece model: all pairs that merge to a piece, the highest scores first.
    """
    places = {p.piece: n for n, p in enumerate(model.pieces)}
    normal = [p for p in model.pieces if p.type in (p.NORMAL, p.USER_DEFINED)]
    merges = []
    for p in sorted(normal, key=lambda p: -p.score):
        for cut in range(1, len(p.piece)):
            left, right = p.piece[:cut], p.piece[cut:]
            if left in places and right in places:
                merges.append((left, right))
    unk = model.pieces[model.trainer_spec.unk_id].piece
    byte_fallback = model.trainer_spec.byte_fallback
    return tokenizers.models.BPE(places, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)


def unigram_of(tokenizers, model):
    pieces = [(p.piece, p.score) for p in model.pieces]
    return tokenizers.models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


# -----------------------------------------------------------------------------
# For llama.cpp

def keeps_text(text):
    """Whether the tokenizer in a tokenizer.json with this content reads every blank and letter as it is."""
    import tokenizers
    normalizer = tokenizers.Tokenizer.from_str(text).normalizer
    found = BLANKS if normalizer is None else call('tokenizer.json', normalizer.normalize_str, BLANKS)
    return found.replace('▁', ' ').removeprefix(' ') == BLANKS


def to_sentencepiece(text, end):
    """
    The content of a tokenizer.model, bytes, for a tokenizer.json with the content `text`: llama.cpp's
    converter finds the order of merges only there. end: the text of the end-of-text token. None if it cannot
    represent the tokenizer.
    """
    fields = json.loads(text)
    model = fields['model']
    if model['type'] != 'BPE' or not model.get('byte_fallback'):
        return None
    from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.trainer_spec.eos_piece = end
    proto.normalizer_spec.name = 'identity'
    proto.normalizer_spec.add_dummy_prefix = adds_space(text)
    proto.normalizer_spec.remove_extra_whitespaces = False

    vocab = {piece: i for piece, i in model['vocab'].items()}
    added = {token['id']: token for token in fields['added_tokens']}
    vocab |= {token['content']: i for i, token in added.items()}
    ranks = {}
    for rank, pair in enumerate(model['merges']):
        ranks.setdefault(''.join(pair), rank)
    names = {i: piece for piece, i in vocab.items()}
    if sorted(names) != list(range(len(names))):
        return None
    for i in range(len(names)):
        piece = proto.pieces.add(piece=names[i], score=-float(ranks.get(names[i], len(ranks))))
        if names[i] == model.get('unk_token'):
            piece.type, proto.trainer_spec.unk_id, proto.trainer_spec.unk_piece = piece.UNKNOWN, i, names[i]
        elif i in added:
            piece.type = piece.CONTROL if added[i]['special'] else piece.USER_DEFINED
        elif len(names[i]) == 6 and names[i].startswith('<0x'):
            piece.type = piece.BYTE
    return proto.SerializeToString()


def sentencepiece_of(tokenizer, text):
    """
    The content of a tokenizer.model that encodes as `tokenizer` does, whose tokenizer.json has the content
    `text`; None if there is none.
    """
    data = tokenizer.files.get('tokenizer.model') or to_sentencepiece(text, tokenizer.eot_text)
    if data is None:
        return None
    try:
        same = SentencePieceTokenizer(data).encode(PROBE) == tokenizer.encode(PROBE)
    except (RuntimeError, UserError):
        same = False
    return data if same else None
