"""log p(text | what came before it), token by token: from one forward over everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from transfusion.generation.arguments import check_token_ids
from transfusion.generation.requests import check_contexts, one_of_each
from transfusion.generation.rows import full_hidden, inference
from transfusion.model import Transfusion
from transfusion.sequence import Document, Text, document_length


def score(
    model: Transfusion, contexts: Sequence[Document], targets: Sequence[Tensor], *, impl: str = "auto"
) -> list[Tensor]:
    """-> for each context the log-probabilities (T_i,) of its target's tokens, each after those before it.

    They are float32, float64 for float64 weights. Their sum is log p(target | context): of a caption after an image,
    or of an answer after a question.

    Args:
        model: in any mode, which is kept.
        contexts: documents so far, each a Text that begins with BOS, then any Text and clean Image segments.
        targets: token ids (T_i,) int64 of the text that follows each; EOS scores the end too.
        impl: of the kernels.

    Raises:
        ValueError, TypeError: an argument that does not fit, named with the fix.
        FloatingPointError: log-probabilities that are not finite.
    """
    contexts, targets = one_of_each("targets", targets, contexts)
    for index, target in enumerate(targets):
        check_token_ids(f"target {index}", target)
        if not len(target):
            raise ValueError(f"target {index} is empty; it must be (T,) with at least one token")
    check_contexts(model, contexts)
    documents = [(*context, Text(target)) for context, target in zip(contexts, targets, strict=True)]
    check_contexts(model, documents)
    with inference(model):
        hidden, lengths = full_hidden(model, documents, impl)
        before = [document_length(context, model.config.patch_size) - 1 for context in contexts]
        spans = zip(before, lengths, strict=True)
        states = [row[first : last - 1] for row, (first, last) in zip(hidden, spans, strict=True)]
        logits = model.head(torch.cat(states))
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        chosen = log_p.gather(1, torch.cat(list(targets)).to(log_p.device).long()[:, None])[:, 0].cpu()
    if not chosen.isfinite().all():
        raise FloatingPointError("log-probabilities are not finite; look for NaN in the weights")
    return list(chosen.split([len(target) for target in targets]))
