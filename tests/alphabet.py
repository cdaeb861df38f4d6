"""The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019, encoder.py of GPT-2)."""

PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
REST = [byte for byte in range(256) if byte not in PRINTED]
ALPHABET = {chr(byte): byte for byte in PRINTED} | {chr(256 + i): byte for i, byte in enumerate(REST)}


def text_of(model, tokens) -> bytes:
    """The bytes that tokens of a `tokenizers` model stand for, read off the names of the tokens."""
    return b"".join(bytes(ALPHABET[c] for c in model.id_to_token(int(token))) for token in tokens)
