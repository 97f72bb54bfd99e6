"""The byte vocabulary as tokenizer files that `AutoTokenizer` loads.

A byte-level BPE without merges is a tokenizer whose tokens are the UTF-8 bytes, so nothing but its ids is ours.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flexolmo_jax.data.vocabulary import EOS_ID, PAD_ID, VOCAB_SIZE

_SPECIAL = {"<pad>": PAD_ID, "</s>": EOS_ID, "<unk>": 2}
_FIRST_BYTE = VOCAB_SIZE - 256


def byte_tokenizer() -> Tokenizer:
    """Text to the ids of `flexolmo_jax.data.vocabulary`, and back."""
    vocabulary = _SPECIAL | {symbol: byte + _FIRST_BYTE for byte, symbol in enumerate(_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def write_tokenizer(directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        # Text that happens to read "</s>" is text: five bytes in training, so five bytes here.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content, indent=1) + "\n")


def _symbols() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself if it is visible Latin-1, else one from U+0100 on.

    Source: `bytes_to_unicode` of the GPT-2 release.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]
