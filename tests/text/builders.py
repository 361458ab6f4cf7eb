"""Small tokenizers of the kinds that the supported models use, made without any download."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headrace import text

CORPUS = [
    "The headrace feeds the wheel, and it must never stall it.",
    "héllo wörld, naïve café - ça va? Ünïcödé",
    "你好,世界。日本語 한국어 🙂🙃 emoji",
    "def f(x):\n    return x + 1\n\n\tif True:  print('x')",
    "1 + 2 = 3; 10 * 20 = 200",
]
HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "reply with <tool_call> tags<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s é>"]


def byte_level(template: str | None = HERMES_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in Llama 3 and Qwen: the 256 bytes, some merges, special and plain added tokens."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return _wrap(library, template, eos_token="<|im_end|>", bos_token="<|endoftext|>")


def byte_fallback(prepend: bool = True) -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE as in Llama 2 and Mistral: U+2581 for spaces, <0xNN> for what is not in the vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({character for text in CORPUS[:1] for character in text.replace(" ", "\u2581")} | {"\u2581", "é"})
    words = ["\u2581the", "\u2581\u2581", "\u2581wheel", "headrace", "\u2581\u2581\u2581"]
    vocab = {token: index for index, token in enumerate([*tokens, *letters, *words])}
    merges: list[tuple[str, str]] = [("\u2581", "\u2581")]
    library = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("\u2581")] if prepend else []
    library.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prepend else []
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    library.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return _wrap(library, None, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def byte_fallback_read_whole() -> PreTrainedTokenizerFast:
    """The same with a decoder that cannot be read as a stream."""
    wrapped = byte_fallback()
    library = wrapped.backend_tokenizer
    library.decoder = decoders.Sequence([library.decoder, decoders.Replace("headrace", "Headrace")])
    return wrapped


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """Unigram with the metaspace decoder."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "\u2581abcdefgh1é")]
    words = [("\u2581ab", -1.0), ("cd\u2581e", -1.5), ("\u2581\u2581", -2.0)]
    library = Tokenizer(models.Unigram([*pieces, *words], unk_id=0, byte_fallback=False))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return _wrap(library, None, eos_token="</s>")


def character_level(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {character: index for index, character in enumerate(["<eos>", *"abcde 0123+=?.é"])}
    library = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if decoder is not None:
        library.decoder = decoder
    library.add_special_tokens([AddedToken("<eos>", special=True)])
    return _wrap(library, None, eos_token="<eos>")


def word_pieces() -> PreTrainedTokenizerFast:
    """A decoder that cannot be read as a stream; pieces that continue a word follow without a space."""
    vocab = {token: index for index, token in enumerate(["[UNK]", "a", "##b", "c", "##d", ".", "!", "do", "not"])}
    library = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece(cleanup=True)
    return _wrap(library, None, eos_token="[UNK]")


def _wrap(library: Tokenizer, template: str | None, **special_tokens: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=library, clean_up_tokenization_spaces=False, **special_tokens)
    wrapped.chat_template = template
    return wrapped


def special_token_ids(tokenizer: text.Tokenizer) -> list[int]:
    """Those that `skip_special_tokens` hides."""
    found = map(tokenizer.special_token_id, tokenizer._special_tokens)
    return sorted(token_id for token_id in found if token_id is not None)
