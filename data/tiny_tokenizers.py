"""Tokenizers made by hand for the tiny pipelines: no download, any text accepted, and the real classes and templates.

CLIP's is ``data.tiny_sd.write_tokenizer``. Each returns an object that survives ``save_pretrained``.
"""

from collections.abc import Sequence
from typing import Any

from data.tiny_sd import byte_alphabet

QWEN_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's template for text. Only ``enable_thinking=False`` adds an empty thought (FLUX.2 [klein]; not Z-Image)."""
QWEN_IMAGE_WORDS = (
    "system Describe user assistant Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext Ġspatial"
    " Ġrelationships Ġof Ġobjects Ġand Ġbackground"
)
"""The words of Qwen-Image's prompt template, one token each as in Qwen's vocabulary. Ġ is the space before a word."""

MISTRAL_SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
MISTRAL_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set tag = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}[{{ tag }}]"
    "{% for part in message.content %}{{ '[IMG]' if part.type == 'image' else part.text }}{% endfor %}[/{{ tag }}]"
    "{% endfor %}"
)
"""The system and user messages of Mistral Small 3's template; the contents are lists of typed parts."""


def byte_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that join each word (in the byte alphabet) into one token, letter by letter from its start."""
    merges = ((word[:end], word[end]) for word in words for end in range(1, len(word)))
    return list(dict.fromkeys(merges))


def qwen_tokenizer():
    """Qwen2's byte-level tokenizer, with the merges of Qwen-Image's template.

    The Qwen-Image pipeline cuts the first 34 tokens off the encoded prompt: the template must be that long here too.
    """
    from transformers import Qwen2TokenizerFast

    merges = byte_merges(QWEN_IMAGE_WORDS.split())
    tokens = [*byte_alphabet(), *("".join(pair) for pair in merges), *QWEN_SPECIAL_TOKENS]
    endoftext, start, end = QWEN_SPECIAL_TOKENS
    tokenizer = Qwen2TokenizerFast(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=endoftext,
        pad_token=endoftext,
        eos_token=end,
        additional_special_tokens=[start, end],
        model_max_length=4096,
    )
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    return tokenizer


def t5_tokenizer():
    """T5's unigram tokenizer with one token per printable ASCII character; others become ``<unk>``."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def mistral_processor(patch_size: int, image_size: int):
    """Mistral Small 3's byte-level tokenizer and image processor, in the processor that FLUX.2 [dev] takes.

    Args:
        patch_size: of the vision tower, in pixels.
        image_size: longest side of an image, in pixels.
    """
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = _mistral_tokenizer()
    image_processor = PixtralImageProcessor(size={"longest_edge": image_size}, patch_size=patch_size)
    return PixtralProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        spatial_merge_size=2,
        chat_template=MISTRAL_CHAT_TEMPLATE,
    )


def _mistral_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Mistral's special tokens have the first ids.
    tokens = [*MISTRAL_SPECIAL_TOKENS, *byte_alphabet()]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(MISTRAL_SPECIAL_TOKENS[4:]),
        padding_side="left",
        model_max_length=4096,
    )
