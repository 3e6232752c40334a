"""A small tokenizer with the splitting, special tokens and chat template of Llama-3."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from refusal_lens.prompts.chat_template import LLAMA3_CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESERVED = tuple(f"<|reserved_special_token_{i}|>" for i in range(5))
# Llama-3's first ten special tokens, in the same order and after the ordinary tokens.
SPECIAL_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4]),
    *("<|start_header_id|>", "<|end_header_id|>", RESERVED[4], "<|eot_id|>"),
)
# Llama-3's pattern for splitting text before byte merges.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer trained deterministically on `texts`.

    The tokenizer prepends one BOS and has no padding token. `vocab_size` includes the 256 bytes and
    the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    bos = SPECIAL_TOKENS[0]
    with_bos = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    offsets = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([offsets, with_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=LLAMA3_CHAT_TEMPLATE,
    )
