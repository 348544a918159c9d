"""/tokenize and /detokenize: what a model's tokenizer makes of texts, conversations and token ids."""

from typing import Any

from wave64.serve.http.generation import Generator
from wave64.serve.http.operator_schemas import DetokenizeRequest, TokenizeRequest

Json = dict[str, Any]


async def tokenize(body: TokenizeRequest, generator: Generator) -> Json:
    """Token ids as a prompt of this text or conversation has them. Raises ApiError."""
    if body.messages is not None:
        begin = body.add_generation_prompt is not False
        text = await generator.render(body.messages, body.tools or [], body.chat_template_kwargs, begin)
        prompts, special, is_list = [text], bool(body.add_special_tokens), False
    else:
        is_list = isinstance(body.prompt, list)
        prompts, special = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""], True
        special = body.add_special_tokens is not False
    names = ["messages" if body.messages is not None else "prompt"] * len(prompts)
    found = await generator.encode([*prompts], names, special, is_truncated=True)
    limit = generator.ready.context_length
    answer: Json = {"tokens": found if is_list else found[0], "max_model_len": limit,
                    "count": [*map(len, found)] if is_list else len(found[0])}  # fmt: skip
    if body.return_token_strs:
        texts = [[generator.tokenizer.token_text(token) for token in ids] for ids in found]
        answer["token_strs"] = texts if is_list else texts[0]
    return answer


def detokenize(body: DetokenizeRequest, generator: Generator) -> Json:
    """The text of token ids, by SGLang's name and vLLM's. Raises ApiError."""
    skip = body.skip_special_tokens is not False
    texts = [generator.tokenizer.decode(ids, skip) for ids in body.lists]
    is_list = isinstance(body.tokens[0], list)
    return {"text": texts if is_list else texts[0], "prompt": texts if is_list else texts[0]}
