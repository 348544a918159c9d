"""The next token is the sum of all tokens so far, modulo the vocabulary. It caches token ids, a number each."""

import torch
from torch import Tensor, nn

from wave64.serve.model.batch import Batch
from wave64.serve.model.config import Keys, ModelConfig, common, read_rope
from wave64.serve.model.family import Family
from wave64.serve.model.layers import Embedding, KVCache
from wave64.serve.model.parallel import Ranks


def read_config(architecture: str, keys: Keys) -> ModelConfig:
    return ModelConfig(architecture=architecture, num_heads=1, num_kv_heads=1, head_dim=2, attention_bias=False,
                       mlp_bias=False, **common(keys, read_rope(keys, 64), keys.count("max_position_embeddings")))


def one_id(config: ModelConfig, ranks: Ranks, num_pages: int, page_size: int) -> tuple[tuple[int, ...], ...]:
    return ((num_pages, page_size),)


class RunningSum(nn.Module):
    derived_weights = unused_weights = ()

    def __init__(self, config: ModelConfig, ranks: Ranks):
        super().__init__()
        self.embed_tokens, self.vocab_size = Embedding(config.vocab_size, 1), config.vocab_size

    def forward(self, batch: Batch, kv_cache: list[KVCache]) -> Tensor:
        (ids,), = kv_cache
        page_size = ids.shape[1]
        ids.view(-1)[batch.slot_mapping] = batch.input_ids.to(ids.dtype)
        n, sums = batch.num_decodes, []
        for table, length in zip(batch.page_table[:n], batch.seq_lens[:n], strict=True):
            position = torch.arange(int(length))
            sums.append(ids[table[position // page_size].long(), position % page_size].sum())
        starts = batch.cu_seqlens_q.tolist()
        for i, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
            before = ids.new_zeros(())
            if batch.prefix_slots is not None:
                its = slice(*batch.cu_seqlens_prefix[i : i + 2].tolist())
                before = ids.view(-1)[batch.prefix_slots[its]].sum()
            sums.extend(before + batch.input_ids[n + begin : n + end].cumsum(0))
        answers = torch.stack(sums)[batch.logit_rows].long() % self.vocab_size
        return nn.functional.one_hot(answers, self.vocab_size).float()


FAMILY = Family(read_config, one_id, RunningSum, reads_prefixes=True)
