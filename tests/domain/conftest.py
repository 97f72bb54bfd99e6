"""A small anchor, two corpora, and encoders as Hugging Face and sentence-transformers write them."""

from pathlib import Path

import pytest

PROSE = [f"The quick brown fox number {n} jumps over the lazy dog, again and again." for n in range(40)]
SUMS = [f"{a} + {b} = {a + b}\n" for a in range(8) for b in range(8)]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """`anchor`, `math` and `public`."""
    from tests.small import write_anchor, write_corpus

    root = tmp_path_factory.mktemp("domain")
    write_anchor(root / "anchor")
    write_corpus(root / "public", PROSE)
    write_corpus(root / "math", SUMS)
    return root


@pytest.fixture(scope="session")
def hf_encoder(tmp_path_factory) -> Path:
    """A Hugging Face encoder, 12 wide, with a tokenizer of single characters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("encoder")
    characters = sorted(set("".join(PROSE + SUMS)))
    vocabulary = {symbol: number for number, symbol in enumerate(["[PAD]", "[UNK]", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=40
    ).save_pretrained(directory)
    torch.manual_seed(0)
    sizes = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=40, initializer_range=0.5, **sizes)
    BertModel(config).save_pretrained(directory)
    return directory
