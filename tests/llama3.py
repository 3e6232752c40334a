"""The real Llama-3 tokenizer, built from the ranks that Meta publishes with its own code."""

from functools import cache
from pathlib import Path


@cache
def llama3_tokenizer():
    """Llama-3's tokenizer as Hugging Face has it, from the ranks that Meta's package carries."""
    import llama_models.llama3
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from refusal_lens.prompts.chat_template import LLAMA3_CHAT_TEMPLATE

    meta = meta_tokenizer()
    converted = TikTokenConverter(
        vocab_file=str(Path(llama_models.llama3.__file__).parent / "tokenizer.model"),
        pattern=meta.pat_str,
        extra_special_tokens=list(meta.special_tokens),
    ).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=converted,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_CHAT_TEMPLATE,
        padding_side="right",
    )


@cache
def meta_tokenizer():
    """Meta's own tokenizer."""
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer.get_instance()
