"""A byte-level tokenizer, built in code: a character outside ASCII takes several tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES_VOCAB_SIZE = 259


def byte_tokenizer():
    """Return a tokenizer of single bytes that puts <bos> before a text and <eos> after it."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {byte: at for at, byte in enumerate(alphabet, start=3)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
